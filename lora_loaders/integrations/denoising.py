"""A pipeline's call with weights that follow it: each turn of its denoising loop finds those of its own progress.

A turn ends in `callback_on_step_end`, where the pipeline has one; where it has none, as modular ones have not, in the
scheduler's `step`. At rest the weights are those of progress 0, so that the first turn needs nothing.
"""

import functools
import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_loaders.activity import follow
from lora_loaders.errors import AdapterStateError
from lora_loaders.gates import changing, gate_of, keep_watching
from lora_loaders.layout import shared_of
from lora_loaders.schedules import START, Step

from .equipping import equip, is_equipped, unequip

CALLBACK = "callback_on_step_end"
INPUTS = "callback_on_step_end_tensor_inputs"


def follow_call(
    pipeline: Any, call: Callable[..., Any], models: Sequence[nn.Module], args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """A pipeline's call, `call`, in which the scheduled weights of these models follow the denoising.

    Calls of several threads with scheduled weights of one model take turns.
    """
    for model in models:
        keep_watching(model)
    models = [model for model in models if _schedules(model)]
    if not models:
        return call(*args, **kwargs)
    with _turn(models):
        try:
            signature = inspect.signature(call)
            if CALLBACK in signature.parameters:
                given = signature.bind_partial(*args, **kwargs)
                given.arguments.update(_composed(pipeline, models, given.arguments))
                return call(*given.args, **given.kwargs)
            with _counted(_scheduler(pipeline), models):
                return call(*args, **kwargs)
        finally:
            _go(models, START)


@contextmanager
def _turn(models: Sequence[nn.Module]) -> Generator[None]:
    """These models for this thread's call alone, among those that schedules follow."""
    with ExitStack() as stack:
        # In one order everywhere, so that two calls with the same two models never wait for each other.
        for gate in sorted({gate_of(model) for model in models}, key=id):
            stack.enter_context(gate.turn)
        yield


def _schedules(model: nn.Module) -> bool:
    shared = shared_of(model)
    return shared is not None and bool(shared.schedules)


def _go(models: Sequence[nn.Module], step: Step) -> None:
    """All models at one step; other threads see it done in all of them, or in none."""
    if 0 <= step.number < step.total:
        with changing(models):
            for model in models:
                follow(model, step)


def _composed(pipeline: Any, models: Sequence[nn.Module], arguments: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments about its callback: the user's own goes first, and ours prepares the next turn."""
    own: Any = arguments.get(CALLBACK)

    def end_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        result = tensors if own is None else own(pipe, index, timestep, tensors)
        _go(models, Step(index + 1, _turns(pipe)))
        return result

    changed: dict[str, Any] = {CALLBACK: end_step}
    if hasattr(own, "tensor_inputs"):  # diffusers' PipelineCallback says itself what it wants
        changed[INPUTS] = own.tensor_inputs
    elif INPUTS in arguments and arguments[INPUTS] is None:
        changed[INPUTS] = []  # nobody asks for it as long as there is no callback
    return changed


def _turns(pipeline: Any) -> int:
    """How many turns the loop has that the pipeline is in."""
    said = getattr(pipeline, "_num_timesteps", None)
    return said if isinstance(said, int) else _left(_scheduler(pipeline), None)


def _scheduler(pipeline: Any) -> Any:
    scheduler = getattr(pipeline, "scheduler", None)
    if not callable(getattr(scheduler, "step", None)):
        raise AdapterStateError(
            f"{type(pipeline).__name__} has neither {CALLBACK} nor a scheduler: it cannot be told how far it is",
            mend="Give its adapters numbers as weights.",
            state="Nothing was run.",
        )
    return scheduler


def _left(scheduler: Any, timestep: Any) -> int:
    """Turns from the scheduler's first one on, which lies behind the beginning where a picture is given."""
    times = list(scheduler.timesteps)
    begin = getattr(scheduler, "begin_index", None)
    if begin is None:
        begin = next((n for n, time in enumerate(times) if timestep is not None and bool(time == timestep)), 0)
    return len(times) - begin


@dataclass
class _Counter:
    """How far a loop is, as its scheduler sees it."""

    models: Sequence[nn.Module]
    scheduler: Any
    index: int = 0
    total: int | None = None

    def begin(self) -> None:
        """The scheduler was given new times: another loop begins, as in pipelines of several stages."""
        if self.index:
            self.index, self.total = 0, None
            _go(self.models, START)

    def advance(self, timestep: Any) -> None:
        """A turn is over."""
        if self.total is None:
            self.total = _left(self.scheduler, timestep)
        self.index += 1
        _go(self.models, Step(self.index, self.total))


_COUNTERS: dict[int, _Counter] = {}
"""Identity of a scheduler in a call -> its counter: a copy of it, as for sound beside a film, counts nothing."""


@contextmanager
def _counted(scheduler: Any, models: Sequence[nn.Module]) -> Generator[None]:
    if id(scheduler) in _COUNTERS:
        yield  # a pipeline within a pipeline
        return
    _COUNTERS[id(scheduler)] = _Counter(models, scheduler)
    equip(scheduler, _counting(type(scheduler)))
    try:
        yield
    finally:
        if is_equipped(scheduler):
            unequip(scheduler)
        del _COUNTERS[id(scheduler)]


@functools.cache
def _counting(cls: Any) -> type:
    """What stands in front of a scheduler's class; pipelines look at the signatures, so they stay the class's own."""

    @functools.wraps(cls.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = cls.step(self, *args, **kwargs)
        counter = _COUNTERS.get(id(self))
        if counter is not None:
            counter.advance(kwargs["timestep"] if "timestep" in kwargs else args[1] if len(args) > 1 else None)
        return result

    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.set_timesteps(self, *args, **kwargs)
        counter = _COUNTERS.get(id(self))
        if counter is not None:
            counter.begin()

    return type("Counting", (), {"step": step, "set_timesteps": set_timesteps})
