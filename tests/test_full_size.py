"""The complete SDXL kohya layout on a full-size UNet on the CPU; its pages are never touched, so memory stays small."""

import json

import diffusers
import pytest
import torch
from shared_files import shared_file
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.layout import adapter_layers

ALPHA = 8.0


def filled(manifest: dict[str, dict[str, list[int]]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(entry["shape"], generator=generator) for key, entry in manifest.items()}
    return {key: torch.tensor(ALPHA) if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    architecture = json.loads(shared_file("reference/architectures.json").read_text())["sdxl"]
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**architecture["config"])
    return ll.attach(model.to_empty(device="cpu"))


def test_complete_sdxl_kohya_layout_loads_with_the_delta_weight_of_the_formula(unet: nn.Module) -> None:
    manifest = json.loads(shared_file("manifests/lorainspector_sdxl_kohya.json").read_text())["keys"]
    assert len(manifest) == 2382
    tensors = filled(manifest)

    report = unet.load_lora_adapter(tensors, prefix="unet", adapter_name="style")  # type: ignore[operator]

    assert report.components == {"unet": 722}
    elsewhere = {label.split(".")[0] for label in report.unmatched}
    assert elsewhere == {"text_encoder"}
    # The manifest's UNet names are diffusers' own, flattened: the module is found without the package's tables.
    flat = {path.replace(".", "_"): layer for path, layer in adapter_layers(unet)}
    downs = [key for key in tensors if key.startswith("lora_unet_") and key.endswith(".lora_down.weight")]
    assert len(downs) == len(flat) == 722
    for key in downs:
        name = key.removesuffix(".lora_down.weight")
        down, up = tensors[key].flatten(1), tensors[f"{name}.lora_up.weight"].flatten(1)
        found = flat[name.removeprefix("lora_unet_")].delta("style").delta_weight().flatten(1)
        expected = up @ down * (ALPHA / down.shape[0])
        assert found.shape == expected.shape
        assert found.sub_(expected).abs().max() <= 1e-6 * expected.abs().max()
