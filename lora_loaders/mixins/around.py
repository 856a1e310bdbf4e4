"""Methods that run a class's own one of the same name within something of ours: behind a mixin, and patched.

`super()` would do for a mixin only: a function that was copied onto another class asks for a class that is no parent
of it.
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any


class around_own:
    """A mixin's method `function(self, own, *args, **kwargs)` over the class's own one, which it gets bound.

    Where a class has none of that name, neither has the mixin.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        update_wrapper(self, function)  # type: ignore[arg-type]

    def __set_name__(self, owner: type, name: str) -> None:
        self._mixin, self._name = owner, name

    def __get__(self, instance: Any, owner: type) -> Any:
        behind = owner.__mro__[owner.__mro__.index(self._mixin) + 1 :]
        raw = next((vars(cls)[self._name] for cls in behind if self._name in vars(cls)), None)
        if raw is None:
            raise AttributeError(f"{owner.__name__!r} has no attribute {self._name!r}")
        return self.over(raw).__get__(instance, owner)

    def over(self, raw: Any) -> Any:
        """What a class shall hold under the name instead of this function, static method or the like."""
        function = self._function
        if isinstance(raw, staticmethod):
            own: Callable[..., Any] = raw.__func__

            def unbound(*args: Any, **kwargs: Any) -> Any:
                return function(None, own, *args, **kwargs)

            return staticmethod(update_wrapper(unbound, own))

        def method(instance: Any, *args: Any, **kwargs: Any) -> Any:
            return function(instance, raw.__get__(instance, type(instance)), *args, **kwargs)

        return update_wrapper(method, raw)
