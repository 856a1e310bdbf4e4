"""A sparse remainder beside any other delta (LyCORIS extraction with `use_sparse_bias`); it is added to the weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lora_loaders.errors import MalformedAdapterError

from .base import Delta, RowMap, Slots, computing, join_all


@dataclass(frozen=True, eq=False, kw_only=True)
class SparseDelta(Delta):
    """ΔW = ΔW of the inner delta + remainder.

    LyCORIS writes alpha = rank beside it, so that it does not matter that the remainder is not scaled here.

    Attributes:
        inner: the delta beside it; it also carries the bias.
        indices: `[2, count]`, rows and columns in the weight flattened to `[out, in·kernel]`; not among `tensors()`,
            because a cast would spoil it.
        values: `[count]`.
    """

    kind: ClassVar[str] = "sparse"

    inner: Delta
    indices: Tensor
    values: Tensor

    @classmethod
    def wrap(cls, inner: Delta, slots: Slots) -> Self:
        """Put the remainder in `bias_indices`, `bias_values` and `bias_size` beside a delta.

        Raises:
            MalformedAdapterError: a slot is missing, or the sizes disagree.
        """
        missing = {"bias_indices", "bias_values", "bias_size"} - set(slots)
        if missing:
            raise MalformedAdapterError(f"sparse: {', '.join(sorted(missing))} missing")
        indices, values, size = slots["bias_indices"], slots["bias_values"], slots["bias_size"]
        if inner.shape is None or indices.shape != (2, *values.shape):
            raise MalformedAdapterError(f"a sparse remainder of {list(values.shape)} values at {list(indices.shape)}")
        if not size.is_meta and size.tolist() != [inner.shape[0], torch.Size(inner.shape[1:]).numel()]:
            raise MalformedAdapterError(f"a sparse remainder of {size.tolist()} beside a delta of {list(inner.shape)}")
        if not (size.is_meta or indices.is_meta) and indices.numel():
            places = indices.long()
            ends = zip(places.amin(1).tolist(), places.amax(1).tolist(), size.tolist(), strict=True)
            if any(first < 0 or last >= end for first, last, end in ends):
                raise MalformedAdapterError(f"a sparse remainder at places outside of {size.tolist()}")
        return cls(inner=inner, indices=indices, values=values)

    @classmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """Not used: `deltas.build` wraps the inner delta."""
        raise TypeError("build a sparse remainder from its inner delta")

    def slots(self) -> dict[str, Tensor]:
        """See `Delta.slots`."""
        assert self.shape is not None
        size = torch.tensor([self.shape[0], torch.Size(self.shape[1:]).numel()], dtype=self.indices.dtype)
        return {
            **self.inner.slots(),
            "bias_indices": self.indices,
            "bias_values": self.values,
            "bias_size": size,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Those of the inner delta, and `bias_values`."""
        return {**self.inner.tensors(), "bias_values": self.values}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """See `Delta.with_tensors`."""
        inner = {name: tensor for name, tensor in tensors.items() if name != "bias_values"}
        return replace(self, inner=self.inner.with_tensors(inner), values=tensors.get("bias_values", self.values))

    @property
    def shape(self) -> tuple[int, ...] | None:
        """See `Delta.shape`."""
        return self.inner.shape

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
        """See `Delta.needs_base`."""
        return self.inner.needs_base

    def fits(self, weight_shape: Sequence[int]) -> bool:
        """See `Delta.fits`."""
        return self.inner.fits(weight_shape)

    def input_groups(self, weight_shape: Sequence[int]) -> int:
        """See `Delta.input_groups`."""
        return self.inner.input_groups(weight_shape)

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """See `Delta.delta_weight`."""
        weight = self.inner.delta_weight(base_weight)
        rows, columns = self.indices.to(weight.device, torch.long)
        values = computing(self.values).to(weight.dtype)
        return weight.flatten(1).index_put((rows, columns), values, accumulate=True).view(weight.shape)

    def delta_bias(self, base_bias: Tensor | None = None) -> Tensor | None:
        """Change of the bias by the inner delta."""
        return self.inner.delta_bias(base_bias)

    def _pick(self, change: RowMap, inner: Delta) -> Self:
        chosen = change(torch.arange(self.out_features))
        places = torch.full((self.out_features,), -1)
        places[chosen] = torch.arange(chosen.numel())
        rows = places[self.indices[0].long().cpu()]
        kept = (rows >= 0).to(self.indices.device)
        indices = torch.stack([rows.to(self.indices), self.indices[1]])
        return replace(self, inner=inner, indices=indices[:, kept], values=self.values[kept.to(self.values.device)])

    def map_rows(self, change: RowMap) -> Self:
        """See `Delta.map_rows`."""
        return self._pick(change, self.inner.map_rows(change))

    def rows(self, start: int, stop: int) -> Delta:
        """See `Delta.rows`."""
        return self._pick(lambda tensor: tensor[start:stop], self.inner.rows(start, stop))

    def swap_halves(self) -> Delta:
        """See `Delta.swap_halves`."""
        return self._pick(lambda tensor: torch.cat(tensor.chunk(2)[::-1]), self.inner.swap_halves())

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        """See `Delta.split`."""
        inners = self.inner.split(sizes)
        stops = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        spans = [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
        return [self._pick(_slicing(span), inner) for span, inner in zip(spans, inners, strict=True)]

    @classmethod
    def join(cls, parts: Sequence[Self]) -> "SparseDelta":
        """See `Delta.join`."""
        inner = join_all([part.inner for part in parts])
        rows = 0
        indices: list[Tensor] = []
        for part in parts:
            indices.append(part.indices.int() + torch.tensor([[rows], [0]], device=part.indices.device).int())
            rows += part.out_features
        return cls(inner=inner, indices=torch.cat(indices, 1), values=torch.cat([part.values for part in parts]))


def _slicing(span: slice) -> RowMap:
    return lambda tensor: tensor[span]
