"""cloneofsimo's files, the oldest there are: `unet:12:up`, the 12th adapted Linear in the model's module order.

The header's metadata says which module classes were adapted; learned tokens lie beside as `<s1>`.
"""

import json
import re
from collections.abc import Iterable, Mapping

from .format import Format
from .grammar import NO_SUFFIX, Key, RawModule, is_embedding

INDEXED = Format(
    name="indexed",
    style="kohya",
    names="diffusers",
    denoiser="{component}",
    text_encoder="{component}",
    prefixes=(),
    alpha="folded",
    algebras=frozenset({"lora"}),
    slots={"down": ":down", "up": ":up"},
)
KEY = re.compile(r"(?P<component>\w+):(?P<index>\d+):(?P<slot>up|down)$")


def is_indexed(keys: Iterable[str]) -> bool:
    """Whether the keys are of this spelling."""
    return all(KEY.match(key) or is_embedding(key) for key in keys)


def read_indexed(keys: Iterable[str]) -> tuple[list[RawModule], dict[str, str], list[Key]]:
    """As `grammar.read_keys`; a module's name is `#` and its index."""
    modules: dict[tuple[str, str], RawModule] = {}
    left: dict[str, str] = {}
    for key in keys:
        match = KEY.match(key)
        if match is None:
            left[key] = NO_SUFFIX
            continue
        component, name = match["component"], f"#{match['index']}"
        module = modules.setdefault((component, name), RawModule(f"{component}:", component, name, {}))
        module.keys[match["slot"]] = key
    return list(modules.values()), left, []


def adapted_classes(metadata: Mapping[str, str], component: str) -> frozenset[str]:
    """Class names whose Linears were adapted, as the header says; empty if it does not say."""
    return frozenset(json.loads(metadata.get(component, "[]")))
