"""LoRA and LoCon: ΔW = scaling · up @ down (https://arxiv.org/abs/2106.09685), with an optional Tucker core."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lora_loaders.errors import ConversionError, MalformedAdapterError

from .base import Delta, Factors, Slots, check_sizes, computing, join_optional, same, scaling_of


@dataclass(frozen=True, eq=False, kw_only=True)
class LoraDelta(Delta):
    """ΔW = scaling · up @ down.

    Attributes:
        down: `[rank, in]`, or `[rank, in, *kernel]` for a convolution (`[rank, in, 1, …]` beside a Tucker core).
        up: `[out, rank]`, kept in the file's shape (`[out, rank, 1, 1]` for a convolution).
        mid: Tucker core `[rank, rank, *kernel]`, or None (LoCon, LyCORIS).
        up_bias: bias of the up factor `[out]`, scaled like the product (PEFT's `lora_bias`, BFL control files).
        alpha: numerator of the scaling alpha / rank; None and 0 mean a scaling of 1.
        embedding: the file spells it as an embedding's factors (PEFT's `lora_embedding_A`, `…_B`); kept to write back.
        rslora: the scaling is alpha / sqrt(rank) (https://arxiv.org/abs/2312.03732).
    """

    kind: ClassVar[str] = "lora"
    row_fields: ClassVar[tuple[str, ...]] = ("up", "up_bias")

    down: Tensor
    up: Tensor
    mid: Tensor | None = None
    up_bias: Tensor | None = None
    alpha: float | None = None
    rslora: bool = False
    embedding: bool = False

    @classmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """See `Delta.from_slots`; an embedding's `[tokens, features]` weight is its factors' product transposed."""
        if "embedding_down" in slots:
            down, up = slots["embedding_up"].t(), slots["embedding_down"].t()
            rest = {name: slots[name] for name in slots if not name.startswith("embedding_")}
            return replace(cls.from_slots({**rest, "down": down, "up": up}, alpha), embedding=True)
        down, up, mid = slots["down"], slots["up"], slots.get("mid")
        # Along the chain down, mid, up each factor's rows meet the next one's columns.
        chain = [factor for factor in (down, mid, up) if factor is not None]
        flat = any(not 2 <= factor.ndim <= 5 for factor in chain)  # a Conv3d's weight has five axes
        if flat or any(first.shape[0] != second.shape[1] for first, second in pairwise(chain)):
            raise MalformedAdapterError(
                f"the factors do not multiply: down is {list(down.shape)}, up is {list(up.shape)}"
                + ("" if mid is None else f", mid is {list(mid.shape)}")
                + _of_groups(down, up)
            )
        return cls(down=down, up=up, mid=mid, up_bias=slots.get("up_bias"), bias=slots.get("bias"), alpha=alpha)

    def slots(self) -> dict[str, Tensor]:
        """See `Delta.slots`."""
        if self.embedding:
            rest = {name: tensor for name, tensor in self.tensors().items() if name not in ("up", "down")}
            return {"embedding_down": self.up.t(), "embedding_up": self.down.t(), **rest}
        return self.tensors()

    @property
    def is_embedding(self) -> bool:
        """See `Delta.is_embedding`."""
        return self.embedding

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return self.down.shape[0]

    @property
    def scaling(self) -> float:
        """See `scaling_of`."""
        return scaling_of(self.alpha, self.rank, self.rslora)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Delta.shape`."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def fits(self, weight_shape: Sequence[int]) -> bool:
        """See `Delta.fits`; a flattened kernel (a LoHa or LoKr made into this) fits any kernel of that size."""
        out, *rest = self.shape
        flattened = len(rest) == 1 and out == weight_shape[0] and rest[0] == math.prod(weight_shape[1:])
        return flattened or super().fits(weight_shape)

    def factors(self, base_weight: Tensor | None = None) -> Factors:
        """See `Delta.factors`; a Tucker core is multiplied into `down`."""
        down = self.down
        if self.mid is not None:
            down = torch.einsum("ab...,bi->ai...", computing(self.mid), computing(down.flatten(1)))
        return Factors(down, self.up.flatten(1), self.scaling)

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """See `Delta.delta_weight`."""
        factors = self.factors()
        down, up = computing(factors.down), computing(factors.up)
        return (up @ down.flatten(1) * self.scaling).view(self.shape)

    def delta_bias(self, base_bias: Tensor | None = None) -> Tensor | None:
        """`scaling · up_bias + bias`."""
        if self.up_bias is None:
            return self.bias
        scaled = computing(self.up_bias) * self.scaling
        return scaled if self.bias is None else scaled + self.bias

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        """See `Delta.split`.

        Rows of ΔW are rows of `up`, so `down` is shared by all parts. A block-diagonal `up` (parts trained apart
        and fused for saving) gives each part its own block of the rank instead; rank and alpha shrink together.
        """
        check_sizes(self.out_features, sizes)
        parts = self.up.split(list(sizes))
        blocks = _diagonal_blocks(parts, self.rank) if self.mid is None else None
        if blocks is None:
            return super().split(sizes)
        row_biases = [self._row_vectors(start, start + size) for start, size in _spans(sizes)]
        return [
            replace(
                self,
                down=self.down[columns],
                up=part[:, columns],
                alpha=self._alpha_at_rank(columns.stop - columns.start),
                **biases,
            )
            for part, columns, biases in zip(parts, blocks, row_biases, strict=True)
        ]

    def _row_vectors(self, start: int, stop: int) -> dict[str, Tensor]:
        vectors = {"up_bias": self.up_bias, "bias": self.bias}
        return {name: vector[start:stop] for name, vector in vectors.items() if vector is not None}

    def _alpha_at_rank(self, rank: int) -> float | None:
        """The alpha that keeps the scaling at another rank."""
        if not self.alpha:
            return self.alpha
        return self.alpha * (math.sqrt(rank / self.rank) if self.rslora else rank / self.rank)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> "LoraDelta":
        """See `Delta.join`: equal `down` factors and cores are kept once, other ones make `up` block-diagonal."""
        first = parts[0]
        sizes = [part.out_features for part in parts]
        is_shared = all(same(part.down, first.down) and same(part.mid, first.mid) for part in parts[1:])
        if not is_shared and any(part.mid is not None for part in parts):
            raise ConversionError("LoCon deltas with different Tucker cores cannot be stacked into one fused module")
        ratios = [part.scaling / first.scaling for part in parts]
        ups = [_times(part.up, ratio) for part, ratio in zip(parts, ratios, strict=True)]
        up_biases = [
            part.up_bias if part.up_bias is None else _times(part.up_bias, r)
            for part, r in zip(parts, ratios, strict=True)
        ]
        biases = {
            "up_bias": join_optional(up_biases, sizes),
            "bias": join_optional([part.bias for part in parts], sizes),
        }
        if is_shared:
            return replace(first, up=torch.cat(ups), **biases)
        rank = sum(part.rank for part in parts)
        down, up = torch.cat([part.down for part in parts]), _block_diagonal(ups, rank)
        return replace(first, down=down, up=up, alpha=first._alpha_at_rank(rank), **biases)


def _of_groups(down: Tensor, up: Tensor) -> str:
    """What is to be said of PEFT's factors for a grouped convolution, whose outputs meet a share of the rank each."""
    if down.ndim < 3 or down.ndim != up.ndim:
        return ""
    groups, rest = divmod(down.shape[0], max(1, up.shape[1]))
    if rest or groups < 2:
        return ""
    return (
        f"; PEFT's of a convolution with {groups} groups are so, and down joins inputs that the groups of this "
        "convolution keep apart: its weight has no place for such a change"
    )


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return [(sum(sizes[:index]), size) for index, size in enumerate(sizes)]


def _block_diagonal(blocks: Sequence[Tensor], rank: int) -> Tensor:
    """The blocks below one another, each in columns of its own."""
    rows: list[Tensor] = []
    column = 0
    for block in blocks:
        size, width, *kernel = block.shape
        before, after = (block.new_zeros(size, zeros, *kernel) for zeros in (column, rank - column - width))
        rows.append(torch.cat([before, block, after], 1))
        column += width
    return torch.cat(rows)


def _diagonal_blocks(parts: Sequence[Tensor], rank: int) -> list[slice] | None:
    """Columns of `up` that each part alone uses, if they are equal consecutive blocks of the rank."""
    count = len(parts)
    if count < 2 or rank % count or parts[0].is_meta:
        return None
    step = rank // count
    blocks = [slice(index * step, (index + 1) * step) for index in range(count)]
    for part, block in zip(parts, blocks, strict=True):
        # One row tells almost every dense factor apart, and spares reading the rest.
        for rows in (part[:1], part):
            if rows[:, : block.start].any() or rows[:, block.stop :].any():
                return None
    # Of an untrained adapter the rank must survive.
    return blocks if any(part.any() for part in parts) else None


def _times(factor: Tensor, ratio: float) -> Tensor:
    """A factor under another scaling; refuses to round."""
    if ratio == 1:
        return factor
    wanted = factor.double() * ratio
    rounded = wanted.to(factor.dtype)
    if not torch.equal(rounded.double(), wanted):
        raise ConversionError(
            f"parts whose scalings differ by a factor of {ratio:g} cannot share one alpha in {factor.dtype} without "
            "rounding",
            mend="Write with dtype=torch.float32, or a format with split names.",
        )
    return rounded
