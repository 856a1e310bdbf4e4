"""Everything that the installed diffusers can put a LoRA into has a family, or a reason why it has none."""

import inspect
import pkgutil
import re
from functools import cache
from importlib import import_module
from types import ModuleType

import diffusers
import pytest
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import lora_pipeline
from diffusers.loaders.peft import PeftAdapterMixin

from lora_loaders.families import FAMILIES
from lora_loaders.mixins.components import BESIDE, DENOISERS

KNOWN = {name for family in FAMILIES for name in family.model_classes}
BESIDE_A_DENOISER = "not a denoiser: it loads by its own modules' names"
CONTROLNET = "a ControlNet: its adapters load by its own modules' names into the model itself"
DEPRECATED = "a deprecated pipeline's: it loads by its own modules' names"
UNCONDITIONAL = "reads no prompt, and nobody publishes adapters for it: it loads by its own modules' names"
GENERAL = "a general block that other models are made of, or a retired pipeline's model"
# Class, or the end of its name -> why no family names it.
NO_FAMILY = {
    r"(Asymmetric)?Autoencoder\w*|VQModel|\w*VAE|PaellaVQModel|\w*DiffusionDecoderModel": BESIDE_A_DENOISER,
    r"\w*ControlNet\w*|\w*MultiAdapter|T2IAdapter": CONTROLNET,
    r"AnimaTextConditioner|LTX2TextConnectors": "a component of its family",
    r"MotionAdapter": "poured into UNetMotionModel, which has a family",
    r"UNet1DModel|UNet2DModel": UNCONDITIONAL,
    r"Transformer2DModel|TransformerTemporalModel|DreamLiteTransformer2DModel": GENERAL,
    r"UniDiffuserModel|UTransformer2DModel|UNetFlatConditionModel|T5FilmDecoder|DualTransformer2DModel": DEPRECATED,
    r"MiniMaxMusic3RVQDepthDecoder": BESIDE_A_DENOISER,
}


@cache
def classes(package: ModuleType) -> dict[str, type]:
    """Models and pipelines that are defined below a package; modules whose own libraries are absent are passed over."""
    found: dict[str, type] = {}
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        try:
            module = import_module(info.name)
        except (ImportError, RuntimeError):
            continue
        own = {name: cls for name, cls in vars(module).items() if inspect.isclass(cls) and cls.__module__ == info.name}
        found |= {name: cls for name, cls in own.items() if issubclass(cls, (ModelMixin, DiffusionPipeline))}
    return found


def reason(name: str) -> str | None:
    return next((why for pattern, why in NO_FAMILY.items() if re.fullmatch(pattern, name)), None)


def models() -> dict[str, type]:
    found = {**classes(diffusers.models), **classes(diffusers.pipelines)}
    return {name: cls for name, cls in found.items() if issubclass(cls, ModelMixin)}


def test_every_class_that_diffusers_lets_carry_a_lora_has_a_family_or_a_reason() -> None:
    carriers = [name for name, cls in models().items() if issubclass(cls, PeftAdapterMixin)]
    assert len(carriers) > 40
    assert [name for name in carriers if name not in KNOWN and reason(name) is None] == []


@pytest.mark.parametrize("room", ["transformers", "unets"])
def test_every_denoiser_has_a_family_or_a_reason(room: str) -> None:
    found = [name for name, cls in models().items() if cls.__module__.startswith(f"diffusers.models.{room}.")]
    assert len(found) > 8
    assert [name for name in found if name not in KNOWN and reason(name) is None] == []


def pipelines() -> dict[str, type]:
    return {name: cls for name, cls in classes(diffusers.pipelines).items() if issubclass(cls, DiffusionPipeline)}


def test_every_denoiser_of_a_pipeline_is_looked_at_under_its_name() -> None:
    """A model of a family that stands in a pipeline under a name that nobody asks for would be passed over."""
    lost: dict[str, set[str]] = {}
    for pipeline, cls in pipelines().items():
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            if set(re.findall(r"\w+", str(parameter.annotation))) & KNOWN and name not in (*DENOISERS, *BESIDE):
                lost.setdefault(name, set()).add(pipeline)
    # Combined pipelines hold whole pipelines; they are loaded into one by one.
    combined = {"prior_prior"}
    assert set(lost) - combined <= {"image_unet", "text_unet"}, lost  # Versatile Diffusion, deprecated


def test_every_component_that_diffusers_loads_into_is_named_by_the_family() -> None:
    """`_lora_loadable_modules` of diffusers' own mixins: `transformer_2`, `connectors`, `text_conditioner`, …"""
    mixins = {name: cls for name, cls in vars(lora_pipeline).items() if name.endswith("LoraLoaderMixin")}
    lost: list[tuple[str, str]] = []
    for pipeline, cls in pipelines().items():
        wanted = {part for mixin in cls.__mro__ if mixin.__name__ in mixins for part in mixin._lora_loadable_modules}
        annotations = " ".join(str(p.annotation) for p in inspect.signature(cls.__init__).parameters.values())
        fits = [f for f in FAMILIES if any(re.search(rf"\b{name}\b", annotations) for name in f.model_classes)]
        present = wanted & set(inspect.signature(cls.__init__).parameters)
        if fits and present and not any(present <= set(family.components) for family in fits):
            lost.append((pipeline, str(sorted(present))))
    assert lost == []
