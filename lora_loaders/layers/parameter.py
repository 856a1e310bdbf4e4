"""Adapters on a raw parameter: no forward can be wrapped, so the parameter's own value is written, and put back."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_loaders.deltas.base import computing
from lora_loaders.errors import UnsupportedBaseError

from .base_weight import bits_of, read_weight
from .kinds import Kind
from .layer import AdapterLayer
from .raw import RawParameter
from .shared import Shared
from .walks import forget


class ParameterLayer(AdapterLayer):
    """The adapters on one raw parameter of a module.

    It stands among its owner's submodules under the parameter's own name, where attribute access finds the parameter
    first: paths, weights by path and saving know it like any layer, and the owner goes on reading its parameter.
    Switching, weighting and disabling write `round(W + Σ weight · ΔW)` into the parameter; W is kept beside it (such
    parameters are small) and comes back to the bit. State dictionaries show W.
    """

    _plain: Tensor | None
    _written: Tensor | None

    def __init__(self, base_layer: nn.Module, kind: Kind, shared: Shared) -> None:
        super().__init__(base_layer, kind, shared)
        # The owner registers the parameter; a second name for it would be one parameter too many.
        vars(self)["base_layer"] = self._modules.pop("base_layer")
        # Buffers follow the model to other devices and dtypes.
        self.register_buffer("_plain", None, persistent=False)
        self.register_buffer("_written", None, persistent=False)
        self.register_state_dict_post_hook(_show_plain)
        self.register_load_state_dict_post_hook(_rewrite)

    def settle(self) -> None:
        """Put back the value from before `write`; a value that someone else has put there since is the new base."""
        weight = read_weight(self.base_layer)
        plain = self._beneath(weight)
        if plain is not weight:
            weight.copy_(plain)
        self._plain = self._written = None

    @property
    def base_value(self) -> Tensor:
        """The parameter's value without what this layer has written into it unfused."""
        return self._beneath(read_weight(self.base_layer))

    def _beneath(self, weight: Tensor) -> Tensor:
        plain, written = self._plain, self._written
        if plain is None or written is None or not torch.equal(bits_of(weight), bits_of(written)):
            return weight
        return plain

    def write(self) -> None:
        """Bring the parameter to what the contributing adapters make of it."""
        self.settle()
        terms, _ = self.contributions()
        if not terms:
            return
        weight = read_weight(self.base_layer)
        if weight.is_meta:
            raise UnsupportedBaseError(
                "a raw parameter is on the meta device, where it has no value that an adapter could be added to",
                mend="Load the adapter before offloading the model to disk or one module at a time.",
            )
        base = self.original_weight()
        total = computing(weight).clone()
        for _, factor, delta, _ in terms:
            change = delta.delta_weight(base).detach().reshape(weight.shape)
            total += change.to(total) * (factor * self.shared.scale)
        self._plain = weight.clone()
        weight.copy_(total)
        self._written = weight.clone()


def base_value(owner: nn.Module, name: str) -> Tensor:
    """The value of a raw parameter without the adapters that are active on it; what is fused counts."""
    layer = owner._modules.get(name)  # pyright: ignore[reportPrivateUsage]
    return layer.base_value if isinstance(layer, ParameterLayer) else owner.get_parameter(name).detach()


def layer_for(base: nn.Module, kind: Kind, shared: Shared) -> AdapterLayer:
    """A new layer for adapters on this base."""
    return (ParameterLayer if isinstance(base, RawParameter) else AdapterLayer)(base, kind, shared)


def install(owner: nn.Module, name: str, layer: AdapterLayer) -> None:
    """Put a layer in its base's place, or beside a raw parameter."""
    forget()
    if isinstance(layer, ParameterLayer):
        # Not by attribute assignment, which would take the parameter away.
        vars(owner)["_modules"][name] = layer
        layer.shared.parameters.append(layer)
    else:
        vars(owner)["_modules"][name] = layer  # it stands there; attribute assignment takes ten times as long


def uninstall(owner: nn.Module, name: str, layer: AdapterLayer) -> None:
    """Undo `install`; a raw parameter has its own value again."""
    forget()
    if isinstance(layer, ParameterLayer):
        with torch.no_grad():
            layer.settle()
        del vars(owner)["_modules"][name]
        layer.shared.parameters.remove(layer)
    else:
        setattr(owner, name, layer.base_layer)


def _show_plain(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A state dictionary has the base value, as it has the base weights of wrapped layers."""
    assert isinstance(layer, ParameterLayer)
    plain, key = layer._plain, prefix.removesuffix(".")  # pyright: ignore[reportPrivateUsage]
    if plain is not None and key in state:
        state[key] = plain


@torch.no_grad()
def _rewrite(layer: nn.Module, incompatible: Any) -> None:
    """A base value that was loaded gets its adapters back at once: no forward of ours would."""
    assert isinstance(layer, ParameterLayer)
    layer.write()
