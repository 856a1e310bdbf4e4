"""The survey of many files: every key of every real file is bound, or ignored for a named reason."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch
from filled_manifests import MODULE_LISTS
from shared_files import SHARED, needs_shared

ROOT = Path(__file__).resolve().parent.parent
# What other projects made up for their unit tests: three modules that no model has, a key whose ending was cut off.
INVENTED = {"lorainspector_js_flux_kohya": 9, "lorainspector_js_peft_flux": 1}


@pytest.fixture
def survey(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return import_module("survey")


@needs_shared
@pytest.mark.parametrize("path", sorted(SHARED.glob("manifests/*.json")) + sorted(SHARED.glob("real/*.safetensors")))
def test_no_key_of_a_real_file_is_unknown(survey: ModuleType, path: Path) -> None:
    keys = survey.listed(path)
    if path.stem in MODULE_LISTS:
        keys = {f"{key}.lora_{end}.weight": shape for key, shape in keys.items() for end in ("down", "up")}
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
