"""Writing the active slot: all contributing adapters of many layers stacked in a few batched copies."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_loaders.deltas import Delta, Factors
from lora_loaders.deltas.base import computing

from .base_weight import adapter_device, adapter_dtype, logical_shape
from .held import held, original_bias
from .layer import AdapterLayer
from .parameter import ParameterLayer

REST = ("slot_in_gain", "slot_out_gain", "slot_bias", "slot_dense")
STEP = 8
"""Capacities are multiples of this: smaller ones gain nothing on tensor cores, and equal capacities are reused."""


@dataclass
class _Writes:
    """What is to be written into many slots, gathered so that it takes few calls.

    The scales go with the downs: those lie one below the other, whole, and are scaled in one batch, while the ups of a
    slot stand side by side.
    """

    downs: list[Tensor] = field(default_factory=list[Tensor])
    sources: list[Tensor] = field(default_factory=list[Tensor])
    ups: list[Tensor] = field(default_factory=list[Tensor])
    up_sources: list[Tensor] = field(default_factory=list[Tensor])
    scales: list[float] = field(default_factory=list[float])
    empty: list[Tensor] = field(default_factory=list[Tensor])


def refresh(layers: Iterable[AdapterLayer]) -> None:
    """Rewrite the slots of these layers, in place where their capacity allows."""
    writes = _Writes()
    with torch.no_grad():
        for layer in layers:
            if isinstance(layer, ParameterLayer):
                layer.write()
            else:
                _stack(layer, writes)
        if writes.empty:
            torch._foreach_zero_(writes.empty)  # pyright: ignore[reportPrivateUsage]
        if writes.downs:
            torch._foreach_copy_(writes.downs, writes.sources)  # pyright: ignore[reportPrivateUsage]
            torch._foreach_mul_(writes.downs, writes.scales)  # pyright: ignore[reportPrivateUsage]
        if writes.ups:
            torch._foreach_copy_(writes.ups, writes.up_sources)  # pyright: ignore[reportPrivateUsage]


def _stack(layer: AdapterLayer, writes: _Writes) -> None:
    pairs = layer.contributions()
    if not pairs and not layer.shared.reserved:
        for slot in layer.SLOTS:
            layer.set_slot(slot, None)
        return
    stacked: list[tuple[Factors, float]] = []
    dense: list[tuple[Delta, float]] = []
    gains_outputs = any(factors is not None and factors.out_gain is not None for _, factors, _ in pairs)
    for delta, factors, weight in pairs:
        # Gains of both sides would multiply each other; changes of a weight only add up.
        if factors is None or (factors.in_gain is not None and gains_outputs):
            dense.append((delta, weight))
        else:
            stacked.append((factors, weight))
    _write_pairs(layer, stacked, writes)
    _write_rest(layer, [(delta, weight) for delta, _, weight in pairs], stacked, dense)


def _write_pairs(layer: AdapterLayer, stacked: Sequence[tuple[Factors, float]], writes: _Writes) -> None:
    rank = sum(factors.down.shape[0] for factors, _ in stacked)
    if rank == 0 and not layer.shared.reserved:
        layer.set_slot("slot_down", None)
        layer.set_slot("slot_up", None)
        return
    if stacked:
        _ensure_capacity(layer, rank, stacked[0][0])
    down, up = layer.slot_down, layer.slot_up
    if down is None or up is None:
        return
    ranks = [factors.down.shape[0] for factors, _ in stacked]
    if rank < down.shape[0]:
        writes.empty += [down[rank:], up[:, rank:]]
        down, up = down[:rank], up[:, :rank]
    if not stacked:
        return
    writes.downs += down.split(ranks) if len(ranks) > 1 else (down,)
    writes.sources += [factors.down for factors, _ in stacked]
    writes.scales += [factors.scaling * weight for factors, weight in stacked]
    if len(stacked) == 1:
        writes.ups.append(up)
        writes.up_sources.append(stacked[0][0].up)
    else:
        torch.cat([factors.up.to(up.device) for factors, _ in stacked], 1, out=up)


def _ensure_capacity(layer: AdapterLayer, rank: int, like: Factors) -> None:
    dtype = adapter_dtype(layer.base_layer)
    device = adapter_device(layer.base_layer) or like.down.device
    present = layer.slot_down
    if present is not None and present.shape[0] >= rank and present.dtype == dtype and present.device == device:
        return
    capacity = max(-(-rank // STEP) * STEP, layer.shared.reserved)
    layer.set_slot("slot_down", torch.empty(capacity, *like.down.shape[1:], dtype=dtype, device=device))
    layer.set_slot("slot_up", torch.empty(like.up.shape[0], capacity, dtype=dtype, device=device))


def _write_rest(
    layer: AdapterLayer,
    contributing: Sequence[tuple[Delta, float]],
    stacked: Sequence[tuple[Factors, float]],
    dense: Sequence[tuple[Delta, float]],
) -> None:
    """Gains, bias and dense changes: rare, so written one by one."""
    gained = any(factors.in_gain is not None or factors.out_gain is not None for factors, _ in stacked)
    if not (dense or gained or any(delta.delta_bias() is not None for delta, _ in contributing)):
        for slot in REST:
            layer.set_slot(slot, None)
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


def _put(layer: AdapterLayer, slot: str, value: Tensor | None) -> None:
    present = getattr(layer, slot)
    if value is not None and present is not None and present.shape == value.shape and present.device == value.device:
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
