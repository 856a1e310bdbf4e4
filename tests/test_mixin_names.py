"""Every mixin that diffusers has stands here under the same name, and says what diffusers' own says."""

import inspect
from contextlib import nullcontext
from typing import Any

import diffusers
import diffusers.loaders.lora_base as lora_base
import diffusers.loaders.lora_pipeline as lora_pipeline
import diffusers.loaders.peft as peft_mixins
import diffusers.loaders.transformer_flux as transformer_flux
import diffusers.loaders.transformer_sd3 as transformer_sd3
import diffusers.loaders.unet as unet
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import adapter_file, patching, pipeline
from tiny_models import unet as tiny_unet
from torch import Tensor

import lora_loaders as ll
from lora_loaders.mixins.class_or_instance import class_or_instance

MODULES = (lora_base, lora_pipeline, peft_mixins, unet, transformer_flux, transformer_sd3)
THEIRS: dict[str, Any] = {
    name: value
    for module in MODULES
    for name, value in vars(module).items()
    if inspect.isclass(value) and value.__module__ == module.__name__
}
PIPELINES = [name for name, cls in THEIRS.items() if issubclass(cls, lora_base.LoraBaseMixin)]


def test_the_installed_diffusers_has_no_name_that_is_missing() -> None:
    assert len(PIPELINES) > 30
    assert [name for name in THEIRS if not hasattr(ll, name)] == []
    assert [name for name in THEIRS if name not in ll.__all__] == []


@pytest.mark.parametrize("name", PIPELINES)
def test_a_mixin_loads_into_every_component_that_diffusers_names(name: str) -> None:
    assert set(THEIRS[name]._lora_loadable_modules) <= {*getattr(getattr(ll, name), "_lora_loadable_modules", ())}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_mixin_has_every_public_method_that_diffusers_has(name: str) -> None:
    own = {method for cls in THEIRS[name].__mro__[:-1] for method in vars(cls) if not method.startswith("_")}
    assert [method for method in own if not hasattr(getattr(ll, name), method)] == []


@pytest.mark.parametrize("name", PIPELINES)
def test_a_mixin_knows_the_family_of_its_models(name: str) -> None:
    said = getattr(ll, name)._lora_family if hasattr(getattr(ll, name), "_lora_family") else None
    assert said is None or said in {family.name for family in ll.FAMILIES}
    if name not in ("LoraBaseMixin", "RFD4ProteinaLoraLoaderMixin"):
        assert said is not None


ON_PURPOSE = {
    ("fuse_lora", "components"): "None is every component with an adapter; lists leave out Wan's second transformer",
    ("unfuse_lora", "components"): "as fuse_lora's; AuraFlow's list has a component that cannot be unfused",
    ("unload_lora_weights", "reset_to_overwritten_params"): "unloading leaves nothing, a widened input layer neither",
    ("load_lora_weights", "load_into_transformer_ref"): "None lets the file's own keys say it",
    ("enable_lora_hotswap", "kwargs"): "the arguments that a model's method has, by name; another is an error",
}
"""(method, parameter) -> why it is another than diffusers'."""


def unlike(method: str, theirs: inspect.Signature, ours: inspect.Signature) -> set[tuple[str, str]]:
    """Parameters of diffusers' that are not found here in their place, of their kind, with their default.

    Where diffusers needs an argument, ours may have a default; what it takes as `**kwargs` may have names here; and
    behind its own there may be more.
    """
    wrong: set[tuple[str, str]] = set()
    own, spare = list(ours.parameters.values()), {p.kind for p in ours.parameters.values()}
    for index, parameter in enumerate(theirs.parameters.values()):
        if parameter.kind is parameter.VAR_KEYWORD:
            found = parameter.VAR_KEYWORD in spare
        else:
            one = own[index] if index < len(own) else parameter.replace(name="none")
            same = parameter.default in (one.default, parameter.empty)
            found = (one.name, one.kind) == (parameter.name, parameter.kind) and same
        if not found:
            wrong.add((method, parameter.name))
    return wrong


def signatures(cls: Any) -> dict[str, inspect.Signature]:
    """Of a mixin's public methods, those aside that a base class leaves to others."""
    found: dict[str, inspect.Signature] = {}
    for name in dir(cls):
        own = inspect.getattr_static(cls, name)
        methods = (classmethod, staticmethod, class_or_instance)
        if not name.startswith("_") and (inspect.isfunction(own) or isinstance(own, methods)):
            shown = inspect.signature(getattr(cls, name))
            if list(shown.parameters) not in (["kwargs"], ["self", "kwargs"]) or name == "enable_lora_hotswap":
                found[name] = shown
    return found


UNPATCHED = {name: signatures(cls) for name, cls in THEIRS.items()}


@pytest.mark.parametrize("way", ["by name", "attach", "patch_diffusers"])
def test_every_method_shows_the_arguments_that_diffusers_shows(way: str) -> None:
    differences: set[tuple[str, str]] = set()
    with patching() if way == "patch_diffusers" else nullcontext():
        for name, theirs in UNPATCHED.items():
            cls = THEIRS[name] if way == "patch_diffusers" else getattr(ll, name)
            if way == "attach":
                mixin = ll.LoraPipelineMixin if name in PIPELINES else getattr(ll, name)
                cls = type(name, (mixin, THEIRS[name]), {})  # as an instance gets it
            for method, signature in theirs.items():
                differences |= unlike(method, signature, inspect.signature(getattr(cls, method)))
    assert differences == set(ON_PURPOSE)


def test_what_a_signature_shows_can_be_read() -> None:
    longest = max((str(s) for name in THEIRS for s in signatures(getattr(ll, name)).values()), key=len)
    assert len(longest) < 3000, longest
    for method in ("save_lora_weights", "load_lora_into_transformer"):
        shown = getattr(ll.FluxLoraLoaderMixin, method)
        assert (shown.__name__, "Args:" in shown.__doc__) == (method, True)


@pytest.mark.parametrize("name", PIPELINES)
def test_layers_are_saved_by_position_in_diffusers_order(name: str, tmp_path: Any) -> None:
    order = [n for n in inspect.signature(THEIRS[name].save_lora_weights).parameters if n.endswith("_lora_layers")]
    if not order:
        pytest.skip("diffusers' own saves nothing")
    parts = [n.removesuffix("_lora_layers") for n in order]
    layers = [
        {"x.lora_A.weight": torch.full((1, 2), float(i)), "x.lora_B.weight": torch.ones(2, 1)}
        for i in range(len(parts))
    ]
    getattr(ll, name).save_lora_weights(tmp_path, *layers, True, "w.safetensors", None, True)
    saved = load_file(tmp_path / "w.safetensors")
    assert {key: value[0, 0].item() for key, value in saved.items() if "lora_A" in key} == {
        f"{part}.x.lora_A.weight": float(i) for i, part in enumerate(parts)
    }
    assert getattr(ll, name).save_lora_weights(tmp_path / "none", *layers, False) is None
    assert not (tmp_path / "none").exists()


def test_what_diffusers_deprecates_warns_and_changes_nothing() -> None:
    pipe = ll.attach(pipeline("sd15"))
    pipe.load_lora_weights(adapter_file(pipeline("sd15")).tensors, adapter_name="a")
    with pytest.warns(FutureWarning, match="fuse_unet"):
        pipe.fuse_lora(fuse_unet=True)
    assert pipe.fused_loras == {"a"}
    with pytest.warns(FutureWarning, match="unfuse_text_encoder"):
        pipe.unfuse_lora(unfuse_text_encoder=False)
    assert pipe.fused_loras == set()
    with pytest.raises(TypeError, match="fuse_unit"):
        pipe.fuse_lora(fuse_unit=True)


def test_loading_into_one_component_takes_its_keys_and_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    pipe = ll.attach(pipeline("sdxl"))
    full = adapter_file(pipeline("sdxl"), alpha=None).tensors
    for part in ("text_encoder", "text_encoder_2"):
        report = type(pipe).load_lora_into_text_encoder(full, None, getattr(pipe, part), part, adapter_name="a")
        assert (set(report.components), report.unmatched) == ({part}, {})
    report = pipe.unet.load_lora_adapter(full, prefix="unet", adapter_name="a")
    assert (set(report.components), report.unmatched) == ({"unet"}, {})
    assert "no place" not in caplog.text
    with pytest.raises(ll.NothingFitsError, match="foo"):
        pipe.unet.load_lora_adapter(full, prefix="foo", adapter_name="b")
    assert pipe.get_list_adapters() == {name: ["a"] for name in ("unet", "text_encoder", "text_encoder_2")}


def test_the_oldest_methods_of_a_unet_load_and_save_its_adapter(tmp_path: Any) -> None:
    class Model(ll.UNet2DConditionLoadersMixin, diffusers.UNet2DConditionModel):  # type: ignore[misc]
        pass

    torch.manual_seed(0)
    model: Any = Model(**dict(tiny_unet().config))
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    rows, columns = model.get_submodule(path).weight.shape
    made: dict[str, Tensor] = {
        f"unet.{path}.lora_A.weight": torch.randn(2, columns),
        f"unet.{path}.lora_B.weight": torch.randn(rows, 2),
    }
    model.load_attn_procs(made, adapter_name="a")
    saved = ll.read_adapter(model.save_attn_procs(tmp_path), family="sd15")
    (module,) = saved.modules()
    assert module.path == path
    expected = made[f"unet.{path}.lora_B.weight"] @ made[f"unet.{path}.lora_A.weight"]
    torch.testing.assert_close(module.delta.delta_weight(), expected)
