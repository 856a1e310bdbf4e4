"""LoHa: ΔW is the elementwise product of two low-rank matrices (FedPara, https://arxiv.org/abs/2108.06098; LyCORIS)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lora_loaders.errors import ConversionError, MalformedAdapterError

from .base import Delta, Factors, RowMap, Slots, computing, is_cheaper, join_biases, same, view_like


@dataclass(frozen=True, eq=False, kw_only=True)
class LohaDelta(Delta):
    """ΔW = scaling · (w1_a @ w1_b) ∘ (w2_a @ w2_b).

    LyCORIS flattens a convolution's kernel into `w_b` when there is no Tucker core. Its size is then not in the file:
    `shape` is `[out, in·kh·kw]`, and `delta_weight` takes the base weight's shape if that is given.

    Attributes:
        hada_w1_a, hada_w2_a: `[out, rank]`; `[rank, out]` beside a core.
        hada_w1_b, hada_w2_b: `[rank, in]`, `[rank, in·kh·kw]` or `[rank, in, *kernel]`; `[rank, in]` beside a core.
        hada_t1, hada_t2: Tucker cores `[rank, rank, *kernel]`, both or neither.
        alpha: numerator of the scaling alpha / rank; None and 0 mean a scaling of 1.
    """

    kind: ClassVar[str] = "loha"
    row_fields: ClassVar[tuple[str, ...]] = ("hada_w1_a", "hada_w2_a")

    hada_w1_a: Tensor
    hada_w1_b: Tensor
    hada_w2_a: Tensor
    hada_w2_b: Tensor
    hada_t1: Tensor | None = None
    hada_t2: Tensor | None = None
    alpha: float | None = None

    @classmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """See `Delta.from_slots`."""
        fields: dict[str, Any] = {**slots, "alpha": alpha}
        delta = cls(**fields)
        rank_axis = 0 if delta.hada_t1 is not None else 1
        for a, b, core in delta._products:
            joints = {a.shape[rank_axis], b.shape[0], *(() if core is None else core.shape[:2])}
            if len(joints) > 1:
                raise MalformedAdapterError(f"the factors do not multiply: {_shapes(slots)}")
        if delta.hada_w1_a.shape[1 - rank_axis] != delta.hada_w2_a.shape[1 - rank_axis] or (
            delta.hada_w1_b.shape[1:] != delta.hada_w2_b.shape[1:]
        ):
            raise MalformedAdapterError(f"the two products have different shapes: {_shapes(slots)}")
        return delta

    def slots(self) -> dict[str, Tensor]:
        """See `Delta.slots`."""
        return self.tensors()

    @property
    def rank(self) -> int:
        """Inner dimension of each product; ΔW itself can have its square."""
        return self.hada_w1_b.shape[0]

    @property
    def scaling(self) -> float:
        """alpha / rank; 1 where no alpha is given."""
        return self.alpha / self.rank if self.alpha else 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Delta.shape`; two-dimensional where the file flattens a kernel."""
        if self.hada_t1 is None:
            return (self.hada_w1_a.shape[0], *self.hada_w1_b.shape[1:])
        return (self.hada_w1_a.shape[1], self.hada_w1_b.shape[1], *self.hada_t1.shape[2:])

    def fits(self, weight_shape: Sequence[int]) -> bool:
        """See `Delta.fits`; a flattened kernel fits any kernel of that size."""
        out, *rest = self.shape
        flattened = len(rest) == 1 and out == weight_shape[0] and rest[0] == torch.Size(weight_shape[1:]).numel()
        return flattened or super().fits(weight_shape)

    @property
    def _products(self) -> tuple[tuple[Tensor, Tensor, Tensor | None], ...]:
        return (self.hada_w1_a, self.hada_w1_b, self.hada_t1), (self.hada_w2_a, self.hada_w2_b, self.hada_t2)

    def _halves(self) -> list[tuple[Tensor, Tensor]]:
        """Both products as left `[out, rank]` and right `[rank, in·kernel]`; a core is multiplied into the right."""
        halves: list[tuple[Tensor, Tensor]] = []
        for a, b, core in self._products:
            left, right = computing(a), computing(b)
            if core is not None:
                left, right = left.mT, torch.einsum("ij...,jn->in...", computing(core), right)
            halves.append((left.flatten(1), right.flatten(1)))
        return halves

    def factors(self, base_weight: Tensor | None = None) -> Factors | None:
        """As one product of rank², (a ∘ b)(c ∘ d) being a row-wise Kronecker product; None where that costs more."""
        if not is_cheaper(self.rank**2, self.shape):
            return None
        (left1, right1), (left2, right2) = self._halves()
        down = (right1[:, None] * right2[None]).flatten(0, 1)
        kernel = self.shape[1:] if base_weight is None else base_weight.shape[1:]
        up = (left1[:, :, None] * left2[:, None]).flatten(1)
        return Factors(down.view(-1, *kernel), up, self.scaling)

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """See `Delta.delta_weight`."""
        (left1, right1), (left2, right2) = self._halves()
        return view_like((left1 @ right1) * (left2 @ right2) * self.scaling, self.shape, base_weight)

    def map_rows(self, change: RowMap) -> Self:
        """See `Delta.map_rows`; beside a core the output rows are the columns of `w_a`."""
        if self.hada_t1 is None:
            return super().map_rows(change)
        return super().map_rows(lambda tensor: change(tensor.mT).mT if tensor.ndim == 2 else change(tensor))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> "LohaDelta":
        """See `Delta.join`: parts that share all but their rows, as those of a split do."""
        first = parts[0]
        shared = ("hada_w1_b", "hada_w2_b", "hada_t1", "hada_t2")
        for part in parts[1:]:
            if part.scaling != first.scaling or not all(same(getattr(part, n), getattr(first, n)) for n in shared):
                raise ConversionError("LoHa deltas of separate modules cannot be stacked into one fused module")
        axis = 0 if first.hada_t1 is None else 1
        return replace(
            first,
            hada_w1_a=torch.cat([part.hada_w1_a for part in parts], axis),
            hada_w2_a=torch.cat([part.hada_w2_a for part in parts], axis),
            bias=join_biases(parts),
        )


def _shapes(slots: Slots) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in slots.items())
