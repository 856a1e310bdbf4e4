"""The demonstration runs from a bare folder, passes its own checks, and its fixtures are what their script makes."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="the demo builds a FluxPipeline")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of scripts/."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return import_module


def test_demo_passes_its_checks_and_writes_picture_and_report(
    script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("demo").main(["--out", str(tmp_path / "new")]) == 0
    report = (tmp_path / "new" / "report.txt").read_text("utf-8")
    assert "FAILED" not in report
    assert "unfuse_lora() leaves 0 of" in report
    assert report.strip() in capsys.readouterr().out
    with Image.open(tmp_path / "new" / "demo.png") as picture:
        assert min(picture.size) > 600


def test_demo_fails_when_a_check_fails(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = script("demo")
    seen = demo.Demo(None)
    seen.check(False, "a promise")
    monkeypatch.setattr(demo, "demonstrate", lambda folder: seen)
    monkeypatch.setattr(demo, "paint_grid", lambda *_: None)
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert "FAILED  a promise" in (tmp_path / "report.txt").read_text("utf-8")


def test_fixtures_are_what_their_script_makes(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    for made in script("make_fixtures").main(tmp_path):
        kept = ROOT / "fixtures" / made.name
        assert kept.stat().st_size < 200_000
        new, old = load_file(made), load_file(kept)
        assert new.keys() == old.keys()
        # Random normals may be rounded otherwise on another kind of processor; the files are in half precision.
        assert all(torch.allclose(new[key].float(), old[key].float(), atol=2e-3) for key in new)
        with safe_open(made, "pt") as one, safe_open(kept, "pt") as other:
            assert one.metadata() == other.metadata()
