"""A Control file's wider input layer: put in place of the narrow one, and the narrow one put back."""

from typing import Any

from torch import nn

from .deltas import LoraDelta
from .layers.base_weight import is_plain
from .layers.layer import AdapterLayer
from .layers.walks import forget
from .layout import base_of


def hinders_widening(module: nn.Module) -> str | None:
    """Why the input of this layer cannot be widened now, None if it can."""
    if not is_plain(base_of(module)):
        return "a Control LoRA widens this layer, which a packed or quantised weight does not allow"
    if not isinstance(module, AdapterLayer):
        return None
    if module.narrow_bases:
        return "another Control LoRA has widened this layer to another size; delete it first"
    if module.fused is not None:
        fused = ", ".join(module.fused.coefficients)
        return f"a Control LoRA widens this layer, into which {fused} is fused; call unfuse_lora() first"
    stiff = [n for n in module.templates if not isinstance(module.delta(n), LoraDelta)]
    return f"a Control LoRA widens this layer, which {', '.join(stiff)} does not allow" if stiff else None


def widen(layer: AdapterLayer, model: nn.Module, inputs: int) -> None:
    """Give a layer more inputs that it does not heed yet, its adapters too, and say so in the model's configuration."""
    base = layer.base_layer
    assert isinstance(base, nn.Linear)
    before = base.in_features
    layer.base_layer, layer.narrow_bases = _widened(base, inputs), (base,)
    forget()
    layer.resize_inputs(inputs)
    register_inputs(model, before, inputs)


def narrow(layer: AdapterLayer, model: nn.Module) -> None:
    """Undo `widen`: the layer of before returns, on the device and in the dtype that the wide one has by now."""
    if not layer.narrow_bases:
        return
    base, wide = layer.narrow_bases[0], layer.base_layer
    assert isinstance(base, nn.Linear)
    assert isinstance(wide, nn.Linear)
    weight = wide.weight.detach()[:, : base.in_features]
    if (weight.device, weight.dtype) != (base.weight.device, base.weight.dtype):
        base.weight.data = weight.contiguous()
    base.bias = wide.bias
    layer.base_layer, layer.narrow_bases = base, ()
    forget()
    layer.resize_inputs(base.in_features)
    register_inputs(model, wide.in_features, base.in_features)


def unwidened(layer: AdapterLayer) -> nn.Linear | None:
    """A widened base without its further inputs; None where there are none, or something that is fused heeds them."""
    if not layer.narrow_bases or layer.base_layer.weight.is_meta:
        return None
    base, wide = layer.narrow_bases[0], layer.base_layer
    assert isinstance(base, nn.Linear)
    assert isinstance(wide, nn.Linear)
    kept, further = wide.weight.detach().split([base.in_features, wide.in_features - base.in_features], dim=1)
    if further.any():
        return None
    plain = nn.Linear(base.in_features, wide.out_features, bias=False, device="meta", dtype=kept.dtype)
    plain.weight = nn.Parameter(kept.contiguous(), requires_grad=wide.weight.requires_grad)
    plain.bias = wide.bias
    return plain.train(wide.training)


def register_inputs(model: nn.Module, before: int, after: int) -> None:
    """Note in a model's configuration how many inputs it has: pipelines read the number of channels there."""
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(model, "register_to_config") and config.get("in_channels") == before:
        register: Any = model.register_to_config
        register(in_channels=after)


def _widened(narrow: nn.Linear, inputs: int) -> nn.Linear:
    """The same map on the first inputs, and zero on the further ones."""
    weight = narrow.weight
    wide = nn.Linear(inputs, narrow.out_features, bias=False, device="meta", dtype=weight.dtype)
    data = weight.new_zeros(narrow.out_features, inputs)
    data[:, : narrow.in_features] = weight.detach()
    wide.weight = nn.Parameter(data, requires_grad=weight.requires_grad)
    wide.bias = narrow.bias
    return wide.train(narrow.training)
