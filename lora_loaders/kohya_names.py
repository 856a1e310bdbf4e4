"""Whose module names kohya's spelling of an adapter has: those that its family's trainer flattens, or its own file's.

Some families have two: musubi-tuner trains Z-Image's split projections and converts them to fused ones for ComfyUI,
sd-scripts' SDXL has the original's block numbers and most other tools diffusers'. A file that came with the names of
the other kind gets them back, whatever formats it went through; `kohya-original` and `kohya-diffusers` name the kind.
"""

from collections.abc import Mapping
from typing import Literal

from .adapter import Adapter
from .families import Family
from .families.rules import flatten
from .formats import KOHYA
from .formats.grammar import split_key

Flattened = Literal["original", "trainer", "diffusers"]
OTHERS: Mapping[str, Flattened] = {"original": "original", "diffusers": "diffusers"}
NAMES_KEY = "lora_loaders.kohya_names"
"""The header's entry that says whose names they were, if not those of the family's trainer."""


def kohya_names(adapter: Adapter, family: Family) -> Flattened:
    """Whose names kohya's spelling of this adapter flattens."""
    if adapter.format != KOHYA.name or not adapter.bound:
        return OTHERS.get(adapter.metadata.get(NAMES_KEY, ""), family.trainer_names)
    for names in (family.trainer_names, *OTHERS.values()):
        if _are_flattened(names, adapter, family):
            return names
    return family.trainer_names


def _are_flattened(names: Flattened, adapter: Adapter, family: Family) -> bool:
    """Whether every key of the denoiser is called as these names have it."""
    table = family.components[family.denoiser]
    for key, places in adapter.bound.items():
        component, _, path = places[0].partition(".")
        split = split_key(key)
        if component != family.denoiser or split is None:
            continue
        own = path if names == "diffusers" else table.writing(names).source(path)[0]
        if flatten(own) != flatten(split.name):
            return False
    return True
