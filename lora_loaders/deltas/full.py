"""Full differences, replaced values, and changes of a bias alone."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lora_loaders.errors import ConversionError, MalformedAdapterError

from .base import Delta, Slots, computing, join_biases


@dataclass(frozen=True, eq=False, kw_only=True)
class FullDelta(Delta):
    """ΔW = diff, of any shape, a norm's `[features]` included.

    Attributes:
        diff: the difference, or None where only the bias changes.
        norm: whether the file spells it as a norm's difference (`w_norm`, `b_norm`), kept for writing it back.
        modulation: whether the file spells it as the difference of a block's modulation parameter (`diff_m`, LightX2V).
    """

    kind: ClassVar[str] = "full"
    row_fields: ClassVar[tuple[str, ...]] = ("diff",)

    diff: Tensor | None = None
    norm: bool = False
    modulation: bool = False

    @classmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """See `Delta.from_slots`."""
        if "diff_m" in slots:
            return cls(diff=slots["diff_m"], modulation=True)
        norm = "w_norm" in slots or "b_norm" in slots
        if norm and ("diff" in slots or "bias" in slots):
            raise MalformedAdapterError(
                "a norm difference (w_norm, b_norm) and a full difference (diff, diff_b) for one module"
            )
        diff, bias = (slots.get("w_norm"), slots.get("b_norm")) if norm else (slots.get("diff"), slots.get("bias"))
        return cls(diff=diff, bias=bias, norm=norm)

    def slots(self) -> dict[str, Tensor]:
        """See `Delta.slots`."""
        names = {"diff": "w_norm", "bias": "b_norm"} if self.norm else {"diff": "diff_m"} if self.modulation else {}
        return {names.get(name, name): tensor for name, tensor in self.tensors().items()}

    @property
    def shape(self) -> tuple[int, ...] | None:
        """See `Delta.shape`."""
        return None if self.diff is None else tuple(self.diff.shape)

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """See `Delta.delta_weight`; zeros of the base's shape where only the bias changes."""
        if self.diff is not None:
            return computing(self.diff)
        if base_weight is None:
            raise ConversionError(
                "this delta changes a bias alone: its ΔW is zero in the shape of the base weight, which is needed"
            )
        return torch.zeros(base_weight.shape, device=base_weight.device)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> "FullDelta":
        """See `Delta.join`."""
        diffs = [part.diff for part in parts if part.diff is not None]
        if diffs and len(diffs) < len(parts):
            raise ConversionError("some parts of a fused module change the weight and some only the bias")
        bias = join_biases(parts)
        return cls(
            diff=torch.cat(diffs) if diffs else None, bias=bias, norm=parts[0].norm, modulation=parts[0].modulation
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class SetDelta(Delta):
    """W' = value: the weight is replaced (BFL control files do this to norms, ComfyUI calls it `set_weight`)."""

    kind: ClassVar[str] = "set"
    row_fields: ClassVar[tuple[str, ...]] = ("value",)

    value: Tensor

    @classmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """See `Delta.from_slots`."""
        return cls(value=slots["set_weight"], bias=slots.get("bias"))

    def slots(self) -> dict[str, Tensor]:
        """See `Delta.slots`."""
        return {{"value": "set_weight"}.get(name, name): tensor for name, tensor in self.tensors().items()}

    @property
    def absolute(self) -> Collection[str]:
        """See `Delta.absolute`."""
        return ("value",)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Delta.shape`."""
        return tuple(self.value.shape)

    @property
    def needs_base(self) -> bool:
        """See `Delta.needs_base`."""
        return True

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """`value - W`."""
        if base_weight is None:
            raise ConversionError("a replaced weight has a ΔW only against the weight it replaces: pass base_weight")
        return computing(self.value).reshape(base_weight.shape) - computing(base_weight)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> "SetDelta":
        """See `Delta.join`."""
        bias = join_biases(parts)
        return cls(value=torch.cat([part.value for part in parts]), bias=bias)
