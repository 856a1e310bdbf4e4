"""One spelling on disk, as data: how a module's tensors are named when written, and by what it is known when read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .grammar import Style

ALL_ALGEBRAS = frozenset(
    {"lora", "full", "set", "dora", "loha", "lokr", "oft", "input-oft", "boft", "glora", "ia3", "sparse"}
)


@dataclass(frozen=True)
class Format:
    """A spelling.

    Attributes:
        name: identifier, as `write_adapter(format=…)` takes it.
        style: suffixes of the factors.
        names: whose module names it writes; "trainer" leaves that to the family, as kohya's trainers do.
        denoiser: prefix of the denoiser's modules.
        text_encoder: template of a text encoder's prefix; `{component}` is diffusers' name of it, `{number}` its
            number in the pipeline ("" for the only one), `{encoder}` ComfyUI's name. None: cannot say text encoders.
        flat: dots of module names become underscores.
        alpha: where alpha lives: a tensor a module, the header's metadata, or multiplied into the up factor.
        algebras: kinds of delta that it has words for.
        slots: suffixes that differ from the style's.
        core_style: suffixes of a module with a Tucker core, which ComfyUI looks for beside kohya's factors alone.
        tells_shape: whether `reshape_weight` says that an input is widened, as ComfyUI has to be told.
        encoders: its words for ComfyUI's names of text encoders, where it has others, or words for some of them alone.
        prefixes: prefixes by which it is known when read, "" for none at all.
        trainer: whose statements on the base model stand in the header, if a family knows any.
        one_model: a file is of one model, whose name is in no key, and PEFT's configuration describes its changes.
        has_level: whether a family's `level` stands above the denoiser's names.
        metadata: entries of the header that are the same in all its files.
    """

    name: str
    style: Style
    names: Literal["original", "diffusers", "xlabs", "omi", "trainer"]
    denoiser: str
    text_encoder: str | None
    prefixes: tuple[str, ...]
    flat: bool = False
    alpha: Literal["tensor", "metadata", "folded"] = "tensor"
    algebras: frozenset[str] = ALL_ALGEBRAS
    slots: Mapping[str, str] = field(default_factory=dict[str, str])
    magnitude: Literal["any", "out"] = "any"
    core_style: Style | None = None
    tells_shape: bool = False
    encoders: Mapping[str, str] | None = None
    trainer: Literal["", "kohya", "onetrainer"] = ""
    one_model: bool = False
    has_level: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
