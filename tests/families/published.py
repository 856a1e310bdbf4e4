"""The published models whose names the tables must know, built on the meta device."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_loaders.families import FAMILIES, Family, Names

torch.set_num_threads(1)
logging.getLogger("diffusers").setLevel(logging.ERROR)

LIST = Path(__file__).parents[2].parent / "shared" / "reference" / "architectures.json"
ARCHITECTURES: dict[str, dict[str, Any]] = json.loads(LIST.read_text()) if LIST.exists() else {}
needs_list = pytest.mark.skipif(not ARCHITECTURES, reason=f"the list of published architectures is not at {LIST}")

CONNECTORS = "diffusers.pipelines.ltx2.connectors:LTX2TextConnectors"
CASCADE_C = {
    "conditioning_dim": 2048,
    "block_out_channels": (2048, 2048),
    "num_attention_heads": (32, 32),
    "clip_text_in_channels": 1280,
    "clip_image_in_channels": 768,
    "switch_level": (False,),
    "dropout": (0.1, 0.1),
}
CASCADE_B = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "conditioning_dim": 1280,
    "block_out_channels": (320, 640, 1280, 1280),
    "num_attention_heads": (0, 0, 20, 20),
    "down_num_layers_per_block": (2, 6, 28, 6),
    "up_num_layers_per_block": (6, 28, 6, 2),
    "down_blocks_repeat_mappers": (1, 1, 1, 1),
    "up_blocks_repeat_mappers": (3, 3, 2, 2),
    "block_types_per_layer": (
        *(("SDCascadeResBlock", "SDCascadeTimestepBlock"),) * 2,
        *(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
    ),
    "dropout": (0, 0, 0.1, 0.1),
    "effnet_in_channels": 16,
    "pixel_mapper_in_channels": 3,
    "timestep_conditioning_type": ("sca",),
}
LATTE = {
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 64,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "caption_channels": 4096,
}
OMNIGEN_ROPE = {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48, "original_max_position_embeddings": 4096}
NO_MIDDLE = {"use_motion_mid_block": False}
WUERSTCHEN = "diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen"
REFINER = {
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 1280,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,
    "use_linear_projection": True,
    "attention_head_dim": (6, 12, 24, 24),
}
# What Kandinsky 2 and DeepFloyd IF have in common.
ADDED_KEYS = {
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "block_out_channels": (384, 768, 1152, 1536),
    "layers_per_block": 3,
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_dim": 768,
    "encoder_hid_dim": 1280,
}
KANDINSKY22 = {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"}
KANDINSKY21 = {
    "addition_embed_type": "text_image",
    "encoder_hid_dim_type": "text_image_proj",
    "encoder_hid_dim": 1024,
}
IF = {
    "cross_attention_dim": 1536,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
}
# docs/source/en/api/models/motif_video_transformer_3d.md in diffusers for the blocks (single ones are 16, and 8 of the
# decoder), tests/transformer/expected_attn_keys.json in MotifTechnologies/ComfyUI-MotifVideo2B for the width.
MOTIF = {
    "num_attention_heads": 12,
    "num_layers": 12,
    "num_single_layers": 24,
    "num_decoder_layers": 8,
    "image_embed_dim": 1152,
    "enable_text_cross_attention_dual": True,
    "enable_text_cross_attention_single": True,
}
SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}

# Sizes and parts that the list lacks: (label, family, component, class or `module:class`, configuration).
MORE: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
    ("sd21", "sd2", "unet", "UNet2DConditionModel", {"cross_attention_dim": 1024, "use_linear_projection": True}),
    ("flux1-schnell", "flux1", "transformer", "FluxTransformer2DModel", {"guidance_embeds": False}),
    ("sd3.5-large", "sd3", "transformer", "SD3Transformer2DModel", SD35_LARGE),
    ("flux3-flow-map", "flux3", "transformer", "Flux3Transformer2DModel", {"flow_map": True}),
    ("qwen-image-layered", "qwen-image", "transformer", "QwenImageTransformer2DModel", {"use_additional_t_cond": True}),
    ("qwen-image-2.1", "qwen-image-2.1", "transformer", "QwenImage21Transformer2DModel", {}),
    ("wan2.1-vace", "wan", "transformer", "WanVACETransformer3DModel", {}),
    ("wan2.2-animate", "wan", "transformer", "WanAnimateTransformer3DModel", {}),
    ("chronoedit", "wan", "transformer", "ChronoEditTransformer3DModel", {}),
    ("anyflow-far", "wan", "transformer", "AnyFlowFARTransformer3DModel", {}),
    ("wan-animate-2", "wan-animate2", "transformer", "WanAnimate2Transformer3DModel", {}),
    (
        "skyreels2-i2v",
        "skyreels2",
        "transformer",
        "SkyReelsV2Transformer3DModel",
        {"num_attention_heads": 40, "image_dim": 1280, "added_kv_proj_dim": 5120, "inject_sample_info": True},
    ),
    (
        "framepack",
        "hunyuan-video",
        "transformer",
        "HunyuanVideoFramepackTransformer3DModel",
        {"has_image_proj": True, "has_clean_x_embedder": True},
    ),
    (
        "hunyuan-image-distilled",
        "hunyuan-image",
        "transformer",
        "HunyuanImageTransformer2DModel",
        {"use_meanflow": True, "guidance_embeds": True, "text_embed_2_dim": 1472},
    ),
    ("ltx2-connectors", "ltx2", "connectors", CONNECTORS, {}),
    (
        "ltx2.3-connectors",
        "ltx2",
        "connectors",
        CONNECTORS,
        {"per_modality_projections": True, "video_gated_attn": True, "audio_gated_attn": True, "proj_bias": True},
    ),
    ("z-image-omni", "z-image", "transformer", "ZImageTransformer2DModel", {"siglip_feat_dim": 1152}),
    ("cosmos1", "cosmos1", "transformer", "CosmosTransformer3DModel", {}),
    (
        "cosmos2.5",
        "cosmos",
        "transformer",
        "CosmosTransformer3DModel",
        {
            "num_attention_heads": 16,
            "use_crossattn_projection": True,
            "img_context_dim_in": 1152,
            "extra_pos_embed_type": None,
        },
    ),
    (
        "pixart-sigma",
        "pixart",
        "transformer",
        "PixArtTransformer2DModel",
        {"caption_channels": 4096, "use_additional_conditions": False},
    ),
    ("pixart-alpha", "pixart", "transformer", "PixArtTransformer2DModel", {"caption_channels": 4096}),
    (
        "sana-sprint",
        "sana",
        "transformer",
        "SanaTransformer2DModel",
        {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
    ),
    ("sana-video", "sana-video", "transformer", "SanaVideoTransformer3DModel", {}),
    ("cascade-c", "cascade", "prior", "StableCascadeUNet", CASCADE_C),
    ("cascade-b", "cascade", "decoder", "StableCascadeUNet", CASCADE_B),
    (
        "cogvideox1.5",
        "cogvideox",
        "transformer",
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "ofs_embed_dim": 512, "patch_size_t": 2, "use_rotary_positional_embeddings": True},
    ),
    (
        "consisid",
        "cogvideox",
        "transformer",
        "ConsisIDTransformer3DModel",
        {"num_attention_heads": 48, "is_train_face": True, "use_rotary_positional_embeddings": True},
    ),
    ("cogview3", "cogview3", "transformer", "CogView3PlusTransformer2DModel", {}),
    ("kandinsky6", "kandinsky6", "transformer", "Kandinsky6Transformer3DModel", {}),
    ("bria-fibo", "bria-fibo", "transformer", "BriaFiboTransformer2DModel", {"num_layers": 8}),
    ("bria", "bria", "transformer", "BriaTransformer2DModel", {"num_layers": 8, "num_single_layers": 28}),
    ("prx", "prx", "transformer", "PRXTransformer2DModel", {}),
    (
        "longcat-image",
        "longcat-image",
        "transformer",
        "LongCatImageTransformer2DModel",
        {"num_layers": 10, "num_single_layers": 20},
    ),
    ("ovis-image", "ovis-image", "transformer", "OvisImageTransformer2DModel", {}),
    # 7 billion parameters, where the class's defaults make less than 3.
    (
        "glm-image",
        "glm-image",
        "transformer",
        "GlmImageTransformer2DModel",
        {"attention_head_dim": 128, "num_attention_heads": 32},
    ),
    ("joy-image", "joy-image", "transformer", "JoyImageEditTransformer3DModel", {}),
    ("nucleus-image", "nucleus-image", "transformer", "NucleusMoEImageTransformer2DModel", {}),
    ("lumina", "lumina", "transformer", "LuminaNextDiT2DModel", {"num_layers": 24, "num_kv_heads": 8}),
    ("omnigen", "omnigen", "transformer", "OmniGenTransformer2DModel", {"rope_scaling": OMNIGEN_ROPE}),
    ("dit", "dit", "transformer", "DiTTransformer2DModel", {}),
    ("allegro", "allegro", "transformer", "AllegroTransformer3DModel", {}),
    ("latte", "latte", "transformer", "LatteTransformer3DModel", LATTE),
    (
        "easyanimate",
        "easyanimate",
        "transformer",
        "EasyAnimateTransformer3DModel",
        {"in_channels": 33, "out_channels": 16, "patch_size": 2, "add_norm_text_encoder": True},
    ),
    (
        "motif-video",
        "motif-video",
        "transformer",
        "MotifVideoTransformer3DModel",
        MOTIF,
    ),
    ("cosmos3", "cosmos3", "transformer", "Cosmos3OmniTransformer", {}),
    ("sana-wm", "sana-wm", "transformer", "SanaWMTransformer3DModel", {}),
    ("stable-audio", "stable-audio", "transformer", "StableAudioDiTModel", {}),
    ("stable-audio-3", "stable-audio-3", "transformer", "StableAudio3DiTModel", {}),
    ("longcat-audio", "longcat-audio", "transformer", "LongCatAudioDiTTransformer", {}),
    ("sdxl-refiner", "sdxl-refiner", "unet", "UNet2DConditionModel", REFINER),
    ("animatediff", "animatediff", "unet", "UNetMotionModel", {"cross_attention_dim": 768}),
    ("animatediff-v1", "animatediff", "unet", "UNetMotionModel", {"cross_attention_dim": 768} | NO_MIDDLE),
    ("animatediff-xl", "animatediff-xl", "unet", "UNetMotionModel", {"cross_attention_dim": 2048}),
    ("svd", "svd", "unet", "UNetSpatioTemporalConditionModel", {}),
    ("text-to-video", "text-to-video", "unet", "UNet3DConditionModel", {}),
    ("i2vgen-xl", "i2vgen-xl", "unet", "I2VGenXLUNet", {}),
    ("kandinsky2.2", "kandinsky2", "unet", "UNet2DConditionModel", ADDED_KEYS | KANDINSKY22),
    ("kandinsky2.1", "kandinsky2", "unet", "UNet2DConditionModel", ADDED_KEYS | KANDINSKY21),
    ("deepfloyd-if", "deepfloyd-if", "unet", "UNet2DConditionModel", ADDED_KEYS | IF),
    ("kandinsky2-prior", "kandinsky2-prior", "prior", "PriorTransformer", {"num_layers": 20}),
    ("kandinsky3", "kandinsky3", "unet", "Kandinsky3UNet", {}),
    ("kandinsky6-sr", "kandinsky6-sr", "transformer", "Kandinsky6SRTransformer3DModel", {}),
    ("dreamlite", "dreamlite", "unet", "DreamLiteUNetModel", {}),
    ("audioldm2", "audioldm2", "unet", "AudioLDM2UNet2DConditionModel", {}),
    ("rfd4-proteina", "rfd4-proteina", "transformer", "RFD4ProteinaTransformer", {}),
    ("wuerstchen-c", "wuerstchen", "prior", f"{WUERSTCHEN}_prior:WuerstchenPrior", {"c": 1536, "nhead": 24}),
    ("wuerstchen-b", "wuerstchen", "decoder", f"{WUERSTCHEN}_diffnext:WuerstchenDiffNeXt", {}),
    ("minimax-music3", "minimax-music3", "transformer", "MiniMaxMusic3Transformer1DModel", {}),
)
# Where the list leaves a class's defaults, and what was published is another size. Sources: diffusers'
# convert_cogview4_to_diffusers.py and convert_skyreelsv2_to_diffusers.py, musubi-tuner's kandinsky5/configs.py (the
# lite video model), and DiffSynth's ernie_image_dit.py.
TRUE_SIZES: dict[str, dict[str, Any]] = {
    "cogview4": {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32},
    "skyreels2": {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824},
    "kandinsky5": {"in_visual_dim": 16, "out_visual_dim": 16, "model_dim": 1792, "ff_dim": 7168, "visual_cond": True},
    "ernie-image": {"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 36, "ffn_hidden_size": 12288},
}
FAMILY_OF = {"wan2.1": "wan", "wan2.2": "wan", "sd3": "sd3", "sd3.5": "sd3", "flux2": "flux2", "ltx2.3": "ltx2"}
# In the list, but only an outline (Cascade is neither stage, PixArt reads no captions), or of a class that diffusers
# does not have.
LEFT_OUT = ("cascade", "pixart", "omnigen2")


@dataclass(frozen=True)
class Published:
    """One published model: where its names belong, and how to build it."""

    label: str
    family: Family
    component: str
    model_class: str
    config: Mapping[str, Any]

    @property
    def names(self) -> Names:
        return self.family.components[self.component]

    @property
    def addresses(self) -> dict[str, "Address"]:
        return _addresses(self.label)

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class Address:
    """A module with weights of its own, or a raw parameter."""

    is_parameter: bool
    shape: tuple[int, ...]
    bias_rows: int


def _family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def _listed() -> list[Published]:
    listed: list[Published] = []
    for label, entry in ARCHITECTURES.items():
        if label in LEFT_OUT:
            continue
        name, component = FAMILY_OF.get(label.split("-")[0], label), None
        if label == "anima-text-conditioner":
            name, component = "anima", "text_conditioner"
        family = _family(name)
        listed.append(
            Published(
                label, family, component or family.denoiser, entry["class"], entry["config"] | TRUE_SIZES.get(label, {})
            )
        )
    return listed


PUBLISHED = [
    *_listed(),
    *(Published(label, _family(name), component, model, config) for label, name, component, model, config in MORE),
]
BY_LABEL = {published.label: published for published in PUBLISHED}


def build(published: Published) -> torch.nn.Module:
    """The model on the meta device; a version of diffusers without its class skips the test."""
    module, _, name = published.model_class.rpartition(":")
    found = getattr(import_module(module or "diffusers"), name, None)
    if found is None:
        pytest.skip(f"this diffusers has no {name}")
    with torch.device("meta"):
        return found(**published.config)


@cache
def _addresses(label: str) -> dict[str, Address]:
    found: dict[str, Address] = {}
    for path, module in build(BY_LABEL[label]).named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        weight, bias = own.get("weight"), own.get("bias")
        if path and own.keys() <= {"weight", "bias"}:
            shape = tuple(weight.shape) if weight is not None else ()
            found[path] = Address(False, shape, 0 if bias is None else len(bias))
            continue
        for name, parameter in own.items():
            found[f"{path}.{name}" if path else name] = Address(True, tuple(parameter.shape), 0)
    return found
