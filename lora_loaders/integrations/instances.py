"""attach(pipe): any pipeline or model instance gains the LoRA methods, and detach takes them away."""

from typing import TypeVar

from torch import nn

from lora_loaders.activity import unload
from lora_loaders.attaching import RESERVED_RANK
from lora_loaders.fusing import fused_adapters, unfuse_all
from lora_loaders.gates import unwatch_forwards, watch_forwards
from lora_loaders.layout import shared_of
from lora_loaders.loading import adapter_names
from lora_loaders.mixins.model import LoraModelMixin
from lora_loaders.mixins.pipeline import LoraPipelineMixin

from .equipping import equip, unequip

T = TypeVar("T")


def attach(target: T) -> T:
    """Give a pipeline or model instance, and its components, every LoRA method; does nothing where that is done.

    Args:
        target: a diffusers pipeline, or any model.

    Returns:
        The same instance. Its class keeps its name, and `isinstance`, pickling and `save_pretrained` go on as before.

    Raises:
        TypeError: neither a pipeline nor a model.
    """
    if isinstance(target, nn.Module):
        equip(target, LoraModelMixin)
        watch_forwards(target)
        return target
    if not hasattr(target, "__dict__") or isinstance(target, type):
        raise TypeError(f"attach takes a diffusers pipeline or a model, not {target!r}. Nothing was changed.")
    equip(target, LoraPipelineMixin)
    for model in target.lora_components.values():  # type: ignore[attr-defined]
        equip(model, LoraModelMixin)
        watch_forwards(model)
    return target


def detach(target: T, *, keep_fused: bool | None = None) -> T:
    """Undo `attach`: adapters are unloaded and the instances get their own classes back.

    Raises:
        AdapterStateError: adapters are fused and `keep_fused` does not say what to do.
    """
    models = [target] if isinstance(target, nn.Module) else list(getattr(target, "lora_components", {}).values())
    if keep_fused is False:
        unfuse_all(models)
    # Fused ones first: where nobody says what to do with them, that is found before anything is changed.
    for model in sorted(models, key=lambda model: not fused_adapters(model)):
        if adapter_names(model) or shared_of(model) is not None:  # or room is reserved
            unload(model, keep_fused=keep_fused)
    for instance in (*models, target):
        instance.__dict__.pop(RESERVED_RANK, None)
        if isinstance(instance, nn.Module):
            unwatch_forwards(instance)
        unequip(instance)
    return target
