"""Prints what becomes of the keys of many adapter files: family, spelling, keys bound, ignored and unknown.

scripts/survey.py PATH …    a .safetensors file (its header alone is read), a .json listing, or a folder of these

A listing is `{"keys": {key: {"shape": [...]}}}`, `{key: …}` or `[key, …]`; shapes may be missing. Exits with 1 if any
key of a real file is unknown: read as an adapter's, and of a name that the file's family does not have, or no adapter's
at all. A listing whose `provenance` says that somebody made it up (by hand, synthetic, for a test) is no real file:
what is unknown in it is named and counted apart.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lora_loaders.adapter import Adapter
from lora_loaders.conversion import parse
from lora_loaders.errors import UnknownFormatError
from lora_loaders.files import Contents, read_header
from lora_loaders.formats import NO_SUFFIX
from lora_loaders.inspecting import likely_families

MODULE_ALONE = "a module's name in a listing, without the suffix of a tensor"
ENDINGS = (".json", ".safetensors")
INVENTED = re.compile(r"hand-?written|synthetic|invented|test list", re.IGNORECASE)
"""Words of a listing's `provenance` by which it is no file's header."""


class Row(NamedTuple):
    """What was found out about one file."""

    file: str
    family: str
    also: tuple[str, ...]
    """Families that its names and shapes fit equally well."""
    spelling: str
    keys: int
    bound: int
    ignored: dict[str, str]
    unknown: dict[str, str]
    invented: bool


def is_invented(path: Path) -> bool:
    """Whether this is a listing that says of itself that it is no real file's."""
    listing: Any = json.loads(path.read_text("utf-8")) if path.suffix == ".json" else None
    return isinstance(listing, dict) and INVENTED.search(str(listing.get("provenance", ""))) is not None


def listed(path: Path) -> dict[str, tuple[int, ...] | None]:
    """Keys of a file and their shapes, None where the listing gives none."""
    if path.suffix == ".safetensors":
        return {key: entry.shape for key, entry in read_header(path)[0].items()}
    listing: Any = json.loads(path.read_text("utf-8"))
    keys: Any = listing.get("keys", listing) if isinstance(listing, dict) else dict.fromkeys(listing)
    return {key: _shape(value) for key, value in keys.items()}


def _shape(value: Any) -> tuple[int, ...] | None:
    shape = value.get("shape") if isinstance(value, dict) else value
    return tuple(shape) if isinstance(shape, list) else None


def surveyed(
    name: str, keys: dict[str, tuple[int, ...] | None], family: str | None = None, *, invented: bool = False
) -> Row:
    """Read the names of one file, and its shapes as far as they tell the family."""
    tensors: dict[str, Tensor] = {key: torch.empty(shape or 0, device="meta") for key, shape in keys.items()}
    contents = Contents(tensors, label=name, names_only=True)
    try:
        adapter = parse(contents, family)
    except UnknownFormatError:
        adapter = Adapter({}, ignored=dict.fromkeys(keys, NO_SUFFIX))
    bare = [key for key, reason in adapter.ignored.items() if reason == NO_SUFFIX and keys[key] is None]
    alone = modules_alone(name, bare, adapter.family or family)
    adapter = replace(
        adapter,
        family=adapter.family or alone.family,
        format=adapter.format or alone.format,
        ignored={**adapter.ignored, **dict.fromkeys(alone.bound, MODULE_ALONE)},
    )
    known = adapter.family or ""
    others = tuple(other for other in likely_families(contents) if other != known)
    lost = {key: module.reason for module in adapter.unresolved for key in module.keys}
    lost |= {key: reason for key, reason in adapter.ignored.items() if reason == NO_SUFFIX}
    ignored = {key: reason for key, reason in adapter.ignored.items() if reason != NO_SUFFIX}
    bound = len(adapter.bound) + len(adapter.embeddings)
    return Row(name, known, others, adapter.format or "", len(keys), bound, ignored, lost, invented)


def modules_alone(name: str, keys: Sequence[str], family: str | None) -> Adapter:
    """Those of a listing's keys that are names of modules, as `bound`, which no suffix makes an adapter's."""
    ending = ".lora_A.weight"
    tensors = {f"{key}{ending}": torch.empty(0, device="meta") for key in keys}
    if not tensors:
        return Adapter({})
    found = parse(Contents(tensors, label=name, names_only=True), family)
    return replace(found, bound={key.removesuffix(ending): places for key, places in found.bound.items()})


def files_of(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        yield from sorted(p for p in path.rglob("*") if p.suffix in ENDINGS) if path.is_dir() else [path]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    if missing := [path for path in arguments if not Path(path).exists()]:
        print(f"no file or folder {', '.join(missing)}", file=sys.stderr)
        return 2
    table = Table(box=None, header_style="bold cyan", padding=(0, 2, 0, 0))
    for label in ("File", "Family", "Also fits", "Spelling"):
        table.add_column(label)
    for label in ("Keys", "Bound", "Ignored", "Unknown"):
        table.add_column(label, justify="right")
    files = list(files_of(map(Path, arguments)))
    rows = [surveyed(path.stem, listed(path), invented=is_invented(path)) for path in files]
    for row in rows:
        counts = (row.keys, row.bound, len(row.ignored), len(row.unknown))
        table.add_row(row.file, row.family or "?", ", ".join(row.also), row.spelling or "?", *map(str, counts))
    console = Console(width=None if sys.stdout.isatty() else 220)
    console.print(table)
    for row in rows:
        reasons = {reason: key for key, reason in reversed(row.unknown.items())}
        for reason, key in reversed(reasons.items()):
            console.print(f"{row.file}: unknown, as {key}: {reason}", soft_wrap=True, highlight=False)
    real = sum(len(row.unknown) for row in rows if not row.invented)
    apart = {row.file: len(row.unknown) for row in rows if row.invented and row.unknown}
    total = f"\n{len(rows)} files, {sum(row.keys for row in rows)} keys, {real} unknown"
    console.print(total + (" in real files" if apart else ""), highlight=False)
    if apart:
        named = ", ".join(f"{count} of {file}" for file, count in apart.items())
        console.print(f"unknown in listings that were made up: {named}", soft_wrap=True, highlight=False)
    return int(real > 0)


if __name__ == "__main__":
    sys.exit(main())
