"""Reading and writing a base layer's weight: the one seam to quantised and sharded weights."""

import torch
from torch import Tensor, nn

from lora_loaders.errors import UnsupportedBaseError

STORED_ONLY = (torch.float8_e4m3fn, torch.float8_e5m2)


def logical_shape(base: nn.Module) -> tuple[int, ...]:
    """Shape of the weight as the layer computes with it, whatever its storage is packed into."""
    if isinstance(base, nn.Linear):
        return (base.out_features, base.in_features)
    return tuple(base.weight.shape)  # pyright: ignore[reportReturnType, reportArgumentType]


def is_plain(base: nn.Module) -> bool:
    """Whether the weight is an ordinary floating tensor of its logical shape, read and written as it is."""
    weight = base.weight
    return (
        isinstance(weight, Tensor)
        and type(weight) in (Tensor, nn.Parameter)
        and weight.is_floating_point()
        and weight.dtype not in STORED_ONLY
        and tuple(weight.shape) == logical_shape(base)
    )


def read_weight(base: nn.Module) -> Tensor:
    """The base weight as the layer computes with it.

    Raises:
        UnsupportedBaseError: a packed or quantised weight.
    """
    if not is_plain(base):
        raise UnsupportedBaseError(
            f"{type(base).__name__} keeps its weight as {type(base.weight).__name__} of "
            f"{getattr(base.weight, 'dtype', '?')}, which cannot be read as a plain tensor",
            mend="Use the adapter unfused; only plain low-rank adapters work on such a layer.",
        )
    weight = base.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def adapter_dtype(base: nn.Module) -> torch.dtype:
    """The floating dtype that adapters of this layer are kept in: the one the layer computes in."""
    for tensor in (getattr(base, "weight", None), getattr(base, "bias", None)):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype not in STORED_ONLY:
            return tensor.dtype
    declared = getattr(base, "compute_dtype", None)
    return declared if isinstance(declared, torch.dtype) else torch.get_default_dtype()


def adapter_device(base: nn.Module) -> torch.device | None:
    """Where adapters of this layer live; None where the base is on no real device (offloaded to meta)."""
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta:
        return None
    return weight.device
