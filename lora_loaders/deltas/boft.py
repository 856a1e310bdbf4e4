"""BOFT as PEFT writes it: butterfly rotations of the inputs, factors of the outputs (https://arxiv.org/abs/2311.06243)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lora_loaders.errors import ConversionError, MalformedAdapterError

from .base import Delta, RowMap, Slots, computing, is_butterfly, join_biases, same


@dataclass(frozen=True, eq=False, kw_only=True)
class InputBoftDelta(Delta):
    """W' = boft_s · W M₀ᵀ M₁ᵀ …, with Mᵢ = Pᵢ D Pᵢᵀ and D = (I − Q)(I + Q)⁻¹ in blocks, Q = (R − Rᵀ) / 2.

    Pᵢ gathers half blocks: within each group of 2ⁱ blocks the even halves come first, then the odd ones. A
    convolution's inputs are its unfolded patches `[in·kh·kw]` (PEFT `tuners/boft/layer.py`).

    Attributes:
        boft_R: `[stages, n, b, b]` with n · b inputs.
        boft_s: factors of the outputs, `[out, 1]` or `[1, out]` for a convolution.
    """

    kind: ClassVar[str] = "input-boft"

    boft_R: Tensor
    boft_s: Tensor

    @classmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """See `Delta.from_slots`; alpha has no meaning."""
        blocks = slots["boft_R"]
        if blocks.ndim != 4 or blocks.shape[2] != blocks.shape[3]:
            raise MalformedAdapterError(f"boft_R of shape {list(blocks.shape)} holds no stages of square blocks")
        if len(blocks) != 1 and not is_butterfly(*blocks.shape[:3]):
            raise MalformedAdapterError(f"boft_R of shape {list(blocks.shape)} cannot be paired in all stages")
        return cls(boft_R=blocks, boft_s=slots["boft_s"], bias=slots.get("bias"))

    def slots(self) -> dict[str, Tensor]:
        """See `Delta.slots`."""
        return self.tensors()

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Delta.shape`."""
        return (self.boft_s.numel(), self.boft_R.shape[1] * self.boft_R.shape[2])

    def fits(self, weight_shape: Sequence[int]) -> bool:
        """See `Delta.fits`; a kernel is flattened."""
        return self.shape == (weight_shape[0], math.prod(weight_shape[1:]))

    @property
    def needs_base(self) -> bool:
        """See `Delta.needs_base`."""
        return True

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """See `Delta.delta_weight`."""
        if base_weight is None:
            raise ConversionError("a rotation's ΔW depends on the weight it turns: pass base_weight")
        base, blocks = computing(base_weight), computing(self.boft_R)
        skew = (blocks - blocks.mT) / 2
        identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        # D − I, because a small rotation's difference would lose its digits in D itself.
        turns = torch.linalg.solve(identity + skew, -2 * skew)
        count, size = turns.shape[1:3]
        weight = base.to(turns.dtype).flatten(1)
        change = torch.zeros_like(weight)
        for stage, turn in enumerate(turns):
            order = _evens_first(count * size, size << stage, size // 2 if len(turns) > 1 else size)
            gathered = (weight + change)[:, order.argsort()].view(len(weight), count, size)
            change = change + torch.einsum("onk,nck->onc", gathered, turn).flatten(1)[:, order]
        scale = computing(self.boft_s).view(-1, 1)
        return (scale * change + (scale - 1) * weight).view(base.shape)

    def map_rows(self, change: RowMap) -> Self:
        """See `Delta.map_rows`; the rotations are the same for all rows."""
        part = super().map_rows(change)
        rows = change(self.boft_s.view(-1, 1))
        return replace(part, boft_s=rows if self.boft_s.shape[-1] == 1 else rows.view(1, -1))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> "InputBoftDelta":
        """See `Delta.join`: parts with the same rotation, as those of a split are."""
        first = parts[0]
        if not all(same(part.boft_R, first.boft_R) for part in parts[1:]):
            raise ConversionError("rotations of the inputs of separate modules cannot become one fused module's")
        axis = 0 if first.boft_s.shape[-1] == 1 else 1
        return replace(first, boft_s=torch.cat([part.boft_s for part in parts], axis), bias=join_biases(parts))


def _evens_first(inputs: int, group: int, half: int) -> Tensor:
    """Within each group of inputs, its halves of even number and then those of odd number."""
    halves = torch.arange(inputs).view(-1, group // half, half)
    return torch.cat([halves[:, 0::2], halves[:, 1::2]], 1).flatten()
