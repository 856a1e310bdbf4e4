"""Chosen output rows of a delta whose own factors cannot be cut there: exact, without a dense copy.

Where ΔW depends on the base weight (per-input DoRA, rotations of outputs), that is the fused module's whole weight, of
which every part of a split model holds some rows. Such parts know their siblings' names, and read their weights.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lora_loaders.errors import ConversionError

from .base import Delta, Factors, Kron, RowMap, Slots, check_sizes, join_biases, same

Span = tuple[int, int]
WAYS_OUT = "Make a LoRA of it first: --as lora --rank N."


@dataclass(frozen=True, eq=False)
class FusedWeight:
    """The weight of a fused module whose rows several modules of the model hold.

    Attributes:
        spans: path of each of these modules -> its rows in the fused one, in the module's own order.
        read: gives the weight of the module at such a path; None as long as no model's weights are at hand.
    """

    spans: Mapping[str, tuple[Span, ...]]
    read: Callable[[str], Tensor] | None = None

    def __call__(self, own: Sequence[Span], weight: Tensor) -> Tensor:
        """The whole weight.

        Args:
            own: rows of the module that asks.
            weight: its weight, which is not read again.

        Raises:
            ConversionError: no weights of the siblings are at hand.
        """
        if self.read is None:
            raise ConversionError(
                f"ΔW depends on the weights of all of {', '.join(self.spans)}, the parts of one fused module",
                mend="Give the base model's weights: model=… (--model on the command line).",
            )
        assert tuple(own) in self.spans.values()
        parts = {spans: weight if spans == tuple(own) else self.read(path) for path, spans in self.spans.items()}
        return _assembled(parts, weight)


@dataclass(frozen=True, eq=False, kw_only=True)
class RowsDelta(Delta):
    """ΔW = the inner delta's rows in the given spans, in that order.

    Parts of one split share their inner tensors. No file format has a word for such a part; `join` gives the inner
    delta back when the parts make up the whole again.

    Attributes:
        inner: the whole delta, without a bias where it has one of its own.
        spans: (start, stop) of consecutive rows each.
        fused: the weight that an inner delta depends on; None where these are all of its rows, or it needs none.
    """

    kind: ClassVar[str] = "rows"

    inner: Delta
    spans: tuple[Span, ...]
    fused: FusedWeight | None = None

    @classmethod
    def of(cls, inner: Delta, spans: Sequence[Span]) -> Self:
        """Choose rows of a delta."""
        bias = inner.delta_bias()
        chosen = None if bias is None else _choose(bias, spans)
        return cls(inner=_without_bias(inner), spans=tuple(spans), bias=chosen)

    @classmethod
    def cut(cls, inner: Delta, sizes: Sequence[int]) -> list[Delta]:
        """Choose consecutive rows of a delta; see `Delta.split`."""
        check_sizes(inner.out_features, sizes)
        stops = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        return [cls.of(inner, [(stop - size, stop)]) for stop, size in zip(stops, sizes, strict=True)]

    @classmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """Not used: no file holds such a part."""
        raise TypeError("choose rows of a delta with RowsDelta.of")

    def slots(self) -> dict[str, Tensor]:
        """See `Delta.slots`.

        Raises:
            ConversionError: always; only `join` can undo the cut.
        """
        rows = ", ".join(f"{start} to {stop}" for start, stop in self.spans)
        raise ConversionError(f"no format can say rows {rows} of a fused module's {self.inner.kind} delta")

    def tensors(self) -> dict[str, Tensor]:
        """Those of the inner delta, and the chosen part of the bias."""
        return self.inner.tensors() if self.bias is None else {**self.inner.tensors(), "bias": self.bias}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """See `Delta.with_tensors`."""
        inner = {name: tensor for name, tensor in tensors.items() if name != "bias"}
        return replace(self, inner=self.inner.with_tensors(inner), bias=tensors.get("bias", self.bias))

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Delta.shape`."""
        whole = self.inner.shape
        assert whole is not None
        return (sum(stop - start for start, stop in self.spans), *whole[1:])

    def fits(self, weight_shape: Sequence[int]) -> bool:
        """See `Delta.fits`."""
        return self.shape[0] == weight_shape[0] and self.inner.fits((self.inner.out_features, *weight_shape[1:]))

    @property
    def rank(self) -> int | None:
        """Inner dimension of the inner delta."""
        return self.inner.rank

    @property
    def alpha_value(self) -> float | None:
        """Alpha of the inner delta."""
        return self.inner.alpha_value

    @property
    def needs_base(self) -> bool:
        """See `Delta.needs_base`; the weights of its siblings are read as well then."""
        return self.inner.needs_base

    @property
    def _rows_in_all(self) -> int:
        """Rows of the fused module, which some inner deltas do not tell."""
        if self.fused is None:
            return self.inner.out_features
        return sum(stop - start for spans in self.fused.spans.values() for start, stop in spans)

    def _whole(self, base_weight: Tensor | None) -> Tensor:
        """The base weight of all rows of the inner delta."""
        if base_weight is None:
            raise ConversionError(f"the ΔW of {self.inner.kind} depends on the weight it is added to: pass base_weight")
        if self.fused is not None:
            return self.fused(self.spans, base_weight)
        if self.shape[0] != self._rows_in_all:
            raise ConversionError(
                f"rows of {self.inner.kind} depend on the weights of the fused module's other parts", mend=WAYS_OUT
            )
        return _assembled({self.spans: base_weight}, base_weight)

    def factors(self, base_weight: Tensor | None = None) -> Factors | None:
        """The inner factors with the chosen rows of `up`, and of gains of the outputs.

        Norms over all rows (per-input DoRA) are computed anew each time: the siblings' weights may have changed, and
        nothing here is told.
        """
        whole = self.inner.factors(self._whole(base_weight) if self.needs_base else None)
        if whole is None:
            return None
        down = whole.down if base_weight is None else whole.down.reshape(-1, *base_weight.shape[1:])
        gain = None if whole.out_gain is None else _choose(whole.out_gain, self.spans)
        return replace(whole, down=down, up=_choose(whole.up, self.spans), out_gain=gain)

    def kron(self, weight_shape: Sequence[int]) -> Kron | None:
        """See `Delta.kron`; all blocks that the rows touch."""
        whole = self.inner.kron((self._rows_in_all, *weight_shape[1:])) if len(self.spans) == 1 else None
        if whole is None:
            return None
        ((start, stop),), unit = self.spans, len(whole.second)
        return Kron(whole.first[start // unit : -(-stop // unit)], whole.second, start % unit)

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """See `Delta.delta_weight`."""
        if self.needs_base:
            return _choose(self.inner.delta_weight(self._whole(base_weight)), self.spans)
        weight = torch.cat([self.inner.weight_rows(start, stop) for start, stop in self.spans])
        return weight if base_weight is None else weight.reshape(base_weight.shape)

    def map_rows(self, change: RowMap) -> Self:
        """See `Delta.map_rows`."""
        rows = change(torch.cat([torch.arange(start, stop) for start, stop in self.spans]))
        return replace(self, spans=_spans(rows), bias=None if self.bias is None else change(self.bias))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Delta:
        """See `Delta.join`: parts of the same delta; the whole of it becomes that delta again."""
        first = parts[0]
        if not all(_same_delta(part.inner, first.inner) for part in parts[1:]):
            return super().join(parts)
        bias = join_biases(parts)
        rows = torch.cat([torch.arange(start, stop) for part in parts for start, stop in part.spans])
        spans = _spans(rows)
        if spans == ((0, first._rows_in_all),):
            return _with_bias(first.inner, bias)
        return replace(first, spans=spans, bias=bias)


@dataclass(frozen=True, eq=False, kw_only=True)
class InUnits(Delta):
    """An algebra whose tensors can be cut between units of consecutive rows; elsewhere its parts are `RowsDelta`."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """Rows that stay together."""

    def rows(self, start: int, stop: int) -> Delta:
        """See `Delta.rows`."""
        if start % self.unit or stop % self.unit:
            return RowsDelta.of(self, [(start, stop)])
        return super().rows(start, stop)

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        """See `Delta.split`; where one cut misses the units, all parts become `RowsDelta`, and `join` undoes it."""
        check_sizes(self.out_features, sizes)
        return RowsDelta.cut(self, sizes) if any(size % self.unit for size in sizes) else super().split(sizes)

    def swap_halves(self) -> Delta:
        """See `Delta.swap_halves`."""
        half = self.out_features // 2
        if half % self.unit:
            return RowsDelta.of(self, [(half, self.out_features), (0, half)])
        return super().swap_halves()


def parts_of(delta: Delta, rows: Mapping[str, int]) -> dict[str, Delta]:
    """A fused module's delta cut into those of its parts (path -> rows, in order), which know one another.

    Raises:
        ConversionError: see `Delta.split`.
    """
    parts = dict(zip(rows, delta.split(list(rows.values())), strict=True))
    chosen = {path: found for path, part in parts.items() if (found := rows_in(part)) is not None}
    if len(chosen) < len(parts) or not any(part.needs_base for part in chosen.values()):
        return parts
    fused = FusedWeight({path: part.spans for path, part in chosen.items()})
    return {path: with_fused(part, fused) for path, part in parts.items()}


def fused_of(delta: Delta) -> FusedWeight | None:
    """The fused module's weight that a delta of one of its parts depends on; None for most."""
    found = rows_in(delta)
    return None if found is None else found.fused


def with_fused(delta: Delta, fused: FusedWeight) -> Delta:
    """The delta with another way to the fused module's weight."""
    if isinstance(delta, RowsDelta):
        return replace(delta, fused=fused)
    wrapper: Any = delta
    return replace(wrapper, inner=with_fused(wrapper.inner, fused))


def rows_in(delta: Delta) -> RowsDelta | None:
    """The chosen rows within a delta that may wrap others; None where it is a whole module's."""
    while not isinstance(delta, RowsDelta):
        inner: Delta | None = getattr(delta, "inner", None)
        if inner is None:
            return None
        delta = inner
    return delta


def _without_bias(delta: Delta) -> Delta:
    return _with_bias(delta, None)


def _with_bias(delta: Delta, bias: Tensor | None) -> Delta:
    """The delta with this bias, which a wrapper keeps in what it wraps."""
    wrapper: Any = delta
    if isinstance(getattr(delta, "inner", None), Delta) and not isinstance(delta, RowsDelta):
        return replace(wrapper, inner=_with_bias(wrapper.inner, bias))
    return replace(delta, bias=bias)


def _assembled(parts: Mapping[tuple[Span, ...], Tensor], like: Tensor) -> Tensor:
    """A weight from the rows that its parts hold."""
    pieces: list[tuple[int, Tensor]] = []
    for spans, weight in parts.items():
        rows = weight.to(like.device).split([stop - start for start, stop in spans])
        pieces += [(start, piece) for (start, _), piece in zip(spans, rows, strict=True)]
    return torch.cat([piece for _, piece in sorted(pieces, key=itemgetter(0))])


def _choose(tensor: Tensor, spans: Sequence[Span]) -> Tensor:
    return torch.cat([tensor[start:stop] for start, stop in spans])


def _spans(rows: Tensor) -> tuple[Span, ...]:
    """The fewest spans of consecutive rows that list these rows in this order."""
    if not rows.numel():
        return ((0, 0),)
    breaks = (rows.diff() != 1).nonzero().flatten() + 1
    runs = rows.tensor_split(breaks)
    return tuple((int(run[0]), int(run[-1]) + 1) for run in runs)


def _same_delta(one: Delta, other: Delta) -> bool:
    ones, others = one.tensors(), other.tensors()
    if type(one) is not type(other) or ones.keys() != others.keys() or one.alpha_value != other.alpha_value:
        return False
    return all(same(tensor, others[name]) for name, tensor in ones.items())
