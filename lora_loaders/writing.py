"""`Adapter` -> file: names read backward through the family's table, tensors under the format's suffixes."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .atomic import atomic
from .deltas import Delta, DoraDelta, ExpertsDelta, LoraDelta
from .deltas.rows import rows_in
from .detection import family_named, is_last_by_rows
from .errors import AdapterFileError, ConversionError
from .families import FAMILIES, Family, Names
from .families.rules import Resolved
from .files import write_safetensors
from .formats import FORMATS, KOHYAS, Format, format_named
from .formats.format import ALL_ALGEBRAS
from .formats.grammar import COMMON, MODULATION, STYLES
from .headers import indexed_metadata, metadata_of, peft_config
from .kohya_names import NAMES_KEY, Flattened, kohya_names
from .locating import CONFIG_NAME, DEFAULT_NAMES, PICKLES
from .peft_parameters import wrapped
from .peft_types import for_peft, refuse_unreadable
from .spelling import alpha_tensor, magnitude_slots, spelled

MEND = "Choose another format, or write in float32 where rounding is the reason."


@dataclass
class _Writing:
    """What is gathered while one adapter is written."""

    form: Format
    family: Family | None
    trainer_names: Flattened = "diffusers"
    """Whose names the spelling of kohya's trainers flattens."""
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    alphas: dict[str, dict[str, LoraDelta | ExpertsDelta]] = field(
        default_factory=dict[str, dict[str, LoraDelta | ExpertsDelta]]
    )
    """Component -> name as written -> the LoRA under it, whose rank and alpha the metadata states."""
    doras: set[str] = field(default_factory=set[str])
    """Those of them, as `component.name`, that are under DoRA."""
    parameters: set[str] = field(default_factory=set[str])
    """Paths of the raw parameters among what is changed."""
    tuned: dict[str, Delta] = field(default_factory=dict[str, Delta])
    """Name as written -> any other delta in PEFT's own format, which a configuration of its tuner describes."""
    changes: list[Delta] = field(default_factory=list[Delta])
    """Every delta as it is written."""
    problems: list[str] = field(default_factory=list[str])
    mends: list[str] = field(default_factory=list[str])

    def refuse(self, error: ConversionError, where: str = "") -> None:
        """Note what cannot be said, and the way out that the error knows."""
        self.problems.append(f"{where}: {error.what}" if where else error.what)
        if error.mend:
            self.advise(error.mend)

    def advise(self, mend: str) -> None:
        """Note a way out, once."""
        if mend not in self.mends:
            self.mends.append(mend)


def to_tensors(
    adapter: Adapter, format: str = "diffusers", *, families: Sequence[Family] = FAMILIES
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """The adapter's tensors as a format spells them.

    Returns:
        Tensors by key, the header's metadata, and PEFT's configuration (for `adapter_config.json`).

    Raises:
        ConversionError: what the format cannot say, module by module.
        ValueError: no such format.
    """
    form = format_named(format)
    adapter.refuse_unresolved()
    family = family_named(adapter.family, families) if adapter.family else None
    trainer_names = kohya_names(adapter, family) if family else "diffusers"
    writing = _Writing(form, family, trainer_names)
    components = [component for component, deltas in adapter.deltas.items() if deltas]
    if form.name == "peft" and len(components) > 1:
        writing.problems.append(f"one model a file, this adapter changes {', '.join(components)}")
        writing.advise("Write one file for each component.")
    writing.parameters |= {path for _, path, delta in adapter.modules() if delta.of_parameter}
    for component in components:
        prefix = _prefix(form, component, family)
        if prefix is None:
            writing.problems.append(f"{component}: the format has no word for this component")
            continue
        for name, delta in _named(adapter.deltas[component], component, writing):
            _write_delta(name, delta, component, prefix, writing)
    for token, vector in adapter.embeddings.items():
        writing.tensors[token] = vector
    config: dict[str, Any] = {}
    try:
        config = peft_config(writing.alphas, writing.doras, writing.tuned)
    except ConversionError as error:
        writing.refuse(error)
    if writing.problems:
        raise ConversionError(
            f"{form.name} cannot say this adapter ({adapter.describe()}; {adapter.source}): "
            f"{len(writing.problems)} place{'s' * (len(writing.problems) > 1)}",
            problems=writing.problems,
            mend=" ".join(writing.mends) or MEND,
            state="Nothing was written.",
        )
    tuner = config if writing.tuned else {}
    metadata = metadata_of(adapter, form, family, writing.alphas, writing.doras, tuner, writing.changes)
    if family is not None and form.name not in KOHYAS and trainer_names != family.trainer_names:
        metadata[NAMES_KEY] = trainer_names
    return writing.tensors, metadata, config


def write_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    format: str = "diffusers",
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = True,
    families: Sequence[Family] = FAMILIES,
) -> Path:
    """Write an adapter in any spelling, whole or not at all.

    Args:
        adapter: what to write.
        path: a `.safetensors` file, or a folder, which gets the format's usual file name (and PEFT's
            `adapter_config.json`).
        format: see `lora_loaders.formats`.
        dtype: floating dtype to write in; as it is by default.
        overwrite: whether an existing file may be replaced.
        families: where the adapter's family is looked up, which it knows by name alone: pass those again that it was
            read with.

    Returns:
        The path of the file.

    Raises:
        ConversionError: what the format cannot say.
        AdapterFileError: the file is there and must not be replaced.
    """
    if dtype is not None:
        adapter = adapter.to(dtype=dtype)
    path = target_path(path, format)
    config_path = path.parent / CONFIG_NAME if format == "peft" and path.name == DEFAULT_NAMES[1] else None
    taken = [file for file in (path, config_path) if file is not None and file.exists()]
    if taken and not overwrite:
        raise AdapterFileError(
            f"{taken[0]} is there already",
            mend="Choose another name, or allow overwriting.",
            state="Nothing was written.",
        )
    tensors, metadata, config = to_tensors(adapter, format, families=families)
    if format == "indexed":
        metadata |= indexed_metadata(adapter, families)
    with ExitStack() as stack:
        if config_path is not None:
            stack.enter_context(atomic(config_path)).write_text(json.dumps(config, indent=2), "utf-8")
        write_safetensors(tensors, path, metadata)
    return path


def target_path(path: str | os.PathLike[str], format: str) -> Path:
    """The file that `write_adapter` writes for this path: itself, or the format's usual name inside a folder.

    Raises:
        AdapterFileError: the path names a pickle.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise AdapterFileError(
            f"{path} would be a pickle; adapters are written as safetensors",
            mend="Give a name that ends in .safetensors, or a folder.",
            state="Nothing was written.",
        )
    return path if path.suffix == ".safetensors" else path / DEFAULT_NAMES[format == "peft"]


def _prefix(form: Format, component: str, family: Family | None) -> str | None:
    is_encoder = component.startswith("text_encoder")
    if family is not None and component not in family.components:
        return None
    template = form.text_encoder if is_encoder else form.denoiser
    if template is None or (form.name == "peft" and family is not None and not _tells(component, family)):
        return None
    number = family.encoder_number(component) if is_encoder and family else ""
    encoder = family.encoders.get(component, "") if family else ""
    if form.encoders is not None:
        encoder = form.encoders.get(encoder, "")
    if "{encoder}" in template and not encoder:
        return None  # its name is not known
    if form.name in ("diffusers", "diffusers-old", "peft", "indexed"):
        return template.format(component=component)
    if family is not None and not is_encoder and component != family.denoiser and not _is_routed(component, family):
        return None  # which of two denoisers is meant stands in no key
    level = family.level if family is not None and form.name == "original" and not is_encoder else ""
    return template.format(component=component, number=number, encoder=encoder) + level


def _tells(component: str, family: Family) -> bool:
    """Whether names alone say which component they are of: those of the second CLIP of a pair do not."""
    names = family.components[component]
    return component == next(other for other, known in family.components.items() if known is names)


def _is_routed(component: str, family: Family) -> bool:
    """Whether the denoiser's own names hold this component's modules (Anima's text conditioner)."""
    return any(rule.component == component for rule in family.components[family.denoiser].rules)


def _named(deltas: Mapping[str, Delta], component: str, writing: _Writing) -> list[tuple[str, Delta]]:
    """Deltas under the names that the format uses: joined and swapped back where the table says so."""
    family, form = writing.family, writing.form
    if form.name == "indexed":
        return _indexed(deltas, component, writing)
    names = form.names
    if names == "trainer":
        names = writing.trainer_names
    # Trainers, XLabs and OMI call an encoder's modules as transformers does, ComfyUI as the checkpoint does.
    is_encoder = component.startswith("text_encoder")
    if is_encoder and form.name in KOHYAS and family is not None:
        names = "trainer" if family.components[component].has("trainer") else "diffusers"
    elif is_encoder and form.names != "original":
        names = "diffusers"
    if names == "diffusers" or family is None:
        if form.names in ("xlabs", "omi") and not is_encoder:
            writing.problems.append(f"{component}: no {names} names are known for this family")
        return list(deltas.items())
    return _joined(deltas, family.components[component], names, component, writing)


def _joined(
    deltas: Mapping[str, Delta], names: Names, dialect: Any, component: str, writing: _Writing
) -> list[tuple[str, Delta]]:
    reader = names.writing(dialect)
    groups: dict[str, tuple[Resolved, dict[str, Delta]]] = {}
    for path, delta in deltas.items():
        source, resolved = reader.source(path)
        if dialect == "xlabs" and resolved.is_diffusers:
            writing.problems.append(f"{component}.{path}: the format has no name for this module")
            continue
        if resolved.is_diffusers and (other := _owner(source, names)):
            # Wan's `norm3`: written so, it would be read as the other module's, or take its place in the file.
            writing.problems.append(f"{component}.{path}: the format means {other} by this name, and has none for it")
            continue
        groups.setdefault(source, (resolved, {}))[1][path] = delta
    named: list[tuple[str, Delta]] = []
    for source, (resolved, parts) in groups.items():
        try:
            delta = _join(resolved, parts)
            swap = resolved.rule.swap
            swapped = swap == "all" or (swap == "last" and _ends(resolved, delta, deltas, writing.family))
            named.append((source, delta.swap_halves() if swapped else delta))
        except ConversionError as error:
            writing.refuse(error, f"{component}.{source}")
    return named


def _owner(name: str, names: Names) -> str | None:
    """The module that the original calls as diffusers calls another one."""
    return next((r.paths[0] for r in names.resolve(name) if not r.is_diffusers and name not in r.paths), None)


def _ends(resolved: Resolved, delta: Delta, deltas: Mapping[str, Delta], family: Family | None) -> bool:
    """Whether this is the last block: its rows say it, or a published model has as many; reading asks the same."""
    told = is_last_by_rows(delta)
    if told is not None:
        return told
    blocks = resolved.paths[0].partition(".")[0]
    depths = family.depths.get(blocks, ()) if family else ()
    last = max(int(path.split(".")[1]) for path in deltas if path.startswith(f"{blocks}."))
    return resolved.block == last and last + 1 in depths


def _join(resolved: Resolved, parts: Mapping[str, Delta]) -> Delta:
    if len(resolved.paths) == 1:
        return next(iter(parts.values()))
    shares = dict(zip(resolved.paths, resolved.rule.shares, strict=True))
    known, sample = next(iter(parts.items()))
    unit = sample.out_features // shares[known]
    whole = [parts.get(path) or _zero(sample, unit * shares[path]) for path in resolved.paths]
    kinds = {type(part) for part in whole}
    if len(kinds) > 1:
        mixed = ", ".join(sorted(kind.kind for kind in kinds))
        raise ConversionError(f"the parts of this fused module are of different algebras ({mixed})")
    return type(sample).join(whole)


def _zero(like: Delta, rows: int) -> Delta:
    """No change, in the algebra of its sister part: zero rows on the same `down`."""
    if not isinstance(like, LoraDelta):
        raise ConversionError(f"a part of this fused module is missing, and {like.kind} cannot say no change")
    up = like.up.new_zeros(rows, *like.up.shape[1:])
    return replace(like, up=up, up_bias=None, bias=None)


def _indexed(deltas: Mapping[str, Delta], component: str, writing: _Writing) -> list[tuple[str, Delta]]:
    order = writing.family.traversal.get(component, ()) if writing.family else ()
    places = {path: index for index, (_, path) in enumerate(order)}
    named: list[tuple[str, Delta]] = []
    for path, delta in deltas.items():
        if path in places:
            named.append((f":{places[path]}", delta))
        else:
            writing.problems.append(f"{component}.{path}: not among the modules that this format numbers")
    missing = len(order) - len(named)
    if missing and not writing.problems:
        writing.problems.append(f"{component}: the format numbers {len(order)} modules and {missing} have no change")
    return named


def _write_delta(name: str, delta: Delta, component: str, prefix: str, writing: _Writing) -> None:
    form = writing.form
    where = f"{component}.{name}"
    try:
        inner = spelled(delta.inner if isinstance(delta, DoraDelta) else delta, form)
        slots = {**inner.slots(), **magnitude_slots(delta, form)}
        # diffusers reads a LoRA through PEFT; the other algebras it refuses aloud, and they are written for others.
        through_peft = form.name == "peft" or (form.name == "diffusers" and isinstance(inner, LoraDelta))
        if through_peft:
            refuse_unreadable(delta)
        written = wrapped(name, writing.parameters) if form.name == "peft" else name
    except ConversionError as error:
        if rows_in(delta) is not None and (fusing := _fusing(name, component, writing)):
            writing.advise(f"Write a format with fused names ({', '.join(fusing)}), or:")
        writing.refuse(error, where)
        return
    unknown = {kind for kind in (delta.kind, inner.kind) if kind not in form.algebras}
    if unknown:
        writing.problems.append(f"{where}: the format has no words for {', '.join(sorted(unknown))}")
        return
    if isinstance(delta, DoraDelta) and delta.per_input and form.magnitude == "out" and not inner.is_embedding:
        writing.problems.append(f"{where}: the format keeps DoRA magnitudes per output, this one is per input")
        return
    if "diff_m" in slots:
        written, slots = _modulation(name, slots)
    if form.tells_shape and _is_widened(name, inner, component, writing.family):
        slots["reshape_weight"] = torch.tensor(inner.shape)
    start = prefix + (flatten_name(written) if form.flat else written)
    style = STYLES[form.core_style if form.core_style and "mid" in slots else form.style]
    for slot, tensor in slots.items():
        suffix = form.slots.get(slot) or style.get(slot) or COMMON.get(slot)
        if suffix is None:
            writing.problems.append(f"{where}: the format has no word for {slot}")
            continue
        writing.tensors[f"{start}{suffix}"] = for_peft(slot, tensor) if form.name == "peft" else tensor
    writing.changes.append(inner)
    alpha = inner.alpha_value
    if form.alpha == "metadata" and isinstance(inner, LoraDelta | ExpertsDelta):
        writing.alphas.setdefault(component, {})[name] = inner
        if isinstance(delta, DoraDelta):
            writing.doras.add(f"{component}.{name}")
    elif form.name == "peft":
        writing.tuned[name] = inner
    elif form.alpha != "folded" and alpha is not None:
        # PEFT's configuration speaks of LoRA alone; diffusers reads a tensor for the other algebras.
        writing.tensors[f"{start}.alpha"] = alpha_tensor(inner, alpha)


def _fusing(path: str, component: str, writing: _Writing) -> list[str]:
    """The other formats that say every algebra and, in this family, call this module by a fused one's name."""
    family = writing.family
    if family is None:
        return []

    def fuses(form: Format) -> bool:
        names = writing.trainer_names if form.names == "trainer" else form.names
        return names != "diffusers" and len(family.components[component].writing(names).source(path)[1].paths) > 1

    return [f.name for f in FORMATS if f is not writing.form and f.algebras == ALL_ALGEBRAS and fuses(f)]


def _is_widened(name: str, delta: Delta, component: str, family: Family | None) -> bool:
    """Whether the change has more inputs than any published weight here: a Control file."""
    if family is None or not isinstance(delta, LoraDelta):
        return False
    paths = [r.paths[0] for r in family.components[component].resolve(name) if r.paths[0] in family.widens]
    widths = [shape.sizes[1] or 0 for path in paths for shape in family.known_shapes(component, path)]
    return bool(widths) and delta.shape[1] > max(widths)


def _modulation(name: str, slots: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """`….modulation` with `diff_m` loses its last part; under another name the change is an ordinary difference."""
    if name.endswith(f".{MODULATION}"):
        return name.removesuffix(f".{MODULATION}"), slots
    return name, {"diff": slots["diff_m"]}


def flatten_name(name: str) -> str:
    """Dots to underscores, as kohya's trainers do."""
    return name.replace(".", "_")
