"""Writing the active slot: all contributing adapters of many layers stacked in a few batched copies."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_loaders.deltas import Delta, Factors
from lora_loaders.deltas.base import computing

from .base_weight import adapter_device, adapter_dtype
from .layer import AdapterLayer

STEP = 8
"""Capacities are multiples of this: smaller ones gain nothing on tensor cores, and equal capacities are reused."""


class _Copy(NamedTuple):
    target: Tensor
    source: Tensor
    scale: float


def refresh(layers: Iterable[AdapterLayer]) -> None:
    """Rewrite the slots of these layers, in place where their capacity allows."""
    downs: list[_Copy] = []
    ups: list[_Copy] = []
    empty: list[Tensor] = []
    with torch.no_grad():
        for layer in layers:
            _stack(layer, downs, ups, empty)
        if empty:
            torch._foreach_zero_(empty)  # pyright: ignore[reportPrivateUsage]
        _copy(downs)
        _copy(ups)


def _stack(layer: AdapterLayer, downs: list[_Copy], ups: list[_Copy], empty: list[Tensor]) -> None:
    layer.note_trained()
    contributing = [(layer.delta(name), weight) for name, weight in layer.contributing]
    if not contributing and not layer.shared.reserved:
        for slot in layer.SLOTS:
            layer.set_slot(slot, None)
        return
    stacked: list[tuple[Factors, float]] = []
    dense: list[tuple[Delta, float]] = []
    pairs = [(delta, layer.factors(delta), weight) for delta, weight in contributing]
    gains_outputs = any(factors is not None and factors.out_gain is not None for _, factors, _ in pairs)
    for delta, factors, weight in pairs:
        # Gains of both sides would multiply each other; changes of a weight only add up.
        if factors is None or (factors.in_gain is not None and gains_outputs):
            dense.append((delta, weight))
        else:
            stacked.append((factors, weight))
    _write_pairs(layer, stacked, downs, ups, empty)
    _write_rest(layer, contributing, stacked, dense)


def _write_pairs(
    layer: AdapterLayer,
    stacked: Sequence[tuple[Factors, float]],
    downs: list[_Copy],
    ups: list[_Copy],
    empty: list[Tensor],
) -> None:
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
    start = 0
    for factors, weight in stacked:
        stop = start + factors.down.shape[0]
        downs.append(_Copy(down[start:stop], factors.down, 1.0))
        ups.append(_Copy(up[:, start:stop], factors.up, factors.scaling * weight))
        start = stop
    if start < down.shape[0]:
        empty += [down[start:], up[:, start:]]


def _ensure_capacity(layer: AdapterLayer, rank: int, like: Factors) -> None:
    dtype = adapter_dtype(layer.base_layer)
    device = adapter_device(layer.base_layer) or like.down.device
    present = layer.slot_down
    if present is not None and present.shape[0] >= rank and present.dtype == dtype and present.device == device:
        return
    capacity = max(-(-rank // STEP) * STEP, layer.shared.reserved)
    # Zeroed once: rows beyond the rank stay zero until something is written there.
    layer.set_slot("slot_down", torch.zeros(capacity, *like.down.shape[1:], dtype=dtype, device=device))
    layer.set_slot("slot_up", torch.zeros(like.up.shape[0], capacity, dtype=dtype, device=device))


def _write_rest(
    layer: AdapterLayer,
    contributing: Sequence[tuple[Delta, float]],
    stacked: Sequence[tuple[Factors, float]],
    dense: Sequence[tuple[Delta, float]],
) -> None:
    """Gains, bias and dense changes: rare, so written one by one."""
    in_gain = _total([(f.in_gain, w) for f, w in stacked])
    out_gain = _total([(f.out_gain, w) for f, w in stacked])
    bias = _total([(delta.delta_bias(), weight) for delta, weight in contributing])
    if out_gain is not None and layer.bias is not None:
        # (1 + gain) multiplies the base's whole output; the bias is no part of the weight and is taken out again.
        correction = -out_gain * computing(layer.bias.detach())
        bias = correction if bias is None else bias + correction
    weight = None
    if any(delta.shape is not None for delta, _ in dense):
        base = layer.original_weight() if any(delta.needs_base for delta, _ in dense) else None
        shape = layer.weight.shape
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


def _copy(copies: Sequence[_Copy]) -> None:
    """All copies in one batch, then all scales in another."""
    if not copies:
        return
    targets = [copy.target for copy in copies]
    torch._foreach_copy_(targets, [copy.source.detach() for copy in copies])  # pyright: ignore[reportPrivateUsage]
    scaled = [copy for copy in copies if copy.scale != 1.0]
    if scaled:
        torch._foreach_mul_([copy.target for copy in scaled], [copy.scale for copy in scaled])  # pyright: ignore[reportPrivateUsage]
