"""The state that all adapter layers of one model share; there is no other outside the layers themselves."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from lora_loaders.buffers import writable
from lora_loaders.errors import AdapterStateError


def _one() -> Tensor:
    with writable():
        return torch.ones((), dtype=torch.float64, device="cpu")


class _Schedules(dict[str, Any]):
    """Schedules on their way into a pickle or a copy, where they become a plain dictionary again."""

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return dict(self)  # nothing in them is written to

    def __reduce__(self) -> tuple[Any, ...]:
        for name, schedule in self.items():
            try:
                pickle.dumps(schedule)
            except Exception as error:
                raise AdapterStateError(
                    f"the schedule of {name} cannot be pickled: {error}",
                    mend="Use a function that a module defines or a PerStep, or set_adapters with numbers before.",
                    state="Nothing was written.",
                ) from error
        return dict, (dict(self),)


@dataclass
class Shared:
    """What all adapter layers of one model have in common."""

    enabled: bool = True
    scales: dict[int, float] = field(default_factory=dict[int, float])
    """Thread -> factor of its forward at hand (`attention_kwargs={"scale": …}`), where that is not 1."""
    factor: Tensor = field(default_factory=_one)
    """A scale as data, of shape (), on the CPU, from where kernels of any device take it as an argument: compiled code
    reads it anew where it would recompile for another number. All threads share it; see `Gate.enter_scale`."""
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
    trained: set[str] = field(default_factory=set[str])
    """Adapters that were made to be trained: they have gradients while they are active, see `train_active`."""
    parameters: list[Any] = field(default_factory=list[Any])
    """Layers of raw parameters, whose values hold the scale."""

    arrangements: dict[tuple[str, ...], Any] = field(default_factory=dict[tuple[str, ...], Any])
    """Active adapters -> how the slots are written for them, see `arrangement`; emptied when adapters come or go."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "arrangements": {}, "schedules": _Schedules(self.schedules)}

    @property
    def scale(self) -> float:
        """The factor of this thread's forward at hand."""
        return self.scales.get(get_ident(), 1.0) if self.scales else 1.0

    @scale.setter
    def scale(self, scale: float) -> None:
        if scale == 1.0:
            self.scales.pop(get_ident(), None)
        else:
            self.scales[get_ident()] = scale

    @property
    def scale_to_compile(self) -> Any:
        """The scale in a form that a compiler does not take for a constant."""
        if self.traced is not None:
            return self.traced
        # What a gradient needs later must not be what the next forward writes to.
        return self.factor.clone() if torch.is_grad_enabled() else self.factor
