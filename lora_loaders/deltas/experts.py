"""PEFT's LoRA of the stacked weights of experts (`target_parameters`, `ParamWrapper`): one product for each expert."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self

from lora_loaders.errors import ConversionError, MalformedAdapterError

from .base import Delta, RowMap, Slots, computing, scaling_of
from .lora import LoraDelta


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertsDelta(Delta):
    """ΔW[e] = scaling · up[e] @ down[e] for a weight `[experts, out, in]`.

    Attributes:
        down: `[experts · rank, in]`, the experts one after another.
        up: `[out, rank · experts]`, in each column of the rank all experts.
        experts: their number, which only the rank in PEFT's configuration tells.
        alpha: numerator of the scaling alpha / rank; None and 0 mean 1.
        rslora: the scaling is alpha / sqrt(rank).
        transposed: the weight is `[experts, in, out]`, as modules of transformers with `is_transposed` hold it.
    """

    kind: ClassVar[str] = "experts"

    down: Tensor
    up: Tensor
    experts: int
    alpha: float | None = None
    rslora: bool = False
    transposed: bool = False

    @classmethod
    def of(cls, delta: LoraDelta, rank: int) -> Self:
        """What the factors of a LoRA say where each expert's rank is this.

        Raises:
            MalformedAdapterError: that makes no whole number of experts.
        """
        experts, rest = divmod(delta.rank, rank)
        if rest:
            raise MalformedAdapterError(f"lora_A has {delta.rank} rows, no multiple of the rank {rank}")
        return cls(down=delta.down, up=delta.up, experts=experts, alpha=delta.alpha, rslora=delta.rslora)

    @classmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """Not used: the tensors are those of a LoRA."""
        raise TypeError("only a configuration tells experts from a LoRA: use ExpertsDelta.of")

    def slots(self) -> dict[str, Tensor]:
        """See `Delta.slots`."""
        return self.tensors()

    @property
    def rank(self) -> int:
        """Inner dimension of each expert's product."""
        return self.down.shape[0] // self.experts

    @property
    def scaling(self) -> float:
        """See `scaling_of`."""
        return scaling_of(self.alpha, self.rank, self.rslora)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Delta.shape`."""
        rows, columns = self.up.shape[0], self.down.shape[1]
        return (self.experts, columns, rows) if self.transposed else (self.experts, rows, columns)

    def fits(self, weight_shape: Sequence[int]) -> bool:
        """See `Delta.fits`."""
        return tuple(weight_shape) == self.shape

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """See `Delta.delta_weight`."""
        down = computing(self.down).view(self.experts, self.rank, -1)
        up = computing(self.up).view(-1, self.rank, self.experts).permute(2, 0, 1)
        change = up @ down * self.scaling
        return change.mT if self.transposed else change

    def map_rows(self, change: RowMap) -> Self:
        """See `Delta.map_rows`.

        Raises:
            ConversionError: always; the first dimension are experts, and no model cuts them apart.
        """
        raise ConversionError("a change of stacked experts has no rows to choose")
