"""Every published key listing of four families plans onto the real architecture, and every key is accounted for."""

from collections.abc import Callable

import pytest
import torch
from filled_manifests import IMPOSSIBLE, MODULE_LISTS, at_real_size, layout_of
from random_files import accounts
from shared_files import Manifest, manifests, needs_shared
from torch import nn

from lora_loaders.conversion import parse
from lora_loaders.detection import family_named
from lora_loaders.files import Contents
from lora_loaders.plans import AttachPlan, plan_adapter

pytestmark = needs_shared
ENCODERS = {
    "sd15": {"text_encoder": "clip_l"},
    "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    "flux1": {"text_encoder": "clip_l", "text_encoder_2": "t5"},
    "qwen-image": {"text_encoder": "qwen"},
}
LISTINGS = {m.name: m for m in manifests(*ENCODERS) if m.name not in IMPOSSIBLE}
# Names that a unit test of another project made up; there are no such modules.
INVENTED = {"lorainspector_js_flux_kohya": {"vector_in", "time_in", "guidance_in"}}

# Listings that say nothing which only one family has.
TIED = {
    "invokeai_qwen_image_lora_diffusers_format": "three modules whose names and widths are Flux.1's as well",
    "issue_comfy9213_qwen_simpletuner": "four modules whose names and widths are Flux.1's as well",
    "invokeai_sdxl_slider_1105685": "self-attention alone is as wide in Stable Diffusion 1.5",
}

Build = Callable[[str], nn.Module]
Models = dict[str, nn.Module]


@pytest.fixture(scope="session")
def pipeline(denoiser: Build, text_encoder: Build) -> Callable[[str], Models]:
    def build(family: str) -> Models:
        encoders = {component: text_encoder(name) for component, name in ENCODERS[family].items()}
        return {family_named(family).denoiser: denoiser(family), **encoders}

    return build


@pytest.fixture(params=LISTINGS)
def manifest(request: pytest.FixtureRequest) -> Manifest:
    return LISTINGS[request.param]


FILLED: dict[str, dict[str, torch.Tensor]] = {}


def tensors_of(manifest: Manifest, models: Models) -> dict[str, torch.Tensor]:
    if manifest.name not in FILLED:
        FILLED[manifest.name] = at_real_size(manifest, models)
    return FILLED[manifest.name]


def plan(manifest: Manifest, models: Models, family: str | None, *, may_widen: bool = True) -> AttachPlan:
    contents = Contents(tensors_of(manifest, models), label=manifest.name)
    known = family_named(manifest.family)
    layout = layout_of(known, models)
    adapter = parse(contents, family, layout)
    assert accounts(adapter) == set(contents.tensors)
    optional = {component: names.is_optional for component, names in known.components.items()}
    return plan_adapter(models, adapter, layout=layout, widens=known.widens, may_widen=may_widen, is_optional=optional)


def test_every_key_of_every_listing_is_bound_or_ignored_for_a_reason(
    manifest: Manifest, pipeline: Callable[[str], Models]
) -> None:
    done = plan(manifest, pipeline(manifest.family), manifest.family)
    assert not done.problems
    invented = INVENTED.get(manifest.name, set())
    assert {label.split(".")[-1] for label in done.unmatched} == invented
    assert all(reason.strip() for reason in done.ignored.values())
    for key, answer in done.keys.items():
        if "no place" in answer:
            assert any(name in key for name in invented), key


def test_family_of_every_real_listing_is_told(manifest: Manifest, pipeline: Callable[[str], Models]) -> None:
    if manifest.name in TIED:
        pytest.skip(f"{TIED[manifest.name]}: the pipeline or the caller decides")
    contents = Contents(tensors_of(manifest, pipeline(manifest.family)))
    assert parse(contents).family == manifest.family


@pytest.mark.parametrize("name", [m.name for m in LISTINGS.values() if "complete" in m.provenance])
def test_complete_files_bind_every_single_key(name: str, pipeline: Callable[[str], Models]) -> None:
    manifest = LISTINGS[name]
    done = plan(manifest, pipeline(manifest.family), manifest.family)
    assert not done.ignored
    assert set(done.keys) == set(manifest.shapes)
    targets = {target for binding in done.adapter.bound.values() for target in binding}
    assert len(targets) == len(done.matched)


EXPECTED_COUNTS = {
    "lorainspector_sdxl_kohya": {"unet": 722, "text_encoder": 72},
    "lorainspector_sd15_kohya": {"unet": 192, "text_encoder": 72},
    "lorainspector_flux1_kohya": {"transformer": 494},
    "invokeai_flux_dora_onetrainer_format": {"text_encoder": 72, "text_encoder_2": 168, "transformer": 266},
    "lorainspector_qwen_image_kohya": {"transformer": 720},
    "invokeai_flux_lora_aitoolkit_format": {"transformer": 418},
    "visionstudio_XLabs-AI_flux-RealismLora_lora": {"transformer": 152},
}


@pytest.mark.parametrize("name", EXPECTED_COUNTS)
def test_number_of_modules_is_that_of_the_published_file(name: str, pipeline: Callable[[str], Models]) -> None:
    manifest = LISTINGS[name]
    assert plan(manifest, pipeline(manifest.family), manifest.family).components == EXPECTED_COUNTS[name]


def test_control_file_needs_leave_to_widen(pipeline: Callable[[str], Models]) -> None:
    manifest = LISTINGS["invokeai_flux_control_lora_format"]
    refused = plan(manifest, pipeline("flux1"), "flux1", may_widen=False)
    assert len(refused.problems) == 1
    assert "transformer.x_embedder" in refused.problems[0]
    assert "Control LoRA" in refused.problems[0]
    allowed = plan(manifest, pipeline("flux1"), "flux1")
    assert [binding.path for binding in allowed.bindings if binding.widens] == ["x_embedder"]


def test_file_for_another_family_is_told_apart_by_shape(pipeline: Callable[[str], Models]) -> None:
    """An SD 1.5 file and SDXL share many names; what does not fit is a problem, and planning touches nothing."""
    manifest = LISTINGS["lorainspector_sd15_kohya"]
    models = pipeline("sdxl")
    before = {name: id(module) for name, module in models["unet"].named_modules()}
    contents = Contents(tensors_of(manifest, pipeline("sd15")))
    done = plan_adapter(models, parse(contents), layout=layout_of(family_named("sdxl"), models))
    assert done.problems
    assert done.unmatched
    assert {name: id(module) for name, module in models["unet"].named_modules()} == before


def test_lists_without_keys_are_few() -> None:
    """So that the tables above are not quietly empty."""
    assert len(LISTINGS) >= 28
    assert set(MODULE_LISTS) <= set(LISTINGS)
    assert torch.get_num_threads() == 1
