"""Promises about the format that a file is told to be in: what was written in one is read as that one."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_detection import pair
from typer.testing import CliRunner

from lora_loaders import read_adapter
from lora_loaders.adapter import Adapter
from lora_loaders.cli import app
from lora_loaders.conversion import parse
from lora_loaders.deltas import LoraDelta
from lora_loaders.files import Contents
from lora_loaders.writing import to_tensors, write_adapter

# Family -> component, its modules, and whether the original has other names for them.
MODULES: dict[str, tuple[str, dict[str, tuple[int, int]], bool]] = {
    "flux1": (
        "transformer",
        {f"transformer_blocks.3.attn.to_{x}": (3072, 3072) for x in "qkv"}
        | {"single_transformer_blocks.3.proj_out": (3072, 15360)},
        True,
    ),
    "wan": ("transformer", {"blocks.3.attn1.to_q": (5120, 5120), "blocks.3.ffn.net.0.proj": (13824, 5120)}, True),
    "sd15": ("unet", {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320)}, True),
    "sdxl": (
        "unet",
        {
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (640, 640),
            "mid_block.attentions.0.transformer_blocks.3.attn2.to_k": (1280, 2048),
        },
        True,
    ),
    "sd3": ("transformer", {f"transformer_blocks.3.attn.to_{x}": (1536, 1536) for x in "qkv"}, True),
    "z-image": (
        "transformer",
        {f"layers.3.attention.to_{x}": (3840, 3840) for x in "qkv"} | {"layers.3.feed_forward.w1": (10240, 3840)},
        True,
    ),
    "qwen-image": (
        "transformer",
        {"transformer_blocks.3.attn.to_q": (3072, 3072), "transformer_blocks.3.img_mlp.net.2": (3072, 12288)},
        False,
    ),
}
FORMATS = ("peft", "diffusers", "diffusers-old", "kohya", "original", "bfl", "omi", "onetrainer", "lycoris")


def lora(rows: int, columns: int) -> LoraDelta:
    return LoraDelta(up=torch.ones(rows, 2), down=torch.ones(2, columns), alpha=2.0)


def adapter_of(family: str) -> Adapter:
    component, modules, _ = MODULES[family]
    return Adapter({component: {path: lora(*size) for path, size in modules.items()}}, family=family)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", MODULES)
def test_a_file_is_read_as_the_format_that_it_was_written_in(family: str, format: str) -> None:
    tensors, metadata, config = to_tensors(adapter_of(family), format)
    again = parse(Contents(tensors, metadata, config if format == "peft" else None))
    # Where both sides have the same names, BFL's spelling is PEFT's without a prefix.
    told = "peft" if format == "bfl" and not MODULES[family][2] else format
    assert (again.family, again.format) == (family, told)


def test_xlabs_is_told_by_names_that_it_alone_has() -> None:
    paths = (f"transformer_blocks.3.attn.{name}" for name in ("to_out.0", "to_add_out"))
    adapter = Adapter({"transformer": {path: lora(3072, 3072) for path in paths}}, family="flux1")
    tensors, metadata, _ = to_tensors(adapter, "xlabs")
    assert parse(Contents(tensors, metadata), "flux1").format == "xlabs"


@pytest.mark.parametrize(
    ("family", "keys", "told"),
    [
        ("wan", pair("blocks.0.self_attn.q", 5120, 5120), "bfl"),
        ("wan", pair("blocks.0.attn1.to_q", 5120, 5120), "peft"),
        # Without factors no suffix tells anything, and kohya's are no format's without a prefix.
        ("flux2", {"double_blocks.0.img_attn.qkv.diff": torch.ones(9, 3)}, "bfl"),
        ("flux2", {"diffusion_model.double_blocks.0.img_attn.qkv.diff": torch.ones(9, 3)}, "original"),
        # What PEFT wrapped is PEFT's, also where the model had the original's names.
        ("wan", pair("base_model.model.blocks.0.self_attn.q", 5120, 5120), "peft"),
        # No format has diffusers' names with kohya's suffixes: the nearest is the older one of diffusers.
        (
            "flux1",
            {
                key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
                for key, tensor in pair("transformer.transformer_blocks.0.attn.add_q_proj").items()
            },
            "diffusers-old",
        ),
    ],
)
def test_names_tell_apart_formats_of_the_same_prefixes_and_suffixes(
    family: str, keys: dict[str, torch.Tensor], told: str
) -> None:
    assert read_adapter(keys, family=family).format == told


@pytest.mark.parametrize(("prefix", "told"), [("clip_l.", "omi"), ("t5.", "omi"), ("text_encoder.", "diffusers")])
def test_text_encoders_alone_tell_it_by_their_prefix(prefix: str, told: str) -> None:
    name = "encoder.block.0.layer.0.SelfAttention.q" if prefix == "t5." else "text_model.encoder.layers.0.mlp.fc1"
    assert read_adapter(pair(f"{prefix}{name}", 3072, 768), family="flux1").format == told


def test_a_file_of_omi_is_resized_into_one_of_omi(tmp_path: Path) -> None:
    source = write_adapter(adapter_of("flux1"), tmp_path / "omi.safetensors", "omi")
    target = tmp_path / "resized.safetensors"
    done = CliRunner().invoke(app, ["resize", str(source), str(target), "--rank", "1"])
    assert done.exit_code == 0, done.output
    with safe_open(source, "pt") as before, safe_open(target, "pt") as after:
        assert set(after.keys()) == set(before.keys())
