"""What one model family is: names for each component, and the few facts that tell it from its neighbours."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from .rules import NUMBER, Names, flatten


@dataclass(frozen=True)
class Shape:
    """A weight `[out, in]` of the published model, by which files with equal names are told apart; None: any size."""

    component: str
    path: str
    sizes: tuple[int | None, int | None]


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: identifier, as `read_adapter(family=…)` takes it.
        components: names of each component; the denoiser comes first.
        model_classes: diffusers classes of the denoiser.
        shapes: weights that tell published models of this family from others.
        widens: module paths whose input a file may widen (Control files).
        base_models: what the family's files are usually trained on, for model cards and `modelspec`.
    """

    name: str
    components: Mapping[str, Names]
    model_classes: tuple[str, ...]
    shapes: tuple[Shape, ...] = ()
    widens: tuple[str, ...] = ()

    @property
    def denoiser(self) -> str:
        """Name of the component that `lora_unet_` and `diffusion_model.` mean."""
        return next(iter(self.components))

    def expected_shape(self, component: str, path: str) -> tuple[int | None, int | None] | None:
        """The published model's `[out, in]` at this path, if it is among the telling ones."""
        return _shape_index(self.shapes).get((component, NUMBER.sub("#", flatten(path))))


@lru_cache
def _shape_index(shapes: tuple[Shape, ...]) -> dict[tuple[str, str], tuple[int | None, int | None]]:
    holes = (shape.path.replace("{i}", "0").replace("{j}", "0").replace("{k}", "0") for shape in shapes)
    return {(s.component, NUMBER.sub("#", flatten(path))): s.sizes for s, path in zip(shapes, holes, strict=True)}
