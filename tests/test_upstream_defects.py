"""What goes wrong in diffusers 0.42.1 with peft 0.21.2, one by one, and goes right here; other files have the rest."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import adapter_file, flux, photograph, pipeline, render
from torch import Tensor

import lora_loaders as ll
from lora_loaders.scaling import METADATA_KEY

QUERY, KEY = (f"transformer_blocks.0.attn.to_{which}" for which in "qk")


def factors(*paths: str, rank: int = 4, prefix: str = "transformer.") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        f"{prefix}{path}.lora_{side}.weight": torch.randn(*shape, generator=generator)
        for path in paths
        for side, shape in (("A", (rank, 32)), ("B", (32, rank)))
    }


def check_scaling(model: Any, tensors: dict[str, Tensor], path: str, scaling: float) -> None:
    """A layer computes base(x) + scaling · B A x, each time."""
    layer = model.get_submodule(path)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(6))
    down, up = (tensors[f"transformer.{path}.lora_{side}.weight"] for side in "AB")
    with torch.no_grad():
        expected = layer.base_layer(x) + scaling * x @ down.T @ up.T
        for _ in range(3):
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_modules_without_an_alpha_do_not_take_that_of_others() -> None:
    model: Any = ll.attach(flux())
    tensors = factors(QUERY, KEY, rank=16)
    model.load_lora_adapter({**tensors, f"transformer.{QUERY}.alpha": torch.tensor(1.0)}, adapter_name="a")
    check_scaling(model, tensors, QUERY, 1 / 16)
    check_scaling(model, tensors, KEY, 1.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.lora_dropout": 0.5},
        {"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.a_field_of_next_year": {"x": 1}},
    ],
)
def test_dropout_and_unknown_fields_of_a_header_change_nothing_at_inference(fields: Any, tmp_path: Path) -> None:
    model: Any = ll.attach(flux())
    tensors = factors(QUERY)
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", METADATA_KEY: json.dumps(fields)})
    model.load_lora_adapter(tmp_path / "a.safetensors", adapter_name="a")
    check_scaling(model, tensors, QUERY, 0.5)


def test_a_header_about_one_component_leaves_the_other_to_its_tensors(tmp_path: Path) -> None:
    pipe: Any = ll.attach(pipeline("flux1"))
    made = adapter_file(pipe, components=["text_encoder"], alpha=None).tensors
    tensors = factors(QUERY)
    header = {METADATA_KEY: json.dumps({"text_encoder.r": 4, "text_encoder.lora_alpha": 4})}
    save_file({**made, **tensors}, tmp_path / "a.safetensors", header)
    report = pipe.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    assert set(report.components) == {"transformer", "text_encoder"}
    check_scaling(pipe.transformer, tensors, QUERY, 1.0)


@pytest.mark.parametrize("side", "AB")
@pytest.mark.parametrize("key", ["transformer.{}.lora_{}.weight", "transformer.{}.lora_{}.default.weight"])
def test_half_a_pair_is_an_error_and_no_random_matrix(side: str, key: str) -> None:
    pipe: Any = ll.attach(pipeline("flux1"))
    before = photograph(pipe)
    pairs = {path: zip("AB", factors(path).values(), strict=True) for path in (QUERY, KEY)}
    tensors = {key.format(path, which): tensor for path, pair in pairs.items() for which, tensor in pair}
    del tensors[key.format(KEY, side)]
    with pytest.raises(ll.AdapterFileError, match="to_k"):
        pipe.load_lora_weights(tensors, adapter_name="a")
    assert before.differences(photograph(pipe)) == []


def test_a_file_for_another_network_loads_nothing_in_no_silence() -> None:
    pipe: Any = ll.attach(pipeline("flux1"))
    before = photograph(pipe)
    for load in (pipe.load_lora_weights, pipe.transformer.load_lora_adapter):
        with pytest.raises(ll.LoraLoadersError):
            load(factors(QUERY, prefix="controlnet."), adapter_name="a")
    assert before.differences(photograph(pipe)) == []


def test_a_file_in_the_place_of_the_folder_is_an_error_and_stays(tmp_path: Path) -> None:
    pipe: Any = ll.attach(pipeline("flux1"))
    pipe.load_lora_weights(factors(QUERY), adapter_name="a")
    place = tmp_path / "file"
    place.write_text("mine")
    for save in (pipe.save_lora_weights, pipe.transformer.save_lora_adapter):
        with pytest.raises(ll.AdapterFileError):
            save(place, adapter_name="a")
    assert place.read_text() == "mine"


def test_a_scale_is_not_remembered_for_the_next_adapter_of_a_text_encoder() -> None:
    pipe: Any = ll.attach(pipeline("sd15"))
    tensors = adapter_file(pipe, components=["text_encoder"]).tensors
    pipe.load_lora_weights(tensors, adapter_name="a")
    whole = render(pipe)
    assert not torch.equal(render(pipe, cross_attention_kwargs={"scale": 0.5}), whole)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tensors, adapter_name="b")
    assert torch.equal(render(pipe), whole)


def test_two_adapters_with_a_bias_are_added_and_each_has_its_own() -> None:
    model: Any = ll.attach(flux())
    x = torch.randn(3, 32)
    plain = model.get_submodule(QUERY)(x)
    for name, value in (("a", 1.0), ("b", 3.0)):
        model.add_adapter(ll.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], lora_bias=True), name)
        layer = model.get_submodule(QUERY)
        with torch.no_grad():
            layer.lora_B[name].bias.fill_(value)
    for weights, added in (({"a": 1.0}, 1.0), ({"b": 0.5}, 1.5), ({"a": 1.0, "b": 1.0}, 4.0)):
        model.set_adapters(list(weights), list(weights.values()))
        torch.testing.assert_close(model.get_submodule(QUERY)(x), plain + added)


def test_a_models_saved_adapter_loads_through_the_pipeline_too(tmp_path: Path) -> None:
    pipe: Any = ll.attach(pipeline("flux1"))
    pipe.load_lora_weights(factors(QUERY), adapter_name="a")
    expected = render(pipe)
    pipe.transformer.save_lora_adapter(tmp_path, adapter_name="a")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path, adapter_name="b")
    assert torch.equal(render(pipe), expected)


def test_the_adapters_of_an_ip_adapter_for_faces_load_as_diffusers_hands_them_over() -> None:
    """`load_ip_adapter` gives them to `load_lora_weights` under the names of 2023, where it believes peft is there."""
    pipe, plain = ll.attach(pipeline("sd15")), pipeline("sd15")
    changes: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(3)
    for number, name in enumerate(plain.unet.attn_processors):
        for part in ("to_q", "to_k", "to_v", "to_out"):
            path = f"{name.removesuffix('.processor')}.{part}" + (".0" if part == "to_out" else "")
            rows, columns = plain.unet.get_submodule(path).weight.shape
            down, up = (torch.randn(*shape, generator=generator) * 0.3 for shape in ((2, columns), (rows, 2)))
            held |= {f"{number}.{part}_lora.down.weight": down, f"{number}.{part}_lora.up.weight": up}
            changes[path] = up @ down
    for number, tensors in plain.unet._load_ip_adapter_loras([{"ip_adapter": held}]).items():
        pipe.load_lora_weights(tensors, adapter_name=f"faceid_{number}")
    without = render(plain)
    with torch.no_grad():
        for path, change in changes.items():
            plain.unet.get_submodule(path).weight += change
    expected = render(plain)
    assert not torch.allclose(expected, without, atol=1e-3)
    torch.testing.assert_close(render(pipe), expected, rtol=1e-3, atol=1e-4)
    assert pipe.get_list_adapters() == {"unet": ["faceid_0"]}
