"""DoRA (https://arxiv.org/abs/2402.09353): any other delta, with the weight's norms set to a learned magnitude."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lora_loaders.errors import ConversionError, MalformedAdapterError

from .base import Delta, Factors, RowMap, Slots, computing, join_all
from .rows import RowsDelta


@dataclass(frozen=True, eq=False, kw_only=True)
class DoraDelta(Delta):
    """W' = magnitude · V / ‖V‖ with V = W + Δ of the inner delta; ΔW = W' − W.

    Attributes:
        inner: the delta whose direction is used; it also carries the bias.
        magnitude: `[out]` or `[out, 1, …]` holds row norms (LyCORIS's default, PEFT always), `[1, in, 1, …]` column
            norms (OneTrainer's default; PEFT for an embedding). The norm runs over all other dimensions.
    """

    kind: ClassVar[str] = "dora"

    inner: Delta
    magnitude: Tensor

    @classmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """Not used: `deltas.build` wraps the inner delta."""
        raise TypeError("build a DoRA delta from its inner delta")

    def slots(self) -> dict[str, Tensor]:
        """See `Delta.slots`."""
        return {**self.inner.slots(), "magnitude": self.magnitude}

    def tensors(self) -> dict[str, Tensor]:
        """Those of the inner delta, and `magnitude`."""
        return {**self.inner.tensors(), "magnitude": self.magnitude}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """See `Delta.with_tensors`."""
        inner = {name: tensor for name, tensor in tensors.items() if name != "magnitude"}
        return replace(self, inner=self.inner.with_tensors(inner), magnitude=tensors.get("magnitude", self.magnitude))

    @property
    def shape(self) -> tuple[int, ...] | None:
        """See `Delta.shape`."""
        return self.inner.shape

    @property
    def is_embedding(self) -> bool:
        """That of the inner delta."""
        return self.inner.is_embedding

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
        return True

    @property
    def per_input(self) -> bool:
        """Whether the magnitude holds norms of columns rather than rows; the shape alone tells."""
        return self.magnitude.ndim > 1 and self.magnitude.shape[0] == 1 and self.inner.out_features != 1

    @property
    def out_features(self) -> int:
        """See `Delta.out_features`; magnitudes per output tell it where the inner delta does not."""
        rows = self.inner.out_features
        return self.magnitude.shape[0] if rows == -1 and not self.per_input else rows

    def fits(self, weight_shape: Sequence[int]) -> bool:
        """See `Delta.fits`; a vector has no rows and columns to norm."""
        return len(weight_shape) > 1 and self.inner.fits(weight_shape)

    def input_groups(self, weight_shape: Sequence[int]) -> int:
        """See `Delta.input_groups`."""
        return self.inner.input_groups(weight_shape)

    def _gain(self, base_weight: Tensor | None) -> Tensor:
        """magnitude / ‖W + Δ‖, `[out]` or `[in]`; the norm is a constant for the gradient, as in the paper.

        A row (column) of zeros has no direction and stays zero, as LyCORIS has it: modules begin as zero, and a gain of
        −1 beside them, which bfloat16 hits easily, makes zeros of anything.
        """
        if base_weight is None:
            raise ConversionError("DoRA's ΔW depends on the weight it is added to: pass base_weight")
        base = computing(base_weight)
        direction = base + self.inner.delta_weight(base_weight).view(base.shape).to(base.device)
        axis = 1 if self.per_input else 0
        norms = direction.detach().transpose(0, axis).flatten(1).norm(dim=1)
        inverse = norms.reciprocal()
        return computing(self.magnitude).flatten() * inverse.masked_fill(inverse.isinf(), 0)

    def factors(self, base_weight: Tensor | None = None) -> Factors | None:
        """The inner factors with the gain folded into `down` (per input) or `up` (per output), and into their gains."""
        inner = self.inner.factors(base_weight)
        if inner is None:
            return None
        gain = self._gain(base_weight)
        if self.per_input:
            columns = gain.view(1, -1, *[1] * (inner.down.ndim - 2))
            return replace(inner, down=computing(inner.down) * columns, in_gain=_compose(gain, inner.in_gain))
        return replace(inner, up=computing(inner.up) * gain[:, None], out_gain=_compose(gain, inner.out_gain))

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """See `Delta.delta_weight`."""
        gain = self._gain(base_weight)
        assert base_weight is not None
        base = computing(base_weight)
        direction = base + self.inner.delta_weight(base_weight).view(base.shape)
        shape = [1] * base.ndim
        shape[1 if self.per_input else 0] = -1
        return gain.view(shape) * direction - base

    def delta_bias(self, base_bias: Tensor | None = None) -> Tensor | None:
        """Change of the bias by the inner delta."""
        return self.inner.delta_bias(base_bias)

    def map_rows(self, change: RowMap) -> Self:
        """See `Delta.map_rows`.

        Raises:
            ConversionError: column norms run over all rows, so a part of the rows has none of its own.
        """
        if self.per_input:
            raise ConversionError(
                "a DoRA magnitude per input column belongs to all rows of a fused module; `rows`, `split` and "
                "`swap_halves` give its parts"
            )
        return replace(self, inner=self.inner.map_rows(change), magnitude=change(self.magnitude))

    def rows(self, start: int, stop: int) -> Delta:
        """See `Delta.rows`."""
        if self.per_input:
            return RowsDelta.of(self, [(start, stop)])
        return self.split([start, stop - start, self.out_features - stop])[1]

    def swap_halves(self) -> Delta:
        """See `Delta.swap_halves`; column norms do not depend on the order of rows."""
        if self.per_input:
            return replace(self, inner=self.inner.swap_halves())
        return replace(self, inner=self.inner.swap_halves(), magnitude=torch.cat(self.magnitude.chunk(2)[::-1]))

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        """See `Delta.split`."""
        if self.per_input:
            return RowsDelta.cut(self, sizes)
        if self.magnitude.shape[0] != sum(sizes):
            shape = list(self.magnitude.shape)
            raise MalformedAdapterError(f"a DoRA magnitude of shape {shape} for {sum(sizes)} outputs")
        magnitudes = self.magnitude.split(list(sizes))
        inners = self.inner.split(sizes)
        return [replace(self, inner=inner, magnitude=part) for inner, part in zip(inners, magnitudes, strict=True)]

    @classmethod
    def join(cls, parts: Sequence[Self]) -> "DoraDelta":
        """See `Delta.join`."""
        if any(part.per_input for part in parts):
            raise ConversionError(
                "DoRA magnitudes per input column of separate modules cannot become one fused module's"
            )
        inner = join_all([part.inner for part in parts])
        like = parts[0].magnitude
        magnitudes = [part.magnitude.reshape(-1, *like.shape[1:]) for part in parts]  # `[out]` beside `[out, 1]`
        return cls(inner=inner, magnitude=torch.cat(magnitudes))


def _compose(gain: Tensor, inner: Tensor | None) -> Tensor:
    """`gain` after an inner gain (a difference from 1, or none), as a difference from 1."""
    return gain - 1 if inner is None else gain * (1 + computing(inner)) - 1
