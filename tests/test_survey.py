"""The survey of many files: every key of every real file is bound, or ignored for a named reason."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch
from shared_files import SHARED, needs_shared

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def survey(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return import_module("survey")


@needs_shared
@pytest.mark.parametrize("path", sorted(SHARED.glob("manifests/*.json")) + sorted(SHARED.glob("real/*.safetensors")))
def test_no_key_of_a_real_file_is_unknown(survey: ModuleType, path: Path) -> None:
    keys = survey.listed(path)
    row = survey.surveyed(path.stem, keys, invented=survey.is_invented(path))
    assert row.invented or not row.unknown
    assert row.bound + len(row.ignored) + len(row.unknown) == row.keys == len(keys)
    assert row.family
    assert row.spelling not in ("", "unknown")


def file_of(folder: Path, name: str, keys: list[str]) -> Path:
    path = folder / f"{name}.safetensors"
    safetensors.torch.save_file({key: torch.zeros(4, 4) for key in keys}, path)
    return path


def test_unknown_name_is_named_and_makes_the_survey_fail(
    survey: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair: Callable[[str], list[str]] = lambda stem: [f"{stem}.lora_{end}.weight" for end in ("down", "up")]  # noqa: E731
    known = pair("lora_unet_double_blocks_0_img_mlp_0") + pair("lora_unet_double_blocks_0_img_mlp_2")
    file_of(tmp_path, "whole", known)
    assert survey.main([str(tmp_path)]) == 0
    file_of(tmp_path, "odd", known + pair("lora_unet_sidecar_7"))
    assert survey.main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "odd: unknown, as lora_unet_sidecar_7" in said
    assert "2 files, 10 keys, 2 unknown" in said


def test_modules_names_alone_are_ignored_for_that_in_a_listing_and_unknown_in_a_file(
    survey: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"lora_unet_double_blocks_{i}_img_mlp_0" for i in range(2)]
    (tmp_path / "list.json").write_text(json.dumps(keys))
    row = survey.surveyed("list", survey.listed(tmp_path / "list.json"))
    assert (row.family, row.spelling, row.ignored) == ("flux1", "kohya", dict.fromkeys(keys, survey.MODULE_ALONE))
    assert survey.main([str(tmp_path)]) == 0
    file_of(tmp_path, "file", keys)
    assert survey.main([str(tmp_path)]) == 1
    assert survey.main([str(tmp_path / "none")]) == 2
    assert "no file or folder" in capsys.readouterr().err


@pytest.mark.parametrize("provenance", ["handwritten-sample", "real-keys(mixed test list)", "synthetic-shapes"])
def test_what_is_unknown_in_a_listing_that_says_it_was_made_up_is_named_and_counted_apart(
    survey: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], provenance: str
) -> None:
    keys = [f"lora_unet_{name}.lora_down.weight" for name in ("time_in", "img_in", "txt_in", "vector_in_in_layer")]
    listing = {"provenance": provenance, "keys": dict.fromkeys(keys)}
    (tmp_path / "odd.json").write_text(json.dumps(listing))
    assert survey.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"odd: unknown, as {keys[0]}: a container without a weight of its own: it holds in_layer, out_layer" in said
    assert "1 files, 4 keys, 0 unknown in real files" in said
    assert "made up: 1 of odd" in said
    (tmp_path / "odd.json").write_text(json.dumps(listing | {"provenance": "real-complete-keys"}))
    assert survey.main([str(tmp_path)]) == 1
    assert "1 files, 4 keys, 1 unknown\n" in capsys.readouterr().out
