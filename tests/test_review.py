"""What callers of diffusers rely on: PEFT's helpers, positional arguments, all or nothing, names and weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import adapter_file, bits, changed_bits, flux, photograph, pipeline, render, unet
from torch import Tensor

import lora_loaders as ll
from lora_loaders.layout import adapter_layers


def loaded(family: str = "sd15", *names: str) -> Any:
    pipe = ll.attach(pipeline(family))
    for seed, name in enumerate(names):
        pipe.load_lora_weights(adapter_file(pipeline(family), scale=0.1, seed=seed).tensors, name)
    return pipe


def factors(pipe: Any, component: str) -> dict[str, Tensor]:
    tensors = adapter_file(pipe, scale=0.1, components=[component]).tensors
    return {key.removeprefix(f"{component}."): tensor for key, tensor in tensors.items()}


# PEFT's helpers


@pytest.mark.parity
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "gaussian"}])
def test_the_training_scripts_of_diffusers_go_through(options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT's helpers need PEFT")
    from diffusers.training_utils import _collate_lora_metadata, cast_training_params

    pipe = ll.attach(pipeline("sd15"))
    pipe.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"], **options))
    cast_training_params(pipe.unet, dtype=torch.float32)
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.1 * torch.randn_like(parameter)
    layers = peft.get_peft_model_state_dict(pipe.unet)
    assert sum(tensor.numel() for tensor in layers.values()) == sum(p.numel() for p in trained)
    assert not any("default" in key or "base_layer" in key for key in layers)
    metadata = _collate_lora_metadata({"unet": pipe.unet})
    type(pipe).save_lora_weights(save_directory=tmp_path, unet_lora_layers=layers, **metadata)
    pipe.unet.eval()
    wanted = render(pipe)
    other = ll.attach(pipeline("sd15"))
    assert other.load_lora_weights(tmp_path).unmatched == {}
    torch.testing.assert_close(render(other), wanted, rtol=1e-4, atol=1e-4)
    assert (render(pipeline("sd15")) - wanted).abs().max() > 1e-3


@pytest.mark.parity
def test_peft_reads_its_own_state_dictionary_back() -> None:
    peft = pytest.importorskip("peft", reason="PEFT's helpers need PEFT")
    one, other = ll.attach(unet()), ll.attach(unet())
    for model in (one, other):
        model.add_adapter(ll.LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q"]))
    layers = peft.get_peft_model_state_dict(one)
    result = peft.set_peft_model_state_dict(other, layers, adapter_name="default")
    assert not result.unexpected_keys
    for key, tensor in peft.get_peft_model_state_dict(other).items():
        assert torch.equal(tensor, layers[key]), key


@pytest.mark.parity
def test_one_of_two_adapters_is_taken() -> None:
    peft = pytest.importorskip("peft", reason="PEFT's helpers need PEFT")
    model = ll.attach(unet())
    model.add_adapter(ll.LoraConfig(r=4, target_modules=["to_q"]), "a")
    model.add_adapter(ll.LoraConfig(r=2, target_modules=["to_k"]), "b")
    layers = peft.get_peft_model_state_dict(model, adapter_name="b")
    assert layers
    assert all(".to_k.lora_" in key for key in layers)


def test_the_configuration_answers_what_peft_asks() -> None:
    config = ll.LoraConfig()
    assert (config.peft_type, config.is_prompt_learning, config.is_adaption_prompt) == ("LORA", False, False)


# Signatures


def test_the_second_position_is_the_denoisers_layers(tmp_path: Path) -> None:
    pipe = ll.attach(pipeline("sd15"))
    layers = factors(pipe, "unet")
    for owner in (ll.StableDiffusionLoraLoaderMixin, type(pipe), pipe):
        report = ll.attach(pipeline("sd15")).load_lora_weights(owner.save_lora_weights(tmp_path, layers))
        assert list(report.components) == ["unet"]
    with pytest.raises(TypeError, match="adapter_name=") as error:
        pipe.save_lora_weights(tmp_path, [torch.full((9,), 0.125)])
    assert "0.125" not in str(error.value)
    with pytest.raises(TypeError, match="adapter_name="):
        pipe.save_lora_weights(tmp_path, "a")
    with pytest.raises(TypeError, match="multiple values"):
        pipe.save_lora_weights(tmp_path, layers, unet_lora_layers=layers)
    with pytest.raises(TypeError, match="_lora_layers"):
        ll.LoraPipelineMixin.save_lora_weights(tmp_path, layers)


def test_load_lora_into_takes_positions_as_diffusers_does() -> None:
    pipe = ll.attach(pipeline("sd15"))
    layers = factors(pipe, "unet")
    type(pipe).load_lora_into_unet(layers, None, pipe.unet, "a")
    assert pipe.get_list_adapters() == {"unet": ["a"]}
    type(pipe).load_lora_into_unet(layers, None, pipe.unet, adapter_name="b", _pipeline=pipe, low_cpu_mem_usage=True)
    encoder = factors(pipe, "text_encoder")
    type(pipe).load_lora_into_text_encoder(encoder, None, pipe.text_encoder, None, 0.5, "a")
    assert {w for _, layer in adapter_layers(pipe.text_encoder) for w in layer.weights.values()} == {0.5}
    with pytest.raises(TypeError, match="hotswop"):
        type(pipe).load_lora_into_unet(layers, None, pipe.unet, hotswop=True)
    with pytest.raises(TypeError, match="multiple values for argument 'adapter_name'"):
        type(pipe).load_lora_into_unet(layers, None, pipe.unet, "c", adapter_name="c")
    with pytest.raises(TypeError, match="positional arguments"):
        type(pipe).load_lora_into_unet(layers, None, pipe.unet, "c", None, False, False, None, 1)
    with pytest.raises(TypeError, match="'unet'"):
        type(pipe).load_lora_into_unet(layers, pipe.unet)
    with pytest.raises(TypeError, match="unet is a module"):
        type(pipe).load_lora_into_unet(layers, pipe.unet, None)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("with_alphas", [True, False])
def test_load_lora_into_transformer_takes_both_orders(with_alphas: bool, prefix: str) -> None:
    model = flux()
    layers = {
        "transformer_blocks.0.attn.to_q.lora_A.weight": torch.randn(4, 32),
        "transformer_blocks.0.attn.to_q.lora_B.weight": torch.randn(32, 4),
    }
    metadata = {f"{prefix}r": 4, f"{prefix}lora_alpha": 8}
    load = ll.LoraPipelineMixin.load_lora_into_transformer
    if with_alphas:
        load(layers, None, model, "a", metadata)
    else:
        load(layers, model, "a", None, False, False, metadata)
    assert [layer.delta("a").alpha_value for _, layer in adapter_layers(model)] == [8.0]


def test_unload_takes_its_argument_by_position() -> None:
    pipe = loaded("sd15", "a")
    pipe.unload_lora_weights(True)
    assert pipe.get_list_adapters() == {}


def test_alphas_by_position() -> None:
    tensors = adapter_file(pipeline("flux1")).tensors
    plain, alphas = ll.FluxLoraLoaderMixin.lora_state_dict(tensors, True)
    assert isinstance(plain, dict)
    assert alphas is None or isinstance(alphas, dict)


def test_layers_are_packed_and_written_as_diffusers_does(tmp_path: Path) -> None:
    pipe = ll.attach(pipeline("sd15"))
    packed = pipe.pack_weights(factors(pipe, "unet"), "unet")
    pipe.write_lora_layers(packed, tmp_path, True, None, None, True, {"unet.r": 4, "unet.target_modules": {"b", "a"}})
    assert pipe.load_lora_weights(tmp_path, user_agent={"file_type": "x"}).components
    type(pipe).write_lora_layers(packed, tmp_path, True, "x.bin", None, False)
    read = torch.load(tmp_path / "x.bin", weights_only=True)
    assert all(torch.equal(read[key], packed[key]) for key in packed)
    pipe.write_lora_layers(packed, tmp_path / "other", False, None, None, True)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="safe_serialization"):
        pipe.write_lora_layers(packed, tmp_path, True, None, None, False, {"unet.r": 4})
    with pytest.raises(ll.AdapterFileError, match="directory"):
        pipe.write_lora_layers(packed, tmp_path / "x.bin", True, None, None, True)
    assert (pipe.unet_name, pipe.transformer_name, pipe.text_encoder_name) == ("unet", "transformer", "text_encoder")


def test_encode_prompt_takes_the_scale_by_position() -> None:
    pipe = loaded("sd15", "a")
    with torch.no_grad():
        named = pipe.encode_prompt("a dog", "cpu", 1, False, lora_scale=0.25)[0]
        placed = pipe.encode_prompt("a dog", "cpu", 1, False, None, None, None, 0.25)[0]
        plain = pipe.encode_prompt("a dog", "cpu", 1, False)[0]
    assert torch.equal(named, placed)
    assert not torch.equal(named, plain)


def test_a_models_adapter_is_saved_as_a_pickle(tmp_path: Path) -> None:
    pipe = loaded("sd15", "a")
    path = pipe.unet.save_lora_adapter(tmp_path, "a", safe_serialization=False)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.bin"]
    read = torch.load(path, weights_only=True)
    assert read
    assert ll.attach(unet()).load_lora_adapter(path, use_safetensors=False).components


# A component that is put in later


def test_a_component_that_is_put_in_later_gets_the_methods(tmp_path: Path) -> None:
    pipe = ll.attach(pipeline("sd15"))
    plain = type(pipe.unet).__mro__[2]
    pipe.unet = unet()
    pipe.load_lora_weights(adapter_file(pipe).tensors, "a")
    assert isinstance(pipe.unet, ll.LoraModelMixin)
    pipe.unet.save_pretrained(tmp_path)
    assert set(plain.from_pretrained(tmp_path).state_dict()) == set(unet().state_dict())
    pipe.unet.unload_lora()
    ll.detach(pipe)
    assert type(pipe.unet) is plain


# All or nothing


def spoil(model: Any) -> None:
    with torch.no_grad():
        adapter_layers(model)[0][1].base_layer.weight.add_(1.0)


@pytest.mark.parametrize("action", [
    lambda pipe: pipe.unfuse_lora(),
    lambda pipe: pipe.delete_adapters("a"),
    lambda pipe: pipe.unload_lora_weights(keep_fused=False),
    lambda pipe: ll.detach(pipe, keep_fused=False),
])  # fmt: skip
def test_a_changed_weight_keeps_every_component_as_it_is(action: Any) -> None:
    pipe = loaded("sd15", "a", "b")
    pipe.set_adapters(["a", "b"])
    pipe.fuse_lora()
    spoil(pipe.text_encoder)
    before = {name: bits(model) for name, model in pipe.lora_components.items()}
    picture = render(pipe)
    with pytest.raises(ll.AdapterStateError, match="Nothing was unfused") as error:
        action(pipe)
    assert "unload_lora_weights(keep_fused=True)" in str(error.value)
    assert all(not changed_bits(before[name], model) for name, model in pipe.lora_components.items())
    assert pipe.fused_loras == {"a", "b"}
    assert pipe.get_list_adapters() == {"unet": ["a", "b"], "text_encoder": ["a", "b"]}
    assert torch.equal(render(pipe), picture)
    pipe.unload_lora_weights(keep_fused=True)
    assert pipe.get_list_adapters() == {}


def test_detaching_what_is_fused_changes_nothing_before_it_is_told_how() -> None:
    pipe = loaded("sd15", "a")
    pipe.fuse_lora(["text_encoder"])
    before = photograph(pipe)
    with pytest.raises(ll.AdapterStateError):
        ll.detach(pipe)
    assert before.differences(photograph(pipe)) == []


# Names and weights


@pytest.mark.parametrize(("names", "weights", "match"), [
    ("a", float("nan"), "finite"),
    ("a", [float("inf")], "finite"),
    ("a", {"unet": float("-inf")}, "finite"),
    ("a", torch.tensor(float("nan")), "finite"),
    ("a", "0.5", "number, not '0.5'"),
    ("a", object(), "number, not a object"),
    ("a", {"unet": {"down": "xx"}}, "number"),
    ("a", {"unet": {"(": 0.5}}, "regular expression"),
    ("a", {"unet": {5: 0.5}}, "no adapted module"),
    (["a", "a"], None, "named twice"),
    (["a", 5], None, "string, not a int"),
    (5, None, "string, not a int"),
])  # fmt: skip
def test_odd_names_and_weights_are_refused(names: Any, weights: Any, match: str) -> None:
    pipe = loaded("sd15", "a")
    before = photograph(pipe)
    with pytest.raises(ll.AdapterStateError, match=match):
        pipe.set_adapters(names, weights)
    assert before.differences(photograph(pipe)) == []


@pytest.mark.parametrize("make", [
    lambda: torch.tensor(0.5),
    lambda: torch.tensor([0.5]),
    lambda: pytest.importorskip("numpy").float32(0.5),
    lambda: pytest.importorskip("numpy").array(0.5),
    lambda: {"unet": torch.tensor(0.5), "text_encoder": 0.5},
])  # fmt: skip
def test_numbers_of_every_make_are_taken(make: Any) -> None:
    pipe = loaded("sd15", "a")
    pipe.set_adapters("a", make())
    models = pipe.lora_components.values()
    assert {layer.weights["a"] for model in models for _, layer in adapter_layers(model)} == {0.5}


@pytest.mark.parametrize("action", [
    lambda pipe, tensors: pipe.load_lora_weights(tensors, 5),
    lambda pipe, tensors: pipe.unet.load_lora_adapter(tensors, adapter_name=5),
    lambda pipe, tensors: pipe.unet.add_adapter(ll.LoraConfig(target_modules=["to_q"]), 5),
    lambda pipe, tensors: type(pipe).load_lora_into_unet(tensors, None, pipe.unet, 5),
    lambda pipe, tensors: pipe.unet.set_adapter(["a", "a"]),
    lambda pipe, tensors: pipe.unet.set_adapters("a", float("nan")),
    lambda pipe, tensors: pipe.fuse_lora(adapter_names=[5]),
    lambda pipe, tensors: pipe.fuse_lora(lora_scale=float("nan")),
    lambda pipe, tensors: pipe.unet.fuse_lora(lora_scale="1"),
    lambda pipe, tensors: pipe.encode_prompt("a", "cpu", 1, False, lora_scale="1"),
])  # fmt: skip
def test_they_are_refused_wherever_they_enter(action: Any) -> None:
    pipe = loaded("sd15", "a")
    before = photograph(pipe)
    with pytest.raises(ll.AdapterStateError):
        action(pipe, adapter_file(pipeline("sd15")).tensors)
    assert before.differences(photograph(pipe)) == []
