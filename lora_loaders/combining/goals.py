"""How much of a change is to be kept: a rank, a share of its energy, or a bound on its error."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from lora_loaders.errors import ConversionError

ROUNDING = 1e-5
"""A relative error that the decomposition in float32 may leave of what is exact."""
UNREAD = "Nothing was read or written."


@dataclass(frozen=True)
class Goal:
    """What a low-rank change is to reach, module by module; nothing given keeps everything.

    With singular values σ of ΔW, the energy of the first r is Σ_{i≤r} σᵢ² / Σ σᵢ², and the relative error that remains
    is √(1 − energy) (Eckart and Young 1936, https://doi.org/10.1007/BF02288367).

    Attributes:
        rank: the rank; beside `energy` or `error` the most that they may take.
        energy: the smallest rank that keeps this share, above 0 and at most 1.
        error: the smallest rank with ‖ΔW − ΔW'‖ / ‖ΔW‖ at most this, from 0 to below 1.
        conv_rank: `rank` for kernels larger than 1; the same as `rank` if None.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    conv_rank: int | None = None

    def __post_init__(self) -> None:
        for name, rank in (("rank", self.rank), ("conv_rank", self.conv_rank)):
            if rank is not None and rank < 1:
                raise _meaningless(f"{name}={rank}: a rank is at least 1")
        if self.energy is not None and self.error is not None:
            raise _meaningless(f"energy={self.energy} and error={self.error} say the same thing: give one of them")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise _meaningless(f"energy={self.energy}: a share is above 0 and at most 1")
        if self.error is not None and not 0 <= self.error < 1:
            raise _meaningless(f"error={self.error}: a bound is at least 0 and below 1")

    @property
    def loss(self) -> float | None:
        """The share of energy that may be lost, None where only a rank is wanted."""
        if self.error is not None:
            return self.error**2
        return None if self.energy is None else 1 - self.energy

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing of the rank; all of the energy is something."""
        return self.rank is None and self.loss is None

    @property
    def keeps_all(self) -> bool:
        """Whether nothing may be lost."""
        return self.rank is None and not self.loss

    def takes(self, rank: int) -> bool:
        """Whether factors of this rank can stay as they are."""
        return not self.loss and (self.rank is None or rank <= self.rank)

    def require_loss(self) -> None:
        """Raise unless something says how much is to be kept.

        Raises:
            ConversionError: nothing does.
        """
        if self.is_empty:
            raise _meaningless("give a rank, an energy or an error")

    def at(self, kernel: tuple[int, ...]) -> "Goal":
        """The goal for a weight with this kernel."""
        large = any(size > 1 for size in kernel)
        return Goal(self.conv_rank if large and self.conv_rank else self.rank, self.energy, self.error)

    def beside(self, lost: float, whole: float) -> "Goal | None":
        """The goal for what is left of a change of which an orthogonal part is lost; None if too much of it is.

        Args:
            lost: sum of the squares that are lost.
            whole: sum of the squares of the change.
        """
        if self.loss is None or whole == 0:
            return self
        left = self.loss * whole - lost
        if left < -(ROUNDING**2) * whole:
            return None
        return replace(self, energy=None, error=math.sqrt(max(0.0, left) / (whole - lost)))

    def choose(self, squares: Tensor, rest: float = 0.0) -> int:
        """The rank, at least 1.

        What is lost is summed from the smallest up: as a difference of what is kept from the whole it would drown in
        the whole's own rounding, and an error of 1e-4 would become one of 9e-4.

        Args:
            squares: squared singular values, falling; those that are not known are left out at the end.
            rest: sum of those that are not known.
        """
        most = min(squares.numel(), self.rank or squares.numel())
        if self.loss is None:
            return most
        lost = squares.double().flip(0).cumsum(0).flip(0) + rest  # beside each rank from 0 up
        enough = int((lost > self.loss * float(squares.double().sum() + rest)).sum())
        return max(1, min(enough, most))


def _meaningless(what: str) -> ConversionError:
    return ConversionError(what, state=UNREAD)
