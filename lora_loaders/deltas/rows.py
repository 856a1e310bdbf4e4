"""Chosen output rows of a delta whose own factors cannot be cut there: exact, without a dense copy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lora_loaders.errors import ConversionError

from .base import Delta, Factors, RowMap, Slots, join_biases, same

Span = tuple[int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class RowsDelta(Delta):
    """ΔW = the inner delta's rows in the given spans, in that order.

    Parts of one split share their inner tensors. No file format has a word for such a part; `join` gives the inner
    delta back when the parts make up the whole again.

    Attributes:
        inner: the whole delta, without a bias.
        spans: (start, stop) of consecutive rows each.
    """

    kind: ClassVar[str] = "rows"

    inner: Delta
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, inner: Delta, spans: Sequence[Span]) -> Self:
        """Choose rows of a delta.

        Raises:
            ConversionError: ΔW depends on the base weight, of which a part of a fused module has some rows only.
        """
        if inner.needs_base:
            raise ConversionError(
                f"a part of a fused module's {inner.kind} delta depends on the weights of the other parts",
                mend="Load it onto a model with the fused module.",
            )
        bias = inner.delta_bias()
        chosen = None if bias is None else _choose(bias, spans)
        return cls(inner=replace(inner, bias=None), spans=tuple(spans), bias=chosen)

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
        raise ConversionError(
            f"no format can say rows {rows} of a fused module's {self.inner.kind} delta",
            mend="Write a format with fused names (kohya, original), or convert to lora or full first.",
        )

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

    def factors(self, base_weight: Tensor | None = None) -> Factors | None:
        """The inner factors with the chosen rows of `up`."""
        whole = self.inner.factors()
        if whole is None:
            return None
        down = whole.down if base_weight is None else whole.down.reshape(-1, *base_weight.shape[1:])
        return replace(whole, down=down, up=_choose(whole.up, self.spans))

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """See `Delta.delta_weight`."""
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
        if spans == ((0, first.inner.out_features),):
            return replace(first.inner, bias=bias)
        return replace(first, spans=spans, bias=bias)


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
