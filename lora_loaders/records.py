"""What fusing keeps, so that unfusing gives back every bit: what was added, and where subtracting it misses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .changes import Change
from .errors import AdapterStateError
from .layers.base_weight import BITS, Record, read_original, read_weight
from .layers.layer import AdapterLayer
from .layers.memory import memory_of

LARGEST = 1 << 29
"""Elements of the weights whose originals are held at the same time, at most."""


@dataclass
class Fused:
    """What is fused into one layer, and how to take it out again.

    Attributes:
        coefficients: adapter -> the factor it was fused with (its weight times `lora_scale`).
        change: what was added to the weight; None if only the bias changed, or where a copy is kept.
        where: flat positions whose original value the subtraction misses.
        values: those original values.
        copy: the whole original weight, where the record would be larger than that.
        checksum: sum of the bit patterns of the original weight; where a copy of that is kept, of the fused one.
        bias: the original bias; kept whole, it is small.
        had_bias: whether the base layer had a bias at all.
        record: what a quantised weight stored.
        lost: squared norms of what quantising again lost of the change, and of the change.
    """

    coefficients: dict[str, float]
    change: Change | None = None
    where: Tensor | None = None
    values: Tensor | None = None
    copy: Tensor | None = None
    checksum: Tensor | None = None
    bias: Tensor | None = None
    had_bias: bool = False
    record: Record | None = None
    lost: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Parts of what many layers share: a pickle or a copy of one layer would hold all of it.
        apart = {name: kept.clone() if isinstance(kept, Tensor) else kept for name, kept in vars(self).items()}
        return apart | {"change": None if self.change is None else self.change.apart()}

    def original(self, layer: AdapterLayer) -> Tensor:
        """The weight before fusing, on the weight's device; see `originals_of`."""
        if self.record is not None:
            return read_original(layer.base_layer, self.record)
        return originals_of([layer])[0]

    def computed(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What the weight was before fusing, where the record lies, and that of which the checksum was taken."""
        if self.copy is not None:
            return self.copy, weight
        if self.change is None:
            return weight, weight
        assert self.where is not None
        assert self.values is not None
        # Redone where it was done: another device may sum in another order.
        restored = self.change.add_to(weight.to(self.where.device), -1.0).contiguous()
        restored.view(-1).index_copy_(0, self.where.long(), self.values.to(restored.dtype))
        return restored, restored

    def refused(self, weight: Tensor) -> AdapterStateError:
        """The error for a weight that gives another checksum."""
        kept = self.copy if self.copy is not None else self.values
        if kept is not None and kept.dtype != weight.dtype:
            is_whole = torch.promote_types(kept.dtype, weight.dtype) == weight.dtype
            return AdapterStateError(
                f"a weight was fused in {kept.dtype} and is {weight.dtype} now, where what was added cannot be told "
                "exactly",
                mend=f"Call .to({kept.dtype}) first; every bit can still come back."
                if is_whole
                else "The cast has lost bits for good: load the model's own weights again, and unfuse before casting.",
                state="Nothing was unfused.",
            )
        return AdapterStateError(
            "a fused weight is not what fusing left: it was changed, cast or trained since",
            mend="Keep the weights as they are with unload_lora_weights(keep_fused=True), "
            "or load the model's own again.",
            state="Nothing was unfused.",
        )

    def memory(self) -> int:
        """Bytes that are kept for unfusing."""
        kept = (self.where, self.values, self.copy, self.bias)
        recorded = self.record.memory() if self.record is not None else 0
        changed = self.change.memory() if self.change is not None else 0
        return recorded + changed + sum(tensor.nbytes for tensor in kept if tensor is not None)


@torch.no_grad()
def originals_of(layers: Sequence[AdapterLayer]) -> list[Tensor]:
    """The weights of plain layers as they were before fusing, each on its weight's device.

    Checksums are compared all at once, since that waits for the device.

    Raises:
        AdapterStateError: a weight is no longer what fusing left, so its original cannot be computed.
    """
    weights = [read_weight(layer.base_layer) for layer in layers]
    found = [layer.fused.computed(weight) for layer, weight in zip(layers, weights, strict=True)]
    checked = [
        (layer.fused, weight, checksum_of(given).to(layer.fused.checksum.device))
        for layer, weight, (_, given) in zip(layers, weights, found, strict=True)
        if layer.fused.checksum is not None
    ]
    if checked and not _are_equal([(checksum, fused.checksum) for fused, _, checksum in checked]):
        raise next(fused.refused(weight) for fused, weight, checksum in checked if checksum != fused.checksum)
    return [original.to(weight.device) for (original, _), weight in zip(found, weights, strict=True)]


def _are_equal(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    devices = {one.device for one, _ in pairs}
    own = [[pair for pair in pairs if pair[0].device == device] for device in devices]
    return all(torch.equal(*map(torch.stack, zip(*group, strict=True))) for group in own)


@dataclass
class Originals:
    """Weights of one size as they were before fusing, side by side until what subtraction misses is known.

    Counting that waits for the device, so it is done for many weights at once.

    Shapes: weights and restored `[layers, elements]`, missed `[layers, words]`.
    """

    weights: Tensor
    restored: Tensor
    """What subtracting the change from the fused weight gives."""
    results: Sequence[Tensor]
    """The weights themselves, to be fused."""
    copies: Sequence[Tensor]
    """The rows of `weights` in their own shapes."""
    again: Sequence[Tensor]
    """The rows of `restored` likewise."""
    missed: Tensor | None = None
    """Which words of `restored` are not those of `weights`."""
    done: Any = None
    """The event after which all is written that compacting reads."""
    fused: list[Fused] = field(default_factory=list[Fused])
    changes: list[Change] = field(default_factory=list[Change])

    @staticmethod
    def most(weight: Tensor) -> int:
        """How many weights like this one are to be held at once: a fifth of what memory is free, or 2.7 GB."""
        free, _ = memory_of(weight.device)
        each = weight.numel() * (2 * weight.element_size() + 1)
        return max(1, min(LARGEST // weight.numel(), free // 5 // each))

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> "Originals":
        """Copies of these weights, which are about to be fused into."""
        kept = torch.empty(len(weights), weights[0].numel(), dtype=weights[0].dtype, device=weights[0].device)
        restored = torch.empty_like(kept)
        copies, again = (
            [row.view(weight.shape) for row, weight in zip(rows.unbind(), weights, strict=True)]
            for rows in (kept, restored)
        )
        for copy, weight in zip(copies, weights, strict=True):
            copy.copy_(weight)  # one by one at the full speed of memory, together at two thirds
        return cls(kept, restored, weights, copies, again)

    def copy(self) -> Tensor:
        """The copy of the weight that is fused into next."""
        return self.copies[len(self.fused)]

    def subtract(self, fused: Fused, change: Change) -> None:
        """Note what the last copied weight is when the change is taken out of it again."""
        row = len(self.fused)
        self.fused.append(fused)
        self.changes.append(change)
        change.add_to(self.results[row], -1.0, out=self.again[row])

    def close(self) -> None:
        """No weight comes after this: find what subtraction missed."""
        # Bit patterns, not values: -0.0 equals 0.0, and NaN equals nothing.
        self.missed = _words(self.restored) != _words(self.weights)
        self.done = torch.cuda.current_stream(self.weights.device).record_event() if self.weights.is_cuda else None

    @torch.no_grad()
    def compact(self) -> None:
        """Let each layer's record be the missed positions and their values instead of the copy, if that is smaller."""
        size = self.weights.shape[1]
        if not self.fused:
            return
        # Beside the main stream: the next weights are fused while this waits for what it counts.
        side = _side_stream(self.weights.device) if self.done is not None else None
        if side is not None:
            side.wait_event(self.done)
        with torch.cuda.stream(side):
            where, values, checksums, counts = self._counted(len(self.fused), size)
        each = where.element_size() + values.element_size()
        is_smaller = [
            count * each + change.memory() < size * values.element_size()
            for count, change in zip(counts, self.changes, strict=True)
        ]
        parts = zip(where.split(counts), values.split(counts), checksums.unbind(), strict=True)
        for row, (fused, change, part) in enumerate(zip(self.fused, self.changes, parts, strict=True)):
            assert fused.copy is not None
            if not is_smaller[row]:
                fused.copy, fused.checksum = fused.copy.clone(), checksum_of(self.results[row])
                continue
            fused.where, fused.values, fused.checksum = part
            fused.change, fused.copy = change, None
            if not all(is_smaller):  # a part would keep all of it in memory, that of the copied weights too
                fused.where, fused.values, fused.change = fused.where.clone(), fused.values.clone(), change.apart()

    def _counted(self, layers: int, size: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Positions and values that were missed, each weight's checksum, and how many positions each weight has."""
        assert self.missed is not None
        # Words first: `nonzero` takes as long for each element, however wide, and five of six words were met.
        hit = self.missed[:layers].flatten().nonzero().squeeze(1)
        words, again = (_words(kept).flatten()[hit] for kept in (self.weights, self.restored))
        each = words.element_size() // self.weights.element_size()
        bits = BITS[self.weights.element_size()]
        inside = (words.view(bits) != again.view(bits)).nonzero().squeeze(1)
        where = hit[inside // each] * each + inside % each
        values = words.view(self.weights.dtype)[inside]
        starts = torch.arange(layers + 1, device=where.device) * size
        counts = torch.searchsorted(where, starts).diff()
        where = where % size
        where = where.int() if size < 2**31 else where
        checksums = _words(self.weights[:layers]).sum(1, dtype=torch.int64)
        return where, values, checksums, counts.tolist()  # which waits until all of it is done


@cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device, priority=-1)  # or it waits for all the work that it is to run beside


def checksum_of(weight: Tensor) -> Tensor:
    """Sum of the bit patterns of one weight."""
    return _words(weight.contiguous().view(1, -1)).sum(dtype=torch.int64)


def _words(weights: Tensor) -> Tensor:
    """The bit patterns of each row, eight bytes at a time where they come out even: few wide ones are fast."""
    return weights.view(BITS[8 if weights[0].nbytes % 8 == 0 else weights.element_size()])
