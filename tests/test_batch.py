"""A folder converted: every file has its outcome, finished ones are recognised, and none is ever there by half."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from random_files import same_tensors
from spelled_files import SPELLINGS, flux_kohya
from test_cli import Run, plain_terminal, run  # noqa: F401  # fixtures

import lora_loaders as ll
from lora_loaders.batch import REPORT_NAME, Outcome, digest
from lora_loaders.conversion import parse
from lora_loaders.converting import convert
from lora_loaders.errors import AdapterFileError

NAMES = ("a.safetensors", "sub/b.safetensors", "sub/deeper/c.safetensors")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three good files in folders, and things that are none."""
    folder = tmp_path / "in"
    for name in NAMES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(flux_kohya().tensors, path, metadata={"modelspec.title": name})
    (folder / "notes.txt").write_text("no adapter")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "hidden.safetensors").write_bytes(b"no adapter")
    return folder


def go(source: Path, **options: Any) -> dict[str, Outcome]:
    target = options.pop("target", source.with_name("out"))
    options = {"format": "original", "family": "flux1", "jobs": 2, **options}
    return {outcome.source: outcome for outcome in ll.convert_folder(source, target, **options)}


def statuses(outcomes: dict[str, Outcome]) -> dict[str, str]:
    return {name: outcome.status for name, outcome in outcomes.items()}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_file_is_converted_as_by_itself_under_its_own_name(source: Path, tmp_path: Path) -> None:
    assert statuses(go(source)) == dict.fromkeys(NAMES, "converted")
    assert set(content(tmp_path / "out")) == {*NAMES, REPORT_NAME}
    for name in NAMES:
        alone = convert(source / name, tmp_path / "alone.safetensors", format="original", family="flux1")
        assert alone.read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_one_bad_file_stops_no_other(source: Path) -> None:
    (source / "bad.safetensors").write_bytes(b"\xff" * 64)
    (source / "empty.safetensors").touch()
    safetensors.torch.save_file({"decoder.kernel": torch.zeros(2)}, source / "vae.safetensors")
    outcomes = go(source)
    assert statuses(outcomes) == {
        **dict.fromkeys(NAMES, "converted"),
        **dict.fromkeys(("bad.safetensors", "empty.safetensors", "vae.safetensors"), "failed"),
    }
    assert str(outcomes["empty.safetensors"].error).startswith("MalformedAdapterError: ")
    assert str(outcomes["vae.safetensors"].error).startswith("UnknownFormatError: ")
    assert set(content(source.with_name("out"))) == {*NAMES, REPORT_NAME}


def test_a_link_to_nothing_is_a_failed_file(source: Path) -> None:
    (source / "gone.safetensors").symlink_to(source / "nowhere.safetensors")
    (source / "round.safetensors").symlink_to(source / "round.safetensors")
    outcomes = go(source)
    failed = {name for name, outcome in outcomes.items() if outcome.status == "failed"}
    assert failed == {"gone.safetensors", "round.safetensors"}
    assert "gone.safetensors" in str(outcomes["gone.safetensors"].error)
    assert len(outcomes) == len(NAMES) + 2


def test_report_holds_a_line_for_every_file(source: Path) -> None:
    (source / "bad.safetensors").write_bytes(b"\xff" * 64)
    outcomes = go(source)
    lines = [json.loads(line) for line in (source.with_name("out") / REPORT_NAME).read_text().splitlines()]
    assert [line["source"] for line in lines] == sorted([*NAMES, "bad.safetensors"])
    first = lines[0]
    assert first["target_sha256"] == digest(source.with_name("out") / "a.safetensors")
    assert first["source_sha256"] == digest(source / "a.safetensors")
    assert first["settings"] == {"format": "original", "family": "flux1", "dtype": None, "version": ll.__version__}
    assert first["read_as"] == "kohya, flux1"
    assert lines[1]["error"] == outcomes["bad.safetensors"].error


def test_second_run_writes_nothing(source: Path) -> None:
    go(source)
    out = source.with_name("out")
    before = {name: (out / name).stat().st_ino for name in NAMES}
    assert statuses(go(source)) == dict.fromkeys(NAMES, "unchanged")
    assert statuses(go(source, overwrite=True)) == dict.fromkeys(NAMES, "unchanged")
    assert {name: (out / name).stat().st_ino for name in NAMES} == before


def change_source(source: Path, out: Path) -> dict[str, Any]:
    tensors = {key: tensor + 1 for key, tensor in flux_kohya().tensors.items()}
    safetensors.torch.save_file(tensors, source / "a.safetensors")
    return {}


def change_target(source: Path, out: Path) -> dict[str, Any]:
    with (out / "a.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    return {}


def change_settings(source: Path, out: Path) -> dict[str, Any]:
    return {"dtype": torch.bfloat16}


@pytest.mark.parametrize("change", [change_source, change_target, change_settings])
def test_what_has_changed_is_not_taken_for_finished_and_not_overwritten_without_leave(
    source: Path, change: Callable[[Path, Path], dict[str, Any]]
) -> None:
    go(source)
    out = source.with_name("out")
    options = change(source, out)
    before = content(out)
    refused = go(source, **options)["a.safetensors"]
    assert refused.status == "failed"
    assert "is there already" in str(refused.error)
    assert (out / "a.safetensors").read_bytes() == before["a.safetensors"]
    assert go(source, overwrite=True, **options)["a.safetensors"].status == "converted"
    assert go(source, **options)["a.safetensors"].status == "unchanged"


def test_target_that_vanished_is_made_again(source: Path) -> None:
    go(source)
    (source.with_name("out") / "a.safetensors").unlink()
    assert statuses(go(source)) == {**dict.fromkeys(NAMES, "unchanged"), "a.safetensors": "converted"}


def test_foreign_file_is_not_overwritten(source: Path) -> None:
    out = source.with_name("out")
    out.mkdir()
    (out / "a.safetensors").write_bytes(b"precious")
    assert statuses(go(source)) == {**dict.fromkeys(NAMES, "converted"), "a.safetensors": "failed"}
    assert (out / "a.safetensors").read_bytes() == b"precious"


def test_interrupted_run_leaves_whole_files_and_is_continued(source: Path) -> None:
    seen: list[Outcome] = []

    def interrupt(total: int, outcome: Outcome | None) -> None:
        if outcome is not None:
            seen.append(outcome)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(source, jobs=1, progress=interrupt)
    out = source.with_name("out")
    left = content(out)
    assert not [name for name in left if name.endswith(".part")]
    for name in set(left) - {REPORT_NAME}:
        assert same_tensors(
            safetensors.torch.load_file(out / name), safetensors.torch.load_file(alone(source / name, out.parent))
        )
    assert {outcome.source for outcome in seen} == set(left) - {REPORT_NAME}
    again = go(source)
    assert {name for name, outcome in again.items() if outcome.status == "unchanged"} == set(left) - {REPORT_NAME}
    assert set(content(out)) == {*NAMES, REPORT_NAME}


def alone(path: Path, folder: Path) -> Path:
    return convert(path, folder / "alone.safetensors", format="original", family="flux1")


def test_killed_run_is_continued_from_the_lines_that_are_whole(source: Path) -> None:
    go(source)
    report = source.with_name("out") / REPORT_NAME
    report.write_bytes(report.read_bytes()[:-20])  # as by a power cut while the last line was written
    before = content(source.with_name("out"))
    assert statuses(go(source)) == dict.fromkeys(NAMES, "unchanged")
    assert {name: data for name, data in content(source.with_name("out")).items() if name != REPORT_NAME} == {
        name: data for name, data in before.items() if name != REPORT_NAME
    }


def test_another_version_looks_at_every_file_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(source)
    monkeypatch.setattr("lora_loaders.batch.__version__", "99")
    parsed: list[object] = []
    monkeypatch.setattr(
        "lora_loaders.batch.parse", lambda *words, **more: parsed.append(words) or parse(*words, **more)
    )
    assert statuses(go(source)) == dict.fromkeys(NAMES, "unchanged")
    assert len(parsed) == len(NAMES)


def test_file_that_is_no_report_is_refused_and_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("dear diary\n")
    with pytest.raises(AdapterFileError, match="no line of a report"):
        go(source, report=tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == "dear diary\n"


def test_peft_folders_keep_their_configurations(tmp_path: Path) -> None:
    file = SPELLINGS["flux peft folder"]()
    config = file.config or {}
    folder = tmp_path / "in" / "style"
    folder.mkdir(parents=True)
    safetensors.torch.save_file(file.tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert [o.status for o in go(tmp_path / "in", format="peft").values()] == ["converted"]
    written = json.loads((tmp_path / "out" / "style" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (4, 8)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    assert [o.status for o in go(tmp_path / "in", format="peft").values()] == ["failed"]  # no longer the same source


def test_pickles_are_converted_with_leave_and_lose_against_a_file_of_the_same_name(source: Path) -> None:
    torch.save(flux_kohya().tensors, source / "p.bin")
    torch.save(flux_kohya().tensors, source / "a.bin")
    skipped = go(source, target=source.with_name("first"))
    assert statuses(skipped) == {**dict.fromkeys(NAMES, "converted"), "p.bin": "skipped", "a.bin": "skipped"}
    assert "a pickle" in str(skipped["p.bin"].error)
    outcomes = go(source, use_safetensors=False)
    assert statuses(outcomes) == {**dict.fromkeys((*NAMES, "p.bin"), "converted"), "a.bin": "failed"}
    assert "goes to the same name" in str(outcomes["a.bin"].error)


def test_of_files_that_go_to_one_name_none_is_lost(source: Path) -> None:
    for seed, ending in enumerate(("pt", "bin", "ckpt")):
        torch.save({key: tensor + seed for key, tensor in flux_kohya().tensors.items()}, source / f"p.{ending}")
    for _ in range(2):
        outcomes = go(source, use_safetensors=False, overwrite=True, jobs=4)
        failed = {name: o for name, o in outcomes.items() if o.status == "failed"}
        assert set(failed) == {"p.pt", "p.bin", "p.ckpt"}
        assert all("p.safetensors" in str(o.error) and "Rename" in str(o.error) for o in failed.values())
    assert not (source.with_name("out") / "p.safetensors").exists()


def test_endings_in_capitals_are_endings(source: Path) -> None:
    (source / "a.safetensors").rename(source / "A.SAFETENSORS")
    torch.save(flux_kohya().tensors, source / "p.PT")
    outcomes = go(source)
    assert (outcomes["A.SAFETENSORS"].status, outcomes["p.PT"].status) == ("converted", "skipped")
    assert outcomes["A.SAFETENSORS"].target == "A.safetensors"


def test_target_below_the_source_is_left_alone(source: Path) -> None:
    out = source / "converted"
    assert statuses(go(source, target=out)) == dict.fromkeys(NAMES, "converted")
    assert statuses(go(source, target=out)) == dict.fromkeys(NAMES, "unchanged")


@pytest.mark.parametrize("which", ["absent", "empty", "itself"])
def test_folder_that_cannot_be_converted_is_refused(source: Path, tmp_path: Path, which: str) -> None:
    (tmp_path / "empty").mkdir()
    folder, target = (source, source) if which == "itself" else (tmp_path / which, tmp_path / "out")
    with pytest.raises(AdapterFileError):
        go(folder, target=target)
    assert not (target / REPORT_NAME).exists()


# The command.


def test_command_converts_a_folder_and_continues_it(run: Run, source: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    words = ("convert", source, out, "--format", "original", "--family", "flux1", "--jobs", "2")
    first = run(*words)
    assert (first.exit_code, first.stdout) == (0, f"{out}: 3 converted ({out / REPORT_NAME})\n"), first.stderr
    assert "3/3" in first.stderr
    (source / "bad.safetensors").write_bytes(b"\xff" * 64)
    second = run(*words)
    assert (second.exit_code, second.stdout) == (1, f"{out}: 3 unchanged, 1 failed ({out / REPORT_NAME})\n")
    assert "Failed\n  bad.safetensors: MalformedAdapterError: " in second.stderr


def test_command_ends_by_ctrl_c_with_its_code_and_a_summary(
    run: Run,  # noqa: F811
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_loaders.cli.batch.convert_folder", interrupted)
    result = run("convert", source, tmp_path / "out", "--format", "original")
    assert result.exit_code == 130
    assert "interrupted, the same command continues" in result.stdout
