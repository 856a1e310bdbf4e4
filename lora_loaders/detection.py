"""Which family is a file for? Told by names and widths; metadata is no witness, trainers write it wrong."""

import logging
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from .errors import UnknownFamilyError
from .families import FAMILIES, Family
from .families.rules import Resolved
from .formats import RawModule

logger = logging.getLogger(__name__)
SAMPLE = 96
"""Modules that are looked at; families differ in most of their names, so more tell no more."""


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
) -> Family | None:
    """The family whose names and widths explain the file best; None where no name is known to any."""
    if isinstance(wanted, Family):
        return wanted
    if wanted is not None:
        return family_named(wanted, families)
    ranking = rank_families(modules, tensors, families)
    if not ranking or ranking[0][0][0] == 0:
        return None
    best = [family for score, family in ranking if score == ranking[0][0]]
    if len(best) > 1:
        logger.info("%s: names and shapes fit %s; read as %s", label, ", ".join(f.name for f in best), best[0].name)
    return best[0]


Score = tuple[float, float]
"""Share of modules whose name a family knows, and share whose width is one that its published models have."""


def rank_families(
    modules: Sequence[RawModule], tensors: Mapping[str, Tensor], families: Sequence[Family] = FAMILIES
) -> list[tuple[Score, Family]]:
    """Families by how well they explain a file, best first; names go before widths.

    A width that no published model has tells nothing: small models and new sizes have names like the published ones.
    """
    # What a denoiser calls its modules tells families apart; encoders are shared between them.
    denoising = [m for m in modules if not m.component.startswith(("te", "encoder:"))] or list(modules)
    sample = denoising[:: max(1, len(denoising) // SAMPLE)]
    ranking: list[tuple[Score, Family]] = []
    for family in families:
        scores = [_score(module, tensors, family) for module in sample]
        names, widths = (sum(part) / len(sample) for part in zip(*scores, strict=True))
        ranking.append(((names, widths), family))
    return sorted(ranking, key=lambda pair: pair[0], reverse=True)


def _score(module: RawModule, tensors: Mapping[str, Tensor], family: Family) -> tuple[bool, bool]:
    """Whether the family knows the name, and whether it has a published width there that is this one."""
    readings = readings_of(module, family)
    if not readings:
        return False, False
    component, reading = readings[0]
    path = reading.paths[0]
    shapes = {slot: tensors[key].shape for slot, key in module.keys.items() if tensors[key].ndim >= 2}
    out_features = shapes["up"][0] if "up" in shapes and len(reading.paths) == 1 else None
    in_features = shapes["down"][1] if "down" in shapes else None
    known = bool(shapes) and family.tells(component, path)
    return True, known and family.fits(component, path, out_features, in_features)


def readings_of(module: RawModule, family: Family) -> list[tuple[str, Resolved]]:
    """The readings of a module's name in the first component that knows it."""
    if module.name.startswith("#"):
        return _by_index(module, family)
    for component in family.named_component(module.component):
        readings = family.components[component].resolve(module.name)
        if readings:
            return [(reading.rule.component or component, reading) for reading in readings]
    return []


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
    ambiguous = False
    ballots: set[bool] = set()
    for module in modules:
        readings = readings_of(module, family)
        if len(readings) == 2:
            ambiguous = True
        elif readings:
            ballots.add(readings[0][1].is_diffusers)
    return ballots.pop() if ambiguous and len(ballots) == 1 else None
