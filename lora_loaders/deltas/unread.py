"""The change of a module of which only the name was read: enough to ask where it would go."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self

from lora_loaders.deltas.base import Delta, Slots
from lora_loaders.errors import ConversionError


@dataclass(frozen=True, eq=False, kw_only=True)
class UnreadDelta(Delta):
    """A delta without data: it fits any weight, and every part of it is as unknown as itself."""

    kind: ClassVar[str] = "unread"

    @classmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """See `Delta.from_slots`."""
        return cls()

    def slots(self) -> dict[str, Tensor]:
        """None: nothing was read."""
        return {}

    @property
    def shape(self) -> None:
        """Unknown."""
        return

    @property
    def out_features(self) -> int:
        """Unknown, which is -1."""
        return -1

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """Nothing to compute.

        Raises:
            ConversionError: always.
        """
        raise ConversionError("only names were read, no tensors", mend="Read the file itself.")

    def swap_halves(self) -> Self:
        """See `Delta.swap_halves`."""
        return self

    def split(self, sizes: Sequence[int]) -> list[Delta]:
        """See `Delta.split`."""
        return [self for _ in sizes]
