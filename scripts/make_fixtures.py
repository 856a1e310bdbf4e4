"""Writes fixtures/: two small LoRA files for the tiny Flux of scripts/demo.py, random numbers with a fixed seed.

Keys are spelled out here, apart from the package, so that reading them is a test of the package's tables.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
WIDTH = 64
DOUBLE_BLOCKS, SINGLE_BLOCKS = 2, 4
RANK = 4


def kohya_modules() -> Iterator[tuple[str, int, int]]:
    """Name, inputs and outputs of each module, as kohya's trainer names them for Flux: original names, flattened."""
    for i in range(DOUBLE_BLOCKS):
        for stream in ("img", "txt"):
            block = f"lora_unet_double_blocks_{i}_{stream}"
            yield f"{block}_attn_qkv", WIDTH, 3 * WIDTH
            yield f"{block}_attn_proj", WIDTH, WIDTH
            yield f"{block}_mlp_0", WIDTH, 4 * WIDTH
            yield f"{block}_mlp_2", 4 * WIDTH, WIDTH
            yield f"{block}_mod_lin", WIDTH, 6 * WIDTH
    for i in range(SINGLE_BLOCKS):
        block = f"lora_unet_single_blocks_{i}"
        yield f"{block}_linear1", WIDTH, 7 * WIDTH
        yield f"{block}_linear2", 5 * WIDTH, WIDTH
        yield f"{block}_modulation_lin", WIDTH, 3 * WIDTH
    yield "lora_unet_final_layer_adaLN_modulation_1", WIDTH, 2 * WIDTH


def diffusers_modules() -> Iterator[tuple[str, int, int]]:
    """The same for diffusers' own names; this file changes the attention and the feed-forward layers only."""
    for i in range(DOUBLE_BLOCKS):
        block = f"transformer.transformer_blocks.{i}"
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            yield f"{block}.attn.{name}", WIDTH, WIDTH
        yield f"{block}.ff.net.0.proj", WIDTH, 4 * WIDTH
        yield f"{block}.ff.net.2", 4 * WIDTH, WIDTH
    for i in range(SINGLE_BLOCKS):
        block = f"transformer.single_transformer_blocks.{i}"
        for name in ("attn.to_q", "attn.to_k", "attn.to_v"):
            yield f"{block}.{name}", WIDTH, WIDTH
        yield f"{block}.proj_mlp", WIDTH, 4 * WIDTH
        yield f"{block}.proj_out", 5 * WIDTH, WIDTH


def factors(inputs: int, outputs: int, strength: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random `down` `[rank, in]` and `up` `[out, rank]` whose product changes an output by about `strength`."""
    down = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
    up = torch.randn(outputs, RANK, generator=generator) * (strength / RANK**0.5)
    return down.half(), up.half()


def kohya_file(seed: int, strength: float) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file as kohya's sd-scripts write it: alpha as a tensor of each module."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, inputs, outputs in kohya_modules():
        down, up = factors(inputs, outputs, strength, generator)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up * 2}
        tensors[f"{name}.alpha"] = torch.tensor(RANK / 2, dtype=torch.float16)
    return tensors, {"ss_network_module": "networks.lora_flux", "ss_network_dim": "4", "ss_network_alpha": "2.0"}


def diffusers_file(seed: int, strength: float) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file as diffusers writes it: PEFT's factor names, alpha in the header."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, inputs, outputs in diffusers_modules():
        down, up = factors(inputs, outputs, strength, generator)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up / 2}
    config = {"transformer.r": RANK, "transformer.lora_alpha": 2 * RANK}
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(config, sort_keys=True)}


def main(folder: Path = FIXTURES) -> list[Path]:
    """Write all files and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "tiny_flux_kohya.safetensors": kohya_file(seed=1, strength=0.5),
        "tiny_flux_diffusers.safetensors": diffusers_file(seed=3, strength=1.2),
    }
    for name, (tensors, metadata) in files.items():
        save_file(tensors, folder / name, metadata)
    return [folder / name for name in files]


if __name__ == "__main__":
    for path in main(Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURES):
        print(f"{path.name}: {path.stat().st_size:,} bytes")
