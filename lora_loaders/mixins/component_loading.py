"""`load_lora_into_…`: a state dictionary into one component, as training scripts and diffusers' own code call it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

import lora_loaders.activity as activity
from lora_loaders.files import Contents
from lora_loaders.loading import LoadReport, family_of, load

from .model import with_alphas


class ComponentLoadingMixin:
    """Class methods that load into a component that is handed over."""

    @classmethod
    def _load_lora_into(
        cls, component: str, state_dict: Mapping[str, Tensor], model: nn.Module, options: Mapping[str, Any]
    ) -> LoadReport:
        prefixed = {k if k.startswith(f"{component}.") else f"{component}.{k}": v for k, v in state_dict.items()}
        alphas: Mapping[str, float] = options.get("network_alphas") or {}
        named = {k if k.startswith(f"{component}.") else f"{component}.{k}": v for k, v in alphas.items()}
        contents = with_alphas(Contents(prefixed), named, options.get("metadata"))
        hotswap = bool(options.get("hotswap"))
        family = family_of(model)
        return load({component: model}, contents, name=options.get("adapter_name"), family=family, hotswap=hotswap)

    @classmethod
    def load_lora_into_transformer(
        cls, state_dict: Mapping[str, Tensor], network_alphas: Any = None, transformer: Any = None, **options: Any
    ) -> LoadReport:
        """Load a state dictionary into a transformer; families without alphas pass the model second."""
        if isinstance(network_alphas, nn.Module):
            network_alphas, transformer = None, network_alphas
        return cls._load_lora_into(
            "transformer", state_dict, transformer, {**options, "network_alphas": network_alphas}
        )

    @classmethod
    def load_lora_into_unet(
        cls, state_dict: Mapping[str, Tensor], network_alphas: Any = None, unet: Any = None, **options: Any
    ) -> LoadReport:
        """Load a state dictionary into a UNet."""
        return cls._load_lora_into("unet", state_dict, unet, {**options, "network_alphas": network_alphas})

    @classmethod
    def load_lora_into_text_encoder(
        cls,
        state_dict: Mapping[str, Tensor],
        network_alphas: Any = None,
        text_encoder: Any = None,
        prefix: str | None = None,
        lora_scale: float = 1.0,
        **options: Any,
    ) -> LoadReport:
        """Load a state dictionary into a text encoder."""
        component = prefix or "text_encoder"
        report = cls._load_lora_into(component, state_dict, text_encoder, {**options, "network_alphas": network_alphas})
        if lora_scale != 1.0:
            activity.set_active(text_encoder, [report.adapter_name], lora_scale)
        return report
