"""AdapterStore: the tensors of a layer's adapters, as parameters under PEFT's names."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lora_loaders.deltas import Delta
from lora_loaders.deltas.rows import fused_of

from .held import held, parameter_of
from .places import Factor, FactorDict, is_transposed, place_of
from .shared import Shared

EMPTY = torch.empty(0)
"""Stands in a template for a tensor that the layer holds as a parameter."""


def _parted(tensor: Tensor) -> Tensor:
    alone = tensor.detach().clone()
    return nn.Parameter(alone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else alone


class AdapterStore(nn.Module):
    """A module that holds adapters: a template of each, which is its delta without data, and the data as parameters."""

    templates: dict[str, Delta]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Parameters and slots are parts of memory that many layers share, which a pickle would hold whole for each.
        own = [*(p for name in self.templates for p in self._raw(name).values()), *self._buffers.values()]
        parted = {id(tensor): _parted(tensor) for tensor in own if tensor is not None}
        others = {id(other): other for other in vars(self).values() if isinstance(other, Shared)}
        # What reads other modules' weights refers to the whole model.
        readers = [fused.read for template in self.templates.values() if (fused := fused_of(template)) is not None]
        others |= {id(reader): reader for reader in readers}
        others |= {id(child): child for name, child in self._modules.items() if name == "base_layer"}
        return vars(copy.deepcopy(self, {**parted, **others}))

    def add(self, name: str, delta: Delta, *, requires_grad: bool = False) -> dict[str, nn.Parameter]:
        """Register one adapter's tensors as parameters, and tell which by slot."""
        tensors = delta.tensors()
        self.templates[name] = delta.with_tensors(dict.fromkeys(tensors, EMPTY))
        parameters: dict[str, nn.Parameter] = {}
        for slot, tensor in tensors.items():
            container, leaf = place_of(delta, slot)
            data = tensor.t() if is_transposed(delta, slot) else tensor
            parameter = parameters[slot] = nn.Parameter(data, requires_grad)
            if leaf:
                self._factor(container, name)._parameters[leaf] = parameter
            else:
                self._parameters_in(container)[name] = parameter
        return parameters

    def remove(self, name: str) -> None:
        """Forget one adapter, half-registered ones too; containers that are left empty go."""
        template = self.templates.pop(name, None)
        for slot in template.tensors() if template is not None else ():
            container, _ = place_of(template, slot)  # pyright: ignore[reportArgumentType]
            entries: Any = self._modules.get(container)
            if entries is not None and name in entries:
                del entries[name]
            if entries is not None and len(entries) == 0:
                del self._modules[container]

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        for slot in self.templates[old].tensors():
            container, _ = place_of(self.templates[old], slot)
            entries: Any = self._modules[container]
            if old in entries:
                entries[new] = entries.pop(old)
        self.templates[new] = self.templates.pop(old)

    def delta(self, name: str) -> Delta:
        """One adapter's change, over the live parameters."""
        return self._delta(name, self._raw(name))

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """The parameters of one adapter."""
        return [tensor for tensor in self._raw(name).values() if isinstance(tensor, nn.Parameter)]

    def _delta(self, name: str, tensors: Mapping[str, Tensor]) -> Delta:
        template = self.templates[name]
        turned = {slot: tensors[slot].t() for slot in tensors if is_transposed(template, slot)}
        return template.with_tensors({**tensors, **turned})

    def _raw(self, name: str) -> dict[str, Any]:
        """One adapter's tensors by slot, as they are stored."""
        template = self.templates[name]
        tensors: dict[str, Any] = {}
        for slot in template.tensors():
            container, leaf = place_of(template, slot)
            entries: Any = self._modules[container]
            owner, key = (entries._modules[name], leaf) if leaf else (entries, name)
            tensor = parameter_of(owner, key)  # an attribute, where torch prunes or parametrizes it
            tensors[slot] = held(owner, key) if tensor.is_meta else tensor
        return tensors

    def _parameters_in(self, name: str) -> nn.ParameterDict:
        container: Any = self._modules.get(name)
        if container is None:
            container = self._modules[name] = nn.ParameterDict()
            container.training = self.training
        return container

    def _factor(self, container: str, name: str) -> Factor:
        factors: Any = self._modules.get(container)
        if factors is None:
            factors = self._modules[container] = FactorDict.blank(self.training)
        entries: dict[str, Any] = factors._modules
        factor = entries.get(name)
        if factor is None:
            factor = entries[name] = Factor.blank(self.training)
        return factor
