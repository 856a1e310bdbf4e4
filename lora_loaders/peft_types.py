"""PEFT's LoHa, LoKr, OFT, BOFT and IA3: what their `adapter_config.json` says beside the tensors, both ways."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .deltas import (
    Delta,
    DoraDelta,
    ExpertsDelta,
    GainDelta,
    InputBoftDelta,
    InputOftDelta,
    LohaDelta,
    LokrDelta,
    LoraDelta,
)
from .errors import ConversionError, MalformedAdapterError

Config = dict[str, Any]
CORES = ("hada_t1", "hada_t2", "lokr_t2")
OTHER_FORMATS = "Write another format (kohya, lycoris, original)"
PEFT_WAYS_OUT = f"{OTHER_FORMATS}, or make a LoRA of it first: --as lora --rank N."
Named = Mapping[str, Delta]


def by_path(config: Mapping[str, Any], pattern: str, path: str, default: str) -> float:
    """The value that a pattern of PEFT's configuration has for this path, else the general one: 8, as in PEFT."""
    entries: Mapping[str, Any] = config.get(pattern) or {}
    general = config.get(default)
    return next(
        (float(value) for key, value in entries.items() if matches(key, path)),
        8.0 if general is None else float(general),
    )


def matches(key: str, path: str) -> bool:
    """PEFT's rule for the keys of `rank_pattern` and `alpha_pattern`."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def configured(delta: Delta, config: Mapping[str, Any], path: str) -> Delta:
    """The delta with what its tuner's configuration says and no tensor holds."""
    tuner = config.get("peft_type")
    if isinstance(delta, LohaDelta | LokrDelta) and tuner in ("LOHA", "LOKR"):
        alpha = by_path(config, "alpha_pattern", path, "alpha")
        if isinstance(delta, LokrDelta):
            delta = replace(delta, peft_conv1d=delta.lokr_w2 is not None and delta.lokr_w2.ndim == 3)
            if delta.rank is None:
                return replace(delta, whole_scaling=alpha / _rank(config, path))
        return replace(delta, alpha=alpha) if alpha else unscaled(delta)
    if isinstance(delta, InputOftDelta) and tuner == "OFT":
        return replace(
            delta,
            neumann_terms=config.get("num_cayley_neumann_terms") or 5
            if config.get("use_cayley_neumann", True)
            else None,
            limit=float(config.get("eps", 6e-5)) if config.get("coft") else None,
            turns_patches=True,
        )
    if isinstance(delta, GainDelta) and tuner == "IA3":
        return replace(delta, on_input=_is_feedforward(config.get("feedforward_modules") or (), path))
    return delta


def _rank(config: Mapping[str, Any], path: str) -> float:
    rank = by_path(config, "rank_pattern", path, "r")
    if rank <= 0:
        raise MalformedAdapterError(f"PEFT's configuration says a rank of {rank:g}, by which alpha is divided")
    return rank


def unscaled(delta: Any) -> Any:
    """No change, which is what PEFT makes of an alpha of 0; elsewhere 0 means the rank."""
    zeros = {name: tensor.new_zeros(tensor.shape) for name, tensor in delta.tensors().items() if name != "bias"}
    return delta.with_tensors(zeros)


def _is_feedforward(modules: str | Sequence[str], path: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    return any(path.endswith(name) for name in modules)


def plain(delta: Delta) -> Delta:
    """The same change for a format without PEFT's configuration.

    Raises:
        ConversionError: only that configuration can say it, or a scaling cannot be multiplied in without rounding.
    """
    if isinstance(delta, InputOftDelta):
        if (delta.neumann_terms, delta.limit, delta.turns_patches) != (5, None, False):
            raise ConversionError(
                "the format has no words for PEFT's OFT: its series, its constraint and the sense of a convolution's "
                "rotation stand in PEFT's configuration alone"
            )
        # The series' transpose is that of −Q.
        return replace(delta, oft_R=-delta.oft_R, embedding=False) if delta.embedding else delta
    if isinstance(delta, LokrDelta) and delta.peft_conv1d:
        raise ConversionError(
            "the format has no words for PEFT's LoKr of a Conv1d, whose whole w2 is lined up in a way of its own",
            mend="Make a LoRA of it first: --as lora --rank N.",
        )
    if isinstance(delta, LokrDelta) and delta.rank is None and delta.whole_scaling != 1:
        assert delta.lokr_w2 is not None
        wanted = delta.lokr_w2.double() * delta.whole_scaling
        scaled = wanted.to(delta.lokr_w2.dtype)
        if not torch.equal(scaled.double(), wanted):
            raise ConversionError(
                f"the format has no scaling for two whole LoKr factors, and {delta.whole_scaling:g} cannot be "
                f"multiplied into {scaled.dtype} without rounding",
                mend="Choose another format, or write with dtype=torch.float32.",
            )
        return replace(delta, lokr_w2=scaled, whole_scaling=1.0)
    return delta


def written(deltas: Named) -> Config:
    """PEFT's configuration that makes it build modules of these shapes.

    Args:
        deltas: path -> delta, none of them LoRA.

    Raises:
        ConversionError: no configuration does, with the module that is in the way.
    """
    kinds = {type(delta): delta.kind for delta in deltas.values()}
    if len(kinds) > 1:
        raise ConversionError(f"PEFT keeps one algebra a file, these are {', '.join(sorted(kinds.values()))}")
    write = WRITERS.get(next(iter(kinds)))
    if write is None:
        raise ConversionError(f"PEFT has no {next(iter(kinds.values()))}")
    misread = [p for p, d in deltas.items() if isinstance(d, LokrDelta) and not d.peft_conv1d and _lacks_kernel(d)]
    if misread:
        raise ConversionError(
            f"PEFT lines up a Conv1d's whole LoKr w2 in a way of its own: {', '.join(misread)}", mend=PEFT_WAYS_OUT
        )
    common: Config = {"task_type": None, "inference_mode": True, "target_modules": sorted(deltas)}
    return common | write(deltas)


def _lacks_kernel(delta: LokrDelta) -> bool:
    return delta.lokr_w2 is not None and delta.lokr_w2.ndim == 3


def refuse_unreadable(delta: Delta) -> None:
    """Raise where PEFT would read this change wrongly or not at all, though all of it has names there.

    Raises:
        ConversionError: it would.
    """
    inner = delta.inner if isinstance(delta, DoraDelta) else delta
    if delta.of_parameter and not isinstance(delta, LoraDelta | ExpertsDelta):
        raise ConversionError(f"PEFT changes raw parameters by LoRA alone, not by {delta.kind}", mend=PEFT_WAYS_OUT)
    if delta.of_parameter and isinstance(delta, LoraDelta) and delta.down.ndim > 2:
        raise ConversionError(
            "PEFT has a pair for each expert of a parameter, not one for all", mend=f"{OTHER_FORMATS}."
        )
    if isinstance(delta, DoraDelta) and not isinstance(inner, LoraDelta):
        raise ConversionError(f"PEFT leaves out the DoRA magnitude of a {inner.kind}", mend=PEFT_WAYS_OUT)
    if inner.bias is not None:
        # A LoRA would have it too.
        raise ConversionError("PEFT leaves out the change of a bias (diff_b)", mend=f"{OTHER_FORMATS}.")
    if isinstance(inner, LoraDelta) and inner.mid is not None:
        raise ConversionError("PEFT's LoRA has no Tucker core (lora_mid)", mend=PEFT_WAYS_OUT)
    if isinstance(delta, DoraDelta) and isinstance(inner, LoraDelta) and inner.up_bias is not None:
        raise ConversionError("PEFT refuses lora_bias beside DoRA", mend=PEFT_WAYS_OUT)


def for_peft(name: str, tensor: Tensor) -> Tensor:
    """A Tucker core as PEFT holds it: a Conv1d's has one more axis, for its own sake."""
    return tensor.unsqueeze(-1) if name in CORES and tensor.ndim == 3 else tensor


def _loha(deltas: Named) -> Config:
    cores = any("hada_t1" in delta.tensors() for delta in deltas.values())
    ranks = {path: delta.rank or 1 for path, delta in deltas.items()}
    alphas = {path: delta.alpha_value or float(ranks[path]) for path, delta in deltas.items()}
    return {"peft_type": "LOHA", "use_effective_conv2d": cores, **_patterns(ranks, alphas)}


def _lokr(deltas: Named) -> Config:
    loaded = {path: delta for path, delta in deltas.items() if isinstance(delta, LokrDelta)}
    both = any(delta.lokr_w1 is None for delta in loaded.values())
    cores = any(delta.lokr_t2 is not None for delta in loaded.values())
    factors = (-1, *sorted({side for delta in loaded.values() for side in delta.sides[0]}))
    factor = next((f for f in factors if all(_divides(delta, f) for delta in loaded.values())), None)
    if factor is None:
        raise ConversionError("no one `decompose_factor` of PEFT divides the modules as this file's LoKr does")
    ranks: dict[str, int] = {}
    for path, delta in loaded.items():
        first, second = (max(sides) for sides in delta.sides)
        # PEFT takes a factor whole where twice the rank reaches its longer side.
        ranks[path] = delta.rank or -(-second // 2)
        whole = (2 * ranks[path] >= second, not both or 2 * ranks[path] >= first)
        if whole != (delta.lokr_w2 is not None, delta.lokr_w1 is not None):
            raise ConversionError(f"{path}: PEFT would make other LoKr factors whole at rank {ranks[path]}")
    alphas = {path: delta.scaling * ranks[path] for path, delta in loaded.items()}
    shape = {"decompose_both": both, "decompose_factor": factor, "use_effective_conv2d": cores}
    return {"peft_type": "LOKR", **shape, **_patterns(ranks, alphas)}


def _divides(delta: LokrDelta, factor: int) -> bool:
    """Whether PEFT divides this module's sides so: `factorization` of each gives w1's and w2's."""
    return all(_factorised(p * m, factor) == (p, m) for p, m in zip(*delta.sides, strict=True))


def _factorised(size: int, factor: int) -> tuple[int, int]:
    """The two divisors that LyCORIS and PEFT choose: `factor` if it divides, else the closest pair below it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    small = max(d for d in range(1, size + 1) if size % d == 0 and d * d <= size and (factor == -1 or d <= factor))
    return small, size // small


def _oft(deltas: Named) -> Config:
    rotations = [delta for delta in deltas.values() if isinstance(delta, InputOftDelta)]
    first = rotations[0]
    if any(delta.scaled_oft or not delta.turns_patches for delta in rotations):
        raise ConversionError("PEFT's OFT has no scaled_oft, and turns a convolution the other way than OneTrainer")
    if len({(delta.settings, delta.block_size, len(delta.oft_R) == 1) for delta in rotations}) > 1:
        raise ConversionError("PEFT has one block size and one kind of OFT a file")
    return {
        "peft_type": "OFT",
        "r": 0,
        "oft_block_size": first.block_size,
        "block_share": len(first.oft_R) == 1,
        "coft": first.limit is not None,
        "use_cayley_neumann": first.neumann_terms is not None,
        "num_cayley_neumann_terms": first.neumann_terms or 5,
        **({} if first.limit is None else {"eps": first.limit}),
    }


def _boft(deltas: Named) -> Config:
    shapes = [delta.boft_R.shape for delta in deltas.values() if isinstance(delta, InputBoftDelta)]
    sizes = {(stages, size) for stages, _, size, _ in shapes}
    if len(sizes) > 1:
        raise ConversionError("PEFT has one block size and one number of BOFT stages a file")
    stages, size = sizes.pop()
    return {"peft_type": "BOFT", "boft_block_size": size, "boft_block_num": 0, "boft_n_butterfly_factor": stages}


def _ia3(deltas: Named) -> Config:
    sides = {path: delta.on_input for path, delta in deltas.items() if isinstance(delta, GainDelta)}
    if None in sides.values():
        raise ConversionError("nothing says whether these gains are those of inputs or of outputs")
    return {"peft_type": "IA3", "feedforward_modules": sorted(path for path, on_input in sides.items() if on_input)}


WRITERS: Mapping[type[Delta], Callable[[Named], Config]] = {
    LohaDelta: _loha,
    LokrDelta: _lokr,
    InputOftDelta: _oft,
    InputBoftDelta: _boft,
    GainDelta: _ia3,
}


def _patterns(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> Config:
    rank, _ = Counter(ranks.values()).most_common(1)[0]
    alpha, _ = Counter(alphas.values()).most_common(1)[0]
    return {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": {f"^{path}": own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {f"^{path}": own for path, own in alphas.items() if own != alpha},
    }
