"""Names that other tools give to a family's modules: read as the original's, written as the tool reads them."""

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

import lora_loaders as ll
from lora_loaders.adapter import Adapter
from lora_loaders.deltas import LoraDelta
from lora_loaders.kohya_names import NAMES_KEY
from lora_loaders.writing import to_tensors

WIDTH = 8


def pair(name: str, rows: int = WIDTH, columns: int = WIDTH, kohya: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    down, up = (torch.randn(size, generator=generator) for size in ((2, columns), (rows, 2)))
    suffixes = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    return {f"{name}.{suffixes[0]}.weight": down, f"{name}.{suffixes[1]}.weight": up}


def assert_equal(one: Adapter, other: Adapter) -> None:
    assert {(c, path) for c, path, _ in one.modules()} == {(c, path) for c, path, _ in other.modules()}
    for component, path, delta in one.modules():
        assert torch.equal(delta.delta_weight(), other.deltas[component][path].delta_weight()), path


# `civitai_rename_dict` of DiffSynth-Studio's diffsynth/utils/lora/flux.py, and the rows of each weight.
DIFFSYNTH = {
    "double_blocks_3_img_mod_lin": ("blocks.3.norm1_a.linear", 6),
    "double_blocks_3_txt_mod_lin": ("blocks.3.norm1_b.linear", 6),
    "double_blocks_3_img_attn_qkv": ("blocks.3.attn.a_to_qkv", 3),
    "double_blocks_3_txt_attn_qkv": ("blocks.3.attn.b_to_qkv", 3),
    "double_blocks_3_img_attn_proj": ("blocks.3.attn.a_to_out", 1),
    "double_blocks_3_txt_attn_proj": ("blocks.3.attn.b_to_out", 1),
    "double_blocks_3_img_mlp_0": ("blocks.3.ff_a.0", 4),
    "double_blocks_3_img_mlp_2": ("blocks.3.ff_a.2", 1),
    "double_blocks_3_txt_mlp_0": ("blocks.3.ff_b.0", 4),
    "double_blocks_3_txt_mlp_2": ("blocks.3.ff_b.2", 1),
    "single_blocks_3_modulation_lin": ("single_blocks.3.norm.linear", 3),
    "single_blocks_3_linear1": ("single_blocks.3.to_qkv_mlp", 7),
    "single_blocks_3_linear2": ("single_blocks.3.proj_out", 1),
}


def test_diffsynths_own_flux_names_are_read_as_those_it_makes_them_of() -> None:
    theirs, kohyas = dict[str, Tensor](), dict[str, Tensor]()
    for name, (own, parts) in DIFFSYNTH.items():
        factors = pair(name, parts * WIDTH)
        kohyas |= {f"lora_unet_{key}": tensor for key, tensor in factors.items()}
        theirs |= dict(zip(pair(own, kohya=False), factors.values(), strict=True))
    adapter = ll.read_adapter({key.replace(".weight", ".default.weight"): tensor for key, tensor in theirs.items()})
    assert adapter.family == "flux1"
    assert_equal(adapter, ll.read_adapter(kohyas, family="flux1"))


BLOCK = "transformer_blocks.0"
HUNYUAN = {f"{BLOCK}.attn.{name}": WIDTH for name in ("to_q", "to_k", "to_v", "to_out.0")} | {
    f"{BLOCK}.ff.net.0.proj": WIDTH,
    f"{BLOCK}.norm1.linear": WIDTH,
}
# ComfyUI's from the tables of convert_hunyuan_video_1_5_lora_to_comfy.py (musubi-tuner) and
# convert_hunyuan_image_lora_to_comfy.py (sd-scripts), the trainers' from the left sides there and their model classes.
COMFY = {"img_attn_qkv", "img_attn_proj", "img_mlp_0", "img_mod_lin"}
TRAINERS = {
    "hunyuan-video": {"img_attn_qkv", "img_attn_proj", "img_mlp_fc1", "img_mod_linear"},
    "hunyuan-video-1.5": {*(f"img_attn_{n}" for n in "qkv"), "img_attn_proj", "img_mlp_fc1", "img_mod_linear"},
    "hunyuan-image": {"img_attn_qkv", "img_attn_proj", "img_mlp_fc1", "img_mod_linear"},
}


@pytest.mark.parametrize("family", TRAINERS)
def test_hunyuan_is_written_as_comfyui_and_as_the_trainers_have_it(family: str) -> None:
    deltas = {path: LoraDelta(up=torch.randn(rows, 2), down=torch.ones(2, WIDTH)) for path, rows in HUNYUAN.items()}
    adapter = Adapter({"transformer": deltas}, family=family)
    names: dict[str, set[str]] = {}
    for spelling, prefix in (("original", "diffusion_model.double_blocks.0."), ("kohya", "lora_unet_double_blocks_0_")):
        tensors, _, _ = to_tensors(adapter, spelling)
        assert_equal(ll.read_adapter(tensors, family=family), adapter)
        stems = {key.split(".lora_")[0].removesuffix(".alpha").removeprefix(prefix) for key in tensors}
        names[spelling] = {stem.replace(".", "_") for stem in stems}
        assert all(key.startswith(prefix) for key in tensors)
    assert names == {"original": COMFY, "kohya": TRAINERS[family]}
    tensors, _, _ = to_tensors(adapter, "original")
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight" in tensors


# Names that kohya's spelling has in real files and that are not those of the family's trainer; and one of the latter.
UNUSUAL = {
    "z-image": (["layers_0_attention_qkv", "layers_0_attention_out"], "layers_0_attention_to_q"),
    "hunyuan-video": (["double_blocks_0_img_attn_qkv", "double_blocks_0_img_mlp_0"], "double_blocks_0_img_mlp_fc1"),
    "sd15": (
        ["input_blocks_1_1_transformer_blocks_0_attn1_to_q", "middle_block_1_proj_in", "output_blocks_3_0_in_layers_2"],
        "mid_block_attentions_0_proj_in",
    ),
    "sdxl": (
        ["down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "mid_block_resnets_0_conv1"],
        "middle_block_0_in_layers_2",
    ),
}


@pytest.mark.parametrize("family", UNUSUAL)
def test_kohyas_spelling_of_either_names_comes_home_through_the_others(family: str, tmp_path: Path) -> None:
    stems, trainers = UNUSUAL[family]
    home = {f"lora_unet_{key}": t for stem in stems for key, t in pair(stem, 3 * WIDTH).items()}
    home |= {f"lora_unet_{stem}.alpha": torch.tensor(1.0) for stem in stems}
    safetensors.torch.save_file(home, tmp_path / "0.safetensors")
    for step, spelling in enumerate(("original", "peft", "diffusers", "kohya")):
        before, after = (tmp_path / f"{number}.safetensors" for number in (step, step + 1))
        ll.convert(before, after, format=spelling, family=family)
    back = safetensors.torch.load_file(tmp_path / "4.safetensors")
    assert back.keys() == home.keys()
    assert all(torch.equal(tensor, home[key]) for key, tensor in back.items())
    other = "kohya-original" if family == "sdxl" else "kohya-diffusers"
    if family != "hunyuan-video":  # whose trainer has names of its own
        ll.convert(tmp_path / "4.safetensors", tmp_path / "other.safetensors", format=other, family=family)
        assert f"lora_unet_{trainers}.lora_up.weight" in safetensors.torch.load_file(tmp_path / "other.safetensors")
    tensors = to_tensors(replace(ll.read_adapter(home, family=family), format=None), "kohya")[0]
    assert f"lora_unet_{trainers}.lora_up.weight" in tensors
    assert to_tensors(ll.read_adapter(tensors, family=family), "peft")[1].keys() & {NAMES_KEY} == set()


def test_a_header_that_names_no_kind_of_names_is_not_followed() -> None:
    deltas = {"layers.0.attention.to_q": LoraDelta(up=torch.ones(WIDTH, 2), down=torch.ones(2, WIDTH))}
    for said, stem in (("original", "attention_qkv"), ("else", "attention_to_q")):
        adapter = Adapter({"transformer": deltas}, family="z-image", metadata={NAMES_KEY: said})
        assert {key.split(".")[0] for key in to_tensors(adapter, "kohya")[0]} == {f"lora_unet_layers_0_{stem}"}


@pytest.mark.parametrize("family", ["anima", "lumina2"])
def test_a_language_model_is_called_as_sd_scripts_trains_it(family: str) -> None:
    """The bare model, without the level of the causal one: `lora_te_layers_0_…` in Anima's published files."""
    delta = LoraDelta(up=torch.ones(WIDTH, 2), down=torch.ones(2, WIDTH))
    adapter = Adapter({"text_encoder": {"model.layers.0.self_attn.q_proj": delta}}, family=family)
    for spelling, stem in (
        *((kohya, "lora_te_layers_0_self_attn_q_proj") for kohya in ("kohya", "kohya-original", "kohya-diffusers")),
        ("onetrainer", "lora_te_model_layers_0_self_attn_q_proj"),
        ("diffusers", "text_encoder.model.layers.0.self_attn.q_proj"),
    ):
        tensors, _, _ = to_tensors(adapter, spelling)
        assert {key.partition(".lora_")[0] for key in tensors} == {stem}
        assert_equal(ll.read_adapter(tensors, family=family), adapter)


@pytest.mark.parametrize("family", ["chroma", "pixart"])
def test_a_t5_alone_is_called_as_comfyui_reads_it(family: str) -> None:
    """ComfyUI counts a T5 from 1 behind the CLIPs that there are (comfy/lora.py, `model_lora_keys_clip`)."""
    path = "encoder.block.0.layer.0.SelfAttention.q"
    delta = LoraDelta(up=torch.ones(WIDTH, 2), down=torch.ones(2, WIDTH))
    adapter = Adapter({"text_encoder": {path: delta}}, family=family)
    tensors, _, _ = to_tensors(adapter, "kohya")
    assert {key.split(".")[0] for key in tensors} == {"lora_te1_encoder_block_0_layer_0_SelfAttention_q"}
    for prefix in ("lora_te_", "lora_te1_", "lora_te3_"):
        renamed = {key.replace("lora_te1_", prefix): tensor for key, tensor in tensors.items()}
        assert_equal(ll.read_adapter(renamed, family=family), adapter)


def test_omi_has_onetrainers_words_for_components_and_none_for_others() -> None:
    """`convert_flux_lora_key_sets` of OneTrainer's modules/util/convert/lora: transformer, clip_l and t5."""
    pairs = {
        "transformer": "transformer_blocks.0.attn.to_out.0",
        "text_encoder": "text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2": "encoder.block.0.layer.0.SelfAttention.q",
    }
    delta = LoraDelta(up=torch.ones(WIDTH, 2), down=torch.ones(2, WIDTH))
    adapter = Adapter({component: {path: delta} for component, path in pairs.items()}, family="flux1")
    tensors, _, _ = to_tensors(adapter, "omi")
    assert {key.split(".lora_")[0] for key in tensors if "lora_up" in key} == {
        "transformer.double_blocks.0.img_attn.proj",
        "clip_l.text_model.encoder.layers.0.mlp.fc1",
        "t5.encoder.block.0.layer.0.SelfAttention.q",
    }
    assert_equal(ll.read_adapter(tensors), adapter)
    unet = Adapter({"unet": {"mid_block.attentions.0.proj_in": delta}}, family="sdxl")
    assert set(to_tensors(unet, "omi")[0]) == {
        f"unet.middle_block.1.proj_in.lora_{end}.weight" for end in ("up", "down")
    }
    with pytest.raises(ll.ConversionError, match="1 place"):
        to_tensors(Adapter({"text_encoder": {"model.layers.0.mlp.up_proj": delta}}, family="z-image"), "omi")


@pytest.mark.parametrize("suffix", [".scale.diff", ".diff"])
def test_the_difference_of_a_norms_scale_is_read(suffix: str) -> None:
    """ComfyUI writes a parameter's whole name where it is no `.weight`; Flux' norms have a `scale`."""
    key = f"diffusion_model.double_blocks.0.img_attn.norm.query_norm{suffix}"
    value = torch.randn(128)
    adapter = ll.read_adapter({key: value, **pair("diffusion_model.double_blocks.0.img_attn.proj", kohya=False)})
    delta = adapter.deltas["transformer"]["transformer_blocks.0.attn.norm_q"]
    assert torch.equal(delta.delta_weight(), value)


def test_a_module_that_two_dialects_give_alike_is_read_once() -> None:
    factors = pair("lora_unet_double_blocks_0_img_attn_proj")
    again = dict(zip(pair("diffusion_model.double_blocks.0.img_attn.proj", kohya=False), factors.values(), strict=True))
    adapter = ll.read_adapter(factors | again, family="flux1")
    assert_equal(adapter, ll.read_adapter(factors, family="flux1"))
    assert {reason.split(" ")[0] for key, reason in adapter.ignored.items() if key in again} == {"the"}
    assert set(adapter.ignored) == set(again)
    other = {key: tensor + 1 for key, tensor in again.items()}
    with pytest.raises(ll.MalformedAdapterError, match="both"):
        ll.read_adapter(factors | other, family="flux1")


def test_an_adapter_with_modules_of_unknown_names_is_not_written_by_half() -> None:
    known = pair("lora_unet_double_blocks_0_img_attn_proj") | pair("lora_unet_double_blocks_0_txt_attn_proj")
    adapter = ll.read_adapter(known | pair("lora_unet_sidecar_7"))
    with pytest.raises(ll.ConversionError) as caught:
        to_tensors(adapter, "diffusers")
    assert caught.value.problems == ("sidecar_7: no such name in this family",)


def test_a_plan_accounts_for_learned_tokens_too() -> None:
    token = "bundle_emb.<cat>.clip_l"
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(WIDTH, WIDTH)})
    tensors = pair("transformer.a", kohya=False) | {token: torch.ones(2, 4)}
    assert set(ll.plan(model, tensors).keys) == set(tensors)
