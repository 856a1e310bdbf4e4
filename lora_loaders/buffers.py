"""Many tensors in one buffer: one allocation, one copy to a device, and views."""

from collections.abc import Sequence

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


class BufferMover:
    """Moves tensors to a device when called, each underlying buffer once."""

    def __init__(self, device: torch.device | str | None) -> None:
        self._device = None if device is None else torch.device(device)
        self._buffers: dict[int, torch.UntypedStorage] = {}
        self._kept: list[torch.UntypedStorage] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor on the device: a view of its moved buffer."""
        if self._device is None or tensor.device == self._device or tensor.is_meta:
            return tensor
        if self._device.type == "meta":
            return tensor.to("meta")
        storage = tensor.untyped_storage()
        # A small view of a large buffer (one module taken out of a file) is cheaper to move alone.
        moved = self._buffers.get(storage.data_ptr())
        if moved is None:
            empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            source = empty.set_(storage, 0, (storage.nbytes(),))  # pyright: ignore[reportArgumentType, reportCallIssue]
            moved = source.to(self._device, non_blocking=source.is_pinned()).untyped_storage()
            self._buffers[storage.data_ptr()] = moved
            self._kept.append(storage)
        view = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return view.set_(moved, tensor.storage_offset(), tensor.shape, tensor.stride())
