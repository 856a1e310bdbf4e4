"""File <-> `Adapter`: the spelling axis and the names axis meet here, and nothing of the modules is known."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from .adapter import Adapter, Unresolved
from .deltas import Delta, DoraDelta, build_parts, joined, parts_of
from .deltas.unread import UnreadDelta
from .detection import (
    choose_family,
    is_last_by_rows,
    joined_spellings,
    names_spoken,
    readings_of,
    told_depth,
    unwrapped,
    vote,
    why_unresolved,
)
from .errors import (
    UNTOUCHED,
    CheckpointError,
    ConversionError,
    MalformedAdapterError,
    UnknownFamilyError,
    UnknownFormatError,
)
from .families import FAMILIES, Family
from .families.rules import Resolved
from .files import Contents, read
from .formats import RawModule, is_embedding, told_by_names
from .locating import HubOptions
from .peft_parameters import read_with_parameters
from .scaling import Scalings, alpha_of

Source = str | os.PathLike[str] | Mapping[str, Tensor] | Adapter


class Layout(Protocol):
    """What a live model can tell the names layer."""

    def rows(self, component: str, path: str) -> int | None:
        """Output rows of this module, None if the model has no such module."""
        ...

    def blocks(self, component: str, path: str) -> int | None:
        """Number of blocks in the list that this path runs through, None if unknown."""
        ...

    def denoiser(self) -> str | None:
        """The component that names without one are for: the first."""
        ...

    def find(self, component: str, name: str) -> str | None:
        """The path of the live module that this name, dotted or flattened, means."""
        ...

    def parameters(self, component: str, path: str) -> Sequence[str]:
        """Names of a module's own parameters, as they were registered."""
        ...


@dataclass
class _Reading:
    """One file while it is read: what is known beforehand, and what is gathered."""

    contents: Contents
    modules: Sequence[RawModule]
    family: Family | None
    layout: Layout | None
    scalings: Scalings
    speaks_diffusers: bool | None
    deltas: dict[str, dict[str, Delta]] = field(default_factory=dict[str, dict[str, Delta]])
    bound: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    ignored: dict[str, str] = field(default_factory=dict[str, str])
    unresolved: list[Unresolved] = field(default_factory=list[Unresolved])
    exact: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    keys: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict[tuple[str, str], tuple[str, ...]])
    problems: list[str] = field(default_factory=list[str])
    """What is wrong with the file."""
    unsaid: list[tuple[str, ConversionError]] = field(default_factory=list[tuple[str, ConversionError]])
    """Modules of sound data that cannot be said for a model with diffusers' names."""


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
        ConversionError: a change that cannot be cut to the modules that diffusers has for a fused one.
    """
    if isinstance(source, Adapter):
        return source
    adapter = parse(read(source, hub, allow_pickle=use_safetensors is False), family, layout, families)
    if adapter.family is None and not adapter.deltas and not adapter.embeddings:
        raise UnknownFamilyError(
            f"{adapter.source} ({adapter.format}): no family knows its {len(adapter.unresolved)} modules",
            problems=[f"{module.name}: {module.reason}" for module in adapter.unresolved],
            mend="Name the family with family=…; for a model of your own, pass the file itself to load_lora_adapter.",
            state=UNTOUCHED,
        )
    return adapter


def parse(
    contents: Contents,
    family: str | Family | None = None,
    layout: Layout | None = None,
    families: Sequence[Family] = FAMILIES,
) -> Adapter:
    """Tensors and metadata to an `Adapter`; see `read_adapter`."""
    scalings = Scalings.of(contents.metadata, contents.config, contents.label)
    modules, left, spelling = read_with_parameters(list(contents.tensors), scalings.configs, layout)
    modules = joined_spellings(modules)
    embeddings = {key: contents.tensors[key] for key in left if is_embedding(key)}
    if not modules and not embeddings:
        raise _no_adapter(contents.label, left)
    known, ties = choose_family(modules, contents.tensors, family, families, contents.label)
    if not _are_known(modules, known, layout):
        modules = unwrapped(modules, [known] if known else families)
        known, ties = choose_family(modules, contents.tensors, family, families, contents.label)
    spelling = told_by_names(spelling, names_spoken(modules, known))
    reading = _Reading(contents, modules, known, layout, scalings, vote(modules, known))
    reading.ignored |= {key: reason for key, reason in left.items() if key not in embeddings}
    malformed = 0
    for module in modules:
        before = len(reading.problems)
        _bind(module, reading)
        malformed += len(reading.problems) > before  # a fused module has a problem for each of its targets
    if reading.problems:
        raise MalformedAdapterError(
            f"{contents.label} ({spelling}): {malformed} of {len(modules)} modules are malformed",
            problems=reading.problems,
            mend="The file is damaged, or its trainer writes something that is not known yet.",
            state=UNTOUCHED,
        )
    if reading.unsaid:
        raise ConversionError(
            f"{contents.label} ({spelling}): {len(reading.unsaid)} of {len(modules)} modules cannot be said in "
            "diffusers' names",
            problems=[f"{name}: {error.what}" for name, error in reading.unsaid],
            mend=" ".join(dict.fromkeys(error.mend for _, error in reading.unsaid if error.mend)),
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
        ties=ties,
    )


def _are_known(modules: Sequence[RawModule], family: Family | None, layout: Layout | None) -> bool:
    """Whether the family or the live model has a module of any of these names."""
    if family is not None and any(readings_of(module, family) for module in modules):
        return True
    if layout is None:
        return False
    component = family.denoiser if family is not None else layout.denoiser() or ""
    return any(layout.find(component, module.name) is not None for module in modules)


def _no_adapter(label: str, left: Mapping[str, str]) -> UnknownFormatError:
    """The error for a file without a change in it."""
    problems = [f"{key}: {reason}" for key, reason in left.items()]
    own = sum(key.endswith((".weight", ".bias", ".scale")) and "lora_" not in key for key in left)
    if own * 2 > len(left):
        return CheckpointError(
            f"{label} is a checkpoint, no adapter: {own} of its {len(left)} keys are weights of a model, none a change",
            problems=problems,
            mend="Load it as a model, with from_single_file; `lora-loaders extract` makes an adapter of two.",
            state=UNTOUCHED,
        )
    return UnknownFormatError(
        f"{label}: none of its {len(left)} keys is an adapter's" if left else f"{label} is empty",
        problems=problems,
        mend="Is it a file of another kind?",
        state=UNTOUCHED,
    )


def _bind(module: RawModule, reading: _Reading) -> None:
    """Build one module's delta and put it under its diffusers paths."""
    keys = tuple(module.keys.values())
    for slot, key in module.repeated.items():
        if not reading.contents.names_only and not _are_equal(module.keys[slot], key, reading.contents):
            reading.problems.append(f"{module.name}: {module.keys[slot]} and {key} differ")
    tensors = {slot: reading.contents.tensors[key] for slot, key in module.keys.items()}
    if not reading.contents.names_only and not (tensors.keys() - {"alpha"}):
        reading.ignored |= dict.fromkeys(keys, "alpha without a tensor to scale")
        return
    readings = _chosen_readings(module, reading)
    component, path = _target(module, readings, reading)
    try:
        pieces = _pieces(tensors, component, path, reading)
        if path is None:
            reason = why_unresolved(module, readings, reading.family)
            reading.unresolved.append(Unresolved(component, module.name, joined(pieces), keys, reason))
            return
        parts = _place(pieces, module, readings[0], reading) if readings else {path: joined(pieces)}
    except MalformedAdapterError as error:
        reading.problems.append(f"{module.name}: {error.what}")
        return
    except ConversionError as error:
        reading.unsaid.append((module.name, error))
        return
    reading.bound |= dict.fromkeys(keys, tuple(f"{component}.{part}" for part in parts))
    _store(parts, component, keys, exact=not readings or readings[0][1].is_diffusers, reading=reading)


def _chosen_readings(module: RawModule, reading: _Reading) -> list[tuple[str, Resolved]]:
    """The readings of a name that the live model and the file's other names leave."""
    readings = readings_of(module, reading.family) if reading.family else []
    layout = reading.layout
    if len(readings) > 1 and layout is not None:
        living = [(c, r) for c, r in readings if all(layout.rows(c, path) is not None for path in r.paths)]
        readings = living or readings
    if len(readings) > 1 and reading.speaks_diffusers is not None:
        readings = [r for r in readings if r[1].is_diffusers == reading.speaks_diffusers]
    if any(resolved.rule.last_only for _, resolved in readings):
        readings = [(c, r) for c, r in readings if r.rule.last_only == _is_last(r, c, reading)]
    return readings


def _pieces(tensors: dict[str, Tensor], component: str, path: str | None, reading: _Reading) -> list[Delta]:
    """The module's delta, or those of its parts where the file has trained them apart."""
    if reading.contents.names_only:
        return [UnreadDelta()]
    if "magnitude_out" in tensors and "magnitude" not in tensors:
        # PEFT's are per output always, also where the shape is a convolution's [1, out, 1, 1].
        tensors["magnitude"] = tensors.pop("magnitude_out").flatten()
    alpha = alpha_of(tensors.pop("alpha", None))
    pieces = build_parts(tensors, alpha)
    return [reading.scalings.apply(piece, component, path, given=alpha is not None) for piece in pieces]


def _target(module: RawModule, readings: list[tuple[str, Resolved]], reading: _Reading) -> tuple[str, str | None]:
    """Component and first path of a module, the live model asked where the tables are silent."""
    if len(readings) == 1:
        return readings[0][0], readings[0][1].paths[0]
    hints = [*(reading.family.named_component(module.component) if reading.family else ()), module.component]
    if reading.family is None and reading.layout is not None and module.component in ("", "denoiser"):
        hints = [reading.layout.denoiser() or module.component]  # a model of no known family
    for component in hints if not readings and reading.layout is not None else ():
        path = reading.layout.find(component, module.name) if reading.layout else None
        if path is not None:
            return component, path
    return hints[0], None


def _are_equal(one: str, other: str, contents: Contents) -> bool:
    first, second = contents.tensors[one], contents.tensors[other]
    return first.shape == second.shape and (first.is_meta or first.equal(second))


def _place(pieces: list[Delta], module: RawModule, target: tuple[str, Resolved], reading: _Reading) -> dict[str, Delta]:
    """The delta's parts under their paths: swapped and split as the rule says, sizes from a live model first."""
    component, resolved = target
    rule, paths, layout = resolved.rule, resolved.paths, reading.layout
    if len(pieces) == len(paths) > 1:
        return dict(zip(paths, pieces, strict=True))
    delta = joined(pieces)
    if rule.parameter:
        delta = replace(delta, of_parameter=True)
    if rule.head and module.adapter:
        delta = _heads_apart(delta, resolved)
    if rule.swap == "all" or (rule.swap == "last" and _is_last(resolved, component, reading, delta)):
        delta = delta.swap_halves()
    if len(paths) == 1:
        return {paths[0]: delta}
    rows = delta.out_features
    live = [layout.rows(component, path) for path in paths] if layout else []
    if live and all(size is not None for size in live) and rows in (-1, sum(size or 0 for size in live)):
        sizes = [size or 0 for size in live]
    elif rows < 0:  # names alone were read, which have no rows to count
        sizes = list(rule.shares)
    else:
        unit, rest = divmod(rows, sum(rule.shares))
        if rest:
            parts = " | ".join(path.rsplit(".", 1)[-1] for path in paths)
            raise MalformedAdapterError(f"{rows} rows cannot be cut into {parts} as {list(rule.shares)}")
        sizes = [unit * share for share in rule.shares]
    return parts_of(delta, dict(zip(paths, sizes, strict=True)))


def _heads_apart(delta: Delta, resolved: Resolved) -> Delta:
    """Rows in the order [q of all heads; k of all; v of all], from [q k v of head 0; q k v of head 1; …].

    DiffSynth writes MiniMax-H3 so, with equal keys and shapes; its adapter slot in the keys tells it.
    """
    head, parts = resolved.rule.head or 1, len(resolved.paths)
    return delta.map_rows(lambda t: t.view(-1, parts, head, *t.shape[1:]).transpose(0, 1).reshape(t.shape))


def _is_last(resolved: Resolved, component: str, reading: _Reading, delta: Delta | None = None) -> bool:
    """Whether this is the model's last block: the live model's, one whose rows say it, or a published one's."""
    path, layout = resolved.paths[0], reading.layout
    blocks = layout.blocks(component, path) if layout else None
    if blocks is None and delta is not None and (told := is_last_by_rows(delta)) is not None:
        return told
    if blocks is None and reading.family is not None:
        blocks = told_depth(reading.modules, reading.family, path)
    return blocks is not None and resolved.block == blocks - 1


def _store(parts: Mapping[str, Delta], component: str, keys: tuple[str, ...], exact: bool, reading: _Reading) -> None:
    """Put parts where nothing is yet; an exact name beats a part of a fused one, anything else is a conflict."""
    deltas = reading.deltas.setdefault(component, {})
    for path, delta in parts.items():
        at, label = (component, path), f"{component}.{path}"
        if at in reading.keys:
            if exact == (at in reading.exact) and _are_same(delta, deltas[path]):
                _lose(keys, label, f"the same as {reading.keys[at][0]}", reading)
                continue
            if exact == (at in reading.exact):
                reading.problems.append(f"{label}: both {reading.keys[at][0]} and {keys[0]} change it")
                continue
            # SimpleTuner writes the unused split modules, zero as they were made, beside the fused one it trained.
            empty = _says_nothing(delta if exact else deltas[path])
            reason = f"zero, and {label} is" if empty else f"{label} is also"
            reason += " changed through a fused module" if empty else " given by its own name, which goes first"
            wins = exact != empty
            _lose(reading.keys[at] if wins else keys, label, reason, reading)
            if not wins:
                continue
        (reading.exact.add if exact else reading.exact.discard)(at)
        deltas[path] = delta
        reading.keys[at] = keys


def _are_same(one: Delta, other: Delta) -> bool:
    """Whether two spellings of one module hold the same tensors."""
    first, second = one.tensors(), other.tensors()
    same_scale = one.alpha_value == other.alpha_value and type(one) is type(other) and first.keys() == second.keys()
    return same_scale and all(
        tensor.shape == second[slot].shape and (tensor.is_meta or tensor.equal(second[slot]))
        for slot, tensor in first.items()
    )


def _says_nothing(delta: Delta) -> bool:
    """Whether the change is zero; a magnitude beside it is then the weight's own."""
    inner = delta.inner if isinstance(delta, DoraDelta) else delta
    return any(not tensor.is_meta and not tensor.any() for tensor in inner.tensors().values())


def _lose(keys: Iterable[str], target: str, reason: str, reading: _Reading) -> None:
    """Take a target away from these keys; a key that is left with none is ignored."""
    for key in keys:
        rest = tuple(other for other in reading.bound.pop(key, ()) if other != target)
        if rest:
            reading.bound[key] = rest
        else:
            reading.ignored[key] = reason


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
