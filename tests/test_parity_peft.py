"""The same files and calls through diffusers with PEFT and through ours, on the same tiny pipelines.

Outputs agree to float32 rounding and not to the last bit, because sums are taken in another order: PEFT adds
scaling · B(A(x)) of each adapter in turn, here all active factors are stacked and the scaling is folded into B.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import FAMILIES, adapter_file, components_of, flux, patching, pipeline, render, scale_argument, unet
from torch import Tensor

import lora_loaders as ll
from lora_loaders.tuning.adding import target_modules

peft = pytest.importorskip("peft", reason="parity with PEFT needs PEFT (scripts/setup_peers)")
pytestmark = pytest.mark.parity

ROUNDING = {"rtol": 2e-4, "atol": 2e-4}
# diffusers loads neither Flux's second text encoder nor Qwen-Image's.
THEIRS = {"flux1": ["transformer", "text_encoder"], "qwen-image": ["transformer"]}


def both(family: str, **options: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    """diffusers' own pipeline, ours, and a file for them."""
    theirs = pipeline(family)
    made = adapter_file(theirs, **{"scale": 0.1, "components": THEIRS.get(family), **options})
    return theirs, ll.attach(pipeline(family)), made.tensors


def assert_same(theirs: Any, ours: Any, **call: Any) -> Tensor:
    one, other = render(theirs, **call), render(ours, **call)
    torch.testing.assert_close(other, one, **ROUNDING)
    return one


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_a_file_paints_the_same(family: str, style: str, tmp_path: Path) -> None:
    if style == "kohya" and family in ("flux1", "qwen-image"):
        pytest.skip("their trainers fuse names; the converters' own parity test covers them")
    theirs, ours, tensors = both(family, style=style)
    plain = assert_same(theirs, ours)
    save_file(tensors, tmp_path / "x.safetensors")
    for pipe in (theirs, ours):
        pipe.load_lora_weights(tmp_path / "x.safetensors", adapter_name="a")
    assert (assert_same(theirs, ours) - plain).abs().max() > 1e-2
    for pipe in (theirs, ours):
        pipe.unload_lora_weights()
    assert torch.equal(assert_same(theirs, ours), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_switching_paints_the_same(family: str) -> None:
    theirs, ours, one = both(family)
    two = both(family, seed=2, rank=3)[2]
    lists: list[Any] = []
    for pipe in (theirs, ours):
        pipe.load_lora_weights(one, adapter_name="one")
        pipe.load_lora_weights(dict(two), adapter_name="two")
    assert_same(theirs, ours)
    calls: list[Any] = [
        lambda p: p.set_adapters(["one", "two"], [0.5, -0.75]),
        lambda p: p.set_adapters("one", 0.25),
        lambda p: p.set_adapters(["one", "two"], [{next(iter(components_of(p))): 0.5}, 1.0]),
        lambda p: p.disable_lora(),
        lambda p: p.enable_lora(),
        lambda p: p.delete_adapters("one"),
        lambda p: p.set_adapters("two"),
    ]
    for call in calls:
        for pipe in (theirs, ours):
            call(pipe)
        assert_same(theirs, ours)
        lists.append([(p.get_list_adapters(), p.get_active_adapters()) for p in (theirs, ours)])
    assert all(one == other for one, other in lists)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_the_scale_of_a_call_paints_the_same(family: str, scale: float) -> None:
    theirs, ours, tensors = both(family)
    for pipe in (theirs, ours):
        pipe.load_lora_weights(dict(tensors), adapter_name="a")
    assert_same(theirs, ours, **scale_argument(family, scale))
    assert_same(theirs, ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_fusing_paints_the_same(family: str) -> None:
    theirs, ours, tensors = both(family)
    for pipe in (theirs, ours):
        pipe.load_lora_weights(dict(tensors), adapter_name="a")
        pipe.set_adapters("a", 0.5)
        pipe.fuse_lora(lora_scale=0.5)
    components = list(theirs.get_list_adapters())
    assert components == list(ours.get_list_adapters())
    if family == "flux1":  # diffusers fuses Flux's transformer alone unless told otherwise
        ours.unfuse_lora(components=["text_encoder"])
        ours.set_adapters("a", {"text_encoder": 0.5, "transformer": 0.5})
    assert_same(theirs, ours)


def test_blocks_weigh_the_same() -> None:
    theirs, ours, tensors = both("sd15", components=["unet"], only=r"attn\d\.to_")
    weights = {"unet": {"down": 0.25, "mid": 0.5, "up": {"block_1": [0.1, 0.9]}}}
    for pipe in (theirs, ours):
        pipe.load_lora_weights(dict(tensors), adapter_name="a")
        pipe.set_adapters("a", weights)
    assert_same(theirs, ours)


def test_a_dora_file_in_pefts_names_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = unet()
    trained.add_adapter(
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "conv1"], use_dora=True, init_lora_weights=False)
    )
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.mul_(0.3)
    trained.save_lora_adapter(tmp_path)
    torch.manual_seed(0)
    ours: Any = ll.attach(unet())
    ours.load_lora_adapter(tmp_path)
    arguments = (torch.ones(1, 4, 8, 8), 1, torch.ones(1, 3, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(*arguments).sample, trained(*arguments).sample, **ROUNDING)


@pytest.mark.parametrize("fused", [False, True])
def test_what_we_save_diffusers_loads(fused: bool, tmp_path: Path) -> None:
    theirs, ours, tensors = both("sdxl", style="kohya")
    ours.load_lora_weights(tensors, adapter_name="a")
    if fused:
        ours.fuse_lora()
    ours.save_lora_weights(tmp_path)
    theirs.load_lora_weights(tmp_path, adapter_name="a")
    assert_same(theirs, ours)


@pytest.mark.parametrize("options", [
    {"r": 4, "lora_alpha": 2.0},
    {"r": 4, "lora_alpha": 6, "use_rslora": True},
    {"r": 4, "rank_pattern": {"attn1.to_q": 2, r".*mid.*\.to_k": 6}, "alpha_pattern": {"to_k": 3}},
    {"r": 4, "target_modules": r".*attn1\.to_[qk]"},
    {"r": 4, "target_modules": "all-linear"},
    {"r": 4, "exclude_modules": ["attn2.to_q"]},
    {"r": 4, "lora_bias": True},
    # PEFT keeps a convolution's magnitude as [1, out, 1, 1], which reads as one for each input; ours is [out].
    {"r": 4, "use_dora": True, "target_modules": ["to_q", "to_k"]},
], ids=str)  # fmt: skip
def test_a_configuration_means_and_computes_the_same(options: dict[str, Any]) -> None:
    config = {"target_modules": ["to_q", "to_k", "conv_in"], "init_lora_weights": False, **options}
    torch.manual_seed(0)
    theirs = unet()
    ours: Any = ll.attach(copy.deepcopy(theirs))
    theirs.add_adapter(peft.LoraConfig(**config))
    ours.add_adapter(peft.LoraConfig(**config))
    names, own = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert {n: p.shape for n, p in own.items()} == {n: p.shape for n, p in names.items()}
    assert {n for n, p in own.items() if p.requires_grad} == {n for n, p in names.items() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in own.items():
            if "lora_" in name:
                names[name].mul_(1.0 if "magnitude" in name else 0.3)
                parameter.copy_(names[name])
    arguments = (torch.ones(1, 4, 8, 8), 1, torch.ones(1, 3, 32))
    results = [model(*arguments).sample for model in (theirs, ours)]
    torch.testing.assert_close(results[1], results[0], **ROUNDING)
    for result in results:
        result.square().mean().backward()
    for name, parameter in own.items():
        if names[name].grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, names[name].grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("options", [
    {"target_modules": ["to_q"], "layers_to_transform": [0, 2], "layers_pattern": "transformer_blocks"},
    {"target_modules": ["to_q"], "layers_to_transform": 1, "layers_pattern": "single_transformer_blocks"},
    {"target_modules": ["attn.to_q", "proj_mlp"], "exclude_modules": r"single_transformer_blocks\.1.*"},
    {"target_modules": "transformer_blocks.0.*to_q"},
], ids=str)  # fmt: skip
def test_targets_are_the_same(options: dict[str, Any]) -> None:
    theirs, ours = flux(blocks=3), flux(blocks=3)
    theirs.add_adapter(peft.LoraConfig(r=2, **options))
    wrapped = {name.removesuffix(".base_layer") for name, _ in theirs.named_modules() if name.endswith(".base_layer")}
    assert set(target_modules(ours, ll.LoraConfig(r=2, **options))) == wrapped


def test_a_patched_pipeline_that_loaded_with_peft_goes_on_with_peft() -> None:
    theirs, twin = pipeline("sd15"), pipeline("sd15")
    made = adapter_file(theirs, components=["unet"])
    without = render(twin)
    for pipe in (theirs, twin):
        pipe.load_lora_weights(made.tensors, adapter_name="old")
    twin.set_adapters("old", 0.5)
    half = render(twin)
    with pytest.raises(ll.AdapterStateError, match="peft"):
        ll.attach(theirs)
    with patching():
        theirs.set_adapters("old", 0.5)
        assert torch.equal(render(theirs), half)
        theirs.disable_lora()
        assert torch.equal(render(theirs), without)
        theirs.enable_lora()
        theirs.fuse_lora()
        assert theirs.fused_loras == {"old"}
        theirs.unfuse_lora()
        with pytest.raises(ll.AdapterStateError, match="peft"):
            theirs.unet.merge_adapter()
        theirs.delete_adapters("old")
        theirs.unload_lora_weights()
        torch.testing.assert_close(render(theirs), without, **ROUNDING)
        assert [name for name, m in theirs.unet.named_modules() if "peft" in type(m).__module__] == []
        theirs.load_lora_weights(made.tensors, adapter_name="new")
        assert any(isinstance(module, ll.AdapterLayer) for module in theirs.unet.modules())
        theirs.unload_lora_weights()
