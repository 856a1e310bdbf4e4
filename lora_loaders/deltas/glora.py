"""GLoRA: a low-rank change of the weight and of its inputs (https://arxiv.org/abs/2306.07967; LyCORIS)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lora_loaders.errors import ConversionError, MalformedAdapterError

from .base import Delta, Factors, Slots, computing, is_cheaper, join_biases, same, strip_ones

_SWAPPED = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}


@dataclass(frozen=True, eq=False, kw_only=True)
class GloraDelta(Delta):
    """ΔW = scaling · (W a1 a2 + b1 b2); a convolution's a1, a2 act on its channels.

    Rows of ΔW need the same rows of W only, so parts of a fused module share everything but b1.

    Attributes:
        a1, a2: `[in, rank]`, `[rank, in]`, with 1x1 kernels for a convolution.
        b1, b2: `[out, rank]`, `[rank, in, *kernel]`.
        bm: Tucker core `[rank, rank, *kernel]` between b1 and b2, or None.
        alpha: numerator of the scaling alpha / rank; None and 0 mean a scaling of 1.
        is_old: the file names them the other way round (a1 `[rank, in]`, b1 `[rank, in]`: LyCORIS before 2.0), kept
            for writing back. Shapes tell, except that a square weight can be read both ways with rank and size
            exchanged: then the smaller is the rank.
    """

    kind: ClassVar[str] = "glora"
    row_fields: ClassVar[tuple[str, ...]] = ("b1",)

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    bm: Tensor | None = None
    alpha: float | None = None
    is_old: bool = False

    @classmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """See `Delta.from_slots`."""
        readings: list[Self] = []
        for is_old in (False, True):
            names = _SWAPPED if is_old else {}
            named: dict[str, Any] = {names.get(name, name): tensor for name, tensor in slots.items()}
            joints = {named["a1"].shape[1], named["a2"].shape[0], named["b1"].shape[1], named["b2"].shape[0]}
            if "bm" in named:
                joints.update(named["bm"].shape[:2])
            if len(joints) == 1 and named["a1"].shape[0] == named["a2"].shape[1] == named["b2"].shape[1]:
                readings.append(cls(**named, alpha=alpha, is_old=is_old))
        if readings:
            return min(readings, key=lambda delta: delta.rank)
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in slots.items())
        raise MalformedAdapterError(f"the factors do not multiply: {shapes}")

    def slots(self) -> dict[str, Tensor]:
        """See `Delta.slots`."""
        names = _SWAPPED if self.is_old else {}
        return {names.get(name, name): tensor for name, tensor in self.tensors().items()}

    @property
    def rank(self) -> int:
        """Inner dimension of each product."""
        return self.a2.shape[0]

    @property
    def scaling(self) -> float:
        """alpha / rank; 1 where no alpha is given."""
        return self.alpha / self.rank if self.alpha else 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Delta.shape`."""
        kernel = (self.b2 if self.bm is None else self.bm).shape[2:]
        return (self.b1.shape[0], self.b2.shape[1], *kernel)

    @property
    def needs_base(self) -> bool:
        """See `Delta.needs_base`."""
        return True

    def _additive(self) -> tuple[Tensor, Tensor]:
        """b1 `[out, rank]` and b2 `[rank, in·kernel]`, a core multiplied into b2."""
        right = computing(self.b2)
        if self.bm is not None:
            right = torch.einsum("mn...,nj->mj...", computing(self.bm), right.flatten(1))
        return computing(self.b1).flatten(1), right.flatten(1)

    def factors(self, base_weight: Tensor | None = None) -> Factors | None:
        """(W a1 | b1) @ (a2 / b2), of twice the rank; None without the base, or for a kernel, which stays on W a1."""
        if base_weight is None or len(strip_ones(self.shape)) > 2 or not is_cheaper(2 * self.rank, self.shape):
            return None
        left, right = self._additive()
        up = torch.cat([computing(base_weight).flatten(1) @ computing(self.a1).flatten(1), left], 1)
        down = torch.cat([computing(self.a2).flatten(1), right])
        return Factors(down.view(-1, *base_weight.shape[1:]), up, self.scaling)

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """See `Delta.delta_weight`."""
        if base_weight is None:
            raise ConversionError("GLoRA's ΔW depends on the weight it is added to: pass base_weight")
        base = computing(base_weight)
        left, right = self._additive()
        a1, a2 = computing(self.a1).flatten(1), computing(self.a2).flatten(1)
        inputs = torch.einsum("oi...,ir,rj->oj...", base, a1, a2)
        return (inputs + (left @ right).view(base.shape)) * self.scaling

    @classmethod
    def join(cls, parts: Sequence[Self]) -> "GloraDelta":
        """See `Delta.join`: parts that share all but b1, as those of a split do."""
        first = parts[0]
        for part in parts[1:]:
            shared = all(same(getattr(part, name), getattr(first, name)) for name in ("a1", "a2", "b2", "bm"))
            if part.scaling != first.scaling or not shared:
                raise ConversionError("GLoRA deltas of separate modules cannot be stacked into one fused module")
        bias = join_biases(parts)
        return replace(first, b1=torch.cat([part.b1 for part in parts]), bias=bias)
