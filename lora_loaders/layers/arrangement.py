"""What a switch finds out about a model's slots, kept for the next switch to the same adapters.

Which adapters contribute to which layer, whether they are plain products, and whose slots lie side by side: finding
that takes most of a switch, and it changes only when adapters come or go, or something moves. So it is kept, and asked
each time whether it still holds; schedules switch at every step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .banks import Column, columns_of
from .contribution import Contribution
from .layer import AdapterLayer
from .parameter import ParameterLayer
from .slots import Written, bank_of, clear_rest, refresh

_WEIGHT, _BUFFERS, _DOWN, _UP = map(itemgetter, ("weight", "_buffers", "slot_down", "slot_up"))
_DEVICE, _REQUIRES_GRAD, _FUSED = map(attrgetter, ("device", "requires_grad", "fused"))
_IS_NONE = partial(is_, None)
_PRODUCT = frozenset(("slot_down", "slot_up"))
KEPT = 8
"""Arrangements that a model keeps, the latest ones."""


class Group(NamedTuple):
    """Slots that lie in one bank and are written together."""

    layers: Sequence[AdapterLayer]
    names: Sequence[Sequence[str]]
    """For each column the adapter that each layer has there."""
    columns: Sequence[Column]
    """The factors, with their scales at a weight of 1."""
    seats: Sequence[int]
    ranks: Sequence[int]

    @classmethod
    def of(cls, written: Written, contributions: Mapping[AdapterLayer, Sequence[tuple[str, Contribution]]]) -> "Group":
        """What has just been written, with what the layers contribute."""
        layers = [layer for layer, _ in written.members]
        terms = [[(name, one.factors) for name, one in contributions[layer] if one.factors] for layer in layers]
        names = [[name for name, _ in column] for column in zip(*terms, strict=True)]
        columns = columns_of([[(factors, 1.0) for _, factors in own] for own in terms])
        return cls(layers, names, columns, written.seats, written.ranks)

    def write(self) -> None:
        """Write these slots anew, with the weights that the layers have now."""
        weights = [layer.weights for layer in self.layers]
        columns = [
            column._replace(scales=[s * w[n] for s, w, n in zip(column.scales, weights, names, strict=True)])
            for names, column in zip(self.names, self.columns, strict=True)
        ]
        bank_of(self.layers[0]).write(self.seats, columns, self.ranks)


@dataclass(frozen=True, eq=False)
class Arrangement:
    """How the slots of all adapter layers of a model are written for one set of active adapters.

    It holds no slot, so that banks go when they have moved: that a slot's address is the same, inside the memory that
    the first of its bank still has, tells that it is the same part of the same bank.
    """

    layers: list[AdapterLayer]
    watched: list[tuple[Tensor, ...]]
    holders: list[Mapping[str, Tensor | None]]
    parameters: list[Tensor]
    devices: list[torch.device]
    addresses: list[int]
    groups: list[Group]

    @classmethod
    def of(cls, layers: list[AdapterLayer], written: Sequence[Written]) -> "Arrangement | None":
        """The arrangement of what has just been written; None where anything but plain products contributes.

        Nor is there one of a moment in which anything is fused: it would be taken for that of another moment.
        """
        if any(map(_FUSED, layers)):
            return None
        known = [None if isinstance(layer, ParameterLayer) else layer.plain_contributions() for layer in layers]
        by_layer = {layer: own for layer, own in zip(layers, known, strict=True) if own is not None}
        if len(by_layer) < len(layers):
            return None
        contributions = [one for own in by_layer.values() for _, one in own]
        groups = [Group.of(own, by_layer) for own in written]
        holders = [holder for one in contributions for holder in one.holders or ()]
        parameters: list[Any] = list(map(_WEIGHT, holders))
        watched = [tuple(p for _, one in own for p in one.parameters) for own in by_layer.values()]
        devices = list(map(_DEVICE, parameters))
        return cls(layers, watched, holders, parameters, devices, _addresses(groups), groups)

    def holds(self, layers: list[AdapterLayer]) -> bool:
        """Whether the model still has these layers, parameters and slots, each where it was."""
        return (
            layers == self.layers
            and all(map(is_, map(_WEIGHT, self.holders), self.parameters))
            and list(map(_DEVICE, self.parameters)) == self.devices
            and not any(map(_REQUIRES_GRAD, self.parameters))
            and not any(map(_FUSED, layers))
            and _addresses(self.groups) == self.addresses
        )

    @torch.no_grad()
    def write(self) -> None:
        """Write all slots anew, with the weights that the layers have now."""
        for group in self.groups:
            group.write()
        for layer, watched in zip(self.layers, self.watched, strict=True):
            if not _PRODUCT.issuperset(layer.filled) or layer.computed:
                clear_rest(layer)
            layer.note_written(watched, False)
            if not watched and not layer.shared.reserved:
                layer.take_slot(None, None)


def _addresses(groups: Sequence[Group]) -> list[int]:
    """Where each bank's memory begins and how long it is, and where each slot lies."""
    addresses: list[int] = []
    for group in groups:
        buffers = list(map(_BUFFERS, map(vars, group.layers)))
        for slots in (list(map(_DOWN, buffers)), list(map(_UP, buffers))):
            if any(map(_IS_NONE, slots)):
                return []
            memory = slots[0].untyped_storage()
            addresses += (memory.data_ptr(), memory.nbytes(), *map(Tensor.data_ptr, slots))
    return addresses


def switch(layers: list[AdapterLayer], names: tuple[str, ...]) -> None:
    """Rewrite the slots of all of a model's adapter layers, on which these adapters are the active ones now."""
    kept = layers[0].shared.arrangements if layers else {}
    arrangement = kept.pop(names, None)
    if arrangement is not None and arrangement.holds(layers):
        arrangement.write()
    else:
        arrangement = Arrangement.of(layers, refresh(layers))
    if arrangement is not None:
        kept[names] = arrangement
        for old in list(kept)[:-KEPT]:
            del kept[old]
