"""Fused layers whose parts kohya's networks train apart: each part's own tensors, numbered, and one alpha for all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import flux
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.formats import FORMATS

RANK, WIDTH, ALPHA = 2, 8, 4.0

# Layers that sd-scripts' `split_qkv` cuts (networks/lora_flux.py, lora_sd3.py, lora_lumina.py), with the parts' rows.
FUSED = {
    "flux1": {
        "double_blocks_0_img_attn_qkv": dict.fromkeys([f"transformer_blocks.0.attn.to_{x}" for x in "qkv"], WIDTH),
        "double_blocks_3_txt_attn_qkv": dict.fromkeys(
            [f"transformer_blocks.3.attn.add_{x}_proj" for x in "qkv"], WIDTH
        ),
        "single_blocks_1_linear1": {
            **dict.fromkeys([f"single_transformer_blocks.1.attn.to_{x}" for x in "qkv"], WIDTH),
            "single_transformer_blocks.1.proj_mlp": 4 * WIDTH,
        },
    },
    "sd3": {
        "joint_blocks_2_context_block_attn_qkv": dict.fromkeys(
            [f"transformer_blocks.2.attn.add_{x}_proj" for x in "qkv"], WIDTH
        ),
    },
    "lumina2": {
        "layers_4_attention_qkv": {
            "layers.4.attn.to_q": 3 * WIDTH,
            "layers.4.attn.to_k": WIDTH,
            "layers.4.attn.to_v": WIDTH,
        },
    },
    # No part has a module of its own here.
    "flux2": {"single_blocks_0_linear1": {"single_transformer_blocks.0.attn.to_qkv_mlp_proj": 9 * WIDTH}},
}


def factors(name: str, rows: list[int], rank: int = RANK, alpha: float = ALPHA) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    tensors: dict[str, Tensor] = {f"lora_unet_{name}.alpha": torch.tensor(alpha)}
    for number, size in enumerate(rows):
        tensors[f"lora_unet_{name}.lora_down.{number}.weight"] = torch.randn(rank, WIDTH, generator=generator)
        tensors[f"lora_unet_{name}.lora_up.{number}.weight"] = torch.randn(size, rank, generator=generator)
    return tensors


def changes(tensors: dict[str, Tensor], name: str) -> Tensor:
    """The rows of all parts below one another: alpha / rank · up @ down, in float64."""
    stem = f"lora_unet_{name}.lora_"
    count = sum(key.startswith(f"{stem}up.") for key in tensors)
    pairs = [[tensors[f"{stem}{side}.{n}.weight"].double() for side in ("up", "down")] for n in range(count)]
    return torch.cat([up @ down * (ALPHA / len(down)) for up, down in pairs])


@pytest.mark.parametrize("family", FUSED)
def test_each_part_is_a_slice_of_rows_of_the_fused_layer(family: str) -> None:
    for name, parts in FUSED[family].items():
        rows = [3 * WIDTH] * 3 if family == "flux2" else list(parts.values())
        tensors = factors(name, rows)
        adapter = ll.read_adapter(tensors, family=family)
        assert (adapter.format, adapter.ignored, adapter.unresolved) == ("kohya", {}, ())
        deltas = adapter.deltas["transformer"]
        assert list(deltas) == list(parts)
        found = torch.cat([delta.delta_weight() for delta in deltas.values()])
        torch.testing.assert_close(found.double(), changes(tensors, name), rtol=1e-5, atol=1e-5)
        if family != "flux2":
            assert {delta.rank for delta in deltas.values()} == {RANK}


@pytest.mark.parametrize("form", [form.name for form in FORMATS if form.name != "indexed"])  # which has UNets alone
def test_parts_are_written_in_every_format(form: str, tmp_path: Path) -> None:
    fused = dict(FUSED["flux1"])
    if form == "xlabs":  # which has no name for an mlp
        del fused["single_blocks_1_linear1"]
    tensors: dict[str, Tensor] = {}
    for name, parts in fused.items():
        tensors |= factors(name, list(parts.values()))
    save_file(tensors, tmp_path / "parts.safetensors")
    ll.convert(tmp_path / "parts.safetensors", tmp_path / "written.safetensors", format=form, family="flux1")
    back = ll.read_adapter(tmp_path / "written.safetensors", family="flux1").deltas["transformer"]
    for name, parts in fused.items():
        found = torch.cat([back[path].delta_weight() for path in parts])
        torch.testing.assert_close(found.double(), changes(tensors, name), rtol=1e-5, atol=1e-5)


def test_a_live_model_runs_parts_as_the_fused_layer_would() -> None:
    model = flux()
    block = model.single_transformer_blocks[0]
    parts = [block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp]
    columns = parts[0].in_features
    tensors = {
        key: torch.randn(RANK, columns) if "down" in key else tensor
        for key, tensor in factors("single_blocks_0_linear1", [part.out_features for part in parts]).items()
    }
    x = torch.randn(3, columns)
    before = [part(x) for part in parts]
    ll.attach(model).load_lora_adapter(tensors, adapter_name="parts")
    layers = [block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp]
    got = torch.cat([layer(x) - old for layer, old in zip(layers, before, strict=True)], -1)
    wanted = x.double() @ changes(tensors, "single_blocks_0_linear1").T
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_model_of_ones_own_gets_parts_in_its_fused_layer() -> None:
    model = nn.Sequential()
    model.qkv = nn.Linear(WIDTH, 3 * WIDTH)
    x = torch.randn(2, WIDTH)
    before = model.qkv(x)
    tensors = factors("qkv", [WIDTH] * 3)
    ll.attach(model).load_lora_adapter(tensors, adapter_name="parts")
    wanted = x.double() @ changes(tensors, "qkv").T
    torch.testing.assert_close((model.qkv(x) - before).double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_number_that_stands_alone_is_no_part() -> None:
    tensors = factors("double_blocks_0_img_attn_qkv", [3 * WIDTH])
    single = {key.replace(".0.weight", ".weight"): tensor for key, tensor in tensors.items()}
    ours, theirs = (ll.read_adapter(t, family="flux1").deltas["transformer"] for t in (tensors, single))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[path].delta_weight(), theirs[path].delta_weight()) for path in ours)


@pytest.mark.parametrize(
    ("gone", "extra", "words"),
    [
        (["lora_down.1", "lora_up.1"], {}, r"numbers \[0, 2\] alone"),
        (["lora_up.2"], {}, "up missing"),
        ([], {"lora_down.weight": torch.ones(RANK, WIDTH)}, "down of the whole module beside parts of it"),
    ],
)
def test_parts_that_do_not_make_a_whole_are_refused(gone: list[str], extra: dict[str, Tensor], words: str) -> None:
    name = "double_blocks_0_img_attn_qkv"
    tensors = factors(name, [WIDTH] * 3) | {f"lora_unet_{name}.{key}": tensor for key, tensor in extra.items()}
    for key in gone:
        del tensors[f"lora_unet_{name}.{key}.weight"]
    with pytest.raises(ll.MalformedAdapterError) as error:
        ll.read_adapter(tensors, family="flux1")
    assert any(name in line for line in error.value.problems)
    error.match(words)


BLOCKS = 4


def rotations(constraint: float) -> dict[str, Tensor]:
    """As sd-scripts' networks/oft_flux.py writes them: a list of blocks for every layer, of one entry for most."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, rows in {
        "double_blocks_0_img_attn_qkv": [WIDTH] * 3,
        "single_blocks_0_linear1": [*[WIDTH] * 3, 4 * WIDTH],
        "double_blocks_0_img_attn_proj": [WIDTH],
    }.items():
        tensors[f"oft_unet_{name}.alpha"] = torch.tensor(constraint)
        for number, size in enumerate(rows):
            blocks = torch.randn(BLOCKS, size // BLOCKS, size // BLOCKS, generator=generator)
            tensors[f"oft_unet_{name}.oft_blocks.{number}"] = blocks
    return tensors


def turned(blocks: Tensor, constraint: float, weight: Tensor) -> Tensor:
    """Rᵀ W as `OFTModule.forward` there has it, in float64; the norm of Q is at most constraint · rows."""
    blocks, weight = blocks.double(), weight.double()
    skew = blocks - blocks.mT
    norm = skew.norm()
    skew = skew * ((norm.clamp(max=constraint * len(weight)) + 1e-8) / (norm + 1e-8))
    identity = torch.eye(blocks.shape[-1], dtype=torch.float64)
    rotation = (identity + skew) @ (identity - skew).inverse()
    return torch.einsum("knm,knp->kmp", rotation, weight.view(len(blocks), -1, WIDTH)).flatten(0, 1)


@pytest.mark.parametrize("constraint", [1e-2, 100.0])
@pytest.mark.parametrize("form", [None, "kohya", "original", "omi", "onetrainer"])
def test_kohyas_flux_rotations_have_a_list_of_blocks_for_each_layer(
    form: str | None, constraint: float, tmp_path: Path
) -> None:
    tensors = rotations(constraint)
    source = tmp_path / "oft.safetensors"
    save_file(tensors, source)
    if form is not None:
        ll.convert(source, tmp_path / "written.safetensors", format=form, family="flux1")
        source = tmp_path / "written.safetensors"
    deltas = ll.read_adapter(source, family="flux1").deltas["transformer"]
    places = FUSED["flux1"] | {"double_blocks_0_img_attn_proj": {"transformer_blocks.0.attn.to_out.0": WIDTH}}
    places["single_blocks_0_linear1"] = {
        path.replace(".1.", ".0."): rows for path, rows in places.pop("single_blocks_1_linear1").items()
    }
    del places["double_blocks_3_txt_attn_qkv"]
    assert deltas.keys() == {path for parts in places.values() for path in parts}
    for name, parts in places.items():
        for number, (path, rows) in enumerate(parts.items()):
            weight = torch.randn(rows, WIDTH)
            wanted = turned(tensors[f"oft_unet_{name}.oft_blocks.{number}"], constraint, weight)
            found = weight.double() + deltas[path].delta_weight(weight).double()
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
