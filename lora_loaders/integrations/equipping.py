"""Methods for one instance: it gets a subclass of its own class with a mixin in front, under the same name."""

from functools import cache
from typing import Any


def equip(instance: Any, mixin: type) -> None:
    """Put the mixin in front of the instance's class; does nothing where that is done."""
    if not isinstance(instance, mixin):
        instance.__class__ = _equipped(type(instance), mixin)


def unequip(instance: Any) -> None:
    """Give the instance its own class back."""
    plain = type(instance).__dict__.get("_lora_plain_class")
    if plain is not None:
        instance.__class__ = plain


def is_equipped(instance: Any) -> bool:
    """Whether `equip` gave this instance its class."""
    return "_lora_plain_class" in vars(type(instance))


@cache
def _equipped(cls: type, mixin: type) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    body = {**names, "_lora_plain_class": cls, "__reduce_ex__": _reduce}
    return _equal_to_plain(type(cls))(cls.__name__, (mixin, cls), body)


@cache
def _equal_to_plain(meta: type) -> type:
    """A metaclass whose classes equal the plain ones: `from_pipe` asks for `type(component) in expected_types`."""

    def plain(cls: type) -> type:
        return cls.__dict__.get("_lora_plain_class", cls)

    def equal(cls: type, other: object) -> bool:
        return isinstance(other, type) and plain(cls) is plain(other)

    return type(meta.__name__, (meta,), {"__eq__": equal, "__hash__": lambda cls: hash(id(plain(cls)))})


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    """Pickle as the plain class, equipped again when it is read: a class made at run time cannot be found by name."""
    plain = type(self)._lora_plain_class
    mixin = type(self).__mro__[1]
    return _rebuild, (plain, mixin), self.__dict__.copy()


def _rebuild(plain: type, mixin: type) -> Any:
    return object.__new__(_equipped(plain, mixin))
