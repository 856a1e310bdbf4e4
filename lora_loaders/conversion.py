"""File <-> `Adapter`: the spelling axis and the names axis meet here, and nothing of the modules is known."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from .adapter import Adapter, Unresolved
from .detection import choose_family, joined_spellings, names_spoken, readings_of, unwrapped, vote
from .errors import (
    UNTOUCHED,
    CheckpointError,
    ConversionError,
    MalformedAdapterError,
    UnknownFamilyError,
    UnknownFormatError,
)
from .families import FAMILIES, Family
from .files import Contents, read
from .formats import RawModule, is_embedding, told_by_names
from .locating import HubOptions
from .peft_parameters import read_with_parameters, registered
from .placing import Layout, Reading, bind, own_path
from .scaling import Scalings

DAMAGED = "The file is damaged, or its trainer writes something that is not known yet."
SEVERAL = "Keys of it mean the same tensor, as where one file holds several adapters: keep the keys of one of them."

Source = str | os.PathLike[str] | Mapping[str, Tensor] | Adapter


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
    scalings = Scalings.of(contents.metadata, contents.config, contents.label, contents.tensors)
    modules, left, spelling = read_with_parameters(list(contents.tensors), scalings.configs, layout)
    modules = joined_spellings(modules)
    embeddings = {key: contents.tensors[key] for key in left if is_embedding(key)}
    if not modules and not embeddings:
        raise _no_adapter(contents.label, left)
    known, ties = choose_family(modules, contents.tensors, family, families, contents.label)
    if not _are_known(modules, known, layout):
        modules = unwrapped(modules, [known] if known else families)
        known, ties = choose_family(modules, contents.tensors, family, families, contents.label)
    if family is None and known is not None and layout is not None and _speaks_its_own(modules, known, layout):
        known, ties = None, ()
    spelling = told_by_names(spelling, names_spoken(modules, known))
    reading = Reading(contents, modules, known, layout, scalings, vote(modules, known))
    reading.ignored |= {key: reason for key, reason in left.items() if key not in embeddings}
    malformed = 0
    for module in modules:
        before = len(reading.problems)
        bind(module, reading)
        malformed += len(reading.problems) > before  # a fused module has a problem for each of its targets
    if reading.problems:
        raise MalformedAdapterError(
            f"{contents.label} ({spelling}): {malformed} of {len(modules)} modules are malformed",
            problems=reading.problems,
            mend=SEVERAL if any(module.repeated for module in modules) else DAMAGED,
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
        registered={} if layout is None else registered(reading.deltas, layout),
    )


def _are_known(modules: Sequence[RawModule], family: Family | None, layout: Layout | None) -> bool:
    """Whether the family or the live model has a module of any of these names."""
    if family is not None and any(readings_of(module, family) for module in modules):
        return True
    if layout is None:
        return False
    if family is None:
        return any(own_path(module, layout) is not None for module in modules)
    return any(layout.find(family.denoiser, module.name) is not None for module in modules)


def _speaks_its_own(modules: Sequence[RawModule], guess: Family, layout: Layout) -> bool:
    """Whether a live model that no family knows has more of these names than the family that the file looks like.

    A ControlNet's blocks are called as the UNet's that it is a copy of.
    """
    own = sum(own_path(module, layout) is not None for module in modules)
    guessed = sum(any(layout.find(c, p) for c, r in readings_of(m, guess) for p in r.paths) for m in modules)
    return own > guessed


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
