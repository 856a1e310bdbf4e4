"""Several changes made into one: weighted sums, with pruning and elected signs.

Methods: `linear` Σ wᵢ xᵢ (task arithmetic, https://arxiv.org/abs/2212.04089); `magnitude_prune` first keeps only the
largest entries of each; `ties` also elects a sign for each entry and averages what agrees with it
(https://arxiv.org/abs/2306.01708); `dare_linear` and `dare_ties` prune at random and rescale what is left instead
(https://arxiv.org/abs/2311.03099).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lora_loaders.errors import ConversionError

Method = Literal["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]
Majority = Literal["total", "frequency"]
METHODS: tuple[Method, ...] = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")


def combine(
    changes: Sequence[Tensor],
    weights: Sequence[float],
    method: Method = "linear",
    *,
    density: float = 1.0,
    majority: Majority = "total",
    generator: torch.Generator | None = None,
) -> Tensor:
    """One change of several, all of one shape.

    Args:
        changes: what is put together.
        weights: factor of each.
        method: see the module.
        density: share of the entries that pruning keeps, 0 to 1.
        majority: the elected sign is that of the sum (`total`) or of most changes (`frequency`).
        generator: for the random pruning; torch's own if None.
    """
    pruned = [_pruned(change, method, density, generator) for change in changes]
    stacked = torch.stack(pruned)
    factors = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device).view(-1, *[1] * changes[0].ndim)
    if not method.endswith("ties"):
        return (stacked * factors).sum(0)
    votes = stacked if majority == "total" else stacked.sign()
    elected = torch.where(votes.sum(0) >= 0, 1, -1)
    agreeing = stacked.sign() == elected
    return (stacked * factors * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def check_density(density: float, method: Method) -> None:
    """Raise unless the share is one.

    Raises:
        ConversionError: it is not in 0 to 1, or 0 where what is left is rescaled.
    """
    if not 0 <= density <= 1 or (density == 0 and method.startswith("dare")):
        raise ConversionError(f"density={density}: a share of entries from 0 to 1", state="Nothing was changed.")


def _pruned(change: Tensor, method: Method, density: float, generator: torch.Generator | None) -> Tensor:
    if method == "linear" or density >= 1:
        return change
    if method.startswith("dare"):
        kept = torch.rand(change.shape, generator=generator, device="cpu").to(change.device) < density
        return change * kept / density
    mask = torch.zeros_like(change).flatten()
    mask[change.abs().flatten().topk(int(density * change.numel())).indices] = 1
    return change * mask.view(change.shape)
