"""What we write, read by ComfyUI's and sd-scripts' own loaders, where a checkout of theirs is at hand."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lora_loaders as ll

PARITY = Path(__file__).resolve().parent.parent / "scripts" / "parity"
# Environment variable with the checkout's path -> option of the script.
PEERS = {"COMFYUI": "--comfyui", "SD_SCRIPTS": "--sd-scripts"}


@pytest.mark.parity
@pytest.mark.parametrize("variable", PEERS)
def test_its_loader_reads_a_small_flux_as_we_wrote_it(variable: str, tmp_path: Path) -> None:
    if variable not in os.environ:
        pytest.skip(f"{variable} does not say where a checkout of that program is")
    table = tmp_path / "table.md"
    script = [sys.executable, str(PARITY / "peer_loaders.py"), PEERS[variable], os.environ[variable]]
    # In a process of its own: it puts stubs in the place of packages that the program imports and the loader needs not.
    done = subprocess.run([*script, "--only", "Flux.1", "--output", str(table)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line for line in table.read_text("utf-8").splitlines() if "| Flux.1 | kohya |" in line]
    assert len(rows) == 1
    assert "**FAILED**" not in rows[0]


def test_every_model_of_theirs_has_a_family_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PARITY))
    models = import_module("peer_models")
    families = {family.name for family in ll.FAMILIES}
    wanted = {model.family for model in models.COMFYUI} | {model.family for model, *_ in models.SD_SCRIPTS}
    assert len(wanted) > 20
    assert wanted <= families
