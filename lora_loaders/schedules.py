"""Weights that follow the denoising: a function of the progress from 0 to 1, or one number for each step."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from .errors import AdapterStateError
from .weights import number


class Step(NamedTuple):
    """One turn of a pipeline's denoising loop: its number, from 0, among so many."""

    number: int = 0
    total: int = 1

    @property
    def progress(self) -> float:
        """`number / (total - 1)`: 0 in the first step, 1 in the last, and 0 where there is but one."""
        return min(self.number / (self.total - 1), 1.0) if self.total > 1 else 0.0


class PerStep:
    """A weight for each step of the denoising loop; the last holds where there are more steps.

    Args:
        values: the weights, one at least.

    Raises:
        AdapterStateError: there is none, or one is no number.
    """

    def __init__(self, values: Sequence[float]) -> None:
        self.values = tuple(number(value) for value in values)
        if not self.values:
            raise AdapterStateError("PerStep has no weight", mend="Give one for each step.", state=NOTHING)

    def at(self, step: Step) -> float:
        """The weight of this step."""
        return self.values[min(step.number, len(self.values) - 1)]

    def __repr__(self) -> str:
        """As it is written."""
        return f"PerStep({list(self.values)})"


NOTHING = "Nothing was changed."
START = Step()


def is_scheduled(weight: Any) -> bool:
    """Whether a weight, or a part of it, follows the denoising."""
    if isinstance(weight, Mapping):
        return any(map(is_scheduled, cast("Mapping[Any, Any]", weight).values()))
    if isinstance(weight, (list, tuple)):
        return any(map(is_scheduled, cast("Sequence[Any]", weight)))
    return isinstance(weight, PerStep) or callable(weight)


def per_step(weight: Any) -> Any:
    """The `PerStep` that a list in the place of one adapter's number means; any other weight as it is."""
    return PerStep(weight) if isinstance(weight, (list, tuple)) else weight


def at_step(weight: Any, step: Step, name: str) -> Any:
    """The weight of an adapter at a step, in the same shape and with numbers only.

    Raises:
        AdapterStateError: its function gives no finite number.
    """
    if isinstance(weight, Mapping):
        return {key: at_step(value, step, name) for key, value in cast("Mapping[Any, Any]", weight).items()}
    if isinstance(weight, (list, tuple)):
        return [at_step(value, step, name) for value in cast("Sequence[Any]", weight)]
    if isinstance(weight, PerStep):
        return weight.at(step)
    return _called(weight, step, name) if callable(weight) else weight


def _called(function: Callable[[float], Any], step: Step, name: str) -> float:
    try:
        inspect.signature(function).bind(step.progress)
    except TypeError as error:
        raise AdapterStateError(
            f"the schedule of {name} does not take the progress: {error}",
            mend="Give a function of one number, which is 0 in the first step and 1 in the last.",
            state="Weights are what they were before.",
        ) from error
    except ValueError:
        pass  # what is written in C may not tell its signature
    given = function(step.progress)
    try:
        if given is None:
            raise AdapterStateError("an adapter weight is a number, not None")
        return number(given)
    except AdapterStateError as error:
        raise AdapterStateError(
            f"the schedule of {name} at progress {step.progress:g}: {error.what}",
            mend="Let the function return a finite number for every progress from 0 to 1.",
            state="Weights are what they were before.",
        ) from error


def refuse_schedules(names: Sequence[str], weights: Any) -> None:
    """Raise where a weight follows the denoising and there is none.

    Raises:
        AdapterStateError: a schedule.
    """
    if is_scheduled(weights):
        raise AdapterStateError(
            f"the weight of {', '.join(names)} follows the denoising, and a model alone does not denoise",
            mend="Give it to set_adapters of the pipeline.",
            state=NOTHING,
        )
