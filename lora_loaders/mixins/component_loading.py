"""`load_lora_into_…`: a state dictionary into one component, as training scripts and diffusers' own code call it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

import lora_loaders.activity as activity
from lora_loaders.files import Contents
from lora_loaders.loading import LoadReport, family_of, load
from lora_loaders.weights import number

from .model import of_component, with_alphas
from .saving import family_of_class

# What diffusers' methods take after the state dictionary, in their order.
USUAL = ("adapter_name", "_pipeline", "low_cpu_mem_usage", "hotswap", "metadata")
UNET = ("network_alphas", "unet", *USUAL)
TRANSFORMER = ("transformer", *USUAL)
TRANSFORMER_WITH_ALPHAS = (
    *("network_alphas", "transformer", "adapter_name", "metadata"),
    *("_pipeline", "low_cpu_mem_usage", "hotswap"),
)
TEXT_ENCODER = ("network_alphas", "text_encoder", "prefix", "lora_scale", *USUAL)


class ComponentLoadingMixin:
    """Class methods that load into a component that is handed over."""

    @classmethod
    def load_lora_into_transformer(cls, state_dict: Mapping[str, Tensor], *args: Any, **options: Any) -> LoadReport:
        """Load a state dictionary into a transformer.

        Args:
            state_dict: the adapter's tensors.
            args: (network_alphas, transformer, adapter_name, metadata, _pipeline, low_cpu_mem_usage, hotswap), or, as
                families without alphas have it, the transformer first and metadata last.
            options: the same by name.

        Raises:
            TypeError: an option of another name, or one that is given twice.
        """
        order = TRANSFORMER if args and isinstance(args[0], nn.Module) else TRANSFORMER_WITH_ALPHAS
        return _load_into(cls, "transformer", state_dict, by_name("load_lora_into_transformer", order, args, options))

    @classmethod
    def load_lora_into_transformer_ref(
        cls,
        state_dict: Mapping[str, Tensor],
        transformer_ref: nn.Module,
        prefix: str = "transformer",
        *args: Any,
        **options: Any,
    ) -> LoadReport:
        """Load a state dictionary into MiniMax-H3's reference partition.

        Args:
            state_dict: the adapter's tensors.
            transformer_ref: the partition.
            prefix: what the keys call it.
            args: (adapter_name, _pipeline, low_cpu_mem_usage, hotswap, metadata).
            options: the same by name.

        Raises:
            TypeError: an option of another name, or one that is given twice.
        """
        given = (transformer_ref, *args)
        named = by_name("load_lora_into_transformer_ref", ("transformer_ref", *USUAL), given, options)
        return _load_into(cls, prefix, state_dict, named, role="transformer_ref")

    @classmethod
    def load_lora_into_text_conditioner(
        cls, state_dict: Mapping[str, Tensor], text_conditioner: nn.Module, *args: Any, **options: Any
    ) -> LoadReport:
        """Load a state dictionary into Anima's text conditioner.

        Args:
            state_dict: the adapter's tensors.
            text_conditioner: the model.
            args: (adapter_name, _pipeline, low_cpu_mem_usage, hotswap, metadata).
            options: the same by name.

        Raises:
            TypeError: an option of another name, or one that is given twice.
        """
        given = (text_conditioner, *args)
        named = by_name("load_lora_into_text_conditioner", ("text_conditioner", *USUAL), given, options)
        return _load_into(cls, "text_conditioner", state_dict, named)

    @classmethod
    def load_lora_into_unet(cls, state_dict: Mapping[str, Tensor], *args: Any, **options: Any) -> LoadReport:
        """Load a state dictionary into a UNet.

        Args:
            state_dict: the adapter's tensors.
            args: (network_alphas, unet, adapter_name, _pipeline, low_cpu_mem_usage, hotswap, metadata).
            options: the same by name.

        Raises:
            TypeError: an option of another name, or one that is given twice.
        """
        return _load_into(cls, "unet", state_dict, by_name("load_lora_into_unet", UNET, args, options))

    @classmethod
    def load_lora_into_text_encoder(cls, state_dict: Mapping[str, Tensor], *args: Any, **options: Any) -> LoadReport:
        """Load a state dictionary into a text encoder.

        Args:
            state_dict: the adapter's tensors.
            args: (network_alphas, text_encoder, prefix, lora_scale, adapter_name, _pipeline, low_cpu_mem_usage,
                hotswap, metadata).
            options: the same by name.

        Raises:
            TypeError: an option of another name, or one that is given twice.
        """
        named = by_name("load_lora_into_text_encoder", TEXT_ENCODER, args, options)
        scale = number(named.get("lora_scale"))
        report = _load_into(cls, named.get("prefix") or "text_encoder", state_dict, named, role="text_encoder")
        if scale != 1.0:
            activity.set_active(named["text_encoder"], [report.adapter_name], scale)
        return report


def by_name(
    method: str, order: Sequence[str], args: Sequence[Any], options: Mapping[str, Any], *, others: bool = False
) -> dict[str, Any]:
    """The arguments by name.

    Args:
        method: what to call it in a message.
        order: names of the arguments after the first one.
        args: those that came by position.
        options: those that came by name.
        others: whether there may be other names.

    Raises:
        TypeError: an option of another name, or one that is given twice, or too many.
    """
    known = ", ".join(order)
    unknown = [name for name in options if name not in order]
    if unknown and not others:
        raise TypeError(f"{method} has no options {', '.join(unknown)}; there are {known}")
    if len(args) > len(order):
        raise TypeError(f"{method} takes at most {known}; {len(args)} were given")
    named = dict(zip(order, args, strict=False))
    twice = [name for name in named if name in options]
    if twice:
        raise TypeError(f"{method} got {', '.join(twice)} twice, by position and by name")
    return {**named, **options}


def _load_into(
    cls: type, component: str, state_dict: Mapping[str, Tensor], options: Mapping[str, Any], role: str | None = None
) -> LoadReport:
    model: Any = options.get(role or component)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{role or component} is a module, not a {type(model).__name__}")
    name = options.get("adapter_name")
    if name is not None:
        activity.check_string(name)
    prefixed = of_component(state_dict, component)
    named = of_component(options.get("network_alphas") or {}, component)
    contents = with_alphas(Contents(prefixed), named, options.get("metadata"), component)
    hotswap = bool(options.get("hotswap"))
    # A text encoder does not tell its family; the pipeline's class does.
    family = family_of(model) or family_of_class(cls)
    return load({component: model}, contents, name=name, family=family, hotswap=hotswap)
