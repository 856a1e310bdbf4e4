"""The command line, as a user meets it: what is printed where, exit codes, and files left alone."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared_files import shared_file
from torch import Tensor
from typer.testing import CliRunner, Result

import lora_loaders as ll
from lora_loaders.cli import app

RANK = 4
FLUX_CONFIG = {
    "_class_name": "FluxTransformer2DModel",
    "num_layers": 1,
    "num_single_layers": 1,
    "guidance_embeds": True,
}
CLIP_CONFIG = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "num_hidden_layers": 1,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
}
Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def run() -> Run:
    def invoke(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert "Traceback" not in result.stderr
        return result

    return invoke


def real_file(name: str) -> Path:
    return shared_file("real", name)


def kohya(name: str, rows: int, columns: int, alpha: float | None = 2.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(RANK, columns, generator=generator),
        f"{name}.lora_up.weight": torch.randn(rows, RANK, generator=generator),
    }
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(alpha)}


@pytest.fixture
def flux_file(tmp_path: Path) -> Path:
    tensors = {
        **kohya("lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072),
        **kohya("lora_unet_single_blocks_0_linear2", 3072, 15360, alpha=8.0),
        **kohya("lora_te1_text_model_encoder_layers_0_mlp_fc1", 3072, 768),
    }
    path = tmp_path / "flux.safetensors"
    save_file(tensors, path, metadata={"ss_output_name": "[bold]mine", "ss_tag_frequency": "tag, " * 500})
    return path


@pytest.fixture
def sd15_file(tmp_path: Path) -> Path:
    tensors = {
        **kohya("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 320, 768, alpha=None),
        **kohya("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, 768, alpha=None),
        "some.thing": torch.zeros(2),
    }
    path = tmp_path / "sd15.safetensors"
    save_file(tensors, path)
    return path


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def flux_model(tmp_path: Path) -> Path:
    return write_config(tmp_path / "flux", FLUX_CONFIG)


@pytest.fixture
def flux_pipeline(tmp_path: Path) -> Path:
    pytest.importorskip("transformers", reason="text encoders are transformers' models")
    folder = tmp_path / "pipeline"
    write_config(folder / "transformer", FLUX_CONFIG)
    write_config(folder / "text_encoder", CLIP_CONFIG)
    index = {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": [None, None],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def facts(run: Run, *arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    return json.loads(result.stdout)


# inspect


def test_inspect_shows_what_the_file_holds(run: Run, flux_file: Path) -> None:
    result = run("inspect", flux_file)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["Format", "kohya"] in lines
    assert any(line[:2] == ["Family", "flux1"] for line in lines)
    # A fused q/k/v is three modules.
    assert ["transformer", "lora", "4", "4", "2", "×3,", "8", "×1", "0.5", "×3,", "2", "×1"] in lines
    assert ["text_encoder", "lora", "1", "4", "2", "0.5"] in lines


def test_inspect_shortens_metadata_and_takes_it_literally(run: Run, flux_file: Path) -> None:
    printed = run("inspect", flux_file).stdout
    assert "ss_output_name    [bold]mine" in printed
    assert max(len(line) for line in printed.splitlines() if "tag," in line) <= 120
    assert facts(run, "inspect", flux_file)["metadata"]["ss_tag_frequency"] == "tag, " * 500


def test_inspect_json_counts_components_ranks_scalings_and_bytes(run: Run, flux_file: Path) -> None:
    found = facts(run, "inspect", flux_file)
    assert (found["format"], found["family"], found["modules"]) == ("kohya", "flux1", 5)
    transformer, encoder = found["groups"]
    assert (transformer["component"], transformer["modules"]) == ("transformer", 4)
    assert transformer["ranks"] == {"4": 4}
    assert transformer["scalings"] == {"0.5": 3, "2": 1}
    assert (encoder["component"], encoder["alphas"]) == ("text_encoder", {"2": 1})
    assert found["size"] == flux_file.stat().st_size
    assert found["dtypes"] == {"float32": 9}
    assert found["parameters"] == RANK * (9216 + 3072 + 3072 + 15360 + 3072 + 768)


def test_inspect_names_every_ignored_key_with_its_reason(run: Run, sd15_file: Path) -> None:
    assert facts(run, "inspect", sd15_file)["ignored"] == {"some.thing": "no known suffix"}
    assert "some.thing: no known suffix" in run("inspect", sd15_file).stdout


def test_inspect_names_the_families_that_fit_equally_well(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "tie.safetensors"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    save_file(kohya(name, 320, 320), path)
    found = facts(run, "inspect", path)
    assert {"sd15", "sd2"} <= {found["family"], *found["other_families"]}
    assert "names and shapes also fit" in run("inspect", path).stdout


def test_inspect_takes_the_named_family_at_its_word(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "tie.safetensors"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    save_file(kohya(name, 320, 320), path)
    assert facts(run, "inspect", path, "--family", "sd2")["family"] == "sd2"


def test_inspect_lists_modules_of_unknown_names(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "strange.safetensors"
    save_file(kohya("lora_unet_never_seen_block_7", 8, 8), path)
    found = facts(run, "inspect", path)
    assert found["family"] is None
    assert found["unresolved"] == {"never_seen_block_7": "no family knows the most of this file's names"}
    assert found["groups"][0]["known"] is False
    assert "unknown: no family has these names" in run("inspect", path).stdout


def test_inspect_finds_the_one_file_of_a_folder(run: Run, sd15_file: Path) -> None:
    assert facts(run, "inspect", sd15_file.parent)["path"] == str(sd15_file)


def test_inspect_reads_alpha_of_a_peft_folder_from_its_configuration(run: Run, tmp_path: Path) -> None:
    name = "base_model.model.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": torch.zeros(4, 3072), f"{name}.lora_B.weight": torch.zeros(3072, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 12}))
    found = facts(run, "inspect", tmp_path, "--family", "flux1")
    assert found["format"] == "peft"
    assert found["groups"][0]["scalings"] == {"3": 1}


def test_inspect_explains_the_real_file_of_rank_4(run: Run) -> None:
    found = facts(run, "inspect", real_file("analog_svd_rank4.safetensors"))
    assert (found["family"], found["format"], found["dtypes"]) == ("sd15", "indexed", {"float16": 384})
    assert {g["component"]: (g["modules"], g["ranks"]) for g in found["groups"]} == {
        "unet": (144, {"4": 144}),
        "text_encoder": (48, {"4": 48}),
    }
    assert not found["ignored"]
    assert not found["unresolved"]


def test_inspect_shows_learned_tokens_and_folds_numbered_metadata_of_the_real_file(run: Run) -> None:
    path = real_file("lora_disney.safetensors")
    assert facts(run, "inspect", path)["embeddings"] == {"<s1>": [768], "<s2>": [768]}
    printed = run("inspect", path).stdout
    assert "<s1> [768], <s2> [768]" in printed
    assert "unet:#:rank ×144" in printed
    assert len(printed.splitlines()) < 30


# plan


def test_plan_of_a_pipeline_checks_every_component(run: Run, flux_file: Path, flux_pipeline: Path) -> None:
    result = run("plan", flux_file, "--model", flux_pipeline)
    assert result.exit_code == 0, result.stdout
    assert "Everything fits: 5 modules." in result.stdout
    found = facts(run, "plan", flux_file, "--model", flux_pipeline)
    assert found["components"] == {"transformer": 4, "text_encoder": 1}
    assert found["unchecked"] == {}


def test_plan_without_a_model_says_of_each_key_where_its_name_leads(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    known, unknown = kohya("lora_unet_double_blocks_0_img_mlp_0", 12288, 3072), kohya("lora_unet_sidecar_7", 8, 8)
    more = kohya("lora_unet_double_blocks_0_img_mlp_2", 3072, 12288)
    save_file({**known, **more, **unknown, "_aux.scale": torch.ones(1)}, path)
    found = facts(run, "plan", path)
    assert (found["family"], found["unknown"]) == ("flux1", len(unknown))
    fates = {
        **dict.fromkeys(known, "transformer.transformer_blocks.0.ff.net.0.proj"),
        **dict.fromkeys(more, "transformer.transformer_blocks.0.ff.net.2"),
        **dict.fromkeys(unknown, "unknown: no such name in this family"),
        "_aux.scale": "ignored: helper data of a slider tool, no weight",
    }
    assert found["keys"] == fates
    shown = run("plan", path)
    assert shown.exit_code == 1
    assert all(f"{key}: {fate}" in shown.stdout for key, fate in fates.items())


def test_plan_of_one_model_says_what_it_did_not_check(run: Run, flux_file: Path, flux_model: Path) -> None:
    result = run("plan", flux_file, "--model", flux_model / "config.json")
    assert result.exit_code == 0, result.stdout
    assert "Not checked: no model was given for it\n  text_encoder: 1 module\n" in result.stdout


def test_plan_of_a_text_encoder_alone(run: Run, flux_file: Path, flux_pipeline: Path) -> None:
    found = facts(run, "plan", flux_file, "--model", flux_pipeline, "--component", "text_encoder")
    assert (found["fits"], found["components"]) == (True, {"text_encoder": 1})
    assert facts(run, "plan", flux_file, "--model", flux_pipeline / "text_encoder") == found


def test_plan_of_a_full_size_model_loads_no_weights(run: Run, flux_file: Path, tmp_path: Path) -> None:
    model = write_config(tmp_path / "full", {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True})
    assert facts(run, "plan", flux_file, "--model", model)["matched"] == [
        *(f"transformer.transformer_blocks.0.attn.to_{name}" for name in "qkv"),
        "transformer.single_transformer_blocks.0.proj_out",
    ]


def test_plan_exits_with_1_and_names_the_nearest_module_where_one_has_no_place(
    run: Run, flux_file: Path, flux_model: Path
) -> None:
    save_file({**load_file(flux_file), **kohya("lora_unet_double_blocks_7_img_attn_proj", 3072, 3072)}, flux_file)
    result = run("plan", flux_file, "--model", flux_model)
    assert result.exit_code == 1
    place = (
        "transformer.transformer_blocks.7.attn.to_out.0: no such module (nearest: transformer_blocks.0.attn.to_out.0)"
    )
    assert place in result.stdout
    assert "Does not fit: 1 of 5 modules." in result.stdout


def test_plan_exits_with_1_where_a_shape_is_wrong(run: Run, flux_file: Path, tmp_path: Path) -> None:
    model = write_config(tmp_path / "narrow", {**FLUX_CONFIG, "num_attention_heads": 2})
    result = run("plan", flux_file, "--model", model)
    assert result.exit_code == 1
    assert "Wrong shape" in result.stdout
    place = "transformer.transformer_blocks.0.attn.to_q"
    problem = f"{place}: the adapter is for a weight of shape (3072, 3072), the module has (256, 256)"
    assert problem in result.stdout
    assert problem in facts(run, "plan", flux_file, "--model", model)["problems"]


def test_plan_says_which_family_a_foreign_file_is_for(run: Run, sd15_file: Path, flux_model: Path) -> None:
    result = run("plan", sd15_file, "--model", flux_model)
    assert result.exit_code == 1
    assert "It looks like a file for sd15" in result.stdout
    found = facts(run, "plan", sd15_file, "--model", flux_model)
    assert (found["fits"], found["likely_families"], found["matched"]) == (False, ["sd15"], [])


def test_plan_puts_the_real_file_on_sd15(run: Run, tmp_path: Path) -> None:
    model = write_config(tmp_path / "unet", {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768})
    found = facts(run, "plan", real_file("lora_disney.safetensors"), "--model", model)
    assert (found["fits"], found["components"]) == (True, {"unet": 144})
    assert found["unchecked"] == {"text_encoder": 48}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{}", "names no class"),
        ("[1]", "it holds a list"),
        ("{", "is no JSON"),
        ('{"_class_name": "NoSuchModel"}', "has no class NoSuchModel"),
        ('{"_class_name": "FluxTransformer2DModel", "num_layers": "many"}', "cannot be built from it"),
    ],
)
def test_plan_refuses_a_bad_configuration(run: Run, flux_file: Path, tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    result = run("plan", flux_file, "--model", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


@pytest.mark.parametrize("model", ["", "none.json"])
def test_plan_refuses_a_model_that_is_not_there(run: Run, flux_file: Path, tmp_path: Path, model: str) -> None:
    result = run("plan", flux_file, "--model", tmp_path / model)
    assert result.exit_code == 2
    assert "Give a pipeline's folder, a model's folder, or the path of a config.json." in result.stderr


def test_plan_names_the_components_of_a_pipeline(run: Run, flux_file: Path, flux_pipeline: Path) -> None:
    result = run("plan", flux_file, "--model", flux_pipeline, "--component", "unet")
    assert result.exit_code == 2
    assert "It has transformer, text_encoder." in result.stderr


# convert


def test_convert_prints_one_line_and_its_progress_on_stderr(run: Run, flux_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    result = run("convert", flux_file, target, "--format", "diffusers")
    assert result.exit_code == 0, result.stderr
    size = f"{target.stat().st_size / 2**10:.1f} KiB"
    assert result.stdout == f"{target}: kohya, flux1 → diffusers, 5 modules, 9 → 10 keys, {size}\n"
    assert "3/3" in result.stderr


def test_convert_there_and_back_keeps_every_bit(run: Run, flux_file: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert run("convert", flux_file, there, "--format", "original").exit_code == 0
    assert run("convert", there, back, "--format", "kohya").exit_code == 0
    before, after = load_file(flux_file), load_file(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


@pytest.mark.parametrize("name", ["analog_svd_rank4.safetensors", "lora_disney.safetensors"])
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_convert_takes_the_real_files_there_and_back(run: Run, tmp_path: Path, name: str, format: str) -> None:
    source, there, back = real_file(name), tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert run("convert", source, there, "--format", format).exit_code == 0
    assert run("convert", there, back, "--format", "indexed").exit_code == 0
    before, after = load_file(source), load_file(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_convert_refuses_to_overwrite_without_force(run: Run, flux_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.safetensors"
    target.write_bytes(b"precious")
    result = run("convert", flux_file, target, "--format", "diffusers")
    assert (result.exit_code, result.stdout, target.read_bytes()) == (2, "", b"precious")
    assert "Choose another name, or pass --force." in result.stderr
    assert run("convert", flux_file, target, "--format", "diffusers", "--force").exit_code == 0
    assert len(load_file(target)) == 10


def test_convert_replaces_its_own_source_only_by_force(run: Run, flux_file: Path) -> None:
    before = flux_file.read_bytes()
    assert run("convert", flux_file, flux_file, "--format", "original").exit_code == 2
    assert flux_file.read_bytes() == before
    assert run("convert", flux_file, flux_file, "--format", "original", "--force").exit_code == 0
    assert facts(run, "inspect", flux_file)["format"] == "original"


def test_convert_into_a_folder_takes_the_usual_name(run: Run, flux_file: Path, tmp_path: Path) -> None:
    result = run("convert", flux_file, tmp_path / "new", "--format", "diffusers")
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_convert_writes_in_the_wanted_type(run: Run, flux_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "half.safetensors"
    assert run("convert", flux_file, target, "--format", "diffusers", "--dtype", "bfloat16").exit_code == 0
    assert {tensor.dtype for tensor in load_file(target).values()} == {torch.bfloat16}


def test_convert_writes_one_component_alone(run: Run, sd15_file: Path, tmp_path: Path) -> None:
    whole, part = ll.read_adapter(sd15_file), tmp_path / "part.safetensors"
    assert len(whole.components) > 1
    assert run("convert", sd15_file, part, "--format", "peft", "--component", "unet").exit_code == 0
    assert ll.read_adapter(part, family="sd15").components == {"unet": whole.components["unet"]}
    result = run("convert", sd15_file, tmp_path / "x.safetensors", "--format", "peft", "--component", "vae")
    assert result.exit_code == 2
    assert "no change of vae" in result.stderr
    result = run("convert", tmp_path, tmp_path / "out", "--format", "peft", "--component", "unet")
    assert "take one file at a time" in result.stderr


def test_convert_that_cannot_be_said_leaves_no_file(run: Run, flux_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.safetensors"
    result = run("convert", flux_file, target, "--format", "xlabs")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "ConversionError" in result.stderr
    assert "Nothing was written." in result.stderr
    assert not target.parent.exists()


def test_convert_names_the_keys_that_it_leaves_out(run: Run, sd15_file: Path, tmp_path: Path) -> None:
    result = run("convert", sd15_file, tmp_path / "out.safetensors", "--format", "diffusers")
    assert result.exit_code == 0
    assert "Left out\n  some.thing: no known suffix" in result.stderr


def test_convert_writes_no_pickle(run: Run, flux_file: Path, tmp_path: Path) -> None:
    result = run("convert", flux_file, tmp_path / "out.bin", "--format", "kohya")
    assert result.exit_code == 2
    assert not (tmp_path / "out.bin").exists()


def test_convert_lists_the_formats_where_one_is_unknown(run: Run, flux_file: Path, tmp_path: Path) -> None:
    result = run("convert", flux_file, tmp_path / "out.safetensors", "--format", "nope")
    assert result.exit_code == 2
    assert "onetrainer" in result.stderr


# errors


def broken(path: Path) -> Path:
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    return path


@pytest.mark.parametrize("command", [("inspect",), ("plan", "--model", "."), ("convert", "--format", "kohya", "out")])
def test_a_broken_header_ends_in_a_clean_message(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    name, *rest = command
    path = broken(tmp_path / "broken.safetensors")
    result = run(name, path, *(tmp_path / word if word in (".", "out") else word for word in rest))
    assert (result.exit_code, result.stdout) == (2, "")
    what, *others = [line for line in result.stderr.splitlines() if "0/3" not in line]
    assert what.startswith(f"MalformedAdapterError: {path}: ")
    assert others == [
        "The download or the copy is incomplete or damaged: fetch the file again.",
        "Nothing was loaded or changed.",
    ]


def test_a_truncated_file_ends_in_a_clean_message(run: Run, flux_file: Path) -> None:
    flux_file.write_bytes(flux_file.read_bytes()[:-100])
    result = run("inspect", flux_file, "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the header promises" in result.stderr


def test_half_a_pair_is_named(run: Run, flux_file: Path) -> None:
    tensors = load_file(flux_file)
    del tensors["lora_unet_single_blocks_0_linear2.lora_up.weight"]
    save_file(tensors, flux_file)
    result = run("inspect", flux_file)
    assert result.exit_code == 2
    assert "single_blocks_0_linear2: lora: up missing" in result.stderr


def test_a_missing_file_names_its_neighbours(run: Run, flux_file: Path) -> None:
    result = run("inspect", flux_file.with_name("flx.safetensors"))
    assert result.exit_code == 2
    assert "in that folder: flux.safetensors" in result.stderr


def test_several_files_ask_for_the_option_by_its_name(run: Run, flux_file: Path, sd15_file: Path) -> None:
    result = run("inspect", flux_file.parent)
    assert result.exit_code == 2
    assert "Choose one with --weight-name …." in result.stderr
    assert facts(run, "inspect", flux_file.parent, "--weight-name", sd15_file.name)["family"] == "sd15"


def test_an_unknown_family_lists_the_known(run: Run, flux_file: Path) -> None:
    result = run("inspect", flux_file, "--family", "nope")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "UnknownFamilyError: no family 'nope'" in result.stderr
    assert "sd15, " in result.stderr


def test_a_pickle_is_read_only_with_leave(run: Run, flux_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "flux.bin"
    torch.save(load_file(flux_file), path)
    refused = run("inspect", path)
    assert refused.exit_code == 2
    assert "UnsafeFileError" in refused.stderr
    assert "--allow-pickle" in refused.stderr
    assert facts(run, "inspect", path, "--allow-pickle")["modules"] == 5


def test_a_file_that_is_no_adapter_is_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_file({"decoder.conv_in.kernel": torch.zeros(2)}, path)
    result = run("inspect", path)
    assert result.exit_code == 2
    assert "UnknownFormatError" in result.stderr


def test_a_folder_that_cannot_be_written_ends_in_a_clean_message(run: Run, flux_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("convert", flux_file, tmp_path / "file" / "out.safetensors", "--format", "diffusers")
    assert result.exit_code == 2
    assert "Error: " in result.stderr


def test_python_m_is_the_same_command(sd15_file: Path) -> None:
    command = [sys.executable, "-m", "lora_loaders", "inspect", str(sd15_file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["family"] == "sd15"
