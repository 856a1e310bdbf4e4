"""Is a file what it says it is? Its header against its bytes, its numbers, its pairs, its names."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .adapter import Adapter
from .combining.provenance import sha256
from .conversion import parse
from .errors import AdapterFileError, MalformedAdapterError
from .families import FAMILIES, Family
from .files import Contents, read, read_header
from .inspecting import likely_families
from .locating import PICKLES, HubOptions, locate

UNREAD = "not looked at, since the file cannot be read"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what was asked.
        passed: whether it is so; None where it could not be asked.
        found: the answer in a few words.
        problems: every place where it is not so.
    """

    name: str
    passed: bool | None
    found: str = ""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verification:
    """What became of all checks of one file."""

    path: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The facts as JSON can hold them."""
        return {"path": self.path, "passed": self.passed, "checks": [asdict(check) for check in self.checks]}


def verify(
    source: str | os.PathLike[str],
    *,
    family: str | None = None,
    hub: HubOptions | None = None,
    use_safetensors: bool | None = None,
    families: Sequence[Family] = FAMILIES,
) -> Verification:
    """Check a file: whole, finite, pairs complete, names known, header true. Broken files are reported, not raised.

    Args:
        source: a path, a folder or a Hub id.
        family: check the names against this family's.
        hub: file name, subfolder, revision, token and cache, for folders and Hub ids.
        use_safetensors: False allows reading a pickle.
        families: the families to tell apart; pass your own beside `FAMILIES` to add one.

    Raises:
        AdapterFileError: there is no such file, or it is a pickle that nobody allowed to read.
    """
    allowed = use_safetensors is False
    path = locate(source, hub or HubOptions(), allow_pickle=allowed)
    try:
        if path.suffix.lower() not in PICKLES:
            read_header(path)
        contents = read(path, allow_pickle=allowed, lazily=True)
    except MalformedAdapterError as error:
        names = ("numbers", "modules", "names", "header")
        return Verification(str(path), (_failed("whole", error, str(path)), *(Check(n, None, UNREAD) for n in names)))
    size = f"{len(contents.tensors):,} tensors in {path.stat().st_size:,} bytes"
    whole = Check("whole", True, f"{size}, as the header says")
    numbers = _numbers(contents)
    try:
        adapter = parse(contents, family, families=families)
    except AdapterFileError as error:
        unread = (Check(name, None, UNREAD) for name in ("names", "header"))
        return Verification(str(path), (whole, numbers, _failed("modules", error, str(path)), *unread))
    modules = Check("modules", True, _modules(adapter))
    return Verification(
        str(path),
        (whole, numbers, modules, _names(adapter, contents, families), _header(adapter, contents.metadata, path)),
    )


def _failed(name: str, error: AdapterFileError, label: str) -> Check:
    what = error.what.removeprefix(f"{label}: ").removeprefix(f"{label} ")
    return Check(name, False, what, error.problems)


def _numbers(contents: Contents) -> Check:
    """Whether every number is finite; tensor by tensor, so that memory holds one."""
    problems: list[str] = []
    for key, tensor in contents.tensors.items():
        if tensor.is_floating_point():
            bad = int((~torch.isfinite(tensor.float())).sum())
            if bad:
                problems.append(f"{key}: {bad:,} of {tensor.numel():,} are not finite")
    found = f"{len(problems)} tensors hold NaN or infinity" if problems else "all finite"
    return Check("numbers", not problems, found, tuple(problems))


def _modules(adapter: Adapter) -> str:
    deltas = [delta for _, _, delta in adapter.modules()]
    deltas += [module.delta for module in adapter.unresolved if module.delta is not None]
    kinds = Counter(delta.kind for delta in deltas)
    ranks = {delta.rank for delta in deltas if delta.rank}
    shown = f"rank {min(ranks)}" + (f" to {max(ranks)}" if len(ranks) > 1 else "") if ranks else "no rank"
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{counted or 'learned tokens alone'}; {shown}; pairs complete, ranks agree, none twice"


def _names(adapter: Adapter, contents: Contents, families: Sequence[Family]) -> Check:
    problems = [f"{module.name}: {module.reason}" for module in adapter.unresolved]
    problems += [f"{key}: {reason}" for key, reason in adapter.ignored.items()]
    others = [name for name in likely_families(contents, families) if name != adapter.family]
    found = f"{adapter.format}, {adapter.family or 'no known family'}"
    if others:
        found += f" (names and shapes also fit {', '.join(others)})"
    return Check("names", not problems, found, tuple(problems))


def _header(adapter: Adapter, metadata: Mapping[str, str], path: Path) -> Check:
    problems = tuple(_lies(adapter, metadata, path))
    return Check("header", not problems, f"{len(metadata)} entries" if metadata else "no metadata", problems)


def _lies(adapter: Adapter, metadata: Mapping[str, str], path: Path) -> Iterator[str]:
    """What the metadata say of the tensors and is not so."""
    ranks = {delta.rank for _, _, delta in adapter.modules() if delta.rank}
    stated = metadata.get("ss_network_dim", "")
    if stated.isdigit() and ranks and int(stated) not in ranks:
        yield f"ss_network_dim is {stated}, the ranks are {', '.join(map(str, sorted(ranks)[:8]))}"
    digest = metadata.get("sshs_model_hash")
    if digest and digest != sha256(path, read_header(path)[2]):
        yield "sshs_model_hash is the hash of other tensors: they were changed after it was written"
