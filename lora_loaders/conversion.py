"""File <-> `Adapter`: the spelling axis and the names axis meet here, and nothing of the modules is known."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from . import formats
from .adapter import Adapter, Unresolved
from .deltas import Delta, build
from .deltas.unread import UnreadDelta
from .errors import ConversionError, MalformedAdapterError, UnknownFamilyError, UnknownFormatError
from .families import FAMILIES, Family
from .families.rules import Resolved
from .files import UNTOUCHED, Contents, HubOptions, read
from .formats import RawModule
from .scaling import Scalings

logger = logging.getLogger(__name__)
SAMPLE = 96
Source = Any  # str | os.PathLike | Mapping[str, Tensor] | Adapter; spelled out in the public signatures


class Layout(Protocol):
    """What a live model can tell the names layer."""

    def rows(self, component: str, path: str) -> int | None:
        """Output rows of this module, None if the model has no such module."""
        ...

    def blocks(self, component: str, path: str) -> int | None:
        """Number of blocks in the list that this path runs through, None if unknown."""
        ...

    def find(self, component: str, name: str) -> str | None:
        """The path of the live module that this name, dotted or flattened, means."""
        ...


@dataclass
class _Reading:
    """What is gathered while one file is read."""

    deltas: dict[str, dict[str, Delta]] = field(default_factory=dict[str, dict[str, Delta]])
    bound: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    ignored: dict[str, str] = field(default_factory=dict[str, str])
    unresolved: list[Unresolved] = field(default_factory=list[Unresolved])
    exact: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    keys: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict[tuple[str, str], tuple[str, ...]])
    problems: list[str] = field(default_factory=list[str])


def read_adapter(
    source: Source,
    *,
    family: str | Family | None = None,
    layout: Layout | None = None,
    families: Sequence[Family] = FAMILIES,
    use_safetensors: bool | None = None,
    hub: HubOptions | None = None,
) -> Adapter:
    """Read any spelling into an `Adapter` with diffusers' names.

    Args:
        source: path, folder, Hub id, state dictionary, or an `Adapter`, which is returned as it is.
        family: settles a tie between families, or is taken at its word.
        layout: a live model's sizes and names; without it the published proportions hold.
        families: the families to tell apart; pass your own beside `FAMILIES` to add one.
        use_safetensors: False allows reading a pickle, with torch's weights-only reader.
        hub: file name, subfolder, revision, token and cache, for folders and Hub ids.

    Raises:
        AdapterFileError: the file; see its subclasses.
    """
    if isinstance(source, Adapter):
        return source
    return parse(read(source, hub, allow_pickle=use_safetensors is False), family, layout, families)


def parse(
    contents: Contents,
    family: str | Family | None = None,
    layout: Layout | None = None,
    families: Sequence[Family] = FAMILIES,
) -> Adapter:
    """Tensors and metadata to an `Adapter`; see `read_adapter`."""
    modules, left, spelling = formats.read(list(contents.tensors))
    embeddings = {key: contents.tensors[key] for key in left if formats.is_embedding(key)}
    known = _choose_family(modules, contents.tensors, family, families, contents.label) if modules else None
    if not modules and not embeddings:
        raise UnknownFormatError(
            f"{contents.label}: none of its {len(contents.tensors)} keys is an adapter's",
            problems=[f"{key}: {reason}" for key, reason in left.items()],
            mend="Is this a whole model's checkpoint, or a file of another kind?",
            state=UNTOUCHED,
        )
    reading = _Reading(ignored={key: reason for key, reason in left.items() if key not in embeddings})
    scalings = Scalings.of(contents.metadata, contents.config)
    namespace = _vote(modules, known)
    for module in modules:
        _bind(module, contents, known, layout, scalings, namespace, reading)
    if reading.problems:
        raise MalformedAdapterError(
            f"{contents.label} ({spelling}): {len(reading.problems)} of {len(modules)} modules are malformed",
            problems=reading.problems,
            mend="The file is damaged, or its trainer writes something that is not known yet.",
            state=UNTOUCHED,
        )
    return Adapter(
        deltas=reading.deltas,
        family=known.name if known else None,
        format=spelling,
        metadata=contents.metadata,
        embeddings=embeddings,
        bound=reading.bound,
        ignored=reading.ignored,
        unresolved=tuple(reading.unresolved),
        source=contents.label,
    )


def family_named(name: str, families: Sequence[Family] = FAMILIES) -> Family:
    """The family with this identifier.

    Raises:
        UnknownFamilyError: none.
    """
    for family in families:
        if family.name == name:
            return family
    raise UnknownFamilyError(f"no family {name!r}", mend=f"There are {', '.join(f.name for f in families)}.")


def _choose_family(
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
    if not ranking or ranking[0][0] == 0:
        return None
    best = [family for score, family in ranking if score == ranking[0][0]]
    if len(best) > 1:
        logger.info("%s: names and shapes fit %s; read as %s", label, ", ".join(f.name for f in best), best[0].name)
    return best[0]


def rank_families(
    modules: Sequence[RawModule], tensors: Mapping[str, Tensor], families: Sequence[Family] = FAMILIES
) -> list[tuple[float, Family]]:
    """Families by the share of modules whose name they know and whose shape does not contradict them, best first."""
    sample = modules[:: max(1, len(modules) // SAMPLE)]
    scores = [(sum(_score(module, tensors, family) for module in sample) / len(sample), family) for family in families]
    return sorted(scores, key=lambda pair: -pair[0])


def _score(module: RawModule, tensors: Mapping[str, Tensor], family: Family) -> float:
    """1 where name and telling width fit, 0 where the name is unknown, less than 0 where the width contradicts."""
    for component, reading in _readings(module, family, None):
        if len(reading.paths) > 1 or "down" not in module.keys:
            return 1.0
        expected = family.expected_shape(component, reading.paths[0])
        shape = tensors[module.keys["down"]].shape
        up = tensors[module.keys["up"]].shape if "up" in module.keys else ()
        if expected is None or len(shape) < 2 or not up:
            return 1.0
        actual = (up[0], shape[1])
        return 1.0 if all(want in (None, have) for want, have in zip(expected, actual, strict=True)) else -1.0
    return 0.0


def _readings(module: RawModule, family: Family, layout: Layout | None) -> list[tuple[str, Resolved]]:
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


def _vote(modules: Iterable[RawModule], family: Family | None) -> bool | None:
    """Whether the file speaks diffusers' names, told by the names that only one side has; None if none tells."""
    if family is None:
        return None
    ambiguous = False
    ballots: set[bool] = set()
    for module in modules:
        readings = _readings(module, family, None)
        if len(readings) == 2:
            ambiguous = True
        elif readings:
            ballots.add(readings[0][1].is_diffusers)
    return ballots.pop() if ambiguous and len(ballots) == 1 else None


def _bind(
    module: RawModule,
    contents: Contents,
    family: Family | None,
    layout: Layout | None,
    scalings: Scalings,
    speaks_diffusers: bool | None,
    reading: _Reading,
) -> None:
    """Build one module's delta and put it under its diffusers paths."""
    keys = tuple(module.keys.values())
    readings = _readings(module, family, layout) if family else []
    if len(readings) == 2 and speaks_diffusers is not None:
        readings = [r for r in readings if r[1].is_diffusers == speaks_diffusers]
    tensors = {slot: contents.tensors[key] for slot, key in module.keys.items()}
    if "magnitude_out" in tensors and "magnitude" not in tensors:
        # PEFT's are per output always, also where the shape is a convolution's [1, out, 1, 1].
        tensors["magnitude"] = tensors.pop("magnitude_out").flatten()
    if not contents.names_only and not (tensors.keys() - {"alpha"}):
        reading.ignored |= dict.fromkeys(keys, "alpha without a tensor to scale")
        return
    component, path = _target(module, readings, family, layout)
    try:
        alpha = None if contents.names_only else _alpha(tensors.pop("alpha", None), module)
        delta = UnreadDelta()
        if not contents.names_only:
            delta = scalings.apply(build(tensors, alpha), component, path, given=alpha is not None)
        if path is None:
            reason = _why_unresolved(readings)
            hint = family.named_component(module.component) if family else ()
            reading.unresolved.append(Unresolved((*hint, module.component)[0], module.name, delta, keys, reason))
            return
        parts = _place(delta, readings[0][1], component, layout) if readings else {path: delta}
    except (MalformedAdapterError, ConversionError) as error:
        reading.problems.append(f"{module.name}: {error.what}")
        return
    reading.bound |= dict.fromkeys(keys, tuple(f"{component}.{part}" for part in parts))
    _store(parts, component, keys, exact=not readings or readings[0][1].is_diffusers, reading=reading)


def _target(
    module: RawModule, readings: list[tuple[str, Resolved]], family: Family | None, layout: Layout | None
) -> tuple[str, str | None]:
    """Component and first path of a module, the live model asked where the tables are silent."""
    if len(readings) == 1:
        return readings[0][0], readings[0][1].paths[0]
    hints = family.named_component(module.component) if family else ()
    if not readings and layout is not None:
        for component in (*hints, module.component):
            path = layout.find(component, module.name)
            if path is not None:
                return component, path
    return (*hints, module.component)[0], None


def _why_unresolved(readings: list[tuple[str, Resolved]]) -> str:
    if len(readings) == 2:
        names = " or ".join(reading.paths[0] for _, reading in readings)
        return f"ambiguous: {names}, and no other key of the file tells which names it speaks"
    return "no such name in this family"


def _alpha(tensor: Tensor | None, module: RawModule) -> float | None:
    if tensor is None:
        return None
    if tensor.numel() != 1:
        raise MalformedAdapterError(f"alpha has {tensor.numel()} values, one was expected")
    if tensor.is_meta:
        return 1.0
    alpha = float(tensor)
    if alpha != alpha or abs(alpha) == float("inf"):
        raise MalformedAdapterError(f"alpha is {alpha}")
    return alpha


def _place(delta: Delta, resolved: Resolved, component: str, layout: Layout | None) -> dict[str, Delta]:
    """The delta's parts under their paths: swapped and split as the rule says, sizes from a live model first."""
    rule, paths = resolved.rule, resolved.paths
    if rule.swap == "all" or (rule.swap == "last" and _is_last(resolved, component, layout)):
        delta = delta.swap_halves()
    if len(paths) == 1:
        return {paths[0]: delta}
    rows = delta.out_features
    live = [layout.rows(component, path) for path in paths] if layout else []
    if live and all(size is not None for size in live) and rows in (-1, sum(size or 0 for size in live)):
        sizes = [size or 0 for size in live]
    else:
        unit, rest = divmod(rows, sum(rule.shares))
        if rest:
            parts = " | ".join(path.rsplit(".", 1)[-1] for path in paths)
            raise MalformedAdapterError(f"{rows} rows cannot be cut into {parts} as {list(rule.shares)}")
        sizes = [unit * share for share in rule.shares]
    return dict(zip(paths, delta.split(sizes), strict=True))


def _is_last(resolved: Resolved, component: str, layout: Layout | None) -> bool:
    blocks = layout.blocks(component, resolved.paths[0]) if layout else None
    return blocks is not None and resolved.block == blocks - 1


def _store(parts: Mapping[str, Delta], component: str, keys: tuple[str, ...], exact: bool, reading: _Reading) -> None:
    """Put parts where nothing is yet; an exact name beats a part of a fused one, anything else is a conflict."""
    deltas = reading.deltas.setdefault(component, {})
    for path, delta in parts.items():
        at = (component, path)
        if at in reading.keys:
            was_exact = at in reading.exact
            if exact == was_exact:
                reading.problems.append(f"{component}.{path}: both {reading.keys[at][0]} and {keys[0]} change it")
                continue
            _lose(keys if was_exact else reading.keys[at], f"{component}.{path}", reading)
            if was_exact:
                continue
        if exact:
            reading.exact.add(at)
        deltas[path] = delta
        reading.keys[at] = keys


def _lose(keys: Iterable[str], target: str, reading: _Reading) -> None:
    """Take a target away from these keys; a key that is left with none is ignored."""
    for key in keys:
        rest = tuple(other for other in reading.bound.pop(key, ()) if other != target)
        if rest:
            reading.bound[key] = rest
        else:
            reading.ignored[key] = f"{target} is also given by its own name, which goes first"


def with_live_names(adapter: Adapter, layout: Layout) -> Adapter:
    """The adapter with those of its unresolved modules bound that a live model knows by name."""
    deltas = {component: dict(modules) for component, modules in adapter.deltas.items()}
    bound, rest = dict(adapter.bound), list[Unresolved]()
    for module in adapter.unresolved:
        path = None if module.reason.startswith("ambiguous") else layout.find(module.component, module.name)
        if path is None or module.delta is None or path in deltas.get(module.component, {}):
            rest.append(module)
            continue
        deltas.setdefault(module.component, {})[path] = module.delta
        bound |= dict.fromkeys(module.keys, (f"{module.component}.{path}",))
    return replace(adapter, deltas=deltas, bound=bound, unresolved=tuple(rest))


__all__ = ["Layout", "family_named", "parse", "rank_families", "read_adapter", "with_live_names"]
