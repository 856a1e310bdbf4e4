"""The comparison with diffusers' own tests overlooks nothing that passes with peft."""

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "parity" / "diffusers_tests"
FLUX = "tests/lora/test_lora_layers_flux.py"


@pytest.fixture(scope="module")
def script() -> Any:
    loader = SourceFileLoader("diffusers_tests", str(SCRIPT))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("outcome", ["failed", "skipped", None])
def test_what_passes_with_peft_and_does_not_pass_here_is_found(script: Any, outcome: str | None) -> None:
    ours = {FLUX: {"T::test_a": "passed"} | ({"T::test_b": outcome} if outcome else {})}
    theirs = {FLUX: {"T::test_a": "passed", "T::test_b": "passed", "T::test_c": "skipped", "T::test_d": "failed"}}
    _, unexplained = script.compare(ours, theirs, [])
    assert unexplained == [f"{FLUX}::T::test_b: {outcome or 'missing'}"]


def test_what_neither_side_tries_is_counted_by_the_first_word_in_its_name(script: Any) -> None:
    skipped = ["hotswap_compiled", "compile", "group_offloading", "cpu_offload", "bnb_Quantization", "scale", "more"]
    theirs = {FLUX: {f"T::test_{name}": "skipped" for name in skipped} | {"T::test_b": "failed", "T::test_c": "failed"}}
    ours = {FLUX: theirs[FLUX] | {"T::test_more": "passed", "T::test_c": "passed"}}
    text = " ".join(script.untried(ours, theirs))
    assert "6 tests are skipped" in text
    assert "hotswap 1, compile 1, group 1, offload 1, quant 1, others 1" in text
    assert "**1 tests fail on both sides**" in text
    assert f"`{FLUX}`, 1: nobody knows why" in text


def test_every_test_that_fails_with_peft_has_its_reason(script: Any) -> None:
    failing = {file for file, tests in script.read_baseline().items() if "failed" in tests.values()}
    assert failing == dict(script.FAILING).keys()


def test_a_file_that_was_not_collected_is_found(script: Any) -> None:
    _, unexplained = script.compare({}, {FLUX: {"T::test_a": "passed"}}, [])
    assert unexplained == [f"{FLUX}::T::test_a: missing"]


def test_of_a_file_of_which_one_test_was_asked_for_no_other_is_missed(script: Any) -> None:
    theirs = {FLUX: {"T::test_a": "passed", "T::test_b": "passed"}}
    assert script.compare({FLUX: {"T::test_a": "passed"}}, theirs, [FLUX])[1] == []


def test_a_listed_test_is_excused_in_its_files_alone(script: Any) -> None:
    name = "T::test_normal_lora_with_expanded_lora_raises_error"
    other = FLUX.replace("flux", "wan")
    _, unexplained = script.compare({}, {FLUX: {name: "passed"}, other: {name: "passed"}}, [])
    assert unexplained == [f"{other}::{name}: missing"]


def test_model_files_that_are_named_run_with_the_selection_of_the_baseline(script: Any) -> None:
    given = ["tests/models/transformers/test_models_transformer_flux.py", FLUX]
    lora, models = script.selections(given)
    assert lora == [FLUX]
    assert models == [given[0], *script.SELECT["models"][1:]]


@pytest.mark.parametrize("line", [["-p", "x", "tests", FLUX], ["tests", "-p", "x", FLUX], ["tests", FLUX, "-p", "x"]])
def test_options_and_files_come_in_any_order(script: Any, line: list[str]) -> None:
    given = script.parse(line)
    assert (given.suite, given.files, given.plugins) == (Path("tests"), [FLUX], ["x"])


def test_every_row_of_the_list_and_the_baseline_can_be_read(script: Any) -> None:
    listed = script.read_expected()
    assert len(listed) == script.HERE.joinpath("expected.md").read_text("utf-8").count("\n| `")
    baseline = script.read_baseline()
    for name, pattern in listed:
        tests = {test for file in baseline for test in baseline[file] if script.is_expected(file, test, listed)}
        assert any(name in test for test in tests), (name, pattern)
