"""`load_lora_into_…`: a state dictionary into one component, as training scripts and diffusers' own code call it."""

from collections.abc import Mapping
from inspect import Signature, signature
from typing import Any

from torch import Tensor, nn

import lora_loaders.activity as activity
from lora_loaders.files import Contents
from lora_loaders.loading import LoadReport, family_of, load
from lora_loaders.weights import number

from .class_or_instance import class_of, showing
from .model import of_component, with_alphas
from .saving import family_of_class

State = Mapping[str, Tensor]
Metadata = Mapping[str, Any]


def _transformer_first(
    owner: Any,
    state_dict: State,
    transformer: nn.Module,
    adapter_name: str | None = None,
    _pipeline: Any = None,
    low_cpu_mem_usage: bool = False,
    hotswap: bool = False,
    metadata: Metadata | None = None,
    prefix: str = "transformer",
) -> LoadReport:
    return _load_into(owner, prefix, transformer, state_dict, None, adapter_name, hotswap, metadata)


def _alphas_first(
    owner: Any,
    state_dict: State,
    network_alphas: Mapping[str, float] | None,
    transformer: nn.Module,
    adapter_name: str | None = None,
    metadata: Metadata | None = None,
    _pipeline: Any = None,
    low_cpu_mem_usage: bool = False,
    hotswap: bool = False,
) -> LoadReport:
    return _load_into(owner, "transformer", transformer, state_dict, network_alphas, adapter_name, hotswap, metadata)


WITH_ALPHAS = {"FluxLoraLoaderMixin", "AmusedLoraLoaderMixin"}
"""Where diffusers' `load_lora_into_transformer` takes alphas, and before the transformer."""


def _of_transformer(owner: Any) -> Signature:
    has_alphas = not WITH_ALPHAS.isdisjoint(cls.__name__ for cls in class_of(owner).__mro__)
    shown = signature(_alphas_first if has_alphas else _transformer_first)
    return shown.replace(parameters=list(shown.parameters.values())[1:])


class ComponentLoadingMixin:
    """Class methods that load into a component that is handed over.

    Of their arguments `_pipeline` and `low_cpu_mem_usage` are accepted for compatibility and change nothing.
    """

    @showing(_of_transformer)
    def load_lora_into_transformer(owner: Any, state_dict: State, *args: Any, **options: Any) -> LoadReport:
        """Load a state dictionary into a transformer.

        Args:
            state_dict: the adapter's tensors.
            args: (network_alphas, transformer, adapter_name, metadata, _pipeline, low_cpu_mem_usage, hotswap), or, as
                families without alphas have it, the transformer first, metadata last, and the keys' prefix after it;
                every class takes both.
            options: the same by name.

        Raises:
            TypeError: an option of another name, or one that is given twice.
        """
        has_alphas = "network_alphas" in options or (bool(args) and not isinstance(args[0], nn.Module))
        return (_alphas_first if has_alphas else _transformer_first)(owner, state_dict, *args, **options)

    @classmethod
    def load_lora_into_transformer_ref(
        cls,
        state_dict: State,
        transformer_ref: nn.Module,
        prefix: str,
        adapter_name: str | None = None,
        _pipeline: Any = None,
        low_cpu_mem_usage: bool = False,
        hotswap: bool = False,
        metadata: Metadata | None = None,
    ) -> LoadReport:
        """Load a state dictionary, its keys under a prefix or none, into MiniMax-H3's reference partition."""
        return _load_into(cls, prefix, transformer_ref, state_dict, None, adapter_name, hotswap, metadata)

    @classmethod
    def load_lora_into_text_conditioner(
        cls,
        state_dict: State,
        text_conditioner: nn.Module,
        adapter_name: str | None = None,
        _pipeline: Any = None,
        low_cpu_mem_usage: bool = False,
        hotswap: bool = False,
        metadata: Metadata | None = None,
    ) -> LoadReport:
        """Load a state dictionary into Anima's text conditioner."""
        return _load_into(cls, "text_conditioner", text_conditioner, state_dict, None, adapter_name, hotswap, metadata)

    @classmethod
    def load_lora_into_unet(
        cls,
        state_dict: State,
        network_alphas: Mapping[str, float] | None,
        unet: nn.Module,
        adapter_name: str | None = None,
        _pipeline: Any = None,
        low_cpu_mem_usage: bool = False,
        hotswap: bool = False,
        metadata: Metadata | None = None,
    ) -> LoadReport:
        """Load a state dictionary into a UNet."""
        return _load_into(cls, "unet", unet, state_dict, network_alphas, adapter_name, hotswap, metadata)

    @classmethod
    def load_lora_into_text_encoder(
        cls,
        state_dict: State,
        network_alphas: Mapping[str, float] | None,
        text_encoder: nn.Module,
        prefix: str | None = None,
        lora_scale: float = 1.0,
        adapter_name: str | None = None,
        _pipeline: Any = None,
        low_cpu_mem_usage: bool = False,
        hotswap: bool = False,
        metadata: Metadata | None = None,
    ) -> LoadReport:
        """Load a state dictionary into a text encoder, with this scale as the adapter's weight."""
        scale = number(lora_scale)
        report = _load_into(
            cls, prefix or "text_encoder", text_encoder, state_dict, network_alphas, adapter_name, hotswap, metadata
        )
        if scale != 1.0:
            activity.set_active(text_encoder, [report.adapter_name], scale)
        return report


def _load_into(
    owner: Any,
    component: str,
    model: Any,
    state_dict: State,
    alphas: Mapping[str, float] | None,
    name: str | None,
    hotswap: bool,
    metadata: Metadata | None,
) -> LoadReport:
    """Load into a model what a state dictionary has under a component's name, and under none.

    Raises:
        TypeError: the model is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{component} is a module, not a {type(model).__name__}")
    if name is not None:
        activity.check_string(name)
    prefixed = of_component(state_dict, component)
    contents = with_alphas(Contents(prefixed), of_component(alphas or {}, component), metadata, component)
    # A text encoder does not tell its family; the pipeline's class does.
    family = family_of(model) or family_of_class(class_of(owner))
    return load({component: model}, contents, name=name, family=family, hotswap=bool(hotswap))
