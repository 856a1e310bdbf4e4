"""What `save_lora_weights` and `lora_state_dict` need: layers that were handed over, files, cards and return shapes."""

import inspect
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_loaders.adapter import Adapter
from lora_loaders.atomic import atomic
from lora_loaders.conversion import parse
from lora_loaders.deltas import Delta
from lora_loaders.errors import AdapterFileError
from lora_loaders.families import FAMILIES, Family
from lora_loaders.files import Contents, write_safetensors
from lora_loaders.scaling import METADATA_KEY, Scalings, of_one_model
from lora_loaders.writing import to_tensors, write_adapter

LAYERS, METADATA = "_lora_layers", "_lora_adapter_metadata"
PLAIN = re.compile(r"(?:unet|transformer|text_encoder)(?:_\w+)?\..+\.lora_[AB]\.(?:weight|bias)$")
"""Keys that diffusers' method gives back as they are."""
ALWAYS_ALPHAS = ("StableDiffusionLoraLoaderMixin", "StableDiffusionXLLoraLoaderMixin")


def layers_to_adapter(options: Mapping[str, Any]) -> Adapter | None:
    """The adapter that `<component>_lora_layers` arguments say; None if there is none.

    Raises:
        TypeError: an argument of another name, or layers that are none.
    """
    unknown = [key for key in options if not key.endswith((LAYERS, METADATA))]
    if unknown:
        raise TypeError(f"save_lora_weights has no arguments {', '.join(unknown)}; give <component>{LAYERS}=…")
    deltas: dict[str, dict[str, Delta]] = {}
    metadata: dict[str, Any] = {}
    for key, layers in options.items():
        if not key.endswith(LAYERS) or layers is None:
            continue
        component = key.removesuffix(LAYERS)
        if not isinstance(layers, (Mapping, nn.Module)):
            what = f"{key} is a state dictionary or a module, not a {type(layers).__name__}"
            raise TypeError(f"save_lora_weights: {what}; say adapter_name=… for a loaded adapter")
        tensors: Mapping[str, Tensor] = layers.state_dict() if isinstance(layers, nn.Module) else layers
        config = options.get(f"{component}{METADATA}")
        named = {k if k.startswith(f"{component}.") else f"{component}.{k}": v for k, v in tensors.items()}
        adapter = parse(Contents(named, label=f"{key}=…"), families=())
        found = {u.name: u.delta for u in adapter.unresolved if u.delta is not None}
        # No family's table resolved these names, so the configuration's alpha has not met them yet.
        scalings = Scalings.of({}, config, f"{component}{METADATA}=…")
        deltas[component] = {
            path: scalings.apply(delta, component, path, given=delta.alpha_value is not None)
            for path, delta in found.items()
        }
        metadata |= {f"{component}.{name}": _plain(value) for name, value in (config or {}).items()}
    if not deltas:
        return None
    header = {METADATA_KEY: json.dumps(metadata, sort_keys=True)} if metadata else {}
    return Adapter(deltas, metadata=header, source="layers handed over")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def save(
    adapter: Adapter,
    folder: str | os.PathLike[str],
    format: str,
    weight_name: str | None,
    save_function: Callable[..., Any] | None,
    safe_serialization: bool,
    *,
    repo_id: str | None,
) -> Path:
    """Write one file into a folder, and upload the folder if `repo_id` is given.

    Raises:
        AdapterFileError: `folder` is a file.
    """
    folder = Path(folder)
    if folder.is_file():
        raise AdapterFileError(
            f"Provided path ({folder}) should be a directory, not a file", state="Nothing was written."
        )
    if save_function is not None or not safe_serialization:
        path = folder / (weight_name or "pytorch_lora_weights.bin")
        # A pickle has no header, so alpha stands among the tensors.
        tensors = _with_alphas(adapter) if format == "diffusers" else to_tensors(adapter, format)[0]
        with atomic(path) as temporary:
            (save_function or torch.save)(tensors, temporary)
    else:
        path = write_adapter(adapter, folder / weight_name if weight_name else folder, format)
    if repo_id is not None:
        from lora_loaders.integrations.hub import upload

        upload(folder, path, adapter, repo_id)
    return path


def save_bare(adapter: Adapter, path: Path) -> Path:
    """Write one model's adapter under diffusers' names without the component's: a model does not know what it is."""
    tensors, header, _ = to_tensors(adapter, "diffusers")
    (component,) = adapter.components
    metadata = of_one_model(header, component, str(path))
    write_safetensors({key.removeprefix(f"{component}."): tensor for key, tensor in tensors.items()}, path, metadata)
    return path


def state_dict_like_diffusers(cls: type, contents: Contents | Adapter, metadata: bool, alphas: bool) -> Any:
    """(state_dict[, alphas][, metadata]) as diffusers' own mixin of the class returns it.

    Where neither alphas nor metadata are returned, alpha stays among the tensors: it is part of what the file says.
    """
    is_plain = isinstance(contents, Contents) and all(PLAIN.match(key) for key in contents.tensors)
    if isinstance(contents, Contents) and is_plain and (metadata or METADATA_KEY not in contents.metadata):
        renamed, header = dict(contents.tensors), contents.metadata
    else:
        adapter = contents if isinstance(contents, Adapter) else parse(contents, family_of_class(cls))
        renamed = _with_alphas(adapter)
        header = to_tensors(adapter, "diffusers")[1] if metadata else {}
    network_alphas = {key: float(tensor) for key, tensor in renamed.items() if key.endswith(".alpha")}
    plain = {key: tensor for key, tensor in renamed.items() if not key.endswith(".alpha")}
    alphas = alphas or bool({base.__name__ for base in cls.__mro__} & set(ALWAYS_ALPHAS))
    parts: list[Any] = [plain if alphas or metadata else renamed]
    if alphas:
        parts.append(network_alphas or None)
    if metadata:
        parts.append(json.loads(header[METADATA_KEY]) if METADATA_KEY in header else None)
    return parts[0] if len(parts) == 1 else tuple(parts)


def _with_alphas(adapter: Adapter) -> dict[str, Tensor]:
    """diffusers' tensors, with alpha beside each pair."""
    tensors, _, _ = to_tensors(adapter, "diffusers-old")
    return {key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B."): t for key, t in tensors.items()}


def family_of_class(cls: type, families: Sequence[Family] = FAMILIES) -> Family | None:
    """The family of a pipeline class; None if nothing tells.

    The component classes that its constructor names tell, or else its mixin.
    """
    parameters = inspect.signature(cls.__init__).parameters
    annotations = " ".join(str(parameter.annotation) for parameter in parameters.values())
    said: str | None = getattr(cls, "_lora_family", None)
    candidates = [f for f in families if any(re.search(rf"\b{name}\b", annotations) for name in f.model_classes)]
    encoders = {name for name in parameters if name.startswith("text_encoder")}
    likeliest = min(candidates, key=lambda f: len(encoders.symmetric_difference(f.text_encoders)), default=None)
    return likeliest or next((family for family in families if family.name == said), None)
