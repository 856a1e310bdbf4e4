"""Reading: every spelling of every family says the ΔW that was put into it, under diffusers' names."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from random_files import RANK, RandomFile, accounts, assert_says
from spelled_files import ALPHA, SPELLINGS, H, flux_kohya, peft_config
from test_files import assert_says_all_four

from lora_loaders.conversion import parse, read_adapter, with_live_names
from lora_loaders.errors import (
    AdapterFileError,
    ConversionError,
    MalformedAdapterError,
    UnknownFamilyError,
    UnknownFormatError,
)
from lora_loaders.files import Contents
from lora_loaders.writing import to_tensors


@pytest.fixture(params=SPELLINGS)
def file(request: pytest.FixtureRequest) -> RandomFile:
    return SPELLINGS[request.param]()


def test_every_spelling_says_up_times_down_times_alpha_over_rank(file: RandomFile) -> None:
    assert_says(file.read(), file.expected)


def test_every_key_of_every_spelling_is_bound(file: RandomFile) -> None:
    adapter = file.read()
    assert set(adapter.bound) == set(file.tensors)
    assert {path for paths in adapter.bound.values() for path in paths} == set(file.expected)
    assert not adapter.ignored
    assert not adapter.unresolved


@pytest.mark.parametrize("name", SPELLINGS)
def test_order_of_keys_does_not_matter(name: str) -> None:
    file = SPELLINGS[name]()
    file.tensors = dict(reversed(file.tensors.items()))
    assert_says(file.read(), file.expected)


def test_container_stands_for_its_first_child() -> None:
    """2023's `to_out_lora` is `to_out.0`, which alone has a weight."""
    file = RandomFile("sdxl", "processor")
    block = "down_blocks.2.attentions.0.transformer_blocks.2.attn1"
    file.lora(f"unet.{block}.processor.to_out", f"unet.{block}.to_out.0", H, H)
    assert_says(file.read(), file.expected)


@pytest.mark.parametrize("alpha", [torch.tensor([6.0]), torch.tensor([[6.0]]), torch.tensor(6, dtype=torch.int64)])
def test_alpha_may_be_a_vector_of_one_or_an_integer(alpha: torch.Tensor) -> None:
    file = RandomFile("flux1")
    file.lora("lora_unet_img_in", "transformer.x_embedder", H, H, scaling=6 / RANK)
    file.tensors["lora_unet_img_in.alpha"] = alpha
    assert_says(file.read(), file.expected)


def test_alpha_of_zero_means_the_rank() -> None:
    file = RandomFile("flux1")
    file.lora("lora_unet_img_in", "transformer.x_embedder", H, H, scaling=1)
    file.tensors["lora_unet_img_in.alpha"] = torch.tensor(0.0)
    assert_says(file.read(), file.expected)


def test_stored_alpha_is_never_scaled_again_by_rslora() -> None:
    file = RandomFile("flux1", config=peft_config(use_rslora=True))
    file.lora("lora_unet_img_in", "transformer.x_embedder", H, H, alpha=ALPHA)
    assert_says(file.read(), file.expected)


def test_half_underscored_and_doubled_prefixes_are_read() -> None:
    file = RandomFile("sdxl")
    block = "up_blocks.0.attentions.0.transformer_blocks.5"
    file.lora("lora_unet_up_blocks_0_attentions_0_transformer_blocks_5_attn1.to_k", f"unet.{block}.attn1.to_k", H, H)
    file.lora("lora_unet__up_blocks_0_attentions_0_transformer_blocks_5_attn1_to_q", f"unet.{block}.attn1.to_q", H, H)
    file.lora("lora_unet_up_blocks_0_attentions_0_transformer_blocks_5_ff_net_2_", f"unet.{block}.ff.net.2", H, H)
    assert_says(file.read(), file.expected)


def test_dictionary_and_file_say_the_same(tmp_path: Path) -> None:
    file = flux_kohya()
    safetensors.torch.save_file(file.tensors, tmp_path / "a.safetensors")
    assert_says(read_adapter(tmp_path / "a.safetensors", family="flux1"), file.expected)
    assert_says(read_adapter(file.tensors, family="flux1"), file.expected)


def test_peft_folder_is_read_with_its_configuration(tmp_path: Path) -> None:
    file = SPELLINGS["flux peft folder"]()
    safetensors.torch.save_file(file.tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(file.config))
    assert_says(read_adapter(tmp_path, family="flux1"), file.expected)


def test_adapter_is_returned_as_it_is() -> None:
    adapter = flux_kohya().read()
    assert read_adapter(adapter) is adapter


# Biases, magnitudes, full differences, replaced weights.


def with_up_bias(stem: str, path: str, rows: int, **options: object) -> RandomFile:
    file = RandomFile("flux1", "peft")
    file.lora(stem, path, rows, H, **options)  # pyright: ignore[reportArgumentType]
    file.tensors[f"{stem}.lora_B.bias"] = file.randn(rows)
    return file


def test_bias_of_the_final_modulation_is_swapped_with_its_rows() -> None:
    """BFL's control file: diffusers 0.42.1 swaps lora_A as well, which is wrong (formats.md 5.1, defect 3)."""
    stem = "final_layer.adaLN_modulation.1"
    file = with_up_bias(stem, "transformer.norm_out.linear", 2 * H, swap=True)
    adapter = file.read()
    assert_says(adapter, file.expected)
    bias = file.tensors[f"{stem}.lora_B.bias"]
    swapped = adapter.deltas["transformer"]["norm_out.linear"].delta_bias()
    assert swapped is not None
    assert torch.equal(swapped, torch.cat([bias[H:], bias[:H]]))


def test_bias_of_a_fused_module_is_cut_with_its_rows() -> None:
    stem = "double_blocks.0.img_attn.qkv"
    paths = [f"transformer.transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    file = with_up_bias(stem, paths, 3 * H)  # pyright: ignore[reportArgumentType]
    deltas = file.read().deltas["transformer"]
    parts = file.tensors[f"{stem}.lora_B.bias"].split(H)
    for path, part in zip(paths, parts, strict=True):
        bias = deltas[path.removeprefix("transformer.")].delta_bias()
        assert bias is not None
        assert torch.equal(bias, part)


def test_lora_bias_is_scaled_and_diff_b_is_not() -> None:
    up_bias, diff_b = torch.randn(H).double(), torch.randn(H).double()
    biases: list[torch.Tensor] = []
    for suffix, bias in ((".lora_up.bias", up_bias), (".diff_b", diff_b)):
        file = RandomFile("flux1")
        file.lora("lora_unet_img_in", "transformer.x_embedder", H, H, alpha=2)
        file.tensors[f"lora_unet_img_in{suffix}"] = bias
        found_bias = file.read().deltas["transformer"]["x_embedder"].delta_bias()
        assert found_bias is not None
        biases.append(found_bias.double())
    torch.testing.assert_close(biases[0], up_bias * 2 / RANK)
    assert torch.equal(biases[1], diff_b)


def test_full_difference_of_a_fused_module_is_cut_and_swapped_by_rows() -> None:
    file = RandomFile("flux1")
    whole, final, norm = file.randn(7 * H, H), file.randn(2 * H, H), file.randn(8)
    file.tensors = {
        "diffusion_model.single_blocks.0.linear1.diff": whole,
        "diffusion_model.final_layer.adaLN_modulation.1.diff": final,
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": norm,
    }
    single = "transformer.single_transformer_blocks.0"
    parts = [*(f"{single}.attn.{name}" for name in ("to_q", "to_k", "to_v")), f"{single}.proj_mlp"]
    file.expect(parts, whole, (1, 1, 1, 4))
    file.expect("transformer.norm_out.linear", final, swap=True)
    file.expect("transformer.transformer_blocks.0.attn.norm_q", norm)
    assert_says(file.read(), file.expected)


def test_replaced_norm_scale_is_the_difference_to_the_base() -> None:
    file = RandomFile("flux1")
    value, base = file.randn(8), file.randn(8)
    file.tensors = {"double_blocks.0.img_attn.norm.key_norm.scale": value}
    delta = file.read().deltas["transformer"]["transformer_blocks.0.attn.norm_k"]
    torch.testing.assert_close(delta.delta_weight(base), value - base)


def dora_change(base: torch.Tensor, change: torch.Tensor, magnitude: torch.Tensor, axis: int) -> torch.Tensor:
    """m · V / ‖V‖ − W with the norm over all axes but `axis`, written out in float64."""
    direction = base.double() + change.double()
    others = [other for other in range(direction.ndim) if other != axis]
    shape = [1] * direction.ndim
    shape[axis] = -1
    norm = direction.square().sum(others, keepdim=True).sqrt()
    return magnitude.double().view(shape) * direction / norm - base.double()


DORA: dict[str, tuple[str, str, tuple[int, ...], tuple[int, ...], int]] = {
    # suffix, style, kernel, shape of the magnitude, axis that it runs along
    "dora_scale per output": (".dora_scale", "kohya", (), (2 * H, 1), 0),
    "dora_scale per input": (".dora_scale", "kohya", (), (1, H), 1),
    "dora_scale per output, conv": (".dora_scale", "kohya", (3, 3), (2 * H, 1, 1, 1), 0),
    "dora_scale per input, conv": (".dora_scale", "kohya", (3, 3), (1, H, 1, 1), 1),
    "dora_scale flat": (".dora_scale", "kohya", (), (2 * H,), 0),
    "PEFT": (".lora_magnitude_vector", "peft", (), (2 * H,), 0),
    "PEFT in a slot": (".lora_magnitude_vector.default.weight", "peft-slot", (), (2 * H,), 0),
    "PEFT, conv": (".lora_magnitude_vector", "peft", (3, 3), (1, 2 * H, 1, 1), 0),
    "PEFT with weight, conv": (".lora_magnitude_vector.weight", "peft", (3, 3), (1, 2 * H, 1, 1), 0),
    "ai-toolkit": (".magnitude", "peft", (), (2 * H,), 0),
}


@pytest.mark.parametrize("case", DORA)
def test_shape_of_the_magnitude_tells_the_axis_of_dora(case: str) -> None:
    suffix, style, kernel, shape, axis = DORA[case]
    stem, path = "unet.down_blocks.0.resnets.0.conv1", "unet.down_blocks.0.resnets.0.conv1"
    file = RandomFile("sd15", style)
    file.lora(stem, path, 2 * H, H, kernel)
    magnitude, base = file.randn(*shape).abs(), file.randn(2 * H, H, *kernel)
    file.tensors[stem + suffix] = magnitude
    delta = file.read().deltas["unet"]["down_blocks.0.resnets.0.conv1"]
    wanted = dora_change(base, file.expected[path], magnitude.flatten(), axis)
    torch.testing.assert_close(delta.delta_weight(base), wanted)


def test_alpha_scales_the_direction_of_dora() -> None:
    file = RandomFile("flux1")
    file.lora("lora_unet_img_in", "transformer.x_embedder", 2 * H, H, alpha=ALPHA)
    magnitude, base = file.randn(2 * H, 1).abs(), file.randn(2 * H, H)
    file.tensors["lora_unet_img_in.dora_scale"] = magnitude
    delta = file.read().deltas["transformer"]["x_embedder"]
    wanted = dora_change(base, file.expected["transformer.x_embedder"], magnitude.flatten(), 0)
    torch.testing.assert_close(delta.delta_weight(base), wanted)


def test_magnitude_per_output_is_cut_with_the_rows_of_a_fused_module() -> None:
    file = RandomFile("flux1")
    paths = [f"transformer.transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    file.lora("lora_unet_double_blocks_0_img_attn_qkv", paths, 3 * H, H)
    magnitude, base = file.randn(3 * H, 1).abs(), file.randn(3 * H, H)
    file.tensors["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"] = magnitude
    deltas = file.read().deltas["transformer"]
    whole = dora_change(base, torch.cat([file.expected[path] for path in paths]), magnitude.flatten(), 0)
    for path, part, rows in zip(paths, whole.split(H), base.split(H), strict=True):
        torch.testing.assert_close(deltas[path.removeprefix("transformer.")].delta_weight(rows), part)


def test_magnitude_per_input_of_a_fused_module_is_read_and_written_back() -> None:
    file = RandomFile("flux1")
    file.lora("lora_unet_double_blocks_0_img_attn_qkv", "", 3 * H, H)
    file.tensors["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"] = file.randn(1, H)
    adapter = file.read()
    assert len(adapter.deltas["transformer"]) == 3
    written, _, _ = to_tensors(adapter, "kohya")
    assert written.keys() - {"lora_unet_double_blocks_0_img_attn_qkv.alpha"} == file.tensors.keys()
    assert all(torch.equal(tensor, written[key]) for key, tensor in file.tensors.items())


def test_a_change_that_cannot_be_cut_is_not_called_damage() -> None:
    file = RandomFile("flux1")
    file.tensors["lora_unet_double_blocks_0_img_attn_qkv.ia3_l"] = file.randn(1, 3 * H, 1, 1)
    with pytest.raises(ConversionError, match="inputs or of outputs") as caught:
        file.read()
    assert "damaged" not in str(caught.value)


# Damaged and contradictory files.


def pair(stem: str = "lora_unet_img_in", rank: int = RANK) -> dict[str, torch.Tensor]:
    return {f"{stem}.lora_down.weight": torch.randn(rank, H), f"{stem}.lora_up.weight": torch.randn(H, rank)}


DAMAGED: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "down alone": ({"lora_unet_img_in.lora_down.weight": torch.ones(4, H)}, "up missing"),
    "up alone": ({"lora_unet_img_in.lora_up.weight": torch.ones(H, 4)}, "down missing"),
    "ranks differ": (pair() | {"lora_unet_img_in.lora_up.weight": torch.ones(H, 5)}, "do not multiply"),
    "vectors": (
        {f"lora_unet_img_in.lora_{end}.weight": torch.ones(4) for end in ("down", "up")},
        "have rows and columns",
    ),
    "alpha is NaN": (pair() | {"lora_unet_img_in.alpha": torch.tensor(float("nan"))}, "alpha is nan"),
    "alpha is infinite": (pair() | {"lora_unet_img_in.alpha": torch.tensor(float("inf"))}, "alpha is inf"),
    "alpha is a vector": (pair() | {"lora_unet_img_in.alpha": torch.ones(3)}, "alpha has 3 values"),
    "alpha is empty": (pair() | {"lora_unet_img_in.alpha": torch.ones(0)}, "alpha has 0 values"),
    "two algebras": (pair() | {"lora_unet_img_in.diff": torch.ones(H, H)}, "does not belong"),
    "qkv that is no multiple of three": (
        {
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, H),
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(3 * H + 1, 4),
        },
        "cannot be cut into to_q | to_k | to_v",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_module_is_named_with_the_reason(damage: str) -> None:
    tensors, reason = DAMAGED[damage]
    with pytest.raises(MalformedAdapterError) as caught:
        parse(Contents({**pair("lora_unet_txt_in"), **tensors}), "flux1")
    assert reason in "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 1
    name = "double_blocks_0_img_attn_qkv" if "qkv" in damage else "img_in"
    assert_says_all_four(caught.value, name)


def test_all_damaged_modules_are_named_at_once() -> None:
    tensors = {f"lora_unet_double_blocks_{i}_img_mod_lin.lora_down.weight": torch.ones(4, H) for i in range(19)}
    with pytest.raises(MalformedAdapterError, match="and 7 more") as caught:
        parse(Contents(tensors), "flux1")
    assert len(caught.value.problems) == 19


def test_file_without_adapter_keys_is_of_an_unknown_format() -> None:
    tensors = {"model.conv.kernel": torch.ones(3, 3), "model.conv.offset": torch.ones(3)}
    with pytest.raises(UnknownFormatError) as caught:
        read_adapter(tensors)
    assert_says_all_four(caught.value, "model.conv.kernel: no known suffix")


def test_empty_dictionary_is_of_an_unknown_format() -> None:
    with pytest.raises(UnknownFormatError, match="a dictionary is empty"):
        read_adapter({})


def test_whole_checkpoint_is_not_taken_for_an_adapter() -> None:
    tensors = {f"double_blocks.{i}.img_attn.qkv.weight": torch.ones(3 * H, H) for i in range(3)}
    with pytest.raises(AdapterFileError):
        read_adapter(tensors)


def test_unknown_family_name_lists_the_families() -> None:
    with pytest.raises(UnknownFamilyError, match="flux1") as caught:
        read_adapter(pair(), family="flux-one")
    assert "no family 'flux-one'" in str(caught.value)


def test_keys_with_unknown_suffix_are_reported_beside_the_others() -> None:
    adapter = parse(Contents({**pair(), "lora_unet_img_in.mystery": torch.ones(1)}), "flux1")
    assert adapter.ignored == {"lora_unet_img_in.mystery": "no known suffix"}
    assert adapter.components == {"transformer": 1}


def test_alpha_without_factors_is_reported() -> None:
    adapter = parse(Contents({**pair(), "lora_unet_txt_in.alpha": torch.tensor(1.0)}), "flux1")
    assert "alpha without" in adapter.ignored["lora_unet_txt_in.alpha"]


def test_unknown_module_is_kept_as_unresolved_with_its_reason() -> None:
    adapter = parse(Contents({**pair(), **pair("lora_unet_no_such_module")}), "flux1")
    (module,) = adapter.unresolved
    assert (module.component, module.name, module.reason) == (
        *("transformer", "no_such_module", "no such name in this family"),
    )
    assert set(module.keys) == set(pair("lora_unet_no_such_module"))
    assert accounts(adapter) == {*pair(), *pair("lora_unet_no_such_module")}


def test_helper_keys_of_sliders_and_controlnets_are_left_out_with_the_reason() -> None:
    tensors = {**pair(), "_aux.scale": torch.ones(1), **pair("lora_controlnet_img_in")}
    adapter = parse(Contents(tensors), "flux1")
    assert adapter.components == {"transformer": 1}
    assert set(adapter.ignored) == {"_aux.scale", *pair("lora_controlnet_img_in")}
    assert all(adapter.ignored.values())


def test_two_sources_for_one_module_are_refused() -> None:
    """Never a sum, never the last: kohya and PEFT duplicates in one file."""
    flat = pair("lora_unet_transformer_blocks_0_attn_to_q")
    dotted = pair("transformer.transformer_blocks.0.attn.to_q")
    with pytest.raises(MalformedAdapterError) as caught:
        parse(Contents({**flat, **dotted}), "flux1")
    (problem,) = caught.value.problems
    assert "transformer.transformer_blocks.0.attn.to_q: both" in problem
    assert_says_all_four(caught.value, "to_q")


def test_one_key_in_two_spellings_of_a_suffix_is_reported() -> None:
    """`lora_A.weight` and `lora_down.weight` of one module, equal: one is used, the other named."""
    own = pair()
    other = {
        "lora_unet_img_in.lora_A.weight": own["lora_unet_img_in.lora_down.weight"].clone(),
        "lora_unet_img_in.lora_B.weight": own["lora_unet_img_in.lora_up.weight"].clone(),
    }
    adapter = parse(Contents({**own, **other}), "flux1")
    assert set(adapter.ignored) == set(other)
    assert adapter.deltas["transformer"]["x_embedder"].delta_weight().any()


def test_one_key_in_two_spellings_with_other_numbers_is_an_error() -> None:
    own = pair()
    other = {"lora_unet_img_in.lora_A.weight": own["lora_unet_img_in.lora_down.weight"] + 1}
    with pytest.raises(MalformedAdapterError, match=r"differ(.|\n)*several adapters"):
        parse(Contents({**own, **other}), "flux1")


@pytest.mark.parametrize("fused_first", [True, False])
def test_exact_name_goes_before_a_part_of_a_fused_one(fused_first: bool) -> None:
    """diffusers issue 13203: files that carry both; the split tensors are the newer ones."""
    file = RandomFile("flux1")
    block = "transformer_blocks.0.attn"
    paths = [f"transformer.{block}.{name}" for name in ("to_q", "to_k", "to_v")]
    file.lora("transformer.double_blocks.0.img_attn.qkv", paths, 3 * H, H)
    fused = set(file.tensors)
    file.lora(f"transformer.{block}.to_k", f"transformer.{block}.to_k", H, H)
    if not fused_first:
        file.tensors = dict(reversed(file.tensors.items()))
    adapter = file.read()
    assert_says(adapter, file.expected)
    for key in fused:
        assert set(adapter.bound[key]) == {paths[0], paths[2]}
    assert accounts(adapter) == set(file.tensors)


@pytest.mark.parametrize("fused_first", [True, False])
def test_fused_module_that_is_wholly_given_by_exact_names_is_ignored(fused_first: bool) -> None:
    file = RandomFile("flux1")
    block = "transformer_blocks.0.attn"
    names = ("to_q", "to_k", "to_v")
    file.lora("transformer.double_blocks.0.img_attn.qkv", [f"transformer.{block}.{n}" for n in names], 3 * H, H)
    fused = set(file.tensors)
    for name in names:
        file.lora(f"transformer.{block}.{name}", f"transformer.{block}.{name}", H, H)
    if not fused_first:
        file.tensors = dict(reversed(file.tensors.items()))
    adapter = file.read()
    assert_says(adapter, file.expected)
    assert set(adapter.ignored) == fused
    assert not fused & set(adapter.bound)


def test_learned_tokens_are_kept_beside_the_deltas() -> None:
    token = torch.randn(768)
    adapter = parse(Contents({**pair(), "bundle_emb.sks.clip_l": token}), "flux1")
    assert torch.equal(adapter.embeddings["bundle_emb.sks.clip_l"], token)
    assert accounts(adapter) == {*pair(), "bundle_emb.sks.clip_l"}


# Telling the family.

PUBLISHED: dict[str, tuple[str, str, int, int]] = {
    # a module's name in a file, the family, rows and inputs in the published model
    "flux1, original": ("diffusion_model.double_blocks.0.img_attn.qkv", "flux1", 9216, 3072),
    "flux1, kohya": ("lora_unet_single_blocks_0_modulation_lin", "flux1", 9216, 3072),
    "flux1, diffusers": ("transformer.single_transformer_blocks.0.proj_mlp", "flux1", 12288, 3072),
    "flux1, xlabs": ("double_blocks.0.processor.qkv_lora1", "flux1", 9216, 3072),
    "sd15": ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", "sd15", 320, 768),
    "sd2": ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", "sd2", 320, 1024),
    "sdxl, sgm": ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", "sdxl", 640, 2048),
    "sdxl, diffusers": ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "sdxl", 640, 2048),
    "qwen-image": ("transformer.transformer_blocks.0.img_mod.1", "qwen-image", 18432, 3072),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_family_is_told_by_names_and_widths(case: str) -> None:
    stem, family, rows, columns = PUBLISHED[case]
    file = RandomFile("", dtype=torch.float16, style="xlabs" if "xlabs" in case else "kohya")
    file.lora(stem, "", rows, columns)
    assert read_adapter(file.tensors).family == family


def test_callers_family_settles_a_tie() -> None:
    file = RandomFile("")
    file.lora("transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_q", 3072, 3072)
    for family in ("flux1", "qwen-image"):
        assert read_adapter(file.tensors, family=family).family == family


FORMATS = {
    "flux kohya": "kohya",
    "flux original": "original",
    "flux bfl": "bfl",
    "flux xlabs": "xlabs",
    "flux onetrainer": "onetrainer",
    "flux diffusers": "diffusers",
    "flux diffusers dotted": "diffusers-old",
    "flux peft folder": "peft",
    "flux peft slot": "peft",
    "sdxl kohya": "kohya",
    "sdxl old processors": "diffusers-old",
    "sd15 kohya": "kohya",
    "qwen lycoris": "lycoris",
    "qwen ai toolkit": "original",
}


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_told_by_the_keys(name: str) -> None:
    assert SPELLINGS[name]().read().format == FORMATS[name]


# A live model's sizes and names.


class Sizes:
    """A model's sizes and names by hand."""

    def __init__(self, rows: dict[str, int], names: dict[str, str] | None = None) -> None:
        self._rows = rows
        self._names = names or {}

    def rows(self, component: str, path: str) -> int | None:
        return self._rows.get(f"{component}.{path}")

    def blocks(self, component: str, path: str) -> int | None:
        return None

    def find(self, component: str, name: str) -> str | None:
        return self._names.get(f"{component}.{name}")


def test_live_model_says_where_a_fused_module_is_cut() -> None:
    """A model with another mlp ratio: the published proportions would cut elsewhere."""
    file = RandomFile("flux1")
    file.lora("lora_unet_single_blocks_0_linear1", "", 6 * H, H)
    change = file.expected.pop("")
    single = "transformer.single_transformer_blocks.0"
    rows = {f"{single}.attn.{name}": H for name in ("to_q", "to_k", "to_v")} | {f"{single}.proj_mlp": 3 * H}
    file.expected = dict(zip(rows, change.split(list(rows.values())), strict=True))
    assert_says(parse(file.contents(), "flux1", Sizes(rows)), file.expected)


def test_live_model_names_what_the_tables_do_not_hold() -> None:
    file = RandomFile("flux1")
    file.lora("lora_unet_my_new_gate", "transformer.my_new.gate", H, H, alpha=ALPHA)
    layout = Sizes({}, {"transformer.my_new_gate": "my_new.gate"})
    assert_says(parse(file.contents(), "flux1", layout), file.expected)
    later = with_live_names(file.read(), layout)
    assert_says(later, file.expected)
    assert not later.unresolved
    assert set(later.bound) == set(file.tensors)


def test_a_malformed_module_counts_once_however_many_it_changes() -> None:
    keys: dict[str, torch.Tensor] = {}
    for stem in ("lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv"):
        keys[f"{stem}.lora_up.weight"], keys[f"{stem}.lora_down.weight"] = torch.randn(96, 2), torch.randn(2, 32)
    with pytest.raises(MalformedAdapterError, match="1 of 2 modules are malformed") as caught:
        read_adapter(keys, family="flux1")
    assert len(caught.value.problems) == 3
