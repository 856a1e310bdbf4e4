"""AdapterLayer: the module that carries adapters. It calls its base layer, so its hooks and kernels still work."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_loaders.deltas import Delta, Factors, LoraDelta

from .base_weight import logical_shape, read_weight
from .kinds import LINEAR, Kind

# Delta field -> where its parameter stands in the layer: container, leaf inside the adapter's entry ("": the entry is
# the parameter itself), and whether it is stored transposed. The names are PEFT's.
PARAMETERS: Mapping[str, tuple[str, str]] = {
    "down": ("lora_A", "weight"),
    "up": ("lora_B", "weight"),
    "up_bias": ("lora_B", "bias"),
    "mid": ("lora_mid", "weight"),
    "magnitude": ("lora_magnitude_vector", "weight"),
    "bias": ("diff_b", ""),
    "value": ("set_weight", ""),
    "weight": ("ia3_l", ""),
}
EMBEDDING_PARAMETERS: Mapping[str, tuple[str, str]] = {"up": ("lora_embedding_A", ""), "down": ("lora_embedding_B", "")}


class Factor(nn.Module):
    """Holds the parameters of one factor of one adapter, so that they are named `lora_A.<adapter>.weight`."""

    weight: nn.Parameter
    bias: nn.Parameter


@dataclass
class Shared:
    """What all adapter layers of one model have in common."""

    enabled: bool = True
    scale: float = 1.0
    """Factor of the forward at hand (`attention_kwargs={"scale": …}`)."""
    reserved: int = 0
    """Rank that every slot has room for, so that hot-swapping finds the same storage."""
    frozen: list[nn.Parameter] = field(default_factory=list[nn.Parameter])
    """Base parameters whose gradients were switched off for training an adapter."""
    hooks: list[Any] = field(default_factory=list[Any])
    """Handles of the hooks that read the scale of a forward."""


class AdapterLayer(nn.Module):
    """A base layer and the adapters on it.

    The forward sees one *slot*: the active adapters stacked to a single pair of factors with their scales folded in
    (https://arxiv.org/abs/2106.09685, eq. 3, for a sum of adapters), so four active adapters cost what one costs and
    switching only rewrites the slot's data. Adapters that are being trained skip the slot.

    Args:
        base_layer: the layer to wrap.
        kind: what that layer can do.
        shared: the model's common state.
    """

    base_layer: nn.Module
    slot_down: Tensor | None
    slot_up: Tensor | None
    slot_in_gain: Tensor | None
    slot_out_gain: Tensor | None
    slot_bias: Tensor | None
    slot_dense: Tensor | None

    SLOTS = ("slot_down", "slot_up", "slot_in_gain", "slot_out_gain", "slot_bias", "slot_dense")

    def __init__(self, base_layer: nn.Module, kind: Kind, shared: Shared) -> None:
        super().__init__()
        self.kind = kind
        self.shared = shared
        self.templates: dict[str, Delta] = {}
        self.weights: dict[str, float] = {}
        self.dropouts: dict[str, float] = {}
        self.active: tuple[str, ...] = ()
        self.fused: Any = None
        self.narrow_bases: tuple[nn.Module, ...] = ()  # the base before widening; in a tuple it is no submodule
        self.training = base_layer.training
        self._modules["base_layer"] = base_layer
        for name in self.SLOTS:
            self.register_buffer(name, None, persistent=False)
        self._trained: tuple[nn.Parameter, ...] = ()
        self._trains = False
        self._stale = False
        self.register_load_state_dict_post_hook(_mark_stale)

    # Adapters

    def add(self, name: str, delta: Delta, *, requires_grad: bool = False, dropout: float = 0.0) -> None:
        """Register one adapter's tensors as parameters; it is not active yet."""
        self.templates[name] = delta.map_tensors(lambda tensor: torch.empty(0))
        self.weights[name] = 1.0
        self.dropouts[name] = dropout
        for slot, tensor in delta.tensors().items():
            container, leaf = self._place(delta, slot)
            data = tensor.detach()
            if self._is_transposed(delta, slot):
                data = data.t()
            parameter = nn.Parameter(data, requires_grad=requires_grad and data.is_floating_point())
            if leaf:
                self._factor(container, name)._parameters[leaf] = parameter
            else:
                self._container(container, nn.ParameterDict)[name] = parameter

    def remove(self, name: str) -> None:
        """Forget one adapter, half-registered ones too; containers that are left empty go."""
        template = self.templates.pop(name, None)
        for slot in template.tensors() if template is not None else ():
            container, _ = self._place(template, slot)  # pyright: ignore[reportArgumentType]
            entries = self._modules.get(container)
            if entries is not None and name in entries:  # type: ignore[operator]
                del entries[name]  # type: ignore[attr-defined]
            if entries is not None and len(entries) == 0:  # type: ignore[arg-type]
                del self._modules[container]
        self.weights.pop(name, None)
        self.dropouts.pop(name, None)
        self.active = tuple(other for other in self.active if other != name)

    def delta(self, name: str) -> Delta:
        """One adapter's change, over the live parameters."""
        template = self.templates[name]
        tensors: dict[str, Tensor] = {}
        for slot in template.tensors():
            container, leaf = self._place(template, slot)
            entry: Any = self._modules[container][name]  # type: ignore[index]
            parameter = entry._parameters[leaf] if leaf else entry
            tensors[slot] = parameter.t() if self._is_transposed(template, slot) else parameter
        return template.with_tensors(tensors)

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        for slot in self.templates[old].tensors():
            container, _ = self._place(self.templates[old], slot)
            entries: Any = self._modules[container]
            if old in entries:
                entries[new] = entries.pop(old)
        for table in (self.templates, self.weights, self.dropouts):
            table[new] = table.pop(old)  # type: ignore[assignment]
        self.active = tuple(new if name == old else name for name in self.active)

    def resize_inputs(self, inputs: int) -> None:
        """Cut or pad every low-rank adapter's `down` to so many inputs; padding is zero."""
        for name in self.templates:
            down = self.delta(name).tensors().get("down")
            if down is not None and down.shape[1] != inputs:
                down.data = F.pad(down.detach(), (0, inputs - down.shape[1]))
        self.set_slot("slot_down", None)

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """The parameters of one adapter."""
        return [tensor for tensor in self._raw(name) if isinstance(tensor, nn.Parameter)]

    def _raw(self, name: str) -> list[Any]:
        places = (self._place(self.templates[name], slot) for slot in self.templates[name].tensors())
        entries: list[tuple[Any, str]] = [(self._modules[container][name], leaf) for container, leaf in places]  # type: ignore[index]
        return [entry._parameters[leaf] if leaf else entry for entry, leaf in entries]

    @staticmethod
    def _place(delta: Delta, slot: str) -> tuple[str, str]:
        if isinstance(delta, LoraDelta) and delta.embedding and slot in EMBEDDING_PARAMETERS:
            return EMBEDDING_PARAMETERS[slot]
        return PARAMETERS.get(slot, (slot, ""))

    @staticmethod
    def _is_transposed(delta: Delta, slot: str) -> bool:
        return isinstance(delta, LoraDelta) and delta.embedding and slot in EMBEDDING_PARAMETERS

    def _container(self, name: str, kind: type[nn.Module]) -> Any:
        if name not in self._modules:
            self._modules[name] = kind().train(self.training)
        return self._modules[name]

    def _factor(self, container: str, name: str) -> nn.Module:
        entries = self._container(container, nn.ModuleDict)
        if name not in entries:
            entries[name] = Factor()
            entries[name].training = self.training
        return entries[name]

    # State

    def set_slot(self, slot: str, value: Tensor | None) -> None:
        """Put a buffer in a slot, without the checks of attribute assignment."""
        self._buffers[slot] = value

    @property
    def contributing(self) -> list[tuple[str, float]]:
        """Adapters that the forward adds, with their weight: active, here, and not fused into the base."""
        if not self.shared.enabled:
            return []
        fused = self.fused.coefficients if self.fused is not None else ()
        return [(name, self.weights[name]) for name in self.active if name in self.templates and name not in fused]

    def note_trained(self) -> None:
        """Remember the contributing adapters' parameters, whose `requires_grad` sends the forward past the slot."""
        names = [name for name, _ in self.contributing]
        self._trained = tuple(parameter for name in names for parameter in self.parameters_of(name))
        self._trains = any(parameter.requires_grad for parameter in self._trained)
        self._stale = False

    def original_weight(self) -> Tensor:
        """The base weight as it was before anything was fused into it."""
        return read_weight(self.base_layer) if self.fused is None else self.fused.original(self)

    def factors(self, delta: Delta) -> Factors | None:
        """A delta's factors in this layer's shapes, or None where they cannot say the change here.

        Gains act on the base layer's inputs and outputs: they need the original base, channels to act on, and only one
        of the two sides, since (1 + b) W (1 + a) is not W + bW + Wa. A grouped convolution's columns are no channels.
        """
        if self.kind.low_rank is None or (delta.needs_base and (self.fused is not None or self.kind.channel is None)):
            return None
        factors = delta.factors(read_weight(self.base_layer) if delta.needs_base else None)
        if factors is None:
            return None
        if factors.in_gain is not None and (factors.out_gain is not None or getattr(self.base_layer, "groups", 1) > 1):
            return None
        columns = logical_shape(self.base_layer)[1:]
        if tuple(factors.down.shape[1:]) == columns:
            return factors
        return replace(factors, down=factors.down.reshape(-1, *columns))  # files may flatten a kernel

    # Forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output plus what the active adapters add."""
        if self._is_trained():
            return self._forward_trained(x, *args, **kwargs)
        if self._stale:
            self._rewrite_slot()
        scale = self.shared.scale
        wide = x
        if self.slot_in_gain is not None:
            wide = self._along(x, 1 + scale * self.slot_in_gain, x)
        out = self.base_layer(wide, *args, **kwargs)
        if self.slot_out_gain is not None:
            out = self._along(out, 1 + scale * self.slot_out_gain, out)
        if self.slot_bias is not None:
            out = out + self._shaped(scale * self.slot_bias, out)
        if self.slot_dense is not None:
            dense = self.slot_dense.to(x.device)
            out = out + scale * self.kind.op(
                self.base_layer, x.to(dense.dtype) if x.is_floating_point() else x, dense
            ).to(out.dtype)
        if self.slot_down is not None:
            out = self._add_low_rank(out, x, scale)
        return out

    def _is_trained(self) -> bool:
        # A compiler would guard on each parameter and recompile at every switch: it gets what the last switch saw.
        if torch.compiler.is_compiling():
            return self._trains
        for parameter in self._trained:  # noqa: SIM110  (any() of a generator costs twice this loop)
            if parameter.requires_grad:
                return True
        return False

    @torch.no_grad()
    def _rewrite_slot(self) -> None:
        from .slots import refresh  # which is built on this module

        refresh([self])

    def _add_low_rank(self, out: Tensor, x: Tensor, scale: float) -> Tensor:
        down, up = self.slot_down, self.slot_up
        assert down is not None
        assert up is not None
        if down.device != x.device:  # the base is offloaded and runs elsewhere
            down, up = down.to(x.device), up.to(x.device)
        if x.is_floating_point() and x.dtype != down.dtype:
            x = x.to(down.dtype)
        if self.kind is LINEAR:
            narrow = F.linear(x, down)
            if scale != 1.0:
                narrow = narrow * scale
            # One pass over the output instead of three; a compiler fuses the plain form better.
            if (
                not torch.compiler.is_compiling()
                and not torch.is_grad_enabled()
                and out.dtype == narrow.dtype == up.dtype
                and out.is_contiguous()
            ):
                out.view(-1, out.shape[-1]).addmm_(narrow.reshape(-1, narrow.shape[-1]), up.t())
                return out
            return out + F.linear(narrow, up).to(out.dtype)
        assert self.kind.low_rank is not None
        added = self.kind.low_rank(self.base_layer, x, down, up)
        return out + (added if scale == 1.0 else added * scale).to(out.dtype)

    def _forward_trained(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Adapter by adapter, over the parameters themselves, so that gradients reach them."""
        self._stale = True  # an optimiser changes the parameters behind the slot's back
        plain = out = self.base_layer(x, *args, **kwargs)
        for name, weight in self.contributing:
            coefficient = weight * self.shared.scale
            out = out + coefficient * self._contribution(name, x, plain).to(plain.dtype)
        return out

    def _contribution(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        delta = self.delta(name)
        dropout = self.dropouts[name]
        given = F.dropout(x, dropout, self.training) if dropout and x.is_floating_point() else x
        bias = delta.delta_bias()
        if delta.shape is None:
            assert bias is not None
            return self._shaped(bias, out).expand_as(out)
        factors = self.factors(delta)
        if factors is not None:
            added = self._factored(factors, given, out)
        else:
            base_weight = self.original_weight() if delta.needs_base else None
            weight = delta.delta_weight(base_weight).view(logical_shape(self.base_layer))
            added = self.kind.op(
                self.base_layer, given.to(weight.dtype) if given.is_floating_point() else given, weight
            )
        return added if bias is None else added + self._shaped(bias.to(added.dtype), added)

    def _factored(self, factors: Factors, x: Tensor, out: Tensor) -> Tensor:
        assert self.kind.low_rank is not None
        down, up = factors.down, factors.up
        given = x.to(down.dtype) if x.is_floating_point() else x
        added: Any = 0.0
        if len(down):  # a gain alone has rank 0
            added = self.kind.low_rank(self.base_layer, given, down, up.to(down.dtype)) * factors.scaling
        if factors.in_gain is not None:
            gained = self._along(given, factors.in_gain, given)
            added = added + self.kind.op(self.base_layer, gained, self.weight.to(down.dtype))
        if factors.out_gain is not None:
            bias = self.bias
            plain = out if bias is None else out - self._shaped(bias, out)
            added = added + self._along(plain, factors.out_gain, plain)
        return added

    def _shaped(self, vector: Tensor, like: Tensor) -> Tensor:
        """A vector over the channels, broadcastable against activations."""
        vector = vector.to(like.device)
        if self.kind.channel != 1:
            return vector
        # A convolution takes inputs without a batch too; a group norm's first dimension is always the batch.
        spatial = self.weight.ndim - 2 if self.weight.ndim > 2 else like.ndim - 2
        return vector.view(-1, *[1] * spatial)

    def _along(self, activations: Tensor, vector: Tensor, like: Tensor) -> Tensor:
        return activations * self._shaped(vector, like).to(activations.dtype)

    # What others read

    def get_base_layer(self) -> nn.Module:
        """The wrapped layer."""
        return self.base_layer

    @property
    def weight(self) -> Any:
        """The base layer's weight."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base layer's bias."""
        return getattr(self.base_layer, "bias", None)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "_modules") or name.startswith(("lora_", "slot_")):
                raise
            return getattr(self.base_layer, name)


def _mark_stale(layer: nn.Module, incompatible: Any) -> None:
    """Loaded parameters show in the slot at the next forward; a function of the module, so that layers pickle."""
    assert isinstance(layer, AdapterLayer)
    layer._stale = True  # pyright: ignore[reportPrivateUsage]
