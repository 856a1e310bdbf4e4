"""The grammar of keys: prefix, module name, suffix, in every spelling, by strings alone."""

import pytest

from lora_loaders import UnknownFormatError, formats
from lora_loaders.formats import FORMATS, format_named
from lora_loaders.formats.grammar import (
    COMMON,
    DROPPED,
    STYLES,
    SUFFIXES,
    Key,
    drop_reason,
    read_keys,
    split_key,
    split_prefix,
)

NAME = "double_blocks.0.img_attn.qkv"

SUFFIX_CASES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.default": "down",
    ".lora_down.default.weight": "down",
    ".lora_up.default.weight": "up",
    ".lora_up.default.bias": "up_bias",
    ".lora_mid.default.weight": "mid",
    ".lora.down.default.weight": "down",
    ".lora.up.default.weight": "up",
    ".alpha.default": "alpha",
    ".dora_scale.default": "magnitude",
    ".diff.default": "diff",
    ".diff_b.default": "bias",
    ".lora_B.default.bias": "up_bias",
    ".lora_B.bias": "up_bias",
    ".lora_up.bias": "up_bias",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "magnitude_out",
    ".lora_magnitude_vector.weight": "magnitude_out",
    ".lora_magnitude_vector.default": "magnitude_out",
    ".lora_magnitude_vector.default.weight": "magnitude_out",
    ".magnitude": "magnitude_out",
    ".hada_w1_a": "hada_w1_a",
    ".hada_t2": "hada_t2",
    ".lokr_w2_b": "lokr_w2_b",
    ".oft_blocks": "oft_blocks",
    ".oft_R.weight": "oft_R",
    ".diff": "diff",
    ".diff_b": "bias",
    ".diff_m": "diff_m",
    ".set_weight": "set_weight",
    ".scale": "set_weight",
    ".scale.diff": "diff",
    ".scale.set_weight": "set_weight",
    ".hada_w1_a.default": "hada_w1_a",
    ".lokr_w2.default": "lokr_w2",
    ".oft_R.default.weight": "oft_R",
    ".oft_R.scaled_oft": "scaled_oft",
    ".w_norm": "w_norm",
    ".b_norm": "b_norm",
    ".on_input": "on_input",
    ".reshape_weight": "reshape_weight",
    ".a1.weight": "a1",
}


@pytest.mark.parametrize("suffix", SUFFIX_CASES)
def test_suffix_is_split_from_the_name(suffix: str) -> None:
    found = split_key(f"diffusion_model.{NAME}{suffix}")
    assert found is not None
    assert (found.prefix, found.component, found.name, found.slot) == (
        *("diffusion_model.", "denoiser", NAME, SUFFIX_CASES[suffix]),
    )


@pytest.mark.parametrize("adapter", ["default", "style", "up", "down", "a1", "weight_1", "lora", "0"])
def test_any_name_of_a_peft_adapter_is_read(adapter: str) -> None:
    found = split_key(f"base_model.model.{NAME}.lora_A.{adapter}.weight")
    assert found is not None
    assert (found.name, found.slot, found.adapter) == (NAME, "down", adapter)


WRAPPED = {
    "_fsdp_wrapped_module.transformer_blocks.0._checkpoint_wrapped_module.attn.to_q.lora_A.weight": "down",
    "_orig_mod.transformer_blocks.0._orig_mod.attn.to_q.lora_down.weight": "down",
    "transformer_blocks.0.attn.to_q._fsdp_wrapped_module.lora_B.default.weight": "up",
    "transformer_blocks.0.base_layer.attn.to_q.base_layer.lora_B.weight": "up",
}


@pytest.mark.parametrize("key", WRAPPED)
def test_levels_of_wrappers_are_no_part_of_a_name(key: str) -> None:
    found = split_key(key)
    assert found is not None
    assert (found.name, found.slot) == ("transformer_blocks.0.attn.to_q", WRAPPED[key])
    own = split_key("to_q.base_layer.weight")  # the model's weight, beside the change of `to_q`
    assert own is not None
    assert own.name == "to_q.base_layer"


# torch.compile's, FSDP's and checkpointing's levels, with the dots of the whole path made underscores.
WRAPPED_FLAT = {
    "lora_unet__orig_mod_blocks_0_attn_to_q": "blocks_0_attn_to_q",
    "lora_unet_orig_mod_blocks_0_attn_to_q": "blocks_0_attn_to_q",  # runs of underscores made one
    "lycoris__orig_mod__fsdp_wrapped_module_blocks_0_attn_to_q": "blocks_0_attn_to_q",
    "lora_transformer_blocks_0__checkpoint_wrapped_module_attn__orig_mod_to_q": "blocks_0_attn_to_q",
    "lora_te1__orig_mod_text_model_encoder": "text_model_encoder",
    "_orig_mod_blocks_0_attn_to_q": "blocks_0_attn_to_q",
    "lora_unet_original_mod_blocks_0": "original_mod_blocks_0",
    "lora_unet_blocks_0_base_layer_to_q": "blocks_0_base_layer_to_q",
}


@pytest.mark.parametrize("name", WRAPPED_FLAT)
def test_flattened_levels_of_wrappers_are_no_part_of_a_name(name: str) -> None:
    found = split_key(f"{name}.lora_down.weight")
    assert found is not None
    assert (found.name, found.slot) == (WRAPPED_FLAT[name], "down")


@pytest.mark.parametrize("module", ["alpha", "diff", "alpha.diff"])
def test_a_module_called_as_a_suffix_keeps_its_name(module: str) -> None:
    found = split_key(f"blocks.0.{module}.lora_A.weight")
    assert found is not None
    assert (found.name, found.slot) == (f"blocks.0.{module}", "down")


PREFIX_CASES = {
    "lora_unet_x": ("lora_unet_", "denoiser", "x"),
    "lora_unet__x": ("lora_unet_", "denoiser", "_x"),
    "lora_transformer_x": ("lora_transformer_", "denoiser", "x"),
    "lora_te_x": ("lora_te_", "te1", "x"),
    "lora_te2_x": ("lora_te2_", "te2", "x"),
    "lora_te3_x": ("lora_te3_", "te3", "x"),
    "text_encoder.x": ("text_encoder.", "text_encoder", "x"),
    "text_encoder_2.x": ("text_encoder_2.", "text_encoder_2", "x"),
    "text_encoders.clip_l.transformer.x": ("text_encoders.clip_l.transformer.", "encoder:clip_l", "x"),
    "base_model.model.x": ("base_model.model.", "", "x"),
    "base_model.model.transformer.x": ("base_model.model.", "denoiser", "x"),
    "base_model.model.transformer.diffusion_model.x": ("base_model.model.", "denoiser", "x"),
    "model.diffusion_model.x": ("model.diffusion_model.", "denoiser", "x"),
    "transformer.transformer_blocks.0": ("transformer.", "denoiser", "transformer_blocks.0"),
    "transformer_blocks.0.attn": ("", "", "transformer_blocks.0.attn"),
    "unet.down_blocks.0": ("unet.", "denoiser", "down_blocks.0"),
    "x": ("", "", "x"),
    "": ("", "", ""),
}


@pytest.mark.parametrize("name", PREFIX_CASES)
def test_prefixes_are_stripped_until_a_name_is_left(name: str) -> None:
    assert split_prefix(name) == PREFIX_CASES[name]


@pytest.mark.parametrize("key", ["conv.kernel", "x.lora_C.weight.y", "nothing", "", ".", "a.b.c", "x.lora_downweight"])
def test_key_without_a_known_suffix_is_none(key: str) -> None:
    assert split_key(key) is None


def test_every_key_is_in_a_module_or_left_with_a_reason() -> None:
    keys = [f"{NAME}{suffix}" for suffix in (".lora_A.weight", ".lora_down.weight", ".nothing")]
    keys += [f"{start}x.lora_up.weight" for start, _ in DROPPED]
    modules, left, _ = read_keys(keys)
    assert {key for module in modules for key in module.keys.values()} | set(left) == set(keys)
    assert all(left.values())
    assert {drop_reason(key) for key in keys[3:]} == {reason for _, reason in DROPPED}


def test_spellings_of_one_module_stay_apart_until_families_join_them() -> None:
    modules, _, _ = read_keys(["lora_unet_a_b.lora_down.weight", "diffusion_model.a.b.lora_up.weight"])
    assert [module.name for module in modules] == ["a_b", "a.b"]


def test_no_suffix_means_two_slots() -> None:
    tables = [COMMON, *STYLES.values()]
    meanings: dict[str, set[str]] = {}
    for table in tables:
        for slot, suffix in table.items():
            meanings.setdefault(suffix, set()).add(slot)
    assert {suffix: slots for suffix, slots in meanings.items() if len(slots) > 1} == {}
    assert all(SUFFIXES[suffix] in slots for suffix, slots in meanings.items())


@pytest.mark.parametrize("style", STYLES)
def test_what_a_style_writes_it_reads_as_the_same_slot(style: str) -> None:
    for slot, suffix in {**COMMON, **STYLES[style]}.items():  # pyright: ignore[reportArgumentType]
        assert split_key(f"{NAME}{suffix}") == Key("", "", NAME, slot, split_key(f"{NAME}{suffix}").style, "")  # pyright: ignore[reportOptionalMemberAccess]


def test_formats_are_found_by_name_and_no_two_share_one() -> None:
    assert len({form.name for form in FORMATS}) == len(FORMATS)
    for form in FORMATS:
        assert format_named(form.name) is form
    with pytest.raises(UnknownFormatError, match="There are peft, diffusers"):
        format_named("nothing")


def test_numbered_files_are_told_from_named_ones() -> None:
    modules, left, name = formats.read_modules(["unet:0:up", "unet:0:down", "text_encoder:11:up", "<s1>"])
    assert name == "indexed"
    assert [(m.component, m.name, set(m.keys)) for m in modules] == [
        ("unet", "#0", {"up", "down"}),
        ("text_encoder", "#11", {"up"}),
    ]
    assert set(left) == {"<s1>"}
    assert formats.read_modules(["unet:0:up", "unet.conv_in.lora_A.weight"])[2] != "indexed"
    assert formats.read_modules([]) == ([], {}, "unknown")


@pytest.mark.parametrize("encoder", ["clip_l", "qwen3_8b", "gemma3_4b", "one_to_come"])
def test_any_encoder_of_comfyui_is_told_by_its_prefix(encoder: str) -> None:
    key = split_key(f"text_encoders.{encoder}.transformer.model.layers.0.mlp.up_proj.lora_A.weight")
    assert key is not None
    assert (key.component, key.name, key.slot) == (f"encoder:{encoder}", "model.layers.0.mlp.up_proj", "down")
