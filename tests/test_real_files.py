"""Two real files of 2022, numbered instead of named: they load into SD 1.5 and convert without a changed bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from random_files import accounts, same_bits, same_tensors
from shared_files import needs_shared, shared_file
from torch import Tensor, nn

from lora_loaders.adapter import Adapter
from lora_loaders.conversion import parse, read_adapter
from lora_loaders.deltas import LoraDelta
from lora_loaders.errors import ConversionError
from lora_loaders.files import Contents
from lora_loaders.layout import ModelLayout
from lora_loaders.plans import plan_adapter
from lora_loaders.writing import to_tensors, write_adapter

pytestmark = needs_shared
# Name, rank, learned tokens.
REAL = {"analog_svd_rank4": (4, ()), "lora_disney": (1, ("<s1>", "<s2>"))}
NAMED = ("kohya", "diffusers", "diffusers-old", "original", "onetrainer")


@pytest.fixture(params=REAL)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def path(name: str) -> Path:
    return shared_file("real", f"{name}.safetensors")


@pytest.fixture
def tensors(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


@pytest.fixture
def adapter(path: Path) -> Adapter:
    return read_adapter(path)


def test_every_key_of_a_real_file_is_accounted_for(adapter: Adapter, tensors: dict[str, Tensor], name: str) -> None:
    assert (adapter.family, adapter.format) == ("sd15", "indexed")
    assert accounts(adapter) == set(tensors)
    assert not adapter.unresolved
    assert not adapter.ignored
    assert {delta.rank for _, _, delta in adapter.modules()} == {REAL[name][0]}
    assert adapter.components == {"unet": 144, "text_encoder": 48}


def test_real_file_fits_the_real_architecture(
    adapter: Adapter, denoiser: Callable[[str], nn.Module], text_encoder: Callable[[str], nn.Module]
) -> None:
    models = {"unet": denoiser("sd15"), "text_encoder": text_encoder("clip_l")}
    plan = plan_adapter(models, adapter, layout=ModelLayout(models, {"text_encoder": ("text_model.",)}))
    assert plan.components == {"unet": 144, "text_encoder": 48}
    assert not plan.problems
    assert not plan.unmatched


def test_change_of_a_real_file_is_up_times_down(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    downs = [key for key in tensors if key.endswith(":down")]
    for key in downs[::12]:  # all of them take seconds, and the round trips below compare every bit
        (target,) = adapter.bound[key]
        component, _, path = target.partition(".")
        up = tensors[key.removesuffix("down") + "up"]
        change = adapter.deltas[component][path].delta_weight()
        torch.testing.assert_close(change.double(), up.double() @ tensors[key].double())


def test_numbers_are_those_of_2022s_model(adapter: Adapter) -> None:
    """Its transformer blocks held attn1, ff, attn2; the middle block was registered last.

    cloneofsimo's numbering as his own code walks the model: four projections of attn1, GEGLU's, four of attn2.
    """
    first, last = "down_blocks.0.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.0"
    places = {f"unet:{i}:up": f"unet.{first}.attn1.{n}" for i, n in enumerate(["to_q", "to_k", "to_v", "to_out.0"])}
    places |= {"unet:4:up": f"unet.{first}.ff.net.0.proj", "unet:5:up": f"unet.{first}.attn2.to_q"}
    places |= {"unet:143:up": f"unet.{last}.attn2.to_out.0"}
    for key, place in places.items():
        assert adapter.bound[key] == (place,)


def test_learned_tokens_are_kept(adapter: Adapter, tensors: dict[str, Tensor], name: str) -> None:
    assert set(adapter.embeddings) == set(REAL[name][1])
    for token, vector in adapter.embeddings.items():
        assert vector.shape == (768,)
        assert same_bits(vector, tensors[token])


@pytest.mark.parametrize("target", NAMED)
def test_real_file_converts_and_back_without_a_changed_bit(
    adapter: Adapter, tensors: dict[str, Tensor], target: str, tmp_path: Path
) -> None:
    converted = write_adapter(adapter, tmp_path / "a.safetensors", target)
    again = read_adapter(converted, family="sd15")
    back = write_adapter(again, tmp_path / "b.safetensors", "indexed")
    assert same_tensors(safetensors.torch.load_file(back), tensors)


def test_header_of_the_way_back_says_what_the_first_said(adapter: Adapter, path: Path, tmp_path: Path) -> None:
    converted = write_adapter(adapter, tmp_path / "a.safetensors", "kohya")
    back = write_adapter(read_adapter(converted, family="sd15"), tmp_path / "b.safetensors", "indexed")
    with safetensors.safe_open(path, "pt") as first, safetensors.safe_open(back, "pt") as second:
        before, after = first.metadata(), second.metadata()
    ranks = {key for key in before if key.endswith(":rank")}
    assert ranks
    assert {key: after[key] for key in ranks} == {key: before[key] for key in ranks}


def test_chain_through_all_formats_changes_no_bit(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    current = adapter
    for target in (*NAMED, "kohya"):
        written, metadata, _ = to_tensors(current, target)
        current = parse(Contents(written, metadata), "sd15")
    assert same_tensors(to_tensors(current, "indexed")[0], tensors)


def test_peft_says_each_component_of_a_real_file_alone(adapter: Adapter) -> None:
    with pytest.raises(ConversionError, match="one model a file"):
        to_tensors(adapter, "peft")
    for component in ("unet", "text_encoder"):
        alone = Adapter({component: adapter.deltas[component]}, adapter.family, adapter.format)
        written, metadata, config = to_tensors(alone, "peft")
        again = parse(Contents(written, metadata, config), "sd15")
        for path, delta in alone.deltas[component].items():
            other = again.deltas[component][path]
            assert isinstance(delta, LoraDelta)
            assert isinstance(other, LoraDelta)
            assert same_bits(delta.up, other.up)
            assert same_bits(delta.down, other.down)
            assert delta.scaling == other.scaling
