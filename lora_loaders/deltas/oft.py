"""OFT and BOFT: the weight is rotated (https://arxiv.org/abs/2306.07280, https://arxiv.org/abs/2311.06243).

Rotations are Cayley transforms of skew-symmetric blocks Q. LyCORIS and kohya rotate the outputs, PEFT and OneTrainer
the inputs; two algebras, told apart by their slots.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lora_loaders.errors import ConversionError, MalformedAdapterError

from .base import Delta, RowMap, Slots, computing, is_butterfly, join_biases, same, whole_units
from .rows import InUnits


@dataclass(frozen=True, eq=False, kw_only=True)
class OftDelta(InUnits):
    """W' = rescale · Rᵀ W with R = (I + Q)(I − Q)⁻¹ in blocks of output rows and Q = blocks − blocksᵀ.

    BOFT multiplies by one R (not transposed) after another; stage i pairs rows that lie 2ⁱ · b / 2 apart, so all its
    stages mix 2ᵐ⁻¹ · b rows (LyCORIS `functional/boft.py`). ΔW of a part of a fused module needs that part's own
    weight only, if the cut is between such groups.

    Attributes:
        blocks: `[n, b, b]`, or `[m, n, b, b]` for BOFT with m stages; n · b = out.
        rescale: factors of the output rows `[out, 1, …]`, or None.
        alpha: not a numerator but the constraint: ‖Q‖ over all blocks is at most alpha · out; None and 0 leave it free.
        is_rotation: `blocks` holds R itself (`oft_diag` of LyCORIS before 2.0); alpha has no meaning then.
    """

    kind: ClassVar[str] = "oft"

    blocks: Tensor
    rescale: Tensor | None = None
    alpha: float | None = None
    is_rotation: bool = False

    @classmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """See `Delta.from_slots`."""
        is_rotation = "oft_diag" in slots
        blocks, rescale = slots["oft_diag" if is_rotation else "oft_blocks"], slots.get("rescale")
        if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
            raise MalformedAdapterError(f"OFT blocks of shape {list(blocks.shape)} are not square")
        if blocks.ndim == 4 and not is_butterfly(*blocks.shape[:3]):
            raise MalformedAdapterError(f"BOFT blocks of shape {list(blocks.shape)} cannot be paired in all stages")
        rows = blocks.shape[-3] * blocks.shape[-1]
        if rescale is not None and rescale.shape[:1] != (rows,):
            if rescale.numel() != rows:
                raise MalformedAdapterError(f"rescale has {rescale.numel()} elements, the OFT blocks {rows} rows")
            rescale = rescale.reshape(rows, 1)  # old LyCORIS: [n, b, 1]
        return cls(blocks=blocks, rescale=rescale, bias=slots.get("bias"), alpha=alpha, is_rotation=is_rotation)

    def slots(self) -> dict[str, Tensor]:
        """See `Delta.slots`."""
        names = {"blocks": "oft_diag" if self.is_rotation else "oft_blocks"}
        return {names.get(name, name): tensor for name, tensor in self.tensors().items()}

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Delta.shape`; the inputs are not known."""
        return (self.blocks.shape[-3] * self.blocks.shape[-1], -1)

    @property
    def needs_base(self) -> bool:
        """See `Delta.needs_base`."""
        return True

    @property
    def unit(self) -> int:
        """Consecutive rows that are mixed with one another and with no others."""
        size = self.blocks.shape[-1]
        return size if self.blocks.ndim == 3 else size << (self.blocks.shape[0] - 1)

    def _bound(self) -> Tensor | float:
        """Factor at most 1 that keeps ‖Q‖ within the constraint."""
        if not self.alpha or self.is_rotation:
            return 1.0
        blocks = computing(self.blocks)
        return (self.alpha * self.out_features / ((blocks - blocks.mT).norm() + 1e-8)).clamp(max=1)

    def _turns(self) -> Tensor:
        """R − I = 2 Q (I − Q)⁻¹: a small rotation's difference would lose its digits in R itself."""
        blocks = computing(self.blocks)
        identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
        if self.is_rotation:
            return blocks - identity
        skew = (blocks - blocks.mT) * self._bound()
        return torch.linalg.solve(identity - skew, 2 * skew)  # the two commute

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """See `Delta.delta_weight`."""
        if base_weight is None:
            raise ConversionError("a rotation's ΔW depends on the weight it turns: pass base_weight")
        base = computing(base_weight)
        turns = self._turns()
        weight = base.to(turns.dtype).reshape(base.shape[0], -1)
        count, size = turns.shape[-3:-1]
        if turns.ndim == 3:
            change = (turns.mT @ weight.view(count, size, -1)).flatten(0, 1)
        else:
            change = torch.zeros_like(weight)
            for stage, turn in enumerate(turns):
                stride = (size // 2) << stage
                paired = (weight + change).unflatten(0, (-1, 2, stride)).transpose(1, 2).reshape(count, size, -1)
                turned = (turn @ paired).view(-1, stride, 2, weight.shape[1]).transpose(1, 2)
                change = change + turned.flatten(0, 2)
        if self.rescale is not None:
            rescale = computing(self.rescale).view(-1, 1)
            change = rescale * change + (rescale - 1) * weight
        return change.view(base.shape)

    def map_rows(self, change: RowMap) -> Self:
        """See `Delta.map_rows`.

        Raises:
            ConversionError: the selection cuts through rows that are rotated together.
        """
        groups = whole_units(change(torch.arange(self.out_features)), self.unit)
        if groups is None:
            raise ConversionError(
                f"rows of an OFT delta can be chosen only in groups of {self.unit}, which are rotated together",
                mend="Load it onto a model with the fused module.",
            )
        per_group = self.unit // self.blocks.shape[-1]
        chosen = (groups[:, None] * per_group + torch.arange(per_group)).flatten().to(self.blocks.device)
        # The constraint is on all blocks together, so a part takes its share along in its blocks.
        whole = self if chosen.numel() == self.blocks.shape[-3] else self._unconstrained()
        return replace(
            whole,
            blocks=whole.blocks.index_select(-3, chosen),
            rescale=None if self.rescale is None else change(self.rescale),
            bias=None if self.bias is None else change(self.bias),
        )

    def _unconstrained(self) -> Self:
        """The same rotations from blocks that need no constraint."""
        if not self.alpha or self.is_rotation:
            return self
        return replace(self, blocks=computing(self.blocks) * self._bound(), alpha=0.0)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> "OftDelta":
        """See `Delta.join`: rotations with blocks of one size and, for BOFT, as many stages."""
        kinds = {(part.blocks.shape[:-3], part.blocks.shape[-1], part.is_rotation) for part in parts}
        if len(kinds) > 1:
            raise ConversionError("OFT deltas with blocks of different sizes cannot be stacked into one fused module")
        sizes = [part.out_features for part in parts]
        given = next((part.rescale for part in parts if part.rescale is not None), None)
        rescale = None
        if given is not None:
            ones = [given.new_ones(size, *given.shape[1:]) for size in sizes]
            rescale = torch.cat([one if p.rescale is None else p.rescale for p, one in zip(parts, ones, strict=True)])
        free = [part._unconstrained() for part in parts]
        blocks = torch.cat([part.blocks for part in free], -3)
        bias = join_biases(parts)
        return replace(free[0], blocks=blocks, rescale=rescale, bias=bias)


@dataclass(frozen=True, eq=False, kw_only=True)
class InputOftDelta(Delta):
    """W' = W Rᵀ in blocks of inputs, as if the inputs were turned first (PEFT `oft_R`, OneTrainer's OFTv2).

    R = I + 2Q + 2Q² + 2Q³ + Q⁴, a truncated (I + Q)(I − Q)⁻¹. A convolution's inputs are its unfolded patches
    `[in·kh·kw]`; there OneTrainer multiplies by R, PEFT by Rᵀ. A grouped convolution's weight holds the inputs of one
    group: rotations of that many are the same for all groups, those of all inputs (PEFT's) are each group's own.

    Attributes:
        oft_R: upper triangles of Q, row by row, `[n, b(b−1)/2]` with n · b inputs, or `[1, b(b−1)/2]` shared by all.
        scaled_oft: Q is divided by 2·√(b−1) first (OneTrainer, the flag `oft_R.scaled_oft`).
        neumann_terms: terms of the truncated series (PEFT `num_cayley_neumann_terms`, and both trainers'
            default); None is PEFT's `use_cayley_neumann=False`, which is (I − Q)(I + Q)⁻¹, the inverse of the above.
        limit: ‖Q‖ of each block is at most this / sqrt(number of blocks) (PEFT's `coft` and `eps`), or None.
        turns_patches: a convolution follows PEFT's convention.
        embedding: PEFT's `oft_embedding_R`, which turns what an embedding gives: W' = W R.
        alpha: without meaning, kept for writing back.
    """

    kind: ClassVar[str] = "input-oft"

    oft_R: Tensor
    scaled_oft: bool = False
    neumann_terms: int | None = 5
    limit: float | None = None
    turns_patches: bool = False
    embedding: bool = False
    alpha: float | None = None

    @classmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """See `Delta.from_slots`."""
        name = next(name for name in ("oft_R", "oft_embedding_R") if name in slots)
        triangles, scaled, embedding = slots[name], "scaled_oft" in slots, name == "oft_embedding_R"
        delta = cls(oft_R=triangles, scaled_oft=scaled, embedding=embedding, bias=slots.get("bias"), alpha=alpha)
        if triangles.ndim != 2 or delta.block_size * (delta.block_size - 1) // 2 != triangles.shape[1]:
            raise MalformedAdapterError(f"{name} of shape {list(triangles.shape)} holds no upper triangles")
        return delta

    def slots(self) -> dict[str, Tensor]:
        """See `Delta.slots`."""
        names = {"oft_R": "oft_embedding_R"} if self.embedding else {}
        slots = {names.get(name, name): tensor for name, tensor in self.tensors().items()}
        return {**slots, "scaled_oft": torch.tensor(True)} if self.scaled_oft else slots

    @property
    def block_size(self) -> int:
        """Inputs that are turned together."""
        return (1 + math.isqrt(1 + 8 * self.oft_R.shape[1])) // 2

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Delta.shape`; the outputs are not known, nor the inputs if one block is shared."""
        return (-1, -1) if self.oft_R.shape[0] == 1 else (-1, self.oft_R.shape[0] * self.block_size)

    def fits(self, weight_shape: Sequence[int]) -> bool:
        """See `Delta.fits`."""
        blocks, rest = divmod(math.prod(weight_shape[1:]), self.block_size)
        groups = self.input_groups(weight_shape)
        return not rest and self.oft_R.shape[0] in (1, blocks * groups) and weight_shape[0] % groups == 0

    def input_groups(self, weight_shape: Sequence[int]) -> int:
        """See `Delta.input_groups`."""
        columns = math.prod(weight_shape[1:])
        return max(1, self.oft_R.shape[0] * self.block_size // columns) if len(weight_shape) > 2 else 1

    @property
    def needs_base(self) -> bool:
        """See `Delta.needs_base`."""
        return True

    @property
    def settings(self) -> tuple[bool, int | None, float | None, bool, bool]:
        """What is not in the tensors."""
        return self.scaled_oft, self.neumann_terms, self.limit, self.turns_patches, self.embedding

    def _turns(self) -> Tensor:
        """R − I `[n, b, b]`."""
        size, triangles = self.block_size, computing(self.oft_R)
        rows, columns = torch.triu_indices(size, size, 1, device=triangles.device)
        skew = triangles.new_zeros(triangles.shape[0], size, size)
        skew[:, rows, columns] = triangles / (2 * math.sqrt(size - 1)) if self.scaled_oft else triangles
        skew = skew - skew.mT
        if self.limit is not None:
            # In float32, as PEFT has it: its files hold triangles that were cut to just this.
            bound = float(self.limit / torch.sqrt(torch.tensor(len(skew))))
            skew = skew * (bound / skew.norm(dim=(1, 2), keepdim=True)).clamp(max=1)
        if self.neumann_terms is None:
            identity = torch.eye(size, dtype=skew.dtype, device=skew.device)
            return torch.linalg.solve(identity + skew, -2 * skew)
        if self.neumann_terms < 3:
            return 2 * (self.neumann_terms - 1) * skew
        total, power = 2 * skew, skew
        degree = max(3, self.neumann_terms - 1)
        for exponent in range(2, degree + 1):
            power = power @ skew
            total = total + (power if exponent == degree else 2 * power)
        return total

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """See `Delta.delta_weight`."""
        if base_weight is None:
            raise ConversionError("a rotation's ΔW depends on the weight it turns: pass base_weight")
        base, turns = computing(base_weight), self._turns()
        if (base.ndim == 2 and not self.embedding) or (base.ndim > 2 and self.turns_patches):
            turns = turns.mT
        groups, size = self.input_groups(base.shape), self.block_size
        blocks = base.to(turns.dtype).reshape(groups, base.shape[0] // groups, -1, size)
        turns = turns.expand(groups * blocks.shape[2], -1, -1).view(groups, -1, size, size)
        return torch.einsum("gonk,gnkc->gonc", blocks, turns).reshape(base.shape)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> "InputOftDelta":
        """See `Delta.join`: parts with the same rotation, as those of a split are."""
        first = parts[0]
        for part in parts[1:]:
            if part.settings != first.settings or not same(part.oft_R, first.oft_R):
                raise ConversionError("rotations of the inputs of separate modules cannot become one fused module's")
        return replace(first, bias=join_biases(parts))
