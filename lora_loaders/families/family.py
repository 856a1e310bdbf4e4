"""What one model family is: names for each component, and the few facts that tell it from its neighbours."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from .headers import Header
from .rules import HOLE, NUMBER, Names, flatten
from .text_encoders import READ_BY, WIDTHS

FEED_FORWARD_INPUTS = ("ff.net.0.proj", "ffn.net.0.proj", "ff.linear_in", "ff.linear_1")
FEED_FORWARD_OUTPUTS = ("ff.net.2", "ffn.net.2", "ff.linear_out")
ENCODER = re.compile(r"te\d|text_encoder|encoder:")
VALUES = re.compile(r"(?<=\.to_)v$|(?<=\.add_)v(?=_proj$)")


def means_encoder(hint: str) -> bool:
    """Whether what a prefix names is a text encoder: `te2`, `encoder:clip_l`, `text_encoder`."""
    return ENCODER.match(hint) is not None


@dataclass(frozen=True)
class Shape:
    """A weight `[out, in]` of a published model, by which files with equal names are told apart; None: any size.

    A family published in several sizes has a row for each, and the number of blocks of each where depths differ.
    A row for keys (`to_k`, `add_k_proj`) is one for values too: they are made of the same input, as wide as they.
    """

    component: str
    path: str
    sizes: tuple[int | None, int | None]
    blocks: int | None = None


@dataclass(frozen=True, repr=False)
class Family:
    """One model family.

    Attributes:
        name: identifier, as `read_adapter(family=…)` takes it.
        components: names of each component; the denoiser comes first.
        model_classes: diffusers classes of the denoiser.
        shapes: weights that tell published models of this family from others.
        depths: list of blocks, as a diffusers path -> how many blocks it has in published models.
        widens: module paths whose input a file may widen (Control files).
        config_facts: configuration values of the denoiser that tell this family from others of the same class.
        extends: a family all of whose names this one has too; a file without names of this one's own is the other's.
        level: what stands above the denoiser's names in a checkpoint that holds more than it, read as a prefix.
        encoders: text encoder -> ComfyUI's name of it.
        encoder_numbers: text encoder -> kohya's number of it, where that is not its number in the pipeline.
        trainer_names: whose names kohya's trainers flatten for this family.
        traversal: component -> (class, path) of each Linear inside an attention class, in the order of 2022's models;
            cloneofsimo's files number their modules so.
        apart: models beside the denoiser with its names, which have files of their own that are spelled as the
            denoiser's; a file's name or the caller tells.
        headers: trainer -> what it states of this family in its files' headers; `kohya` or `onetrainer`.
    """

    name: str
    components: Mapping[str, Names]
    model_classes: tuple[str, ...]
    shapes: tuple[Shape, ...] = ()
    depths: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    widens: tuple[str, ...] = ()
    config_facts: Mapping[str, object] = field(default_factory=dict[str, object])
    extends: str | None = None
    level: str = ""
    encoders: Mapping[str, str] = field(default_factory=dict[str, str])
    encoder_numbers: Mapping[str, int] = field(default_factory=dict[str, int])
    trainer_names: Literal["original", "trainer", "diffusers"] = "original"
    traversal: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict[str, tuple[tuple[str, str], ...]])
    apart: tuple[str, ...] = ()
    headers: Mapping[str, Header] = field(default_factory=dict[str, Header])

    def __repr__(self) -> str:
        """Its name alone: all families are the default of a parameter that editors show."""
        return f"<{self.name}>"

    @property
    def denoiser(self) -> str:
        """Name of the component that `lora_unet_` and `diffusion_model.` mean."""
        return next(iter(self.components))

    @cached_property
    def text_encoders(self) -> tuple[str, ...]:
        """The components that encode text, in the pipeline's order."""
        return tuple(component for component in self.components if component.startswith("text_encoder"))

    def encoder_number(self, component: str) -> str:
        """What kohya puts behind `lora_te` for this encoder: nothing for the only one, but 1 for a T5.

        ComfyUI reads `lora_te_` of CLIPs alone, and counts a T5 from 1 behind them (comfy/lora.py).
        """
        if len(self.text_encoders) == 1:
            return "1" if self.encoders.get(component) == "t5xxl" else ""
        return str(self.encoder_numbers.get(component, self.text_encoders.index(component) + 1))

    def encoder_meant(self, hint: str) -> str | None:
        """The text encoder that `te2` or `encoder:clip_l` means in this family's own files; None where none is."""
        encoders = self.text_encoders
        if hint.startswith("encoder:"):
            return next((c for c, name in self.encoders.items() if f"encoder:{name}" == hint), None)
        numbers = {self.encoder_number(c) or "1": c for c in encoders}
        return numbers.get(hint[2:], next((c for i, c in enumerate(encoders) if f"te{i + 1}" == hint), None))

    def named_component(self, hint: str) -> tuple[str, ...]:
        """The components that a prefix may mean, likeliest first: `denoiser`, `te2`, `encoder:clip_l`, or a name."""
        if hint in self.components:
            return (hint,)
        if hint in ("denoiser", "decoder"):  # what ACE-Step calls its denoiser; Cascade has a decoder beside it
            return (self.denoiser,)
        if hint == "":
            return tuple(self.components)
        if not means_encoder(hint):
            return ()
        # Trainers disagree on the numbers (te2 is CLIP-G or T5), so every other encoder may still fit by its names.
        likely = self.encoder_meant(hint)
        return tuple(dict.fromkeys([*([likely] if likely else ()), *self.text_encoders]))

    def file_path(self, component: str, path: str) -> str:
        """The path as files have it: some model classes lack a level that the names keep (`text_model.`)."""
        names = self.components.get(component)
        readings = [r for r in names.resolve(path) if r.is_diffusers] if names else []
        return readings[0].paths[0] if readings and len(readings[0].paths) == 1 else path

    def fitting(
        self, component: str, path: str, out_features: int | None, in_features: int | None
    ) -> tuple[Shape, ...] | None:
        """The published weights here that this may be; None where nothing is known of this path.

        None is a size that is not known, as the rows of one part of a fused weight are.
        """
        known = self.known_shapes(component, path)
        if not known:
            return None
        given = (out_features, in_features)
        return tuple(
            shape for shape in known if all(map(self._is_like, shape.sizes, given, (False, path in self.widens)))
        )

    @staticmethod
    def _is_like(want: int | None, have: int | None, may_be_more: bool) -> bool:
        return want is None or have is None or want == have or (may_be_more and have > want)

    def known_shapes(self, component: str, path: str) -> list[Shape]:
        """The published weights of this path."""
        flat = flatten(VALUES.sub("k", path))
        rows = self._shape_rows.get((component, NUMBER.sub("#", flat)), ())
        return [shape for pattern, shape in rows if pattern.fullmatch(flat)]

    def _derived(self) -> Iterator[Shape]:
        """What the width of a block's attention says of the block's other modules that read and write the same states.

        Its output goes back to where its queries come from, as that of a second attention and of a feed-forward does.
        """
        stated = {shape.path for shape in self.shapes}
        for shape in self.shapes:
            if not shape.path.endswith(".to_q"):
                continue
            attention = shape.path.removesuffix("to_q")
            block, (inner, width) = attention.rsplit(".", 2)[0], shape.sizes
            sizes = {f"{attention}to_out.0": (width, inner)}
            if attention == f"{block}.attn1." and f"{block}.attn2.to_q" not in stated:
                sizes |= {f"{block}.attn2.to_q": (None, width), f"{block}.attn2.to_out.0": (width, None)}
            sizes |= {f"{block}.{name}": (None, width) for name in FEED_FORWARD_INPUTS}
            sizes |= {f"{block}.{name}": (width, None) for name in FEED_FORWARD_OUTPUTS}
            for path in (path for path in self.components[shape.component].modules if path in sizes.keys() - stated):
                yield Shape(shape.component, path, sizes[path], shape.blocks)

    @cached_property
    def _shape_rows(self) -> Mapping[tuple[str, str], list[tuple[re.Pattern[str], Shape]]]:
        widths = {component: WIDTHS[name] for component, name in self.encoders.items() if name in WIDTHS}
        encoders = [Shape(component, path, (None, width)) for component, width in widths.items() for path in READ_BY]
        index: dict[tuple[str, str], list[tuple[re.Pattern[str], Shape]]] = {}
        for shape in (*self.shapes, *self._derived(), *encoders):
            flat = flatten(shape.path)
            pattern = re.compile(HOLE.sub(r"\\d+", flat))
            key = (shape.component, NUMBER.sub("#", HOLE.sub("#", flat)))
            index.setdefault(key, []).append((pattern, shape))
        return index
