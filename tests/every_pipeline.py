"""A tiny pipeline for each LoRA mixin of diffusers, made of configurations alone: what to build, and how to call it.

Where a pipeline takes embeddings of a prompt it has no text encoder, and latents are drawn, so that it has no
autoencoder beyond its configuration. Modular pipelines, and those whose encoders are large in any form, hold
their real denoiser, and `run` calls it alone. Sizes are those of diffusers' own tests, or smaller.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers as released
import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from tiny_models import WordTokenizer, clip, pipeline, render
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.mixins.components import components_of

diffusers: Any = released  # its classes are only partly typed
Settings = dict[str, Any]
RANK = 2
"""Of the files that `made` makes."""


class Vae(nn.Module):
    """Stands where an autoencoder would that is never run: its configuration, under every name that is asked for."""

    dtype = torch.float32
    device = torch.device("cpu")
    latents_mean, latents_std = torch.zeros(4), torch.ones(4)
    temperal_downsample = (True,)
    spatial_compression_ratio = 8
    temporal_compression_ratio = 4
    mel_compression_ratio = 4

    def __init__(self, **config: Any) -> None:
        super().__init__()
        common: Settings = {
            "latent_channels": 4,
            "z_dim": 16,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
            "block_out_channels": (4, 4, 4, 4),
            "encoder_block_out_channels": (4, 4, 4, 4),
            "scaling_factor_spatial": 8,
            "scaling_factor_temporal": 4,
            "scale_factor_spatial": 8,
            "scale_factor_temporal": 4,
            "temporal_compression_ratio": 4,
            "invert_scale_latents": False,
            "latents_mean": [0.0] * 16,
            "latents_std": [1.0] * 16,
            "sample_rate": 16000,
            "mel_hop_length": 160,
        }
        self.config = SimpleNamespace(**{**common, **config})


def noise(*shape: int, seed: int = 3) -> Tensor:
    """Always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flow() -> Any:
    """The scheduler of most."""
    return diffusers.FlowMatchEulerDiscreteScheduler()


class Made(NamedTuple):
    """An argument that another model of the pipeline makes of these."""

    by: str
    arguments: Settings


@dataclass(frozen=True)
class Case:
    """One mixin's pipeline.

    Attributes:
        pipeline: class name.
        models: component -> class name and configuration.
        call: arguments of the pipeline, or, for what is denoised alone, of the first of the models.
        parts: further components; None stands for all that are not given.
        alone: whether the denoiser is called instead of the pipeline.
        attributes: of the pipeline, where its pictures would be large otherwise.
    """

    pipeline: str
    models: dict[str, tuple[str, Settings]]
    call: Callable[[], Settings]
    parts: Callable[[], Settings] = field(default=lambda: {"scheduler": flow(), "vae": Vae()})
    alone: bool = False
    attributes: Settings = field(default_factory=dict[str, Any])


def class_named(name: str) -> Any:
    """A class of diffusers."""
    return LTX2TextConnectors if name == "LTX2TextConnectors" else getattr(diffusers, name)


def _awake(model: nn.Module) -> nn.Module:
    """Layers that begin as zeros would hide whatever is before them."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def build(mixin: str) -> Any:
    """A mixin's pipeline, always the same."""
    torch.manual_seed(0)
    if mixin in READY:
        return READY[mixin]()
    case = CASES[mixin]
    models = {name: _awake(class_named(cls)(**settings)) for name, (cls, settings) in case.models.items()}
    cls = class_named(case.pipeline)
    if issubclass(cls, diffusers.ModularPipeline):
        pipe = getattr(diffusers, cls.default_blocks_name)().init_pipeline()
        pipe.update_components(**models)
        return pipe
    takes = {name: p for name, p in inspect.signature(cls.__init__).parameters.items() if name != "self"}
    given = {name: None if p.default is p.empty else p.default for name, p in takes.items()}
    pipe = cls(**{**given, **{name: part for name, part in case.parts().items() if name in takes}, **models})
    for name, value in case.attributes.items():
        setattr(pipe, name, value)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(mixin: str, pipe: Any) -> Tensor:
    """What the pipeline, or its denoiser, makes of the same noise each time."""
    if mixin in READY:
        return render(pipe) if mixin != "AmusedLoraLoaderMixin" else run_amused(pipe)
    case = CASES[mixin]
    with torch.no_grad():
        if not case.alone:
            made = pipe(**case.call(), generator=torch.Generator().manual_seed(7), return_dict=False)
        else:
            given = {
                key: getattr(pipe, value.by)(**value.arguments) if isinstance(value, Made) else value
                for key, value in case.call().items()
            }
            made = getattr(pipe, next(iter(case.models)))(**given, return_dict=False)
    while isinstance(made, (list, tuple)):
        made = made[0]
    return made


def linears(pipe: Any) -> dict[str, dict[str, nn.Linear]]:
    """Component -> path -> layers to adapt: all linear ones in lists of blocks."""
    return {
        component: {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and any(part.isdigit() for part in path.split("."))
        }
        for component, model in components_of(pipe).items()
    }


def made(pipe: Any, seed: int) -> dict[str, Tensor]:
    """A file for these layers in diffusers' names."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for component, modules in linears(pipe).items():
        for path, module in modules.items():
            stem = f"{component}.{path}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, module.in_features, generator=generator) * 0.2
            tensors[f"{stem}.lora_B.weight"] = torch.randn(module.out_features, RANK, generator=generator) * 0.2
    return tensors


def size(pixels: int = 32, **more: Any) -> Settings:
    """Arguments that nearly all take."""
    return {"height": pixels, "width": pixels, "num_inference_steps": 2, "output_type": "latent", **more}


def wan(**more: Any) -> Settings:
    """Wan's transformer, of which there are descendants."""
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 1,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
        **more,
    }


COSMOS: Settings = {
    "in_channels": 17,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "mlp_ratio": 2,
    "text_embed_dim": 32,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.0),
    "concat_padding_mask": False,
    "extra_pos_embed_type": "learnable",
}

CASES: dict[str, Case] = {
    "SD3LoraLoaderMixin": Case(
        "StableDiffusion3Pipeline",
        {
            "transformer": (
                "SD3Transformer2DModel",
                {
                    "sample_size": 32,
                    "patch_size": 1,
                    "in_channels": 4,
                    "num_layers": 1,
                    "attention_head_dim": 8,
                    "num_attention_heads": 4,
                    "caption_projection_dim": 32,
                    "joint_attention_dim": 32,
                    "pooled_projection_dim": 64,
                    "out_channels": 4,
                },
            )
        },
        lambda: size(guidance_scale=1.0, prompt_embeds=noise(1, 6, 32), pooled_prompt_embeds=noise(1, 64)),
    ),
    "AuraFlowLoraLoaderMixin": Case(
        "AuraFlowPipeline",
        {
            "transformer": (
                "AuraFlowTransformer2DModel",
                {
                    "sample_size": 64,
                    "patch_size": 1,
                    "in_channels": 4,
                    "num_mmdit_layers": 1,
                    "num_single_dit_layers": 1,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "joint_attention_dim": 32,
                    "caption_projection_dim": 32,
                    "pos_embed_max_size": 64,
                },
            )
        },
        lambda: size(guidance_scale=0.0, prompt_embeds=noise(1, 6, 32), prompt_attention_mask=torch.ones(1, 6)),
    ),
    "CogVideoXLoraLoaderMixin": Case(
        "CogVideoXPipeline",
        {
            "transformer": (
                "CogVideoXTransformer3DModel",
                {
                    "num_attention_heads": 4,
                    "attention_head_dim": 8,
                    "in_channels": 4,
                    "out_channels": 4,
                    "time_embed_dim": 2,
                    "text_embed_dim": 32,
                    "num_layers": 1,
                    "sample_width": 4,
                    "sample_height": 4,
                    "sample_frames": 5,
                    "patch_size": 2,
                    "temporal_compression_ratio": 4,
                    "max_text_seq_length": 6,
                },
            )
        },
        lambda: size(guidance_scale=1.0, num_frames=5, prompt_embeds=noise(1, 6, 32)),
        lambda: {"scheduler": diffusers.CogVideoXDDIMScheduler(), "vae": Vae()},
    ),
    "Mochi1LoraLoaderMixin": Case(
        "MochiPipeline",
        {
            "transformer": (
                "MochiTransformer3DModel",
                {
                    "patch_size": 2,
                    "num_attention_heads": 2,
                    "attention_head_dim": 8,
                    "num_layers": 2,
                    "pooled_projection_dim": 16,
                    "in_channels": 12,
                    "out_channels": None,
                    "qk_norm": "rms_norm",
                    "text_embed_dim": 32,
                    "time_embed_dim": 4,
                    "activation_fn": "swiglu",
                    "max_sequence_length": 16,
                },
            )
        },
        lambda: size(
            guidance_scale=1.0,
            num_frames=7,
            prompt_embeds=noise(1, 16, 32),
            prompt_attention_mask=torch.ones(1, 16, dtype=torch.bool),
        ),
    ),
    "LTXVideoLoraLoaderMixin": Case(
        "LTXPipeline",
        {
            "transformer": (
                "LTXVideoTransformer3DModel",
                {
                    "in_channels": 8,
                    "out_channels": 8,
                    "patch_size": 1,
                    "patch_size_t": 1,
                    "num_attention_heads": 4,
                    "attention_head_dim": 8,
                    "cross_attention_dim": 32,
                    "num_layers": 1,
                    "caption_channels": 32,
                },
            )
        },
        lambda: size(
            guidance_scale=1.0, num_frames=9, prompt_embeds=noise(1, 6, 32), prompt_attention_mask=torch.ones(1, 6)
        ),
    ),
    "SanaLoraLoaderMixin": Case(
        "SanaPipeline",
        {
            "transformer": (
                "SanaTransformer2DModel",
                {
                    "patch_size": 1,
                    "in_channels": 4,
                    "out_channels": 4,
                    "num_layers": 1,
                    "num_attention_heads": 2,
                    "attention_head_dim": 4,
                    "num_cross_attention_heads": 2,
                    "cross_attention_head_dim": 4,
                    "cross_attention_dim": 8,
                    "caption_channels": 8,
                    "sample_size": 32,
                },
            )
        },
        lambda: size(
            guidance_scale=1.0,
            prompt_embeds=noise(1, 6, 8),
            prompt_attention_mask=torch.ones(1, 6),
            use_resolution_binning=False,
        ),
    ),
    "HeliosLoraLoaderMixin": Case(
        "HeliosPipeline",
        {
            "transformer": (
                "HeliosTransformer3DModel",
                {
                    **{key: value for key, value in wan().items() if key != "rope_max_seq_len"},
                    "rope_dim": (4, 4, 4),
                    "has_multi_term_memory_patch": True,
                    "guidance_cross_attn": True,
                    "zero_history_timestep": True,
                    "is_amplify_history": False,
                },
            )
        },
        lambda: {
            "hidden_states": noise(1, 16, 2, 4, 4),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": noise(1, 6, 32),
        },
        alone=True,
    ),
    "HunyuanVideoLoraLoaderMixin": Case(
        "HunyuanVideoPipeline",
        {
            "transformer": (
                "HunyuanVideoTransformer3DModel",
                {
                    "in_channels": 4,
                    "out_channels": 4,
                    "num_attention_heads": 2,
                    "attention_head_dim": 10,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "num_refiner_layers": 1,
                    "patch_size": 1,
                    "patch_size_t": 1,
                    "guidance_embeds": True,
                    "text_embed_dim": 16,
                    "pooled_projection_dim": 8,
                    "rope_axes_dim": (2, 4, 4),
                },
            )
        },
        lambda: size(
            num_frames=5,
            prompt_embeds=noise(1, 6, 16),
            pooled_prompt_embeds=noise(1, 8),
            prompt_attention_mask=torch.ones(1, 6),
        ),
    ),
    "Lumina2LoraLoaderMixin": Case(
        "Lumina2Pipeline",
        {
            "transformer": (
                "Lumina2Transformer2DModel",
                {
                    "sample_size": 4,
                    "patch_size": 2,
                    "in_channels": 4,
                    "hidden_size": 8,
                    "num_layers": 2,
                    "num_attention_heads": 1,
                    "num_kv_heads": 1,
                    "multiple_of": 16,
                    "ffn_dim_multiplier": None,
                    "norm_eps": 1e-5,
                    "scaling_factor": 1.0,
                    "axes_dim_rope": [4, 2, 2],
                    "cap_feat_dim": 8,
                },
            )
        },
        lambda: size(
            guidance_scale=1.0, prompt_embeds=noise(1, 6, 8), prompt_attention_mask=torch.ones(1, 6, dtype=torch.bool)
        ),
    ),
    "KandinskyLoraLoaderMixin": Case(
        "Kandinsky5T2IPipeline",
        {
            "transformer": (
                "Kandinsky5Transformer3DModel",
                {
                    "in_visual_dim": 16,
                    "in_text_dim": 16,
                    "in_text_dim2": 16,
                    "time_dim": 16,
                    "out_visual_dim": 16,
                    "patch_size": (1, 2, 2),
                    "model_dim": 16,
                    "ff_dim": 32,
                    "num_text_blocks": 1,
                    "num_visual_blocks": 2,
                    "axes_dims": (1, 1, 2),
                    "visual_cond": False,
                    "attention_type": "regular",
                },
            )
        },
        lambda: size(
            guidance_scale=1.0,
            prompt_embeds_qwen=noise(1, 6, 16),
            prompt_embeds_clip=noise(1, 16),
            prompt_cu_seqlens=torch.tensor([0, 6], dtype=torch.int32),
        ),
        attributes={"resolutions": [(32, 32)]},
    ),
    "WanLoraLoaderMixin": Case(
        "WanPipeline",
        {"transformer": ("WanTransformer3DModel", wan()), "transformer_2": ("WanTransformer3DModel", wan())},
        lambda: size(guidance_scale=1.0, num_frames=5, prompt_embeds=noise(1, 6, 32)),
        lambda: {"scheduler": flow(), "vae": Vae(), "boundary_ratio": 0.875},
    ),
    "SkyReelsV2LoraLoaderMixin": Case(
        "SkyReelsV2Pipeline",
        {"transformer": ("SkyReelsV2Transformer3DModel", wan())},
        lambda: size(guidance_scale=1.0, num_frames=5, prompt_embeds=noise(1, 6, 32)),
    ),
    "CogView4LoraLoaderMixin": Case(
        "CogView4Pipeline",
        {
            "transformer": (
                "CogView4Transformer2DModel",
                {
                    "patch_size": 2,
                    "in_channels": 4,
                    "num_layers": 1,
                    "attention_head_dim": 4,
                    "num_attention_heads": 4,
                    "out_channels": 4,
                    "text_embed_dim": 32,
                    "time_embed_dim": 8,
                    "condition_dim": 4,
                },
            )
        },
        lambda: size(guidance_scale=1.0, prompt_embeds=noise(1, 16, 32)),
    ),
    "HiDreamImageLoraLoaderMixin": Case(
        "HiDreamImagePipeline",
        {
            "transformer": (
                "HiDreamImageTransformer2DModel",
                {
                    "patch_size": 2,
                    "in_channels": 4,
                    "out_channels": 4,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "attention_head_dim": 8,
                    "num_attention_heads": 4,
                    "caption_channels": [32, 16],
                    "text_emb_dim": 64,
                    "num_routed_experts": 4,
                    "num_activated_experts": 2,
                    "axes_dims_rope": (4, 2, 2),
                    "max_resolution": (32, 32),
                    "llama_layers": (0, 1),
                },
            )
        },
        lambda: size(
            guidance_scale=1.0,
            prompt_embeds_t5=noise(1, 6, 32),
            prompt_embeds_llama3=noise(2, 1, 6, 16),
            pooled_prompt_embeds=noise(1, 64),
        ),
        attributes={"default_sample_size": 4},
    ),
    "Krea2LoraLoaderMixin": Case(
        "Krea2Pipeline",
        {
            "transformer": (
                "Krea2Transformer2DModel",
                {
                    "in_channels": 16,
                    "num_layers": 1,
                    "attention_head_dim": 8,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "intermediate_size": 32,
                    "timestep_embed_dim": 8,
                    "text_hidden_dim": 16,
                    "num_text_layers": 3,
                    "text_num_attention_heads": 2,
                    "text_num_key_value_heads": 1,
                    "text_intermediate_size": 16,
                    "num_layerwise_text_blocks": 1,
                    "num_refiner_text_blocks": 1,
                    "axes_dims_rope": (4, 2, 2),
                    "rope_theta": 1000.0,
                },
            )
        },
        lambda: size(
            guidance_scale=0.0,
            prompt_embeds=noise(1, 6, 3, 16),
            prompt_embeds_mask=torch.ones(1, 6, dtype=torch.bool),
        ),
        lambda: {"scheduler": flow(), "vae": Vae(), "text_encoder_select_layers": (0, 1, 2)},
    ),
    "ZImageLoraLoaderMixin": Case(
        "ZImagePipeline",
        {
            "transformer": (
                "ZImageTransformer2DModel",
                {
                    "all_patch_size": (2,),
                    "all_f_patch_size": (1,),
                    "in_channels": 16,
                    "dim": 32,
                    "n_layers": 1,
                    "n_refiner_layers": 1,
                    "n_heads": 2,
                    "n_kv_heads": 2,
                    "norm_eps": 1e-5,
                    "qk_norm": True,
                    "cap_feat_dim": 16,
                    "rope_theta": 256.0,
                    "t_scale": 1000.0,
                    "axes_dims": [8, 4, 4],
                    "axes_lens": [256, 32, 32],
                },
            )
        },
        lambda: size(guidance_scale=0.0, prompt_embeds=[noise(6, 16)]),
    ),
    "Flux2LoraLoaderMixin": Case(
        "Flux2Pipeline",
        {
            "transformer": (
                "Flux2Transformer2DModel",
                {
                    "patch_size": 1,
                    "in_channels": 16,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "joint_attention_dim": 16,
                    "timestep_guidance_channels": 32,
                    "axes_dims_rope": [4, 4, 4, 4],
                },
            )
        },
        lambda: size(prompt_embeds=noise(1, 6, 16)),
    ),
    "BriaFibo2LoraLoaderMixin": Case(
        "BriaFibo2Pipeline",
        {
            "transformer": (
                "BriaFibo2Transformer2DModel",
                {
                    "in_channels": 4,
                    "patch_size": 2,
                    "dim": 32,
                    "n_layers": 2,
                    "n_refiner_layers": 1,
                    "n_heads": 2,
                    "cap_feat_dim": 16,
                    "injection_layer_ids": (1,),
                    "perceiver_num_layers": 1,
                    "min_num_gist_tokens": 2,
                    "max_num_gist_tokens": 4,
                    "gist_step": 1,
                    "gist_min_text_len": 2,
                    "gist_max_text_len": 16,
                    "axes_dims": (8, 4, 4),
                    "axes_lens": (256, 32, 32),
                },
            )
        },
        lambda: {
            "hidden_states": noise(1, 4, 8, 8),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": noise(1, 2, 6, 16),
        },
        alone=True,
    ),
    "Ideogram4LoraLoaderMixin": Case(
        "Ideogram4Pipeline",
        {
            "transformer": (
                "Ideogram4Transformer2DModel",
                {
                    "in_channels": 16,
                    "num_layers": 1,
                    "attention_head_dim": 8,
                    "num_attention_heads": 4,
                    "intermediate_size": 32,
                    "adaln_dim": 16,
                    "llm_features_dim": 24,
                    "rope_theta": 10_000,
                    "mrope_section": (2, 1, 1),
                    "norm_eps": 1e-5,
                },
            )
        },
        lambda: {
            "hidden_states": noise(1, 10, 16),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": noise(1, 10, 24),
            "position_ids": torch.arange(10).view(1, 10, 1).expand(1, 10, 3),
            "segment_ids": torch.ones(1, 10, dtype=torch.long),
            "indicator": torch.tensor([[3] * 6 + [2] * 4]),
        },
        alone=True,
    ),
    "ErnieImageLoraLoaderMixin": Case(
        "ErnieImagePipeline",
        {
            "transformer": (
                "ErnieImageTransformer2DModel",
                {
                    "hidden_size": 16,
                    "num_attention_heads": 1,
                    "num_layers": 1,
                    "ffn_hidden_size": 16,
                    "in_channels": 16,
                    "out_channels": 16,
                    "patch_size": 1,
                    "text_in_dim": 16,
                    "rope_theta": 256,
                    "rope_axes_dim": (8, 4, 4),
                    "eps": 1e-6,
                    "qk_layernorm": True,
                },
            )
        },
        lambda: size(guidance_scale=1.0, prompt_embeds=[noise(6, 16)], use_pe=False),
    ),
    "CosmosLoraLoaderMixin": Case(
        "Cosmos2_5_PredictBasePipeline",
        {"transformer": ("CosmosTransformer3DModel", COSMOS)},
        lambda: {
            "hidden_states": noise(1, 16, 1, 4, 4),
            "condition_mask": torch.ones(1, 1, 1, 4, 4),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": noise(1, 6, 32),
        },
        lambda: {"scheduler": flow(), "vae": Vae(), "safety_checker": nn.Identity()},
        alone=True,
    ),
    "AnimaLoraLoaderMixin": Case(
        "AnimaModularPipeline",
        {
            "transformer": ("CosmosTransformer3DModel", {**COSMOS, "in_channels": 16, "extra_pos_embed_type": None}),
            "text_conditioner": (
                "AnimaTextConditioner",
                {
                    "source_dim": 16,
                    "target_dim": 32,
                    "model_dim": 32,
                    "num_layers": 1,
                    "num_attention_heads": 4,
                    "target_vocab_size": 32,
                    "min_sequence_length": 8,
                },
            ),
        },
        lambda: {
            "hidden_states": noise(1, 16, 1, 4, 4),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": Made(
                "text_conditioner",
                {
                    "source_hidden_states": noise(1, 5, 16),
                    "target_input_ids": torch.arange(4).view(1, 4),
                    "source_attention_mask": torch.ones(1, 5),
                    "target_attention_mask": torch.ones(1, 4),
                },
            ),
        },
        alone=True,
    ),
    "Flux3LoraLoaderMixin": Case(
        "Flux3ModularPipeline",
        {
            "transformer": (
                "Flux3Transformer2DModel",
                {
                    "in_channels": 8,
                    "cond_in_channels": 8,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "joint_attention_dim": 16,
                    "timestep_channels": 32,
                    "axes_dims_rope": (4, 4, 4, 4),
                },
            )
        },
        lambda: {
            "hidden_states": noise(1, 4, 8),
            "encoder_hidden_states": noise(1, 3, 16),
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(4, 4),
            "txt_ids": torch.zeros(3, 4),
        },
        alone=True,
    ),
    "AceStepLoraLoaderMixin": Case(
        "AceStepPipeline",
        {
            "transformer": (
                "AceStepTransformer1DModel",
                {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "head_dim": 8,
                    "in_channels": 24,
                    "audio_acoustic_hidden_dim": 8,
                    "patch_size": 2,
                    "rope_theta": 10000.0,
                    "sliding_window": 16,
                },
            )
        },
        lambda: {
            "hidden_states": noise(1, 8, 8),
            "timestep": torch.tensor([0.5]),
            "timestep_r": torch.tensor([0.5]),
            "encoder_hidden_states": noise(1, 6, 32),
            "context_latents": noise(1, 8, 16),
        },
        alone=True,
    ),
    "MiniMaxH3LoraLoaderMixin": Case(
        "MiniMaxH3ModularPipeline",
        {
            name: (
                "MiniMaxH3Transformer3DModel",
                {
                    "num_attention_heads": 2,
                    "attention_head_dim": 32,
                    "hidden_size": 24,
                    "num_layers": 1,
                    "num_refiner_layers": 1,
                    "ffn_dim": 32,
                    "in_channels": 4,
                    "audio_in_channels": 4,
                    "text_dim": 16,
                    "freq_dim": 16,
                    "time_embed_hidden_dim": 24,
                    "time_embed_dim": 12,
                    "rope_freq_dim": 4,
                },
            )
            for name in ("transformer", "transformer_ref")
        },
        lambda: {
            "hidden_states": noise(1, 4, 16),
            "audio_hidden_states": noise(1, 2, 4),
            "encoder_hidden_states": noise(1, 3, 16),
            "timestep": torch.tensor([0.5]),
            "timestep_indices": torch.zeros(9, dtype=torch.long),
            "token_tags": torch.tensor([0] * 4 + [1] * 2 + [2] * 3),
            "position_ids": torch.arange(9).view(9, 1).expand(9, 3),
            "video_indices": torch.arange(4),
            "audio_indices": torch.arange(4, 6),
            "text_indices": torch.arange(6, 9),
        },
        alone=True,
    ),
    "RFD4ProteinaLoraLoaderMixin": Case(
        "RFD4ProteinaPipeline",
        {
            "transformer": (
                "RFD4ProteinaTransformer",
                {
                    "nlayers": 1,
                    "token_dim": 16,
                    "nheads": 2,
                    "dim_cond": 16,
                    "pair_repr_dim": 16,
                    "latent_dim": 4,
                    "token_type_emb_dim": 4,
                    "cath_emb_dim": 4,
                    "t_emb_dim": 16,
                    "seq_sep_dim": 8,
                    "tri_mult_c": 8,
                    "feats_seq": ("xt_bb_ca", "xt_local_latents"),
                    "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
                    "feats_pair_repr": ("xt_bb_ca_pair_dists",),
                },
            )
        },
        lambda: {
            "bb_ca": noise(1, 5, 3),
            "local_latents": noise(1, 5, 4),
            "bb_ca_time": torch.tensor([0.5]),
            "local_latents_time": torch.tensor([0.5]),
            "padding_mask": torch.ones(1, 5, dtype=torch.bool),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(1, 5, dtype=torch.bool),
                "supports_local_latent": torch.ones(1, 5, dtype=torch.bool),
            },
        },
        lambda: {"vae": Vae(latent_dim=4)},
        alone=True,
    ),
    "LTX2LoraLoaderMixin": Case(
        "LTX2Pipeline",
        {
            "transformer": (
                "LTX2VideoTransformer3DModel",
                {
                    "in_channels": 4,
                    "out_channels": 4,
                    "patch_size": 1,
                    "patch_size_t": 1,
                    "num_attention_heads": 2,
                    "attention_head_dim": 8,
                    "cross_attention_dim": 16,
                    "audio_in_channels": 4,
                    "audio_out_channels": 4,
                    "audio_num_attention_heads": 2,
                    "audio_attention_head_dim": 4,
                    "audio_cross_attention_dim": 8,
                    "num_layers": 1,
                    "qk_norm": "rms_norm_across_heads",
                    "caption_channels": 32,
                    "rope_double_precision": False,
                    "rope_type": "split",
                },
            ),
            "connectors": (
                "LTX2TextConnectors",
                {
                    "caption_channels": 32,
                    "text_proj_in_factor": 2,
                    "video_connector_num_attention_heads": 4,
                    "video_connector_attention_head_dim": 8,
                    "video_connector_num_layers": 1,
                    "video_connector_num_learnable_registers": None,
                    "audio_connector_num_attention_heads": 4,
                    "audio_connector_attention_head_dim": 8,
                    "audio_connector_num_layers": 1,
                    "audio_connector_num_learnable_registers": None,
                    "connector_rope_base_seq_len": 32,
                    "rope_theta": 10000.0,
                    "rope_double_precision": False,
                    "causal_temporal_positioning": False,
                    "rope_type": "split",
                },
            ),
        },
        lambda: size(
            guidance_scale=1.0,
            num_frames=5,
            prompt_embeds=noise(1, 6, 64),
            prompt_attention_mask=torch.ones(1, 6, dtype=torch.long),
            negative_prompt_embeds=noise(1, 6, 64, seed=4),
            negative_prompt_attention_mask=torch.ones(1, 6, dtype=torch.long),
        ),
        lambda: {
            "scheduler": flow(),
            "vae": Vae(),
            "audio_vae": Vae(latent_channels=1, mel_bins=16),
            "text_encoder": Vae(),
            "vocoder": Vae(),
        },
    ),
}


def amused() -> Any:
    """aMUSEd has a mixin that none of diffusers' pipelines is built on."""

    class Amused(ll.AmusedLoraLoaderMixin, diffusers.AmusedPipeline):
        pass

    torch.manual_seed(0)
    pipe = Amused(
        vqvae=Vae(num_vq_embeddings=32),
        tokenizer=WordTokenizer(),
        text_encoder=clip(projection=True),
        transformer=diffusers.UVit2DModel(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=32,
            cond_embed_dim=32,
            encoder_hidden_size=32,
            block_out_channels=32,
            micro_cond_encode_dim=8,
            micro_cond_embed_dim=40,
            vocab_size=33,
            codebook_size=32,
            in_channels=32,
            block_num_heads=4,
        ).eval(),
        scheduler=diffusers.AmusedScheduler(mask_token_id=32),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_amused(pipe: Any) -> Tensor:
    """Its transformer's scores: what the pipeline draws of them are whole numbers."""
    with torch.no_grad():
        encoded = pipe.text_encoder(torch.arange(2, 10).view(1, 8), return_dict=True, output_hidden_states=True)
        return pipe.transformer(
            torch.arange(16).view(1, 4, 4),
            micro_conds=torch.ones(1, 5),
            pooled_text_emb=encoded.text_embeds,
            encoder_hidden_states=encoded.hidden_states[-2],
        )


def oldest() -> Any:
    """A pipeline over the oldest name."""

    class Oldest(ll.LoraLoaderMixin, diffusers.StableDiffusionPipeline):
        pass

    pipe = Oldest(**pipeline("sd15").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


READY: dict[str, Callable[[], Any]] = {
    "StableDiffusionLoraLoaderMixin": lambda: pipeline("sd15"),
    "StableDiffusionXLLoraLoaderMixin": lambda: pipeline("sdxl"),
    "FluxLoraLoaderMixin": lambda: pipeline("flux1"),
    "QwenImageLoraLoaderMixin": lambda: pipeline("qwen-image"),
    "AmusedLoraLoaderMixin": amused,
    "LoraLoaderMixin": oldest,
}
