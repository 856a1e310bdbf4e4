"""What every algebra offers: ΔW, cheaper factors where they exist, and slicing along the output rows.

Pure tensors: nothing here knows of modules, files or names.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from typing_extensions import Self

from lora_loaders.errors import ConversionError

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

    @cached_property
    def size(self) -> tuple[int, int, tuple[int, ...]]:
        """Rank, rows, and columns with the kernel; asking a tensor each time is most of what a switch would cost."""
        rank, *columns = self.down.shape
        return rank, self.up.shape[0], tuple(columns)


@dataclass(frozen=True, eq=False)
class Kron:
    """A weight change as a Kronecker product, for a forward through two small products: w1 over blocks, w2 within.

    Shapes: first `[p, q]`, the scaling in it, second `[m, n, *kernel]`. The product `[p·m, q·n, *kernel]` begins
    `start` rows before the weight, and may end after it: parts of a fused module need not end where blocks do.
    """

    first: Tensor
    second: Tensor
    start: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Delta(ABC):
    """The change of one module's weight (and bias), as immutable data.

    Attributes:
        bias: change of the module's bias `[out]`, added unscaled; None leaves the bias alone.
        of_parameter: what is changed is known to be a module's own parameter, which PEFT spells in another way.
    """

    kind: ClassVar[str]
    row_fields: ClassVar[tuple[str, ...]] = ()
    """Tensor fields whose first dimension runs over the output rows."""

    bias: Tensor | None = None
    of_parameter: bool = False

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
        """Shape of the weight this changes, `[out, in]` or `[out, in, *kernel]`; None where only the bias changes.

        A size that the tensors do not tell is -1: a rotation or gain of the outputs fits any number of inputs, and then
        the kernel is left out. `fits` knows how to compare.
        """

    @abstractmethod
    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """ΔW in float32 (float64 for float64 data), alpha / rank applied.

        Args:
            base_weight: the module's weight; only algebras with `needs_base` read it.
        """

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of ΔW, for algebras that do not need the base."""
        return self.delta_weight()[start:stop]

    def factors(self, base_weight: Tensor | None = None) -> Factors | None:
        """The same change as `Factors`, or None where the algebra has no such form."""
        return None

    def kron(self, weight_shape: Sequence[int]) -> Kron | None:
        """The same change of a weight of that shape as `Kron`, or None where the algebra has no such form."""
        return None

    def delta_bias(self, base_bias: Tensor | None = None) -> Tensor | None:
        """Change of the bias `[out]`, or None; gains of the outputs may read the bias they act on."""
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
        """Number of output rows, -1 where the tensors do not tell."""
        rows = -1 if self.shape is None else self.shape[0]
        return self.bias.shape[0] if rows == -1 and self.bias is not None else rows

    def fits(self, weight_shape: Sequence[int]) -> bool:
        """Whether this can change a weight of that shape; trailing dimensions of 1 (a 1x1 kernel) do not matter."""
        if self.shape is None:
            return True
        if -1 not in self.shape:
            return strip_ones(self.shape) == strip_ones(weight_shape)
        # A vector is a column: it has one input.
        return all(size in (-1, wanted) for size, wanted in zip(self.shape, (*weight_shape, 1), strict=False))

    @property
    def is_embedding(self) -> bool:
        """Whether its factors are an embedding's, which PEFT keeps transposed."""
        return False

    def input_groups(self, weight_shape: Sequence[int]) -> int:
        """Groups of a convolution whose inputs this tells apart; 1 where all rows of that weight share theirs."""
        return 1

    def tensors(self) -> dict[str, Tensor]:
        """All tensor fields by name."""
        held = vars(self)
        return {name: held[name] for name in _tensor_fields(type(self)) if held[name] is not None}

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same delta with `change` applied to each tensor (a move, a cast)."""
        return self.with_tensors({name: change(tensor) for name, tensor in self.tensors().items()})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same delta over other tensors, as `tensors()` names them."""
        # As `dataclasses.replace`, which takes five times as long; a load does this thrice for each module.
        other = object.__new__(type(self))
        vars(other).update(vars(self), **tensors)
        return other

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
    def join(cls, parts: Sequence[Any]) -> "Delta":
        """Stack parts, all of this class, along the output rows: the inverse of `split`.

        Raises:
            ConversionError: this algebra cannot say the stacked change.
        """
        raise ConversionError(f"{cls.kind} deltas of separate modules cannot be stacked into one fused module")


@cache
def _tensor_fields(algebra: type[Delta]) -> tuple[str, ...]:
    """Fields of an algebra that hold a tensor or None; asking the values takes twice as long, and a load asks often."""
    return tuple(field.name for field in fields(algebra) if Tensor in (field.type, *get_args(field.type)))


def check_sizes(rows: int, sizes: Sequence[int]) -> None:
    """Raise unless the parts add up to the whole; a number of rows of -1 is not known and takes any parts."""
    if rows not in (-1, sum(sizes)):
        raise ConversionError(f"parts of {list(sizes)} rows do not add up to the {rows} rows of the fused module")


def scaling_of(alpha: float | None, rank: int, rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA (https://arxiv.org/abs/2312.03732); 1 where no alpha is given."""
    if not alpha:
        return 1.0
    return alpha / (math.sqrt(rank) if rslora else rank)


def computing(tensor: Tensor) -> Tensor:
    """The tensor in the precision that ΔW is computed in: float64 stays, all else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors hold the same data in the same shape and dtype; two absent ones do."""
    if one is None or other is None:
        return one is other
    return one is other or (one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other))


def strip_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape without trailing ones, which is how a 1x1 convolution equals a linear layer."""
    kept = tuple(shape)
    while kept and kept[-1] == 1:
        kept = kept[:-1]
    return kept


def view_like(delta_weight: Tensor, shape: Sequence[int], base_weight: Tensor | None) -> Tensor:
    """ΔW in the base weight's shape if it is given and has as many elements, else in `shape`.

    LyCORIS flattens kernels (`[rank, in·kh·kw]`), and then only the base knows them.
    """
    if base_weight is not None and base_weight.numel() == delta_weight.numel():
        return delta_weight.reshape(base_weight.shape)
    return delta_weight.reshape(*shape)


def is_cheaper(rank: int, shape: Sequence[int]) -> bool:
    """Whether a product of that rank costs less than the whole weight it makes up."""
    rows, columns = shape[0], math.prod(shape[1:])
    return rank * (rows + columns) < rows * columns


def whole_units(rows: Tensor, unit: int) -> Tensor | None:
    """Numbers of the blocks of `unit` rows that a selection of rows consists of, None if it cuts or mixes one."""
    if rows.numel() % unit:
        return None
    blocks = rows.view(-1, unit)
    starts = blocks[:, :1]
    whole = torch.equal(blocks, starts + torch.arange(unit)) and not (starts % unit).any()
    return starts.flatten() // unit if whole else None


def is_butterfly(stages: int, count: int, size: int) -> bool:
    """Whether stages can pair half blocks within 1, 2, 4, … of these blocks, as BOFT's do."""
    return stages > 0 and size % 2 == 0 and count % 2 ** (stages - 1) == 0


def join_all(parts: Sequence[Delta]) -> Delta:
    """Stack parts of any algebra along the output rows; see `Delta.join`.

    Raises:
        ConversionError: they are of several algebras, or theirs cannot say the stacked change.
    """
    kinds = {type(part) for part in parts}
    if len(kinds) > 1:
        mixed = ", ".join(sorted(kind.kind for kind in kinds))
        raise ConversionError(f"the parts of this fused module are of different algebras ({mixed})")
    return kinds.pop().join(parts)


def join_optional(tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """Concatenate row vectors of which some may be absent, which means zero."""
    given = [tensor for tensor in tensors if tensor is not None]
    if not given:
        return None
    return torch.cat([given[0].new_zeros(size) if t is None else t for t, size in zip(tensors, sizes, strict=True)])


def join_biases(parts: Sequence[Delta]) -> Tensor | None:
    """The parts' biases one after another; a part without one must tell its rows."""
    if all(part.bias is None for part in parts):
        return None
    sizes = [part.out_features for part in parts]
    if -1 in sizes:
        raise ConversionError(
            "some parts of a fused module change the bias, and others do not tell their number of rows"
        )
    return join_optional([part.bias for part in parts], sizes)
