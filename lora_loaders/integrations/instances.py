"""attach(pipe): any pipeline or model instance gains the LoRA methods, and detach takes them away.

The instance gets a subclass of its own class with the mixin in front, under the same name; its components too.
"""

from functools import cache
from typing import Any, TypeVar

from torch import nn

from lora_loaders.activity import unload
from lora_loaders.attaching import RESERVED_RANK
from lora_loaders.loading import adapter_names
from lora_loaders.mixins.model import LoraModelMixin
from lora_loaders.mixins.pipeline import LoraPipelineMixin

T = TypeVar("T")


def attach(target: T) -> T:
    """Give a pipeline or model instance, and its components, every LoRA method; does nothing where that is done.

    Args:
        target: a diffusers pipeline, or any model.

    Returns:
        The same instance. Its class keeps its name, and `isinstance`, pickling and `save_pretrained` go on as before.
    """
    if isinstance(target, nn.Module):
        _equip(target, LoraModelMixin)
        return target
    _equip(target, LoraPipelineMixin)
    for model in target.lora_components.values():  # type: ignore[attr-defined]
        _equip(model, LoraModelMixin)
    return target


def detach(target: T, *, keep_fused: bool | None = None) -> T:
    """Undo `attach`: adapters are unloaded and the instances get their own classes back.

    Raises:
        AdapterStateError: adapters are fused and `keep_fused` does not say what to do.
    """
    models = [target] if isinstance(target, nn.Module) else list(getattr(target, "lora_components", {}).values())
    for model in models:
        if adapter_names(model):
            unload(model, keep_fused=keep_fused)
    for instance in (*models, target):
        instance.__dict__.pop(RESERVED_RANK, None)
        _unequip(instance)
    return target


def _equip(instance: Any, mixin: type) -> None:
    if not isinstance(instance, mixin):
        instance.__class__ = _equipped(type(instance), mixin)


def _unequip(instance: Any) -> None:
    plain = type(instance).__dict__.get("_lora_plain_class")
    if plain is not None:
        instance.__class__ = plain


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
