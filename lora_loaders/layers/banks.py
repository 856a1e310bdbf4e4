"""Banks: the active slots of layers of equal shapes, side by side in memory, so that few calls write them all."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_loaders.buffers import writable
from lora_loaders.deltas import Factors

Stack = Sequence[tuple[Factors, float]]
"""The factors that a slot is to hold, each with its adapter's weight."""


class Column(NamedTuple):
    """What slots that are written together hold of one adapter each, slot by slot."""

    downs: Sequence[Tensor]
    ups: Sequence[Tensor]
    scales: Sequence[float]


def columns_of(stacks: Sequence[Stack]) -> list[Column]:
    """The first factors of all slots, the second of all, and so on."""
    return [
        Column([f.down for f, _ in terms], [f.up for f, _ in terms], [f.scaling * weight for f, weight in terms])
        for terms in zip(*stacks, strict=True)
    ]


class Likeness(NamedTuple):
    """What layers have in common whose slots can be written together."""

    device: torch.device
    dtype: torch.dtype
    capacity: int
    columns: tuple[int, ...]
    rows: int
    ranks: tuple[int, ...]
    """Rank of each adapter that is written, in order."""
    sources: tuple[torch.device, ...]
    """Where each adapter's factors lie."""


@dataclass(eq=False)
class Bank:
    """The slots of several layers.

    Nothing refers to a bank but the slots themselves, which are parts of its memory: it goes when they have moved.

    Shapes: down `[layers, capacity, in, *kernel]`, up `[layers, out, capacity]`.
    """

    down: Tensor
    up: Tensor

    @classmethod
    def empty(cls, layers: int, like: Likeness) -> "Bank":
        """Room for so many layers."""
        place: Any = {"device": like.device, "dtype": like.dtype}
        with writable():
            down = torch.empty(layers, like.capacity, *like.columns, **place)
            return cls(down, torch.empty(layers, like.rows, like.capacity, **place))

    @classmethod
    def around(cls, down: Tensor, up: Tensor) -> "Bank":
        """The bank that two slots are parts of; a slot that was moved alone is a bank of one layer."""
        return cls(_whole(down), _whole(up))

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """Each layer's slot."""
        # `.data`, since a view would drag its whole bank into a compiler's trace.
        return [(down.data, up.data) for down, up in zip(self.down.unbind(), self.up.unbind(), strict=True)]

    def write(self, seats: Sequence[int], columns: Sequence[Column], ranks: Sequence[int]) -> None:
        """Put each layer's adapters one below the other into its slot, scales folded into `down`, and zero the rest.

        Args:
            seats: which of the bank's layers, ascending.
            columns: for each adapter these layers' factors with their scales.
            ranks: rank of each adapter, the same for all of these layers.
        """
        chosen = None if len(seats) == len(self.down) else torch.tensor(seats, device=self.down.device)
        stops = list(accumulate(ranks, initial=0))
        for column, (start, stop) in zip(columns, pairwise(stops), strict=True):
            scales = column.scales
            downs, ups = _together(column.downs, self.down), _together(column.ups, self.up)
            target = self.down[:, start:stop]
            scale = scales[0] if len(set(scales)) == 1 else self._spread(scales)
            if chosen is None:
                torch.mul(downs, scale, out=target)
                self.up[:, :, start:stop].copy_(ups)
            else:
                target.index_copy_(0, chosen, (downs * scale).to(target.dtype))
                self.up[:, :, start:stop].index_copy_(0, chosen, ups.to(self.up.dtype))
        rest = (self.down[:, stops[-1] :], self.up[:, :, stops[-1] :])
        for part in rest if stops[-1] < self.down.shape[1] else ():
            _ = part.zero_() if chosen is None else part.index_fill_(0, chosen, 0)

    def _spread(self, scales: Sequence[float]) -> Tensor:
        """One scale a layer, to multiply `down` with; in float32, as a number would be applied."""
        wide = torch.float64 if self.down.dtype == torch.float64 else torch.float32
        values = torch.tensor(scales, dtype=wide, device=self.down.device)
        return values.view(-1, *[1] * (self.down.ndim - 1))


def _together(tensors: Sequence[Tensor], target: Tensor) -> Tensor:
    stacked = tensors[0].detach().unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
    # In the wider of the two precisions, so that scaling rounds once.
    return stacked.to(target.device, torch.promote_types(stacked.dtype, target.dtype))


class Seat(NamedTuple):
    """Where a slot lies: in which memory, and as which of the layers there."""

    down_memory: int
    up_memory: int
    number: int


def seat_of(down: Tensor | None, up: Tensor | None, like: Likeness) -> Seat | None:
    """The seat of a slot; None where there is none, or not one like this, or its two parts lie apart."""
    if down is None or up is None or down.shape[0] != like.capacity:
        return None
    if (down.dtype, down.device) != (like.dtype, like.device) or not (down.is_contiguous() and up.is_contiguous()):
        return None
    down_memory, down_room, number = _place(down)
    up_memory, up_room, other = _place(up)
    return Seat(down_memory, up_memory, number) if (down_room, number) == (up_room, other) else None


def _place(part: Tensor) -> tuple[int, int, int]:
    """Address of the memory that a slot is part of, how many like it have room there, and its number among them."""
    store = part.untyped_storage()
    offset: int = int(part.storage_offset())
    return store.data_ptr(), store.nbytes() // max(part.nbytes, 1), offset // max(part.numel(), 1)


def _whole(part: Tensor) -> Tensor:
    """All of the memory that a slot is part of, as a row of such slots."""
    layers = part.untyped_storage().nbytes() // max(part.nbytes, 1)
    return part.as_strided((layers, *part.shape), (part.numel(), *part.stride()), 0)
