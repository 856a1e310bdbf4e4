"""The commands that make adapters, as a user meets them: what is printed, exit codes, and files left alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from lora_loaders.cli import app

Run = Callable[..., Result]
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TO_K = TO_Q.replace("to_q", "to_k")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")

    def invoke(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return invoke


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file({**lora(TO_Q, 8), **lora(TO_K, 8)}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def lora(name: str, rank: int) -> dict[str, Tensor]:
    down, up = torch.randn(rank, 320), torch.randn(320, rank)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}


def change_in(path: Path, name: str) -> Tensor:
    tensors = load_file(path)
    if f"{name}.diff" in tensors:
        return tensors[f"{name}.diff"]
    up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
    return up @ down * tensors[f"{name}.alpha"] / len(down)


def error_between(one: Path, other: Path, name: str) -> float:
    return float((change_in(other, name) - change_in(one, name)).norm() / change_in(one, name).norm())


# resize


def test_resize_prints_every_modules_error_and_that_of_all(run: Run, file: Path, tmp_path: Path) -> None:
    result = run("resize", file, tmp_path / "b.safetensors", "--rank", 2)
    assert result.exit_code == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    shown = {line[2]: (float(line[0]), int(line[1])) for line in lines[1:3]}
    assert {name.rsplit(".", 1)[1]: rank for name, (_, rank) in shown.items()} == {"to_q": 2, "to_k": 2}
    for name, (error, _) in shown.items():
        key = TO_Q if name.endswith("to_q") else TO_K
        assert error == pytest.approx(error_between(file, tmp_path / "b.safetensors", key), rel=0.05)
    assert "relative error of ΔW 0." in result.stdout.splitlines()[-1]


def test_resize_keeps_the_format_and_says_in_the_header_what_was_done(run: Run, file: Path, tmp_path: Path) -> None:
    assert run("resize", file, tmp_path / "b.safetensors", "--energy", 0.5).exit_code == 0
    with safe_open(tmp_path / "b.safetensors", "pt") as opened:
        assert f"{TO_Q}.lora_down.weight" in opened.keys()  # noqa: SIM118
        step = json.loads(opened.metadata()["lora_loaders.history"])[-1]
    assert (step["action"], step["energy"]) == ("resize", 0.5)


@pytest.mark.parametrize("goal", [(), ("--rank", 0), ("--energy", 2), ("--energy", 0.5, "--error", 0.5)])
def test_resize_refuses_a_goal_that_means_nothing(run: Run, file: Path, tmp_path: Path, goal: tuple[object]) -> None:
    assert run("resize", file, tmp_path / "b.safetensors", *goal).exit_code == 2
    assert not (tmp_path / "b.safetensors").exists()


def test_resize_refuses_to_overwrite_without_force(run: Run, file: Path) -> None:
    before = file.read_bytes()
    result = run("resize", file, file, "--rank", 2)
    assert (result.exit_code, file.read_bytes()) == (2, before)
    assert "--force" in result.stderr
    assert run("resize", file, file, "--rank", 2, "--force").exit_code == 0
    assert len(load_file(file)[f"{TO_Q}.lora_down.weight"]) == 2


# convert --as


def test_convert_as_full_and_back_as_lora_keeps_the_change(run: Run, file: Path, tmp_path: Path) -> None:
    full, back = tmp_path / "full.safetensors", tmp_path / "back.safetensors"
    done = run("convert", file, full, "--format", "kohya", "--as", "full")
    assert done.exit_code == 0, done.stderr
    assert error_between(file, full, TO_Q) < 1e-6
    done = run("convert", full, back, "--format", "kohya", "--as", "lora", "--rank", 8)
    assert done.exit_code == 0, done.stderr
    assert error_between(file, back, TO_Q) < 1e-5
    assert "relative error of ΔW" in done.stdout
    with safe_open(back, "pt") as opened:
        steps = json.loads(opened.metadata()["lora_loaders.history"])
    assert [step["action"] for step in steps] == ["to full", "to lora"]


def test_convert_as_lora_of_what_has_no_rank_asks_for_one(run: Run, file: Path, tmp_path: Path) -> None:
    full = tmp_path / "full.safetensors"
    run("convert", file, full, "--format", "kohya", "--as", "full")
    result = run("convert", full, tmp_path / "b.safetensors", "--format", "kohya", "--as", "lora")
    assert result.exit_code == 2
    assert "has no rank of its own" in result.stderr
    assert "--rank" in result.stderr
    assert not (tmp_path / "b.safetensors").exists()


def test_convert_as_lora_keeps_the_format_of_the_file(run: Run, file: Path, tmp_path: Path) -> None:
    diffusers, small = tmp_path / "diffusers.safetensors", tmp_path / "small.safetensors"
    assert run("convert", file, diffusers, "--format", "diffusers").exit_code == 0
    for source, suffix in ((file, ".lora_up.weight"), (diffusers, ".lora_B.weight")):
        done = run("convert", source, small, "--as", "lora", "--rank", 2, "--force")
        assert done.exit_code == 0, done.stderr
        ups = [tensor for key, tensor in load_file(small).items() if key.endswith(suffix)]
        assert [up.shape[1] for up in ups] == [2, 2]
    result = run("convert", file, small, "--force")
    assert result.exit_code == 2
    assert "--format" in result.stderr


def test_what_no_lora_can_say_is_not_answered_with_the_advice_to_make_one(run: Run, file: Path, tmp_path: Path) -> None:
    norm = TO_Q.replace("attn1_to_q", "norm1")
    more = {f"{norm}.w_norm": torch.ones(320), f"{norm}.b_norm": torch.ones(320)}
    save_file({**load_file(file), **more}, tmp_path / "norm.safetensors")
    target = tmp_path / "b.safetensors"
    result = run("convert", tmp_path / "norm.safetensors", target, "--as", "lora", "--rank", 2, "--format", "peft")
    assert result.exit_code == 2
    assert "norm1: PEFT leaves out the change of a bias" in result.stderr
    assert "kohya" in result.stderr
    assert "--as lora" not in result.stderr
    assert not target.exists()


def test_a_rank_without_an_algebra_to_take_it_is_refused(run: Run, file: Path, tmp_path: Path) -> None:
    assert run("convert", file, tmp_path / "b.safetensors", "--format", "kohya", "--rank", 2).exit_code == 2


# merge


def test_merge_adds_with_weights_and_prints_the_errors(run: Run, file: Path, tmp_path: Path) -> None:
    other, target = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    save_file(lora(TO_Q, 4), other)
    result = run("merge", file, other, "-o", target, "--weight", 0.5, "--weight", 2)
    assert result.exit_code == 0, result.stderr
    wanted = 0.5 * change_in(file, TO_Q) + 2 * change_in(other, TO_Q)
    torch.testing.assert_close(change_in(target, TO_Q), wanted, rtol=1e-4, atol=1e-4)
    assert "relative error of ΔW" in result.stdout
    assert run("merge", file, other, "-o", target).exit_code == 2  # it is there already


def test_merge_refuses_a_method_that_is_not_there(run: Run, file: Path, tmp_path: Path) -> None:
    result = run("merge", file, "-o", tmp_path / "c.safetensors", "--method", "sum")
    assert result.exit_code == 2
    assert "dare_ties" in result.stderr


# extract


def test_extract_finds_what_was_added(run: Run, tmp_path: Path) -> None:
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    torch.manual_seed(0)
    base, change = torch.randn(320, 768), torch.randn(320, 2) @ torch.randn(2, 768)
    for path, weight in (("base", base), ("tuned", base + change)):
        save_file({name: weight}, tmp_path / f"{path}.safetensors")
    target = tmp_path / "out.safetensors"
    sides = (tmp_path / "tuned.safetensors", tmp_path / "base.safetensors")
    assert run("extract", *sides, target).exit_code == 2  # a rank is wanted
    result = run("extract", *sides, target, "--error", 0.01)
    assert result.exit_code == 0, result.stderr
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    made = change_in(target, key)
    torch.testing.assert_close(made.float(), change, rtol=1e-2, atol=1e-2)
    assert len(load_file(target)[f"{key}.lora_down.weight"]) == 2
    result = run("extract", *sides, tmp_path / "full.safetensors", "--as", "full", "--rank", 2)
    assert result.exit_code == 2
    assert "a full difference loses nothing" in result.stderr


# verify


def test_verify_passes_a_sound_file(run: Run, file: Path) -> None:
    result = run("verify", file)
    assert result.exit_code == 0, result.stdout
    assert "2 lora; rank 8; pairs complete" in result.stdout
    found = json.loads(run("verify", file, "--json").stdout)
    assert found["passed"]
    assert [check["name"] for check in found["checks"]] == ["whole", "numbers", "modules", "names", "header"]


def failing(run: Run, path: Path) -> dict[str, dict[str, object]]:
    result = run("verify", path, "--json")
    assert result.exit_code == 1
    assert run("verify", path).exit_code == 1
    return {check["name"]: check for check in json.loads(result.stdout)["checks"] if check["passed"] is False}


def test_verify_names_every_number_that_is_not_finite(run: Run, file: Path) -> None:
    tensors = load_file(file)
    tensors[f"{TO_Q}.lora_up.weight"][3, :2] = float("nan")
    save_file(tensors, file)
    assert failing(run, file)["numbers"]["problems"] == [f"{TO_Q}.lora_up.weight: 2 of 2,560 are not finite"]


def test_verify_finds_a_file_cut_short_half_a_pair_and_a_name_that_is_not_known(run: Run, file: Path) -> None:
    tensors = load_file(file)
    half = {key: tensor for key, tensor in tensors.items() if key != f"{TO_Q}.lora_up.weight"}
    save_file(half, file)
    assert "up missing" in str(failing(run, file)["modules"]["problems"])
    save_file({**tensors, "lora_unet_never_seen.lora_down.weight": torch.zeros(2, 4)}, file)
    assert "never_seen" in str(failing(run, file)["modules"]["problems"])
    save_file({**tensors, **lora("lora_unet_never_seen", 2)}, file)
    assert "never_seen" in str(failing(run, file)["names"]["problems"])
    file.write_bytes(file.read_bytes()[:-10])
    assert "the header promises" in str(failing(run, file)["whole"]["found"])


def test_verify_finds_a_header_that_is_not_true(run: Run, file: Path) -> None:
    save_file(load_file(file), file, {"ss_network_dim": "64", "sshs_model_hash": "0" * 64})
    problems = failing(run, file)["header"]["problems"]
    assert isinstance(problems, list)
    assert problems[0] == "ss_network_dim is 64, the ranks are 8"
    assert problems[1].startswith("sshs_model_hash")
