"""Walks through a model's modules, remembered while a change of it lasts: each takes a tenth of a switch."""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

from torch import nn


class _Found(threading.local):
    walks: dict[Any, Any] | None = None


_found = _Found()
Walk = TypeVar("Walk", bound=Callable[..., Any])


@contextmanager
def remembered() -> Generator[None]:
    """In the block this thread changes models alone, and walks of one find the same until `forget` is called."""
    if _found.walks is not None:
        yield
        return
    _found.walks = {}
    try:
        yield
    finally:
        _found.walks = None


def forget() -> None:
    """Layers came or went, or another thread may have changed something: what was found holds no longer."""
    if _found.walks is not None:
        _found.walks.clear()


def walk(function: Walk) -> Walk:
    """Let a function of a model give what it gave before, while that is remembered; nobody may write into it."""

    @wraps(function)
    def run(model: nn.Module, **options: Any) -> Any:
        walks = _found.walks
        if walks is None:
            return function(model, **options)
        key = (function, model, *options.items())
        if key not in walks:
            walks[key] = function(model, **options)
        return walks[key]

    return cast(Walk, run)
