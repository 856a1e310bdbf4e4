"""diffusers' functions over PEFT's layers, which its modules hold by name, for models that carry our layers."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

import lora_loaders.activity as activity
from lora_loaders.layout import is_foreign, shared_of
from lora_loaders.loading import adapter_names
from lora_loaders.weights import number

from .scale import set_scale

Function = Callable[..., Any]


def _for_ours(ours: Function) -> Callable[[Function], Function]:
    """A function that takes our way for a model with our layers, and the original's for any other."""

    def replace(original: Function) -> Function:
        def function(model: nn.Module, *args: Any, **options: Any) -> Any:
            # Ours does nothing to a model without any adapter; the original would import peft for that.
            if is_foreign(model):
                return original(model, *args, **options)
            return ours(model, *args, **options)

        return function

    return replace


def _scale(model: nn.Module, weight: float) -> None:
    shared = shared_of(model)
    if shared is not None and weight != 1.0:  # 1 is what models call when our hook has taken the scale already
        set_scale(shared, number(weight))


def _unscale(model: nn.Module, weight: float | None = None) -> None:
    shared = shared_of(model)
    if shared is not None and weight not in (None, 1.0):
        set_scale(shared, 1.0)


def _unload(model: nn.Module) -> nn.Module:
    activity.unload(model, keep_fused=True)
    return model


def _enable(model: nn.Module, enabled: bool = True) -> None:
    activity.enable(model, enabled)


def _delete(model: nn.Module, adapter_name: str) -> None:
    if adapter_name in adapter_names(model):
        activity.delete(model, [adapter_name])


def _set(model: nn.Module, adapter_names: Sequence[str], weights: Any) -> None:
    activity.set_active(model, adapter_names, weights)


# Name in diffusers.utils.peft_utils -> from the original, what stands in its place.
FUNCTIONS: dict[str, Callable[[Function], Function]] = {
    "scale_lora_layers": _for_ours(_scale),
    "unscale_lora_layers": _for_ours(_unscale),
    "recurse_remove_peft_layers": _for_ours(_unload),
    "set_adapter_layers": _for_ours(_enable),
    "delete_adapter_layers": _for_ours(_delete),
    "set_weights_and_activate_adapters": _for_ours(_set),
}
