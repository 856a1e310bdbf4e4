"""The tables against diffusers' own single-file converters, on checkpoints whose every row carries its own number."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from torch import Tensor

from lora_loaders.families import Names
from lora_loaders.families.rules import Dialect

from .published import BY_LABEL, Address, Published, needs_list

pytestmark = needs_list

Checkpoint = dict[str, Tensor]
NONE = re.compile(r"$^")
FLUX_SCALES = re.compile(r".*\.(query_norm|key_norm)|distilled_guidance_layer\.norms\.\d+")
KREA_SCALES = re.compile(r".*(qnorm|knorm|prenorm|postnorm)|txtmlp\.0|last\.norm")


@dataclass(frozen=True)
class Case:
    """One published model and the converter of its original checkpoint.

    Attributes:
        label: of the published model.
        converter: name of the function in `diffusers.loaders.single_file_utils`.
        scales: original norms whose weight the original calls `scale`.
        extra: keys of the original that no module stands for and the converter insists on.
        left_out: diffusers paths that the converter is not asked about.
        wrong: diffusers paths that the converter gets wrong, and the tables right.
        prefix: what stands before every original key.
        dialect: the published checkpoint's names; ComfyUI's are others for some, and those are the "original" ones.
    """

    label: str
    converter: str
    scales: re.Pattern[str] = NONE
    extra: tuple[str, ...] = ()
    left_out: re.Pattern[str] = NONE
    wrong: re.Pattern[str] = NONE
    prefix: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    dialect: Dialect = "original"

    def __str__(self) -> str:
        return self.label


# Activations' biases and raw parameters of Animate's encoders, which nobody adapts: they have diffusers' names only.
MOTION = re.compile(r"motion_encoder\.(.*act_fn|motion_synthesis_weight)|face_encoder\.padding_tokens")
# The single-file converter forgets LTX-2.3's prompt modulation; diffusers' LoRA converter renames it as the table does.
PROMPT = re.compile(r"(audio_)?prompt_adaln\..*")
# The converter leaves these as they are; the released checkpoints' names of them are not known.
COSMOS25 = re.compile(r"crossattn_proj\.0|img_context_proj\.0|.*\.attn2\.\w_img(_norm)?")
WAN = "convert_wan_transformer_to_diffusers"
CASES = (
    Case("sd3-medium", "convert_sd3_transformer_checkpoint_to_diffusers", extra=("pos_embed",)),
    Case("sd3.5-medium", "convert_sd3_transformer_checkpoint_to_diffusers", extra=("pos_embed",)),
    Case("sd3.5-large", "convert_sd3_transformer_checkpoint_to_diffusers", extra=("pos_embed",)),
    Case("flux1", "convert_flux_transformer_checkpoint_to_diffusers", FLUX_SCALES),
    Case("flux1-schnell", "convert_flux_transformer_checkpoint_to_diffusers", FLUX_SCALES),
    Case("chroma", "convert_chroma_transformer_checkpoint_to_diffusers", FLUX_SCALES),
    Case("flux2-dev", "convert_flux2_transformer_checkpoint_to_diffusers", FLUX_SCALES),
    Case("flux2-klein-4b", "convert_flux2_transformer_checkpoint_to_diffusers", FLUX_SCALES),
    Case("flux2-klein-9b", "convert_flux2_transformer_checkpoint_to_diffusers", FLUX_SCALES),
    Case("flux3-flow-map", "convert_flux3_transformer_checkpoint_to_diffusers", FLUX_SCALES),
    Case("qwen-image-2.1", "convert_qwen_image21_transformer_checkpoint_to_diffusers"),
    Case("wan2.1-t2v-14b", WAN),
    Case("wan2.1-i2v-14b", WAN),
    Case("wan2.2-5b", WAN),
    Case("wan2.1-vace", WAN),
    Case("wan2.2-animate", WAN, left_out=MOTION),
    Case("chronoedit", WAN),
    Case("skyreels2", WAN),
    Case("wan-animate-2", "convert_wan_animate_2_transformer_to_diffusers"),
    Case("hunyuan-video", "convert_hunyuan_video_transformer_to_diffusers", dialect="trainer"),
    Case("ltx", "convert_ltx_transformer_checkpoint_to_diffusers"),
    Case("ltx2", "convert_ltx2_transformer_to_diffusers"),
    Case("ltx2.3", "convert_ltx2_transformer_to_diffusers", wrong=PROMPT),
    Case("z-image", "convert_z_image_transformer_checkpoint_to_diffusers"),
    Case("lumina2", "convert_lumina2_to_diffusers"),
    Case("cosmos2.5", "convert_cosmos_transformer_checkpoint_to_diffusers", prefix="net.", left_out=COSMOS25),
    Case("anima", "convert_cosmos_transformer_checkpoint_to_diffusers", prefix="net."),
    Case("krea2", "convert_krea2_transformer_checkpoint_to_diffusers", KREA_SCALES),
    Case("minimax-h3", "convert_minimax_h3_transformer_checkpoint_to_diffusers", options={"config": {}}),
    Case("auraflow", "convert_auraflow_transformer_checkpoint_to_diffusers"),
    Case("sana", "convert_sana_transformer_to_diffusers", extra=("pos_embed", "y_embedder.y_embedding")),
    Case("mochi", "convert_mochi_transformer_checkpoint_to_diffusers"),
    Case("cascade-c", "convert_stable_cascade_unet_single_file_to_diffusers", dialect="trainer"),
    Case("cascade-b", "convert_stable_cascade_unet_single_file_to_diffusers", dialect="trainer"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tables_say_what_the_single_file_converter_does(case: Case) -> None:
    published = BY_LABEL[case.label]
    _check(case, published, published.names)


def test_cosmos_1_names_are_those_of_its_converter() -> None:
    published = BY_LABEL["cosmos1"]
    case = Case("cosmos1", "convert_cosmos_transformer_checkpoint_to_diffusers", prefix="net.")
    _check(case, published, published.names, checkpoint_type=RemembersKeys)


class RemembersKeys(dict[str, Tensor]):
    """diffusers empties the checkpoint before it looks for the key that tells Cosmos 1, and so never finds it."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key == "net.blocks.block1.blocks.0.block.attn.to_q.0.weight"


def _check(
    case: Case, published: Published, names: Names, checkpoint_type: Callable[[Checkpoint], Checkpoint] = dict
) -> None:
    addresses = {path: a for path, a in published.addresses.items() if not case.left_out.fullmatch(path)}
    expected = _numbered(addresses)
    original = _original(case, names, addresses, expected)
    original |= {key: torch.zeros(1) for key in case.extra}
    convert = getattr(converters, case.converter, None)
    if convert is None:
        pytest.skip(f"this diffusers has no {case.converter}")
    converted = convert(checkpoint_type(original), **case.options)
    for key, tensor in expected.items():
        if case.wrong.fullmatch(key):
            assert key not in converted, f"the converter has learnt {key}: drop the exception"
            continue
        assert key in converted, key
        assert torch.equal(converted[key].flatten(), tensor.flatten()), key


def _numbered(addresses: Mapping[str, Address]) -> Checkpoint:
    """diffusers' state dict, its rows numbered through the whole model; one column is enough."""
    numbered: Checkpoint = {}
    count = 0

    def rows(shape: tuple[int, ...]) -> Tensor:
        nonlocal count
        size = 1
        for extent in shape:
            size *= extent
        count += size
        return torch.arange(count - size, count, dtype=torch.float64).reshape(shape)

    for path, address in addresses.items():
        if address.is_parameter:
            numbered[path] = rows(address.shape)
            continue
        if address.shape:
            numbered[f"{path}.weight"] = rows((*address.shape[:1], *(1 for _ in address.shape[1:])))
        if address.bias_rows:
            numbered[f"{path}.bias"] = rows((address.bias_rows,))
    return numbered


def _original(case: Case, names: Names, addresses: Mapping[str, Address], numbered: Checkpoint) -> Checkpoint:
    """The same in the original's names: parts put together, halves put back."""
    writing = names.writing(case.dialect)
    blocks = [int(path.split(".")[1]) for path in addresses if re.match(r"\w+_blocks\.\d+\.", path)]
    original: Checkpoint = {}
    for path, address in addresses.items():
        source, resolved = writing.source(path)
        swap = resolved.rule.swap
        swapped = swap == "all" or (swap == "last" and resolved.block == max(blocks))
        if address.is_parameter:
            flat = numbered[path].flatten() if source.endswith("mod.lin") else numbered[path]
            original[f"{case.prefix}{source}"] = flat
            continue
        for slot in ("weight", "bias"):
            keys = [f"{part}.{slot}" for part in resolved.paths]
            if keys[0] in numbered:
                whole = torch.cat([numbered[key] for key in keys])
                whole = whole.roll(len(whole) // 2, 0) if swapped else whole
                original[f"{case.prefix}{source}{_slot(case, source, slot)}"] = whole
    return original


def _slot(case: Case, source: str, slot: str) -> str:
    if source.endswith("attn.in_proj"):
        return f"_{slot}"
    return ".scale" if slot == "weight" and case.scales.fullmatch(source) else f".{slot}"
