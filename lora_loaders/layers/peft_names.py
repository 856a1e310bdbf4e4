"""The names by which PEFT's users read and turn a layer's adapters; the layer's own state stands behind each of them.

`fuse_lora`, `set_adapters` and the like do the same for whole models and are what new code calls.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_loaders.deltas import Delta

from .shared import Shared


class PeftNames:
    """PEFT's `BaseTunerLayer` and `LoraLayer`, as far as people reach into them."""

    shared: Shared
    templates: dict[str, Delta]
    weights: Mapping[str, float]
    active: tuple[str, ...]
    fused: Any
    base_layer: nn.Module
    cast_input_dtype_enabled: bool = True
    """Written by PEFT's helpers, as under layerwise casting; inputs are cast to the layer's compute dtype anyhow."""

    if TYPE_CHECKING:  # the layer's own

        def _rewrite_slot(self) -> None: ...

        def delta(self, name: str) -> Delta: ...  # noqa: D102

        def parameters_of(self, name: str) -> list[nn.Parameter]: ...  # noqa: D102

        SLOTS: Sequence[str]

        def clear_slots(self, slots: Sequence[str]) -> None: ...  # noqa: D102

        def reweigh(self, weights: Mapping[str, float]) -> None: ...  # noqa: D102

    def get_base_layer(self) -> nn.Module:
        """The wrapped layer."""
        return self.base_layer

    @property
    def r(self) -> dict[str, int]:
        """Adapter -> rank, for those that have one."""
        return {name: delta.rank for name, delta in self._deltas().items() if delta.rank is not None}

    @property
    def lora_alpha(self) -> dict[str, float]:
        """Adapter -> alpha; the rank where the file gave none, which is what it means."""
        deltas = self._deltas()
        return {name: _alpha(delta) for name, delta in deltas.items() if delta.rank is not None}

    @property
    def scaling(self) -> dict[str, float]:
        """Adapter -> alpha / rank (rsLoRA: alpha / sqrt(rank)) times its weight."""
        return {name: _scaling(delta) * self.weights[name] for name, delta in self._deltas().items()}

    def _deltas(self) -> Mapping[str, Delta]:
        return {name: self.delta(name) for name in self.templates}

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self.active)

    @property
    def active_adapter(self) -> list[str]:
        """The same under PEFT's other name."""
        return list(self.active)

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are fused into the base weight."""
        return list(self.fused.coefficients) if self.fused is not None else []

    @property
    def merged(self) -> bool:
        """Whether any adapter is fused."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether the model's adapters are switched off."""
        return not self.shared.enabled

    def set_scale(self, adapter: str, scale: float) -> None:
        """Give an adapter this weight; names that the layer has not are skipped."""
        if adapter in self.templates:
            self.reweigh({adapter: float(scale)})
            self._rewrite_slot()

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters' weights; 0 cannot be undone by dividing, so `set_scale` must follow it."""
        for name in self.active:
            if name in self.templates:
                self.reweigh({name: self.weights[name] * float(scale)})
        self._rewrite_slot()

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the active adapters' weights by a factor; without one they are 1 again."""
        for name in self.active:
            if name in self.templates:
                self.reweigh({name: 1.0 if not scale else self.weights[name] / float(scale)})
        self._rewrite_slot()

    def set_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Make these adapters the active ones of this layer."""
        self.active = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        train_active([self])
        self._rewrite_slot()


def train_active(layers: Sequence[PeftNames]) -> None:
    """Give gradients to the active ones of a model's trained adapters, and take them from its others of these.

    As PEFT does at each switch; adapters that were loaded are left as they are. To be called before the slots are
    written: they remember what requires a gradient, and are written elsewhere, since a backward that is still to come
    may need what stands in them. Reserved room stays where it is.
    """
    if not layers or not layers[0].shared.trained:
        return
    for layer in layers:
        if not layer.shared.reserved:
            layer.clear_slots(layer.SLOTS)
        for name in layer.shared.trained.intersection(layer.templates):
            for parameter in layer.parameters_of(name):
                parameter.requires_grad_(layer.shared.enabled and name in layer.active)


def _scaling(delta: Delta) -> float:
    return float(getattr(getattr(delta, "inner", delta), "scaling", 1.0))


def _alpha(delta: Delta) -> float:
    inner = getattr(delta, "inner", delta)
    return float(getattr(inner, "alpha", None) or delta.rank or 0)
