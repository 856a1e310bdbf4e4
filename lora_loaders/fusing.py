"""Fuse and unfuse, exact to the last bit.

Fusing sets W' = round(W + P) with P the sum of the fused adapters' changes. Subtracting the same P on the same device
gives W back except where rounding lost it: 0.3 to 2 % of the elements. Those are kept as a sparse record, so unfusing
restores every bit at a few percent of the weights' memory. A checksum taken before fusing proves it each time.
"""

import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .deltas import Delta, Factors
from .deltas.base import computing
from .errors import AdapterStateError, UnsupportedBaseError
from .fuse_report import FuseReport, fuse_report
from .gates import changing, exclusive
from .joining import follow_parts
from .layers.base_weight import BITS, Record, adapter_dtype, is_plain, read_original, read_weight, restore, rewrite
from .layers.held import held, is_out_of_reach
from .layers.layer import AdapterLayer
from .layers.quantised import unsupported
from .layers.slots import refresh
from .layout import adapter_layers

logger = logging.getLogger(__name__)
LOW_PRECISION = (torch.bfloat16, torch.float16)
COPIED_SHARE = 0.5
"""A record that lists more than this share of the elements would be larger than a copy, which is kept instead."""


@dataclass(frozen=True)
class Change:
    """What is added to one weight: a product of stacked factors, or a dense difference in float32."""

    down: Tensor | None = None
    up: Tensor | None = None
    dense: Tensor | None = None

    def add_to(self, weight: Tensor, sign: float, out: Tensor | None = None) -> Tensor:
        """`round(weight + sign · change)` in a new tensor or in `out`; the same inputs give the same bits."""
        out = torch.empty_like(weight) if out is None else out
        if self.dense is not None:
            return torch.add(weight, self.dense, alpha=sign, out=out)
        assert self.down is not None
        assert self.up is not None
        if weight.is_cuda and weight.dtype in LOW_PRECISION:
            # The tensor cores accumulate in float32 and round once.
            factors = (self.up.to(weight.dtype), self.down.to(weight.dtype))
            if out.is_contiguous():
                torch.addmm(weight.flatten(1), *factors, alpha=sign, out=out.flatten(1))
                return out
            return out.copy_(torch.addmm(weight.flatten(1), *factors, alpha=sign).view(weight.shape))
        return torch.add(weight, (self.up @ self.down).view(weight.shape), alpha=sign, out=out)


@dataclass
class Fused:
    """What is fused into one layer, and how to take it out again.

    Attributes:
        coefficients: adapter -> the factor it was fused with (its weight times `lora_scale`).
        change: what was added to the weight; None if only the bias changed, or where a copy is kept.
        where: flat positions whose original value the subtraction misses.
        values: those original values.
        copy: the whole original weight, where the record would be larger than that.
        checksum: sum of the original weight's bit patterns.
        bias: the original bias; kept whole, it is small.
        had_bias: whether the base layer had a bias at all.
        record: what a quantised weight stored.
        lost: squared norms of what quantising again lost of the change, and of the change.
    """

    coefficients: dict[str, float]
    change: Change | None = None
    where: Tensor | None = None
    values: Tensor | None = None
    copy: Tensor | None = None
    checksum: Tensor | None = None
    bias: Tensor | None = None
    had_bias: bool = False
    record: Record | None = None
    lost: tuple[Tensor, Tensor] | None = None

    def original(self, layer: AdapterLayer) -> Tensor:
        """The weight before fusing, as a new tensor on the weight's device.

        Raises:
            AdapterStateError: the weight is no longer what fusing left, so its original cannot be computed.
        """
        if self.record is not None:
            return read_original(layer.base_layer, self.record)
        weight = read_weight(layer.base_layer)
        if self.copy is not None:
            return self.copy.to(weight.device)
        if self.change is None:
            return weight
        assert self.where is not None
        assert self.values is not None
        # Redone where it was done: another device may sum in another order.
        restored = self.change.add_to(weight.to(self.where.device), -1.0)
        restored.view(-1).index_copy_(0, self.where.long(), self.values.to(restored.dtype))
        if self.checksum is not None and not torch.equal(_checksum(restored), self.checksum):
            raise AdapterStateError(
                "a fused weight is not what fusing left: it was changed, cast or trained since",
                mend="Keep the weights as they are with unload_lora_weights(keep_fused=True), "
                "or load the model's own again.",
                state="Nothing was unfused.",
            )
        return restored.to(weight.device)

    def memory(self) -> int:
        """Bytes that are kept for unfusing."""
        kept = (self.where, self.values, self.copy, self.bias)
        factors = (self.change.down, self.change.up, self.change.dense) if self.change else ()
        recorded = self.record.memory() if self.record is not None else 0
        return recorded + sum(tensor.nbytes for tensor in (*kept, *factors) if tensor is not None)


def fused_adapters(model: nn.Module) -> set[str]:
    """Names of the adapters that are fused into any layer."""
    return {name for _, layer in adapter_layers(model) if layer.fused is not None for name in layer.fused.coefficients}


@exclusive(reads_bases=True)
def fuse(
    model: nn.Module, names: Sequence[str] | None = None, *, lora_scale: float = 1.0, safe_fusing: bool = False
) -> FuseReport:
    """Add adapters to the base weights; those that were fused before stay so, and one fused again takes the new scale.

    Args:
        model: the model.
        names: adapters to fuse, the active ones if None.
        lora_scale: factor beside each adapter's own weight.
        safe_fusing: refuse if any fused weight would hold NaN or infinity.

    Raises:
        AdapterStateError: an unknown name, or `safe_fusing` met NaN or infinity.
        UnsupportedBaseError: a base weight that cannot be written; nothing is fused then.
    """
    layers = [layer for _, layer in adapter_layers(model)]
    _check_names(layers, names)
    wanted: list[tuple[AdapterLayer, dict[str, float]]] = []
    for layer in layers:
        chosen = layer.active if names is None else names
        new = {name: layer.weights[name] * lora_scale for name in chosen if name in layer.templates}
        if new:
            wanted.append((layer, {**(layer.fused.coefficients if layer.fused else {}), **new}))
    _rewrite(wanted, safe_fusing)
    follow_parts(model)
    report = fuse_report(layer for layer, _ in wanted)
    if report.quantised:
        message = "fused into %d quantised layers of %s: quantising again lost %.0f %% of the change"
        logger.warning(message, report.quantised, type(model).__name__, 100 * report.lost)
    return report


@exclusive(reads_bases=True)
def unfuse(model: nn.Module, names: Sequence[str] | None = None) -> None:
    """Take adapters out of the base weights, every bit as it was; what else is fused stays.

    Args:
        model: the model.
        names: adapters to take out, all of them if None.

    Raises:
        AdapterStateError: a weight was changed since it was fused.
    """
    wanted: list[tuple[AdapterLayer, dict[str, float]]] = []
    for _, layer in adapter_layers(model):
        if layer.fused is not None:
            keep = {} if names is None else {n: c for n, c in layer.fused.coefficients.items() if n not in names}
            if keep != layer.fused.coefficients:
                wanted.append((layer, keep))
    _rewrite(wanted, safe_fusing=False)
    follow_parts(model)


FusedState = list[tuple[AdapterLayer, dict[str, float]]]


def fused_state(model: nn.Module) -> FusedState:
    """What is fused into each layer and how strongly, for `all_or_none`."""
    return [
        (layer, dict(layer.fused.coefficients) if layer.fused is not None else {}) for _, layer in adapter_layers(model)
    ]


@contextmanager
def all_or_none(models: Iterable[nn.Module]) -> Generator[None]:
    """After any exception in the block, what was fused into the models before is fused again, to the bit."""
    with changing(models := list(models), reads_bases=True):
        before = [fused_state(model) for model in models]
        try:
            yield
        except BaseException:
            for model, state in zip(models, before, strict=True):
                _rewrite(state, safe_fusing=False)
                follow_parts(model)
            raise


def unfuse_all(models: Iterable[nn.Module], names: Sequence[str] | None = None) -> None:
    """Take adapters out of the base weights of all models, or of none; see `unfuse`."""
    models = list(models)
    with all_or_none(models):
        for model in models:
            unfuse(model, names)


def _check_names(layers: Sequence[AdapterLayer], names: Sequence[str] | None) -> None:
    present = {name for layer in layers for name in layer.templates}
    missing = set(names or ()) - present
    if missing:
        raise AdapterStateError(
            f"cannot fuse {', '.join(sorted(missing))}: no such adapter",
            problems=[f"present: {name}" for name in sorted(present)],
            state="Nothing was fused.",
        )


def _rewrite(wanted: Sequence[tuple[AdapterLayer, dict[str, float]]], safe_fusing: bool) -> None:
    """Bring each layer to its wanted set of fused adapters; all or none."""
    before: list[tuple[AdapterLayer, dict[str, float]]] = []
    late: Callable[[], None] = _nothing
    try:
        for layer, coefficients in wanted:
            before.append((layer, dict(layer.fused.coefficients) if layer.fused is not None else {}))
            compact = _set_fused(layer, coefficients, safe_fusing)
            # Counting what to keep waits for the device; one layer late, the next one's work is under way.
            late()
            late = compact
        late()
    except BaseException:
        for layer, coefficients in reversed(before):
            _set_fused(layer, coefficients, safe_fusing=False)()
        raise
    finally:
        refresh(layer for layer, _ in wanted)


@torch.no_grad()
def _set_fused(layer: AdapterLayer, coefficients: Mapping[str, float], safe_fusing: bool) -> Callable[[], None]:
    """Undo what is fused, then fuse this set: one rounding, whatever the order of calls was.

    Returns:
        What makes the record small; until it is called the record is a copy of the weight.
    """
    layer.settle()
    if layer.fused is not None:
        if layer.fused.coefficients == coefficients:
            return _nothing
        _restore(layer)
    if not coefficients:
        return _nothing
    base = layer.base_layer
    if is_out_of_reach(base, "weight"):
        raise unsupported(base, "is kept in a file by accelerate, or has no data: fuse before it is offloaded")
    weight = read_weight(base)
    deltas = [(layer.delta(name), coefficient) for name, coefficient in coefficients.items()]
    change = _change(layer, deltas, weight)
    bias = _new_bias(base, deltas)
    present = held(base, "bias")
    quantised = not is_plain(base)
    original = None if change is None or quantised else weight.clone()
    kept = None if bias is None or present is None else present.detach().clone()
    # Before the weight is touched, so that whatever happens can be undone.
    fused = layer.fused = Fused(dict(coefficients), copy=original, bias=kept, had_bias=present is not None)
    if change is not None:
        before = weight.clone() if quantised else weight
        change.add_to(weight, 1.0, out=weight)
        if quantised:
            _store(layer, fused, before, weight)
    if safe_fusing and not all(tensor.isfinite().all() for tensor in (weight, bias) if tensor is not None):
        raise AdapterStateError(
            f"fusing {', '.join(coefficients)} would put NaN or infinity into a weight",
            mend="The adapter holds such values itself, or its scale overflows the weight's dtype.",
            state="Nothing was fused.",
        )
    if bias is not None and present is None:
        base.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
    elif bias is not None and present is not None:
        present.data.copy_(bias)
    if change is None or original is None or change.dense is not None:
        return _nothing
    # Bit patterns, not values: -0.0 equals 0.0, and NaN equals nothing.
    bits = BITS[weight.element_size()]
    missed = change.add_to(weight, -1.0).view(bits) != original.view(bits)
    return partial(_compact, fused, change, original, missed.view(-1))


def _store(layer: AdapterLayer, fused: Fused, before: Tensor, weight: Tensor) -> None:
    """Store a weight in its base's own scheme and measure what that loses of the change."""
    if not weight.isfinite().all():
        raise AdapterStateError(
            f"fusing {', '.join(fused.coefficients)} would put NaN or infinity into a quantised weight",
            mend="The adapter holds such values itself.",
            state="Nothing was fused.",
        )
    fused.record = rewrite(layer.base_layer, weight)
    wanted = weight - before
    fused.lost = ((read_weight(layer.base_layer) - weight).square().sum(), wanted.square().sum())


def _nothing() -> None:
    """Nothing is left to do."""


def _change(layer: AdapterLayer, deltas: Sequence[tuple[Delta, float]], weight: Tensor) -> Change | None:
    """The sum of all changes: stacked factors where every delta is a plain product, else one dense difference."""
    deltas = [(delta, coefficient) for delta, coefficient in deltas if delta.shape is not None]
    if not deltas:
        return None
    wide = torch.float64 if weight.dtype in (torch.float32, torch.float64) else torch.float32
    all_factors = [None if delta.needs_base else delta.factors() for delta, _ in deltas]
    if all(factors is not None for factors in all_factors):
        pairs: list[tuple[Factors, float]] = [(f, c) for f, (_, c) in zip(all_factors, deltas, strict=True) if f]
        # detach().clone(): parameters may be trained or replaced while fused.
        down = torch.cat([f.down.detach().flatten(1).to(weight.device, _factor_dtype(weight, wide)) for f, _ in pairs])
        ups = [
            (f.up.detach().to(weight.device, wide) * (f.scaling * c)).to(_factor_dtype(weight, wide)) for f, c in pairs
        ]
        return Change(down=down, up=torch.cat(ups, 1))
    total = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    for delta, coefficient in deltas:
        total += delta.delta_weight(weight).detach().view(weight.shape) * coefficient
    return Change(dense=total if weight.dtype == torch.float64 else total.float())


def _factor_dtype(weight: Tensor, wide: torch.dtype) -> torch.dtype:
    """Factors are kept in the precision their product is computed in."""
    return weight.dtype if weight.is_cuda and weight.dtype in LOW_PRECISION else wide


@torch.no_grad()
def _compact(fused: Fused, change: Change, original: Tensor, missed: Tensor) -> None:
    """Keep what subtraction misses, positions and values, instead of the copy, if that is smaller."""
    where = missed.nonzero().squeeze(1)
    if where.numel() > COPIED_SHARE * missed.numel():
        return
    fused.values = original.reshape(-1)[where]
    fused.where = where.int() if missed.numel() < 2**31 else where
    fused.change, fused.checksum, fused.copy = change, _checksum(original), None


def _checksum(weight: Tensor) -> Tensor:
    flat = weight.contiguous().view(-1)
    # Eight bytes at a time where they come out even: a sum of narrower integers is widened in memory first.
    size = 8 if flat.nbytes % 8 == 0 else flat.element_size()
    return flat.view(BITS[size]).sum(dtype=torch.int64)


def _new_bias(base: nn.Module, deltas: Sequence[tuple[Delta, float]]) -> Tensor | None:
    """The bias with the changes added, in the weight's dtype; None where no delta changes it."""
    own = held(base, "bias")
    changes = [(bias, c) for delta, c in deltas if (bias := delta.delta_bias(own)) is not None]
    if not changes:
        return None
    if not hasattr(base, "bias"):
        raise UnsupportedBaseError(
            f"a {type(base).__name__} has no bias, so an adapter's cannot be fused into it",
            mend="Use the adapter unfused.",
            state="Nothing was fused.",
        )
    weight = held(base, "weight")
    present = held(base, "bias")
    if present is None and weight is not base.weight:
        raise unsupported(base, "is offloaded leaf by leaf and has no bias to fuse the adapter's into")
    start = torch.zeros((), device=weight.device) if present is None else computing(present.detach())
    total = sum((computing(bias.detach()) * c for bias, c in changes), start)
    return total.to(adapter_dtype(base) if present is None else present.dtype)


@torch.no_grad()
def _restore(layer: AdapterLayer) -> None:
    """Put the base layer back to the bit."""
    fused: Fused = layer.fused
    base: Any = layer.base_layer
    if fused.record is not None:
        restore(base, fused.record)
    elif is_plain(base):
        original = fused.original(layer)
        weight = read_weight(base)
        if original is not weight:
            weight.copy_(original)
    if fused.bias is not None:
        held(base, "bias").data.copy_(fused.bias)
    elif not fused.had_bias and getattr(base, "bias", None) is not None:
        base.register_parameter("bias", None)
    layer.fused = None
