"""File -> file: any spelling read, another written, and the bytes left alone on the way."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .adapter import Adapter
from .conversion import Source, parse
from .detection import family_named
from .errors import ConversionError
from .families import FAMILIES, Family
from .files import read
from .locating import HubOptions
from .writing import to_tensors, write_adapter

logger = logging.getLogger(__name__)


def convert(
    source: Source,
    target: str | os.PathLike[str],
    *,
    format: str,
    family: str | None = None,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = True,
    use_safetensors: bool | None = None,
    hub: HubOptions | None = None,
    families: Sequence[Family] = FAMILIES,
) -> Path:
    """Read any spelling and write another, or one component's part of it; see `read_adapter` and `write_adapter`.

    Where names change and rows are only cut, reordered or put together, bytes go from file to file unread; the rest
    goes tensor by tensor. Memory does not grow with the file.

    Raises:
        AdapterFileError, ConversionError: and nothing is written.
    """
    if isinstance(source, Adapter):
        adapter = source
    else:
        adapter = parse(
            read(source, hub, allow_pickle=use_safetensors is False, lazily=True), family, families=families
        )
    if adapter.ignored:
        reasons = "; ".join(list(dict.fromkeys(adapter.ignored.values()))[:3])
        logger.warning("%s: %d keys are left out: %s", adapter.source, len(adapter.ignored), reasons)
    if component is not None:
        adapter = adapter.only(component)
    path = write_adapter(adapter, target, format, dtype=dtype, overwrite=overwrite, families=families)
    if others := _written_otherwise(adapter, format, families):
        logger.warning(
            "%s is written as %s, but names and shapes fit %s as well, which would be written under other names; "
            "family=… settles it",
            *(adapter.source, adapter.family, ", ".join(others)),
        )
    return path


def _written_otherwise(adapter: Adapter, format: str, families: Sequence[Family]) -> list[str]:
    """The families that fit the adapter as well and have other names for its modules in this format, or none."""
    if adapter.family is None or not adapter.ties:
        return []
    own = family_named(adapter.family, families)
    keys = set(to_tensors(adapter, format, families=families)[0])
    others: list[str] = []
    for family in (family_named(name, families) for name in adapter.ties):
        try:
            if set(to_tensors(_moved(adapter, own, family), format, families=families)[0]) != keys:
                others.append(family.name)
        except ConversionError:
            continue  # its file in this format would be none at all
    return others


def _moved(adapter: Adapter, own: Family, other: Family) -> Adapter:
    """The adapter as if it were read as the other family's: one denoiser for the other, each encoder for the same."""
    encoders = {encoder: component for component, encoder in other.encoders.items()}
    places = {component: encoders[name] for component, name in own.encoders.items() if name in encoders}
    places[own.denoiser] = other.denoiser
    deltas = {places.get(component, component): deltas for component, deltas in adapter.deltas.items()}
    return replace(adapter, deltas=deltas, family=other.name)
