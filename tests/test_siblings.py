"""Parts of a fused module that depend on all of its rows: per-input DoRA, rotations cut off their blocks."""

import copy
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import flux
from torch import Tensor

import lora_loaders as ll
from lora_loaders import fusing
from lora_loaders.attaching import apply
from lora_loaders.deltas import Delta, build
from lora_loaders.errors import AdapterMismatchError, ConversionError
from lora_loaders.layers.slots import refresh
from lora_loaders.layout import adapter_layers
from lora_loaders.plans import plan_adapter
from lora_loaders.writing import to_tensors

STEM = "lora_unet_double_blocks_0_img_attn_qkv"
ATTENTION = "transformer_blocks.0.attn"
PARTS = ("to_q", "to_k", "to_v")
SIDE = 32


def slots_of(case: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    lora = {"down": randn(4, SIDE), "up": randn(3 * SIDE, 4)}
    lokr = {"lokr_w1": randn(2, 2), "lokr_w2": randn(3 * SIDE // 2, SIDE // 2)}
    oft = {"oft_blocks": randn(2, 3 * SIDE // 2, 3 * SIDE // 2)}
    per_input, per_output = randn(1, SIDE).abs() + 0.5, randn(3 * SIDE, 1).abs() + 0.5
    return {
        "dora per input": {**lora, "magnitude": per_input},
        "dora per input over lokr": {**lokr, "magnitude": per_input},
        "oft off its blocks": oft,
        "dora per output over oft": {**oft, "magnitude": per_output},
        "dora per input over oft": {**oft, "magnitude": per_input},
    }[case]


CASES = (
    "dora per input",
    "dora per input over lokr",
    "oft off its blocks",
    "dora per output over oft",
    "dora per input over oft",
)
KOHYA = {"down": ".lora_down.weight", "up": ".lora_up.weight", "magnitude": ".dora_scale"}


def file_of(case: str) -> dict[str, Tensor]:
    return {STEM + KOHYA.get(slot, f".{slot}"): tensor for slot, tensor in slots_of(case).items()}


def whole_of(case: str) -> Delta:
    return build({slot: tensor.double() for slot, tensor in slots_of(case).items()}, None)


def weights_of(model: Any) -> Tensor:
    return torch.cat([model.get_submodule(f"{ATTENTION}.{part}").weight.detach() for part in PARTS]).double()


def outputs(model: Any, x: Tensor) -> Tensor:
    """What q, k and v make of x, without their biases."""
    with torch.no_grad():
        layers = [model.get_submodule(f"{ATTENTION}.{part}") for part in PARTS]
        return torch.cat([layer(x) - layer.bias for layer in layers], -1).double()


def attached(case: str) -> tuple[Any, Tensor, Tensor]:
    """A model with the adapter, an input, and what the fused module with ΔW in float64 makes of it."""
    model = flux()
    base = weights_of(model)
    plan = plan_adapter({"transformer": model}, ll.read_adapter(file_of(case)))
    assert not plan.problems
    apply(plan, "x")
    x = torch.randn(3, SIDE, generator=torch.Generator().manual_seed(2))
    return model, x, x.double() @ (base + whole_of(case).delta_weight(base)).T


@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_fused_module_run_fuse_and_come_back_as_the_whole(case: str) -> None:
    model, x, wanted = attached(case)
    before = {part: model.get_submodule(f"{ATTENTION}.{part}").base_layer.weight.clone() for part in PARTS}
    torch.testing.assert_close(outputs(model, x), wanted, atol=5e-6, rtol=1e-5)
    fusing.fuse(model)
    torch.testing.assert_close(outputs(model, x), wanted, atol=5e-6, rtol=1e-5)
    fusing.unfuse(model)
    for part, weight in before.items():
        assert torch.equal(model.get_submodule(f"{ATTENTION}.{part}").base_layer.weight, weight)
    torch.testing.assert_close(outputs(model, x), wanted, atol=5e-6, rtol=1e-5)


def test_a_part_heeds_its_siblings_original_weights_while_another_adapter_is_fused_into_them() -> None:
    case = "dora per input"
    model, x, _ = attached(case)
    base = weights_of(model)
    apply(
        plan_adapter(
            {"transformer": model},
            ll.read_adapter(
                {f"transformer.{ATTENTION}.to_k.lora_A.weight": torch.randn(2, SIDE)}
                | {f"transformer.{ATTENTION}.to_k.lora_B.weight": torch.randn(SIDE, 2)}
            ),
        ),
        "other",
    )
    fusing.fuse(model, ["other"])
    layers = [layer for _, layer in adapter_layers(model)]
    for layer in layers:
        layer.activate(("x",))
    refresh(layers)
    change = whole_of(case).delta_weight(base)
    torch.testing.assert_close(outputs(model, x)[:, :SIDE], x.double() @ (base + change)[:SIDE].T, atol=5e-6, rtol=1e-5)


def test_copies_and_pickles_of_a_model_read_their_own_weights() -> None:
    model, x, wanted = attached("dora per input")
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        for part in PARTS:
            model.get_submodule(f"{ATTENTION}.{part}").base_layer.weight.data.zero_()
        refresh(layer for _, layer in adapter_layers(twin))
        torch.testing.assert_close(outputs(twin, x), wanted, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_parts_are_written_back_as_the_fused_module_and_never_alone(case: str) -> None:
    adapter = ll.read_adapter(file_of(case))
    for name in ("kohya", "original"):
        again = ll.read_adapter(to_tensors(adapter, name)[0])
        assert all(torch.equal(t, to_tensors(again, "kohya")[0][key]) for key, t in file_of(case).items())
    for name in ("diffusers", "peft", "lycoris"):
        with pytest.raises(ConversionError) as caught:
            to_tensors(adapter, name)
        message = str(caught.value)
        assert "--as lora --rank" in message
        assert "a format that can say it (kohya," in message
        assert "--model" in message


@pytest.mark.parametrize("case", CASES)
def test_resize_and_full_with_the_models_weights_give_the_change_of_the_whole(case: str) -> None:
    model = flux()
    base = weights_of(model)
    wanted = whole_of(case).delta_weight(base)
    for made in (ll.resize(file_of(case), rank=SIDE, model=model), ll.to_full(file_of(case), model=model)):
        deltas = made.adapter.deltas["transformer"]
        change = torch.cat([deltas[f"{ATTENTION}.{part}"].delta_weight() for part in PARTS])
        torch.testing.assert_close(change.double(), wanted, atol=2e-5, rtol=1e-4)
    with pytest.raises(ConversionError, match="model="):
        ll.resize(file_of(case), rank=4)


def test_a_part_whose_siblings_the_model_lacks_is_a_problem_of_the_plan() -> None:
    model = flux()
    del model.transformer_blocks[0].attn.to_k
    plan = plan_adapter({"transformer": model}, ll.read_adapter(file_of("dora per input")))
    assert len(plan.problems) == 2
    assert f"{ATTENTION}.to_k is not here" in plan.problems[0]
    with pytest.raises(AdapterMismatchError):
        plan.check("x")


def test_a_loaded_part_is_saved_in_the_fused_spelling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    model = flux()
    ll.attach(model)
    save_file(file_of("dora per input"), tmp_path / "a.safetensors")
    model.load_lora_adapter(str(tmp_path / "a.safetensors"), adapter_name="x", prefix=None)
    model.save_lora_adapter(str(tmp_path / "saved"), adapter_name="x", format="kohya")
    (written,) = (tmp_path / "saved").glob("*.safetensors")
    again = to_tensors(ll.read_adapter(written), "kohya")[0]
    assert all(torch.equal(tensor, again[key]) for key, tensor in file_of("dora per input").items())
