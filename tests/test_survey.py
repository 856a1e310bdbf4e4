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
# What another project made up for its unit tests: three modules that no model has.
INVENTED = {"lorainspector_js_flux_kohya": 9}


@pytest.fixture
def survey(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return import_module("survey")


@needs_shared
@pytest.mark.parametrize("path", sorted(SHARED.glob("manifests/*.json")) + sorted(SHARED.glob("real/*.safetensors")))
def test_no_key_of_a_real_file_is_unknown(survey: ModuleType, path: Path) -> None:
    keys = survey.listed(path)
    row = survey.surveyed(path.stem, keys)
    assert len(row.unknown) == INVENTED.get(path.stem, 0), row.unknown[:5]
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
