"""Writing the active slots: each layer says what its own is to hold, and like layers are written together."""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_loaders.buffers import writable
from lora_loaders.deltas import Delta, Factors, Kron
from lora_loaders.deltas.base import computing

from .banks import Bank, Likeness, Stack, columns_of, seat_of
from .base_weight import adapter_dtype, adapter_place, logical_shape
from .contribution import Term
from .held import held, original_bias
from .layer import AdapterLayer
from .memory import memory_of
from .parameter import ParameterLayer

# Of torch's public names none does many tensors in one launch; its optimisers use these.
copy_all: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateUsage]
scale_all: Any = torch._foreach_mul_  # pyright: ignore[reportPrivateUsage]

CPU = torch.device("cpu")
REST = ("slot_in_gain", "slot_out_gain", "slot_bias", "slot_first", "slot_second", "slot_dense")
BESIDE_KRONS = tuple([slot for slot in REST if slot not in ("slot_first", "slot_second")])
STEP = 8
"""Capacities are multiples of this: smaller ones gain nothing on tensor cores, and equal capacities are reused."""
SPREAD = 8
"""Banks of fewer layers than this, on average, are given up for a common one."""

Member = tuple[AdapterLayer, Stack]


class Written(NamedTuple):
    """Slots that were written together."""

    members: Sequence[Member]
    seats: Sequence[int]
    """Which of their bank's layers they are, ascending."""
    ranks: Sequence[int]


def refresh(layers: Iterable[AdapterLayer]) -> list[Written]:
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
        return [written for like, members in groups.items() for written in _write_together(like, members)]


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
    for factors, weight, _, name in terms:
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
        clear_rest(layer)
        return [(factors, weight) for factors, weight, _, _ in terms if factors]
    stack: list[tuple[Factors, float]] = []
    whole: list[Term] = []
    gains_outputs = any(term[0] is not None and term[0].out_gain is not None for term in terms)
    for factors, weight, delta, name in terms:
        # Gains of both sides would multiply each other; changes of a weight only add up.
        if factors is None or (factors.in_gain is not None and gains_outputs):
            whole.append((factors, weight, delta, name))
        else:
            stack.append((factors, weight))
    _write_rest(layer, [(delta, weight) for _, weight, delta, _ in terms], stack, _write_krons(layer, whole))
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


def _write_together(like: Likeness, members: Sequence[Member]) -> Iterator[Written]:
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
        bank.write(range(len(homeless)), columns_of([stack for _, stack in homeless]), like.ranks)
        yield Written(homeless, range(len(homeless)), like.ranks)
    for numbered in seated.values():
        seats = sorted(numbered)
        members = [numbered[number] for number in seats]
        bank_of(members[0][0]).write(seats, columns_of([stack for _, stack in members]), like.ranks)
        yield Written(members, seats, like.ranks)


def bank_of(layer: AdapterLayer) -> Bank:
    """The bank that a layer's slot is part of."""
    buffers: dict[str, Any] = vars(layer)["_buffers"]
    return Bank.around(buffers["slot_down"], buffers["slot_up"])


def _write_krons(layer: AdapterLayer, terms: Sequence[Term]) -> list[Term]:
    """Write the Kronecker products of one shape; what is left has to be said in full.

    So has LoKr under DoRA: its norms are those of W + ΔW, so that the whole of ΔW is at hand anyway, and they multiply
    single rows or columns, which no Kronecker product does. And in a grouped convolution: the blocks of inputs cannot
    go through it as images, for it cuts each of them into its groups, and its weight is small.

    Shapes: slot_first `[adapters, p, q]` with the weights folded in, slot_second `[adapters, m, n, *kernel]`. The
    number of adapters is a size that compiled code guards: a second one recompiles, after which dynamo leaves it open.
    """
    found = [(layer.kron(delta), weight, term) for term in terms for _, weight, delta, _ in (term,)]
    krons = [(kron, weight) for kron, weight, _ in found if kron is not None]
    kept = [(kron, weight) for kron, weight in krons if _kron_form(kron) == _kron_form(krons[0][0])]
    rest = [term for kron, _, term in found if all(kron is not other for other, _ in kept)]
    if not kept:
        _put(layer, "slot_first", None)
        _put(layer, "slot_second", None)
        return rest
    dtype, vars(layer)["slot_start"] = adapter_dtype(layer.base_layer), kept[0][0].start
    _put(layer, "slot_first", torch.stack([kron.first * weight for kron, weight in kept]).to(dtype))
    _put(layer, "slot_second", torch.stack([kron.second for kron, _ in kept]).to(dtype))
    return rest


def _kron_form(kron: Kron) -> tuple[Any, ...]:
    """What products have in common that can be added up in one."""
    return kron.first.shape, kron.second.shape, kron.start


def _write_rest(
    layer: AdapterLayer,
    contributing: Sequence[tuple[Delta, float]],
    stacked: Sequence[tuple[Factors, float]],
    dense: Sequence[Term],
) -> None:
    """Gains, bias and dense changes: rare, so written one by one."""
    gained = any(factors.in_gain is not None or factors.out_gain is not None for factors, _ in stacked)
    if not (dense or gained or any(delta.delta_bias() is not None for delta, _ in contributing)):
        clear_rest(layer, REST if layer.slot_first is None else BESIDE_KRONS)
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
    dtype = adapter_dtype(layer.base_layer)
    whole = [(delta, weight, name) for _, weight, delta, name in dense if delta.shape is not None]
    weight = None
    vars(layer)["computed"] = ()
    if whole and _has_room(layer, dtype):
        weight = _total([(layer.dense(delta), weight) for delta, weight, _ in whole])
    elif whole:
        vars(layer)["computed"] = tuple([(name, weight) for _, weight, name in whole])
    for name, value in (("in_gain", in_gain), ("out_gain", out_gain), ("bias", bias), ("dense", weight)):
        _put(layer, f"slot_{name}", None if value is None else value.to(dtype))


def _has_room(layer: AdapterLayer, dtype: torch.dtype) -> bool:
    """Whether the layer may keep its ΔW: it has the memory already, or enough of the device's stays free."""
    if layer.slot_dense is not None:
        return True
    shape, device = logical_shape(layer.base_layer), adapter_place(layer.base_layer)[0] or CPU
    free, total = memory_of(device)
    return free - math.prod(shape) * dtype.itemsize >= layer.shared.kept_free * total


def clear_rest(layer: AdapterLayer, slots: Sequence[str] = REST) -> None:
    """Empty the slots of what is no low-rank product."""
    vars(layer)["computed"] = ()
    if not layer.shared.reserved:
        layer.clear_slots(slots)
        return
    for slot in slots:
        _put(layer, slot, None)


def _put(layer: AdapterLayer, slot: str, value: Tensor | None) -> None:
    present = getattr(layer, slot)
    if value is None and present is not None and layer.shared.reserved:
        present.zero_()  # a compiled model has seen it
    elif value is not None and present is not None and present.shape == value.shape and present.device == value.device:
        present.copy_(value)
    elif value is None:
        layer.clear_slots((slot,))
    else:
        with writable():
            layer.set_slot(slot, value.clone() if value.is_inference() else value)


def _total(terms: Sequence[tuple[Tensor | None, float]]) -> Tensor | None:
    """Weighted sum in float32 (float64 for float64 data), skipping what is absent."""
    total: Tensor | None = None
    for tensor, weight in terms:
        if tensor is not None:
            term = computing(tensor.detach()) * weight
            total = term if total is None else total + term
    return total
