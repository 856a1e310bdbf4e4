"""What one adapter adds to a layer, as its slots are written from it."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from lora_loaders.deltas import Delta, Factors

Term = tuple[Factors | None, float, Delta, str]
"""One contributing adapter: its factors, if it has any in this layer, its weight, the change itself, and its name."""


class Contribution(NamedTuple):
    """One adapter's change of a layer, ready to be added."""

    delta: Delta
    factors: Factors | None
    """The change as factors in the layer's shapes, None where it has no such form here."""
    parameters: tuple[Tensor, ...]
    """Those whose writes torch counts; tensors made in inference mode have no counter."""
    holders: tuple[Mapping[str, Tensor | None], Mapping[str, Tensor | None]] | None = None
    """Where down and up of a plain product are held; None where the change is more than that."""

    @property
    def is_current(self) -> bool:
        """Whether its parameters are still those that the modules hold: others may have replaced them."""
        holders, factors = self.holders, self.factors
        return (
            holders is not None
            and factors is not None
            and holders[0].get("weight") is factors.down
            and holders[1].get("weight") is factors.up
        )
