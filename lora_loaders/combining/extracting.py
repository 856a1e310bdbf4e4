"""The difference of two models as an adapter, one weight at a time."""

import ctypes
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lora_loaders.adapter import Adapter
from lora_loaders.checkpoints import Checkpoint, Weights, open_checkpoint
from lora_loaders.deltas import Delta, FullDelta
from lora_loaders.deltas.base import computing
from lora_loaders.errors import UNTOUCHED, AdapterMismatchError, ConversionError
from lora_loaders.families import FAMILIES, Family

from .approximating import Approximation, Fit, Fitted, as_full, as_lokr, as_lora, with_record
from .goals import UNREAD, Goal
from .resizing import Tick, computed_again, for_embedding, read_at, sound

Algebra = Literal["lora", "lokr", "full"]
SMALL = "a vector (a bias or a norm): pass vectors=… to keep it"


@dataclass
class _Extraction:
    """What is gathered while two models are compared."""

    deltas: dict[str, dict[str, Delta]] = field(default_factory=dict[str, dict[str, Delta]])
    fits: dict[str, Fit] = field(default_factory=dict[str, Fit])
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    problems: list[str] = field(default_factory=list[str])
    mends: dict[str, None] = field(default_factory=dict[str, None])


def extract(
    tuned: Weights,
    base: Weights,
    *,
    algebra: Algebra = "lora",
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    conv_rank: int | None = None,
    factor: int = -1,
    vectors: bool = False,
    dtype: torch.dtype = torch.float16,
    family: str | None = None,
    component: str | None = None,
    device: torch.device | str | None = None,
    on_module: Tick | None = None,
    families: Sequence[Family] = FAMILIES,
) -> Approximation:
    """What a tuned model has learned, as an adapter for the model it was tuned from: ΔW = W_tuned − W_base.

    Weights stay in their files and are read pair by pair, so that memory holds one pair and the adapter; a `full`
    difference of two models in files is computed once for its error and again when it is written. With a live model,
    whose weights may change in between, all of it is kept. Small ranks come from a sketch (see `truncating.of_matrix`).
    Modules that are equal in both are not in the adapter.

    Args:
        tuned: the changed model: a pipeline's or model's folder, a checkpoint under diffusers' or its publisher's
            names, or a live model, whose fused adapters count.
        base: the model it was made from, in any of these forms.
        algebra: `lora`; `lokr` for the nearest Kronecker product; `full` for ΔW itself, which has no goal.
        rank: rank of each module; of w2 for `lokr`. For `lora` it, `energy` or `error` must be given.
        energy: the smallest rank that keeps this share of Σσ².
        error: the smallest rank with ‖ΔW − ΔW'‖ / ‖ΔW‖ at most this.
        conv_rank: `rank` for kernels larger than 1.
        factor: largest size of w1 for `lokr`; -1 for sizes next to the square root.
        vectors: keep changes of biases and norms too, in full; some formats have no words for them.
        dtype: of the adapter.
        family: the family, where names alone do not tell it.
        component: what adapters call a lone model, if its class does not tell.
        device: where to compute.
        on_module: called with the place of each module that is done.
        families: the families to tell apart; pass your own beside `FAMILIES` to add one.

    Raises:
        AdapterFileError: one of the two cannot be read as a checkpoint.
        AdapterMismatchError: the two have no module in common, or none that differs.
        ConversionError: no such algebra; a goal that means nothing, or nothing to this algebra; no data in one of the
            two; or, with every module, NaN or infinity, numbers that are too large for the adapter's dtype, or a bound
            that no Kronecker product reaches.
        UnsupportedBaseError: a live model stores weights in no known way.
    """
    goal = Goal(rank, energy, error, conv_rank)
    _check_settings(algebra, goal, factor)
    options = {"family": family, "component": component}
    new, old = (open_checkpoint(side, families=families, **options) for side in (tuned, base))

    def say(delta: FullDelta) -> Fitted:
        sound(delta)
        if algebra == "full":
            made = as_full(delta, dtype=dtype)
        else:
            made = as_lora(delta, goal, dtype=dtype) if algebra == "lora" else as_lokr(delta, goal, factor, dtype)
        sound(made.delta)
        return made

    def diff(part: str, path: str) -> Tensor:
        one, other = (side.weights.deltas[part][path].tensors()["diff"] for side in (new, old))
        return _subtracted(one, other, device).to(dtype)

    is_lasting = bool(new.files and old.files)
    found = _Extraction()
    for part, path, delta in new.weights.modules():
        place = f"{part}.{path}"
        other = old.parts(part, path)
        change = _difference(delta, other, place, vectors, found, device)
        if change is not None:
            try:
                is_embedding = any((part, path) in side.embeddings for side in (new, old))
                made, found.fits[place] = for_embedding(say(change), is_embedding)
                again = partial(diff, part, path) if is_lasting else None
                found.deltas.setdefault(part, {})[path] = computed_again(made, again)
            except ConversionError as problem:
                found.problems.append(f"{place}: {problem.what}")
                found.mends[problem.mend] = None
        if on_module is not None:
            on_module(place)
    for part, path, _ in old.weights.modules():
        if new.parts(part, path) is None:
            # A part that is missing as a whole is one fact, not one for each of its modules.
            place = f"{part}.{path}" if new.weights.deltas.get(part) else part
            found.left_out[place] = "only the base model has it"
    _check(found, new, old)
    settings = {"algebra": algebra, **{name: value for name, value in asdict(goal).items() if value is not None}}
    sources = [str(file) for side in (new, old) for file in side.files or (side.label,)]
    known = new.weights.family or old.weights.family
    adapter = Adapter(found.deltas, family=known, source=f"the difference of {new.label} and {old.label}")
    return Approximation(with_record(adapter, found.fits, "extract", sources, settings), found.fits, found.left_out)


def _check_settings(algebra: str, goal: Goal, factor: int) -> None:
    names = get_args(Algebra)
    what, mend = "", ""
    if algebra not in names:
        what, mend = f"no algebra {algebra!r} for a difference", f"There are {', '.join(names)}."
    elif algebra == "full" and goal != Goal():
        what, mend = "a full difference loses nothing, so that no rank, energy or error goes with it", "Leave it out."
    elif algebra != "lokr" and factor != -1:
        what, mend = f"factor={factor} is for lokr, {algebra} has no Kronecker product", "Leave it out."
    elif factor < 1 and factor != -1:
        what, mend = f"factor={factor}: w1 has a size of at least 1, or -1 for one next to the square root", ""
    if what:
        raise ConversionError(what, mend=mend, state=UNREAD)
    if algebra == "lora":
        goal.require_loss()


def _difference(
    delta: Delta,
    other: FullDelta | None,
    place: str,
    vectors: bool,
    found: _Extraction,
    device: torch.device | str | None,
) -> FullDelta | None:
    """What changed in one module, None if nothing did or it cannot be kept; says why in `left_out`."""
    own = delta.tensors()
    theirs: Mapping[str, Tensor] = other.tensors() if other is not None else {}
    if other is None:
        found.left_out[place] = "the base model has no such module"
        return None
    changes: dict[str, Tensor] = {}
    places = {name: place if name == "diff" else f"{place} ({name})" for name in (*own, *theirs)}
    for name in theirs.keys() - own.keys():
        found.left_out[places[name]] = "only the base model has it"
    for name, tensor in own.items():
        if name not in theirs:
            found.left_out[places[name]] = "the base model has none"
            continue
        if tensor.is_meta or theirs[name].is_meta:
            raise ConversionError(
                f"{place} holds no data: it is on the meta device, as accelerate's offloading leaves it",
                mend="Give the folder or file that the model was loaded from, or take the offloading away first.",
                state=UNTOUCHED,
            )
        if not tensor.is_floating_point():
            found.left_out[places[name]] = f"its numbers are {tensor.dtype}, which have no difference to add"
            continue
        if theirs[name].shape != tensor.shape:
            reason = f"its {'bias' if name == 'bias' else 'weight'} has the shape {tuple(tensor.shape)} here and "
            found.left_out[place] = f"{reason}{tuple(theirs[name].shape)} in the base model"
            return None
        change = _subtracted(tensor, theirs[name], device)
        if not change.any():
            continue
        if change.ndim < 2 and not vectors:
            found.left_out[places[name]] = SMALL
            continue
        changes[name] = change
    if not changes:
        return None
    return FullDelta(diff=changes.get("diff"), bias=changes.get("bias"), of_parameter=delta.of_parameter)


def _subtracted(new: Tensor, old: Tensor, device: torch.device | str | None) -> Tensor:
    _return_freed_memory()
    return computing(read_at(new, device)) - computing(read_at(old, device))


def _return_freed_memory() -> None:
    """Give the system back what is free: glibc keeps it below what is kept of each module, 4 GiB of SDXL in full."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _check(found: _Extraction, new: Checkpoint, old: Checkpoint) -> None:
    if found.problems:
        raise ConversionError(
            f"the difference of {new.label} and {old.label} cannot be said so in {len(found.problems)} modules",
            problems=found.problems,
            mend=" ".join(found.mends),
            state=UNTOUCHED,
        )
    if found.fits:
        return
    facts: dict[str, Any] = {side.label: sorted(side.weights.components) for side in (new, old)}
    raise AdapterMismatchError(
        f"{new.label} and {old.label} differ in no weight that an adapter could hold",
        problems=[*(f"{place}: {reason}" for place, reason in found.left_out.items())]
        or [f"{label}: {', '.join(components)}" for label, components in facts.items()],
        mend="Are they two versions of one model? A lone model's component can be named with component=….",
        state=UNTOUCHED,
    )
