"""The models' methods: diffusers' names for one model, PEFT's too, on any module."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Made, adapter_file, bits, changed_bits, flux, pipeline, unet
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.layout import adapter_layers

INPUTS = (torch.linspace(-1, 1, 256).view(1, 4, 8, 8), 1, torch.linspace(-1, 1, 96).view(1, 3, 32))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return ll.attach(unet())


@pytest.fixture
def made() -> Made:
    return adapter_file(pipeline("sd15"), components=["unet"], scale=0.1)


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(*INPUTS).sample


def without_prefix(made: Made) -> dict[str, Tensor]:
    return {key.removeprefix("unet."): tensor for key, tensor in made.tensors.items()}


def wanted(made: Made, *weights: float) -> Tensor:
    torch.manual_seed(0)
    oracle = unet()
    with torch.no_grad():
        for path, change in made.changes["unet"].items():
            oracle.get_submodule(path).weight += sum(weights) * change.float()
    return run(oracle)


@pytest.mark.parametrize("prefix", ["unet", None, "transformer"])
@pytest.mark.parametrize("prefixed", [True, False])
def test_a_model_loads_with_and_without_a_prefix(model: Any, made: Made, prefix: str | None, prefixed: bool) -> None:
    report = model.load_lora_adapter(
        made.tensors if prefixed else without_prefix(made), prefix=prefix, adapter_name="a"
    )
    assert report.components == {"unet": len(made.changes["unet"])}
    torch.testing.assert_close(run(model), wanted(made, 1.0), rtol=1e-5, atol=1e-5)


def test_saved_adapters_load_with_the_default_arguments(model: Any, made: Made, tmp_path: Path) -> None:
    model.load_lora_adapter(made.tensors, adapter_name="default")
    picture = run(model)
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    model.load_lora_adapter(tmp_path)
    assert torch.equal(run(model), picture)
    pipe = ll.attach(pipeline("sd15"))
    report = pipe.load_lora_weights(tmp_path)
    assert report.components == {"unet": len(made.changes["unet"])}


def test_saving_never_casts_the_live_model(model: Any, made: Made, tmp_path: Path) -> None:
    model.to(torch.bfloat16).load_lora_adapter(made.tensors, adapter_name="default")
    path = model.save_lora_adapter(tmp_path, upcast_before_saving=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    from safetensors.torch import load_file

    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}


def test_unknown_names_are_refused_and_nothing_is_written(model: Any, made: Made, tmp_path: Path) -> None:
    model.load_lora_adapter(made.tensors, adapter_name="a")
    for call in (
        lambda: model.save_lora_adapter(tmp_path),
        lambda: model.set_adapter("zzz"),
        lambda: model.set_adapters(["a", "zzz"]),
        lambda: model.delete_adapters("zzz"),
        lambda: model.fuse_lora(adapter_names=["zzz"]),
    ):
        with pytest.raises(ll.AdapterStateError):
            call()
    assert list(tmp_path.iterdir()) == []
    assert model.active_adapters() == ["a"]


def test_alphas_beside_a_state_dictionary_are_heeded(model: Any) -> None:
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {f"{path}.lora_A.weight": torch.ones(4, 32), f"{path}.lora_B.weight": torch.ones(32, 4)}
    model.load_lora_adapter(state, prefix=None, adapter_name="a", network_alphas={f"{path}.alpha": 2.0})
    model.load_lora_adapter(
        state, prefix=None, adapter_name="b", metadata={"r": 4, "lora_alpha": 6, "target_modules": ["to_q"]}
    )
    ((_, layer),) = adapter_layers(model)
    assert torch.equal(layer.delta("a").delta_weight(), torch.full((32, 32), 2.0))
    assert torch.equal(layer.delta("b").delta_weight(), torch.full((32, 32), 6.0))
    with pytest.raises(ValueError, match="Both `network_alphas` and `metadata` cannot be specified"):
        model.load_lora_adapter(state, network_alphas={"x": 1.0}, metadata={"r": 4})


def test_diffusers_and_pefts_names_switch_alike(model: Any, made: Made) -> None:
    plain = run(model)
    model.load_lora_adapter(made.tensors, adapter_name="a")
    model.load_lora_adapter(made.tensors, adapter_name="b")
    model.set_adapter(["a", "b"])
    assert model.active_adapters() == ["a", "b"]
    torch.testing.assert_close(run(model), wanted(made, 2.0), rtol=1e-4, atol=1e-5)
    model.set_adapters(["a", "b"], [0.5, 0.25])
    torch.testing.assert_close(run(model), wanted(made, 0.75), rtol=1e-4, atol=1e-5)
    model.set_adapter("a")
    torch.testing.assert_close(run(model), wanted(made, 0.5), rtol=1e-4, atol=1e-5)
    for off, on in ((model.disable_adapters, model.enable_adapters), (model.disable_lora, model.enable_lora)):
        off()
        assert torch.equal(run(model), plain)
        on()
    model.delete_adapters(["a", "b"])
    assert torch.equal(run(model), plain)


def test_set_adapter_keeps_the_weights_that_were_set(model: Any, made: Made) -> None:
    """As in PEFT, where set_adapter chooses and scaling is another matter."""
    model.load_lora_adapter(made.tensors, adapter_name="a")
    model.set_adapters("a", 0.5)
    model.set_adapter("a")
    torch.testing.assert_close(run(model), wanted(made, 0.5), rtol=1e-4, atol=1e-5)


def test_merging_by_pefts_names(model: Any, made: Made) -> None:
    before = bits(model)
    model.load_lora_adapter(made.tensors, adapter_name="a")
    model.merge_adapter()
    assert changed_bits(before, model)
    torch.testing.assert_close(run(model), wanted(made, 1.0), rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert changed_bits(before, model) == []
    model.merge_adapter(["a"], safe_merge=True)
    assert model.unload() is model
    assert adapter_layers(model) == []
    assert changed_bits(before, model) == []


def test_flags_that_others_read_come_and_go(model: Any, made: Made) -> None:
    model.load_lora_adapter(made.tensors, adapter_name="a")
    assert model._hf_peft_config_loaded is True
    assert list(model.peft_config) == ["a"]
    assert (model.peft_config["a"].r, model.peft_config["a"].lora_alpha) == (4, 4)
    model.unload_lora()
    assert not getattr(model, "_hf_peft_config_loaded", False)
    assert not getattr(model, "peft_config", None)


def test_any_module_can_carry_adapters() -> None:
    net: Any = ll.attach(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    state = {"0.lora_A.weight": torch.randn(2, 4), "0.lora_B.weight": torch.randn(6, 2)}
    base = net[0].weight.detach().clone()
    x = torch.randn(3, 4)
    net.load_lora_adapter(state, prefix=None, adapter_name="a")
    with torch.no_grad():
        hidden = torch.relu(x @ (base + state["0.lora_B.weight"] @ state["0.lora_A.weight"]).T + net[0].bias)
        torch.testing.assert_close(net(x), net[2](hidden))
    net.unload_lora()
    assert type(net[0]) is nn.Linear


def test_a_file_for_another_size_names_both_shapes() -> None:
    model: Any = ll.attach(flux())
    key = "transformer.transformer_blocks.0.attn.to_q"
    with pytest.raises(ll.AdapterMismatchError, match=r"\(64, 64\).*\(32, 32\)"):
        model.load_lora_adapter({f"{key}.lora_A.weight": torch.ones(4, 64), f"{key}.lora_B.weight": torch.ones(64, 4)})
    assert adapter_layers(model) == []


def test_hotswap_room_is_kept_from_the_first_load_on(model: Any, made: Made) -> None:
    model.enable_lora_hotswap(target_rank=32)
    model.load_lora_adapter(made.tensors, adapter_name="a")
    layers: list[Any] = [layer for _, layer in adapter_layers(model)]
    assert {layer.slot_down.shape[0] for layer in layers} == {32}
    torch.testing.assert_close(run(model), wanted(made, 1.0), rtol=1e-4, atol=1e-5)


def test_a_hotswap_does_not_recompile() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = ll.attach(flux())
    files = [
        adapter_file(pipeline("flux1"), components=["transformer"], seed=seed, rank=2 + seed).tensors for seed in (1, 2)
    ]
    inputs = {
        "hidden_states": torch.randn(1, 4, 16),
        "encoder_hidden_states": torch.randn(1, 3, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
        "guidance": torch.tensor([3.5]),
    }
    model.enable_lora_hotswap(target_rank=8)
    model.load_lora_adapter(files[0], adapter_name="a")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        first = compiled(**inputs).sample
        torch.testing.assert_close(first, model(**inputs).sample, rtol=1e-4, atol=1e-5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            model.load_lora_adapter(files[1], adapter_name="a", hotswap=True)
            second = compiled(**inputs).sample
            model.set_adapters("a", 0.5)
            third = compiled(**inputs).sample
        assert (first - second).abs().max() > 1e-3
        assert (third - second).abs().max() > 1e-3
        torch.testing.assert_close(third, model(**inputs).sample, rtol=1e-4, atol=1e-5)
