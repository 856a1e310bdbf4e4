"""What every algebra offers: ΔW, cheaper factors where they exist, and slicing along the output rows.

Pure tensors: nothing here knows of modules, files or names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import ConversionError

RowMap = Callable[[Tensor], Tensor]
Slots = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Factors:
    """A weight change as a low-rank product and two gains, which is all that a cheap forward needs.

    W' = (1 + out_gain) · W · (1 + in_gain) + up @ down, with gains broadcast over rows and columns.

    Shapes: down `[rank, in, *kernel]`, up `[out, rank]`, out_gain `[out]`, in_gain `[in]`.
    """

    down: Tensor
    up: Tensor
    scaling: float = 1.0
    out_gain: Tensor | None = None
    in_gain: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Delta(ABC):
    """The change of one module's weight (and bias), as immutable data.

    Attributes:
        bias: change of the module's bias `[out]`, added unscaled; None leaves the bias alone.
    """

    kind: ClassVar[str]
    row_fields: ClassVar[tuple[str, ...]] = ()
    """Tensor fields whose first dimension runs over the output rows."""

    bias: Tensor | None = None

    @classmethod
    @abstractmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """Build from tensors under their canonical slot names; `alpha` is None where the file has none.

        Raises:
            MalformedAdapterError: the tensors contradict one another.
        """

    @abstractmethod
    def slots(self) -> dict[str, Tensor]:
        """The tensors under their canonical slot names, without alpha."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...] | None:
        """Shape of the weight this changes, `[out, in]` or `[out, in, *kernel]`; None where only the bias changes."""

    @abstractmethod
    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """ΔW in float32 (float64 for float64 data), alpha / rank applied.

        Args:
            base_weight: the module's weight; only algebras with `needs_base` read it.
        """

    def factors(self, base_weight: Tensor | None = None) -> Factors | None:
        """The same change as `Factors`, or None where the algebra has no such form."""
        return None

    def delta_bias(self) -> Tensor | None:
        """Change of the bias `[out]`, or None."""
        return self.bias

    @property
    def alpha_value(self) -> float | None:
        """The stored numerator of the scaling; None where the file gave none or the algebra knows none."""
        return getattr(self, "alpha", None)

    @property
    def rank(self) -> int | None:
        """Inner dimension, None for algebras without one."""
        return None

    @property
    def needs_base(self) -> bool:
        """Whether ΔW depends on the weight it is added to."""
        return False

    @property
    def out_features(self) -> int:
        """Number of output rows."""
        if self.shape is not None:
            return self.shape[0]
        assert self.bias is not None
        return self.bias.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """All tensor fields by name."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same delta with `change` applied to each tensor (a move, a cast)."""
        return self.with_tensors({name: change(tensor) for name, tensor in self.tensors().items()})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same delta over other tensors, as `tensors()` names them."""
        return replace(self, **tensors)

    def map_rows(self, change: RowMap) -> Self:
        """Apply a selection or permutation of output rows; `change` acts on the first dimension of what it is given."""
        rows = {name: getattr(self, name) for name in (*self.row_fields, "bias")}
        return replace(self, **{name: change(tensor) for name, tensor in rows.items() if tensor is not None})

    def rows(self, start: int, stop: int) -> "Delta":
        """The part of the change that concerns the output rows `start` to `stop`."""
        return self.map_rows(lambda tensor: tensor[start:stop])

    def swap_halves(self) -> "Delta":
        """Exchange the two halves of the output rows, as (shift, scale) against (scale, shift) needs."""
        return self.map_rows(lambda tensor: torch.cat(tensor.chunk(2)[::-1]))

    def split(self, sizes: Sequence[int]) -> list["Delta"]:
        """Cut the output rows into consecutive parts, as a fused q/k/v projection needs.

        Args:
            sizes: rows of each part, in order; they sum to the output size.

        Raises:
            ConversionError: `sizes` does not sum to the output size.
        """
        check_sizes(self.out_features, sizes)
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        return [self.rows(start, start + size) for start, size in zip(starts, sizes, strict=True)]

    @classmethod
    def join(cls, parts: Sequence[Self]) -> "Delta":
        """Stack parts along the output rows: the inverse of `split`.

        Raises:
            ConversionError: this algebra cannot say the stacked change.
        """
        raise ConversionError(
            f"{cls.kind} deltas of separate modules cannot be stacked into one fused module",
            mend="Write a format with split names (peft, diffusers), or convert to lora or full first.",
        )


def check_sizes(rows: int, sizes: Sequence[int]) -> None:
    """Raise unless the parts add up to the whole."""
    if sum(sizes) != rows:
        raise ConversionError(f"parts of {list(sizes)} rows do not add up to the {rows} rows of the fused module")


def computing(tensor: Tensor) -> Tensor:
    """The tensor in the precision that ΔW is computed in: float64 stays, all else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def join_optional(tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """Concatenate row vectors of which some may be absent, which means zero."""
    given = [tensor for tensor in tensors if tensor is not None]
    if not given:
        return None
    return torch.cat([given[0].new_zeros(size) if t is None else t for t, size in zip(tensors, sizes, strict=True)])
