"""Where the other parts of a fused module's weight are read, for changes that depend on all of its rows.

A per-input DoRA of `qkv` divides by norms that run over q, k and v: its part for q reads the weights of k and v, as
they were before anything was fused into them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from .deltas import Delta
from .deltas.rows import fused_of, with_fused
from .errors import ConversionError
from .layers.base_weight import logical_shape, read_weight
from .layers.layer import AdapterLayer
from .layout import ModelLayout, base_of, submodule_at

Read = Callable[[str], Tensor | None]


@dataclass(frozen=True, eq=False)
class LiveWeights:
    """The present base weights of a model's modules, found anew each time: a module may be wrapped meanwhile.

    Attributes:
        model: the model.
        paths: path as a delta names it -> where the module stands.
    """

    model: nn.Module
    paths: Mapping[str, str]

    def __call__(self, path: str) -> Tensor:
        """The weight without what is fused into it."""
        module = submodule_at(self.model, self.paths[path])
        assert module is not None
        return module.original_weight() if isinstance(module, AdapterLayer) else read_weight(module)


def on_model(delta: Delta, component: str, layout: ModelLayout) -> tuple[Delta, str | None]:
    """The delta with its siblings' weights read from a live model, and what hinders that."""
    fused = fused_of(delta)
    if fused is None:
        return delta, None
    paths: dict[str, str] = {}
    for path, spans in fused.spans.items():
        found = layout.module(component, path)
        rows = sum(stop - start for start, stop in spans)
        if found is None or logical_shape(base_of(found[1]))[0] != rows:
            return delta, f"it depends on all rows of a fused module, and {path} is not here with its {rows} rows"
        paths[path] = found[0]
    read = LiveWeights(layout.components[component], paths)
    return with_fused(delta, replace(fused, read=read)), None


def on_weights(delta: Delta, read: Read) -> Delta:
    """The delta with its siblings' weights read by a function that gives None where there are none."""
    fused = fused_of(delta)
    if fused is None:
        return delta

    def weight(path: str) -> Tensor:
        found = read(path)
        if found is None:
            raise ConversionError(f"ΔW depends on the weight of {path}, which the base model's weights do not hold")
        return found

    return with_fused(delta, replace(fused, read=weight))
