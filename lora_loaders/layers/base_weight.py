"""Reading and writing a base layer's weight: the one seam to quantised weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_loaders.errors import AdapterStateError

from .held import held, parameter_of
from .quantised import STORED_ONLY, Stored, scheme_of

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
COMPUTED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def logical_shape(base: nn.Module) -> tuple[int, ...]:
    """Shape of the weight as the layer computes with it, whatever its storage is packed into."""
    if isinstance(base, nn.Linear):
        return (base.out_features, base.in_features)
    return tuple(base.weight.shape)  # pyright: ignore[reportReturnType, reportArgumentType]


def is_plain(base: nn.Module) -> bool:
    """Whether the weight is an ordinary floating tensor of its logical shape, read and written as it is."""
    weight = parameter_of(base, "weight")
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.is_floating_point()
        and weight.dtype not in STORED_ONLY
        and tuple(weight.shape) == logical_shape(base)
    )


def read_weight(base: nn.Module) -> Tensor:
    """The base weight as the layer computes with it: the tensor itself, or a quantised one's value in float32.

    Raises:
        UnsupportedBaseError: it is stored in no known way.
    """
    if is_plain(base):
        return held(base, "weight").detach()
    scheme = scheme_of(base)
    return scheme.dequantise(base, scheme.stored(base))


@dataclass(frozen=True)
class Places:
    """Where a stored tensor differed from what replaced it, and what stood there."""

    where: Tensor
    values: Tensor


@dataclass(frozen=True)
class Record:
    """What a quantised layer stored before it was rewritten, each part whole or as the places that differ.

    Attributes:
        parts: name of the stored part -> its value, or the places in which it differed from the new one.
        checksums: name -> sum of the original's bit patterns, for those that are kept as places.
    """

    parts: Stored
    checksums: dict[str, Tensor]

    def original(self, base: nn.Module) -> dict[str, Any]:
        """What the base layer stored before.

        Raises:
            AdapterStateError: what it stores now is not what was written over it.
        """
        present = scheme_of(base).stored(base)
        return {
            name: self._restored(name, part, present[name]) if isinstance(part, Places) else part
            for name, part in self.parts.items()
        }

    def _restored(self, name: str, part: Places, present: Tensor) -> Tensor:
        flat = bits_of(present).clone()
        flat[part.where.long().to(flat.device)] = part.values.to(flat.device)
        if not torch.equal(flat.sum(dtype=torch.int64).to(part.values.device), self.checksums[name]):
            raise AdapterStateError(
                "a fused weight is not what fusing left: it was changed, cast or quantised again since",
                mend="Load the model's own weights again.",
                state="Nothing was unfused.",
            )
        return flat.view(present.dtype).view(present.shape)

    def memory(self) -> int:
        """Bytes that are kept."""
        parts = ((part.where, part.values) if isinstance(part, Places) else (part,) for part in self.parts.values())
        return sum(tensor.nbytes for part in parts for tensor in part if isinstance(tensor, Tensor))


def bits_of(tensor: Tensor) -> Tensor:
    """A tensor's elements as integers in one row: -0.0 differs from 0.0, and NaN equals itself."""
    return tensor.contiguous().view(BITS[tensor.element_size()]).view(-1)


def rewrite(base: nn.Module, weight: Tensor) -> Record:
    """Store another weight in a quantised layer, in its own scheme.

    Returns:
        What `restore` needs to put back every byte.

    Raises:
        UnsupportedBaseError: the scheme cannot be written; nothing is changed then.
    """
    scheme = scheme_of(base)
    new = scheme.quantise(base, weight)
    before = {n: v.clone() if isinstance(v, Tensor) else v for n, v in scheme.stored(base).items()}
    scheme.install(base, new)
    if not scheme.keeps_layout(base):
        return Record(before, {})
    after = scheme.stored(base)
    parts = {name: _smaller(value, after.get(name)) for name, value in before.items()}
    return Record(
        parts, {n: bits_of(before[n]).sum(dtype=torch.int64) for n, part in parts.items() if isinstance(part, Places)}
    )


def _smaller(before: Any, after: Any) -> Any:
    """The value, or where and how it differs from what came after, if that takes less memory."""
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return before
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        return before
    old = bits_of(before)
    where = (old != bits_of(after)).nonzero().squeeze(1)
    if where.numel() * (4 + before.element_size()) >= before.nbytes or before.numel() >= 2**31:
        return before
    return Places(where.int(), old[where])


def restore(base: nn.Module, record: Record) -> None:
    """Put back what a record holds, byte for byte.

    Raises:
        AdapterStateError: the layer no longer stores what was written over it; nothing is changed then.
    """
    scheme_of(base).install(base, record.original(base))


def read_original(base: nn.Module, record: Record) -> Tensor:
    """The weight that a record would restore, in float32."""
    return scheme_of(base).dequantise(base, record.original(base))


def adapter_dtype(base: nn.Module) -> torch.dtype:
    """The floating dtype that adapters of this layer are kept in: the one the layer computes in."""
    hooks: Any = getattr(base, "_diffusers_hook", None)
    casting = hooks.get_hook("layerwise_casting") if hooks is not None else None
    weight: Any = getattr(base, "weight", None)
    state: Any = getattr(weight, "quant_state", None)  # bitsandbytes' 4-bit weights
    sources = (
        getattr(casting, "compute_dtype", None),
        getattr(weight, "dtype", None),
        getattr(state, "original_dtype", getattr(state, "dtype", None)),
        getattr(base, "compute_dtype", None),
        getattr(getattr(base, "bias", None), "dtype", None),
    )
    for dtype in sources:
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype not in STORED_ONLY:
            return dtype
    return torch.get_default_dtype()


def adapter_device(base: nn.Module) -> torch.device | None:
    """Where adapters of this layer live; None where the base is on no real device (offloaded to meta)."""
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta:
        return None
    return weight.device


def adapter_place(base: nn.Module) -> tuple[torch.device | None, torch.dtype]:
    """`adapter_device` and `adapter_dtype` of a layer."""
    weight = base._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
    # Nearly every layer; attributes of modules are slow to look up, and a switch asks each layer.
    if weight is not None and weight.dtype in COMPUTED and not weight.is_meta and "_diffusers_hook" not in vars(base):
        return weight.device, weight.dtype
    return adapter_device(base), adapter_dtype(base)
