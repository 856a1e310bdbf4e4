"""Writing the active slots: each layer says what its own is to hold, and like layers are written together."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_loaders.deltas import Delta, Factors
from lora_loaders.deltas.base import computing

from .banks import Bank, Likeness, Stack, seat_of
from .base_weight import adapter_dtype, adapter_place, logical_shape
from .held import held, original_bias
from .layer import AdapterLayer
from .parameter import ParameterLayer

# Of torch's public names none does many tensors in one launch; its optimisers use these.
copy_all: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateUsage]
scale_all: Any = torch._foreach_mul_  # pyright: ignore[reportPrivateUsage]

CPU = torch.device("cpu")
REST = ("slot_in_gain", "slot_out_gain", "slot_bias", "slot_dense")
STEP = 8
"""Capacities are multiples of this: smaller ones gain nothing on tensor cores, and equal capacities are reused."""
SPREAD = 8
"""Banks of fewer layers than this, on average, are given up for a common one."""

Member = tuple[AdapterLayer, Stack]


def refresh(layers: Iterable[AdapterLayer]) -> None:
    """Rewrite the slots of these layers, in place where their capacity allows; like layers are written together."""
    groups: dict[Likeness, list[Member]] = {}
    with torch.no_grad():
        for layer in layers:
            if isinstance(layer, ParameterLayer):
                layer.write()
                continue
            stack = _write_single(layer)
            if stack or layer.shared.reserved:
                like = _likeness(layer, stack)
                if like is not None:
                    groups.setdefault(like, []).append((layer, stack))
            else:
                layer.take_slot(None, None)
        for like, members in groups.items():
            _write_together(like, members)


def reweigh(layers: Iterable[AdapterLayer], names: Collection[str]) -> None:
    """Bring slots up to date where nothing but these adapters' weights has changed: in place, without other memory."""
    behind: list[AdapterLayer] = []
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor], list[float]]] = {}
    for layer in layers:
        parts = _weighed_parts(layer, names)
        if parts is None:
            behind.append(layer)
        for target, source, scale in parts or ():
            targets, sources, scales = groups.setdefault((target.device, target.dtype), ([], [], []))
            targets.append(target)
            sources.append(source)
            scales.append(scale)
    with torch.no_grad():
        for targets, sources, scales in groups.values():
            copy_all(targets, sources)
            scale_all(targets, scales)
    refresh(behind)


def _weighed_parts(layer: AdapterLayer, names: Collection[str]) -> list[tuple[Tensor, Tensor, float]] | None:
    """Rows of the slot, what stands there unscaled, and its scale; None where the slot must be written anew."""
    down: Tensor | None = vars(layer)["_buffers"]["slot_down"]
    if isinstance(layer, ParameterLayer) or down is None or not layer.is_current:
        return None
    terms, plain = layer.contributions()
    parts: list[tuple[Tensor, Tensor, float]] = []
    start = 0
    for (name, _), (factors, weight, _) in zip(layer.contributing, terms, strict=True):
        # Another precision would be rounded twice, and one that is parked lies elsewhere.
        if not plain or factors is None or factors.down.dtype != down.dtype or factors.down.device != down.device:
            return None
        rows = factors.size[0]
        if name in names:
            parts.append((down.narrow(0, start, rows), factors.down, factors.scaling * weight))
        start += rows
    return parts


def _write_single(layer: AdapterLayer) -> Stack:
    """Write the slots that a layer has for itself, and tell what goes into the common ones."""
    terms, plain = layer.contributions()
    if plain:  # as nearly all are
        _clear_rest(layer)
        return [(factors, weight) for factors, weight, _ in terms if factors]
    stack: list[tuple[Factors, float]] = []
    dense: list[tuple[Delta, float]] = []
    gains_outputs = any(factors is not None and factors.out_gain is not None for factors, _, _ in terms)
    for factors, weight, delta in terms:
        # Gains of both sides would multiply each other; changes of a weight only add up.
        if factors is None or (factors.in_gain is not None and gains_outputs):
            dense.append((delta, weight))
        else:
            stack.append((factors, weight))
    _write_rest(layer, [(delta, weight) for _, weight, delta in terms], stack, dense)
    return [(factors, weight) for factors, weight in stack if factors.size[0]]


def _likeness(layer: AdapterLayer, stack: Stack) -> Likeness | None:
    """What decides which layers are written together; None where a slot could hold nothing."""
    # Past attribute access, which for a module takes as long as all the rest of this.
    base: Any = vars(layer)["_modules"]["base_layer"]
    if stack:
        _, rows, columns = stack[0][0].size
    elif layer.kind.low_rank is not None:
        rows, *rest = logical_shape(base)
        columns = tuple(rest)
    else:
        return None
    ranks = tuple([factors.size[0] for factors, _ in stack])
    sources = tuple([factors.down.device for factors, _ in stack])  # parked ones lie elsewhere
    needed = max(sum(ranks), layer.shared.reserved)
    # What is there already is kept: its shape is what a compiler has seen.
    present: Tensor | None = vars(layer)["_buffers"]["slot_down"]
    capacity = 0 if present is None else present.shape[0]
    if capacity < needed:
        capacity = -(-needed // STEP) * STEP
    device, dtype = adapter_place(base)
    device = device or next(iter(sources), CPU)
    return Likeness(device, dtype, capacity, columns, rows, ranks, sources)


def _write_together(like: Likeness, members: Sequence[Member]) -> None:
    """Write the slots of like layers, after seating those that have no fitting one."""
    seated: dict[tuple[int, int], dict[int, Member]] = {}
    homeless: list[Member] = []
    for member in members:
        buffers: dict[str, Tensor | None] = vars(member[0])["_buffers"]
        seat = seat_of(buffers["slot_down"], buffers["slot_up"], like)
        if seat is None:
            homeless.append(member)
        else:
            seated.setdefault((seat.down_memory, seat.up_memory), {})[seat.number] = member
    if len(seated) > 1 and len(seated) * SPREAD > len(members):
        homeless, seated = list(members), {}  # seated one by one, as after a move or a copy of the model
    if homeless:
        bank = Bank.empty(len(homeless), like)
        for (layer, _), (down, up) in zip(homeless, bank.parts(), strict=True):
            layer.take_slot(down, up)
        bank.write(range(len(homeless)), [stack for _, stack in homeless], like.ranks)
    for numbered in seated.values():
        seats = sorted(numbered)
        first = vars(numbered[seats[0]][0])["_buffers"]
        Bank.around(first["slot_down"], first["slot_up"]).write(seats, [numbered[n][1] for n in seats], like.ranks)


def _write_rest(
    layer: AdapterLayer,
    contributing: Sequence[tuple[Delta, float]],
    stacked: Sequence[tuple[Factors, float]],
    dense: Sequence[tuple[Delta, float]],
) -> None:
    """Gains, bias and dense changes: rare, so written one by one."""
    gained = any(factors.in_gain is not None or factors.out_gain is not None for factors, _ in stacked)
    if not (dense or gained or any(delta.delta_bias() is not None for delta, _ in contributing)):
        _clear_rest(layer)
        return
    in_gain = _total([(f.in_gain, w) for f, w in stacked])
    out_gain = _total([(f.out_gain, w) for f, w in stacked])
    plain_bias = original_bias(layer.base_layer, layer.fused)
    bias = _total([(delta.delta_bias(plain_bias), weight) for delta, weight in contributing])
    own_bias = held(layer.base_layer, "bias")
    if out_gain is not None and own_bias is not None:
        # (1 + gain) multiplies the base's whole output; the bias is no part of the weight and is taken out again.
        correction = -out_gain * computing(own_bias.detach())
        bias = correction if bias is None else bias + correction
    weight = None
    if any(delta.shape is not None for delta, _ in dense):
        base = layer.original_weight() if any(delta.needs_base for delta, _ in dense) else None
        shape = logical_shape(layer.base_layer)
        weight = _total([(d.delta_weight(base).view(shape), w) for d, w in dense if d.shape is not None])
    dtype = adapter_dtype(layer.base_layer)
    for name, value in (("in_gain", in_gain), ("out_gain", out_gain), ("bias", bias), ("dense", weight)):
        _put(layer, f"slot_{name}", None if value is None else value.to(dtype))


def _clear_rest(layer: AdapterLayer) -> None:
    if not layer.shared.reserved:
        layer.clear_slots(REST)
        return
    for slot in REST:
        _put(layer, slot, None)


def _put(layer: AdapterLayer, slot: str, value: Tensor | None) -> None:
    present = getattr(layer, slot)
    if value is None and present is not None and layer.shared.reserved:
        present.zero_()  # a compiled model has seen it
    elif value is not None and present is not None and present.shape == value.shape and present.device == value.device:
        present.copy_(value)
    else:
        layer.set_slot(slot, value)


def _total(terms: Sequence[tuple[Tensor | None, float]]) -> Tensor | None:
    """Weighted sum in float32 (float64 for float64 data), skipping what is absent."""
    total: Tensor | None = None
    for tensor, weight in terms:
        if tensor is not None:
            term = computing(tensor.detach()) * weight
            total = term if total is None else total + term
    return total
