"""Which family is a file for? Told by names and widths; metadata is no witness, trainers write it wrong."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from .deltas import Delta
from .errors import UnknownFamilyError
from .families import FAMILIES, Family
from .families.family import Shape, means_encoder
from .families.rules import HOLE, NUMBER, Dialect, Names, Resolved, flatten
from .formats import DIFFUSERS, RawModule
from .formats.grammar import split_prefix

logger = logging.getLogger(__name__)
SAMPLE = 96
"""Modules that are looked at, and more only where a file has more kinds of names."""
MAJORITY = 0.5
"""Of a file's names a family must know more than this share: half of them are those of any transformer."""
KOHYA_ENCODER = re.compile(r"lora_te(\d?)_")
LEVEL = re.compile(r"[^.]+\.|module_|base_model_model_")
"""What stands above a name: a level of a dotted one; in a flattened one, what data-parallel training and PEFT put."""
OTHERS = re.compile("control|encoder|vae|refiner|prior|decoder|connector", re.IGNORECASE)
"""In a level above all names it is another network's, and no wrapper's."""
NAMES_OF: Mapping[Dialect | None, str] = {None: "diffusers", "fused": "diffusers", "omi": "omi", "xlabs": "xlabs"}
"""Whose names a row's are, where they are not the original's."""
UNKNOWN_NAME = "no such name in this family"


def family_named(name: str, families: Sequence[Family] = FAMILIES) -> Family:
    """The family with this identifier.

    Raises:
        UnknownFamilyError: none.
    """
    for family in families:
        if family.name == name:
            return family
    raise UnknownFamilyError(f"no family {name!r}", mend=f"There are {', '.join(f.name for f in families)}.")


def choose_family(
    modules: Sequence[RawModule],
    tensors: Mapping[str, Tensor],
    wanted: str | Family | None,
    families: Sequence[Family],
    label: str,
) -> tuple[Family | None, tuple[str, ...]]:
    """The family whose names and widths explain the file best; None where none knows the most of its names.

    Returns:
        The family, and the names of those that explain the file as well; the caller's word settles a tie.
    """
    if wanted is not None:
        return wanted if isinstance(wanted, Family) else family_named(wanted, families), ()
    ranking = rank_families(modules, tensors, families) if modules else []  # a file of learned tokens has none
    if not ranking or ranking[0][0].names <= MAJORITY:
        return None, ()
    best = ranking[0][1]
    ties = tied(ranking)
    if ties:
        logger.info("%s: names and shapes fit %s; read as %s", label, ", ".join((best.name, *ties)), best.name)
    return best, ties


def joined_spellings(modules: Iterable[RawModule]) -> list[RawModule]:
    """One module where a file spells it in several ways, each key once: `to_k.alpha` beside `to.k.lora_up.weight`."""
    joined: dict[tuple[str, str], RawModule] = {}
    whole: list[RawModule] = []
    for module in modules:
        first = joined.setdefault((module.component, flatten(module.name)), module)
        if first is not module and first.keys.keys().isdisjoint(module.keys):
            first.keys.update(module.keys)
        else:
            whole.append(module)
    return whole


def unwrapped(modules: Sequence[RawModule], families: Sequence[Family]) -> Sequence[RawModule]:
    """The modules without the levels that all their names share, if so a family knows the most of them.

    Trainers save what they have: a wrapper's `generator.model.` stands before every name of some files. A level that
    names another network stays: a ControlNet has blocks of the denoiser's names.
    """
    inner = modules
    while inner:
        levels = {level[0] if (level := LEVEL.match(module.name)) else "" for module in inner}
        if len(levels) != 1 or "" in levels or OTHERS.search(min(levels)):
            break
        inner = [_inside(module) for module in inner]
        sample = sample_of(inner)
        if any(sum(bool(readings_of(m, f)) for m in sample) > MAJORITY * len(sample) for f in families):
            return inner
    return modules


def _inside(module: RawModule) -> RawModule:
    """A module under its name without the first level, and without the prefixes that stand behind that."""
    _, component, name = split_prefix(LEVEL.sub("", module.name, count=1))
    return replace(module, name=name, component=module.component or component)


class Score(NamedTuple):
    """How well a family explains a file; compared in this order."""

    names: float
    """Share of the names that it knows."""
    widths: float
    """Share of the telling widths that one of its published models has."""
    depths: float
    """Of the lists of blocks: 1 if all have as many as in a published model of that width, -1 if one has more."""
    encoders: float
    """Share of the text encoders' names that the encoder of their number has; half where it has another number here."""
    complete: bool
    """Whether the file changes all modules that are called like those it changes: trainers take every `to_q`."""
    alone: bool
    """Whether the family extends no other."""


def rank_families(
    modules: Sequence[RawModule], tensors: Mapping[str, Tensor], families: Sequence[Family] = FAMILIES
) -> list[tuple[Score, Family]]:
    """Families by how well they explain a file, best first; names go before widths, widths before numbers of blocks.

    A width that no published model has tells nothing: small models and new sizes have names like the published ones.
    Nor does a width of a model with too few blocks, where there is a family whose widths are not known here.
    """
    # What a denoiser calls its modules tells families apart; encoders are shared between them.
    encoding = [m for m in modules if means_encoder(m.component)]
    denoising = [m for m in modules if not means_encoder(m.component)]
    sample, encoders = sample_of(denoising or encoding), sample_of(encoding)
    scored = [(*_score(sample, encoders, tensors, family), family) for family in families]
    most = max((score.names for score, _, _ in scored), default=0.0)
    if any(score.names == most and score.depths >= 0 and not is_told for score, is_told, _ in scored):
        scored = [(s._replace(widths=0.0) if s.depths < 0 else s, is_told, family) for s, is_told, family in scored]
    return sorted(((score, family) for score, _, family in scored), key=lambda pair: pair[0], reverse=True)


def tied(ranking: Sequence[tuple[Score, Family]]) -> tuple[str, ...]:
    """The families behind the best one that its names, widths and numbers of blocks do not rule out.

    That a file changes all modules of a kind in one family and not in another settles which comes first, and no more:
    some adapters are for self-attention alone. Nor does a number of blocks settle it against that. A family that
    extends one of them has all its names.
    """
    best, first = ranking[0]
    found = [first.name]
    for score, family in ranking[1:]:
        is_open = score.depths == best.depths or (score.depths >= 0 and score.complete > best.complete)
        if is_open and score[:2] == best[:2] and score.encoders == best.encoders:
            found += [family.name] if score == best or family.extends not in found else []
    return tuple(found[1:])


def sample_of(modules: Sequence[RawModule]) -> list[RawModule]:
    """Modules that tell most: of all that differ by numbers alone the last and the first, then some between them."""
    alike: dict[str, list[tuple[list[int], RawModule]]] = {}
    for module in modules:
        alike.setdefault(NUMBER.sub("#", module.name), []).append(([*map(int, NUMBER.findall(module.name))], module))
    ordered = [[module for _, module in sorted(group, key=lambda pair: pair[0])] for group in alike.values()]
    ends = [module for group in ordered for module in (group[-1], *group[: len(group) > 1])]
    between = [module for group in ordered for module in group[1:-1]]
    room = max(SAMPLE - len(ends), 0)
    return ends + (between[:: max(1, len(between) // room)] if room else [])


def _score(
    sample: Sequence[RawModule], encoders: Sequence[RawModule], tensors: Mapping[str, Tensor], family: Family
) -> tuple[Score, bool]:
    """The score, and whether any width tells for or against the family."""
    read = [(module, readings[0]) for module in sample if (readings := readings_of(module, family))]
    told = [
        (reading[1].paths[0], fitting)
        for module, reading in read
        if (fitting := _fitting(module, reading, tensors, family)) is not None
    ]
    # Pruned models fill one list of blocks and not the other: that is no witness for another family.
    depths = [_depth(path, number, told, family) for path, number in _last_blocks(read, family).items()]
    numbered = [_is_numbered_right(module, family) for module in encoders]
    widths = _mean([bool(fitting) for _, fitting in told])
    score = Score(
        len(read) / len(sample),
        widths,
        min(depths, default=0),
        _mean(numbered),
        _complete(read, family),
        family.extends is None,
    )
    return score, bool(told)


def _mean(facts: Sequence[float]) -> float:
    return sum(facts) / len(facts) if facts else 0.0


def _fitting(
    module: RawModule, reading: tuple[str, Resolved], tensors: Mapping[str, Tensor], family: Family
) -> tuple[Shape, ...] | None:
    """The family's published weights that this one may be of; None where none is known here or no width is told."""
    component, resolved = reading
    shapes = {slot: tensors[key].shape for slot, key in module.keys.items() if tensors[key].ndim >= 2}
    rows, columns = (shapes.get(slot, shapes.get("diff")) for slot in ("up", "down"))
    columns = columns or shapes.get("down.0")  # every part of a fused module has its inputs
    out_features = rows[0] if rows is not None and len(resolved.paths) == 1 else None
    in_features = columns[1] if columns is not None else None
    return family.fitting(component, resolved.paths[0], out_features, in_features) if shapes else None


def _last_blocks(read: Iterable[tuple[RawModule, tuple[str, Resolved]]], family: Family) -> dict[str, int]:
    """The highest block that the file changes in each list of blocks whose length is told."""
    last: dict[str, int] = {}
    for _, (component, resolved) in read:
        found = NUMBER.search(resolved.paths[0])
        path = resolved.paths[0][: found.start() - 1] if found else ""
        if found and component == family.denoiser and path in family.depths:
            last[path] = max(last.get(path, 0), int(found[0]))
    return last


def _depth(path: str, last: int, told: Sequence[tuple[str, tuple[Shape, ...]]], family: Family) -> int:
    widths = {shape for where, fitting in told if where.startswith(f"{path}.") for shape in fitting}
    depths = {shape.blocks for shape in widths if shape.blocks is not None} or family.depths[path]
    return 1 if last + 1 in depths else -1 if last >= max(depths) else 0


def _complete(read: Iterable[tuple[RawModule, tuple[str, Resolved]]], family: Family) -> bool:
    paths = [path for _, (component, resolved) in read if component == family.denoiser for path in resolved.paths]
    paths = [path for path in paths if "#" in _kind(path)]
    changed = {_kind(path) for path in paths}
    lists = {kind.partition("#")[0] for kind in changed}
    alike = _kinds_by_leaf(family.components[family.denoiser])
    expected = {kind for leaf in {_leaf(path) for path in paths} for kind in alike.get(leaf, ())}
    expected = {kind for kind in expected if kind.partition("#")[0] in lists}
    return bool(expected) and expected <= changed


@lru_cache
def _kinds_by_leaf(names: Names) -> Mapping[str, frozenset[str]]:
    """Last name -> the kinds of modules in blocks that are called so."""
    kinds: dict[str, set[str]] = {}
    for path in (HOLE.sub("0", template) for template in names.modules if HOLE.search(template)):
        if names.is_often_changed(path):
            kinds.setdefault(_leaf(path), set()).add(_kind(path))
    return {leaf: frozenset(found) for leaf, found in kinds.items()}


def _leaf(path: str) -> str:
    """The last part that is no number: `to_out` of `attn.to_out.0`."""
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), "")


def _kind(path: str) -> str:
    """A path without the numbers between its dots."""
    return re.sub(r"\b\d+\b", "#", path)


def _is_numbered_right(module: RawModule, family: Family) -> float:
    """Whether the encoder that a prefix means by its number or name has a module of this name."""
    meant = family.encoder_meant(module.component)
    if meant is None or not family.components[meant].resolve(module.name):
        return 0
    kohya = KOHYA_ENCODER.fullmatch(module.prefix)
    # `lora_te_` is the only encoder of any kind; `lora_te1_` the first of several, or the only one if it is a T5.
    told = (
        kohya is None or kohya[1] == family.encoder_number(meant) or (not kohya[1] and len(family.text_encoders) == 1)
    )
    return 1 if told else 0.5


def readings_of(module: RawModule, family: Family) -> list[tuple[str, Resolved]]:
    """The readings of a module's name in the first component that knows it."""
    if module.name.startswith("#"):
        return _by_index(module, family)
    for component in family.named_component(module.component):
        readings = family.components[component].resolve(module.name)
        if readings:
            return [routed for reading in readings for routed in _routed(reading, component, family)]
    return []


def _routed(reading: Resolved, component: str, family: Family) -> list[tuple[str, Resolved]]:
    """A reading with its component; one that the denoiser's table sends elsewhere is read by that table alone."""
    target = reading.rule.component
    if target is None:
        return [(component, reading)]
    inner = family.components[target].resolve(reading.paths[0])
    return [(target, replace(r, rule=replace(r.rule, dialect=reading.rule.dialect))) for r in inner]


def _by_index(module: RawModule, family: Family) -> list[tuple[str, Resolved]]:
    order = family.traversal.get(module.component, ())
    index = int(module.name[1:])
    if index >= len(order):
        return []
    return [(module.component, r) for r in family.components[module.component].resolve(order[index][1])]


def vote(modules: Iterable[RawModule], family: Family | None) -> bool | None:
    """Whether the file speaks diffusers' names, told by the names that only one side has; None if none tells."""
    if family is None:
        return None
    read = [readings_of(module, family) for module in modules]
    if all(len(readings) != 2 for readings in read):
        return None
    told = (readings[0] for readings in read if len(readings) == 1)
    ballots = {reading.is_diffusers for component, reading in told if not _is_common(component, reading, family)}
    return ballots.pop() if len(ballots) == 1 else None


def names_spoken(modules: Sequence[RawModule], family: Family | None) -> str | None:
    """Whose names the most of a denoiser's modules have, as `Format.names` says it; None if no name tells.

    Only modules are asked whose prefix leaves it open: what stands behind PEFT's is PEFT's by whatever names.
    """
    if family is None:
        return None
    asked = [m for m in modules if m.prefix in ("", *DIFFUSERS.prefixes) and not means_encoder(m.component)]
    read = (readings_of(module, family) for module in sample_of(asked))
    told = [r for ((component, r),) in (x for x in read if len(x) == 1) if not _is_common(component, r, family)]
    counts = Counter(NAMES_OF.get(reading.rule.dialect, "original") for reading in told)
    return max(counts, key=lambda names: counts[names], default=None)


def _is_common(component: str, reading: Resolved, family: Family) -> bool:
    """Whether this name is the same on both sides, and so speaks for neither."""
    path = reading.paths[0]
    return reading.is_diffusers and family.components[component].writing("original").source(path)[0] == path


def told_depth(modules: Iterable[RawModule], family: Family, path: str) -> int | None:
    """Length of the list of blocks that a path runs through, if the file fills the list of a published model."""
    read = ((module, reading) for module in modules for reading in readings_of(module, family)[:1])
    found = NUMBER.search(path)
    blocks = path[: found.start() - 1] if found else ""
    last = _last_blocks(read, family).get(blocks)
    return last + 1 if last is not None and last + 1 in family.depths[blocks] else None


def is_last_by_rows(delta: Delta) -> bool | None:
    """Whether a modulation is that of a last block, which has scale and shift alone: two rows an input, not 6 or 9.

    None where the delta does not tell, or tells of neither.
    """
    shape = delta.shape
    if shape is None or min(shape[:2]) < 1 or shape[0] % shape[1]:
        return None
    return {2: True, 6: False, 9: False}.get(shape[0] // shape[1])


def why_unresolved(module: RawModule, readings: Sequence[tuple[str, Resolved]], family: Family | None) -> str:
    """Why a name has no place, in words."""
    if len(readings) == 2:
        names = " or ".join(reading.paths[0] for _, reading in readings)
        return f"ambiguous: {names}, and no other key of the file tells which names it speaks"
    if family is None:
        return "no family knows the most of this file's names"
    held = [family.components[c].held_by(module.name) for c in family.named_component(module.component)]
    inside = next(filter(None, held), None)
    return f"a container without a weight of its own: it holds {', '.join(inside)}" if inside else UNKNOWN_NAME
