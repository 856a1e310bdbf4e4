"""What the header of a made file says of its making: what was done, with which files, at what loss."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HISTORY_KEY = "lora_loaders.history"
BLOCK = 1 << 22
# Statements about the tensors that were there before; writers state ranks and alphas anew.
STALE = frozenset(
    {
        *("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args"),
        *("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"),
    }
)


def with_history(
    metadata: Mapping[str, str], action: str, sources: Sequence[str], facts: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata with one more step in its history, and without what is no longer true.

    Args:
        metadata: of the source.
        action: what was done.
        sources: labels of what it was done to; those that are files are named with their SHA-256.
        facts: settings and errors.
    """
    from lora_loaders import __version__

    kept = {key: value for key, value in metadata.items() if key not in STALE}
    step = {
        "action": action,
        "by": f"lora_loaders {__version__}",
        "from": [_identity(source) for source in sources],
        **{name: value for name, value in facts.items() if value is not None},
    }
    return {**kept, HISTORY_KEY: json.dumps([*history(metadata), step])}


def history(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """The steps that a header tells of, oldest first; none where there is no history of ours."""
    try:
        steps = json.loads(metadata.get(HISTORY_KEY, "[]"))
    except ValueError:
        return []
    return steps if isinstance(steps, list) else []


def _identity(source: str) -> dict[str, str]:
    path = Path(source)
    return {"name": path.name, "sha256": sha256(path)} if path.is_file() else {"name": path.name or source}


def sha256(path: Path, start: int = 0) -> str:
    """SHA-256 of a file from this byte on, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
