"""diffusers' mixins of single model classes: they load image prompts (IP-Adapter), and ours add the LoRA methods."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.transformer_flux import FluxTransformer2DLoadersMixin as Flux
from diffusers.loaders.transformer_sd3 import SD3Transformer2DLoadersMixin as SD3
from diffusers.loaders.unet import UNet2DConditionLoadersMixin as UNet
from torch import Tensor

from lora_loaders.files import Contents, read
from lora_loaders.loading import LoadReport, adapter_names
from lora_loaders.locating import HubOptions

from .model import LoraModelMixin

CUSTOM_DIFFUSION = "custom_diffusion"


class FluxTransformer2DLoadersMixin(LoraModelMixin, Flux):
    """Flux.1's transformer."""


class SD3Transformer2DLoadersMixin(LoraModelMixin, SD3):
    """Stable Diffusion 3's transformer."""


class UNet2DConditionLoadersMixin(LoraModelMixin, UNet):
    """Stable Diffusion's UNet, with the two methods that loaded its LoRAs first."""

    def load_attn_procs(  # pyright: ignore[reportIncompatibleMethodOverride]  # diffusers' tells nothing
        self, pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor], **options: Any
    ) -> LoadReport | None:
        """Load what a file holds for the attention layers: an adapter, or Custom Diffusion's own layers.

        Args:
            pretrained_model_name_or_path_or_dict: path, folder, Hub id or state dictionary.
            options: those of `load_lora_adapter`.

        Raises:
            AdapterFileError, AdapterMismatchError, AdapterStateError: and the model was not changed.
        """
        hub = HubOptions(
            **{name: options.pop(name) for name in list(options) if name in HubOptions.__dataclass_fields__}
        )
        contents = read(
            pretrained_model_name_or_path_or_dict, hub, allow_pickle=options.pop("use_safetensors", None) is False
        )
        if any(CUSTOM_DIFFUSION in key for key in contents.tensors):
            UNet.load_attn_procs(self, dict(contents.tensors), **options)  # pyright: ignore[reportUnknownMemberType]
            return None
        return self._load(contents, **options)

    def _load(self, contents: Contents, **options: Any) -> LoadReport:
        prefix = "unet" if all(key.startswith("unet.") for key in contents.tensors) else None
        return self.load_lora_adapter(contents.tensors, prefix=prefix, **options)

    def save_attn_procs(  # pyright: ignore[reportIncompatibleMethodOverride]  # diffusers' tells nothing
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        **options: Any,
    ) -> Path | None:
        """Write the model's adapter, or Custom Diffusion's layers where it carries those and no adapter.

        Args:
            save_directory: the folder.
            is_main_process: only this process writes.
            weight_name: file name; the usual one if None.
            save_function: for Custom Diffusion's layers, called with tensors and path instead of writing safetensors.
            safe_serialization: False writes a pickle.
            options: adapter_name, the first one's if not given, and format; see `save_lora_adapter`.

        Returns:
            Path of the adapter's file.
        """
        how: dict[str, Any] = {"weight_name": weight_name, "safe_serialization": safe_serialization}
        if not adapter_names(self):
            how |= {"is_main_process": is_main_process, "save_function": save_function}
            UNet.save_attn_procs(self, save_directory, **how, **options)  # pyright: ignore[reportUnknownMemberType]
            return None
        name = options.pop("adapter_name", adapter_names(self)[0])
        return self.save_lora_adapter(save_directory, name, **how, **options) if is_main_process else None
