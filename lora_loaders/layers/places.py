"""Where a layer keeps the tensors of its adapters, under PEFT's names."""

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from lora_loaders.deltas import Delta, DoraDelta, LoraDelta

# Delta field -> where its parameter stands in the layer: container, and leaf inside the adapter's entry ("": the entry
# is the parameter itself).
PARAMETERS: Mapping[str, tuple[str, str]] = {
    "down": ("lora_A", "weight"),
    "up": ("lora_B", "weight"),
    "up_bias": ("lora_B", "bias"),
    "mid": ("lora_mid", "weight"),
    "magnitude": ("lora_magnitude_vector", "weight"),
    "bias": ("diff_b", ""),
    "value": ("set_weight", ""),
    "weight": ("ia3_l", ""),
}
EMBEDDING_PARAMETERS: Mapping[str, tuple[str, str]] = {"up": ("lora_embedding_A", ""), "down": ("lora_embedding_B", "")}


class Factor(nn.Module):
    """Holds the parameters of one factor of one adapter, so that they are named `lora_A.<adapter>.weight`."""

    weight: nn.Parameter
    bias: nn.Parameter


_STATE = vars(nn.Module())
_CONTAINERS = [(name, type(value)) for name, value in _STATE.items() if isinstance(value, (dict, set))]
_SINGLE = {name: value for name, value in _STATE.items() if not isinstance(value, (dict, set))}
_Module = TypeVar("_Module", bound=nn.Module)


def blank(module: _Module) -> _Module:
    """What `nn.Module.__init__` does, at 40 % of its cost: a load makes five modules a layer."""
    state = vars(module)
    state.update(_SINGLE)
    for name, container in _CONTAINERS:
        state[name] = container()
    return module


def place_of(delta: Delta, slot: str) -> tuple[str, str]:
    """Container and leaf of a delta's field."""
    return EMBEDDING_PARAMETERS[slot] if is_transposed(delta, slot) else PARAMETERS.get(slot, (slot, ""))


def is_transposed(delta: Delta, slot: str) -> bool:
    """Whether the field is stored transposed, as an embedding's factors are."""
    plain = delta.inner if isinstance(delta, DoraDelta) else delta
    return isinstance(plain, LoraDelta) and plain.embedding and slot in EMBEDDING_PARAMETERS
