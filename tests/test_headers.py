"""What a written file's header states, as the format's trainers state it and its readers look for it."""

from dataclasses import replace

import pytest
import torch

import lora_loaders as ll
from lora_loaders.adapter import Adapter
from lora_loaders.deltas import LoraDelta
from lora_loaders.detection import family_named
from lora_loaders.families import FAMILIES
from lora_loaders.families.rules import HOLE
from lora_loaders.formats import FORMATS
from lora_loaders.writing import to_tensors

# sd-scripts' `train_network.py` of each model and `library/sai_model_spec.py`; musubi-tuner's `networks/`,
# `dataset/architectures.py` and `utils/sai_model_spec.py`.
KOHYA = {
    "sd15": ("networks.lora", "sd_v1", "stable-diffusion-v1/lora"),
    "sdxl": ("networks.lora", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    "flux1": ("networks.lora_flux", "flux1", "flux-1-dev/lora"),
    "chroma": ("networks.lora_flux", "chroma", "chroma/lora"),
    "lumina2": ("networks.lora_lumina", "lumina2", "lumina-2/lora"),
    "hunyuan-image": ("networks.lora_hunyuan_image", "hunyuan-image-2.1", "hunyuan-image-2.1/lora"),
    "anima": ("networks.lora_anima", "anima", "anima-preview/lora"),
    "hunyuan-video": ("networks.lora", "hunyuan_video", "hunyuan-video/lora"),
    "hunyuan-video-1.5": ("networks.lora_hv_1_5", "hunyuan_video_1_5", "hunyuan-video-1.5/lora"),
    "wan": ("networks.lora_wan", "wan", "wan2.1/lora"),
    "qwen-image": ("networks.lora_qwen_image", "qwen_image", "Qwen-Image/lora"),
    "kandinsky5": ("networks.lora_kandinsky", "kandinsky5", "Kandinsky-5/lora"),
    "z-image": ("networks.lora_zimage", "z_image", "Z-Image/lora"),
    "ideogram4": ("networks.lora_ideogram4", "ideogram4", "Ideogram-4/lora"),
    "krea2": ("networks.lora_krea2", "krea2", "Krea-2/lora"),
    # Their published sizes have words of their own: SD 2's 512 and 768, SD 3's and Flux.2's three.
    "sd2": ("networks.lora", "sd_v2", None),
    "sd3": ("networks.lora_sd3", None, None),
    "flux2": ("networks.lora_flux_2", None, None),
    # No trainer of kohya's has it.
    "mochi": ("networks.lora", None, None),
}
# OneTrainer's `resources/sd_model_spec/*-lora.json`.
ONETRAINER = {
    "sd15": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
    "flux1": "Flux.1-dev",
    "flux2": "Flux.2",
    "chroma": "Chroma1",
    "anima": "Anima",
    "ernie-image": "Ernie",
    "hidream": "hidream-i1",
    "hunyuan-video": "hunyuan-video",
    "ideogram4": "Ideogram",
    "krea2": "Krea-2",
    "qwen-image": "Qwen-Image",
    "sana": "sana",
    "cascade": "stable-cascade-v1-prior",
    "wuerstchen": "wuerstchen-v2-prior",
    "z-image": "Z-Image",
}
MUST = {f"modelspec.{key}" for key in ("sai_model_spec", "architecture", "implementation", "title")}


def adapter_of(name: str, **metadata: str) -> Adapter:
    """A LoRA of one of the family's modules that is its own in all spellings."""
    family = family_named(name)
    names = family.components[family.denoiser]
    alone = (path for path in names.modules if len(names.writing("original").source(path)[1].paths) == 1)
    path = HOLE.sub("0", next(path for path in alone if not names.writing("original").source(path)[1].rule.swap))
    delta = LoraDelta(up=torch.ones(8, 2), down=torch.ones(2, 8), alpha=1.0)
    return Adapter({family.denoiser: {path: delta}}, family=name, metadata=metadata)


@pytest.mark.parametrize("spelling", ["kohya", "kohya-original", "kohya-diffusers"])
@pytest.mark.parametrize("family", KOHYA)
def test_kohyas_header_says_what_its_trainers_say(family: str, spelling: str) -> None:
    network, version, architecture = KOHYA[family]
    header = to_tensors(adapter_of(family), spelling)[1]
    assert header["ss_network_module"] == network
    assert header.get("ss_base_model_version") == version
    assert header.get("modelspec.architecture") == architecture
    assert (architecture is not None) == (header.keys() >= MUST)
    # Automatic1111 tells the three generations of Stable Diffusion so (extensions-builtin/Lora/network.py).
    assert header.get("ss_v2") == ("True" if family == "sd2" else None)
    assert header.get("ss_base_model_version", "").startswith("sdxl_") == (family == "sdxl")


def test_no_family_says_more_than_is_known_of_its_trainers() -> None:
    assert {family.name for family in FAMILIES if "kohya" in family.headers} == KOHYA.keys() - {"mochi"}
    assert {family.name for family in FAMILIES if "onetrainer" in family.headers} == ONETRAINER.keys()


@pytest.mark.parametrize("spelling", ["onetrainer", "omi"])
@pytest.mark.parametrize("family", ONETRAINER)
def test_onetrainers_header_says_what_it_says(family: str, spelling: str) -> None:
    header = to_tensors(adapter_of(family), spelling)[1]
    assert header["modelspec.architecture"] == f"{ONETRAINER[family]}/lora"
    assert header.keys() >= MUST
    assert header.get("ot_branch") == ("omi_format" if spelling == "omi" else None)


@pytest.mark.parametrize("source", [None, "kohya", "diffusers"])
@pytest.mark.parametrize(("family", "wanted"), [("flux1", "Flux.1-dev"), ("sdxl", "stable-diffusion-xl-v1-base")])
def test_invokeai_knows_an_omi_file_whatever_it_was_made_of(family: str, wanted: str, source: str | None) -> None:
    """By its `LoRA_OMI` configuration: three entries of the header, the architecture one of these two."""
    adapter = adapter_of(family)
    if source is not None:
        tensors, metadata, _ = to_tensors(adapter, source)
        adapter = replace(ll.read_adapter(tensors, family=family), metadata=metadata)
    header = to_tensors(adapter, "omi")[1]
    assert header["modelspec.sai_model_spec"]
    assert header["ot_branch"] == "omi_format"
    assert header["modelspec.architecture"] == f"{wanted}/lora"


@pytest.mark.parametrize("spelling", [form.name for form in FORMATS if form.name not in ("omi", "indexed", "xlabs")])
def test_the_sign_of_one_format_does_not_pass_into_another(spelling: str) -> None:
    adapter = replace(adapter_of("flux1", ot_branch="omi_format", ot_revision="abc"), format="omi")
    header = to_tensors(adapter, spelling)[1]
    assert "ot_branch" not in header
    assert header["ot_revision"] == "abc"
    other = to_tensors(replace(adapter, metadata={"ot_branch": "master"}), spelling)[1]
    assert other["ot_branch"] == "master"


def test_what_a_trainers_own_file_says_is_kept_and_what_another_says_is_not_believed() -> None:
    said = {"ss_base_model_version": "flux_kontext", "modelspec.architecture": "Flux.1-dev/lora"}
    own = to_tensors(replace(adapter_of("flux1", **said), format="kohya"), "kohya")[1]
    assert {key: own[key] for key in said} == said
    # ai-toolkit's files of Wan.
    wrong = replace(adapter_of("wan", ss_base_model_version="sd_1.5"), format="original")
    assert to_tensors(wrong, "kohya")[1]["ss_base_model_version"] == "wan"
    assert to_tensors(replace(wrong, family="mochi"), "diffusers")[1]["ss_base_model_version"] == "sd_1.5"


@pytest.mark.parametrize(
    ("metadata", "source", "title"),
    [
        ({"modelspec.title": "a style", "ss_output_name": "style-v2"}, "/files/style.safetensors", "a style"),
        ({"ss_output_name": "style-v2"}, "/files/style.safetensors", "style-v2"),
        ({}, "/files/style.safetensors", "style"),
        ({}, "a dictionary", "LoRA"),
    ],
)
def test_the_title_is_the_sources(metadata: dict[str, str], source: str, title: str) -> None:
    adapter = replace(adapter_of("flux1", **metadata), source=source)
    assert to_tensors(adapter, "kohya")[1]["modelspec.title"] == title
