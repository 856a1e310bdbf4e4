"""Which file is meant: a path, the one adapter in a folder, or a file of a Hub repository."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UNTOUCHED, AdapterFileError, UnsafeFileError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CONFIG_NAME = "adapter_config.json"
DEFAULT_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
NOT_ADAPTERS = ("scheduler", "optimizer", "checkpoint")


@dataclass(frozen=True)
class HubOptions:
    """Where on the Hub a file lies and how to reach it, with diffusers' names."""

    weight_name: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool | None = None
    force_download: bool = False
    proxies: Mapping[str, str] | None = None


def locate(source: str | os.PathLike[str], hub: HubOptions, *, allow_pickle: bool = False) -> Path:
    """Path of the one file that `source` means, downloaded if it is a Hub id."""
    try:
        path = Path(source)
    except TypeError as error:
        wanted = "an adapter is read from a path, a Hub id or a dictionary"
        raise AdapterFileError(f"{wanted}, not from {source!r}", state=UNTOUCHED) from error
    folder = path / (hub.subfolder or "")
    if path.is_file():
        return path
    if path.is_dir():
        if hub.weight_name is not None:
            return _existing(folder / hub.weight_name)
        names = [file.name for file in sorted(folder.glob("*")) if file.is_file()]
        return folder / choose(names, str(folder), allow_pickle=allow_pickle)
    if _is_hub_id(str(source)):
        return _download(str(source), hub, allow_pickle=allow_pickle)
    return _existing(path)


def _existing(path: Path) -> Path:
    if not path.is_file():
        near = sorted(file.name for file in path.parent.glob("*.safetensors")) if path.parent.is_dir() else []
        raise AdapterFileError(
            f"no file {path}",
            problems=[f"in that folder: {name}" for name in near],
            mend="Give the path of a file or folder, or a Hub id of the form owner/name.",
            state=UNTOUCHED,
        )
    return path


def is_remote(source: str | os.PathLike[str], hub: HubOptions) -> bool:
    """Whether a Hub file is meant that would have to be downloaded."""
    if Path(source).exists() or not _is_hub_id(str(source)):
        return False
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import is_offline_mode

    if hub.local_files_only or is_offline_mode():
        return False
    start = f"{hub.subfolder}/" if hub.subfolder else ""
    names = DEFAULT_NAMES if hub.weight_name is None else (hub.weight_name,)
    hits = [try_to_load_from_cache(str(source), start + name, hub.cache_dir, hub.revision) for name in names]
    return not any(isinstance(hit, str) for hit in hits)


def _is_hub_id(source: str) -> bool:
    parts = source.split("/")
    return (
        len(parts) == 2 and all(parts) and not source.startswith((".", "~")) and Path(source).suffix != ".safetensors"
    )


def choose(names: list[str], where: str, *, allow_pickle: bool = False) -> str:
    """The one adapter file among a folder's names.

    Raises:
        AdapterFileError: none, or several without one of the usual names.
    """
    endings = (".safetensors", *PICKLES) if allow_pickle else (".safetensors",)
    found = [n for n in names if n.endswith(endings) and not any(word in n for word in NOT_ADAPTERS)]
    for name in DEFAULT_NAMES:
        if name in found:
            return name
    if len(found) == 1:
        return found[0]
    pickles = [name for name in names if name.endswith(PICKLES)]
    if not found and pickles and not allow_pickle:
        raise UnsafeFileError(
            f"{where} holds only pickles, which can run code when they are read",
            problems=pickles,
            mend="If you trust them, pass use_safetensors=False (and weight_name=… to choose one).",
            state=UNTOUCHED,
        )
    raise AdapterFileError(
        f"{where} holds {len(found) or 'no'} adapter file{'' if len(found) == 1 else 's'}",
        problems=found,
        mend="Choose one with weight_name=….",
        state=UNTOUCHED,
    )


def _download(repo: str, hub: HubOptions, *, allow_pickle: bool) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    offline = bool(hub.local_files_only) or is_offline_mode()
    try:
        name = hub.weight_name
        if name is None and offline:
            in_folder = [f"{hub.subfolder}/{name}" if hub.subfolder else name for name in DEFAULT_NAMES]
            cached = [try_to_load_from_cache(repo, file, hub.cache_dir, hub.revision) for file in in_folder]
            name = next((n for n, hit in zip(DEFAULT_NAMES, cached, strict=True) if isinstance(hit, str)), None)
            if name is None:
                # The first sentence is diffusers' own, which people search for.
                raise AdapterFileError(
                    "When using the offline mode, you must specify a `weight_name`.",
                    problems=[f"{repo}: neither of {', '.join(DEFAULT_NAMES)} is in the local cache"],
                    mend="Pass weight_name=…, or go online once to fill the cache.",
                    state=UNTOUCHED,
                )
        if name is None:
            files = HfApi(token=hub.token).list_repo_files(repo, revision=hub.revision)
            start = f"{hub.subfolder}/" if hub.subfolder else ""
            here = [file.removeprefix(start) for file in files if file.startswith(start)]
            name = choose([file for file in here if "/" not in file], repo, allow_pickle=allow_pickle)
        options: dict[str, Any] = {
            "subfolder": hub.subfolder,
            "revision": hub.revision,
            "token": hub.token,
            "cache_dir": hub.cache_dir,
        }
        common: dict[str, Any] = {**options, "local_files_only": offline, "force_download": hub.force_download}
        path = Path(hf_hub_download(repo, name, **common))
        with contextlib.suppress(HfHubHTTPError, LocalEntryNotFoundError):  # most repositories have none
            if name == DEFAULT_NAMES[1]:
                hf_hub_download(repo, CONFIG_NAME, **common)
        return path
    except AdapterFileError:
        raise
    except Exception as error:  # the Hub client's own and its network library's, which changes between versions
        raise AdapterFileError(
            f"cannot get {hub.weight_name or 'an adapter'} from the Hub repository {repo}",
            problems=[f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"],
            mend="Check the name, the network and the token, or give a local path.",
            state=UNTOUCHED,
        ) from error
