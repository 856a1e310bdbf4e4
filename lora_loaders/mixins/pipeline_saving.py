"""Saving from a pipeline or its class, and the plain state dictionary of a file, as training scripts use them."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_loaders.atomic import atomic
from lora_loaders.errors import AdapterFileError
from lora_loaders.files import write_safetensors
from lora_loaders.locating import HubOptions
from lora_loaders.saving import capture
from lora_loaders.scaling import METADATA_KEY

from .class_or_instance import class_of, showing
from .model import read_source
from .saving import LAYERS, METADATA, layers_to_adapter, save, state_dict_like_diffusers

HUB_OPTIONS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
ACCEPTED = ("low_cpu_mem_usage", "return_lora_metadata", "unet_config", "user_agent")
"""Arguments of diffusers that need no action here."""


# The components whose layers diffusers' method takes, in its order, where those are not all that the class names.
SAVED: Mapping[str, tuple[str, ...]] = {
    "FluxLoraLoaderMixin": ("transformer", "text_encoder"),
    "SD3LoraLoaderMixin": ("transformer", "text_encoder", "text_encoder_2"),
    "AmusedLoraLoaderMixin": ("text_encoder", "transformer"),
    "LTX2LoraLoaderMixin": ("transformer",),
    "WanLoraLoaderMixin": ("transformer",),
    "QwenImageLoraLoaderMixin": ("transformer",),
}


OTHERS = f"component{LAYERS}"
"""Stands in the signature for the layers of any other component."""


def _of_saving(owner: Any) -> Signature:
    """The arguments of `save_lora_weights`: what diffusers' class takes by position, and more by name."""
    known = next((SAVED[base.__name__] for base in class_of(owner).__mro__ if base.__name__ in SAVED), None)
    known = known or getattr(owner, "_lora_loadable_modules", ())
    if not known and not isinstance(owner, type):
        known = tuple(owner.lora_components)
    usual = {"is_main_process": True, "weight_name": None, "save_function": None, "safe_serialization": True}
    layers, metadata = (dict.fromkeys(f"{name}{end}" for name in known) for end in (LAYERS, METADATA))
    named = {"adapter_name": None, "format": "diffusers", "push_to_hub": False, "repo_id": None}
    # Where nobody knows the components, the second position means nothing.
    placed = Parameter.POSITIONAL_OR_KEYWORD if known else Parameter.KEYWORD_ONLY
    return Signature([
        Parameter("save_directory", Parameter.POSITIONAL_OR_KEYWORD),
        *(Parameter(name, placed, default=value) for name, value in (layers | usual | metadata).items()),
        *(Parameter(name, Parameter.KEYWORD_ONLY, default=value) for name, value in named.items()),
        Parameter(OTHERS, Parameter.VAR_KEYWORD),
    ])  # fmt: skip


class SavingMixin:
    """What writes adapters and reads their tensors."""

    @showing(_of_saving)
    def save_lora_weights(owner: Any, *args: Any, **options: Any) -> Path | None:
        """Write adapter layers that are handed over, or, on a pipeline without any, what is loaded.

        Args:
            args: save_directory, and after it what diffusers' class takes by position: `<component>_lora_layers` of
                each component that it saves (state dictionary or module), is_main_process (only this process writes),
                weight_name (the format's usual one if None), save_function (called with tensors and path instead of
                writing safetensors), safe_serialization (False writes a pickle with torch.save), and
                `<component>_lora_adapter_metadata` of each.
            options: the same by name, layers and metadata of any other component, and adapter_name (which loaded
                adapter, when there are several), format (see `write_adapter`), push_to_hub (whether to upload the
                folder, with a model card) and repo_id (`owner/name` on the Hub; the folder's name if None).

        Returns:
            Path of the file, None where another process writes.

        Raises:
            AdapterStateError: nothing is handed over and no, or no single, adapter is loaded.
            ConversionError: the format cannot say it.
            TypeError: an argument of another name, one that is given twice, or too many.
        """
        return _save(owner, **_bound(owner, args, options))

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: Any,
        return_alphas: bool = False,
        *,
        weight_name: str | None = None,
        use_safetensors: bool | None = None,
        return_lora_metadata: bool = False,
        **options: Any,
    ) -> Any:
        """A file's tensors in diffusers' names, and beside them what diffusers' own method returns."""
        contents = read_source(
            pretrained_model_name_or_path_or_dict, hub_options(weight_name, options), use_safetensors
        )
        return state_dict_like_diffusers(cls, contents, return_lora_metadata, return_alphas)

    @staticmethod
    def pack_weights(layers: Mapping[str, Tensor] | nn.Module, prefix: str) -> dict[str, Tensor]:
        """The layers' tensors with a component's name before theirs."""
        tensors: Mapping[str, Tensor] = layers.state_dict() if isinstance(layers, nn.Module) else layers
        return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}

    @staticmethod
    def write_lora_layers(
        state_dict: Mapping[str, Tensor],
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a state dictionary as it is, whole or not at all.

        Raises:
            AdapterFileError: the folder is a file.
            ValueError: metadata for a pickle, which has no room for it.
        """
        folder = Path(save_directory)
        if folder.is_file():
            what = f"Provided path ({folder}) should be a directory, not a file"
            raise AdapterFileError(what, state="Nothing was written.")
        if lora_adapter_metadata and not safe_serialization:
            raise ValueError("`lora_adapter_metadata` cannot be specified when not using `safe_serialization`.")
        if not is_main_process:
            return
        path = folder / (weight_name or f"pytorch_lora_weights.{'safetensors' if safe_serialization else 'bin'}")
        if save_function is None and safe_serialization:
            fields = {k: sorted(v) if isinstance(v, set) else v for k, v in (lora_adapter_metadata or {}).items()}
            header = {METADATA_KEY: json.dumps(fields, indent=2, sort_keys=True)} if fields else {}
            write_safetensors(state_dict, path, {"format": "pt", **header})
            return
        with atomic(path) as temporary:
            (save_function or torch.save)(dict(state_dict), temporary)


def _bound(owner: Any, args: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name.

    Raises:
        TypeError: one of them is missing, too many or given twice.
    """
    shown = _of_saving(owner)
    try:
        named = shown.bind(*args, **options).arguments
    except TypeError as error:
        raise TypeError(f"save_lora_weights: {error}; there are {', '.join(shown.parameters)}") from error
    return {**named, **named.pop(OTHERS, {})}


def _save(
    owner: Any,
    save_directory: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    format: str = "diffusers",
    is_main_process: bool = True,
    weight_name: str | None = None,
    save_function: Callable[..., Any] | None = None,
    safe_serialization: bool = True,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    **layers: Any,
) -> Path | None:
    adapter = layers_to_adapter(layers)
    if adapter is None:
        if isinstance(owner, type):
            components = "`transformer_lora_layers`, `unet_lora_layers`, `text_encoder_lora_layers`"
            raise ValueError(f"You must pass at least one of {components}, or call this on a pipeline.")
        adapter = capture(owner.lora_components, adapter_name, owner.lora_family)
    if not is_main_process:
        return None
    write = partial(save, adapter, save_directory, format, weight_name, save_function, safe_serialization)
    return write(repo_id=(repo_id or Path(save_directory).name) if push_to_hub else None)


def hub_options(weight_name: str | None, options: Mapping[str, Any]) -> HubOptions:
    """The options of a Hub download, everything else refused.

    Raises:
        TypeError: an option that nobody knows.
    """
    unknown = [key for key in options if key not in (*HUB_OPTIONS, *ACCEPTED)]
    if unknown:
        raise TypeError(f"unknown options {', '.join(unknown)}; there are {', '.join((*HUB_OPTIONS, *ACCEPTED))}")
    return HubOptions(weight_name=weight_name, **{key: value for key, value in options.items() if key in HUB_OPTIONS})
