"""The state that all adapter layers of one model share; there is no other outside the layers themselves."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Shared:
    """What all adapter layers of one model have in common."""

    enabled: bool = True
    scale: float = 1.0
    """Factor of the forward at hand (`attention_kwargs={"scale": …}`)."""
    outer_scale: float = 1.0
    """The factor that holds again after the forward at hand."""
    reserved: int = 0
    """Rank that every slot has room for, so that hot-swapping finds the same storage."""
    frozen: list[nn.Parameter] = field(default_factory=list[nn.Parameter])
    """Base parameters whose gradients were switched off for training an adapter."""
    parameters: list[Any] = field(default_factory=list[Any])
    """Layers of raw parameters, whose values hold the scale."""
    hooks: list[Any] = field(default_factory=list[Any])
    """Handles of the hooks that read the scale of a forward."""
