"""A whole adapter in another algebra or of another rank, with the error of every module."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_loaders.adapter import Adapter
from lora_loaders.checkpoints import Checkpoint, Weights, open_checkpoint
from lora_loaders.conversion import Source, read_adapter
from lora_loaders.deltas import Delta, FullDelta, LohaDelta, LokrDelta, LoraDelta, SetDelta
from lora_loaders.errors import ConversionError
from lora_loaders.families import FAMILIES, Family
from lora_loaders.lazy import FileTensor, form_of
from lora_loaders.siblings import on_weights

from .approximating import NEEDS_WEIGHTS, Approximation, Fit, Fitted, as_full, as_lora, with_record
from .goals import Goal

KERNELS = re.compile(r"(^|\.)(conv(\d|_in|_out|_depth)?|patch_embedding)$")
"""Names of the modules that have a kernel larger than 1 in every family; `conv_shortcut` has none."""
Tick = Callable[[str], None]


def resize(
    source: Source,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    conv_rank: int | None = None,
    dtype: torch.dtype | None = None,
    model: Weights | None = None,
    family: str | None = None,
    device: torch.device | str | None = None,
    on_module: Tick | None = None,
    families: Sequence[Family] = FAMILIES,
    action: str = "resize",
) -> Approximation:
    """The nearest adapter of LoRAs with smaller ranks; with no goal given, every algebra's exact LoRA.

    For a LoRA ΔW = B A this is the singular value decomposition of the product from the QR factors of both
    (Eckart and Young 1936), so ΔW is never built. Any other algebra goes through its own factors or through ΔW.

    Args:
        source: an adapter, or what `read_adapter` reads.
        rank: the rank of every module, or the most that `energy` and `error` may take.
        energy: the smallest rank that keeps this share of Σσ², for each module.
        error: the smallest rank with ‖ΔW − ΔW'‖ / ‖ΔW‖ at most this, for each module.
        conv_rank: `rank` for kernels larger than 1.
        dtype: of the factors; each module's own if None. The errors are those after this rounding.
        model: the base weights, for the algebras whose ΔW depends on them (DoRA, OFT, IA3, GLoRA, `set`).
        family: read it as this family.
        device: where to compute.
        on_module: called with the place of each module that is done.
        families: the families to tell apart; pass your own beside `FAMILIES` to add one.
        action: what the file's history calls this step.

    Raises:
        AdapterFileError: the source cannot be read.
        ConversionError: with every module that cannot be said as a LoRA of this goal; or a goal that means nothing.
    """
    goal = Goal(rank, energy, error, conv_rank)
    settings = {name: value for name, value in asdict(goal).items() if value is not None}

    def change(delta: Delta, base: Base) -> Fitted:
        return as_lora(delta, goal, base.weight, dtype, base.bias)

    adapter = read_whole(source, family, families)
    return _changed(adapter, change, action, settings, model, device, on_module, families)


def to_full(
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    model: Weights | None = None,
    family: str | None = None,
    device: torch.device | str | None = None,
    on_module: Tick | None = None,
    families: Sequence[Family] = FAMILIES,
) -> Approximation:
    """The adapter with every ΔW in full, as `[out, in, *kernel]` in this dtype (its own if None); see `resize`.

    Each ΔW is computed once for its error and again when it is written, so that memory holds one. With a live model,
    whose weights may change in between, they are kept, all of them.

    Raises:
        AdapterFileError: the source cannot be read.
        ConversionError: ΔW depends on base weights, and none were given.
    """

    def change(delta: Delta, base: Base) -> Fitted:
        return as_full(delta, base.weight, dtype, base.bias)

    adapter = read_whole(source, family, families)
    return _changed(adapter, change, "to full", {}, model, device, on_module, families)


def read_whole(source: Source, family: str | None, families: Sequence[Family]) -> Adapter:
    """An adapter of which every module's name is known.

    Raises:
        ConversionError: some are not; leaving them out would be silent loss.
    """
    adapter = read_adapter(source, family=family, families=families)
    adapter.refuse_unresolved()
    return adapter


def at_hand(delta: Delta, device: torch.device | str | None) -> Delta:
    """The delta with its numbers read, where it is to be computed."""
    return delta.map_tensors(lambda tensor: read_at(tensor, device))


def read_at(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """The numbers of a tensor that may lie in a file, on the device if one is given."""
    plain = tensor.read() if isinstance(tensor, FileTensor) else tensor
    return plain if device is None else plain.to(device)


def computed_again(made: Delta, compute: Callable[[], Tensor] | None) -> Delta:
    """The delta with a full difference left to be computed when it is written, since many make up a whole model.

    Args:
        made: any delta; what is no full difference is kept.
        compute: gives the difference once more; None where it may be another by then, so that this one is kept.
    """
    if compute is None or not isinstance(made, FullDelta) or made.diff is None or made.diff.ndim < 2:
        return at_hand(made, "cpu")
    diff = FileTensor.computed(form_of(made.diff.shape, made.diff.dtype), lambda: compute().cpu())
    return replace(made, diff=diff, bias=None if made.bias is None else made.bias.cpu())


class Base(NamedTuple):
    """Weight and bias of a module, each None where it is not known."""

    weight: Tensor | None
    bias: Tensor | None


def base_at(checkpoint: Checkpoint | None, component: str, path: str, device: torch.device | str | None = None) -> Base:
    """What a module has of its own."""
    parts = None if checkpoint is None else checkpoint.parts(component, path)
    tensors = (None, None) if parts is None else (parts.diff, parts.bias)
    return Base(*(None if tensor is None else read_at(tensor, device) for tensor in tensors))


def base_for(delta: Delta, base: Base) -> Base:
    """The module's own, a weight with zeros for inputs that only the change has (Control LoRAs).

    Raises:
        ConversionError: the change is for a weight of another shape.
    """
    shape, weight = delta.shape, base.weight
    if shape is None or weight is None or delta.fits(weight.shape):
        return base
    if -1 not in shape and weight.numel() == math.prod(shape) and (isinstance(delta, SetDelta) or not delta.needs_base):
        return base  # parameters that publishers lay out otherwise
    if len(shape) == weight.ndim == 2 and shape[0] == weight.shape[0] and shape[1] > weight.shape[1]:
        return base._replace(weight=F.pad(weight, (0, shape[1] - weight.shape[1])))
    raise ConversionError(
        f"the change is for a weight of shape {shape}, the base model's has {tuple(weight.shape)}",
        mend="Is it the model that the adapter was made for?",
    )


def sound(delta: Delta) -> Delta:
    """The delta, if all of its numbers are.

    Raises:
        ConversionError: some are NaN or infinite, from which nothing can be computed.
    """
    bad = [name for name, t in delta.tensors().items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise ConversionError(
            f"NaN or infinity in {', '.join(bad)}",
            mend="The source is damaged where it holds them itself; else its numbers are too large for this dtype: "
            "write float32 or bfloat16 (dtype=…, --dtype …).",
        )
    return delta


def _changed(
    adapter: Adapter,
    change: Callable[[Delta, Base], Fitted],
    action: str,
    settings: Mapping[str, Any],
    model: Weights | None,
    device: torch.device | str | None,
    on_module: Tick | None,
    families: Sequence[Family],
) -> Approximation:
    checkpoint = None if model is None else open_checkpoint(model, family=adapter.family, families=families)
    deltas: dict[str, dict[str, Delta]] = {}
    fits: dict[str, Fit] = {}
    problems: list[str] = []
    mends: dict[str, None] = {}
    for component, path, delta in adapter.modules():
        place = f"{component}.{path}"
        try:
            compute = partial(_made, change, checkpoint, component, path, delta, device)
            made, fits[place] = compute()
            again = partial(_diff_of, compute) if checkpoint is None or checkpoint.files else None
            deltas.setdefault(component, {})[path] = computed_again(made, again)
        except ConversionError as error:
            problems.append(f"{place}: {error.what}")
            mends[error.mend] = None
        if on_module is not None:
            on_module(place)
    if problems:
        raise ConversionError(
            f"{adapter.source} ({adapter.describe()}): {len(problems)} of its modules cannot be changed so",
            problems=problems,
            mend=" ".join(filter(None, mends)),
            state="Nothing was written.",
        )
    made_adapter = with_record(replace(adapter, deltas=deltas), fits, action, [adapter.source], settings)
    return Approximation(made_adapter, fits)


def for_embedding(made: Fitted, is_embedding: bool) -> Fitted:
    """The same change, known to be an embedding's if it is: PEFT calls the factors of one by other names."""
    if not is_embedding or not isinstance(made.delta, LoraDelta):
        return made
    return made._replace(delta=replace(made.delta, embedding=True))


def _diff_of(compute: Callable[[], Fitted]) -> Tensor:
    return compute().delta.tensors()["diff"]


def _made(
    change: Callable[[Delta, Base], Fitted],
    checkpoint: Checkpoint | None,
    component: str,
    path: str,
    delta: Delta,
    device: torch.device | str | None,
) -> Fitted:
    def weight(of: str) -> Tensor | None:
        return base_at(checkpoint, component, of, device).weight

    own = sound(at_hand(delta, device))
    if checkpoint is None:
        refuse_flat(own, path)
    base = base_for(own, base_at(checkpoint, component, path, device))
    made = change(own if checkpoint is None else on_weights(own, weight), base)
    sound(made.delta)
    return made if checkpoint is None else for_embedding(made, (component, path) in checkpoint.embeddings)


def refuse_flat(delta: Delta, path: str) -> None:
    """Raise where LyCORIS's flattened kernel is likely: the tensors do not tell it from a linear layer, names do.

    Raises:
        ConversionError: it is.
    """
    inner: Delta = getattr(delta, "inner", delta)
    if isinstance(inner, LohaDelta | LokrDelta) and len(inner.shape) == 2 and KERNELS.search(path) is not None:
        raise ConversionError(
            "the file flattens the kernel of this convolution, whose size is needed", mend=NEEDS_WEIGHTS
        )
