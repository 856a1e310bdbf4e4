"""The header of a file on the Hub: names, shapes and metadata, and none of its weights."""

import json
from pathlib import Path
from typing import Any

import torch

from .errors import UNTOUCHED, AdapterFileError
from .files import DTYPES, Contents
from .locating import CONFIG_NAME, DEFAULT_NAMES, HubOptions, choose


def read_remote_header(repo: str, hub: HubOptions) -> Contents:
    """A Hub file's keys and shapes as tensors on the meta device, its metadata, and PEFT's configuration.

    Raises:
        AdapterFileError: no such file, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi(token=hub.token)
    folder = f"{hub.subfolder}/" if hub.subfolder else ""
    try:
        name = hub.weight_name
        if name is None:
            files = [file.removeprefix(folder) for file in api.list_repo_files(repo, revision=hub.revision)]
            name = choose([file for file in files if "/" not in file], repo)
        header = api.parse_safetensors_file_metadata(repo, folder + name, revision=hub.revision)
        config = None
        if name == DEFAULT_NAMES[1]:
            options: dict[str, Any] = {"revision": hub.revision, "token": hub.token, "cache_dir": hub.cache_dir}
            path = hf_hub_download(repo, folder + CONFIG_NAME, **options)
            config = json.loads(Path(path).read_text("utf-8"))
        tensors = {
            key: torch.empty(tuple(entry.shape), dtype=DTYPES[entry.dtype], device="meta")
            for key, entry in header.tensors.items()
        }
    except AdapterFileError:
        raise
    except Exception as error:  # the Hub client's own and its network library's, which changes between versions
        raise AdapterFileError(
            f"cannot read the header of {hub.weight_name or 'an adapter'} in the Hub repository {repo}",
            problems=[f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"],
            mend="Check the name, the network and the token, or give a local path.",
            state=UNTOUCHED,
        ) from error
    return Contents(tensors, header.metadata, config, f"{repo}/{folder}{name}")
