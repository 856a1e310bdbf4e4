"""`attention_kwargs={"scale": s}` and its spellings: read where a model's forward begins, with and without peft.

diffusers' own decorator hands the scale to PEFT's layers only, and warns where peft is absent. A forward hook takes
the scale out before that decorator sees it, so both cases behave alike; 0.0 means 0.0 and nothing stays scaled after an
error.
"""

import inspect
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_loaders.attaching import RESERVED_RANK
from lora_loaders.gates import gate_of
from lora_loaders.layers.shared import Shared
from lora_loaders.layers.slots import refresh
from lora_loaders.layout import CONFIGS, is_foreign, shared_of
from lora_loaders.weights import number

SPELLINGS = ("attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs")


HOOKS = "_lora_scale_hooks"
"""Where a model keeps the handles of the hooks that take the scale."""


def watch_scale(model: nn.Module) -> None:
    """Let this model's forward take the scale; does nothing if it does already."""
    if HOOKS not in vars(model):
        vars(model)[HOOKS] = [
            model.register_forward_pre_hook(_take_scale, with_kwargs=True),
            model.register_forward_hook(_drop_scale, always_call=True),
        ]


def unwatch_scale(model: nn.Module) -> None:
    """Take the hooks away again."""
    for hook in vars(model).pop(HOOKS, ()):
        hook.remove()
    gate_of(model).forget_scale()


def _own_shared(model: nn.Module) -> Shared | None:
    """`shared_of`, without a walk over all modules where nothing is loaded and no room is reserved."""
    loaded = getattr(model, RESERVED_RANK, None) is not None or hasattr(model, CONFIGS)
    return shared_of(model) if loaded else None


def _take_scale(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    shared = _own_shared(model)
    spelling = next((s for s in SPELLINGS if kwargs.get(s) is not None and "scale" in kwargs[s]), None)
    given = None if spelling is None else kwargs[spelling]["scale"]
    if shared is not None and torch.compiler.is_compiling() and not shared.parameters:
        # Traced as a whole, the scale stays within the graph: nothing is left of it outside, whatever happens.
        shared.traced = given if given is not None else shared.traced
    elif shared is not None:
        # A text encoder runs several times within one scaled `encode_prompt`: what holds there holds without a word.
        _enter(model, shared, None if given is None else float(given), is_forward=True)
    if spelling is None:
        return None
    rest = {key: value for key, value in kwargs[spelling].items() if key != "scale"}
    # None is what the model gets without a scale: compiled blocks need not tell the two apart.
    return args, {**kwargs, spelling: rest or None}


def _drop_scale(model: nn.Module, args: Any, output: Any) -> None:
    shared = _own_shared(model)
    if shared is not None and torch.compiler.is_compiling() and not shared.parameters:
        shared.traced = None
    elif not torch.compiler.is_compiling():
        _leave(model, shared)


def _enter(model: nn.Module, shared: Shared, scale: float | None, *, is_forward: bool = False) -> int:
    gate = gate_of(model)
    before = gate.drop_interrupted(entering=is_forward)
    outer = shared.scale if before is None else before
    shared.scale = scale = outer if scale is None else scale
    return gate.enter_scale(
        scale, outer, partial(_write, shared), partial(_is_common, model, shared), is_forward=is_forward
    )


def _leave(model: nn.Module, shared: Shared | None, depth: int = -1) -> None:
    gate = gate_of(model)
    outer = gate.leave_scale(depth)
    if shared is None:  # the last adapter went in the middle of this forward
        gate.forget_scale()
        return
    shared.scale = outer
    gate.left_scale(outer, partial(_write, shared))


def _is_common(model: nn.Module, shared: Shared) -> bool:
    return bool(shared.parameters) or is_compiled(model)


def _write(shared: Shared, scale: float) -> None:
    shared.factor.fill_(scale)
    if shared.parameters:  # their values hold the scale; what a forward of ours computes does not
        refresh(shared.parameters)


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of a model runs compiled code: by its own `compile`, or wrapped by `torch.compile`."""
    if gate_of(model).wrappers:
        return True
    modules = model.modules()
    return any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in modules)  # type: ignore[attr-defined]


def set_scale(shared: Shared, scale: float) -> None:
    """Multiply all contributions of a model's adapters in this thread by this, until it is set again."""
    if scale != shared.scale:
        shared.scale = scale
        _write(shared, scale)


@contextmanager
def scaled(models: Iterable[nn.Module], scale: float) -> Generator[None]:
    """The models' adapters times a factor for as long as the block lasts, whatever happens in it."""
    # In one order everywhere, so that two blocks over the same two models never wait for each other.
    ordered = sorted({id(model): model for model in models}.values(), key=id)
    with ExitStack() as stack:
        for model in ordered:
            shared = shared_of(model)
            if shared is not None:
                stack.callback(_leave, model, shared, _enter(model, shared, scale))
        yield


def scale_argument(block: Any) -> str | None:
    """The argument in which a modular pipeline's block finds its text encoders' scale; None for every other block."""
    if block.sub_blocks or not any(part.name.startswith("text_encoder") for part in block.expected_components):
        return None
    asked = {given.name for given in block.inputs}
    return next((spelling for spelling in SPELLINGS if spelling in asked), None)


def encode_scaled(models: Iterable[nn.Module], encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A pipeline's own `encode_prompt` with `lora_scale` honoured here, whether peft is there or not.

    Args:
        models: the text encoders.
        encode: the pipeline's method, bound.
        args: its arguments.
        kwargs: its arguments by name.
    """
    models = list(models)
    if any(map(is_foreign, models)):
        return encode(*args, **kwargs)
    scale = kwargs.pop("lora_scale", None)
    given = inspect.signature(encode).bind_partial(*args, **kwargs)
    if "lora_scale" in given.arguments:
        scale, given.arguments["lora_scale"] = given.arguments["lora_scale"], None
    with scaled(models, number(scale)):
        return encode(*given.args, **given.kwargs)
