"""Several adapters as one, on ΔW: any algebras, ranks and targets, each with its weight."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lora_loaders.adapter import Adapter
from lora_loaders.checkpoints import Checkpoint, Weights, open_checkpoint
from lora_loaders.conversion import Source
from lora_loaders.deltas import Delta, FullDelta, LoraDelta
from lora_loaders.errors import ConversionError
from lora_loaders.families import FAMILIES, Family
from lora_loaders.siblings import on_weights
from lora_loaders.weights import number

from .approximating import (
    Approximation,
    Fit,
    Fitted,
    as_full,
    as_lora,
    fit_of,
    fit_of_product,
    in_dtype,
    lora_of,
    product_of,
    with_record,
)
from .arithmetic import METHODS, Majority, Method, check_density, combine
from .goals import Goal
from .resizing import Base, Tick, at_hand, base_at, base_for, read_whole, refuse_flat, sound
from .truncating import Pair, of_product

NOTHING = "Nothing was written."


@dataclass(frozen=True)
class _Rule:
    """How the changes of one module are put together."""

    method: Method
    goal: Goal
    density: float
    majority: Majority
    generator: torch.Generator
    dtype: torch.dtype | None


@dataclass(frozen=True)
class _Part:
    """One adapter's change of a module, and its weight."""

    delta: Delta
    weight: float


def merge(
    sources: Sequence[Source],
    weights: Sequence[float] | None = None,
    *,
    method: Method = "linear",
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    density: float = 0.5,
    majority: Majority = "total",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    model: Weights | None = None,
    family: str | None = None,
    device: torch.device | str | None = None,
    on_module: Tick | None = None,
    families: Sequence[Family] = FAMILIES,
) -> Approximation:
    """One adapter whose ΔW is put together from those of several.

    `linear` without a goal is exact, Σ wᵢ ΔWᵢ: factors stand side by side, and the ranks add up (PEFT's `cat`). With a
    goal it is the best adapter of that rank (PEFT's `svd`). The other methods prune ΔW itself (PEFT's `ties_svd` and
    so on; see `arithmetic`) and take the largest rank of the sources if no goal is given. A module that only some of
    the adapters change is made from those.

    Args:
        sources: adapters, or what `read_adapter` reads; of one family.
        weights: a factor for each; 1 if None.
        method: `linear`, `magnitude_prune`, `ties`, `dare_linear` or `dare_ties`.
        rank: see `resize`, as are `energy` and `error`.
        density: share of the entries that pruning keeps.
        majority: how `ties` elects a sign: by the sum (`total`) or by the number of changes (`frequency`).
        seed: for random pruning.
        dtype: of the result; the widest of the sources if None.
        model: the base weights, for algebras whose ΔW depends on them.
        family: read the sources as this family.
        device: where to compute.
        on_module: called with the place of each module that is done.
        families: the families to tell apart; pass your own beside `FAMILIES` to add one.

    Raises:
        AdapterFileError: a source cannot be read.
        ConversionError: families or numbers that do not go together, or changes that cannot be added.
    """
    adapters = [read_whole(source, family, families) for source in sources]
    factors = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    _check(adapters, factors, method)
    check_density(density, method)
    goal = Goal(rank, energy, error)
    rule = _Rule(method, goal, density, majority, torch.Generator().manual_seed(seed), dtype)
    checkpoint = None if model is None else open_checkpoint(model, family=adapters[0].family, families=families)
    deltas: dict[str, dict[str, Delta]] = {}
    fits: dict[str, Fit] = {}
    problems: list[str] = []
    mends: dict[str, None] = {}
    for component, path in dict.fromkeys((m.component, m.path) for adapter in adapters for m in adapter.modules()):
        try:
            parts = _parts(adapters, factors, component, path, device)
            made, fits[f"{component}.{path}"] = _merged(parts, rule, checkpoint, component, path, device)
            deltas.setdefault(component, {})[path] = sound(at_hand(made, "cpu"))
        except ConversionError as problem:
            problems.append(f"{component}.{path}: {problem.what}")
            mends[problem.mend or "Resize or convert them to one shape first."] = None
        if on_module is not None:
            on_module(f"{component}.{path}")
    if problems:
        mend = " ".join(mends)
        raise ConversionError(
            f"modules that cannot be merged: {len(problems)}", problems=problems, mend=mend, state=NOTHING
        )
    facts = {"method": method, "weights": factors, **{k: v for k, v in asdict(goal).items() if v is not None}}
    if method != "linear":
        facts |= {"density": density, "majority": majority, "seed": seed}
    embeddings = {token: vector for adapter in adapters for token, vector in adapter.embeddings.items()}
    names = ", ".join(adapter.source for adapter in adapters)
    first = adapters[0]
    whole = Adapter(
        deltas,
        family=first.family,
        format=first.format,
        embeddings=embeddings,
        source=f"merged: {names}",
        registered={place: order for adapter in adapters for place, order in adapter.registered.items()},
    )
    return Approximation(with_record(whole, fits, "merge", [a.source for a in adapters], facts), fits)


def _check(adapters: Sequence[Adapter], weights: Sequence[float], method: str) -> None:
    for weight in weights:
        number(weight)
    families = {adapter.family for adapter in adapters if adapter.family}
    tokens = [token for adapter in adapters for token in adapter.embeddings]
    twice = sorted({token for token in tokens if tokens.count(token) > 1})
    what = ""
    if not adapters:
        what = "no adapters to merge"
    elif len(weights) != len(adapters):
        what = f"{len(weights)} weights for {len(adapters)} adapters"
    elif method not in METHODS:
        what = f"no method {method!r}; there are {', '.join(METHODS)}"
    elif len(families) > 1:
        what = f"adapters of several families: {', '.join(sorted(families))}"
    elif twice:
        what = f"the learned tokens {', '.join(twice)} are in several files"
    if what:
        problems = [f"{adapter.source}: {adapter.describe()}" for adapter in adapters]
        raise ConversionError(what, problems=problems, state=NOTHING)


def _parts(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    component: str,
    path: str,
    device: torch.device | str | None,
) -> list[_Part]:
    found = [
        (adapter.deltas.get(component, {}).get(path), weight) for adapter, weight in zip(adapters, weights, strict=True)
    ]
    return [_Part(sound(at_hand(delta, device)), weight) for delta, weight in found if delta is not None]


def _merged(
    parts: Sequence[_Part],
    rule: _Rule,
    checkpoint: Checkpoint | None,
    component: str,
    path: str,
    device: torch.device | str | None,
) -> Fitted:
    dtype = rule.dtype or _widest(parts)
    if rule.method == "linear" and len(parts) == 1 and parts[0].weight == 1 and rule.goal.keeps_all:
        return _as_is(parts[0].delta, dtype)
    own = base_at(checkpoint, component, path, device)
    bases = [base_for(part.delta, own) for part in parts]
    shape = _shape(parts, bases[0], path)
    products = [product_of(part.delta) for part in parts]
    pairs = [product for product in products if product is not None]
    if rule.method == "linear" and len(pairs) == len(parts):
        return _side_by_side(parts, pairs, shape, rule.goal, dtype)

    def weight(of: str) -> Tensor | None:
        return base_at(checkpoint, component, of, device).weight

    bound = parts if checkpoint is None else [replace(part, delta=on_weights(part.delta, weight)) for part in parts]
    whole = [_in_full(part, base) for part, base in zip(bound, bases, strict=True)]
    biases = _bias(parts, dtype, own.bias)
    diffs = [
        (_as_shaped(full.diff, shape), part.weight)
        for full, part in zip(whole, parts, strict=True)
        if full.diff is not None
    ]
    if not diffs:
        return Fitted(FullDelta(bias=biases.get("bias"), norm=whole[0].norm), Fit(None, 0.0, 0.0))
    if len({tuple(diff.shape) for diff, _ in diffs}) > 1:
        raise ConversionError(f"changes of the shapes {[list(diff.shape) for diff, _ in diffs]} cannot be added")
    is_matrix = diffs[0][0].ndim > 1
    change = combine(
        [diff for diff, _ in diffs],
        [weight for _, weight in diffs],
        rule.method if is_matrix else "linear",
        density=rule.density,
        majority=rule.majority,
        generator=rule.generator,
    )
    summed = replace(whole[0], diff=change, bias=biases.get("bias"))
    goal = rule.goal
    if goal.is_empty and rule.method != "linear":
        ranks = [part.delta.rank for part in parts]
        goal = Goal(rank=max(rank for rank in ranks if rank)) if all(ranks) else goal
    if is_matrix and not goal.is_empty:
        return as_lora(summed, goal, dtype=dtype)
    return as_full(summed, dtype=dtype)


def _as_is(delta: Delta, dtype: torch.dtype) -> Fitted:
    """A change that stays what it is; only its numbers may be rounded."""
    product = product_of(delta)
    if isinstance(delta, LoraDelta) and product is not None:
        return in_dtype(delta, product, dtype)
    kept = delta.map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    if delta.needs_base or delta.shape is None or len(delta.shape) < 2:
        return Fitted(kept, Fit(delta.rank, 0.0, 0.0))
    return Fitted(kept, fit_of(delta.delta_weight(), kept))


def _shape(parts: Sequence[_Part], base: Base, path: str) -> tuple[int, ...] | None:
    """Shape of the weight: files that flatten a kernel do not tell it, others or the model do."""
    if base.weight is not None:
        return tuple(base.weight.shape)
    shape = max((part.delta.shape for part in parts if part.delta.shape is not None), key=len, default=None)
    if shape is not None and len(shape) == 2:
        for part in parts:
            refuse_flat(part.delta, path)
    return shape


def _as_shaped(diff: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """A difference in the weight's shape, where it is only laid out otherwise."""
    return diff if shape is None or diff.numel() != math.prod(shape) else diff.reshape(shape)


def _side_by_side(
    parts: Sequence[_Part], pairs: Sequence[Pair], shape: tuple[int, ...] | None, goal: Goal, dtype: torch.dtype
) -> Fitted:
    """Σ wᵢ upᵢ downᵢ as [w₁up₁ | w₂up₂ | …] @ [down₁ / down₂ / …]."""
    if shape is None or len({(pair.up.shape[0], pair.down.shape[1]) for pair in pairs}) > 1:
        raise ConversionError(
            f"changes of the shapes {[list(part.delta.shape or ()) for part in parts]} cannot be added"
        )
    # The largest scale becomes the result's alpha: multiplied into low-precision factors it would round them, and in
    # float16 push them below its smallest normal number (0.44 % of ΔW for an alpha of 1 at rank 128).
    scales: list[float] = [abs(getattr(part.delta, "scaling", 1.0) * part.weight) for part in parts]
    scaling = max(scales) if goal.keeps_all and max(scales) > 0 else 1.0
    ups = [pair.up * (part.weight / scaling) for part, pair in zip(parts, pairs, strict=True)]
    wide = reduce(torch.promote_types, (up.dtype for up in ups))
    whole = Pair(torch.cat([up.to(wide) for up in ups], 1), torch.cat([pair.down.to(wide) for pair in pairs]))
    cut = whole if goal.keeps_all else of_product(*whole, goal.at(shape[2:]))
    first = parts[0].delta
    made = lora_of(cut, FullDelta(of_parameter=first.of_parameter), shape, dtype)
    biases: Any = _bias(parts, dtype, scaling=scaling)
    made = replace(made, alpha=scaling * made.rank, **biases, embedding=first.is_embedding)
    return Fitted(made, fit_of_product(Pair(whole.up * scaling, whole.down), made))


def _in_full(part: _Part, base: Base) -> FullDelta:
    dtype = torch.promote_types(torch.float32, _widest([part]))
    made = as_full(part.delta, base.weight, dtype, base.bias).delta
    if not isinstance(made, FullDelta):
        raise ConversionError(f"a {part.delta.kind} change of a norm cannot be added to others")
    return made


def _bias(
    parts: Sequence[_Part], dtype: torch.dtype, base_bias: Tensor | None = None, scaling: float = 1.0
) -> dict[str, Tensor]:
    """Σ wᵢ biasᵢ, under PEFT's word for it where all biases are the up factors' own, under the result's scaling."""
    given = [(bias, part) for part in parts if (bias := part.delta.delta_bias(base_bias)) is not None]
    if not given:
        return {}
    total = torch.stack([bias.double() * part.weight for bias, part in given]).sum(0)
    own = all(isinstance(p.delta, LoraDelta) and p.delta.bias is None for _, p in given)
    if own and all(isinstance(part.delta, LoraDelta) for part in parts):
        return {"up_bias": (total / scaling).to(dtype)}
    return {"bias": total.to(dtype)}


def _widest(parts: Sequence[_Part]) -> torch.dtype:
    dtypes = [t.dtype for part in parts for t in part.delta.tensors().values() if t.is_floating_point()]
    return reduce(torch.promote_types, dtypes)
