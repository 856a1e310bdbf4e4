"""Promises of a load about files for something else, tensors that are no weights, and what a file says of alpha."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_loaders as ll

WIDTH = 8


def linear_model() -> nn.Module:
    return ll.attach(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).eval())


def pair(path: str, rank: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(rank, WIDTH, generator=generator), torch.randn(WIDTH, rank, generator=generator)
    return {f"transformer.{path}.lora_A.weight": down.to(dtype), f"transformer.{path}.lora_B.weight": up.to(dtype)}


def test_parameters_edited_in_place_show_at_the_next_forward() -> None:
    model = linear_model()
    x = torch.ones(1, WIDTH)
    with torch.no_grad():
        plain = model(x)
        model.load_lora_adapter(pair("0"), adapter_name="a")  # type: ignore[operator]
        assert not torch.equal(model(x), plain)

        model[0].lora_B["a"].weight.zero_()  # type: ignore[index]

        assert torch.equal(model(x), plain)


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param(pair("0", dtype=torch.int8), id="integers"),
        pytest.param(pair("0", rank=0), id="rank 0"),
        pytest.param({key: tensor.to("meta") for key, tensor in pair("0").items()}, id="no data"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(tensors: dict[str, Tensor]) -> None:
    model = linear_model()
    before = repr(model)
    with pytest.raises(ll.AdapterMismatchError, match="0"):
        model.load_lora_adapter(tensors)  # type: ignore[operator]
    assert repr(model) == before


def test_a_key_that_is_no_adapters_is_an_error_under_strict_and_a_warning_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensors = {**pair("0"), "garbage": torch.zeros(1)}
    with pytest.raises(ll.AdapterMismatchError, match="garbage"):
        linear_model().load_lora_adapter(tensors, strict=True)  # type: ignore[operator]

    report = linear_model().load_lora_adapter(tensors)  # type: ignore[operator]

    assert "garbage" in report.ignored
    assert [record.levelname for record in caplog.records if "garbage" in record.message] == ["WARNING"]


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        '{"transformer.lora_alpha": "x"}',
        '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"(": 2}}',
    ],
)
def test_a_header_that_says_no_scaling_is_malformed(tmp_path: Path, config: str) -> None:
    save_file(pair("0"), tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": config})
    with pytest.raises(ll.MalformedAdapterError):
        ll.read_adapter(tmp_path / "a.safetensors")


def test_lora_state_dict_keeps_what_the_file_says_of_alpha(tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    pipeline_class = type("Pipeline", (ll.FluxLoraLoaderMixin, FluxPipeline), {"__init__": FluxPipeline.__init__})
    path = "transformer_blocks.0.attn.to_q"
    tensors = pair(path)
    stated = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 0.5})
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": stated})
    up, down = tensors[f"transformer.{path}.lora_B.weight"], tensors[f"transformer.{path}.lora_A.weight"]

    state = pipeline_class.lora_state_dict(tmp_path / "a.safetensors")
    delta = ll.read_adapter(state, family="flux1").deltas["transformer"][path]
    _, metadata = pipeline_class.lora_state_dict(tmp_path / "a.safetensors", return_lora_metadata=True)

    torch.testing.assert_close(delta.delta_weight(), up @ down * 0.25)
    assert metadata["transformer.lora_alpha"] == 0.5
