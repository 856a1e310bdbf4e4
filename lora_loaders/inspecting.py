"""What a file holds, as plain facts; of large files only the header and the few numbers that matter are read."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .adapter import Adapter
from .conversion import parse
from .deltas import Delta, DoraDelta, LoraDelta, SparseDelta
from .detection import rank_families
from .families import FAMILIES, Family
from .files import Contents, read
from .formats import read_modules
from .locating import HubOptions, is_remote, locate
from .remote import read_remote_header


@dataclass(frozen=True)
class Group:
    """The changes of one component that are of one algebra; histograms say how many modules have each value.

    Attributes:
        component: diffusers' name of it, or what the file calls it where `known` is False.
        known: whether the modules' names were understood.
        algebra: kind of change.
        modules: number of changed modules, under diffusers' names (a fused q/k/v counts as three).
        ranks: rank -> modules; "none" for algebras without one.
        alphas: alpha -> modules; "none" where neither tensor nor metadata states one.
        scalings: scaling (alpha / rank) -> modules.
    """

    component: str
    known: bool
    algebra: str
    modules: int
    ranks: Mapping[str, int]
    alphas: Mapping[str, int]
    scalings: Mapping[str, int]


@dataclass(frozen=True)
class Inspection:
    """The facts of one file.

    Attributes:
        path: the file, downloaded if it came from the Hub.
        size: bytes on disk; those of the tensors for a file on the Hub.
        format: its spelling.
        family: the model family it was read as, None if none knows its names.
        other_families: families whose names and shapes fit equally well.
        modules: number of changed modules.
        groups: by component and algebra.
        tensors: number of tensors.
        parameters: numbers in them.
        dtypes: dtype -> tensors.
        embeddings: learned token -> shape of its vectors.
        metadata: the header's own.
        ignored: key -> why it is left out.
        unresolved: module name -> why it found no place.
    """

    path: str
    size: int
    format: str | None
    family: str | None
    other_families: tuple[str, ...]
    modules: int
    groups: tuple[Group, ...]
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]
    embeddings: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    ignored: Mapping[str, str]
    unresolved: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """The facts as JSON can hold them."""
        return asdict(self)


def open_contents(
    source: str | os.PathLike[str], hub: HubOptions | None = None, *, allow_pickle: bool = False
) -> tuple[Contents, Path]:
    """A file's contents, left where they are: only what is looked at comes from the disk.

    Raises:
        AdapterFileError: see `files.read`.
    """
    path = locate(source, hub or HubOptions(), allow_pickle=allow_pickle)
    return read(path, allow_pickle=allow_pickle, lazily=True), path


def open_header(
    source: str | os.PathLike[str], hub: HubOptions | None = None, *, allow_pickle: bool = False
) -> tuple[Contents, Path]:
    """As `open_contents`, but of a Hub file that is not in the cache only the header is fetched.

    Its tensors are on the meta device then, and its alphas are not known.

    Raises:
        AdapterFileError: see `files.read`.
    """
    hub = hub or HubOptions()
    if allow_pickle or not is_remote(source, hub):
        return open_contents(source, hub, allow_pickle=allow_pickle)
    contents = read_remote_header(str(source), hub)
    return contents, Path(contents.label)


def inspect_contents(
    contents: Contents, path: Path, family: str | None = None, *, families: Sequence[Family] = FAMILIES
) -> Inspection:
    """Gather the facts of a file.

    Args:
        contents: from `open_contents`.
        path: the file itself.
        family: read it as this family, whatever its names say.
        families: the families to tell apart; pass your own beside `FAMILIES` to add one.

    Raises:
        AdapterFileError: the file is no adapter, or a malformed one.
    """
    adapter = parse(contents, family, families=families)
    tensors = contents.tensors
    return Inspection(
        path=str(path),
        size=path.stat().st_size if path.is_file() else sum(tensor.nbytes for tensor in tensors.values()),
        format=adapter.format,
        family=adapter.family,
        other_families=tuple(name for name in likely_families(contents, families) if name != adapter.family),
        modules=sum(adapter.components.values()) + len(adapter.unresolved),
        groups=tuple(_groups(adapter, unread=any(t.is_meta for t in tensors.values()))),
        tensors=len(tensors),
        parameters=sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(".alpha")),
        dtypes=_histogram(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()),
        embeddings={token: tuple(vectors.shape) for token, vectors in adapter.embeddings.items()},
        metadata=dict(sorted(adapter.metadata.items())),
        ignored=dict(adapter.ignored),
        unresolved={module.name: module.reason for module in adapter.unresolved},
    )


def likely_families(contents: Contents, families: Sequence[Family] = FAMILIES) -> list[str]:
    """The families that fit a file's names and shapes best, several if they fit equally well."""
    modules, _, _ = read_modules(list(contents.tensors))
    ranking = rank_families(modules, contents.tensors, families) if modules else []
    return [family.name for score, family in ranking if score.names and score == ranking[0][0]]


def _groups(adapter: Adapter, *, unread: bool) -> Iterable[Group]:
    """By component and algebra: denoisers before encoders, modules of unknown names last, large groups first."""
    rows: dict[tuple[str, bool, str], list[Delta]] = {}
    for component, _, delta in adapter.modules():
        rows.setdefault((component, True, _algebra(delta)), []).append(delta)
    for module in adapter.unresolved:
        if module.delta is not None:
            rows.setdefault((module.component, False, _algebra(module.delta)), []).append(module.delta)

    def order(row: tuple[tuple[str, bool, str], list[Delta]]) -> tuple[bool, bool, str, int]:
        (component, known, _), deltas = row
        return not known, component.startswith("text_encoder"), component, -len(deltas)

    for (component, known, algebra), deltas in sorted(rows.items(), key=order):
        yield Group(
            component,
            known,
            algebra,
            len(deltas),
            ranks=_histogram(delta.rank for delta in deltas),
            alphas=_histogram(_known(delta.alpha_value, unread) for delta in deltas),
            scalings=_histogram(_known(_scaling(delta), unread and delta.alpha_value is not None) for delta in deltas),
        )


def _known(value: float | None, unread: bool) -> float | str | None:
    """The value, unless it comes from an alpha of which only the header was read."""
    return "not read" if unread and value is not None else value


def _algebra(delta: Delta) -> str:
    if isinstance(delta, DoraDelta | SparseDelta):
        return f"{_algebra(delta.inner)} + {delta.kind}"
    if isinstance(delta, LoraDelta) and delta.mid is not None:
        return f"{delta.kind} (Tucker)"
    return delta.kind


def _scaling(delta: Delta) -> float | None:
    inner = delta.inner if isinstance(delta, DoraDelta | SparseDelta) else delta
    return getattr(inner, "scaling", None)


def _histogram(values: Iterable[float | str | None]) -> dict[str, int]:
    """Value -> how often, the most frequent first."""

    def text(value: float | str | None) -> str:
        return "none" if value is None else value if isinstance(value, str) else f"{value:g}"

    return dict(Counter(map(text, values)).most_common())


__all__ = ["Group", "Inspection", "inspect_contents", "likely_families", "open_contents"]
