"""Models that no family's table knows load what they saved, under any prefix or none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import pipeline, unet, vae
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.layout import adapter_layers


def controlnet() -> Any:
    """A ControlNet, whose blocks are called as a UNet's."""
    return diffusers.ControlNetModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=32,
        conditioning_embedding_out_channels=(8, 16),
    )


def levels() -> Any:
    """A model with levels that files have as prefixes."""
    inner = nn.ModuleDict({"to_q": nn.Linear(4, 4), "transformer": nn.ModuleDict({"conv1": nn.Linear(4, 6)})})
    return nn.ModuleDict({"decoder": inner, "net": nn.ModuleDict({"to_q": nn.Linear(4, 4)}), "to_q": nn.Linear(4, 4)})


MODELS: dict[str, Callable[[], Any]] = {
    "controlnet": controlnet,
    "vae": vae,
    "levels": levels,
    "text encoder": lambda: pipeline("sd15").text_encoder,
    "unet": unet,
}


def trained(model: Any) -> Any:
    """The model with an adapter whose scaling is not 1, and whose ranks differ."""
    targets = [n for n, m in model.named_modules() if n.endswith(("to_q", "conv1", "q_proj")) and hasattr(m, "weight")]
    config = ll.LoraConfig(
        r=2, lora_alpha=6, target_modules=targets, rank_pattern={targets[0]: 3}, init_lora_weights=False
    )
    ll.attach(model).add_adapter(config)
    return model


def changes(model: Any) -> dict[str, Tensor]:
    (name,) = {name for _, layer in adapter_layers(model) for name in layer.templates}
    return {path: layer.delta(name).delta_weight() for path, layer in adapter_layers(model)}


def assert_same(model: Any, other: Any) -> None:
    one, two = changes(model), changes(other)
    assert one.keys() == two.keys()
    assert all(one[path].equal(two[path]) for path in one)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_loads_what_it_saved(kind: str, tmp_path: Path) -> None:
    model, other = trained(MODELS[kind]()), ll.attach(MODELS[kind]())
    path = model.save_lora_adapter(tmp_path)
    report = other.load_lora_adapter(path, prefix=None)
    assert (dict(report.unmatched), dict(report.ignored)) == ({}, {})
    assert_same(model, other)
    bare = {key: tensor for key, tensor in load_file(path).items() if "decoder" in key} or load_file(path)
    part = ll.attach(MODELS[kind]()).load_lora_adapter(bare, prefix=None)
    assert sum(part.components.values()) * 2 == len(bare)


@pytest.mark.parametrize("prefix", ["controlnet", "my.model", "unet", "text_encoder", "transformer"])
@pytest.mark.parametrize("alphas", ["header", "network_alphas", "metadata"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_prefix_is_taken_off_keys_alphas_and_header(kind: str, alphas: str, prefix: str, tmp_path: Path) -> None:
    """As diffusers does: what begins with the prefix is the model's, under the name behind it."""
    model, other = trained(MODELS[kind]()), ll.attach(MODELS[kind]())
    path = model.save_lora_adapter(tmp_path)
    tensors = {f"{prefix}.{key}": tensor for key, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    header = {f"{prefix}.{name}": value for name, value in fields.items()}
    if alphas == "header":
        save_file(tensors, path, {"lora_adapter_metadata": json.dumps(header)})
        report = other.load_lora_adapter(path, prefix=prefix)
    elif alphas == "metadata":
        report = other.load_lora_adapter(tensors, prefix=prefix, metadata=header)
    else:
        paths = changes(model)
        report = other.load_lora_adapter(
            tensors, prefix=prefix, network_alphas={f"{prefix}.{name}.alpha": 6.0 for name in paths}
        )
    assert (dict(report.unmatched), dict(report.ignored)) == ({}, {})
    assert_same(model, other)


def test_a_key_that_stands_there_without_the_prefix_too_is_not_left_out_silently(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model: Any = ll.attach(nn.ModuleDict({"blk": nn.Linear(4, 4)}))
    own = {"my.blk.lora_A.weight": torch.ones(2, 4), "my.blk.lora_B.weight": torch.ones(4, 2)}
    model.load_lora_adapter({**own, "blk.lora_A.weight": torch.zeros(2, 4)}, prefix="my", adapter_name="a")
    assert "1 keys stand there without my. too" in caplog.text
    assert model["blk"].lora_A["a"].weight.eq(1).all()
