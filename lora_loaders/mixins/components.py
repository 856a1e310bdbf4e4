"""Which of a pipeline's models can carry an adapter."""

from typing import Any

from torch import nn

from lora_loaders.gates import uncompiled

DENOISERS = ("transformer", "unet", "prior", "decoder")
BESIDE = ("transformer_2", "transformer_ref", "unconditional_transformer", "connectors", "text_conditioner")


def possible_components(pipeline: Any) -> list[str]:
    """Names under which a pipeline may have a model that can carry an adapter."""
    usual = [*DENOISERS, *(f"text_encoder{n}" for n in ("", "_2", "_3", "_4")), *BESIDE]
    return list(dict.fromkeys([*usual, *getattr(pipeline, "_lora_loadable_modules", ())]))


def components_of(pipeline: Any) -> dict[str, nn.Module]:
    """A pipeline's models that can carry an adapter, by name: the usual ones, denoiser first, and what its class names.

    The attribute `_lora_loadable_modules` is where diffusers' mixins name them. A compiled one comes unwrapped.
    """
    found = {name: getattr(pipeline, name, None) for name in possible_components(pipeline)}
    return {name: uncompiled(model) for name, model in found.items() if isinstance(model, nn.Module)}


def text_encoders(pipeline: Any) -> list[nn.Module]:
    """The models of a pipeline that encode prompts."""
    return [model for name, model in components_of(pipeline).items() if name.startswith("text_encoder")]
