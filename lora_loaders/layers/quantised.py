"""Quantised weights: what each scheme stores, how that is read, and how a weight is stored in the same scheme again.

A scheme is five small functions over plain tensors, so what is fused can be rewritten and what was stored comes back to
the byte, with one way of recording it for all. The libraries are imported when one of their weights is met.
"""

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_loaders.errors import UnsupportedBaseError

STORED_ONLY = (torch.float8_e4m3fn, torch.float8_e5m2)
Stored = Mapping[str, Any]
"""Everything that a weight's value depends on: tensors, and a few plain values beside them."""


@dataclass(frozen=True)
class Scheme:
    """One way of storing a weight.

    Attributes:
        holds: whether this weight is stored so.
        stored: what a base layer stores now: the live tensors.
        dequantise: the weight that this base layer would have with that stored, in float32.
        quantise: what the base layer would store for this weight; changes nothing.
        install: puts what is stored in place, into the same memory where it fits.
        keeps_layout: whether a forward leaves the stored tensors as they are.
    """

    name: str
    holds: Callable[[Any], bool]
    stored: Callable[[Any], dict[str, Any]]
    dequantise: Callable[[Any, Stored], Tensor]
    quantise: Callable[[Any, Tensor], Stored]
    install: Callable[[Any, Stored], None]
    keeps_layout: Callable[[Any], bool] = lambda base: True


def scheme_of(base: nn.Module) -> Scheme:
    """The scheme that a base layer's weight is stored in.

    Raises:
        UnsupportedBaseError: none is known.
    """
    weight: Any = base.weight
    if weight.is_meta:
        raise unsupported(base, "is not at hand: accelerate offloads it leaf by leaf, or it has no data at all")
    for scheme in SCHEMES:
        if scheme.holds(weight):
            return scheme
    raise unsupported(base, "is in no known way of storing weights, so it cannot be read")


def unsupported(base: nn.Module, why: str) -> UnsupportedBaseError:
    """An error that names the layer's kind and what still works."""
    weight: Any = base.weight
    return UnsupportedBaseError(
        f"the weight of a {type(base).__name__}, a {type(weight).__name__} of {getattr(weight, 'dtype', '?')}, {why}",
        mend="Use the adapter unfused: the base layer keeps its weight and adds the adapter's output to its own.",
        state="No weight was changed.",
    )


def put(place: Tensor | None, value: Any) -> Any:
    """The value in the memory that is there where it fits, or the value itself."""
    if isinstance(place, Tensor) and isinstance(value, Tensor) and place is not value:
        if (place.shape, place.dtype) == (value.shape, value.dtype):
            return place.copy_(value)
        return value.to(place.device)
    return value


def _named(name: str) -> Callable[[Any], bool]:
    return lambda weight: type(weight).__name__ == name


# float8 that is cast before each forward (diffusers' `enable_layerwise_casting`)


def _quantise_cast(base: Any, weight: Tensor) -> Stored:
    limit = torch.finfo(base.weight.dtype).max  # beyond it torch's cast gives NaN
    return {"weight": weight.clamp(-limit, limit).to(base.weight.dtype)}


CAST = Scheme(
    "float8 storage",
    holds=lambda weight: type(weight) in (Tensor, nn.Parameter) and weight.dtype in STORED_ONLY,
    stored=lambda base: {"weight": base.weight.detach()},
    dequantise=lambda base, stored: stored["weight"].float(),
    quantise=_quantise_cast,
    install=lambda base, stored: put(base.weight.detach(), stored["weight"]),
)

# bitsandbytes, 8 bits: W = codes · scale of the row / 127 (https://arxiv.org/abs/2208.07339)


def _stored_int8(base: Any) -> dict[str, Any]:
    scales = base.weight.SCB if base.weight.SCB is not None else base.state.SCB
    return {"codes": base.weight.data, "scales": scales}


def _quantise_int8(base: Any, weight: Tensor) -> Stored:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    return {"codes": codes, "scales": scales}


def _install_int8(base: Any, stored: Stored) -> None:
    present = _stored_int8(base)
    put(present["codes"], stored["codes"])
    put(present["scales"], stored["scales"])
    if base.state.CB is not None and base.state.CB.data_ptr() != base.weight.data_ptr():
        put(base.state.CB, stored["codes"])


INT8 = Scheme(
    "bitsandbytes 8-bit",
    holds=lambda weight: type(weight).__name__ == "Int8Params" and weight.dtype == torch.int8,
    stored=_stored_int8,
    dequantise=lambda base, stored: stored["codes"].float() * stored["scales"].float().unsqueeze(1) / 127,
    quantise=_quantise_int8,
    install=_install_int8,
)

# bitsandbytes, 4 bits (nf4, fp4; https://arxiv.org/abs/2305.14314): codes, and a state with the scales of the blocks,
# which may be quantised themselves by a nested state.

STATE, NESTED = "state.", "state2."


def _stored_4bit(base: Any) -> dict[str, Any]:
    state = vars(base.weight.quant_state)
    nested = state.get("state2")
    stored = {"codes": base.weight.data, **{STATE + name: v for name, v in state.items() if name != "state2"}}
    return stored | {NESTED + name: v for name, v in (vars(nested) if nested is not None else {}).items()}


def _state_4bit(base: Any, stored: Stored) -> Any:
    state = copy.copy(base.weight.quant_state)
    vars(state).clear()
    vars(state).update({name.removeprefix(STATE): v for name, v in stored.items() if name.startswith(STATE)})
    nested = {name.removeprefix(NESTED): v for name, v in stored.items() if name.startswith(NESTED)}
    state.state2 = None
    if nested:
        state.state2 = copy.copy(state)
        vars(state.state2).clear()
        vars(state.state2).update(nested)
    return state


def _dequantise_4bit(base: Any, stored: Stored) -> Tensor:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    codes, state = stored["codes"], _state_4bit(base, stored)
    if getattr(state, "packing_format_for_cpu", False):
        # The first forward on some CPUs lays the codes out anew and rounds the scales to bfloat16.
        state.original_nested = False
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax = state.absmax.t().reshape(-1).float()
    state.dtype = torch.float32
    return functional.dequantize_4bit(codes, state)


def _quantise_4bit(base: Any, weight: Tensor) -> Stored:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    present = base.weight.quant_state
    codes, state = functional.quantize_4bit(
        weight,
        blocksize=present.blocksize,
        compress_statistics=getattr(present, "original_nested", present.nested),
        quant_type=present.quant_type,
        quant_storage=base.weight.quant_storage,
    )
    state.dtype = getattr(present, "original_dtype", present.dtype)
    stored = {"codes": codes, **{STATE + name: v for name, v in vars(state).items() if name != "state2"}}
    return stored | {NESTED + name: v for name, v in (vars(state.state2) if state.nested else {}).items()}


def _install_4bit(base: Any, stored: Stored) -> None:
    present = _stored_4bit(base)
    settled = {name: put(present.get(name), value) for name, value in stored.items()}
    if settled["codes"] is not present["codes"]:
        base.weight.data = settled["codes"]
    state = base.weight.quant_state
    fresh = vars(_state_4bit(base, settled))
    vars(state).clear()
    vars(state).update(fresh)


FOUR_BIT = Scheme(
    "bitsandbytes 4-bit",
    holds=lambda weight: type(weight).__name__ == "Params4bit" and getattr(weight, "quant_state", None) is not None,
    stored=_stored_4bit,
    dequantise=_dequantise_4bit,
    quantise=_quantise_4bit,
    install=_install_4bit,
    keeps_layout=lambda base: base.weight.device.type != "cpu",
)

# GGUF: rows of blocks of bytes, as diffusers' GGUFLinear holds them


def _dequantise_gguf(base: Any, stored: Stored) -> Tensor:
    library: Any = importlib.import_module("diffusers.quantizers.gguf.utils")
    parameter = library.GGUFParameter(stored["bytes"], quant_type=base.weight.quant_type)
    return library.dequantize_gguf_tensor(parameter).float()


def _quantise_gguf(base: Any, weight: Tensor) -> Stored:
    quants: Any = importlib.import_module("gguf.quants")
    kind = base.weight.quant_type
    try:
        blocks = quants.quantize(weight.cpu().numpy(), kind)
    except NotImplementedError as error:
        raise unsupported(base, f"is stored as {kind.name}, which the gguf package can read but not write") from error
    return {"bytes": torch.from_numpy(blocks).view(base.weight.dtype).to(weight.device)}


GGUF = Scheme(
    "GGUF",
    holds=_named("GGUFParameter"),
    stored=lambda base: {"bytes": base.weight.as_tensor().detach()},
    dequantise=_dequantise_gguf,
    quantise=_quantise_gguf,
    install=lambda base, stored: put(base.weight.as_tensor().detach(), stored["bytes"]),
)

# Tensor subclasses (torchao, quanto): a tree of plain tensors; only storing anew differs from class to class


def _leaves(tensor: Any, prefix: str = "") -> dict[str, Tensor]:
    """The plain tensors that a tensor subclass is made of, by path."""
    leaves: dict[str, Tensor] = {}
    for name in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, name)
        path = prefix + name
        leaves |= _leaves(inner, f"{path}.") if _is_subclass(inner) else {path: inner}
    return leaves


def _is_subclass(tensor: Any) -> bool:
    return hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (Tensor, nn.Parameter)


def _with_leaves(tensor: Any, leaves: Stored, prefix: str = "") -> Any:
    """A tensor of the same class over other plain tensors."""
    names, context = tensor.__tensor_flatten__()
    inner: dict[str, Any] = {}
    for name in names:
        own, path = getattr(tensor, name), prefix + name
        inner[name] = _with_leaves(own, leaves, f"{path}.") if _is_subclass(own) else leaves[path]
    return type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())


def _dequantise_subclass(base: Any, stored: Stored) -> Tensor:
    weight = _with_leaves(base.weight, stored)
    if type(weight).__name__ == "Int8Tensor":
        return weight.dequantize(torch.float32)  # its layers scale the product in float32
    if type(weight).dequantize is not Tensor.dequantize:  # which is for torch's own quantised tensors
        return weight.dequantize().float()
    # Kernels' own layouts give their weight away only by multiplying with it.
    ones = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return F.linear(ones, weight).t().float()


def _quantise_subclass(base: Any, weight: Tensor) -> Stored:
    present = base.weight
    make = REQUANTISERS.get(type(present).__name__)
    if make is None:
        raise unsupported(base, "is of a class whose way of quantising is not known here")
    if getattr(present, "act_pre_scale", None) is not None:
        raise unsupported(base, "is scaled along its inputs for its activations (AWQ, SmoothQuant)")
    return _leaves(make(base, present, weight))


def _install_subclass(base: Any, stored: Stored) -> None:
    for name, place in _leaves(base.weight).items():
        place.copy_(stored[name])


def _per_block(block: Any) -> Any:
    granularity: Any = importlib.import_module("torchao.quantization.granularity")
    return granularity.PerBlock(tuple(block))


def _mapping(present: Any) -> dict[str, Any]:
    primitives: Any = importlib.import_module("torchao.quantization.quant_primitives")
    shifted = present.zero_point is not None and bool(present.zero_point.any())
    return {"mapping_type": primitives.MappingType.ASYMMETRIC if shifted else primitives.MappingType.SYMMETRIC}


def _int8_tensor(base: Any, present: Any, weight: Tensor) -> Any:
    reduced = bool(present.reduce_range)
    return type(present).from_hp(weight, _per_block(present.block_size), **_mapping(present), reduce_range=reduced)


def _float8_tensor(base: Any, present: Any, weight: Tensor) -> Any:
    inference: Any = importlib.import_module("torchao.quantization.quantize_.common")
    return type(present).from_hp(
        weight,
        float8_dtype=present.qdata.dtype,
        granularity=_per_block(present.block_size),
        kernel_preference=inference.KernelPreference.TORCH,
    )


def _intx_tensor(base: Any, present: Any, weight: Tensor) -> Any:
    whole = weight.to(present.dtype)
    return type(present).from_hp(whole, present.block_size, present.target_dtype, **_mapping(present))


def _int4_tensor(base: Any, present: Any, weight: Tensor) -> Any:
    named = {"activation_dtype": present.activation_dtype} if hasattr(present, "activation_dtype") else {}
    return type(present).from_hp(weight.to(present.dtype), list(present.block_size), **named)


def _quanto(base: Any, present: Any, weight: Tensor) -> Any:
    quanto: Any = importlib.import_module("optimum.quanto")
    group = getattr(present, "_group_size", None)
    whole = weight.to(present.dtype)
    if present.qtype.bits == 8:
        scale, rest = base.optimizer(whole, qtype=present.qtype, axis=0), {}
    else:
        scale, shift = base.optimizer(whole, qtype=present.qtype, axis=0, group_size=group)
        rest = {"shift": shift, "group_size": group}
    return quanto.quantize_weight(whole, present.qtype, 0, scale, activation_qtype=base.activation_qtype, **rest)


REQUANTISERS: Mapping[str, Callable[[Any, Any, Tensor], Any]] = {
    "Int8Tensor": _int8_tensor,
    "Float8Tensor": _float8_tensor,
    "IntxUnpackedToInt8Tensor": _intx_tensor,
    "Int4Tensor": _int4_tensor,
    "Int4TilePackedTo4dTensor": _int4_tensor,
    "Int4PreshuffledTensor": _int4_tensor,
    "Int4PlainInt32Tensor": _int4_tensor,
    "WeightQBytesTensor": _quanto,
    "MarlinF8QBytesTensor": _quanto,
    "WeightQBitsTensor": _quanto,
    "TinyGemmWeightQBitsTensor": _quanto,
    "AWQWeightQBitsTensor": _quanto,
}
SUBCLASS = Scheme(
    "tensor subclass",
    # A DTensor is a tree of tensors too, but it is spread out, not quantised.
    holds=lambda weight: _is_subclass(weight) and type(weight).__name__ != "DTensor",
    stored=lambda base: dict(_leaves(base.weight)),
    dequantise=_dequantise_subclass,
    quantise=_quantise_subclass,
    install=_install_subclass,
)

SCHEMES: tuple[Scheme, ...] = (CAST, INT8, FOUR_BIT, GGUF, SUBCLASS)
