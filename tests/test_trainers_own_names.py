"""Files as the trainers of CogVideoX and OmniGen save them: names of their own models, fused and numbered parts."""

from pathlib import Path

import pytest
import torch
from families.published import BY_LABEL, build
from torch import Tensor

import lora_loaders as ll

RANK, WIDTH = 2, 8

# `LORA_KEYS_RENAME` of CogVideo's tools/export_sat_lora_weight.py: name in the file, number of the part, new name.
SAT = [
    *(("attention.query_key_value", number, f"attn1.to_{name}") for number, name in enumerate("qkv")),
    ("attention.dense", 0, "attn1.to_out.0"),
]


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_sats_cogvideox_is_read_as_its_own_script_exports_it(prefix: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors, wanted = dict[str, Tensor](), dict[str, Tensor]()
    for block in range(30):
        for name, number, path in SAT:
            down, up = (torch.randn(size, generator=generator) for size in ((RANK, WIDTH), (WIDTH, RANK)))
            stem = f"{prefix}transformer.layers.{block}.{name}"
            tensors |= {f"{stem}.matrix_A.{number}": down, f"{stem}.matrix_B.{number}": up}
            wanted[f"transformer_blocks.{block}.{path}"] = (up.double() @ down.double()).float()
            # A training checkpoint has the weights beside their changes.
            tensors[f"{stem}.original.weight"] = torch.ones(3 * WIDTH if "query" in name else WIDTH, WIDTH)
    adapter = ll.read_adapter(tensors)
    assert (adapter.family, adapter.ties, adapter.unresolved) == ("cogvideox", (), ())
    deltas = adapter.deltas["transformer"]
    assert deltas.keys() == wanted.keys()
    for path, change in wanted.items():
        torch.testing.assert_close(deltas[path].delta_weight(), change)


# `mapping_dict` of diffusers' scripts/convert_omnigen_to_diffusers.py and what it does to the layers' keys.
OMNIGEN = {
    "x_embedder.proj": ["patch_embedding.output_image_proj"],
    "input_x_embedder.proj": ["patch_embedding.input_image_proj"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
    "time_token.mlp.0": ["time_token.linear_1"],
    "time_token.mlp.2": ["time_token.linear_2"],
    "t_embedder.mlp.0": ["t_embedder.linear_1"],
    "t_embedder.mlp.2": ["t_embedder.linear_2"],
    **{
        f"llm.layers.{block}.{name}": [f"layers.{block}.{path}" for path in paths]
        for block in (0, 31)
        for name, paths in {
            "self_attn.qkv_proj": [f"self_attn.to_{part}" for part in "qkv"],
            "self_attn.o_proj": ["self_attn.to_out.0"],
            "mlp.gate_up_proj": ["mlp.gate_up_proj"],
            "mlp.down_proj": ["mlp.down_proj"],
        }.items()
    },
}


def omnigen() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file as PEFT saves the original model's adapter, and its changes by diffusers' names."""
    generator = torch.Generator().manual_seed(0)
    tensors, wanted = dict[str, Tensor](), dict[str, Tensor]()
    for name, paths in OMNIGEN.items():
        down, up = (torch.randn(size, generator=generator) for size in ((RANK, WIDTH), (WIDTH * len(paths), RANK)))
        stem = f"base_model.model.{name}"
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        wanted |= dict(zip(paths, (up.double() @ down.double()).float().chunk(len(paths)), strict=True))
    return tensors, wanted


def test_omnigens_own_names_are_read_as_diffusers_script_converts_its_checkpoint() -> None:
    tensors, wanted = omnigen()
    adapter = ll.read_adapter(tensors)
    assert (adapter.family, adapter.ties, adapter.unresolved) == ("omnigen", (), ())
    deltas = adapter.deltas["transformer"]
    assert deltas.keys() == wanted.keys()
    for path, change in wanted.items():
        torch.testing.assert_close(deltas[path].delta_weight(), change)
    modules = dict(build(BY_LABEL["omnigen"]).named_modules())
    assert wanted.keys() <= modules.keys()


@pytest.mark.parametrize("form", ["diffusers", "kohya", "original"])
def test_omnigens_names_come_back(form: str, tmp_path: Path) -> None:
    tensors, wanted = omnigen()
    ll.convert(tensors, tmp_path / "there.safetensors", format=form)
    ll.convert(tmp_path / "there.safetensors", tmp_path / "back.safetensors", format="original")
    back = ll.read_adapter(tmp_path / "back.safetensors")
    assert back.family == "omnigen"
    for path, change in wanted.items():
        torch.testing.assert_close(back.deltas["transformer"][path].delta_weight(), change)
    names = {key.removeprefix("diffusion_model.").split(".lora_")[0].removesuffix(".alpha") for key in back.bound}
    assert names == OMNIGEN.keys()
