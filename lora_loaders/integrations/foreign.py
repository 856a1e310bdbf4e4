"""Models that carry peft's own layers: patched methods leave them to those that diffusers has for them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from lora_loaders.errors import AdapterStateError
from lora_loaders.layout import is_foreign, shared_of
from lora_loaders.loading import adapter_names
from lora_loaders.mixins.components import components_of


def heeding(name: str, ours: Any, theirs: Any) -> Any:
    """Our method for our layers, and diffusers' own one, if there is one, for peft's.

    Only what works on an instance can tell; the rest is ours, and a load refuses peft's layers by itself.
    """
    if isinstance(ours, property) and isinstance(theirs, property):
        return property(_either(name, ours.fget, theirs.fget), doc=ours.__doc__)
    if not inspect.isfunction(ours) or (name.startswith("_") and theirs is None):
        return ours
    return _either(name, ours, theirs if inspect.isfunction(theirs) else None)


def _either(name: str, ours: Any, theirs: Callable[..., Any] | None) -> Callable[..., Any]:
    @functools.wraps(ours)
    def method(self: Any, *args: Any, **options: Any) -> Any:
        models = {type(self).__name__: self} if isinstance(self, nn.Module) else components_of(self)
        foreign = [component for component, model in models.items() if is_foreign(model)]
        if not foreign:
            return ours(self, *args, **options)
        mixed = any(shared_of(model) is not None and adapter_names(model) for model in models.values())
        if theirs is None or (mixed and not name.startswith(("get_", "unload"))):
            raise AdapterStateError(
                f"{name}: {', '.join(foreign)} carries peft's adapters"
                + (", and other components this package's" if mixed else ", for which diffusers has no such method"),
                mend="Call it on the component, or unload_lora_weights() before loading with this package.",
                state="Nothing was changed.",
            )
        return theirs(self, *args, **options)

    return method
