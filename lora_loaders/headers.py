"""What a file says beside its tensors: the header's metadata, and PEFT's `adapter_config.json`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .adapter import Adapter
from .deltas import Delta, LoraDelta
from .detection import family_named
from .errors import ConversionError
from .families import Family
from .formats import Format
from .peft_types import written
from .scaling import KOHYA_SCALING, METADATA_KEY, kohya_header, lora_config

Named = Mapping[str, Mapping[str, LoraDelta]]
"""Component -> name as written -> the LoRA under it, whose rank and alpha the metadata states."""


def metadata_of(adapter: Adapter, form: Format, alphas: Named) -> dict[str, str]:
    """The header's metadata: the adapter's own, and alphas where the format keeps them there."""
    # Hashes are of other tensors, or of these under other names.
    own = {METADATA_KEY, "format", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}
    metadata = {key: value for key, value in adapter.metadata.items() if key not in own}
    if adapter.format == "indexed":
        metadata = {key: value for key, value in metadata.items() if ":" not in key and value != "<embed>"}
        metadata = {key: value for key, value in metadata.items() if key not in adapter.deltas}
    metadata["format"] = "pt"
    if form.alpha == "folded":
        # Read again, the header's alpha would scale a second time.
        metadata = {key: value for key, value in metadata.items() if key not in KOHYA_SCALING}
    if form.alpha == "metadata":
        said = {c: loras for c, loras in alphas.items() if any(d.alpha is not None for d in loras.values())}
        configs = {component: lora_config(loras) for component, loras in said.items()}
        if configs:
            flat = {f"{c}.{name}": value for c, config in configs.items() for name, value in config.items()}
            metadata[METADATA_KEY] = json.dumps(flat, sort_keys=True)
    elif form.name == "kohya":
        metadata = {**kohya_header([delta for _, _, delta in adapter.modules()]), **metadata}
    return metadata


def peft_config(alphas: Named, tuned: Mapping[str, Delta], keys: Iterable[str]) -> dict[str, Any]:
    """PEFT's configuration for a file of these keys.

    Args:
        alphas: the LoRAs.
        tuned: name as written -> delta of PEFT's other tuners.
        keys: every key of the file.

    Raises:
        ConversionError: PEFT has no configuration that says it.
    """
    loras = {name: delta for deltas in alphas.values() for name, delta in deltas.items()}
    if tuned and loras:
        raise ConversionError("PEFT keeps one algebra a file, these are LoRA and others")
    if tuned:
        return written(tuned)
    if not loras:
        return {}
    dora = any(".lora_magnitude_vector" in key for key in keys)
    return {"peft_type": "LORA", "task_type": None, "inference_mode": True, "use_dora": dora, **lora_config(loras)}


def indexed_metadata(adapter: Adapter, families: Sequence[Family]) -> dict[str, str]:
    """What the format that numbers modules states of them."""
    family = family_named(adapter.family or "", families)
    metadata: dict[str, str] = {}
    for component, deltas in adapter.deltas.items():
        classes = dict.fromkeys(cls for cls, _ in family.traversal[component])
        metadata[component] = json.dumps(list(classes))
        order = [path for _, path in family.traversal[component]]
        metadata |= {f"{component}:{i}:rank": str(deltas[path].rank) for i, path in enumerate(order)}
    return metadata | dict.fromkeys(adapter.embeddings, "<embed>")
