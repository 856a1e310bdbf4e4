"""`attention_kwargs={"scale": s}` and its spellings: read where a model's forward begins, with and without peft.

diffusers' own decorator hands the scale to PEFT's layers only, and warns where peft is absent. A forward hook takes
the scale out before that decorator sees it, so both cases behave alike; 0.0 means 0.0 and nothing stays scaled after an
error.
"""

import inspect
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_loaders.layers.shared import Shared
from lora_loaders.layers.slots import refresh
from lora_loaders.layout import shared_of
from lora_loaders.weights import number

SPELLINGS = ("attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs")


def watch_scale(model: nn.Module) -> None:
    """Let this model's forward take the scale; does nothing if it does already."""
    shared = shared_of(model)
    if shared is None or shared.hooks:
        return
    shared.hooks += [
        model.register_forward_pre_hook(_take_scale, with_kwargs=True),
        model.register_forward_hook(_drop_scale, always_call=True),
    ]


def unwatch_scale(model: nn.Module) -> None:
    """Take the hooks away again."""
    shared = shared_of(model)
    for hook in shared.hooks if shared else ():
        hook.remove()
    if shared:
        shared.hooks.clear()


def _take_scale(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    shared = shared_of(model)
    # Traced as a whole, the scale stays within the graph: nothing is left of it outside, whatever happens.
    in_graph = shared is not None and torch.compiler.is_compiling() and not shared.parameters
    if shared is not None and not in_graph:
        # A text encoder runs several times within one scaled `encode_prompt`: what held before must hold afterwards.
        shared.outer_scale = shared.scale
    for spelling in SPELLINGS:
        given = kwargs.get(spelling)
        if given is not None and "scale" in given:
            rest = {key: value for key, value in given.items() if key != "scale"}
            scale = 1.0 if given["scale"] is None else given["scale"]
            if shared is not None and in_graph:
                shared.traced = scale
            elif shared is not None:
                set_scale(shared, float(scale))
            # None is what the model gets without a scale: compiled blocks need not tell the two apart.
            return args, {**kwargs, spelling: rest or None}
    return None


def _drop_scale(model: nn.Module, args: Any, output: Any) -> None:
    shared = shared_of(model)
    if shared is not None and shared.traced is not None:
        shared.traced = None
    elif shared is not None and not torch.compiler.is_compiling():
        set_scale(shared, shared.outer_scale)
        shared.outer_scale = 1.0


def set_scale(shared: Shared, scale: float) -> None:
    """Multiply all contributions of a model's adapters by this."""
    changed = scale != shared.scale
    shared.set_scale(scale)
    if changed and shared.parameters:  # their values hold the scale; what a forward of ours computes does not
        refresh(shared.parameters)


@contextmanager
def scaled(models: Iterable[nn.Module], scale: float) -> Generator[None]:
    """The models' adapters times a factor for as long as the block lasts, whatever happens in it."""
    before = [(shared, shared.scale) for model in models if (shared := shared_of(model)) is not None]
    for shared, _ in before:
        set_scale(shared, scale)
    try:
        yield
    finally:
        for shared, held in before:
            set_scale(shared, held)


def encode_scaled(models: Iterable[nn.Module], encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A pipeline's own `encode_prompt` with `lora_scale` honoured here, whether peft is there or not.

    Args:
        models: the text encoders.
        encode: the pipeline's method, bound.
        args: its arguments.
        kwargs: its arguments by name.
    """
    scale = kwargs.pop("lora_scale", None)
    given = inspect.signature(encode).bind_partial(*args, **kwargs)
    if "lora_scale" in given.arguments:
        scale, given.arguments["lora_scale"] = given.arguments["lora_scale"], None
    with scaled(models, number(scale)):
        return encode(*given.args, **given.kwargs)
