"""A method that training scripts call on the class and people call on a pipeline.

diffusers gives it other arguments in each class. It takes them all, and each class shows its own.
"""

from collections.abc import Callable
from functools import partial, update_wrapper
from inspect import Signature
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class class_or_instance(Generic[T]):
    """Bind to the instance where there is one, to the class where there is none.

    Args:
        function: the method.
        signature: from a class or an instance, the signature that its method shows.
    """

    def __init__(self, function: Callable[..., T], signature: Callable[[Any], Signature]) -> None:
        self._function, self._signature = function, signature
        update_wrapper(self, function)  # type: ignore[arg-type]

    def __get__(self, instance: Any, owner: type) -> Callable[..., T]:
        target = owner if instance is None else instance
        bound = update_wrapper(partial(self._function, target), self._function)  # type: ignore[arg-type]
        bound.__signature__ = self._signature(target)  # type: ignore[attr-defined]
        return bound

    def over(self, function: Callable[..., T]) -> "class_or_instance[T]":
        """Another function that shows the same."""
        return class_or_instance(function, self._signature)


def showing(signature: Callable[[Any], Signature]) -> Callable[[Callable[..., T]], class_or_instance[T]]:
    """Decorator: see `class_or_instance`."""
    return partial(class_or_instance, signature=signature)


def class_of(owner: Any) -> type:
    """The class that a method is called on, or that of the instance."""
    return owner if isinstance(owner, type) else type(owner)
