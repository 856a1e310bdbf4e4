"""Writing: what was read is written in every spelling that can say it, and read back without a changed bit."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import tiny_models
import torch
from filled_manifests import IMPOSSIBLE, small
from random_files import RANK, RandomFile, assert_says, found, same_bits, same_tensors
from shared_files import manifests
from spelled_files import ALPHA, SPELLINGS, H, flux_kohya
from test_files import assert_says_all_four
from test_manifests import pipeline  # noqa: F401  # a fixture
from torch import nn

import lora_loaders as ll
from lora_loaders.adapter import Adapter
from lora_loaders.conversion import parse, read_adapter
from lora_loaders.converting import convert
from lora_loaders.deltas import Delta, DoraDelta, LoraDelta, build
from lora_loaders.errors import AdapterFileError, ConversionError, MalformedAdapterError, UnknownFormatError
from lora_loaders.files import Contents, read_header
from lora_loaders.formats import FORMATS
from lora_loaders.writing import to_tensors, write_adapter

TARGETS = ("peft", "diffusers", "diffusers-old", "kohya", "original", "bfl", "xlabs", "onetrainer", "lycoris")
EMPTY = (*IMPOSSIBLE, "lorainspector_snap_alpha_keys")  # of the last only the alphas are known
LISTINGS = {m.name: m for m in manifests("sd15", "sdxl", "flux1", "qwen-image") if m.name not in EMPTY}


def there_and_back(adapter: Adapter, target: str) -> Adapter | ConversionError:
    """Written and read again, or the refusal."""
    try:
        tensors, metadata, config = to_tensors(adapter, target)
    except ConversionError as error:
        return error
    contents = Contents(tensors, metadata, config if target == "peft" else None)
    again = parse(contents, adapter.family)
    assert set(again.bound) | set(again.embeddings) == set(tensors)
    return again


def through(adapter: Adapter, target: str) -> Adapter:
    """Written and read again, where the format can say it."""
    again = there_and_back(adapter, target)
    assert isinstance(again, Adapter), again
    return again


def scale_of(delta: Delta) -> float | None:
    inner = delta.inner if isinstance(delta, DoraDelta) else delta
    return inner.scaling if isinstance(inner, LoraDelta) else delta.alpha_value


def assert_same_delta(one: Delta, other: Delta, label: str) -> None:
    assert type(one) is type(other), label
    mine, theirs = one.tensors(), other.tensors()
    assert mine.keys() == theirs.keys(), label
    for name, tensor in mine.items():
        # A magnitude is written as a row, a column or flat, as the format has it.
        shaped = theirs[name].reshape(tensor.shape) if name == "magnitude" else theirs[name]
        assert same_bits(tensor, shaped), f"{label} {name}"
    assert scale_of(one) == scale_of(other), label


def assert_same_adapter(one: Adapter, other: Adapter) -> None:
    """The same deltas bit for bit; a module that only the other has changes nothing."""
    theirs = {(component, path): delta for component, path, delta in other.modules()}
    for component, path, delta in one.modules():
        assert_same_delta(delta, theirs.pop((component, path)), f"{component}.{path}")
    for (component, path), delta in theirs.items():
        assert not delta.delta_weight().any(), f"{component}.{path} came from nowhere"


READ: dict[str, Adapter] = {}


@pytest.fixture(params=LISTINGS)
def adapter(
    request: pytest.FixtureRequest,
    pipeline: Callable[[str], dict[str, nn.Module]],  # noqa: F811
) -> Adapter:
    """A published file's layout at a sixteenth of its width, filled with random numbers."""
    name = request.param
    if name not in READ:
        manifest = LISTINGS[name]
        models = {} if manifest.has_shapes else pipeline(manifest.family)
        read = parse(Contents(small(manifest, models), label=name), manifest.family)
        READ[name] = replace(read, unresolved=())  # names that a unit test made up
    return READ[name]


@pytest.mark.parametrize("target", TARGETS)
def test_published_layouts_come_back_bit_for_bit_or_are_refused_by_module(adapter: Adapter, target: str) -> None:
    again = there_and_back(adapter, target)
    if isinstance(again, ConversionError):
        known = {component for component, _, _ in adapter.modules()}
        assert all(problem.startswith((*known, "one model a file")) for problem in again.problems)
        assert_says_all_four(again, again.problems[0])
    else:
        assert_same_adapter(adapter, again)


def test_chain_of_formats_ends_in_the_same_file(adapter: Adapter) -> None:
    """kohya -> original -> diffusers -> kohya: keys, bits and alphas."""
    try:
        first, metadata, _ = to_tensors(adapter, "kohya")
        to_tensors(adapter, "diffusers")
    except ConversionError:
        pytest.skip("one of the formats cannot say it; the test above holds which")
    current = parse(Contents(first, metadata), adapter.family)
    for target in ("original", "diffusers", "kohya"):
        tensors, metadata, _ = to_tensors(current, target)
        current = parse(Contents(tensors, metadata), adapter.family)
    # A module without an alpha beside others with one comes back with alpha = rank, which says the same.
    assert same_tensors(without_alphas(tensors), without_alphas(first))
    assert all(tensors[key].item() == first[key].item() for key in first.keys() - without_alphas(first).keys())
    assert_same_adapter(adapter, current)


def without_alphas(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}


CANONICAL = ["invokeai_flux_lora_kohya_with_te1_format", "lorainspector_flux1_kohya", "lorainspector_sd15_kohya"]


@pytest.mark.parametrize("name", [name for name in CANONICAL if name in LISTINGS])
def test_kohya_file_comes_back_as_the_very_file_that_it_was(name: str) -> None:
    tensors = small(LISTINGS[name], {})
    adapter = parse(Contents(tensors), LISTINGS[name].family)
    for target in ("kohya", "diffusers-old", "onetrainer"):
        again = through(adapter, target)
        assert same_tensors(to_tensors(again, "kohya")[0], tensors)


# Every hand-written spelling to every format.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_change_of_the_weights_survives_every_pair_of_spellings(name: str, target: str) -> None:
    file = SPELLINGS[name]()
    again = there_and_back(file.read(), target)
    if isinstance(again, ConversionError):
        assert again.problems
        return
    zero = {path: change for path, change in found(again).items() if path not in file.expected}
    assert not any(change.any() for change in zero.values())
    assert_says(again, file.expected | zero)


CAN_SAY = {
    "flux kohya": {"diffusers", "diffusers-old", "kohya", "original", "onetrainer"},
    "flux original": {"peft", "diffusers", "diffusers-old", "kohya", "original", "bfl", "onetrainer", "lycoris"},
    "flux xlabs": set(TARGETS),
    "sdxl kohya": {"diffusers", "diffusers-old", "kohya", "original", "onetrainer"},
    "sd15 kohya": {"diffusers", "diffusers-old", "kohya", "original", "onetrainer"},
    "qwen kohya": {"diffusers", "diffusers-old", "kohya", "original", "onetrainer"},
    "qwen diffusers": {"diffusers", "diffusers-old", "kohya", "original", "onetrainer"},
    "qwen lightning": set(TARGETS) - {"xlabs"},
}


@pytest.mark.parametrize("name", CAN_SAY)
def test_no_format_refuses_what_it_can_say(name: str) -> None:
    able: set[str] = set()
    for target in TARGETS:
        try:
            to_tensors(SPELLINGS[name]().read(), target)
            able.add(target)
        except ConversionError:
            pass
    assert able == CAN_SAY[name]


# Alpha.

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def folded(dtype: torch.dtype, alpha: float, rank: int = RANK) -> RandomFile:
    file = RandomFile("flux1", dtype=dtype)
    path = "transformer.transformer_blocks.0.attn.to_out.0"
    file.lora("lora_unet_double_blocks_0_img_attn_proj", path, H, H, alpha=alpha, rank=rank)
    return file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_alpha_is_folded_in_where_that_is_exact(dtype: torch.dtype) -> None:
    file = folded(dtype, 2.0)
    tensors, _, _ = to_tensors(file.read(), "xlabs")
    assert set(tensors) == {f"double_blocks.0.processor.proj_lora1.{end}.weight" for end in ("down", "up")}
    up = file.tensors["lora_unet_double_blocks_0_img_attn_proj.lora_up.weight"]
    assert same_bits(tensors["double_blocks.0.processor.proj_lora1.up.weight"], up / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_folding_refuses_to_round(dtype: torch.dtype) -> None:
    with pytest.raises(ConversionError, match="without rounding") as caught:
        to_tensors(folded(dtype, 1.0, rank=3).read(), "xlabs")
    assert "transformer.double_blocks.0.processor.proj_lora1" in caught.value.problems[0]


def test_diffusers_header_states_ranks_and_alphas_as_diffusers_does() -> None:
    file = RandomFile("flux1")
    file.lora("lora_unet_img_in", "transformer.x_embedder", H, H, alpha=ALPHA)
    file.lora("lora_unet_txt_in", "transformer.context_embedder", H, H, alpha=ALPHA)
    file.lora("lora_unet_final_layer_linear", "transformer.proj_out", H, H, alpha=5, rank=8)
    _, metadata, _ = to_tensors(file.read(), "diffusers")
    said = json.loads(metadata["lora_adapter_metadata"])
    assert metadata["format"] == "pt"
    assert (said["transformer.r"], said["transformer.lora_alpha"]) == (RANK, ALPHA)
    assert said["transformer.rank_pattern"] == {"^proj_out": 8}
    assert said["transformer.alpha_pattern"] == {"^proj_out": 5}
    assert said["transformer.target_modules"] == ["context_embedder", "proj_out", "x_embedder"]
    assert said["transformer.use_rslora"] is False


def test_pattern_of_one_module_does_not_reach_another_whose_name_ends_alike() -> None:
    """`proj_out` is also the end of `single_transformer_blocks.0.proj_out`."""
    file = RandomFile("flux1")
    file.lora("lora_unet_single_blocks_0_linear2", "transformer.single_transformer_blocks.0.proj_out", H, H, alpha=4)
    file.lora("lora_unet_single_blocks_1_linear2", "transformer.single_transformer_blocks.1.proj_out", H, H, alpha=4)
    file.lora("lora_unet_final_layer_linear", "transformer.proj_out", H, H, alpha=2)
    for target in ("diffusers", "peft"):
        assert_says(through(file.read(), target), file.expected)


def test_file_without_alpha_gets_none() -> None:
    adapter = SPELLINGS["flux original"]().read()
    tensors, metadata, _ = to_tensors(adapter, "kohya")
    assert not [key for key in tensors if key.endswith(".alpha")]
    assert metadata["ss_network_alpha"] == metadata["ss_network_dim"]  # a scaling of 1
    assert "lora_adapter_metadata" not in to_tensors(adapter, "diffusers")[1]


def test_rslora_is_said_by_the_configuration_and_else_multiplied_into_alpha() -> None:
    file = SPELLINGS["flux peft rslora"]()
    adapter = file.read()
    assert to_tensors(adapter, "peft")[2]["use_rslora"] is True
    alpha = to_tensors(adapter, "kohya")[0]["lora_unet_img_in.alpha"]
    assert alpha.item() == pytest.approx(8 * RANK**0.5)
    for target in ("peft", "diffusers", "kohya", "original"):
        assert_says(through(adapter, target), file.expected)


def test_mixed_rslora_and_plain_modules_keep_their_scalings() -> None:
    file = RandomFile("flux1")
    file.lora("lora_unet_img_in", "transformer.x_embedder", H, H, alpha=ALPHA)
    file.lora("lora_unet_txt_in", "transformer.context_embedder", H, H, alpha=ALPHA)
    adapter = file.read()
    module = adapter.deltas["transformer"]["x_embedder"]
    assert isinstance(module, LoraDelta)
    mixed = replace(
        adapter, deltas={"transformer": {**adapter.deltas["transformer"], "x_embedder": replace(module, rslora=True)}}
    )
    file.expected["transformer.x_embedder"] *= RANK / RANK**0.5
    for target in ("diffusers", "peft", "kohya"):
        assert_says(through(mixed, target), file.expected)


def test_kohya_header_names_network_rank_and_alpha() -> None:
    metadata = to_tensors(flux_kohya().read(), "kohya")[1]
    assert metadata["ss_network_module"] == "networks.lora_flux"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (str(RANK), f"{ALPHA:g}")


def test_kohya_header_is_of_the_joined_tensors_whatever_the_source_said() -> None:
    file = RandomFile(
        "flux1", metadata={"ss_network_dim": "4", "ss_network_alpha": "4", "ss_network_module": "my.lora"}
    )
    for name in ("to_q", "to_k", "to_v"):
        path = f"transformer.transformer_blocks.0.attn.{name}"
        file.lora(path, path, H, H, style="peft")
    tensors, metadata, _ = to_tensors(file.read(), "kohya")
    (down,) = [tensor for key, tensor in tensors.items() if key.endswith("lora_down.weight")]
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (str(len(down)), str(len(down)))
    assert (len(down), metadata["ss_network_module"]) == (3 * RANK, "my.lora")


def test_header_alpha_is_not_applied_a_second_time_to_folded_factors() -> None:
    file = RandomFile("flux1", metadata={"ss_network_dim": str(RANK), "ss_network_alpha": "2.0"})
    path = "transformer.transformer_blocks.0.attn.to_out.0"
    file.lora("lora_unet_double_blocks_0_img_attn_proj", path, H, H, scaling=2 / RANK)
    assert_says(through(file.read(), "xlabs"), file.expected)


def test_kohya_header_gives_no_alpha_to_modules_without_one() -> None:
    file = RandomFile("flux1")
    file.lora("lora_unet_img_in", "transformer.x_embedder", H, H, alpha=ALPHA)
    file.lora("lora_unet_txt_in", "transformer.context_embedder", H, H)
    assert_says(through(file.read(), "kohya"), file.expected)
    assert to_tensors(file.read(), "kohya")[1]["ss_network_alpha"] == str(RANK)


def test_alpha_of_other_algebras_is_a_tensor_in_diffusers_spelling() -> None:
    file = RandomFile("flux1")
    stem = "lora_unet_img_in"
    factors = {name: file.randn(H, RANK) if name.endswith("a") else file.randn(RANK, H) for name in LOHA}
    file.tensors = {f"{stem}.{name}": factor for name, factor in factors.items()}
    file.tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    halves = (factors["hada_w1_a"] @ factors["hada_w1_b"], factors["hada_w2_a"] @ factors["hada_w2_b"])
    file.expect("transformer.x_embedder", halves[0] * halves[1] * ALPHA / RANK)
    for target in ("diffusers", "peft"):
        assert_says(through(file.read(), target), file.expected)


def test_metadata_of_the_source_is_kept() -> None:
    file = flux_kohya()
    file.metadata = {"ss_tag_frequency": "{}", "modelspec.title": "a style", "ss_network_dim": "99"}
    stated = {"kohya": str(RANK)}  # by kohya's own files alone, and of the tensors that are written
    for target in ("kohya", "diffusers", "original"):
        metadata = to_tensors(file.read(), target)[1]
        assert metadata["modelspec.title"] == "a style"
        assert metadata.get("ss_network_dim") == stated.get(target)


# Fused modules.


def parts_of_qkv(same_down: bool, *alphas: float) -> RandomFile:
    file = RandomFile("flux1", "kohya", dtype=torch.float32)
    for name, alpha in zip(("to_q", "to_k", "to_v"), alphas or (ALPHA,) * 3, strict=True):
        path = f"transformer.transformer_blocks.0.attn.{name}"
        file.lora(path, path, H, H, alpha=alpha)
    if same_down:
        first = file.tensors["transformer.transformer_blocks.0.attn.to_q.lora_down.weight"]
        for key in file.tensors:
            if key.endswith("lora_down.weight"):
                file.tensors[key] = first
    return file


QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def test_equal_downs_are_kept_once() -> None:
    adapter = parts_of_qkv(same_down=True).read()
    tensors, _, _ = to_tensors(adapter, "kohya")
    assert tensors[f"{QKV}.lora_down.weight"].shape == (RANK, H)
    assert tensors[f"{QKV}.lora_up.weight"].shape == (3 * H, RANK)
    assert tensors[f"{QKV}.alpha"].item() == ALPHA
    assert_same_adapter(adapter, through(adapter, "kohya"))


def test_different_downs_become_block_diagonal_and_split_back() -> None:
    file = parts_of_qkv(same_down=False)
    adapter = file.read()
    tensors, _, _ = to_tensors(adapter, "kohya")
    up = tensors[f"{QKV}.lora_up.weight"]
    assert tensors[f"{QKV}.lora_down.weight"].shape == (3 * RANK, H)
    assert tensors[f"{QKV}.alpha"].item() == 3 * ALPHA
    blocks = up.view(3, H, 3, RANK)
    for row in range(3):
        for column in range(3):
            assert blocks[row, :, column].any() == (row == column)
    product = up.double() @ tensors[f"{QKV}.lora_down.weight"].double() * ALPHA / RANK
    torch.testing.assert_close(product, torch.cat(list(file.expected.values())))
    assert_same_adapter(adapter, through(adapter, "kohya"))


def test_missing_part_of_a_fused_module_is_written_as_no_change() -> None:
    file = parts_of_qkv(same_down=False)
    for key in list(file.tensors):
        if ".to_k." in key:
            del file.tensors[key]
    adapter = file.read()
    again = through(adapter, "kohya")
    assert not again.deltas["transformer"]["transformer_blocks.0.attn.to_k"].delta_weight().any()
    changes = found(again)
    for path, change in found(adapter).items():
        assert torch.equal(changes[path], change)


def test_parts_with_other_alphas_keep_their_change_where_that_is_exact() -> None:
    file = parts_of_qkv(False, 4.0, 2.0, 1.0)
    assert_says(through(file.read(), "kohya"), file.expected, 1e-6)


def test_parts_with_other_alphas_are_refused_where_one_alpha_would_round() -> None:
    with pytest.raises(ConversionError, match="rounding") as caught:
        to_tensors(parts_of_qkv(False, 4.0, 3.0, 1.0).read(), "kohya")
    assert "img_attn.qkv" in caught.value.problems[0]


def test_parts_of_different_algebras_are_refused_by_name() -> None:
    file = parts_of_qkv(same_down=False)
    stem = "transformer.transformer_blocks.0.attn.to_k"
    for key in [key for key in file.tensors if key.startswith(stem)]:
        del file.tensors[key]
    file.tensors[f"{stem}.diff"] = torch.randn(H, H)
    with pytest.raises(ConversionError, match="different algebras") as caught:
        to_tensors(file.read(), "original")
    assert "transformer.double_blocks.0.img_attn.qkv" in caught.value.problems[0]


def test_swapped_halves_are_swapped_back_in_up_alone() -> None:
    file = RandomFile("flux1", "peft")
    file.lora("diffusion_model.final_layer.adaLN_modulation.1", "transformer.norm_out.linear", 2 * H, H, swap=True)
    assert same_tensors(to_tensors(file.read(), "original")[0], file.tensors)


# Files.


@pytest.mark.parametrize("target", ["diffusers", "kohya", "original"])
def test_written_file_is_read_back_with_its_metadata(tmp_path: Path, target: str) -> None:
    file = flux_kohya()
    path = write_adapter(file.read(), tmp_path / "a.safetensors", target)
    again = read_adapter(path, family="flux1")
    assert_says(again, file.expected)
    tensors, metadata, _ = to_tensors(file.read(), target)
    assert same_tensors(safetensors.torch.load_file(path), tensors)
    assert read_header(path)[1] == metadata


def test_folder_gets_the_usual_name(tmp_path: Path) -> None:
    path = write_adapter(flux_kohya().read(), tmp_path / "style", "diffusers")
    assert path == tmp_path / "style" / "pytorch_lora_weights.safetensors"
    assert_says(read_adapter(tmp_path / "style", family="flux1"), flux_kohya().expected)


def test_peft_folder_gets_its_configuration_and_reads_back(tmp_path: Path) -> None:
    file = SPELLINGS["flux peft folder"]()
    path = write_adapter(file.read(), tmp_path / "style", "peft")
    assert path.name == "adapter_model.safetensors"
    config = json.loads((tmp_path / "style" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == RANK
    assert_says(read_adapter(tmp_path / "style", family="flux1"), file.expected)


def test_peft_says_a_text_encoder_alone_where_its_names_tell_which_it_is() -> None:
    file = RandomFile("sdxl", "peft")
    layer = "text_model.encoder.layers.0.mlp.fc1"
    for encoder in ("text_encoder", "text_encoder_2"):
        file.lora(f"{encoder}.{layer}", f"{encoder}.{layer}", H, H)
    adapter = file.read()
    first, second = (replace(adapter, deltas={c: adapter.deltas[c]}) for c in ("text_encoder", "text_encoder_2"))
    assert_same_adapter(first, through(first, "peft"))
    with pytest.raises(ConversionError, match="no word for this component"):  # it would be read as the first
        to_tensors(second, "peft")


def test_peft_says_one_model_a_file() -> None:
    with pytest.raises(ConversionError, match="one model a file") as caught:
        to_tensors(flux_kohya().read(), "peft")
    assert "text_encoder" in caught.value.problems[0]


def test_refused_conversion_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ConversionError):
        write_adapter(flux_kohya().read(), path, "xlabs")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_existing_file_is_kept_unless_overwriting_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(AdapterFileError, match="there already"):
        write_adapter(flux_kohya().read(), path, overwrite=False)
    assert path.read_bytes() == b"old"
    write_adapter(flux_kohya().read(), path)
    assert path.read_bytes() != b"old"


def test_dtype_is_changed_on_request_and_alpha_stays(tmp_path: Path) -> None:
    path = write_adapter(flux_kohya().read(), tmp_path / "a.safetensors", "kohya", dtype=torch.bfloat16)
    tensors = safetensors.torch.load_file(path)
    assert {tensor.dtype for key, tensor in tensors.items() if not key.endswith(".alpha")} == {torch.bfloat16}
    assert {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")} == {ALPHA}


def test_alpha_that_the_dtype_cannot_hold_is_written_in_float32() -> None:
    file = folded(torch.bfloat16, 4.0)
    file.tensors["lora_unet_double_blocks_0_img_attn_proj.alpha"] = torch.tensor(257.0)
    alpha = to_tensors(file.read(), "kohya")[0]["lora_unet_double_blocks_0_img_attn_proj.alpha"]
    assert (alpha.item(), alpha.dtype) == (257.0, torch.float32)


def test_convert_reads_one_spelling_and_writes_another(tmp_path: Path) -> None:
    file = flux_kohya()
    safetensors.torch.save_file(file.tensors, tmp_path / "kohya.safetensors")
    path = convert(tmp_path / "kohya.safetensors", tmp_path / "new.safetensors", format="diffusers", family="flux1")
    assert_says(read_adapter(path, family="flux1"), file.expected)


def test_convert_refuses_a_file_with_unknown_modules_and_writes_nothing(tmp_path: Path) -> None:
    file = flux_kohya()
    file.lora("lora_unet_no_such_module", "", H, H)
    with pytest.raises(ConversionError, match="not known") as caught:
        convert(file.tensors, tmp_path / "new.safetensors", format="diffusers", family="flux1")
    assert caught.value.problems == ("no_such_module: no such name in this family",)
    assert not list(tmp_path.iterdir())


def test_unknown_format_lists_those_there_are() -> None:
    with pytest.raises(UnknownFormatError, match="There are peft, diffusers"):
        to_tensors(flux_kohya().read(), "kohia")


@pytest.mark.parametrize("target", ["kohya", "original", "lycoris", "onetrainer"])
def test_a_sparse_remainder_is_written_back(target: str) -> None:
    file = RandomFile("flux1")
    file.lora("lora_unet_img_in", "transformer.x_embedder", H, H)
    places, values = torch.tensor([[0, H - 1], [1, 2]]), file.randn(2)
    sparse = {"bias_indices": places, "bias_values": values, "bias_size": torch.tensor([H, H])}
    file.tensors |= {f"lora_unet_img_in.{name}": tensor for name, tensor in sparse.items()}
    wanted = file.expected["transformer.x_embedder"].clone()
    wanted[places[0], places[1]] += values
    change = through(file.read(), target).deltas["transformer"]["x_embedder"].delta_weight()
    torch.testing.assert_close(change, wanted.to(change))


def test_original_says_a_tucker_core_beside_kohyas_factors_where_comfyui_looks_for_it() -> None:
    file = RandomFile("sd15")
    stem, path = "lora_unet_input_blocks_1_0_in_layers_2", "unet.down_blocks.0.resnets.0.conv1"
    down, mid, up = file.randn(4, H, 1, 1), file.randn(4, 4, 3, 3), file.randn(H, 4, 1, 1)
    file.tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": mid, f"{stem}.lora_up.weight": up}
    file.lora("lora_unet_time_embed_0", "unet.time_embedding.linear_1", H, H)
    file.expect(path, torch.einsum("oa,abhw,bi->oihw", up[..., 0, 0], mid, down[..., 0, 0]))
    written = set(to_tensors(file.read(), "original")[0])
    assert written == {
        *(f"diffusion_model.input_blocks.1.0.in_layers.2.lora_{name}.weight" for name in ("down", "mid", "up")),
        *(f"diffusion_model.time_embed.0.lora_{name}.weight" for name in "AB"),
    }
    assert_says(through(file.read(), "original"), file.expected)


@pytest.mark.parametrize("target", ["kohya", "original", "lycoris", "onetrainer"])
@pytest.mark.parametrize("columns", [64, 128])
def test_a_widened_input_is_told_to_comfyui_and_no_other(target: str, columns: int) -> None:
    file = RandomFile("flux1")
    file.lora("lora_unet_img_in", "transformer.x_embedder", 3072, columns, rank=1)
    file.lora("lora_unet_txt_in", "transformer.context_embedder", 3072, 4096, rank=1)
    tensors, _, _ = to_tensors(file.read(), target)
    told = {key: tensor.tolist() for key, tensor in tensors.items() if key.endswith(".reshape_weight")}
    assert list(told.values()) == ([[3072, 128]] if columns == 128 else [])
    assert_says(through(file.read(), target), file.expected)


def test_bfl_and_diffusers_do_not_tell_a_widened_input() -> None:
    file = RandomFile("flux1")
    file.lora("lora_unet_img_in", "transformer.x_embedder", 3072, 128, rank=1)
    for target in ("bfl", "diffusers", "peft"):
        assert not [key for key in to_tensors(file.read(), target)[0] if key.endswith(".reshape_weight")]


@pytest.mark.parametrize("entry", ["{not json", "[1]", '{"transformer.lora_alpha": "many"}'])
def test_bad_metadata_of_a_header_names_the_file(tmp_path: Path, entry: str) -> None:
    file = tmp_path / "style.safetensors"
    safetensors.torch.save_file(flux_kohya().tensors, file, {"lora_adapter_metadata": entry})
    with pytest.raises(MalformedAdapterError) as caught:
        read_adapter(file)
    assert_says_all_four(caught.value, "style.safetensors")


def test_original_names_of_ace_step_lie_where_its_checkpoint_has_them() -> None:
    file = RandomFile("ace-step", "peft")
    file.lora("base_model.model.layers.3.self_attn.q_proj", "transformer.layers.3.self_attn.to_q", H, H)
    written = to_tensors(file.read(), "original")[0]
    assert set(written) == {f"diffusion_model.decoder.layers.3.self_attn.q_proj.lora_{x}.weight" for x in "AB"}
    assert_says(through(file.read(), "original"), file.expected)


def test_original_names_of_a_vision_language_encoder_are_its_checkpoints() -> None:
    file = RandomFile("qwen-image", "peft")
    for name in ("language_model.layers.0.mlp.up_proj", "visual.blocks.1.attn.qkv"):
        file.lora(f"text_encoder.model.{name}", f"text_encoder.model.{name}", H, H)
    stems = {key.removeprefix("text_encoders.qwen25_7b.transformer.").rsplit(".", 2)[0] for key in
             to_tensors(file.read(), "original")[0]}  # fmt: skip
    assert stems == {"model.layers.0.mlp.up_proj", "visual.blocks.1.attn.qkv"}
    assert_says(through(file.read(), "original"), file.expected)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_cascades_attention_is_read_and_written_in_comfyuis_parts(part: str) -> None:
    file = RandomFile("cascade")
    file.lora(f"lora_prior_unet_down_blocks_0_2_attention_attn_to_{part}", f"prior.down_blocks.0.2.attention.to_{part}",
              H, H)  # fmt: skip
    (stem,) = {key.rsplit(".", 2)[0] for key in to_tensors(file.read(), "original")[0]}
    assert stem == f"diffusion_model.down_blocks.0.2.attention.attn.to_{part}"
    assert_says(through(file.read(), "original"), file.expected)


def test_frame_rate_of_skyreels_is_read_by_its_original_names() -> None:
    file = RandomFile("skyreels2", "peft")
    file.lora("diffusion_model.fps_projection.0", "transformer.fps_projection.net.0.proj", H, H)
    file.lora("diffusion_model.fps_projection.2", "transformer.fps_projection.net.2", 6 * H, H)
    assert_says(file.read(), file.expected)


@pytest.mark.parametrize(
    ("family", "stem", "target", "advised"),
    [
        ("z-image", "layers.0.attention.qkv", "kohya", "(kohya-original, original, bfl)"),  # whose trainers split
        ("flux1", "double_blocks.0.img_attn.qkv", "lycoris", "(kohya, kohya-original, original, bfl)"),
    ],
)
def test_the_formats_advised_for_a_part_of_a_fused_module_can_say_it(
    family: str, stem: str, target: str, advised: str
) -> None:
    name = f"diffusion_model.{stem}"
    keys = {f"{name}.lokr_w1": torch.randn(4, 4), f"{name}.lokr_w2": torch.randn(24, 8)}
    adapter = read_adapter(keys, family=family)
    with pytest.raises(ConversionError) as caught:
        to_tensors(adapter, target)
    assert f"say it {advised}, or make a LoRA of it first: --as lora --rank N." in caught.value.mend
    for form in advised.strip("()").split(", "):
        assert [key for key in to_tensors(adapter, form)[0] if key.endswith(".lokr_w2")]


SIDE = 32
LORA = {"down": torch.randn(2, SIDE), "up": torch.randn(SIDE, 2)}
LOHA = {f"hada_w{n}_{s}": torch.randn(SIDE, 2) if s == "a" else torch.randn(2, SIDE) for n in (1, 2) for s in "ab"}
LOKR = {"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(8, 8)}
IN, OUT = {"magnitude": torch.rand(1, SIDE)}, {"magnitude": torch.rand(SIDE, 1)}
REMAINDER = {
    "bias_indices": torch.tensor([[0, 1], [2, 3]]),
    "bias_values": torch.randn(2),
    "bias_size": torch.tensor([SIDE, SIDE]),
}
APART = {
    "lora": [LORA],
    "loha": [LOHA],
    "lokr": [LOKR],
    "glora": [{name: LORA["up" if name in ("a1", "b1") else "down"] for name in ("a1", "a2", "b1", "b2")}],
    "input oft": [{"oft_R": torch.randn(SIDE // 4, 6) * 0.1}],
    "gain": [{"ia3_l": torch.rand(SIDE, 1)}],
    "gains of the inputs": [{"weight": torch.rand(SIDE), "on_input": torch.tensor(1)}],
    "dora over loha": [{**LOHA, **OUT}],
    "dora per input": [{**LORA, **IN}],
    "sparse over loha": [{**LOHA, **REMAINDER}],
    "mixed": [LORA, LOHA, LORA],
    "mixed under dora": [{**LORA, **OUT}, {**LOHA, **OUT}, {**LORA, **OUT}],
    "weight and bias": [{"diff": torch.randn(SIDE, SIDE)}, {"bias": torch.randn(SIDE)}, LORA],
}
"""Slots of q, k and v, or of each of them, as trained apart."""
ATTENTION = "transformer_blocks.0.attn"


def apart(case: str) -> Adapter:
    """The case on Flux's q, k and v, no two parts with a tensor in common."""
    parts = (APART[case] * 3)[:3]

    def own(slots: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t + torch.rand_like(t) if t.is_floating_point() else t for name, t in slots.items()}

    deltas = {f"{ATTENTION}.to_{name}": build(own(slots), 2.0) for name, slots in zip("qkv", parts, strict=True)}
    return Adapter({"transformer": deltas}, family="flux1")


def can_say(adapter: Adapter, target: str) -> bool:
    return not isinstance(there_and_back(adapter, target), ConversionError)


@pytest.mark.parametrize("target", ["kohya", "original", "diffusers", "xlabs"])
@pytest.mark.parametrize("case", APART)
def test_the_ways_out_of_a_refusal_are_those_that_lead_out(case: str, target: str) -> None:
    """The formats that are named, and no others, write it; so does this one after the LoRA that is advised."""
    adapter = apart(case)
    refusal = there_and_back(adapter, target)
    if isinstance(refusal, Adapter):
        return
    able = [form.name for form in FORMATS if form.name != "indexed" and can_say(adapter, form.name)]
    assert target not in able
    (named,) = re.findall(r"a format that can say it \(([^)]*)\)", refusal.mend) or [""]
    assert [name for name in named.split(", ") if name] == able, refusal.mend
    made = ll.resize(adapter, rank=1, model=tiny_models.pipeline("flux1").transformer).adapter
    advised = "--as lora --rank" in refusal.mend
    assert advised == can_say(made, target), refusal.mend
    assert advised or able or "leave out" in refusal.mend
    needs_base = any(delta.needs_base for _, _, delta in adapter.modules())
    assert ("--model" in refusal.mend) == (advised and needs_base), refusal.mend
