"""A method that training scripts call on the class and people call on a pipeline."""

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class class_or_instance(Generic[T]):
    """Bind to the instance where there is one, to the class where there is none."""

    def __init__(self, function: Callable[..., T]) -> None:
        self._function = function
        update_wrapper(self, function)  # type: ignore[arg-type]

    def __get__(self, instance: Any, owner: type) -> Callable[..., T]:
        return partial(self._function, owner if instance is None else instance)
