"""AdapterLayer: the module that carries adapters. It calls its base layer, so its hooks and kernels still work."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_loaders.deltas import Delta, Factors, Kron

from .base_weight import adapter_dtype, logical_shape, read_weight
from .contribution import Contribution, Term
from .held import original_bias
from .kinds import LINEAR, Kind
from .peft_names import PeftNames
from .places import blank
from .shared import Shared
from .slot_buffers import SlotBuffers
from .store import AdapterStore

# A loop inside the interpreter takes a third of one in Python, and each switch and each forward asks every parameter.
_REQUIRES_GRAD, _VERSION = attrgetter("requires_grad"), attrgetter("_version")
PLAIN = {"down", "up"}
"""The tensors of an adapter that is nothing but a product."""


class AdapterLayer(PeftNames, SlotBuffers, AdapterStore):
    """A base layer and the adapters on it.

    The forward sees one *slot*: the active adapters stacked to a single pair of factors with their scales folded in
    (https://arxiv.org/abs/2106.09685, eq. 3, for a sum of adapters), so four active adapters cost what one costs and
    switching only rewrites the slot's data. Adapters that are being trained skip the slot.

    Args:
        base_layer: the layer to wrap.
        kind: what that layer can do.
        shared: the model's common state.
    """

    kind: Kind
    shared: Shared
    weights: Mapping[str, float]  # replaced, never written into: a snapshot is a reference
    dropouts: dict[str, float]
    active: tuple[str, ...]
    fused: Any
    narrow_bases: tuple[nn.Module, ...]  # the base before widening; in a tuple it is no submodule
    _trained: Sequence[Tensor]
    _trains: bool
    _versions: int
    _stale: bool
    _known: dict[str, Contribution]
    base_layer: nn.Module
    computed: tuple[tuple[str, float], ...]
    """Adapters, with their weights, whose ΔW is computed in each forward, since keeping it takes too much memory."""

    def __init__(self, base_layer: nn.Module, kind: Kind, shared: Shared) -> None:
        # Past nn.Module's __setattr__ and register_buffer, which take as long as all the rest of this.
        state = vars(blank(self))
        state.update(kind=kind, shared=shared, training=base_layer.training, templates={}, weights={}, dropouts={})
        state.update(active=(), fused=None, narrow_bases=(), computed=(), _trained=(), _trains=False, _known={})
        state.update(_versions=0, _stale=False)
        state["_modules"]["base_layer"] = base_layer
        state["_buffers"].update(dict.fromkeys(self.SLOTS))

    # Adapters

    def add(
        self, name: str, delta: Delta, *, requires_grad: bool = False, dropout: float = 0.0
    ) -> dict[str, nn.Parameter]:
        """Register one adapter; it is not active yet."""
        parameters = super().add(name, delta, requires_grad=requires_grad)
        self.shared.arrangements.clear()
        self.reweigh({name: 1.0})
        self.dropouts[name] = dropout
        if set(parameters) == PLAIN:
            self._contribution_of(name, parameters)  # now that they are at hand
        return parameters

    def remove(self, name: str) -> None:
        """Forget one adapter, half-registered ones too."""
        super().remove(name)
        self.shared.arrangements.clear()
        self.weights = {other: weight for other, weight in self.weights.items() if other != name}
        self.dropouts.pop(name, None)
        self._known.pop(name, None)
        self.active = tuple(other for other in self.active if other != name)

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        super().rename(old, new)
        self.shared.arrangements.clear()
        self._known.pop(old, None)
        self.weights = {new if name == old else name: weight for name, weight in self.weights.items()}
        self.dropouts[new] = self.dropouts.pop(old)
        self.active = tuple(new if name == old else name for name in self.active)

    def resize_inputs(self, inputs: int) -> None:
        """Cut or pad every low-rank adapter's `down` to so many inputs; padding is zero."""
        for name in self.templates:
            down = self.delta(name).tensors().get("down")
            if down is not None and down.shape[1] != inputs:
                down.data = F.pad(down.detach(), (0, inputs - down.shape[1]))
        self._known.clear()
        self.take_slot(None, None)

    def activate(self, names: tuple[str, ...]) -> None:
        """Make these adapters the active ones; the slot is rewritten apart, many layers at once."""
        vars(self)["active"] = names  # a module's attribute assignment takes ten times as long

    def reweigh(self, weights: Mapping[str, float]) -> None:
        """Give adapters these weights; the slot is rewritten apart."""
        self.weigh({**self.weights, **weights})

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Let these be the weights of all adapters; nobody may write into them, so that layers can share them."""
        vars(self)["weights"] = weights

    # State

    @property
    def contributing(self) -> list[tuple[str, float]]:
        """Adapters that the forward adds, with their weight: active, here, and not fused into the base."""
        if not self.shared.enabled:
            return []
        weights = self.weights
        present = [(name, weights[name]) for name in self.active if name in weights]
        if self.fused is None:
            return present
        return [(name, weight) for name, weight in present if name not in self.fused.coefficients]

    def contributions(self) -> tuple[list[Term], bool]:
        """What a slot is to hold, and whether that is nothing but low-rank products.

        The parameters are remembered: one that requires a gradient sends the forward past the slot.
        """
        terms: list[Term] = []
        parameters: list[Tensor] = []
        plain = True
        for name, weight in self.contributing:
            known = self._known.get(name)
            if known is None or not known.is_current:
                known = self._contribution_of(name, self._raw(name))
                plain = plain and known.holders is not None
            parameters += known.parameters
            terms.append((known.factors, weight, known.delta, name))
        self.note_written(parameters, any(map(_REQUIRES_GRAD, parameters)))
        return terms, plain

    def note_written(self, parameters: Sequence[Tensor], trains: bool) -> None:
        """Remember what the slot was written from: the forward looks whether they have changed since."""
        state = vars(self)
        state["_trained"], state["_trains"] = parameters, trains
        state["_versions"], state["_stale"] = sum(map(_VERSION, parameters)), False

    def plain_contributions(self) -> list[tuple[str, Contribution]] | None:
        """The contributing adapters, if each is known to be a plain product as its parameters stand now."""
        known = [(name, self._known.get(name)) for name, _ in self.contributing]
        plain = [(name, one) for name, one in known if one is not None and one.is_current]
        return plain if len(plain) == len(known) else None

    def _contribution_of(self, name: str, raw: Mapping[str, Tensor]) -> Contribution:
        delta = self._delta(name, raw)
        factors = self.factors(delta)
        parameters = tuple(
            [t for t in raw.values() if (type(t) is nn.Parameter or t.requires_grad) and not t.is_inference()]
        )
        if factors is None or set(raw) != PLAIN or factors.down is not raw["down"] or factors.up is not raw["up"]:
            return Contribution(delta, factors, parameters)
        stored: dict[str, Any] = self._modules
        holders = stored["lora_A"]._modules[name]._parameters, stored["lora_B"]._modules[name]._parameters
        known = self._known[name] = Contribution(delta, factors, parameters, holders)
        return known

    def note_fused(self, fused: Any) -> None:
        """What is fused into the base now; a module's attribute assignment takes ten times as long."""
        vars(self)["fused"] = fused

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._stale = True  # what is loaded shows in the slot at the next forward

    def settle(self) -> None:
        """Take out of the base weight what this layer has written into it unfused: nothing, but for raw parameters."""

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

    def kron(self, delta: Delta) -> Kron | None:
        """A delta as a Kronecker product that this layer can go through, or None."""
        if self.kind.kronecker is None or getattr(self.base_layer, "groups", 1) > 1:
            return None
        return delta.kron(logical_shape(self.base_layer))

    def dense(self, delta: Delta) -> Tensor:
        """A delta's ΔW in this layer's shape."""
        base_weight = self.original_weight() if delta.needs_base else None
        return delta.delta_weight(base_weight).view(logical_shape(self.base_layer))

    # Forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output plus what the active adapters add."""
        if self._is_trained():
            return self._forward_trained(x, *args, **kwargs)
        if self._is_behind():
            self._rewrite_slot()
        wide = x if self.slot_in_gain is None else self._gained(x, self._scale() * self.slot_in_gain)
        return self.add_to(self.base_layer(wide, *args, **kwargs), x)

    @property
    def only_adds(self) -> bool:
        """Whether `add_to` is all that this layer does to its base's output."""
        return self.is_current and self.slot_in_gain is None

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """The base layer's output with what the slot holds for this input."""
        scale = self._scale()
        if self.slot_out_gain is not None:
            out = self._gained(out, scale * self.slot_out_gain)
        if self.slot_bias is not None:
            out = out + self._shaped(scale * self.slot_bias, out)
        if self.slot_dense is not None:
            out = out + scale * self._through(self.slot_dense, x).to(out.dtype)
        for name, weight in self.computed:
            dense = self.dense(self.delta(name)).detach().to(adapter_dtype(self.base_layer))
            out = out + (scale * weight) * self._through(dense, x).to(out.dtype)
        if self.slot_first is not None and self.slot_second is not None:
            first, second = self.slot_first.to(x.device), self.slot_second.to(x.device)
            assert self.kind.kronecker is not None
            added = self.kind.kronecker(self.base_layer, x, first, second, self.slot_start)
            out = out + scale * added.to(out.dtype)
        if self.slot_down is not None:
            out = self._add_low_rank(out, x, scale)
        return out

    def _through(self, weight: Tensor, x: Tensor) -> Tensor:
        weight = weight.to(x.device)
        return self.kind.op(self.base_layer, x.to(weight.dtype) if x.is_floating_point() else x, weight)

    def _scale(self) -> Any:
        return self.shared.scale_to_compile if torch.compiler.is_compiling() else self.shared.scale

    def _is_trained(self) -> bool:
        # A compiler would guard on each parameter and recompile at every switch: it gets what the last switch saw.
        if torch.compiler.is_compiling():
            return self._trains
        return any(map(_REQUIRES_GRAD, self._trained))

    def _is_behind(self) -> bool:
        return self._stale or (not torch.compiler.is_compiling() and self._edits() != self._versions)

    @property
    def is_current(self) -> bool:
        """Whether the slot holds the contributing parameters as they are now."""
        return not (self._is_trained() or self._is_behind())

    def _edits(self) -> int:
        """How often the contributing parameters were written in place: the slot is a copy.

        Torch does not count writes through `.data`, and another parameter in its place is not looked for: both show at
        the next switch, and at once where parameters are trained.
        """
        return sum(map(_VERSION, self._trained))

    def _rewrite_slot(self) -> None:
        from .slots import refresh  # which is built on this module

        refresh([self])

    def _add_low_rank(self, out: Tensor, x: Tensor, scale: Any) -> Tensor:
        down, up = self.slot_down, self.slot_up
        assert down is not None
        assert up is not None
        if down.device != x.device:  # the base is offloaded and runs elsewhere
            down, up = down.to(x.device), up.to(x.device)
        if x.is_floating_point() and x.dtype != down.dtype:
            x = x.to(down.dtype)
        if self.kind is LINEAR:
            narrow = F.linear(x, down)
            if isinstance(scale, Tensor) or scale != 1.0:
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
        return out + (added * scale if isinstance(scale, Tensor) or scale != 1.0 else added).to(out.dtype)

    def _forward_trained(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Adapter by adapter, over the parameters themselves, so that gradients reach them."""
        self._stale = True  # an optimiser changes the parameters behind the slot's back
        plain = out = self.base_layer(x, *args, **kwargs)
        for name, weight in self.contributing:
            out = out + weight * self.shared.scale * self._contribution(name, x, plain).to(plain.dtype)
        return out

    def _contribution(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        delta, dropout = self.delta(name), self.dropouts[name]
        given = F.dropout(x, dropout, self.training) if dropout and x.is_floating_point() else x
        bias = delta.delta_bias(original_bias(self.base_layer, self.fused))
        if delta.shape is None:
            assert bias is not None
            return self._shaped(bias, out).expand_as(out)
        factors = self.factors(delta)
        if factors is not None:
            added = self._factored(factors, given, out)
        elif (kron := self.kron(delta)) is not None:
            assert self.kind.kronecker is not None
            added = self.kind.kronecker(self.base_layer, given, kron.first[None], kron.second[None], kron.start)
        else:
            added = self._through(self.dense(delta), given)
        return added if bias is None else added + self._shaped(bias.to(added.dtype), added)

    def _factored(self, factors: Factors, x: Tensor, out: Tensor) -> Tensor:
        assert self.kind.low_rank is not None
        down, up = factors.down, factors.up
        given = x.to(down.dtype) if x.is_floating_point() else x
        added: Any = 0.0
        if len(down):  # a gain alone has rank 0
            added = self.kind.low_rank(self.base_layer, given, down, up.to(down.dtype)) * factors.scaling
        if factors.in_gain is not None:
            gained = self._along(given, factors.in_gain)
            added = added + self.kind.op(self.base_layer, gained, read_weight(self.base_layer).to(down.dtype))
        if factors.out_gain is not None:
            plain = out if self.bias is None else out - self._shaped(self.bias, out)
            added = added + self._along(plain, factors.out_gain)
        return added

    def _shaped(self, vector: Tensor, like: Tensor) -> Tensor:
        """A vector over the channels, broadcastable against activations."""
        vector = vector.to(like.device)
        if self.kind.channel != 1:
            return vector
        # A convolution takes inputs without a batch too; a group norm's first dimension is always the batch.
        spatial = self.weight.ndim - 2 if self.weight.ndim > 2 else like.ndim - 2
        return vector.view(-1, *[1] * spatial)

    def _along(self, activations: Tensor, vector: Tensor) -> Tensor:
        return activations * self._shaped(vector, activations).to(activations.dtype)

    def _gained(self, activations: Tensor, gain: Tensor) -> Tensor:
        """Activations times 1 + gain, which is not formed: rounding it would lose small gains of half precision."""
        return torch.addcmul(activations, activations, self._shaped(gain, activations).to(activations.dtype))

    # What others read

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
            # Hooks keep their state in private names: the base layer's are not this layer's.
            if name == "base_layer" or name.startswith(("_", "lora_", "slot_")):
                raise
            return getattr(self.base_layer, name)
