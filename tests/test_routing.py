"""Two transformers of one layout: an argument or the file's name says which one a file is for."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import MiniMaxH3Transformer3DModel, WanTransformer3DModel
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.adapter import Adapter
from lora_loaders.deltas import LoraDelta
from lora_loaders.mixins.routing import noise_level
from lora_loaders.writing import to_tensors

PATH = "blocks.0.attn1.to_q"


def wan(**changes: Any) -> Any:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        **changes,
    )


class Wan(ll.WanLoraLoaderMixin):
    def __init__(self, transformer: nn.Module | None, transformer_2: nn.Module | None) -> None:
        self.transformer, self.transformer_2 = transformer, transformer_2


def keys(path: str = PATH, width: int = 24, prefix: str = "transformer") -> dict[str, Tensor]:
    return {
        f"{prefix}.{path}.lora_A.weight": torch.randn(2, width),
        f"{prefix}.{path}.lora_B.weight": torch.randn(width, 2),
    }


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("wan2.2_t2v_A14b_high_noise_lora.safetensors", "high"),
        ("Wan2.2-Lightning-low-noise.safetensors", "low"),
        ("style-LowNoise-v2.safetensors", "low"),
        ("style_HIGH.safetensors", None),
        ("low_rank.safetensors", None),
        ("wan_low_light.safetensors", None),
        ("fp8_low.safetensors", None),
        ("low_vram_high_noise.safetensors", "high"),
        ("wan2.2_t2v_lownoise_rank64.safetensors", "low"),
        ("style-LN.safetensors", "low"),
        ("HN_style.safetensors", "high"),
        ("wan22_lowNoise_000001.safetensors", "low"),
        ("slow_motion.safetensors", None),
        ("highway.safetensors", None),
        ("yellow.safetensors", None),
        ("shallow_focus.safetensors", None),
        ("high_and_low_noise.safetensors", None),
        ("pytorch_lora_weights.safetensors", None),
    ],
)
def test_a_name_tells_the_noise_level_or_nothing(name: str, level: str | None) -> None:
    assert noise_level([name]) == level


@pytest.mark.parametrize(
    ("name", "component"), [("high", "transformer"), ("low", "transformer_2"), ("x", "transformer")]
)
def test_a_file_goes_where_its_name_says(tmp_path: Path, name: str, component: str) -> None:
    pipe = Wan(wan(), wan())
    safetensors.torch.save_file(keys(), file := tmp_path / f"{name}_noise.safetensors")
    report = pipe.load_lora_weights(file, adapter_name="a")
    assert pipe.get_list_adapters() == {component: ["a"]}
    assert report.components == {component: 1}


def test_a_hot_swap_for_one_transformer_leaves_the_other_one_alone(tmp_path: Path) -> None:
    pipe = Wan(wan(), wan())
    files = {level: tmp_path / f"{level}_noise.safetensors" for level in ("high", "low")}
    made = {level: keys() for level in files}
    for level, file in files.items():
        safetensors.torch.save_file(made[level], file)
    pipe.load_lora_weights(files["low"], adapter_name="l")
    pipe.load_lora_weights(files["high"], adapter_name="l")

    def change(model: Any) -> Tensor:
        (layer,) = [module for module in model.modules() if isinstance(module, ll.AdapterLayer)]
        return layer.delta("l").delta_weight()

    for level, name in (("high", "transformer"), ("low", "transformer_2")):
        made[level] = keys()
        safetensors.torch.save_file(made[level], files[level])
        pipe.load_lora_weights(files[level], adapter_name="l", hotswap=True)
        assert pipe.get_list_adapters() == {"transformer": ["l"], "transformer_2": ["l"]}
        up, down = (made[level][f"transformer.{PATH}.lora_{side}.weight"] for side in "BA")
        torch.testing.assert_close(change(getattr(pipe, name)), up @ down)
    pipe.load_lora_weights(keys(), adapter_name="l", hotswap=True)
    assert pipe.get_list_adapters() == {"transformer": ["l"], "transformer_2": ["l"]}


def test_an_argument_goes_before_the_name(tmp_path: Path) -> None:
    pipe = Wan(wan(), wan())
    safetensors.torch.save_file(keys(), file := tmp_path / "low_noise.safetensors")
    pipe.load_lora_weights(file, adapter_name="a", load_into_transformer_2=False)
    pipe.load_lora_weights(keys(), adapter_name="b", load_into_transformer_2=True)
    assert pipe.get_list_adapters() == {"transformer": ["a"], "transformer_2": ["b"]}


def test_a_file_that_names_its_transformer_needs_no_word() -> None:
    pipe = Wan(wan(), wan())
    pipe.load_lora_weights({**keys(), **keys(prefix="transformer_2")}, adapter_name="a")
    assert pipe.get_list_adapters() == {"transformer": ["a"], "transformer_2": ["a"]}


def test_a_transformer_that_is_not_there_is_an_error_and_an_only_one_needs_no_word(tmp_path: Path) -> None:
    pipe = Wan(wan(), None)
    with pytest.raises(ll.AdapterStateError, match="load_into_transformer_2"):
        pipe.load_lora_weights(keys(), load_into_transformer_2=True)
    assert pipe.get_list_adapters() == {}
    only = Wan(None, wan())
    only.load_lora_weights(keys(), adapter_name="a")
    assert only.get_list_adapters() == {"transformer_2": ["a"]}


def test_a_text_to_video_file_loads_on_an_image_to_video_model_and_changes_only_what_it_holds() -> None:
    model = wan(image_dim=16, added_kv_proj_dim=24)
    pipe = Wan(model, None)
    report = pipe.load_lora_weights(keys("blocks.0.attn2.to_k"), adapter_name="a")
    assert (report.components, report.unmatched) == ({"transformer": 1}, {})
    assert [name for name, m in model.named_modules() if isinstance(m, ll.AdapterLayer)] == ["blocks.0.attn2.to_k"]


def test_fusing_skips_a_component_that_the_pipeline_has_not() -> None:
    pipe = Wan(wan(), None)
    pipe.load_lora_weights(keys(), adapter_name="a")
    pipe.fuse_lora(components=["transformer", "transformer_2"])
    assert pipe.fused_loras == {"a"}
    with pytest.raises(ll.AdapterStateError, match="unet"):
        pipe.fuse_lora(components=["transformer", "unet_3"])


class MiniMax(ll.MiniMaxH3LoraLoaderMixin):
    def __init__(self, transformer: Any, transformer_ref: Any) -> None:
        self.transformer, self.transformer_ref = transformer, transformer_ref


class Partition(nn.Module):
    """A model of MiniMax-H3's names; its own class has no small configuration here."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_out = nn.Module()
        self.norm_out.linear = nn.Linear(4, 4)


def partition() -> nn.Module:
    model = Partition()
    model.__class__ = type("MiniMaxH3Transformer3DModel", (Partition,), {})
    assert type(model).__name__ == MiniMaxH3Transformer3DModel.__name__
    return model


def test_the_reference_partition_is_reached_by_argument_prefix_or_alone() -> None:
    both = MiniMax(partition(), partition())
    both.load_lora_weights(keys("norm_out.linear", 4), adapter_name="a", load_into_transformer_ref=True)
    both.load_lora_weights(keys("norm_out.linear", 4, "transformer_ref"), adapter_name="b")
    both.load_lora_weights(keys("norm_out.linear", 4), adapter_name="c")
    assert both.get_list_adapters() == {"transformer": ["c"], "transformer_ref": ["a", "b"]}
    alone = MiniMax(None, partition())
    alone.load_lora_weights(keys("norm_out.linear", 4), adapter_name="a")
    assert alone.get_list_adapters() == {"transformer_ref": ["a"]}
    with pytest.raises(ll.AdapterStateError, match="load_into_transformer_ref"):
        MiniMax(partition(), None).load_lora_weights(keys("norm_out.linear", 4), load_into_transformer_ref=True)


def experts(*components: str) -> Adapter:
    """A LoRA of each of these models, each another."""
    deltas = {c: {PATH: LoraDelta(up=torch.randn(24, 2), down=torch.randn(2, 24))} for c in components}
    return Adapter(deltas, family="wan")


@pytest.mark.parametrize("spelling", ["kohya", "original", "peft", "onetrainer", "lycoris", "bfl"])
def test_an_expert_alone_is_written_as_files_of_its_own_have_it(
    tmp_path: Path, spelling: str, caplog: pytest.LogCaptureFixture
) -> None:
    """ComfyUI, musubi-tuner and PEFT have one file for each of Wan 2.2's models, with the same keys in both."""
    low = experts("transformer_2")
    delta = low.deltas["transformer_2"][PATH]
    first = Adapter({"transformer": {PATH: delta}}, family="wan")
    tensors = to_tensors(low, spelling)[0]
    assert {key: tensor.tolist() for key, tensor in tensors.items()} == {
        key: tensor.tolist() for key, tensor in to_tensors(first, spelling)[0].items()
    }
    file = ll.write_adapter(low, tmp_path / "style_low_noise.safetensors", spelling)
    assert "is for transformer_2" in caplog.text
    assert "load_into_transformer_2=True" in caplog.text
    pipe = Wan(wan(), wan())
    pipe.load_lora_weights(file, adapter_name="l")
    assert pipe.get_list_adapters() == {"transformer_2": ["l"]}
    caplog.clear()
    ll.write_adapter(low, tmp_path / "style.safetensors", "diffusers")
    ll.write_adapter(first, tmp_path / "high.safetensors", spelling)
    assert "is for" not in caplog.text


@pytest.mark.parametrize("spelling", ["kohya", "original", "peft"])
def test_two_experts_are_refused_and_written_one_file_for_each(tmp_path: Path, spelling: str) -> None:
    both = experts("transformer", "transformer_2")
    with pytest.raises(ll.ConversionError) as caught:
        to_tensors(both, spelling)
    assert "transformer_2" in caught.value.problems[-1]
    assert "--component" in str(caught.value.mend)
    assert "rounding" not in str(caught.value.mend)
    source = ll.write_adapter(both, tmp_path / "both.safetensors", "diffusers")
    for component in both.components:
        file = ll.convert(source, tmp_path / f"{component}.safetensors", format=spelling, component=component)
        again = ll.read_adapter(file, family="wan").deltas["transformer"][PATH]
        assert torch.equal(again.delta_weight(), both.deltas[component][PATH].delta_weight())
    with pytest.raises(ll.ConversionError, match="no change of vae"):
        ll.convert(source, tmp_path / "x.safetensors", format=spelling, component="vae")
    assert not (tmp_path / "x.safetensors").exists()


def test_rounding_is_spoken_of_where_rounding_is_the_reason() -> None:
    third = LoraDelta(up=torch.ones(8, 3).bfloat16(), down=torch.ones(3, 8).bfloat16(), alpha=1.0)
    adapter = Adapter({"transformer": {"transformer_blocks.0.attn.to_out.0": third}}, family="flux1")
    with pytest.raises(ll.ConversionError, match="rounding") as caught:
        to_tensors(adapter, "xlabs")
    assert "float32" in str(caught.value.mend)
