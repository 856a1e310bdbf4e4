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
