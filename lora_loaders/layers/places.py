"""Where a layer keeps the tensors of its adapters, under PEFT's names."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn
from typing_extensions import Self

from lora_loaders.deltas import Delta

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


_STATE = vars(nn.Module())
_SINGLE = {name: value for name, value in _STATE.items() if not isinstance(value, (dict, set))}
_CONTAINERS = {name: type(value) for name, value in _STATE.items() if isinstance(value, (dict, set))}
_TREE = [name for name, kind in _CONTAINERS.items() if kind is dict]
"""Parameters, buffers and submodules; the other containers are for hooks, but for a set of buffers' names."""


class _OnDemand:
    """An attribute that is made when it is asked for first."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self._name, self._make = name, make

    def __get__(self, module: nn.Module | None, _: type) -> Any:
        if module is None:  # asked of the class
            return self
        value = vars(module)[self._name] = self._make()
        return value


class _Bare(nn.Module):
    """A module that holds something and is never called: it gets hooks' containers where somebody asks for them.

    A load makes four such modules a layer, and their 48 empty containers were a tenth of its time.
    """

    @classmethod
    def blank(cls, training: bool) -> Self:
        """What `cls()` gives."""
        module = cls.__new__(cls)
        state = vars(module)
        state.update(_SINGLE, training=training)
        for name in _TREE:
            state[name] = {}
        return module


for _name, _kind in _CONTAINERS.items():
    if _kind is not dict:
        setattr(_Bare, _name, _OnDemand(_name, _kind))


class Factor(_Bare):
    """Holds the parameters of one factor of one adapter, so that they are named `lora_A.<adapter>.weight`."""

    weight: nn.Parameter
    bias: nn.Parameter


class FactorDict(_Bare, nn.ModuleDict):
    """One kind of factor of all adapters of a layer."""


_Module = TypeVar("_Module", bound=nn.Module)


def blank(module: _Module) -> _Module:
    """What `nn.Module.__init__` does, at 40 % of its cost."""
    state = vars(module)
    state.update(_SINGLE)
    for name, container in _CONTAINERS.items():
        state[name] = container()
    return module


def place_of(delta: Delta, slot: str) -> tuple[str, str]:
    """Container and leaf of a delta's field."""
    return EMBEDDING_PARAMETERS[slot] if is_transposed(delta, slot) else PARAMETERS.get(slot, (slot, ""))


def is_transposed(delta: Delta, slot: str) -> bool:
    """Whether the field is stored transposed, as an embedding's factors are."""
    return delta.is_embedding and slot in EMBEDDING_PARAMETERS
