"""What a call to fuse did, and what storing quantised weights again lost of it."""

from collections.abc import Iterable
from dataclasses import dataclass

from .layers.layer import AdapterLayer


@dataclass(frozen=True)
class FuseReport:
    """What fusing did.

    Attributes:
        layers: how many layers were changed.
        quantised: how many of them are quantised.
        lost: norm of what quantising those again lost, as a share of the norm of their change (Frobenius norms, all
            layers together); rounding can lose more than the change itself, so it may exceed 1.
    """

    layers: int
    quantised: int = 0
    lost: float = 0.0


def fuse_report(layers: Iterable[AdapterLayer]) -> FuseReport:
    """What is fused into these layers now, and what quantising them again lost."""
    records = [layer.fused for layer in layers if layer.fused is not None]
    norms = [fused.lost for fused in records if fused.lost is not None]
    lost, change = (sum(float(pair[side]) for pair in norms) for side in (0, 1))
    return FuseReport(len(records), len(norms), (lost / change) ** 0.5 if change else 0.0)
