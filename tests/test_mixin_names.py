"""Every mixin that diffusers has stands here under the same name, and says what diffusers' own says."""

import inspect
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
from tiny_models import adapter_file, pipeline
from tiny_models import unet as tiny_unet
from torch import Tensor

import lora_loaders as ll

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


FREE = {"components", "load_into_transformer_ref", "reset_to_overwritten_params"}
"""Where ours has None for diffusers' list and for what it finds out by itself, and puts widened layers back."""


@pytest.mark.parametrize("name", THEIRS)
def test_every_call_that_binds_in_diffusers_binds_here(name: str) -> None:
    theirs, ours = THEIRS[name], getattr(ll, name)
    wrong: list[str] = []
    for method in dir(theirs):
        own = inspect.getattr_static(theirs, method)
        if method.startswith("_") or not (inspect.isfunction(own) or isinstance(own, (classmethod, staticmethod))):
            continue
        parameters = inspect.signature(getattr(theirs, method)).parameters
        said = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        signature = inspect.signature(getattr(ours, method))
        if said.keys() <= {"self"} and "kwargs" in parameters:  # a base class that leaves it to others
            continue
        positions = [n for n, p in said.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        needed = [n for n in positions if said[n].default is inspect.Parameter.empty]
        try:
            bound = signature.bind(*positions).arguments
            signature.bind(*needed, **{n: n for n in said if n not in needed})
        except TypeError as error:
            wrong.append(f"{method}: {error}")
            continue
        wrong += [f"{method}: {k} stands where {v} does" for k, v in bound.items() if isinstance(v, str) and k != v]
        for n, parameter in said.items():
            if n in signature.parameters and n not in FREE and parameter.default is not inspect.Parameter.empty:
                default = signature.parameters[n].default
                if default != parameter.default:
                    wrong.append(f"{method}: {n} is {default}, there {parameter.default}")
    assert wrong == []


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
