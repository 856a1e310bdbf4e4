"""Whether the vectors of a change, its biases and DoRA's magnitude, are as long as the module has outputs or inputs."""

from collections.abc import Sequence

from .base import Delta
from .dora import DoraDelta
from .rows import RowsDelta


def misfit_of_vectors(delta: Delta, weight_shape: Sequence[int]) -> str | None:
    """Why a bias or a magnitude of this change is none of a module with such a weight, None where they fit."""
    outputs = weight_shape[0] if weight_shape else 1
    tensors = delta.tensors()
    for bias in (tensors[name] for name in ("bias", "up_bias") if name in tensors):
        if bias.shape != (outputs,):
            return f"the adapter's bias has the shape {tuple(bias.shape)}, the module {outputs} outputs"
    dora = delta.inner if isinstance(delta, RowsDelta) else delta
    if not isinstance(dora, DoraDelta):
        return None
    side, wanted = ("inputs", weight_shape[1]) if dora.per_input and len(weight_shape) > 1 else ("outputs", outputs)
    if dora.magnitude.numel() == wanted:
        return None
    return f"its DoRA magnitude has the shape {tuple(dora.magnitude.shape)}, the module {wanted} {side}"
