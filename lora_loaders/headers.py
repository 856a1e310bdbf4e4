"""What a file says beside its tensors: the header's metadata, and PEFT's `adapter_config.json`."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .adapter import Adapter
from .deltas import Delta, ExpertsDelta, LoraDelta
from .detection import family_named
from .errors import ConversionError
from .families import Family
from .formats import FORMATS, Format
from .kohya_names import NAMES_KEY
from .peft_types import PEFT_WAYS_OUT, written
from .scaling import KOHYA_SCALING, METADATA_KEY, kohya_header, lora_config

Named = Mapping[str, Mapping[str, LoraDelta | ExpertsDelta]]
"""Component -> name as written -> the LoRA under it, whose rank and alpha the metadata states."""


def metadata_of(
    adapter: Adapter,
    form: Format,
    family: Family | None,
    alphas: Named,
    doras: Collection[str],
    tuner: Mapping[str, Any],
    changes: Collection[Delta],
) -> dict[str, str]:
    """The header's metadata: the adapter's own, and what the format keeps there of its model and its scalings.

    Args:
        adapter: what is written.
        form: the format.
        family: the adapter's, if it is known.
        alphas: the LoRAs.
        doras: `component.name` of those under DoRA.
        tuner: PEFT's configuration for LoHa, LoKr, OFT, BOFT or IA3, empty for others. The file may come without
            `adapter_config.json`, and no tensor says these alphas and settings.
        changes: the deltas as they are written, joined where the format has fused names.
    """
    # Hashes are of other tensors, or of these under other names; ranks and alphas may be of others too.
    hashes = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
    own = {METADATA_KEY, NAMES_KEY, "format", *hashes, *KOHYA_SCALING}
    signs = {sign for other in FORMATS for sign in other.metadata.items()}
    metadata = {key: value for key, value in adapter.metadata.items() if key not in own and (key, value) not in signs}
    if adapter.format == "indexed":
        metadata = {key: value for key, value in metadata.items() if ":" not in key and value != "<embed>"}
        metadata = {key: value for key, value in metadata.items() if key not in adapter.deltas}
    network = metadata.get("ss_network_module")
    metadata |= {"format": "pt", **_stated(adapter, form, family), **form.metadata}
    if form.alpha == "metadata":
        said = {c: loras for c, loras in alphas.items() if any(d.alpha is not None for d in loras.values())}
        configs = {component: lora_config(loras, _under(doras, component)) for component, loras in said.items()}
        if tuner:
            (component,) = adapter.components
            configs[component] = dict(tuner)
        if configs:
            flat = {f"{c}.{name}": value for c, config in configs.items() for name, value in config.items()}
            metadata[METADATA_KEY] = json.dumps(flat, sort_keys=True)
    elif form.trainer == "kohya":
        metadata |= kohya_header(changes, metadata.get("ss_network_module", "networks.lora"), network)
    return metadata


def _stated(adapter: Adapter, form: Format, family: Family | None) -> dict[str, str]:
    """What the format's trainer states of the family's models; its own file has said it, and more exactly."""
    stated = dict(family.headers.get(form.trainer, {})) if family is not None else {}
    if any(other.name == adapter.format and other.trainer == form.trainer for other in FORMATS):
        stated = {key: value for key, value in stated.items() if key not in adapter.metadata}
    if "modelspec.architecture" in stated and "modelspec.title" not in adapter.metadata:
        source = Path(adapter.source)
        name = source.stem if source.suffix == ".safetensors" else "LoRA"
        stated["modelspec.title"] = adapter.metadata.get("ss_output_name", name)
    return stated


def _under(doras: Collection[str], component: str) -> set[str]:
    return {place.removeprefix(f"{component}.") for place in doras if place.startswith(f"{component}.")}


def peft_config(alphas: Named, doras: Collection[str], tuned: Mapping[str, Delta]) -> dict[str, Any]:
    """PEFT's configuration for a file of one component.

    Args:
        alphas: the LoRAs, of several components where diffusers reads them through PEFT.
        doras: `component.name` of those under DoRA.
        tuned: name as written -> delta of PEFT's other tuners.

    Raises:
        ConversionError: PEFT has no configuration that says it.
    """
    component, loras = next(iter(alphas.items()), ("", {}))
    if tuned and loras:
        raise ConversionError("PEFT keeps one algebra a file, these are LoRA and others")
    for part, named in alphas.items():
        own = _under(doras, part)
        if own and len(own) < len(named):
            rest = ", ".join(f"{part}.{name}" for name in named if name not in own)
            raise ConversionError(
                f"PEFT puts DoRA on all modules of a model or on none; these have no magnitude: {rest}",
                mend=PEFT_WAYS_OUT,
            )
    if tuned:
        return written(tuned)
    if not loras:
        return {}
    config = lora_config(loras, _under(doras, component))
    return {"peft_type": "LORA", "task_type": None, "inference_mode": True, **config}


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
