"""IA3: ΔW scales rows or columns of the weight (https://arxiv.org/abs/2205.05638; LyCORIS)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lora_loaders.errors import ConversionError, MalformedAdapterError

from .base import Delta, Factors, RowMap, Slots, computing, join_biases, same


@dataclass(frozen=True, eq=False, kw_only=True)
class Ia3Delta(Delta):
    """ΔW = weight ∘ W, over columns (`on_input`) or rows; the bias stays as it is, as LyCORIS leaves it.

    Attributes:
        weight: gains less 1, `[in]` or `[out]`; for a convolution `[1, in or out, 1, …]` either way.
        on_input: the gains are those of the inputs.
    """

    kind: ClassVar[str] = "ia3"

    weight: Tensor
    on_input: bool

    @classmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """See `Delta.from_slots`; without data (a meta tensor) the flag reads as False."""
        flag = slots["on_input"]
        if flag.numel() != 1:
            raise MalformedAdapterError(f"on_input has {flag.numel()} values, one was expected")
        return cls(weight=slots["weight"], on_input=not flag.is_meta and bool(flag.item()), bias=slots.get("bias"))

    def slots(self) -> dict[str, Tensor]:
        """See `Delta.slots`."""
        return {**self.tensors(), "on_input": torch.tensor(int(self.on_input))}

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Delta.shape`; the other side is not known."""
        size = self.weight.numel()
        return (-1, size) if self.on_input else (size, -1)

    @property
    def needs_base(self) -> bool:
        """See `Delta.needs_base`."""
        return True

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """See `Delta.delta_weight`."""
        base = _given(base_weight)
        gains = [1] * base.ndim
        gains[1 if self.on_input else 0] = -1
        return computing(self.weight).view(gains) * base

    def factors(self, base_weight: Tensor | None = None) -> Factors:
        """A gain beside a product of rank 0."""
        base = _given(base_weight)
        gain = computing(self.weight).flatten()
        down, up = gain.new_zeros(0, *base.shape[1:]), gain.new_zeros(base.shape[0], 0)
        return Factors(down, up, in_gain=gain) if self.on_input else Factors(down, up, out_gain=gain)

    def map_rows(self, change: RowMap) -> Self:
        """See `Delta.map_rows`; gains of the inputs are the same for all rows."""
        part = super().map_rows(change)
        if self.on_input:
            return part
        axis = self.weight.shape.index(self.weight.numel())
        return replace(part, weight=change(self.weight.transpose(0, axis)).transpose(0, axis))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> "Ia3Delta":
        """See `Delta.join`: gains of rows, or the same gains of the inputs."""
        first, bias = parts[0], join_biases(parts)
        if not any(part.on_input for part in parts):
            axis = first.weight.shape.index(first.weight.numel())
            return replace(first, weight=torch.cat([part.weight for part in parts], axis), bias=bias)
        if not all(part.on_input and same(part.weight, first.weight) for part in parts):
            raise ConversionError("gains of the inputs of separate modules cannot become one fused module's")
        return replace(first, bias=bias)


@dataclass(frozen=True, eq=False, kw_only=True)
class GainDelta(Delta):
    """ΔW = (ia3_l − 1) ∘ W, PEFT's IA3: gains of the inputs, or of the outputs with their bias.

    Attributes:
        ia3_l: `[1, in]`, `[out, 1]`, or for a convolution `[1, in or out, 1, …]`.
        on_input: which of the two; None where neither the shape nor PEFT's configuration (`feedforward_modules`)
            says it.
    """

    kind: ClassVar[str] = "gain"

    ia3_l: Tensor
    on_input: bool | None = None

    @classmethod
    def from_slots(cls, slots: Slots, alpha: float | None) -> Self:
        """See `Delta.from_slots`."""
        gains = slots["ia3_l"]
        return cls(ia3_l=gains, on_input=gains.shape[0] == 1 if gains.ndim == 2 else None, bias=slots.get("bias"))

    def slots(self) -> dict[str, Tensor]:
        """See `Delta.slots`."""
        return self.tensors()

    @property
    def absolute(self) -> Collection[str]:
        """See `Delta.absolute`."""
        return ("ia3_l",)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Delta.shape`; the other side is not known."""
        size = self.ia3_l.numel()
        return (-1, -1) if self.on_input is None else (-1, size) if self.on_input else (size, -1)

    def fits(self, weight_shape: Sequence[int]) -> bool:
        """See `Delta.fits`; where both sides are possible, neither is a guess worth making."""
        if self.on_input is None:
            return [size == self.ia3_l.numel() for size in weight_shape[:2]].count(True) == 1
        if self.on_input and len(weight_shape) > 2:
            groups, rest = divmod(self.ia3_l.numel(), weight_shape[1])
            return not rest and groups > 0 and weight_shape[0] % groups == 0
        return super().fits(weight_shape)

    def input_groups(self, weight_shape: Sequence[int]) -> int:
        """See `Delta.input_groups`."""
        return self.ia3_l.numel() // weight_shape[1] if self.on_input and len(weight_shape) > 2 else 1

    @property
    def needs_base(self) -> bool:
        """See `Delta.needs_base`."""
        return True

    def _gains_input(self, base: Tensor) -> bool:
        return base.shape[0] != self.ia3_l.numel() if self.on_input is None else self.on_input

    def delta_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """See `Delta.delta_weight`."""
        base = _given(base_weight)
        gains = computing(self.ia3_l).flatten() - 1
        if self._gains_input(base):
            return (
                _of_groups(gains, base.shape[0], base.shape[1]).view(-1, base.shape[1], *[1] * (base.ndim - 2)) * base
            )
        return gains.view(-1, *[1] * (base.ndim - 1)) * base

    def delta_bias(self, base_bias: Tensor | None = None) -> Tensor | None:
        """The bias of the outputs has their gain too."""
        gains = computing(self.ia3_l).flatten() - 1
        if base_bias is None or self.on_input or base_bias.shape != gains.shape:
            return self.bias
        change = gains.to(base_bias.device) * computing(base_bias)
        return change if self.bias is None else change + self.bias

    def factors(self, base_weight: Tensor | None = None) -> Factors:
        """A gain beside a product of rank 0."""
        base = _given(base_weight)
        gain = computing(self.ia3_l).flatten() - 1
        down, up = gain.new_zeros(0, *base.shape[1:]), gain.new_zeros(base.shape[0], 0)
        gains_input = self._gains_input(base)
        return Factors(down, up, in_gain=gain) if gains_input else Factors(down, up, out_gain=gain)

    def map_rows(self, change: RowMap) -> Self:
        """See `Delta.map_rows`; gains of the inputs are the same for all rows.

        Raises:
            ConversionError: nothing says whether these are gains of rows.
        """
        if self.on_input is None:
            raise ConversionError("nothing in this file says whether its gains are those of inputs or of outputs")
        part = super().map_rows(change)
        if self.on_input:
            return part
        axis = self.ia3_l.shape.index(self.ia3_l.numel())
        return replace(part, ia3_l=change(self.ia3_l.transpose(0, axis)).transpose(0, axis))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> "GainDelta":
        """See `Delta.join`: gains of rows, or the same gains of the inputs."""
        first, bias = parts[0], join_biases(parts)
        if all(part.on_input is False for part in parts):
            axis = first.ia3_l.shape.index(first.ia3_l.numel())
            return replace(first, ia3_l=torch.cat([part.ia3_l for part in parts], axis), bias=bias)
        if not all(part.on_input and same(part.ia3_l, first.ia3_l) for part in parts):
            raise ConversionError("gains of the inputs of separate modules cannot become one fused module's")
        return replace(first, bias=bias)


def _of_groups(gains: Tensor, rows: int, columns: int) -> Tensor:
    """Gains of all inputs as the columns of a grouped convolution's rows `[1 or out, in / groups]`."""
    groups = gains.numel() // columns
    return gains.view(1, -1) if groups == 1 else gains.view(groups, columns).repeat_interleave(rows // groups, 0)


def _given(base_weight: Tensor | None) -> Tensor:
    if base_weight is None:
        raise ConversionError("a gain's ΔW depends on the weight it scales: pass base_weight")
    return computing(base_weight)
