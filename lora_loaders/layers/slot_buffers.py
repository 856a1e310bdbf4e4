"""SlotBuffers: where a layer keeps what its forward adds, as buffers that no state dictionary shows."""

from collections.abc import Collection, Sequence

from torch import Tensor, nn


class SlotBuffers(nn.Module):
    """A module with slots: the stacked factors of its active adapters, and what of them is no such product."""

    slot_down: Tensor | None
    slot_up: Tensor | None
    slot_in_gain: Tensor | None
    slot_out_gain: Tensor | None
    slot_bias: Tensor | None
    slot_first: Tensor | None
    slot_second: Tensor | None
    slot_start: int = 0  # of the Kronecker product's rows the first that is the layer's
    slot_dense: Tensor | None

    SLOTS = (
        *("slot_down", "slot_up", "slot_in_gain", "slot_out_gain", "slot_bias"),
        *("slot_first", "slot_second", "slot_dense"),
    )

    @property
    def filled(self) -> Collection[str]:
        """The buffers that hold something."""
        return self._non_persistent_buffers_set

    def set_slot(self, slot: str, value: Tensor | None) -> None:
        """Put a buffer in a slot; empty ones are not listed, since accelerate expects a tensor behind every name."""
        self.clear_slots((slot,))
        if value is not None:
            self._buffers[slot] = value
            self._non_persistent_buffers_set.add(slot)

    def clear_slots(self, slots: Sequence[str]) -> None:
        """Empty these slots."""
        self._buffers.update(dict.fromkeys(slots))
        self._non_persistent_buffers_set.difference_update(slots)

    def take_slot(self, down: Tensor | None, up: Tensor | None) -> None:
        """Let the low-rank slot be these, or let go of it."""
        if down is None and up is None:
            self.clear_slots(("slot_down", "slot_up"))
        else:
            self.set_slot("slot_down", down)
            self.set_slot("slot_up", up)
