"""A file on the Hub is inspected and planned from its header; its weights are never asked for."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
from huggingface_hub import HfApi
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo
from spelled_files import flux_kohya
from test_cli import FLUX_CONFIG, Run, facts, plain_terminal, run, write_config  # noqa: F401  # fixtures

from lora_loaders.files import NAMES

TENSORS = flux_kohya().tensors


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Hub with one repository, that gives headers and refuses to give files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def parse(self: HfApi, repo: str, name: str, **_: Any) -> SafetensorsFileMetadata:
        assert (repo, name) == ("someone/style", "style.safetensors")
        entries = {key: TensorInfo(NAMES[t.dtype], list(t.shape), (0, t.nbytes)) for key, t in TENSORS.items()}  # type: ignore[arg-type]
        return SafetensorsFileMetadata({"modelspec.title": "a style"}, entries)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a file was asked for")

    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, repo, **_: ["README.md", "style.safetensors"])
    monkeypatch.setattr(HfApi, "parse_safetensors_file_metadata", parse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)


@pytest.mark.usefixtures("hub")
def test_inspect_of_a_hub_id_says_what_the_file_itself_says_but_for_alphas(run: Run, tmp_path: Path) -> None:  # noqa: F811
    safetensors.torch.save_file(TENSORS, tmp_path / "style.safetensors", metadata={"modelspec.title": "a style"})
    local, remote = (
        facts(run, "inspect", name, "--family", "flux1") for name in (tmp_path / "style.safetensors", "someone/style")
    )
    assert remote["path"] == "someone/style/style.safetensors"
    for name in ("format", "family", "modules", "tensors", "parameters", "dtypes", "metadata", "ignored"):
        assert remote[name] == local[name], name
    for here, there in zip(local["groups"], remote["groups"], strict=True):
        assert there["ranks"] == here["ranks"]
        assert there["alphas"] == there["scalings"] == {"not read": here["modules"]}


@pytest.mark.usefixtures("hub")
def test_plan_of_a_hub_id_accounts_for_every_key(run: Run, tmp_path: Path) -> None:  # noqa: F811
    model = write_config(tmp_path / "flux", {**FLUX_CONFIG, "num_layers": 19, "num_single_layers": 38})
    found = json.loads(run("plan", "someone/style", "--model", model, "--json").stdout)
    assert set(found["keys"]) == {key for key in TENSORS if key.startswith("lora_unet")}


@pytest.mark.usefixtures("hub")
def test_hub_that_cannot_be_reached_is_a_clean_message(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(HfApi, "list_repo_files", unreachable)
    result = run("inspect", "someone/style")
    assert result.exit_code == 2
    assert "cannot read the header" in result.stderr
    assert "no route to host" in result.stderr
