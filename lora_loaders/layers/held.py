"""Where a module's tensor is while accelerate's offloading has put a meta tensor in its place."""

from typing import Any

from torch import Tensor, nn


def held(module: nn.Module, name: str) -> Any:
    """A module's parameter or, where it is on the meta device, what its offloading hook keeps for it; None if absent.

    What the hook keeps in memory is the tensor itself: writing into it changes what the module will compute with.
    """
    parameter: Any = parameter_of(module, name)
    if not isinstance(parameter, Tensor) or not parameter.is_meta:
        return parameter
    kept = _kept_by_hook(module, name)
    return parameter if kept is None else kept


def parameter_of(module: nn.Module, name: str) -> Any:
    """`getattr(module, name, None)`, faster where a module has a parameter of that name."""
    parameter = module._parameters.get(name)  # pyright: ignore[reportPrivateUsage]
    return getattr(module, name, None) if parameter is None else parameter


def original_bias(base: nn.Module, fused: Any) -> Tensor | None:
    """A base layer's bias as it was before `fused` was fused into it."""
    if fused is not None and (fused.bias is not None or not fused.had_bias):
        return fused.bias
    return held(base, "bias")


def is_out_of_reach(module: nn.Module, name: str) -> bool:
    """Whether a parameter's values are in a file, or nowhere: what can be read of them is a copy."""
    parameter: Any = getattr(module, name, None)
    if not isinstance(parameter, Tensor) or not parameter.is_meta:
        return False
    kept, again = _kept_by_hook(module, name), _kept_by_hook(module, name)
    return kept is None or again is None or kept.data_ptr() != again.data_ptr()


def _kept_by_hook(module: nn.Module, name: str) -> Tensor | None:
    hook: Any = vars(module).get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        kept: Any = getattr(one, "weights_map", None)
        if kept is not None and name in kept:
            return kept[name]
    return None
