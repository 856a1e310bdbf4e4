"""ΔW against diffusers' own converters where they are right; where they are not, formulas pin our being right.

Alphas are powers of two here: a converter multiplies alpha / rank into a factor, we into the product, and only then do
both round alike, to the last bit of float32. With other alphas the two differ by that one rounding.
"""

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as converters
from filled_manifests import small
from random_files import RANK, RandomFile, assert_says, found
from shared_files import needs_shared
from spelled_files import H, flux_block, flux_top
from test_manifests import LISTINGS
from torch import Tensor

from lora_loaders.conversion import parse
from lora_loaders.files import Contents

pytestmark = pytest.mark.parity
State = dict[str, Tensor]


def products(state: State, alphas: dict[str, float] | None = None) -> State:
    """ΔW by path of what a converter returned, in float32: B @ A, its alpha applied if it came apart."""
    changes: State = {}
    for down_end, up_end in ((".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight")):
        for key, down in state.items():
            if key.endswith(down_end):
                path = key.removesuffix(down_end)
                up = state[path + up_end].float().flatten(1)
                alpha = (alphas or {}).get(f"{path}.alpha")
                scaling = 1.0 if alpha is None else alpha / down.shape[0]
                kernel = down.shape[1:]
                changes[path] = (up @ down.float().flatten(1) * scaling).view(up.shape[0], *kernel)
    return changes


def assert_equal_bits(ours: State, theirs: State, but: frozenset[str] = frozenset()) -> None:
    assert theirs
    assert ours.keys() - but == theirs.keys() - but
    for path in ours.keys() - but:
        assert torch.equal(ours[path].float().reshape(theirs[path].shape), theirs[path]), path


def kohya_like(name: str) -> State:
    """A published file's layout at a sixteenth of its width, in float32, with alphas that are powers of two."""
    state = small(LISTINGS[name], {})
    return {key: torch.tensor(2.0) if key.endswith(".alpha") else tensor.float() for key, tensor in state.items()}


def real_rows(name: str) -> State:
    """A published layout with all its rows, on which diffusers' Flux converters insist; few inputs, low ranks."""
    generator = torch.Generator().manual_seed(0)
    state: State = {}
    for key, shape in LISTINGS[name].shapes.items():
        assert shape is not None
        is_down = key.endswith(("down.weight", "lora_A.weight"))
        size = (RANK, min(shape[1], 16)) if is_down else (shape[0], RANK) if len(shape) == 2 else shape
        state[key] = torch.tensor(2.0) if key.endswith(".alpha") else torch.randn(size, generator=generator)
    return state


@needs_shared
def test_flux_kohya_equals_diffusers_converter_to_the_last_bit() -> None:
    state = real_rows("lorainspector_flux1_kohya")
    theirs = products(converters._convert_kohya_flux_lora_to_diffusers(dict(state)))
    assert_equal_bits(found(parse(Contents(state), "flux1")), theirs)


def test_flux_kohya_with_fused_blocks_of_their_own_rank_equals_diffusers_converter() -> None:
    """sd-scripts' split_qkv writes block-diagonal ups; both readers give each part its own block."""
    fused = {"double_blocks_0_img_attn_qkv": [3072] * 3, "single_blocks_0_linear1": [3072, 3072, 3072, 12288]}
    state: State = {}
    for name, rows in fused.items():
        rank = len(rows) * RANK
        state[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, 16)
        state[f"lora_unet_{name}.lora_up.weight"] = torch.block_diag(*(torch.randn(size, RANK) for size in rows))
        state[f"lora_unet_{name}.alpha"] = torch.tensor(rank / 2)
    adapter = parse(Contents(dict(state)), "flux1")
    assert {delta.rank for _, _, delta in adapter.modules()} == {RANK}
    assert_equal_bits(found(adapter), products(converters._convert_kohya_flux_lora_to_diffusers(dict(state))))


@needs_shared
@pytest.mark.parametrize("name", ["lorainspector_sd15_kohya", "lorainspector_sdxl_kohya"])
def test_stable_diffusion_kohya_equals_diffusers_converter_to_the_last_bit(name: str) -> None:
    state = kohya_like(name)
    converted, alphas = converters._convert_non_diffusers_lora_to_diffusers(dict(state))
    theirs = {modern(path): change for path, change in old_products(converted, alphas).items()}
    assert_equal_bits(found(parse(Contents(state), LISTINGS[name].family)), theirs)


def old_products(state: State, alphas: dict[str, float]) -> State:
    """The same for diffusers' older suffixes, of which this converter writes several."""
    changes: State = {}
    for key, down in state.items():
        if ".down." in key:
            up = state[key.replace(".down.", ".up.")].flatten(1)
            path = key.split(".lora_linear_layer.down.")[0].split("_lora.down.")[0].split(".lora.down.")[0]
            alpha = next(alphas[a] for a in (f"{path}.alpha", f"{key}.alpha") if a in alphas)
            product = (up @ down.flatten(1)) * (alpha / down.shape[0])
            changes[path] = product.view(up.shape[0], *down.shape[1:])
    return changes


def modern(path: str) -> str:
    """2023's names of attention parts as the modules are called."""
    path = path.replace(".processor.", ".")
    if path.startswith("text_encoder"):
        for old, new in (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")):
            path = path.replace(f"self_attn.{old}", f"self_attn.{new}")
        return path
    return f"{path}.0" if path.endswith(".to_out") else path


@needs_shared
def test_qwen_equals_diffusers_converter_to_the_last_bit() -> None:
    state = kohya_like("lorainspector_qwen_image_kohya")
    theirs = products(converters._convert_non_diffusers_qwen_lora_to_diffusers(dict(state)))
    assert_equal_bits(found(parse(Contents(state), "qwen-image")), theirs)


@needs_shared
def test_xlabs_equals_diffusers_converter_to_the_last_bit() -> None:
    state = kohya_like("invokeai_flux_lora_xlabs_format")
    theirs = products(converters._convert_xlabs_flux_lora_to_diffusers(dict(state)))
    assert_equal_bits(found(parse(Contents(state), "flux1")), theirs)


@needs_shared
def test_control_file_equals_diffusers_converter_but_for_its_wrong_layer() -> None:
    """formats.md 5.1, defect 3: diffusers swaps the halves of lora_A of norm_out as well."""
    state = real_rows("invokeai_flux_control_lora_format")
    theirs = products(converters._convert_bfl_flux_control_lora_to_diffusers(dict(state)))
    adapter = parse(Contents(state), "flux1")
    kinds = {f"{component}.{path}": delta.kind for component, path, delta in adapter.modules()}
    loras = {p: d.delta_weight() for c, m, d in adapter.modules() if kinds[p := f"{c}.{m}"] == "lora"}
    wrong = "transformer.norm_out.linear"
    assert_equal_bits(loras, theirs, but=frozenset({wrong}))
    stem = "final_layer.adaLN_modulation.1"
    product = state[f"{stem}.lora_B.weight"] @ state[f"{stem}.lora_A.weight"]
    half = len(product) // 2
    torch.testing.assert_close(loras[wrong], torch.cat([product[half:], product[:half]]))


# Defects of diffusers 0.42.1 (formats.md 5.1) that are not ours.


@needs_shared
def test_defect_1_every_module_of_a_file_with_original_names_is_bound() -> None:
    """diffusers loses 418 of 418."""
    state = kohya_like("invokeai_flux_lora_aitoolkit_format")
    adapter = parse(Contents(state), "flux1")
    assert adapter.components == {"transformer": 418}
    assert set(adapter.bound) == set(state)


def test_defect_2_modules_outside_the_blocks_keep_component_and_alpha() -> None:
    file = RandomFile("flux1")
    flux_top(file, "lora_unet_", "_", alpha=3.0)
    assert_says(file.read(), file.expected)
    assert {"transformer.x_embedder", "transformer.norm_out.linear", "transformer.proj_out"} <= set(file.expected)
    assert {delta.alpha_value for _, _, delta in file.read().modules()} == {3.0}


def test_defect_3_only_rows_are_swapped() -> None:
    file = RandomFile("flux1", "peft")
    file.lora("final_layer.adaLN_modulation.1", "transformer.norm_out.linear", 2 * H, H, swap=True)
    delta = file.read().deltas["transformer"]["norm_out.linear"]
    assert torch.equal(delta.tensors()["down"], file.tensors["final_layer.adaLN_modulation.1.lora_A.weight"])
    assert_says(file.read(), file.expected)


@pytest.mark.parametrize("wrapped", ["", "transformer."])
def test_defect_6_base_model_prefix_over_diffusers_names_is_read(wrapped: str) -> None:
    file = RandomFile("flux1", "peft")
    for path in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.norm.linear", "proj_out"):
        file.lora(f"base_model.model.{wrapped}{path}", f"transformer.{path}", H, H)
    assert_says(file.read(), file.expected)


def test_defect_6_base_model_prefix_over_original_names_is_read() -> None:
    """fal's Kontext trainer."""
    file = RandomFile("flux1", "peft")
    flux_block(file, "base_model.model.double_blocks", "base_model.model.single_blocks", ".", alpha=None)
    assert_says(file.read(), file.expected)


def test_defect_7_prefixes_are_cut_at_their_dot_and_nowhere_else() -> None:
    file = RandomFile("flux1", "peft")
    path = "transformer.transformer_blocks.0.attn.to_q"
    file.lora(path, path, H, H)
    state = {
        **file.tensors,
        **{key.replace("transformer.transformer_", "transformer.sformer_"): t for key, t in file.tensors.items()},
    }
    adapter = parse(Contents(state), "flux1")
    assert_says(adapter, file.expected)
    (module,) = adapter.unresolved
    assert module.name == "sformer_blocks.0.attn.to_q"


def test_defect_8_magnitudes_and_t5_are_kept() -> None:
    file = RandomFile("flux1")
    t5 = "encoder.block.0.layer.0.SelfAttention.q"
    file.lora(f"lora_te3_{t5.replace('.', '_')}", f"text_encoder_2.{t5}", H, H)
    file.lora("lora_unet_img_in", "transformer.x_embedder", H, H)
    file.tensors["lora_unet_img_in.dora_scale"] = file.randn(H, 1)
    adapter = file.read()
    assert adapter.deltas["transformer"]["x_embedder"].kind == "dora"
    assert t5 in adapter.deltas["text_encoder_2"]
