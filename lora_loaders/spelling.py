"""One change as a format spells it: alpha where the format keeps it, DoRA's norms in the shape of its readers."""

from dataclasses import replace

import torch
from torch import Tensor

from .deltas import Delta, DoraDelta, LoraDelta
from .errors import ConversionError
from .formats import Format
from .peft_types import plain
from .scaling import plain_alpha

OF_PEFT = ("peft", "diffusers")
"""Formats that PEFT reads, which keeps an embedding's factors transposed; others know one pair for every layer."""


def spelled(delta: Delta, form: Format) -> Delta:
    """The same change with its alpha where the format has it: plain where a tensor holds it, or folded in."""
    if not isinstance(delta, LoraDelta):
        return delta if form.one_model else plain(delta)
    if form.name not in OF_PEFT:
        delta = replace(delta, embedding=False)
    if form.alpha == "metadata":
        return delta
    if form.alpha == "folded":
        return _folded(delta)
    # A tensor's alpha is always divided by the rank.
    return replace(delta, alpha=plain_alpha(delta), rslora=False)


def magnitude_slots(delta: Delta, form: Format) -> dict[str, Tensor]:
    """DoRA's norms in the shape that the format's readers expect."""
    if not isinstance(delta, DoraDelta):
        return {}
    magnitude = delta.magnitude
    kernel = len(delta.shape or (0, 0)) - 2
    if form.style == "peft" and "magnitude" not in form.slots:
        return {"magnitude_out": magnitude.reshape(1, -1, *[1] * kernel) if kernel else magnitude.flatten()}
    return {"magnitude": magnitude if magnitude.ndim > 1 else magnitude.reshape(-1, *[1] * (kernel + 1))}


def _folded(delta: LoraDelta) -> LoraDelta:
    """The same ΔW with a scaling of 1; refuses to round."""
    if delta.scaling == 1:
        return replace(delta, alpha=None, rslora=False)
    wanted = delta.up.double() * delta.scaling
    up = wanted.to(delta.up.dtype)
    if not torch.equal(up.double(), wanted):
        raise ConversionError(
            f"the format has no place for alpha, and a scaling of {delta.scaling:g} cannot be multiplied into "
            f"{delta.up.dtype} without rounding",
            mend="Choose another format, or write with dtype=torch.float32.",
        )
    return replace(delta, up=up, alpha=None, rslora=False)


def alpha_tensor(delta: Delta, alpha: float) -> Tensor:
    """Alpha in the dtype of the factors if that holds it exactly, else in float32."""
    dtype = next((t.dtype for t in delta.tensors().values() if t.is_floating_point()), torch.float32)
    tensor = torch.tensor(alpha, dtype=dtype)
    return tensor if float(tensor) == alpha else torch.tensor(alpha, dtype=torch.float32)
