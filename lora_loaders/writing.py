"""`Adapter` -> file: names read backward through the family's table, tensors under the format's suffixes."""

import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .atomic import atomic
from .deltas import Delta, DoraDelta, ExpertsDelta, LoraDelta
from .detection import family_named
from .errors import AdapterFileError, ConversionError
from .families import FAMILIES, Family
from .files import write_safetensors
from .formats import FORMATS, KOHYAS, Format, format_named
from .formats.grammar import COMMON, MODULATION, STYLES
from .headers import indexed_metadata, metadata_of, peft_config
from .kohya_names import NAMES_KEY, kohya_names
from .locating import CONFIG_NAME, DEFAULT_NAMES, PICKLES
from .naming import APART, Writing, prefix_of, renamed, stand_in
from .peft_parameters import parameters_of, wrapped
from .peft_types import for_peft, refuse_unreadable
from .spelling import alpha_tensor, magnitude_slots, spelled

logger = logging.getLogger(__name__)


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
    writing = _gathered(adapter, Writing(form, family, trainer_names, stand_in(adapter, family)))
    if writing.problems:
        raise ConversionError(
            f"{form.name} cannot say this adapter ({adapter.describe()}; {adapter.source}): "
            f"{len(writing.problems)} place{'s' * (len(writing.problems) > 1)}",
            problems=writing.problems,
            mend=_ways_out(adapter, writing),
            state="Nothing was written.",
        )
    tuner = writing.config if writing.tuned else {}
    metadata = metadata_of(adapter, form, family, writing.alphas, writing.doras, tuner, writing.changes)
    if family is not None and form.name not in KOHYAS and writing.trainer_names != family.trainer_names:
        metadata[NAMES_KEY] = writing.trainer_names
    return writing.tensors, metadata, writing.config


def _gathered(adapter: Adapter, writing: Writing, *, asks_only: bool = False) -> Writing:
    """All that is written of an adapter, and what of it the format cannot say; only the first such if `asks_only`."""
    form = writing.form
    components = list(adapter.components)
    if form.one_model and len(components) > 1:
        several = f"one model a file, this adapter changes {', '.join(components)}"
        writing.refuse(ConversionError(several, mend=APART))
    writing.parameters |= parameters_of(adapter)
    for component in components:
        if asks_only and writing.problems:
            return writing
        prefix = prefix_of(component, writing)
        if prefix is None:
            writing.refuse_component(component)
            continue
        for name, delta in renamed(adapter.deltas[component], component, writing):
            if asks_only and writing.problems:
                return writing
            _write_delta(name, delta, component, prefix, writing)
    for token, vector in adapter.embeddings.items():
        writing.tensors[token] = vector
    try:
        writing.config = peft_config(writing.alphas, writing.doras, writing.tuned)
    except ConversionError as error:
        writing.refuse(error)
    return writing


def _ways_out(adapter: Adapter, writing: Writing) -> str:
    """What the errors know, and for the other problems what is found by trying: formats, and LoRAs in this one."""
    mends = list(dict.fromkeys(writing.mends.values()))
    if len(writing.mends) == len(writing.problems):
        return " ".join(mends)

    def says(form: Format, adapter: Adapter) -> bool:
        empty = Writing(form, writing.family, writing.trainer_names, writing.stand_in)
        return not _gathered(adapter, empty, asks_only=True).problems

    able = [form.name for form in FORMATS if form is not writing.form and says(form, adapter)]
    ways = [f"write a format that can say it ({', '.join(able)})"] if able else []
    if says(writing.form, adapter.map(_as_lora)):
        needs_base = any(delta.needs_base and _as_lora(delta) is not delta for _, _, delta in adapter.modules())
        ways.append("make a LoRA of it first: --as lora --rank N" + " (and --model, its base weights)" * needs_base)
    ways = ways or ["leave out what is named here: no other format can say it either"]
    found = ", or ".join(ways)
    return " ".join([*mends, f"{found[0].upper()}{found[1:]}."])


def _as_lora(delta: Delta) -> Delta:
    """A LoRA in the place of a change of a matrix, to ask whether a format can say that."""
    shape = delta.shape or ()
    is_lora = isinstance(delta, LoraDelta) and delta.mid is None
    if len(shape) < 2 or is_lora or isinstance(delta, ExpertsDelta):
        return delta
    rows, columns, *kernel = (max(1, size) for size in shape)
    down, up = torch.zeros(1, columns, *kernel), torch.zeros(rows, 1, *[1] * len(kernel))
    bias = delta.delta_bias(torch.zeros(rows))  # gains of the outputs change that of their module
    return LoraDelta(down=down, up=up, bias=bias, of_parameter=delta.of_parameter)


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
    second = stand_in(adapter, family_named(adapter.family, families) if adapter.family else None)
    if second is not None and not any(key.startswith(f"{second}.") for key in tensors):
        logger.warning(
            "%s is for %s, which no key of a %s file says: its name has to (Wan's …low_noise…), or load_into_%s=True",
            *(path, second, format, second),
        )
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


def _write_delta(name: str, delta: Delta, component: str, prefix: str, writing: Writing) -> None:
    form = writing.form
    where = f"{component}.{name}"
    try:
        inner = spelled(delta.inner if isinstance(delta, DoraDelta) else delta, form)
        slots = {**inner.slots(), **magnitude_slots(delta, form)}
        # diffusers reads a LoRA through PEFT; the other algebras it refuses aloud, and they are written for others.
        through_peft = form.one_model or (form.name == "diffusers" and isinstance(inner, LoraDelta))
        if through_peft:
            refuse_unreadable(delta)
        written = wrapped(name, writing.parameters) if form.one_model else name
    except ConversionError as error:
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
        writing.tensors[f"{start}{suffix}"] = for_peft(slot, tensor) if form.one_model else tensor
    writing.changes.append(inner)
    alpha = inner.alpha_value
    if form.alpha == "metadata" and isinstance(inner, LoraDelta | ExpertsDelta):
        writing.alphas.setdefault(component, {})[name] = inner
        if isinstance(delta, DoraDelta):
            writing.doras.add(f"{component}.{name}")
    elif form.one_model:
        writing.tuned[name] = inner
    elif form.alpha != "folded" and alpha is not None:
        # PEFT's configuration speaks of LoRA alone; diffusers reads a tensor for the other algebras.
        writing.tensors[f"{start}.alpha"] = alpha_tensor(inner, alpha)


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
