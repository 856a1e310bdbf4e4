"""attach(pipe): any pipeline or model instance gains the LoRA methods, and detach takes them away."""

from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from lora_loaders.activity import unload
from lora_loaders.attaching import RESERVED_RANK
from lora_loaders.fusing import fused_adapters, unfuse_all
from lora_loaders.gates import uncompiled, unwatch_forwards, watch_forwards
from lora_loaders.hotswap import CHECK
from lora_loaders.layout import shared_of
from lora_loaders.loading import adapter_names, check_foreign
from lora_loaders.mixins.components import components_of
from lora_loaders.mixins.model import LoraModelMixin
from lora_loaders.mixins.pipeline import LoraBlocksMixin, LoraPipelineMixin

from .equipping import equip, is_equipped, unequip
from .scale import scale_argument, unwatch_scale, watch_scale

T = TypeVar("T")
_HOLDERS: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()
"""Model -> the attached pipelines that it is a component of."""


def attach(target: T) -> T:
    """Give a pipeline or model instance, and its components, every LoRA method; does nothing where that is done.

    Args:
        target: a diffusers pipeline, or any model.

    Returns:
        The same instance. Its class keeps its name, and `isinstance`, pickling and `save_pretrained` go on as before. A
        pipeline that `from_pipe` makes of it is another one, to be attached too.

    Raises:
        TypeError: neither a pipeline nor a model.
        AdapterStateError: peft has put layers of its own into it.
    """
    if isinstance(target, nn.Module):
        model = uncompiled(target)
        check_foreign({type(model).__name__: model})
        _equip_model(model)
        return target
    if not hasattr(target, "__dict__") or isinstance(target, type):
        raise TypeError(f"attach takes a diffusers pipeline or a model, not {target!r}. Nothing was changed.")
    models = components_of(target)
    check_foreign(models)
    equip(target, LoraPipelineMixin)
    for block in _blocks_of(target):
        equip(block, LoraBlocksMixin)
    for model in models.values():
        _equip_model(model)
        _HOLDERS.setdefault(model, WeakSet()).add(target)
    return target


def _equip_model(model: nn.Module) -> None:
    equip(model, LoraModelMixin)
    watch_forwards(model)
    watch_scale(model)


def _blocks_of(pipeline: object) -> list[Any]:
    """A modular pipeline's blocks that scale its text encoders, at any depth."""
    found: list[Any] = []
    waiting = [vars(pipeline).get("_blocks")]
    while waiting:
        block: Any = waiting.pop()
        if block is not None:
            waiting += block.sub_blocks.values()
            if scale_argument(block) is not None:
                found.append(block)
    return found


def detach(target: T, *, keep_fused: bool | None = None) -> T:
    """Undo `attach`: adapters are unloaded and the instances get their own classes back.

    A component that another attached pipeline has too stays as it is, with its adapters. One that stood in the pipeline
    when it was attached, and was replaced since, is undone too.

    Raises:
        AdapterStateError: adapters are fused and `keep_fused` does not say what to do.
    """
    models = [uncompiled(target)] if isinstance(target, nn.Module) else _given_up(target)
    if keep_fused is False:
        unfuse_all(models)
    # Fused ones first: where nobody says what to do with them, that is found before anything is changed.
    for model in sorted(models, key=lambda model: not fused_adapters(model)):
        if adapter_names(model) or shared_of(model) is not None:  # or room is reserved
            unload(model, keep_fused=keep_fused)
    for instance in (*_blocks_of(target), *models, *([] if isinstance(target, nn.Module) else [target])):
        instance.__dict__.pop(RESERVED_RANK, None)
        instance.__dict__.pop(CHECK, None)
        if isinstance(instance, nn.Module):
            unwatch_forwards(instance)
            unwatch_scale(instance)
        unequip(instance)
    return target


def _given_up(pipeline: Any) -> list[nn.Module]:
    """The components that no other attached pipeline has, once this one lets go of all, replaced ones too."""
    replaced = [model for model, holders in _HOLDERS.items() if pipeline in holders]
    models = list(dict.fromkeys([*getattr(pipeline, "lora_components", {}).values(), *replaced]))
    for model in models:
        _HOLDERS.get(model, WeakSet[Any]()).discard(pipeline)
    return [model for model in models if not any(map(is_equipped, _HOLDERS.get(model, ())))]
