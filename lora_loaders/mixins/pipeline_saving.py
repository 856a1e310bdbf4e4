"""Saving from a pipeline or its class, and the plain state dictionary of a file, as training scripts use them."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_loaders.errors import AdapterFileError
from lora_loaders.files import atomic, write_safetensors
from lora_loaders.locating import HubOptions
from lora_loaders.saving import capture
from lora_loaders.scaling import METADATA_KEY

from .class_or_instance import class_or_instance
from .component_loading import by_name
from .model import read_source
from .saving import LAYERS, METADATA, layers_to_adapter, save, state_dict_like_diffusers

HUB_OPTIONS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
ACCEPTED = ("low_cpu_mem_usage", "return_lora_metadata", "unet_config", "user_agent")
"""Arguments of diffusers that need no action here."""


class SavingMixin:
    """What writes adapters and reads their tensors."""

    @class_or_instance
    def save_lora_weights(
        owner: Any,
        save_directory: str | os.PathLike[str],
        *args: Any,
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
        """Write adapter layers that are handed over, or, on a pipeline without any, what is loaded.

        Args:
            save_directory: the folder.
            args: what diffusers' class takes by position: `<component>_lora_layers` of each component that it saves,
                is_main_process, weight_name, save_function, safe_serialization, and the metadata of each.
            adapter_name: which loaded adapter, when there are several.
            format: see `write_adapter`.
            is_main_process: only this process writes.
            weight_name: file name; the format's usual one if None.
            save_function: called with tensors and path instead of writing safetensors.
            safe_serialization: False writes a pickle with torch.save.
            push_to_hub: whether to upload the folder, with a model card.
            repo_id: `owner/name` on the Hub; the folder's name if None.
            layers: `<component>_lora_layers` (state dictionary or module) and `<component>_lora_adapter_metadata`.

        Returns:
            Path of the file, None where another process writes.

        Raises:
            AdapterStateError: nothing is handed over and no, or no single, adapter is loaded.
            ConversionError: the format cannot say it.
        """
        if args:
            usual = {"is_main_process": is_main_process, "weight_name": weight_name, "save_function": save_function}
            defaults = {"is_main_process": True, "safe_serialization": True}
            usual["safe_serialization"] = safe_serialization
            said = {name: value for name, value in usual.items() if value != defaults.get(name)}
            return owner.save_lora_weights(
                save_directory,
                adapter_name=adapter_name,
                format=format,
                push_to_hub=push_to_hub,
                repo_id=repo_id,
                **_named(owner, args, {**said, **layers}),
            )
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


# The components whose layers diffusers' method takes, in its order, where those are not all that the class names.
SAVED: Mapping[str, tuple[str, ...]] = {
    "FluxLoraLoaderMixin": ("transformer", "text_encoder"),
    "SD3LoraLoaderMixin": ("transformer", "text_encoder", "text_encoder_2"),
    "AmusedLoraLoaderMixin": ("text_encoder", "transformer"),
    "LTX2LoraLoaderMixin": ("transformer",),
    "WanLoraLoaderMixin": ("transformer",),
    "QwenImageLoraLoaderMixin": ("transformer",),
}


def _named(owner: Any, args: Sequence[Any], layers: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name, those that came by position included.

    Raises:
        TypeError: no layers, a class whose components nobody knows, or one that is given twice.
    """
    if args[0] is not None and not isinstance(args[0], (Mapping, nn.Module)):
        raise TypeError(
            "save_lora_weights takes the first component's layers second, a state dictionary or a module, "
            f"not a {type(args[0]).__name__}; say adapter_name=… for a loaded adapter"
        )
    cls = owner if isinstance(owner, type) else type(owner)
    known = next((SAVED[base.__name__] for base in cls.__mro__ if base.__name__ in SAVED), None)
    known = known or getattr(owner, "_lora_loadable_modules", ())
    if not known and not isinstance(owner, type):
        known = tuple(owner.lora_components)
    if not known:
        raise TypeError(f"{owner.__name__} does not say its components; give <component>{LAYERS}=…")
    usual = ("is_main_process", "weight_name", "save_function", "safe_serialization")
    order = (*(f"{name}{LAYERS}" for name in known), *usual, *(f"{name}{METADATA}" for name in known))
    return by_name("save_lora_weights", order, args, layers, others=True)


def hub_options(weight_name: str | None, options: Mapping[str, Any]) -> HubOptions:
    """The options of a Hub download, everything else refused.

    Raises:
        TypeError: an option that nobody knows.
    """
    unknown = [key for key in options if key not in (*HUB_OPTIONS, *ACCEPTED)]
    if unknown:
        raise TypeError(f"unknown options {', '.join(unknown)}; there are {', '.join((*HUB_OPTIONS, *ACCEPTED))}")
    return HubOptions(weight_name=weight_name, **{key: value for key, value in options.items() if key in HUB_OPTIONS})
