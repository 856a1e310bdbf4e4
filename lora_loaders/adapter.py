"""The one form that everything passes through: component -> module path (diffusers names) -> delta, and metadata."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .buffers import BufferMover
from .deltas import Delta
from .errors import ConversionError


class Modules(NamedTuple):
    """One changed module, as `Adapter.modules()` yields it."""

    component: str
    path: str
    delta: Delta


@dataclass(frozen=True)
class Unresolved:
    """A module whose name the family's tables do not hold; a live model may still know it."""

    component: str
    name: str
    delta: Delta | None
    keys: tuple[str, ...]
    reason: str


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """One named set of changes to a model, immutable.

    Attributes:
        deltas: component (`transformer`, `unet`, `text_encoder`, …) -> module path in diffusers' names -> `Delta`.
        family: identifier of the model family, None if it is not known.
        format: name of the spelling it was read from.
        metadata: the file's own metadata.
        embeddings: learned token embeddings by token; loadable as textual inversion.
        bound: key in the file -> the module paths it went to, as `component.path`.
        ignored: key in the file -> why it was left out.
        unresolved: modules that found no place by name.
        source: what it was read from, for messages.
        ties: families that its names and shapes fit as well as `family`; empty where the caller or a model named it.
        registered: `component.path` of a module whose raw parameters are changed -> the names of all its parameters, in
            the order of a live model; known only where one was at hand.
    """

    deltas: Mapping[str, Mapping[str, Delta]]
    family: str | None = None
    format: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    embeddings: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    bound: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    ignored: Mapping[str, str] = field(default_factory=dict[str, str])
    unresolved: tuple[Unresolved, ...] = ()
    source: str = "a dictionary"
    ties: tuple[str, ...] = ()
    registered: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    def __repr__(self) -> str:
        counts = ", ".join(f"{component}: {count} modules" for component, count in self.components.items())
        return f"<Adapter {self.describe()} ({self.source}; {counts or 'no modules'})>"

    @property
    def components(self) -> dict[str, int]:
        """Component -> number of changed modules."""
        return {component: len(deltas) for component, deltas in self.deltas.items() if deltas}

    def modules(self) -> Iterator[Modules]:
        """Every changed module of every component."""
        for component, deltas in self.deltas.items():
            for path, delta in deltas.items():
                yield Modules(component, path, delta)

    def map(self, change: Callable[[Delta], Delta]) -> "Adapter":
        """The same adapter with each delta changed."""
        deltas = {c: {path: change(delta) for path, delta in deltas.items()} for c, deltas in self.deltas.items()}
        return replace(self, deltas=deltas)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Adapter":
        """The same adapter on another device, in another floating dtype.

        Tensors that are views of one buffer (a file read whole) move with one copy of that buffer.
        """
        move = BufferMover(device)

        def change(tensor: Tensor) -> Tensor:
            moved = move(tensor)
            return moved.to(dtype) if dtype is not None and moved.is_floating_point() else moved

        return self.map(lambda delta: delta.map_tensors(change))

    def only(self, component: str) -> "Adapter":
        """The part of it that changes this component; learned tokens are of none.

        Raises:
            ConversionError: it changes nothing there.
        """
        if component not in self.components:
            raise ConversionError(
                f"{self.source} ({self.describe()}): no change of {component}",
                problems=[f"component: {other}" for other in self.components],
                mend="Name one of these.",
                state="Nothing was written.",
            )
        bound = {key: places for key, places in self.bound.items() if places[0].partition(".")[0] == component}
        rest = tuple(module for module in self.unresolved if module.component == component)
        own = {component: self.deltas[component]}
        return replace(self, deltas=own, bound=bound, unresolved=rest, embeddings={})

    def refuse_unresolved(self) -> None:
        """Raise unless every module's name is known; leaving some out of what is written would be silent loss.

        Raises:
            ConversionError: some are not.
        """
        if self.unresolved:
            raise ConversionError(
                f"{self.source} ({self.describe()}): {len(self.unresolved)} modules have names that are not known",
                problems=[f"{module.name}: {module.reason}" for module in self.unresolved],
                mend="Name the family with family=… if it was taken for another.",
                state="Nothing was written.",
            )

    def describe(self) -> str:
        """Format and family in words, for messages."""
        return ", ".join(filter(None, (self.format, self.family)))
