"""Uploading a written adapter with a model card."""

from pathlib import Path

from lora_loaders.adapter import Adapter
from lora_loaders.errors import AdapterFileError

CARD = """---
library_name: diffusers
tags: [lora, diffusers{family_tag}]
---

# {name}

A LoRA-type adapter with {modules} changed modules{components}.

```python
pipe.load_lora_weights("{repo_id}", weight_name="{file}")
```
"""


def model_card(adapter: Adapter, repo_id: str, file: str) -> str:
    """The text of a README for an adapter's repository."""
    counts = ", ".join(f"{component} {count}" for component, count in adapter.components.items())
    return CARD.format(
        name=repo_id.rsplit("/", 1)[-1],
        repo_id=repo_id,
        file=file,
        modules=sum(adapter.components.values()),
        components=f" ({counts})" if counts else "",
        family_tag=f", {adapter.family}" if adapter.family else "",
    )


def upload(folder: Path, file: Path, adapter: Adapter, repo_id: str) -> None:
    """Create the repository if need be and upload the file with its card.

    Raises:
        AdapterFileError: the Hub refused or cannot be reached; the local file stays.
    """
    from huggingface_hub import create_repo, upload_folder
    from huggingface_hub.errors import HfHubHTTPError

    card = folder / "README.md"
    if not card.exists():
        card.write_text(model_card(adapter, repo_id, file.name), "utf-8")
    try:
        repo_id = create_repo(repo_id, exist_ok=True).repo_id
        upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=[file.name, card.name, "adapter_config.json"])
    except (HfHubHTTPError, OSError) as error:
        raise AdapterFileError(
            f"cannot upload to {repo_id}: {error}",
            mend="Check the name, the network and `hf auth login`.",
            state=f"The file is written: {file}.",
        ) from error
