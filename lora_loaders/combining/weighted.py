"""PEFT's `add_weighted_adapter` over a live model's adapters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from lora_loaders.adapter import Adapter
from lora_loaders.deltas import Delta, LoraDelta
from lora_loaders.errors import ConversionError
from lora_loaders.families import Family
from lora_loaders.saving import capture
from lora_loaders.weights import number, one_each

from .arithmetic import METHODS, Majority, Method, check_density, combine
from .merging import merge

COMBINATIONS = ("svd", "cat", *METHODS, *(f"{method}_svd" for method in METHODS[1:]))
UNCHANGED = "The model was not changed."


def weighted_adapter(
    models: Mapping[str, nn.Module],
    names: Sequence[str],
    weights: Sequence[float],
    combination: str,
    family: Family | None,
    *,
    rank: int | None = None,
    density: float | None = None,
    majority: Majority = "total",
) -> Adapter:
    """Several attached adapters as one, by PEFT's names of the ways.

    `cat` is exact, `svd` and `…_svd` work on ΔW and cut to a rank. `linear`, `ties`, `dare_linear`, `dare_ties` and
    `magnitude_prune` work on the factors, as PEFT has it: B A of weighted sums √w·B and √w·A holds cross terms and is
    no weighted sum of changes. Scalings are the adapters' own, rsLoRA's too.

    Args:
        models: component -> model.
        names: the adapters.
        weights: a factor for each.
        combination: one of `COMBINATIONS`.
        family: the models' family.
        rank: for `svd` and `…_svd`; the largest of the adapters if None.
        density: share of the entries that pruning keeps.
        majority: how `ties` elects a sign.

    Raises:
        AdapterStateError: no such adapter, or not one number for each.
        ConversionError: a way that is not there, or adapters that it cannot combine.
    """
    if combination not in COMBINATIONS:
        raise ConversionError(
            f"no combination {combination!r}", mend=f"There are {', '.join(COMBINATIONS)}.", state=UNCHANGED
        )
    plain: dict[str, Method] = {method: method for method in METHODS}
    method = plain.get(combination.removesuffix("_svd"), "linear")
    if method != "linear" and density is None:
        raise ConversionError(f"{combination} prunes: give density=…", state=UNCHANGED)
    weights = [number(weight) for weight in one_each(names, weights)]
    adapters = [capture(models, name, family) for name in names]
    share = 1.0 if density is None else density
    if combination in METHODS:
        return _on_factors(adapters, weights, method, share, majority)
    deltas = [module.delta for adapter in adapters for module in adapter.modules()]
    base = models if any(delta.needs_base for delta in deltas) else None
    if combination != "cat":
        rank = rank or max((delta.rank for delta in deltas if delta.rank), default=None)
        return merge(adapters, weights, method=method, rank=rank, density=share, majority=majority, model=base).adapter
    return merge(adapters, weights, model=base).adapter


def _on_factors(
    adapters: Sequence[Adapter], weights: Sequence[float], method: Method, density: float, majority: Majority
) -> Adapter:
    check_density(density, method)
    deltas: dict[str, dict[str, Delta]] = {}
    problems: list[str] = []
    for component, path in dict.fromkeys((m.component, m.path) for adapter in adapters for m in adapter.modules()):
        found = [(adapter.deltas.get(component, {}).get(path), w) for adapter, w in zip(adapters, weights, strict=True)]
        loras = [(delta, weight) for delta, weight in found if isinstance(delta, LoraDelta) and delta.mid is None]
        if len(loras) < sum(delta is not None for delta, _ in found):
            problems.append(f"{component}.{path}: only LoRAs have two factors to sum")
        elif len({delta.rank for delta, _ in loras}) > 1 or any(delta.delta_bias() is not None for delta, _ in loras):
            problems.append(f"{component}.{path}: factors of different ranks, or with a bias")
        else:
            scales = [weight * delta.scaling for delta, weight in loras]
            roots = [math.sqrt(abs(scale)) for scale in scales]
            signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
            down = combine([d.down for d, _ in loras], signed, method, density=density, majority=majority)
            up = combine([d.up for d, _ in loras], roots, method, density=density, majority=majority)
            first = loras[0][0]
            made = replace(first, down=down, up=up, alpha=float(first.rank), rslora=False)
            deltas.setdefault(component, {})[path] = made
    if problems:
        raise ConversionError(
            f"{method} cannot combine the factors of {len(problems)} modules",
            problems=problems,
            mend="Use cat, svd or one of the …_svd ways, which work on ΔW.",
            state=UNCHANGED,
        )
    return Adapter(deltas, family=adapters[0].family, source=f"{method} of {len(adapters)} adapters")
