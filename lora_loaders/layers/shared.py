"""The state that all adapter layers of one model share; there is no other outside the layers themselves."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def _one() -> Tensor:
    with torch.inference_mode(False):  # or it could be written to in inference mode only
        return torch.ones((), dtype=torch.float64, device="cpu")


@dataclass
class Shared:
    """What all adapter layers of one model have in common."""

    enabled: bool = True
    scale: float = 1.0
    """Factor of the forward at hand (`attention_kwargs={"scale": …}`)."""
    outer_scale: float = 1.0
    """The factor that holds again after the forward at hand."""
    factor: Tensor = field(default_factory=_one)
    """`scale` as data, of shape (), on the CPU, from where kernels of any device take it as an argument: compiled code
    reads it anew where it would recompile for another number."""
    traced: Any = None
    """The scale of a forward that is being traced as a whole, a number or a tensor; None outside such a trace."""
    schedules: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Adapter -> its weight as the user gave it, where that follows the denoising; replaced, never written into."""
    reserved: int = 0
    """Rank that every slot has room for, so that hot-swapping finds the same storage; 0 where nothing is reserved."""
    kept_free: float = 0.1
    """Share of a device's memory that cached changes in full (ΔW of DoRA, OFT, LoHa of a high rank, …) leave free;
    where one more would not, it is computed in each forward instead of being kept."""
    frozen: list[nn.Parameter] = field(default_factory=list[nn.Parameter])
    """Base parameters whose gradients were switched off for training an adapter."""
    parameters: list[Any] = field(default_factory=list[Any])
    """Layers of raw parameters, whose values hold the scale."""
    hooks: list[Any] = field(default_factory=list[Any])
    """Handles of the hooks that read the scale of a forward."""

    arrangements: dict[tuple[str, ...], Any] = field(default_factory=dict[tuple[str, ...], Any])
    """Active adapters -> how the slots are written for them, see `arrangement`; emptied when adapters come or go."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "arrangements": {}}

    def set_scale(self, scale: float) -> None:
        """Let this be the scale, as a number and as data."""
        if scale != self.scale:
            self.scale = scale
            self.factor.fill_(scale)

    @property
    def scale_to_compile(self) -> Any:
        """The scale in a form that a compiler does not take for a constant."""
        if self.traced is not None:
            return self.traced
        # What a gradient needs later must not be what the next forward writes to.
        return self.factor.clone() if torch.is_grad_enabled() else self.factor
