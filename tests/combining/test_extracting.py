"""Extraction: what was added to a model is found again, from every form that a model comes in."""

import json
import math
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import clip
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.checkpoints import open_checkpoint
from lora_loaders.combining.resizing import read_at
from lora_loaders.families.rules import flatten

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
Weights = dict[str, Tensor]
# Diffusers' names of a few of SDXL's weights -> the published checkpoint's; the widths are its own, cut to one block.
NAMES = {
    f"{BLOCK}.attn1.to_q": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    f"{BLOCK}.attn2.to_k": "input_blocks.4.1.transformer_blocks.0.attn2.to_k",
    "down_blocks.1.resnets.0.conv1": "input_blocks.4.0.in_layers.2",
}
SHAPES = {
    f"{BLOCK}.attn1.to_q": (64, 64),
    f"{BLOCK}.attn2.to_k": (64, 2048),
    "down_blocks.1.resnets.0.conv1": (32, 16, 3, 3),
}


@pytest.fixture
def base() -> Weights:
    torch.manual_seed(0)
    weights = {f"{path}.weight": torch.randn(shape) for path, shape in SHAPES.items()}
    return {**weights, f"{BLOCK}.norm1.weight": torch.randn(64), "down_blocks.1.resnets.0.conv1.bias": torch.randn(32)}


def change(path: str, rank: int = 3) -> Tensor:
    shape = SHAPES[path]
    generator = torch.Generator().manual_seed(len(path))
    up = torch.randn(shape[0], rank, generator=generator)
    return (up @ torch.randn(rank, torch.Size(shape[1:]).numel(), generator=generator)).view(shape)


@pytest.fixture
def tuned(base: Weights) -> Weights:
    return {**base, **{f"{path}.weight": base[f"{path}.weight"] + change(path) for path in SHAPES}}


def write_folder(folder: Path, weights: Weights, shards: int = 1) -> Path:
    unet = folder / "unet"
    unet.mkdir(parents=True)
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
    )
    config = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 2048, "addition_embed_type": "text_time"}
    (unet / "config.json").write_text(json.dumps(config))
    keys = list(weights)
    names = [f"diffusion_pytorch_model-{i:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if shards == 1:
        save_file(weights, unet / "diffusion_pytorch_model.safetensors")
        save_file({"x": torch.zeros(1)}, unet / "diffusion_pytorch_model.fp16.safetensors")
        return folder
    place = {key: names[index % shards] for index, key in enumerate(keys)}
    for name in names:
        save_file({key: weights[key] for key in keys if place[key] == name}, unet / name)
    index = {"weight_map": place}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_original(path: Path, weights: Weights) -> Path:
    named: Weights = {"first_stage_model.encoder.conv_in.weight": torch.zeros(4, 4)}
    for key, tensor in weights.items():
        module, _, leaf = key.rpartition(".")
        own = NAMES.get(module, module.replace(BLOCK, "input_blocks.4.1.transformer_blocks.0"))
        named[f"model.diffusion_model.{own}.{leaf}"] = tensor
    save_file(named, path)
    return path


def found(done: ll.Approximation) -> dict[str, Tensor]:
    return {path: delta.delta_weight() for _, path, delta in done.adapter.modules()}


def check(done: ll.Approximation) -> None:
    assert done.adapter.components == {"unet": 3}
    for path, made in found(done).items():
        torch.testing.assert_close(made, change(path), rtol=1e-3, atol=1e-3)
    assert done.error < 1e-3


@pytest.mark.parametrize("form", ["folder", "shards", "model folder", "original", "mixed"])
def test_what_was_added_is_found_in_every_form_of_a_model(
    base: Weights, tuned: Weights, tmp_path: Path, form: str
) -> None:
    shards = 2 if form == "shards" else 1
    new, old = write_folder(tmp_path / "tuned", tuned, shards), write_folder(tmp_path / "base", base, shards)
    if form == "model folder":
        new, old = new / "unet", old / "unet"
    if form in ("original", "mixed"):
        new = write_original(tmp_path / "tuned.safetensors", tuned)
    if form == "original":
        old = write_original(tmp_path / "base.safetensors", base)
    done = ll.extract(new, old, rank=3, dtype=torch.float32)
    check(done)
    assert done.adapter.family == "sdxl"
    path = ll.write_adapter(done.adapter, tmp_path / "out.safetensors", "kohya")
    for part, module, delta in ll.read_adapter(path).modules():
        torch.testing.assert_close(delta.delta_weight(), change(module), rtol=1e-3, atol=1e-3, msg=part)


@pytest.mark.parametrize(
    ("family", "component", "prefix"),
    [
        ("sdxl", "text_encoder_2", "conditioner.embedders.1.model."),
        ("sd2", "text_encoder", "cond_stage_model.model."),
    ],
)
def test_open_clips_names_in_a_checkpoint_are_those_that_diffusers_converts_them_to(
    family: str, component: str, prefix: str, tmp_path: Path
) -> None:
    generator, width = torch.Generator().manual_seed(0), 8
    checkpoint = {f"{prefix}positional_embedding": torch.randn(4, width, generator=generator)}
    checkpoint[f"{prefix}token_embedding.weight"] = torch.randn(5, width, generator=generator)
    sizes = {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width)}
    sizes |= {"mlp.c_fc.": (32, width), "mlp.c_proj.": (width, 32), "ln_1.": (width,), "ln_2.": (width,)}
    for end in ("weight", "bias"):
        checkpoint[f"{prefix}ln_final.{end}"] = torch.randn(width, generator=generator)
        for layer in range(2):
            for name, size in sizes.items():
                shape = size if end == "weight" else size[:1]
                key = f"{prefix}transformer.resblocks.{layer}.{name}{end}"
                checkpoint[key] = torch.randn(shape, generator=generator)
    checkpoint[f"{prefix}text_projection"] = torch.randn(width, width, generator=generator)
    unet = {"model.diffusion_model.middle_block.1.proj_in.weight": torch.randn(width, width)}
    save_file(checkpoint | unet, tmp_path / "sd.safetensors")
    expected = convert_open_clip_checkpoint(None, dict(checkpoint), prefix=prefix)
    read = open_checkpoint(tmp_path / "sd.safetensors", family=family)
    assert not read.weights.unresolved
    found = {
        f"{path}.{'weight' if slot == 'diff' else 'bias'}": tensor
        for path, delta in read.weights.deltas[component].items()
        for slot, tensor in delta.tensors().items()
    }
    expected.pop("text_projection.weight", None)  # lies the other way round, and is left out
    assert found.keys() == expected.keys()
    assert all(torch.equal(read_at(tensor, None), expected[key]) for key, tensor in found.items())


def test_a_fused_projection_is_found_in_its_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    key = "double_blocks.0.img_attn.qkv.weight"
    others = {"double_blocks.0.img_attn.proj.weight": torch.randn(64, 64), "img_in.weight": torch.randn(64, 16)}
    old, new = torch.randn(192, 64), torch.randn(192, 64)
    save_file({key: old, **others}, tmp_path / "base.safetensors")
    save_file({key: new, **others}, tmp_path / "tuned.safetensors")
    done = ll.extract(
        tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", algebra="full", dtype=torch.float32
    )
    parts = dict(zip(("to_q", "to_k", "to_v"), (new - old).chunk(3), strict=True))
    assert {path.rsplit(".", 1)[1]: made.tolist() for path, made in found(done).items()} == {
        name: part.tolist() for name, part in parts.items()
    }


def test_a_fused_and_a_plain_model_give_the_adapter_back() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 16))

    plain, fused = model(), model()
    torch.manual_seed(1)
    up, down = torch.randn(32, 4), torch.randn(4, 24)
    ll.attach(fused)
    fused.load_lora_adapter({"transformer.0.lora_A.weight": down, "transformer.0.lora_B.weight": up})  # type: ignore[operator]
    fused.fuse_lora()  # type: ignore[operator]
    done = ll.extract(fused, plain, error=1e-3, dtype=torch.float32)
    assert list(found(done)) == ["0"]
    assert done.fits["transformer.0"].rank == 4
    torch.testing.assert_close(found(done)["0"], up @ down, rtol=1e-4, atol=1e-4)


class Modulated(nn.Module):
    """A block with tables of its own beside a layer, and one on the model itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale_shift_table = nn.Parameter(torch.randn(2, 16))
        self.block = nn.Module()
        self.block.scale_shift_table = nn.Parameter(torch.randn(1, 6, 16))
        self.block.steps = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
        self.block.linear = nn.Linear(16, 16)


def test_raw_parameters_of_live_models_are_found_and_go_back(tmp_path: Path) -> None:
    plain, tuned = Modulated(), Modulated()
    changes = {"scale_shift_table": torch.randn(2, 16), "block.scale_shift_table": torch.randn(1, 6, 16)}
    with torch.no_grad():
        for path, made in changes.items():
            tuned.get_parameter(path).add_(made)
    done = ll.extract(tuned, plain, algebra="full", dtype=torch.float32, component="transformer")
    assert found(done).keys() == changes.keys()
    path = ll.write_adapter(done.adapter, tmp_path / "out.safetensors", "lycoris")
    model: Any = ll.attach(Modulated())
    model.load_lora_adapter(path, adapter_name="a")
    for name in changes:
        torch.testing.assert_close(model.get_parameter(name), tuned.get_parameter(name))
    # What is active on a parameter is no part of the model, what is fused into it is.
    with pytest.raises(ll.AdapterMismatchError, match="differ in no weight"):
        ll.extract(model, plain, rank=1, component="transformer")
    model.fuse_lora()
    again = ll.extract(model, plain, algebra="full", dtype=torch.float32, component="transformer")
    assert found(again).keys() == changes.keys()


def test_weights_that_cannot_be_read_say_what_to_give_instead() -> None:
    whole, lost = Model(it=True), Model(it=True).to("meta")
    whole.get_submodule("it").register_parameter(
        "weight", nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    )
    with pytest.raises(ll.UnsupportedBaseError, match="before it was quantised") as error:
        ll.extract(whole, Model(it=True), rank=1, component="unet")
    assert [problem.partition(":")[0] for problem in error.value.problems] == ["unet.it"]
    with pytest.raises(ll.ConversionError, match=r"unet\.it holds no data") as no_data:
        ll.extract(lost, Model(it=True), rank=1, component="unet")
    assert "offloading" in no_data.value.mend


SETTINGS: dict[str, dict[str, Any]] = {"lora": {"rank": 2}, "lokr": {"rank": 2, "factor": 4}, "full": {}}


@pytest.mark.parametrize("algebra", SETTINGS)
def test_the_stated_error_is_that_of_the_written_file(
    base: Weights, tuned: Weights, tmp_path: Path, algebra: Any
) -> None:
    new, old = write_folder(tmp_path / "tuned", tuned), write_folder(tmp_path / "base", base)
    done = ll.extract(new, old, algebra=algebra, **SETTINGS[algebra])
    path = ll.write_adapter(done.adapter, tmp_path / "out.safetensors", "kohya")
    for _, module, delta in ll.read_adapter(path).modules():
        key = f"{module}.weight"
        true = tuned[key] - base[key]
        error = float((delta.delta_weight().view(true.shape) - true).norm() / true.norm())
        assert done.fits[f"unet.{module}"].error == pytest.approx(error, rel=1e-4, abs=1e-6)
    assert {flatten(type(d).__name__.lower()) for _, _, d in done.adapter.modules()} == {f"{algebra}delta"}


def test_vectors_are_named_and_kept_only_on_demand(base: Weights, tuned: Weights, tmp_path: Path) -> None:
    tuned[f"{BLOCK}.norm1.weight"] = base[f"{BLOCK}.norm1.weight"] + 1
    tuned["down_blocks.1.resnets.0.conv1.bias"] = base["down_blocks.1.resnets.0.conv1.bias"] + 2
    new, old = write_folder(tmp_path / "tuned", tuned), write_folder(tmp_path / "base", base)
    done = ll.extract(new, old, rank=3)
    assert set(done.left_out) == {f"unet.{BLOCK}.norm1", "unet.down_blocks.1.resnets.0.conv1 (bias)"}
    kept = ll.extract(new, old, rank=3, vectors=True)
    assert kept.left_out == {}
    deltas = kept.adapter.deltas["unet"]
    torch.testing.assert_close(deltas[f"{BLOCK}.norm1"].delta_weight(), torch.ones(64), rtol=1e-3, atol=1e-3)
    bias = deltas["down_blocks.1.resnets.0.conv1"].delta_bias()
    assert bias is not None
    torch.testing.assert_close(bias.float(), torch.full((32,), 2.0), rtol=1e-3, atol=1e-3)


def test_a_module_of_another_shape_is_left_out_by_name(base: Weights, tuned: Weights, tmp_path: Path) -> None:
    tuned["down_blocks.1.resnets.0.conv1.weight"] = torch.randn(32, 20, 3, 3)
    new, old = write_folder(tmp_path / "tuned", tuned), write_folder(tmp_path / "base", base)
    done = ll.extract(new, old, rank=3)
    assert "(32, 20, 3, 3)" in done.left_out["unet.down_blocks.1.resnets.0.conv1"]
    assert done.adapter.components == {"unet": 2}


def module_at(path: str, weight: Tensor) -> nn.Module:
    """A model with one layer, at this path."""
    *parents, name = path.split(".")
    layer = nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.data = weight.clone()
    made: nn.Module = nn.ModuleDict({name: layer})
    for parent in reversed(parents):
        made = nn.ModuleDict({parent: made})
    return made


class Model(nn.Module):
    """Layers by name, with a bias or without."""

    def __init__(self, **biases: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, bias in biases.items():
            self.add_module(name, nn.Linear(8, 8, bias=bias))


def test_what_only_one_side_has_is_named() -> None:
    new = Model(same=True, gained=True, lost=False, new=True)
    old = Model(same=True, gained=False, lost=True, old=True)
    new.get_submodule("same").get_parameter("weight").data += 1
    for name in ("gained", "lost"):
        new.get_submodule(name).get_parameter("weight").data = old.get_submodule(name).get_parameter("weight").data
    done = ll.extract({"unet": new}, {"unet": old, "text_encoder": old}, rank=2, vectors=True)
    assert set(done.fits) == {"unet.same"}
    gone = "only the base model has it"
    assert done.left_out == {
        "unet.gained (bias)": "the base model has none",
        "unet.lost (bias)": gone,
        "unet.new": "the base model has no such module",
        "unet.old": gone,
        "text_encoder": gone,
    }
    new.get_submodule("same").get_parameter("weight").data -= 1
    new.load_state_dict(old.state_dict(), strict=False)
    with pytest.raises(ll.AdapterMismatchError, match=r"unet\.gained \(bias\): the base model has none"):
        ll.extract(new, old, rank=2, vectors=True, component="unet")


def test_whole_numbers_are_named(base: Weights, tuned: Weights, tmp_path: Path) -> None:
    key = f"{BLOCK}.attn1.to_q"
    tuned[f"{key}.weight"] = torch.ones(64, 64, dtype=torch.int8)
    new, old = write_folder(tmp_path / "tuned", tuned), write_folder(tmp_path / "base", base)
    done = ll.extract(new, old, rank=3)
    assert set(done.left_out) == {f"unet.{key}"}
    assert "int8" in done.left_out[f"unet.{key}"]


@pytest.mark.parametrize(
    ("algebra", "value"), [("lora", math.nan), ("lokr", math.inf), ("full", math.nan), ("full", 1e6)]
)
def test_numbers_that_are_none_or_too_large_for_the_dtype_name_the_module(algebra: Any, value: float) -> None:
    new, old = Model(it=False), Model(it=False)
    new.get_submodule("it").get_parameter("weight").data[1, 2] = value
    with pytest.raises(ll.ConversionError, match=r"unet\.it: NaN or infinity"):
        ll.extract(new, old, algebra=algebra, dtype=torch.float16, component="unet", **SETTINGS[algebra])


def test_two_equal_models_are_an_error(base: Weights, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "base", base)
    with pytest.raises(ll.AdapterMismatchError, match="differ in no weight"):
        ll.extract(folder, folder, rank=3)


def test_adapters_are_no_models(tmp_path: Path) -> None:
    save_file(
        {"transformer.x.lora_A.weight": torch.ones(1, 2), "transformer.x.lora_B.weight": torch.ones(2, 1)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(ll.AdapterMismatchError, match=r"a\.safetensors is an adapter, no model: 2 of its 2 keys"):
        ll.extract(tmp_path / "a.safetensors", tmp_path / "a.safetensors", rank=1)


def test_a_lora_without_a_goal_and_a_folder_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ll.ConversionError, match="give a rank"):
        ll.extract(tmp_path, tmp_path)
    with pytest.raises(ll.AdapterFileError, match="no safetensors files"):
        ll.extract(tmp_path, tmp_path, rank=1)


def test_a_bound_that_lokr_cannot_reach_names_the_modules(base: Weights, tuned: Weights, tmp_path: Path) -> None:
    new, old = write_folder(tmp_path / "tuned", tuned), write_folder(tmp_path / "base", base)
    with pytest.raises(ll.ConversionError, match="in 3 modules") as refused:
        ll.extract(new, old, algebra="lokr", error=0.05)
    assert {problem.partition(":")[0] for problem in refused.value.problems} == {f"unet.{path}" for path in SHAPES}
    assert "--as lora" in refused.value.mend


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"algebra": "nonsense", "rank": 3}, "'nonsense'"),
        ({"algebra": "full", "rank": 3}, "rank"),
        ({"algebra": "full", "energy": 0.9}, "energy"),
        ({"algebra": "full", "conv_rank": 2}, "rank"),
        ({"algebra": "lora", "rank": 3, "factor": 4}, "factor=4"),
        ({"algebra": "full", "factor": 4}, "factor=4"),
        ({"algebra": "lokr", "factor": 0}, "factor=0"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_to_the_algebra_are_refused_before_anything_is_read(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ll.ConversionError, match=named) as refused:
        ll.extract(tmp_path / "none", tmp_path / "none", **settings)
    assert refused.value.state == "Nothing was read or written."


@pytest.mark.parametrize("form", ["live", "folder", "file"])
def test_an_embedding_is_written_as_peft_reads_one(form: str, tmp_path: Path) -> None:
    name, up, down = "embeddings.token_embedding", torch.randn(100, 2), torch.randn(2, 32)
    models = {side: clip() for side in ("tuned", "base")}
    models["tuned"].load_state_dict(models["base"].state_dict())
    models["tuned"].get_submodule(name).get_parameter("weight").data.add_(up @ down)
    given: dict[str, Any] = models
    if form == "folder":
        for side, model in models.items():
            cast(Any, model).save_pretrained(tmp_path / side / "text_encoder")
        given = {side: tmp_path / side / "text_encoder" for side in models}
    if form == "file":
        given = {side: tmp_path / f"{side}.safetensors" for side in models}
        for side, model in models.items():
            named = {f"cond_stage_model.transformer.{n}": t.contiguous() for n, t in model.state_dict().items()}
            save_file(named, given[side])
    settings = {"component": "text_encoder", "family": "sd15"}
    done = ll.extract(given["tuned"], given["base"], rank=2, dtype=torch.float32, **settings)
    path = ll.write_adapter(done.adapter, tmp_path / "out", "peft")
    prefix = f"base_model.model.text_model.{name}.lora_embedding_"
    written = load_file(path)
    assert written.keys() == {f"{prefix}A", f"{prefix}B"}
    made = (written[f"{prefix}B"] @ written[f"{prefix}A"]).T
    torch.testing.assert_close(made, up @ down, rtol=1e-4, atol=1e-4)
    for other in ("kohya", "original"):  # of which no reader knows a word for them
        again = ll.read_adapter(ll.write_adapter(done.adapter, tmp_path / f"{other}.safetensors", other))
        assert not any("embedding_A" in key for key in load_file(tmp_path / f"{other}.safetensors"))
        change = again.deltas["text_encoder"][f"text_model.{name}"].delta_weight()
        torch.testing.assert_close(change, up @ down, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["tuned", "base"])
@pytest.mark.parametrize("other_in_file", [False, True])
def test_a_full_difference_of_a_live_model_is_that_of_the_moment(
    side: str, other_in_file: bool, base: Weights, tuned: Weights, tmp_path: Path
) -> None:
    path = f"{BLOCK}.attn1.to_q"
    sides: dict[str, Any] = {"tuned": tuned, "base": base}
    models = {name: module_at(path, weights[f"{path}.weight"]) for name, weights in sides.items()}
    given: dict[str, Any] = {name: {"unet": model} for name, model in models.items()}
    if other_in_file:
        other = "base" if side == "tuned" else "tuned"
        given[other] = write_folder(tmp_path / other, sides[other])
    done = ll.extract(given["tuned"], given["base"], algebra="full", dtype=torch.float32, family="sdxl")
    weights = (tuned[f"{path}.weight"], base[f"{path}.weight"])
    weight = models[side].get_parameter(f"{path}.weight").data
    weight.copy_(weights[side == "tuned"])  # as the other side has it: nothing would be left
    out = ll.write_adapter(done.adapter, tmp_path / "out.safetensors", "kohya")
    assert torch.equal(ll.read_adapter(out).deltas["unet"][path].delta_weight(), weights[0] - weights[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep memory in ways of their own")
def test_a_full_difference_of_many_weights_leaves_no_memory_behind(tmp_path: Path) -> None:
    """glibc would keep a good part of both models: freed blocks below the small things that stay of each module."""
    torch.manual_seed(0)
    names = [f"up_blocks.0.attentions.0.transformer_blocks.{i}.attn1.to_{x}.weight" for i in range(10) for x in "qkv"]
    for file in ("base", "tuned"):
        save_file({name: torch.randn(1280, 1280).half() for name in names}, tmp_path / f"{file}.safetensors")
    script = """
import re, sys, lora_loaders as ll
anonymous = lambda: int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = anonymous()
done = ll.extract(sys.argv[2], sys.argv[1], algebra="full", component="unet")
print(len(done.fits), (anonymous() - before) // 1024)
"""
    files = [str(tmp_path / f"{file}.safetensors") for file in ("base", "tuned")]
    run = subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True, check=True)
    modules, grown = map(int, run.stdout.split())
    assert modules == 30
    assert grown < 120, f"{grown} MiB are left; the weights of both models take 188"
