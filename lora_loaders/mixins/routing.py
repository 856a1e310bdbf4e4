"""Which of two transformers a file is for: Wan 2.2's two noise levels, MiniMax-H3's reference partition.

Both transformers have the same module names, so the file's keys do not tell; an argument or the file's name does.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from torch import nn

from lora_loaders.adapter import Adapter
from lora_loaders.errors import AdapterStateError
from lora_loaders.files import Contents
from lora_loaders.loading import LoadReport

logger = logging.getLogger(__name__)
FIRST = "transformer"
SECOND = ("transformer_2", "transformer_ref")

# "low" and "high" alone say something else as often: low_rank, fp8_low, wan_low_light, high_res.
_LOW = re.compile(r"(?:^|[^a-z])(?:low[^a-z]*noise|ln(?:[^a-z]|$))", re.IGNORECASE)
_HIGH = re.compile(r"(?:^|[^a-z])(?:high[^a-z]*noise|hn(?:[^a-z]|$))", re.IGNORECASE)
_BOTH = re.compile(r"(?:high|low)[^a-z]*(?:and[^a-z]*|n[^a-z]+)?(?:low|high)[^a-z]*noise", re.IGNORECASE)


def noise_level(names: Sequence[str]) -> str | None:
    """`"high"` or `"low"`, if the first of these names that says either says only one of them.

    Args:
        names: a file's name, then its folder's: `wan2.2_t2v_low_noise.safetensors`, `HighNoise`, `style-LN`.
    """
    for name in names:
        # `LowNoise` is two words as well.
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
        low, high = _LOW.search(words) is not None, _HIGH.search(words) is not None
        if low != high and not _BOTH.search(words):
            return "low" if low else "high"
    return None


def names_of_file(source: Any, weight_name: str | None, contents: Contents | Adapter) -> list[str]:
    """The file's name and its folder's, nearest first, where there is a file."""
    if not isinstance(source, (str, os.PathLike)):
        return []
    label = contents.source if isinstance(contents, Adapter) else contents.label
    paths = [PurePath(text) for text in (weight_name, label, os.fspath(source)) if text]
    return list(dict.fromkeys(part for path in paths for part in reversed(path.parts[-2:])))


def second_transformer(
    models: Mapping[str, nn.Module], wanted: Mapping[str, bool | None], file_names: Sequence[str]
) -> str | None:
    """The transformer beside the first one that a file without a word on it goes to; None for the first.

    Args:
        models: the pipeline's components.
        wanted: second transformer -> what the caller said (`load_into_transformer_2=…`), None for nothing.
        file_names: see `names_of_file`.

    Raises:
        AdapterStateError: a transformer is asked for that the pipeline has not.
    """
    for name, asked in wanted.items():
        if asked and name not in models:
            raise AdapterStateError(
                f"load_into_{name}=True, but this pipeline has no {name}",
                problems=[f"component: {other}" for other in models],
                mend=f"Leave the argument out to load into {FIRST}, or load a pipeline with both.",
                state="Nothing was loaded or changed.",
            )
        if asked:
            return name
    if FIRST not in models:
        return next((name for name in SECOND if name in models), None)
    if "transformer_2" in models and wanted.get("transformer_2") is None:
        level = noise_level(file_names)
        if level is not None:
            chosen = "transformer_2" if level == "low" else FIRST
            logger.info("%s: its name says %s noise, so it goes to %s", file_names[0], level, chosen)
            return "transformer_2" if level == "low" else None
    return None


def routed(models: Mapping[str, nn.Module], to: str | None, contents: Contents | Adapter) -> dict[str, nn.Module]:
    """The models that a file is about: of several transformers one, in the first one's place, and those it names."""
    named = {name for name in SECOND if _names(contents, name)}
    if to is not None and to not in named:
        return {FIRST: models[to], **{name: model for name, model in models.items() if name not in (FIRST, *SECOND)}}
    return {name: model for name, model in models.items() if name not in SECOND or name in named}


def said_of(report: LoadReport, second: str) -> LoadReport:
    """The report of a routed load, with the component's own name."""

    def named(label: str) -> str:
        return second + label.removeprefix(FIRST) if label == FIRST or label.startswith(f"{FIRST}.") else label

    return replace(
        report,
        components={named(component): count for component, count in report.components.items()},
        unmatched={named(label): reason for label, reason in report.unmatched.items()},
        widened=tuple(map(named, report.widened)),
        padded=tuple(map(named, report.padded)),
        norms=tuple(map(named, report.norms)),
    )


def _names(contents: Contents | Adapter, component: str) -> bool:
    keys = contents.deltas if isinstance(contents, Adapter) else contents.tensors
    return any(key == component or key.startswith(f"{component}.") for key in keys)
