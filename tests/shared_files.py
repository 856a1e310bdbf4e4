"""Material that lies beside the repository and not in it: manifests of published files, real files, architectures.

Tests that need it are skipped, with the reason, where only the repository is at hand.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"{SHARED} is absent: manifests and real files lie beside the repository, not in it"
)


def shared_file(*parts: str) -> Path:
    """A path below `shared/`; skips the test where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent: it lies beside the repository, not in it")
    return path


@dataclass(frozen=True)
class Manifest:
    """The key listing of one published file; shapes are None where the source did not give them."""

    name: str
    family: str
    format: str
    provenance: str
    shapes: dict[str, tuple[int, ...] | None]
    dtypes: dict[str, str | None]

    @property
    def has_shapes(self) -> bool:
        return None not in self.shapes.values()


@cache
def manifests(*families: str) -> tuple[Manifest, ...]:
    """Manifests of these families, in the order of their names; none where `shared/` is absent."""
    found: list[Manifest] = []
    for path in sorted((SHARED / "manifests").glob("*.json")):
        listing = json.loads(path.read_text("utf-8"))
        # A Control file is for the same modules, of which one is wider.
        family = listing["family"].removesuffix("-control")
        if family in families:
            keys: dict[str, Any] = listing["keys"]
            shapes = {key: None if v["shape"] is None else tuple(v["shape"]) for key, v in keys.items()}
            dtypes = {key: v["dtype"] for key, v in keys.items()}
            found.append(Manifest(listing["name"], family, listing["format"], listing["provenance"], shapes, dtypes))
    return tuple(found)


@cache
def architectures() -> dict[str, dict[str, Any]]:
    """Class and configuration of each published denoiser, by family and size."""
    return json.loads(shared_file("reference", "architectures.json").read_text("utf-8"))
