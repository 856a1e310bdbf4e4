"""LoKr: ΔW is a Kronecker product (KronA, https://arxiv.org/abs/2212.10650; LyCORIS, https://arxiv.org/abs/2309.14859)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lora_loaders.errors import ConversionError, MalformedAdapterError

from .base import (
    Factors,
    Kron,
    RowMap,
    Slots,
    computing,
    is_cheaper,
    join_biases,
    same,
    view_like,
    whole_units,
)
from .rows import InUnits


@dataclass(frozen=True, eq=False, kw_only=True)
class LokrDelta(InUnits):
    """ΔW = scaling · kron(w1, w2), either factor stored whole or as the product of its `_a` and `_b`.

    Shapes, for out = p·m and in = q·n: w1 `[p, q]`, w2 `[m, n, *kernel]`. A convolution's w2_b without a core is
    `[rank, n·kh·kw]` (LyCORIS flattens it); `shape` is then `[out, in·kh·kw]`, and `delta_weight` takes the base
    weight's shape if that is given.

    Attributes:
        lokr_w1, or lokr_w1_a and lokr_w1_b: `[p, q]`, or `[p, rank]` and `[rank, q]`.
        lokr_w2, or lokr_w2_a and lokr_w2_b: `[m, n, *kernel]`, or `[m, rank]` and `[rank, n, *kernel]`.
        lokr_t2: Tucker core `[rank, rank, *kernel]`; w2_a is then `[rank, m]` and w2_b `[rank, n]`.
        alpha: numerator of the scaling alpha / rank; None and 0 mean 1.
        whole_scaling: scaling of two whole factors, which have no rank: 1 in LyCORIS's files, alpha / r in PEFT's.
        peft_conv1d: ΔW is PEFT's for a Conv1d with a whole w2. Its `make_kron` lines up w1's axes with the last two of
            w2 `[m, n, k]`, and the `[m, p·n, q·k]` that this gives is read as `[p·m, q·n, k]`.
    """

    kind: ClassVar[str] = "lokr"

    lokr_w1: Tensor | None = None
    lokr_w1_a: Tensor | None = None
    lokr_w1_b: Tensor | None = None
    lokr_w2: Tensor | None = None
    lokr_w2_a: Tensor | None = None
    lokr_w2_b: Tensor | None = None
    lokr_t2: Tensor | None = None
    alpha: float | None = None
    whole_scaling: float = 1.0
    peft_conv1d: bool = False

    @classmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """See `Delta.from_slots`."""
        core = slots.get("lokr_t2")
        joints = [(slots["lokr_w1_a"].shape[1], slots["lokr_w1_b"].shape[0])] if "lokr_w1_a" in slots else []
        if "lokr_w2_a" in slots:
            a, b = slots["lokr_w2_a"], slots["lokr_w2_b"]
            joints += (
                [(a.shape[1], b.shape[0])]
                if core is None
                else [(a.shape[0], core.shape[0]), (b.shape[0], core.shape[1])]
            )
        if any(left != right for left, right in joints):
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in slots.items())
            raise MalformedAdapterError(f"the factors do not multiply: {shapes}")
        fields: dict[str, Any] = {**slots, "alpha": alpha}
        return cls(**fields)

    def slots(self) -> dict[str, Tensor]:
        """See `Delta.slots`."""
        return self.tensors()

    @property
    def rank(self) -> int | None:
        """Inner dimension of w2, else of w1; None where both are whole."""
        factor = self.lokr_w1_b if self.lokr_w2_b is None else self.lokr_w2_b
        return None if factor is None else factor.shape[0]

    @property
    def scaling(self) -> float:
        """alpha / rank; 1 where no alpha is given."""
        if self.rank is None:
            return self.whole_scaling
        return self.alpha / self.rank if self.alpha else 1.0

    @property
    def _row_factor(self) -> Tensor:
        """The tensor whose rows are those of w1."""
        factor = self.lokr_w1_a if self.lokr_w1 is None else self.lokr_w1
        assert factor is not None
        return factor

    @property
    def unit(self) -> int:
        """See `InUnits.unit`: the output rows that share one row of w1."""
        return self.out_features if self.peft_conv1d else self._second_rows

    @property
    def _second_rows(self) -> int:
        """Rows of w2."""
        if self.lokr_w2 is not None:
            return self.lokr_w2.shape[0]
        assert self.lokr_w2_a is not None
        return self.lokr_w2_a.shape[0 if self.lokr_t2 is None else 1]

    @property
    def sides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of w1, and of w2 (with the kernel, where the file flattens it)."""
        rows, columns = self.shape[:2]
        factor = self.lokr_w1_b if self.lokr_w1 is None else self.lokr_w1
        assert factor is not None
        first = (self._row_factor.shape[0], factor.shape[1])
        return first, (rows // first[0], columns // first[1])

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Delta.shape`; two-dimensional where the file flattens a kernel."""
        columns = self.lokr_w1_b if self.lokr_w1 is None else self.lokr_w1
        second = self.lokr_w2_b if self.lokr_w2 is None else self.lokr_w2
        assert columns is not None
        assert second is not None
        kernel = second.shape[2:] if self.lokr_t2 is None else self.lokr_t2.shape[2:]
        return (self._row_factor.shape[0] * self._second_rows, columns.shape[1] * second.shape[1], *kernel)

    def fits(self, weight_shape: Sequence[int]) -> bool:
        """See `Delta.fits`; a flattened kernel fits any kernel of that size."""
        out, *rest = self.shape
        flattened = len(rest) == 1 and out == weight_shape[0] and rest[0] == math.prod(weight_shape[1:])
        return flattened or super().fits(weight_shape)

    def _first(self) -> tuple[Tensor, Tensor]:
        """w1 as a product of the least rank; a whole factor is one side, an identity the other."""
        if self.lokr_w1 is not None:
            return _with_identity(computing(self.lokr_w1).flatten(1))
        assert self.lokr_w1_a is not None
        assert self.lokr_w1_b is not None
        return computing(self.lokr_w1_a).flatten(1), computing(self.lokr_w1_b).flatten(1)

    def _second(self) -> tuple[Tensor, Tensor]:
        """w2 `[m, n·kernel]` as a product of the least rank; a core is multiplied into the right side."""
        if self.lokr_w2 is not None:
            return _with_identity(computing(self.lokr_w2).flatten(1))
        assert self.lokr_w2_a is not None
        assert self.lokr_w2_b is not None
        left, right = computing(self.lokr_w2_a), computing(self.lokr_w2_b)
        if self.lokr_t2 is not None:
            left, right = left.mT, torch.einsum("ij...,jn->in...", computing(self.lokr_t2), right)
        return left.flatten(1), right.flatten(1)

    def factors(self, base_weight: Tensor | None = None) -> Factors | None:
        """kron(a b, c d) = kron(a, c) @ kron(b, d), or None where that costs more than the whole weight."""
        if self.peft_conv1d:
            return None
        (left1, right1), (left2, right2) = self._first(), self._second()
        if not is_cheaper(right1.shape[0] * right2.shape[0], self.shape):
            return None
        kernel = self.shape[1:] if base_weight is None else base_weight.shape[1:]
        return Factors(_kron(right1, right2).reshape(-1, *kernel), _kron(left1, left2), self.scaling)

    def kron(self, weight_shape: Sequence[int]) -> Kron | None:
        """See `Delta.kron`."""
        if self.peft_conv1d:
            return None
        first = _product(self.lokr_w1, self._first)
        second = _product(self.lokr_w2, self._second)
        columns = weight_shape[1] // first.shape[1]
        return Kron(first * self.scaling, second.reshape(-1, columns, *weight_shape[2:]))

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """See `Delta.delta_weight`."""
        first = _product(self.lokr_w1, self._first)
        if self.peft_conv1d:
            assert self.lokr_w2 is not None
            whole = torch.kron(first[None], computing(self.lokr_w2).contiguous())
            return view_like(whole * self.scaling, self.shape, base_weight)
        second = _product(self.lokr_w2, self._second)
        return view_like(_kron(first, second) * self.scaling, self.shape, base_weight)

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """See `Delta.weight_rows`; only the blocks that these rows touch are computed."""
        if self.peft_conv1d:
            return super().weight_rows(start, stop)
        first, last = start // self.unit, -(-stop // self.unit)
        touched = self._take(torch.arange(first, last)).delta_weight()
        return touched[start - first * self.unit :][: stop - start]

    def _take(self, blocks: Tensor) -> Self:
        """The delta of the given rows of w1, without its bias."""
        name = "lokr_w1_a" if self.lokr_w1 is None else "lokr_w1"
        factor = self._row_factor
        return replace(self, **{name: factor[blocks.to(factor.device)]}, bias=None)

    def map_rows(self, change: RowMap) -> Self:
        """See `Delta.map_rows`.

        Raises:
            ConversionError: the selection cuts through rows that share a row of w1; `rows`, `split` and `swap_halves`
                give a `RowsDelta` there.
        """
        blocks = whole_units(change(torch.arange(self.out_features)), self.unit)
        if blocks is None:
            raise ConversionError(f"rows of a LoKr delta can be chosen only in blocks of {self.unit}, the rows of w2")
        return replace(self._take(blocks), bias=None if self.bias is None else change(self.bias))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> "LokrDelta":
        """See `Delta.join`: parts that share all but the rows of w1, as those of a split on blocks do."""
        first = parts[0]
        name = "lokr_w1_a" if first.lokr_w1 is None else "lokr_w1"
        shared = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"} - {name}
        for part in parts[1:]:
            if part.scaling != first.scaling or not all(same(getattr(part, n), getattr(first, n)) for n in shared):
                raise ConversionError("LoKr deltas of separate modules cannot be stacked into one fused module")
        bias = join_biases(parts)
        return replace(first, **{name: torch.cat([part._row_factor for part in parts])}, bias=bias)


def _with_identity(factor: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = factor.shape
    identity = torch.eye(min(rows, columns), dtype=factor.dtype, device=factor.device)
    return (identity, factor) if rows <= columns else (factor, identity)


def _product(whole: Tensor | None, halves: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
    if whole is not None:
        return computing(whole).flatten(1)
    left, right = halves()
    return left @ right


def _kron(first: Tensor, second: Tensor) -> Tensor:
    """Kronecker product of matrices; torch.kron (2.13) refuses some transposed ones."""
    rows, columns = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
    return (first[:, None, :, None] * second[None, :, None, :]).reshape(rows, columns)
