"""Many tensors in one buffer: one allocation, one copy to a device, and views."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


def part_of(buffer: Tensor, shape: Sequence[int], start: int) -> Tensor:
    """The contiguous tensor of this shape that begins at element `start` of a flat buffer; slicing takes two views."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return buffer.as_strided(shape, strides[::-1], start)


ALIGNMENT = 512
"""Bytes between the starts of neighbouring tensors are multiples of this, so that each is aligned for any kernel."""


def tensors_apart(shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """New tensors without values in one allocation, each with a storage of its own: none seems to share memory."""
    if device.type == "meta":
        return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    sizes = [shape.numel() * dtype.itemsize for shape in shapes]
    starts = list(accumulate([-(-size // ALIGNMENT) * ALIGNMENT for size in sizes], initial=0))
    whole = torch.empty(starts[-1], dtype=torch.uint8, device=device).untyped_storage()
    parts = [whole[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    return [_over(part, dtype, device, shape) for part, shape in zip(parts, shapes, strict=True)]


def writable() -> AbstractContextManager[Any]:
    """For what is made in inference mode and written to in place later, which else could be done in that mode only."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


class BufferMover:
    """Moves tensors to a device when called, each underlying buffer once."""

    def __init__(self, device: torch.device | str | None) -> None:
        self._device = None if device is None else torch.device(device)
        self._moved: dict[tuple[int, torch.dtype], Tensor] = {}
        self._kept: list[torch.UntypedStorage] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor on the device: a view of its moved buffer."""
        if self._device is None or tensor.device == self._device or tensor.is_meta:
            return tensor
        if self._device.type == "meta":
            return tensor.to("meta")
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), tensor.dtype
        moved = self._moved.get(key)
        if moved is None:
            known = self._moved.get((storage.data_ptr(), torch.uint8))
            whole = self._move(storage) if known is None else known
            moved = self._moved[key] = _flat(whole.untyped_storage(), tensor.dtype, self._device)
        return moved.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _move(self, storage: torch.UntypedStorage) -> Tensor:
        self._kept.append(storage)  # or another could come to lie at its address
        source = _flat(storage, torch.uint8, storage.device)
        moved = source.to(self._device, non_blocking=source.is_pinned())
        self._moved[storage.data_ptr(), torch.uint8] = moved
        return moved


def _flat(storage: torch.UntypedStorage, dtype: torch.dtype, device: torch.device) -> Tensor:
    """All of a buffer as one row of this dtype."""
    return _over(storage, dtype, device, (storage.nbytes() // dtype.itemsize,))


def _over(storage: torch.UntypedStorage, dtype: torch.dtype, device: torch.device, shape: Sequence[int]) -> Tensor:
    empty = torch.empty(0, dtype=dtype, device=device)
    return empty.set_(storage, 0, shape)  # pyright: ignore[reportArgumentType, reportCallIssue]
