"""Promises about what a file is taken for: a checkpoint, a family's adapter, another family's, nobody's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families.published import BY_LABEL, build, needs_list
from torch import Tensor, nn

import lora_loaders as ll

WIDTH = 3072
DOUBLE = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
SINGLE = ("to_q", "to_k", "to_v")
Tensors = dict[str, Tensor]


def pair(name: str, rows: int = WIDTH, columns: int = WIDTH) -> Tensors:
    """A LoRA's factors without data."""
    down, up = (torch.empty(size, device="meta") for size in ((2, columns), (rows, 2)))
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def blocks(path: str, count: int, names: Sequence[str], width: int = WIDTH) -> Tensors:
    keys: Tensors = {}
    for block in range(count):
        for name in names:
            keys |= pair(f"transformer.{path}.{block}.{name}", width, width)
    return keys


def attention(path: str, count: int, names: Sequence[str]) -> Tensors:
    return blocks(path, count, [f"attn.{name}" for name in names])


def flux(double: int = 19, single: int = 38) -> Tensors:
    return attention("transformer_blocks", double, DOUBLE) | attention("single_transformer_blocks", single, SINGLE)


QWEN = attention("transformer_blocks", 60, DOUBLE)
VALUES = attention("transformer_blocks", 60, ["to_v"])


# A checkpoint is no adapter


@needs_list
@pytest.mark.parametrize("label", ["flux1", "flux2-klein-4b", "qwen-image", "wan2.1-t2v-14b", "krea2", "mochi"])
def test_a_whole_checkpoint_is_refused_as_one(label: str) -> None:
    weights = {key: tensor.to("meta") for key, tensor in build(BY_LABEL[label]).state_dict().items()}
    with pytest.raises(ll.CheckpointError, match="is a checkpoint, no adapter"):
        ll.read_adapter(weights)


@pytest.mark.parametrize(
    "key", ["double_blocks.0.img_attn.norm.key_norm.scale", "blocks.0.mlp.up.weight", "blocks.0.attn.q.scale_weight"]
)
def test_keys_that_adapters_have_too_make_no_adapter_of_a_checkpoint(key: str) -> None:
    weights = {key: torch.ones(4), "double_blocks.0.img_attn.qkv.weight": torch.ones(4, 4)}
    weights |= {"blocks.0.mlp.down.weight": torch.ones(4, 4), "blocks.0.attn.q.weight": torch.ones(4, 4)}
    with pytest.raises(ll.CheckpointError):
        ll.read_adapter(weights)


def test_factors_of_an_unknown_make_no_checkpoint() -> None:
    keys = {f"blocks.0.{name}.lora_C.weight": torch.ones(4, 4) for name in ("q", "k", "v")}
    with pytest.raises(ll.UnknownFormatError, match="none of its 3 keys") as caught:
        ll.read_adapter(keys)
    assert not isinstance(caught.value, ll.CheckpointError)


def test_norms_beside_changes_are_an_adapters_though_plain_weights_stand_beside() -> None:
    norm = "double_blocks.0.img_attn.norm.key_norm.scale"
    adapter = ll.read_adapter(
        pair("double_blocks.0.img_attn.proj") | {norm: torch.ones(128), "x.weight": torch.ones(1)}
    )
    assert set(adapter.deltas["transformer"]) == {
        f"transformer_blocks.0.attn.{name}" for name in ("to_out.0", "norm_k")
    }


# The family that a file is told by


def control() -> Tensors:
    return flux() | pair("transformer.x_embedder", WIDTH, 128)


def anima(*names: str) -> Tensors:
    text = ("attn2.to_k", "attn2.to_v")
    parts = [(f"transformer.transformer_blocks.{i}.{name}", name) for i in range(28) for name in names]
    return {k: t for path, name in parts for k, t in pair(path, 2048, 1024 if name in text else 2048).items()}


def motif() -> Tensors:
    names = [f"{module}.{name}" for module in ("attn", "cross_attn") for name in SINGLE]
    return blocks("transformer_blocks", 12, names, 1536) | blocks("single_transformer_blocks", 24, names, 1536)


FILES = {
    # ostris/Flex.1-alpha and Freepik/flux.1-lite: Flux.1 with 8 of its 19 double blocks; Bria FIBO has as many.
    "flux1, pruned": ("flux1", flux(8)),
    # diffusers' train_control_lora_flux.py: x_embedder for 128 channels, no norms.
    "flux1, control": ("flux1", control()),
    # scripts/convert_cogview4_to_diffusers.py: 32 heads of 128, 28 blocks.
    "cogview4": (
        "cogview4",
        blocks("transformer_blocks", 28, [f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")], 4096),
    ),
    "bria": ("bria", flux(8, 28)),
    "longcat-image, single blocks": ("longcat-image", attention("single_transformer_blocks", 20, SINGLE)),
    "ovis-image, single blocks": ("ovis-image", attention("single_transformer_blocks", 27, SINGLE)),
    # diffusers' documentation: 12 and 24 blocks; MotifTechnologies/ComfyUI-MotifVideo2B: 12 heads of 128.
    "motif-video": ("motif-video", motif()),
    # LTX has as many blocks as wide: only the 1024 features of the text tell them apart.
    "anima, queries and values": ("anima", anima("attn1.to_q", "attn1.to_v", "attn2.to_q", "attn2.to_v")),
    "anima, queries and keys": ("anima", anima("attn1.to_q", "attn1.to_k", "attn2.to_q", "attn2.to_k")),
}


@pytest.mark.parametrize("label", FILES)
def test_a_family_is_told_by_names_then_widths_then_all_lists_of_blocks(label: str) -> None:
    family, keys = FILES[label]
    assert ll.read_adapter(keys).family == family


SELF_ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
# Files of which neither names nor widths nor numbers of blocks say which of these families they are for: Cosmos 1 and
# CogView 4 have 28 blocks of 4096, PixArt and DiT 28 of 1152; 12 blocks are half of SD3's and all of Motif-Video's.
UNTOLD = {
    "self-attention of 4096": (blocks("transformer_blocks", 28, SELF_ATTENTION, 4096), {"cogview4", "cosmos1"}),
    "self-attention of 1152": (blocks("transformer_blocks", 28, SELF_ATTENTION, 1152), {"dit", "pixart"}),
    # Stable Audio has 24 blocks of 1536 as SD3 has, and Sana Video 20 of 2240 as Sana.
    "feed-forwards of 1536": (
        {
            key: tensor
            for block in range(24)
            for name, rows, columns in (("0.proj", 6144, 1536), ("2", 1536, 6144))
            for key, tensor in pair(f"transformer.transformer_blocks.{block}.ff.net.{name}", rows, columns).items()
        },
        {"sd3", "stable-audio"},
    ),
    "cross-attention of 2240": (
        blocks("transformer_blocks", 20, [f"attn2.{n}" for n in (*SINGLE, "to_out.0")], 2240),
        {"sana", "sana-video"},
    ),
    "twelve joint blocks": (
        blocks("transformer_blocks", 12, [f"attn.{n}" for n in DOUBLE], 1536),
        {"sd3", "motif-video"},
    ),
}


@pytest.mark.parametrize("label", UNTOLD)
def test_a_family_that_is_only_likelier_is_said_to_be_tied(label: str) -> None:
    keys, families = UNTOLD[label]
    adapter = ll.read_adapter(keys)
    assert families <= {adapter.family, *adapter.ties}


@pytest.mark.parametrize("label", ["self-attention of 1152", "feed-forwards of 1536"])
def test_a_tie_is_warned_of_where_the_other_family_is_written_otherwise(
    label: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {key: torch.ones(tensor.shape) for key, tensor in UNTOLD[label][0].items()}
    ll.convert(tensors, tmp_path / "a.safetensors", format="original")
    assert any("under other names" in record.message for record in caplog.records)


# Qwen-Image has 60 blocks of 3072, as wide as Flux.1, HunyuanVideo and Bria, none of which has more than 20 of them.
@pytest.mark.parametrize("count", [60, 31])
@pytest.mark.parametrize("names", [["to_out.0"], ["to_add_out"], ["to_out.0", "to_add_out"], ["add_q_proj"], ["to_v"]])
def test_a_model_has_no_more_blocks_than_it_has(names: list[str], count: int) -> None:
    adapter = ll.read_adapter(attention("transformer_blocks", count, names))
    assert "qwen-image" in {adapter.family, *adapter.ties}
    assert not {"flux1", "chroma", "hunyuan-video", "bria", "bria-fibo"} & {adapter.family, *adapter.ties}


def test_whole_files_of_flux_are_tied_with_its_twin_alone() -> None:
    """HunyuanVideo has the same names and widths, and one block more of each kind."""
    assert ll.read_adapter(flux()).ties == ("chroma",)


OMNIGEN2 = ("layers.0.attn.to_q", "layers.0.feed_forward.linear_1", "ref_image_refiner.0.attn.to_q", "x.0.attn.to_q")
ACE_STEP_1 = ("speaker_embedder", "transformer_blocks.0.attn.to_q", "transformer_blocks.0.cross_attn.to_k", "lyric.0.q")
FACE_ID = {
    "image_proj.latents": torch.ones(1),
    "ip_adapter.0.to_q_lora.down.weight": torch.ones(4, 320),
    "ip_adapter.0.to_q_lora.up.weight": torch.ones(320, 4),
}


@pytest.mark.parametrize("names", [OMNIGEN2, ACE_STEP_1])
def test_half_of_the_names_make_no_family(names: tuple[str, ...]) -> None:
    keys = {key: tensor for name in names for key, tensor in pair(name).items()}
    with pytest.raises(ll.UnknownFamilyError, match="no family knows its 4 modules"):
        ll.read_adapter(keys)


def test_a_file_of_no_family_is_an_error_that_names_its_modules() -> None:
    with pytest.raises(ll.UnknownFamilyError) as caught:
        ll.read_adapter(FACE_ID)
    assert caught.value.problems[0].startswith("ip_adapter.0.to_q_lora: no family knows")


# Another family's file


def loaded(model: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "transformer") -> Any:
    return ll.attach(model).load_lora_adapter(dict(tensors), prefix=prefix)


SGM = "lora_unet_input_blocks_{}_1_transformer_blocks_{}_attn1_to_q"
SDXL = {
    key: tensor
    for block, depth, width in ((4, 2, 640), (7, 10, 1280), (8, 10, 1280))
    for layer in range(depth)
    for key, tensor in pair(SGM.format(block, layer), width, width).items()
} | {
    key: tensor
    for number, width in ((1, 768), (2, 1280))
    for key, tensor in pair(f"lora_te{number}_text_model_encoder_layers_0_self_attn_q_proj", width, width).items()
}
# cloneofsimo's: modules by number, learned tokens beside.
NUMBERED = {f"unet:{n}:{slot}": torch.empty(4, 4) for n in range(32) for slot in ("up", "down")} | {
    "<s1>": torch.ones(8)
}


@needs_list
@pytest.mark.parametrize(
    ("label", "tensors", "family"),
    [
        pytest.param("flux1", QWEN, "qwen-image", id="qwen-image into flux1"),
        pytest.param("flux1", VALUES, "qwen-image", id="qwen-image's values into flux1"),
        pytest.param("qwen-image", flux(), "flux1", id="flux1 into qwen-image"),
        pytest.param("sd15", SDXL, "sdxl", id="sdxl into sd15"),
        pytest.param("flux1", NUMBERED, "sd15", id="numbered modules into flux1"),
    ],
)
def test_a_file_for_another_family_is_refused_as_one(label: str, tensors: Tensors, family: str) -> None:
    model = build(BY_LABEL[label])
    before = repr(model)
    with pytest.raises(ll.NothingFitsError, match=f"is for {family}: "):
        loaded(model, tensors, "unet" if label == "sd15" else "transformer")
    assert repr(model) == before


@needs_list
def test_families_that_look_alike_load_each_others_files() -> None:
    with_modulation = flux() | {
        key: tensor
        for block in range(19)
        for name in ("norm1", "norm1_context")
        for key, tensor in pair(f"transformer.transformer_blocks.{block}.{name}.linear", 6 * WIDTH).items()
    }
    report = loaded(build(BY_LABEL["chroma"]), with_modulation)
    assert report.components == {"transformer": len(flux()) // 2}


CLIP = "text_model.encoder.layers.{}.self_attn.q_proj"
T5 = "encoder.block.{}.layer.0.SelfAttention.q"
DECODER = "model.layers.{}.self_attn.q_proj"
# Files of a text encoder alone: names, width, family, those that fit as well, and the formats in which theirs differ.
ENCODERS: dict[str, tuple[str, int, str, set[str], set[str]]] = {
    "kohya's only one": ("lora_te_" + CLIP, 768, "sd15", set(), set()),
    "kohya's first": ("lora_te1_" + CLIP, 768, "sdxl", {"flux1", "sd3", "hidream"}, set()),
    "kohya's second": ("lora_te2_" + CLIP, 1280, "sdxl", {"sd3", "hidream"}, set()),
    "of Stable Diffusion 2": ("lora_te_" + CLIP, 1024, "sd2", set(), set()),
    "kohya's T5": ("lora_te3_" + T5, 4096, "flux1", {"sd3", "hidream"}, {"diffusers"}),
    "a language model": ("lora_te_" + DECODER, 1024, "anima", set(), set()),
    "a larger one": ("lora_te_" + DECODER, 2560, "z-image", set(), set()),
    "diffusers'": ("text_encoder." + CLIP, 768, "sd15", {"sdxl", "flux1", "sd3", "hidream"}, {"kohya"}),
    "ComfyUI's": (
        *("text_encoders.clip_g.transformer." + CLIP, 1280, "sdxl"),
        *({"sd3", "cascade", "hidream", "sdxl-refiner"}, {"kohya", "diffusers"}),
    ),
}


@pytest.mark.parametrize("label", ENCODERS)
def test_a_text_encoder_alone_is_told_by_its_width_and_warned_of_where_another_family_writes_it_otherwise(
    label: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, width, family, others, differing = ENCODERS[label]
    tensors: Tensors = {}
    for block in range(2):
        stem = name.format(block)
        stem = stem.replace(".", "_") if stem.startswith("lora_") else stem
        tensors |= {key: torch.ones(tensor.shape) for key, tensor in pair(stem, width, width).items()}
    adapter = ll.read_adapter(tensors)
    assert (adapter.family, set(adapter.ties)) == (family, others)
    for format in ("kohya", "diffusers", "original"):
        caplog.clear()
        ll.convert(tensors, tmp_path / "a.safetensors", format=format)
        assert any("under other names" in record.message for record in caplog.records) == (format in differing)


FEED_FORWARD = {"wan": ("blocks", 40, "ffn", 5120, 13824), "ltx": ("transformer_blocks", 28, "ff", 2048, 8192)}


@pytest.mark.parametrize("family", FEED_FORWARD)
def test_feed_forwards_alone_are_told_by_the_width_of_the_attention(family: str) -> None:
    path, count, name, width, inner = FEED_FORWARD[family]
    tensors: Tensors = {}
    for block in range(count):
        stem = f"transformer.{path}.{block}.{name}.net"
        tensors |= pair(f"{stem}.0.proj", inner, width) | pair(f"{stem}.2", width, inner)
    assert ll.read_adapter(tensors).family == family


def test_attention_alone_of_ovis_is_told_from_flux_by_its_depth() -> None:
    assert ll.read_adapter(flux(6, 27)).family == "ovis-image"
    assert ll.read_adapter(flux(10, 20)).family == "longcat-image"
    assert ll.read_adapter(flux()).family == "flux1"


def test_a_file_of_learned_tokens_alone_is_read_and_is_of_no_family(tmp_path: Path) -> None:
    adapter = ll.read_adapter({"emb_params": torch.ones(2, 768)})
    assert (adapter.family, adapter.ties, list(adapter.embeddings)) == (None, (), ["emb_params"])
    ll.write_adapter(adapter, tmp_path / "a.safetensors", "kohya")
    assert torch.equal(ll.read_adapter(tmp_path / "a.safetensors").embeddings["emb_params"], torch.ones(2, 768))
