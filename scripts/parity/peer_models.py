"""The peers' models that `peer_loaders.py` builds: class and a small configuration each, and what they claim to read.

ComfyUI: `comfy/supported_models.py`, `comfy/model_detection.py` for the configurations, `comfy/lora.py` for the claims.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NAMES = ("kohya", "original")
UNET: dict[str, Any] = {
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "adm_in_channels": None,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "context_dim": 32,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
LABELLED = {"num_classes": "sequential", "adm_in_channels": 32, "use_linear_in_transformer": True}
XL = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
}
REFINER = {
    "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
    "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
    "transformer_depth_middle": 4,
}
VIDEO = {
    "in_channels": 8,
    "use_temporal_attention": True,
    "use_temporal_resblock": True,
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1],
    "disable_temporal_crossattention": False,
}
FLUX: dict[str, Any] = {
    "image_model": "flux",
    "axes_dim": [8, 12, 12],
    "num_heads": 2,
    "hidden_size": 64,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "qkv_bias": True,
    "txt_ids_dims": [],
    "context_in_dim": 32,
    "vec_in_dim": 32,
    "depth": 2,
    "depth_single_blocks": 2,
    "guidance_embed": True,
}
FLUX2 = {
    **FLUX,
    "image_model": "flux2",
    "mlp_ratio": 3.0,
    "out_channels": 128,
    "global_modulation": True,
    "mlp_silu_act": True,
    "qkv_bias": False,
    "ops_bias": False,
    "txt_ids_dims": [3],
    "vec_in_dim": None,
    "patch_size": 1,
}
CHROMA = {
    **FLUX,
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 64,
    "hidden_dim": 96,
    "n_layers": 2,
    "vec_in_dim": None,
}
del CHROMA["guidance_embed"]
HUNYUAN: dict[str, Any] = {
    **FLUX,
    "image_model": "hunyuan_video",
    "patch_size": [1, 2, 2],
    "theta": 256,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
del HUNYUAN["txt_ids_dims"]
HUNYUAN15 = {**HUNYUAN, "byt5": True, "use_cond_type_embedding": True, "vision_in_dim": 1152, "meanflow_sum": True}
WAN: dict[str, Any] = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 64,
    "ffn_dim": 96,
    "freq_dim": 32,
    "text_dim": 32,
    "in_dim": 16,
    "num_heads": 2,
    "num_layers": 2,
}
COSMOS: dict[str, Any] = {
    "max_img_h": 24,
    "max_img_w": 24,
    "max_frames": 16,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 64,
    "num_blocks": 2,
    "num_heads": 2,
    "crossattn_emb_channels": 32,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
}
PREDICT2 = {**COSMOS, "image_model": "cosmos_predict2", "pos_emb_learnable": True}
COSMOS1 = {
    **COSMOS,
    "image_model": "cosmos",
    "block_config": "FA-CA-MLP",
    "block_x_format": "THWBD",
    "affline_emb_norm": True,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}
LUMINA: dict[str, Any] = {
    "image_model": "lumina2",
    "in_channels": 16,
    "dim": 96,
    "cap_feat_dim": 32,
    "n_layers": 2,
    "qk_norm": True,
    "n_heads": 6,
    "n_kv_heads": 2,
    "axes_dims": [4, 6, 6],
    "multiple_of": 16,
}
Z_IMAGE = {**LUMINA, "n_kv_heads": 6, "z_image_modulation": True, "pad_tokens_multiple": 32}
LTX: dict[str, Any] = {
    "image_model": "ltxv",
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "cross_attention_dim": 64,
    "caption_channels": 32,
}
LTX2 = {
    **LTX,
    "image_model": "ltxav",
    "audio_cross_attention_dim": 32,
    "audio_attention_head_dim": 8,
    "audio_num_attention_heads": 4,
}
CASCADE_C = {
    "stable_cascade_stage": "c",
    "c_cond": 64,
    "c_hidden": [64, 64],
    "nhead": [2, 2],
    "blocks": [[2, 2], [2, 2]],
}
CASCADE_B = {
    "stable_cascade_stage": "b",
    "c_cond": 64,
    "c_hidden": [32, 64, 64, 64],
    "nhead": [-1, -1, 2, 2],
    "blocks": [[2, 2, 2, 2], [2, 2, 2, 2]],
    "block_repeat": [[1, 1, 1, 1], [3, 3, 2, 2]],
}
SD3 = {
    "in_channels": 16,
    "out_channels": 16,
    "pos_embed_scaling_factor": None,
    "input_size": None,
    "depth": 2,
    "adm_in_channels": 32,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}},
    "num_patches": 64,
    "pos_embed_max_size": 8,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [],
}
# As deep, and so as wide, as the published one: its last block has halves to swap, and depth tells which is the last.
SD3_WHOLE = {
    **SD3,
    "depth": 24,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 1536}},
}
SD3_LAST = r"joint_blocks\.23\.context_block\.adaLN"
AURAFLOW = {"dim": 64, "n_layers": 6, "n_double_layers": 2, "n_heads": 2, "global_conddim": 64, "cond_seq_dim": 32}
PIXART = {
    "image_model": "pixart_sigma",
    "micro_condition": False,
    "num_heads": 2,
    "hidden_size": 64,
    "depth": 2,
    "caption_channels": 32,
    "pe_interpolation": 2,
}
HUNYUAN_DIT = {
    "image_model": "hydit",
    "depth": 4,
    "hidden_size": 64,
    "num_heads": 2,
    "text_states_dim": 32,
    "text_states_dim_t5": 32,
}
MOCHI = {
    "image_model": "mochi_preview",
    "depth": 2,
    "num_heads": 2,
    "hidden_size_x": 64,
    "hidden_size_y": 32,
    "mlp_ratio_x": 192.0,  # ComfyUI has the width of its inside written out
    "in_channels": 12,
    "qk_norm": True,
    "qkv_bias": False,
    "out_bias": True,
    "attend_to_padding": False,
    "use_t5": True,
    "t5_feat_dim": 32,
    "t5_token_length": 8,
}
HIDREAM = {
    "image_model": "hidream",
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "axes_dims_rope": [16, 8, 8],
    "caption_channels": [32, 32],
    "max_resolution": [16, 16],
    "in_channels": 16,
    "out_channels": 16,
    "llama_layers": [0, 1, 1, 1],
    "num_layers": 2,
    "num_single_layers": 2,
    "patch_size": 2,
    "text_emb_dim": 32,
}
QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": [8, 12, 12],
}
KANDINSKY = {
    "image_model": "kandinsky5",
    "in_text_dim": 32,
    "in_text_dim2": 32,
    "time_dim": 32,
    "model_dim": 64,
    "ff_dim": 96,
    "axes_dims": (8, 12, 12),
    "num_text_blocks": 2,
    "num_visual_blocks": 2,
}
AUDIO = {
    "audio_model": "dit1.0",
    "embed_dim": 64,
    "cond_token_dim": 32,
    "global_cond_dim": 32,
    "depth": 2,
    "num_heads": 2,
}
SECONDS = {
    f"conditioner.conditioners.{name}.embedder.embedding.{weight}": shape
    for name in ("seconds_start", "seconds_total")
    for weight, shape in {"0.weights": (128,), "1.weight": (768, 257), "1.bias": (768,)}.items()
}


@dataclass(frozen=True)
class PeerModel:
    """A denoiser: our family, the peer's class, its arguments, and the spellings that the peer claims to read."""

    label: str
    family: str
    name: str
    config: Mapping[str, Any]
    spellings: tuple[str, ...] = NAMES
    state: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Weights that ComfyUI wants at once, by name."""
    only: str = ""
    """A pattern for the modules that are looked at."""


UNET_NAMES = (*NAMES, "lycoris")
DIFFUSERS = (*NAMES, "diffusers")
SD3_NAMES = (*DIFFUSERS, "peft", "onetrainer", "lycoris")
COMFYUI: tuple[PeerModel, ...] = (
    PeerModel("SD 1.5", "sd15", "SD15", UNET, UNET_NAMES),
    PeerModel("SD 2", "sd2", "SD20", {**UNET, "use_linear_in_transformer": True}, UNET_NAMES),
    PeerModel("SDXL", "sdxl", "SDXL", {**UNET, **LABELLED, **XL}, UNET_NAMES),
    PeerModel("SDXL refiner", "sdxl-refiner", "SDXLRefiner", {**UNET, **LABELLED, **REFINER}, UNET_NAMES),
    PeerModel("SVD", "svd", "SVD_img2vid", {**UNET, **LABELLED, **VIDEO}),
    PeerModel("Stable Cascade C", "cascade", "Stable_Cascade_C", CASCADE_C),
    PeerModel("SD 3.5", "sd3", "SD3", SD3, SD3_NAMES, only=r"^(?!.*joint_blocks\.1\.context_block\.adaLN)"),
    PeerModel("SD 3.5 medium, last block", "sd3", "SD3", SD3_WHOLE, SD3_NAMES, only=SD3_LAST),
    PeerModel("Stable Audio", "stable-audio", "StableAudio", AUDIO, state=SECONDS),
    PeerModel("AuraFlow", "auraflow", "AuraFlow", AURAFLOW, DIFFUSERS),
    PeerModel("PixArt-Σ", "pixart", "PixArtSigma", PIXART, (*DIFFUSERS, "peft")),
    PeerModel("HunyuanDiT", "hunyuan-dit", "HunyuanDiT", HUNYUAN_DIT),
    PeerModel("Flux.1", "flux1", "Flux", FLUX, (*DIFFUSERS, "onetrainer", "lycoris")),
    PeerModel("Flux.2", "flux2", "Flux2", FLUX2, DIFFUSERS),
    PeerModel("Chroma", "chroma", "Chroma", CHROMA),
    PeerModel("Mochi", "mochi", "GenmoMochi", MOCHI),
    PeerModel("LTX-Video", "ltx", "LTXV", LTX),
    PeerModel("LTX-2", "ltx2", "LTXAV", LTX2),
    PeerModel("HunyuanVideo", "hunyuan-video", "HunyuanVideo", HUNYUAN),
    PeerModel("HunyuanVideo 1.5", "hunyuan-video-1.5", "HunyuanVideo15", HUNYUAN15),
    PeerModel("HunyuanImage 2.1", "hunyuan-image", "HunyuanImage21", {**HUNYUAN, "byt5": True, "vec_in_dim": None,
              "patch_size": [2, 2], "axes_dim": [16, 16]}),
    PeerModel("Cosmos 1", "cosmos1", "CosmosT2V", COSMOS1),
    PeerModel("Cosmos 2", "cosmos", "CosmosT2IPredict2", PREDICT2),
    PeerModel("Anima", "anima", "Anima", {**PREDICT2, "image_model": "anima", "crossattn_emb_channels": 1024}),
    PeerModel("Lumina 2", "lumina2", "Lumina2", LUMINA),
    PeerModel("Z-Image", "z-image", "ZImage", Z_IMAGE, (*DIFFUSERS, "lycoris")),
    PeerModel("Wan 2.1 T2V", "wan", "WAN21_T2V", WAN),
    PeerModel("Wan 2.1 I2V", "wan", "WAN21_I2V", {**WAN, "model_type": "i2v", "in_dim": 36}),
    PeerModel("Wan 2.1 VACE", "wan", "WAN21_Vace", {**WAN, "model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}),
    PeerModel("Wan 2.2 Animate", "wan", "WAN22_Animate", {**WAN, "model_type": "animate", "in_dim": 36}),
    PeerModel("HiDream", "hidream", "HiDream", HIDREAM),
    PeerModel("Qwen-Image", "qwen-image", "QwenImage", QWEN, (*DIFFUSERS, "lycoris")),
    PeerModel("Kandinsky 5", "kandinsky5", "Kandinsky5", KANDINSKY),
)  # fmt: skip


@dataclass(frozen=True)
class Encoders:
    """The text encoders of a family: ComfyUI's name -> its module and class."""

    family: str
    encoders: Mapping[str, str]
    spellings: tuple[str, ...] = ("original",)
    without: str = r"embed|\btext_projection\b|\bvisual\b|multi_modal"
    """A pattern for the modules that are left out: those that diffusers' encoders of the family do not have, and vision
    towers, which ComfyUI builds at their full size alone."""


CLIP, T5 = "comfy.clip_model:CLIPTextModel", "comfy.text_encoders.t5:T5"
LLAMA = "comfy.text_encoders.llama"
ALL_NAMES = ("kohya", "original", "diffusers")
ENCODERS: tuple[Encoders, ...] = (
    Encoders("sd15", {"clip_l": CLIP}, ALL_NAMES),
    Encoders("sd2", {"clip_h": CLIP}, ALL_NAMES),
    Encoders("sdxl", {"clip_l": CLIP, "clip_g": CLIP}, ALL_NAMES, "embed"),
    Encoders("sdxl-refiner", {"clip_g": CLIP}, NAMES),
    Encoders("cascade", {"clip_g": CLIP}, NAMES),
    Encoders("sd3", {"clip_l": CLIP, "clip_g": CLIP, "t5xxl": T5}, NAMES, "embed"),
    Encoders("flux1", {"clip_l": CLIP, "t5xxl": T5}, (*NAMES, "onetrainer")),
    Encoders("pixart", {"t5xxl": T5}, NAMES),
    Encoders("auraflow", {"pile_t5xl": T5}),
    Encoders("chroma", {"t5xxl": T5}, NAMES),
    Encoders("mochi", {"t5xxl": T5}, NAMES),
    Encoders("ltx", {"t5xxl": T5}, NAMES),
    Encoders("wan", {"umt5xxl": T5}),
    Encoders("hunyuan-video", {"llama": f"{LLAMA}:Llama2", "clip_l": CLIP}),
    Encoders("hunyuan-image", {"qwen25_7b": f"{LLAMA}:Qwen25_7BVLI", "byt5_small": T5}),
    Encoders("hidream", {"clip_l": CLIP, "clip_g": CLIP, "t5xxl": T5, "llama": f"{LLAMA}:Llama2"}),
    Encoders("kandinsky5", {"qwen25_7b": f"{LLAMA}:Qwen25_7BVLI", "clip_l": CLIP}),
    Encoders("lumina2", {"gemma2_2b": f"{LLAMA}:Gemma2_2B"}),
    Encoders("z-image", {"qwen3_4b": f"{LLAMA}:Qwen3_4B"}),
    Encoders("flux2", {"mistral3_24b": f"{LLAMA}:Mistral3Small24B"}),
    Encoders("qwen-image", {"qwen25_7b": f"{LLAMA}:Qwen25_7BVLI"}),
    Encoders("anima", {"qwen3_06b": f"{LLAMA}:Qwen3_06B"}),
    Encoders("ltx2", {"gemma3_12b": f"{LLAMA}:Gemma3_12B"}),
)
ENCODER_SIZES: Mapping[str, Mapping[str, Any]] = {
    CLIP: {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "max_position_embeddings": 16,
        "projection_dim": 32,
        "vocab_size": 64,
        "eos_token_id": 1,
    },
    T5: {
        "d_model": 64,
        "d_ff": 96,
        "d_kv": 32,
        "num_heads": 2,
        "num_layers": 2,
        "vocab_size": 64,
        "dense_act_fn": "gelu_pytorch_tanh",
        "is_gated_act": True,
        "model_type": "t5",
    },
}
LLAMA_SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FLUX_PARAMS = {k: v for k, v in FLUX.items() if k not in ("image_model", "out_channels", "patch_size", "txt_ids_dims")}
SD3_PARAMS = {
    "input_size": None,
    "pos_embed_scaling_factor": None,
    "patch_size": 2,
    "in_channels": 16,
    "depth": 2,
    "num_patches": 64,
    "pos_embed_max_size": 8,
    "adm_in_channels": 32,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [0],
    "context_embedder_in_features": 32,
    "context_embedder_out_features": 128,
}
SD_SCRIPTS: tuple[tuple[PeerModel, str, str], ...] = (
    (PeerModel("SD 1.5", "sd15", "library.original_unet:UNet2DConditionModel", {"sample_size": 64,
               "attention_head_dim": 8, "cross_attention_dim": 768}, ("kohya",)), "", "networks.lora"),
    (PeerModel("SDXL", "sdxl", "library.sdxl_original_unet:SdxlUNet2DConditionModel", {}, ("kohya",)),
     "", "networks.lora"),
    (PeerModel("Flux.1", "flux1", "library.flux_models:Flux", FLUX_PARAMS, ("kohya",)),
     "library.flux_models:FluxParams", "networks.lora_flux"),
    (PeerModel("SD 3.5", "sd3", "library.sd3_models:MMDiT", SD3_PARAMS, ("kohya",)),
     "", "networks.lora_sd3"),
)  # fmt: skip
"""Model, the class that its arguments go into, and the module of its network."""
