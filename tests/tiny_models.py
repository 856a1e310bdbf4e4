"""Tiny pipelines of real diffusers classes, built from configurations alone, and adapters for them.

Each has a handful of blocks of width 32 to 64 and runs a whole call in some ten milliseconds on one core.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import lora_loaders as ll

WIDTH = 32
"""Width of every text encoder and of the conditioning that the denoisers take."""
FAMILIES = ("sd15", "sdxl", "flux1", "qwen-image")
DENOISERS = {"sd15": "unet", "sdxl": "unet", "flux1": "transformer", "flux1-control": "transformer"}
ENCODERS = {"sd15": 1, "sdxl": 2, "flux1": 2, "flux1-control": 2, "qwen-image": 1}
SCALE_ARGUMENTS = {"sd15": "cross_attention_kwargs", "sdxl": "cross_attention_kwargs", "qwen-image": "attention_kwargs"}


class WordTokenizer:
    """Stands where a tokenizer would: a number for each letter, padded to the full length."""

    model_max_length = 8
    added_tokens_encoder: dict[str, int] = {}  # noqa: RUF012

    def tokenize(self, text: str) -> list[str]:
        return list(text)

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        rows = [[ord(letter) % 90 + 1 for letter in t][: self.model_max_length] for t in texts]
        ids = torch.tensor([row + [0] * (self.model_max_length - len(row)) for row in rows])
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))

    def batch_decode(self, ids: Tensor) -> list[str]:
        return [""] * len(ids)


def clip(projection: bool = False) -> nn.Module:
    """A CLIP text encoder with two layers."""
    transformers = pytest.importorskip("transformers", reason="text encoders are transformers' models")
    config = transformers.CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        max_position_embeddings=16,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
    )
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return cls(config).eval()


def t5() -> nn.Module:
    """A T5 encoder with one layer."""
    transformers = pytest.importorskip("transformers", reason="text encoders are transformers' models")
    config = transformers.T5Config(
        d_model=WIDTH, d_ff=64, d_kv=8, num_heads=4, num_layers=1, vocab_size=100, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config).eval()


def qwen2_5_vl() -> nn.Module:
    """Qwen-Image's text encoder with one layer of text and one of vision."""
    transformers = pytest.importorskip("transformers", reason="text encoders are transformers' models")
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]})
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def unet(sdxl: bool = False) -> Any:
    """A UNet with one attention block down, one in the middle and one up."""
    extra = (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
            "use_linear_projection": True,
            "cross_attention_dim": 2 * WIDTH,
        }
        if sdxl
        else {"cross_attention_dim": WIDTH}
    )
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=4,
        **extra,
    ).eval()


def flux(in_channels: int = 16, blocks: int = 1) -> Any:
    """A Flux transformer with as many double as single blocks."""
    return diffusers.FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=16,
        num_layers=blocks,
        num_single_layers=blocks,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()


def qwen_image(blocks: int = 1) -> Any:
    """A Qwen-Image transformer."""
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=blocks,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def vae() -> Any:
    """An autoencoder of one level."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, shift_factor=0.1, sample_size=8
    ).eval()


def qwen_vae() -> Any:
    """Qwen-Image's autoencoder at its smallest."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def pipeline(family: str, seed: int = 0) -> Any:
    """A pipeline of the family's real class."""
    torch.manual_seed(seed)
    words = WordTokenizer()
    if family == "sd15":
        pipe: Any = diffusers.StableDiffusionPipeline(
            vae=vae(),
            text_encoder=clip(),
            tokenizer=words,
            unet=unet(),
            scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    elif family == "sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=clip(),
            text_encoder_2=clip(projection=True),
            tokenizer=words,
            tokenizer_2=WordTokenizer(),
            unet=unet(sdxl=True),
            scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            add_watermarker=False,
        )
    elif family in ("flux1", "flux1-control"):
        cls = diffusers.FluxPipeline if family == "flux1" else diffusers.FluxControlPipeline
        pipe = cls(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=vae(),
            text_encoder=clip(),
            tokenizer=words,
            text_encoder_2=t5(),
            tokenizer_2=WordTokenizer(),
            transformer=flux(),
        )
    elif family == "qwen-image":
        pipe = diffusers.QwenImagePipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=qwen_vae(),
            text_encoder=qwen2_5_vl(),
            tokenizer=None,
            transformer=qwen_image(),
        )
    else:
        raise ValueError(family)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def render(pipe: Any, **options: Any) -> Tensor:
    """The latents of a call, of one step unless `options` say more; the same noise and prompt each time."""
    generator = torch.Generator().manual_seed(7)
    name = type(pipe).__name__
    arguments: dict[str, Any] = {
        "num_inference_steps": 1,
        "generator": generator,
        "output_type": "latent",
        "height": 8,
        "width": 8,
    }
    if name.startswith("QwenImage"):
        prompt = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(1))
        prompt += _spoken(pipe.text_encoder)
        arguments |= {"prompt_embeds": prompt, "prompt_embeds_mask": torch.ones(1, 6, dtype=torch.long)}
    else:
        arguments |= {"prompt": "a cat"}
    if name.startswith("Flux"):
        arguments |= {"max_sequence_length": 8}
    if name.startswith("FluxControl"):
        arguments["control_image"] = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return pipe(**{**arguments, **options}).images


def _spoken(encoder: Any) -> Tensor:
    """The Qwen encoder's own states, so that its adapters show in the picture."""
    with torch.no_grad():
        return encoder(input_ids=torch.arange(2, 8)[None], output_hidden_states=True).hidden_states[-1]


@contextmanager
def patching() -> Iterator[None]:
    """diffusers' classes are patched in the block."""
    ll.patch_diffusers()
    try:
        yield
    finally:
        ll.unpatch_diffusers()


def scale_argument(family: str, scale: float) -> dict[str, Any]:
    """The call's argument that scales the adapters."""
    return {SCALE_ARGUMENTS.get(family, "joint_attention_kwargs"): {"scale": scale}}


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """Denoiser and text encoders by name."""
    names = ("transformer", "unet", "text_encoder", "text_encoder_2")
    return {n: m for n in names if isinstance(m := getattr(pipe, n, None), nn.Module)}


@dataclass(frozen=True)
class Made:
    """A file in the making, beside the ΔW that it says by component and path, in float64."""

    tensors: dict[str, Tensor]
    changes: dict[str, dict[str, Tensor]]


def adapter_file(
    pipe: Any,
    *,
    seed: int = 1,
    rank: int = 4,
    alpha: float | None = 2.0,
    scale: float = 0.3,
    components: Iterable[str] | None = None,
    only: str = r"attn|[Aa]ttention|proj|conv",
    style: str = "diffusers",
) -> Made:
    """Random LoRA factors for a pipeline's Linear and Conv2d modules whose path matches `only`.

    Args:
        pipe: the pipeline, without adapters.
        seed: of the random numbers.
        rank: of every factor pair.
        alpha: of every module; none is written if None.
        scale: deviation of the factors.
        components: which models; all if None.
        only: regular expression that a path must contain.
        style: `diffusers` (`unet.….lora_A.weight`, no alpha) or `kohya` (`lora_unet_…`).
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    changes: dict[str, dict[str, Tensor]] = {}
    present = components_of(pipe)
    for component in components or present:
        for path, module in plain_modules(present[component]):
            if not re.search(only, path):
                continue
            kernel = tuple(module.weight.shape[2:])  # type: ignore[union-attr]
            out, inputs = module.weight.shape[:2]  # type: ignore[union-attr]
            down = torch.randn(rank, inputs, *kernel, generator=generator) * scale
            up = torch.randn(out, rank, *[1] * len(kernel), generator=generator) * scale
            factor = 1.0 if alpha is None else alpha / rank
            if style == "kohya":
                stem = f"{_kohya_prefix(pipe, component)}_{_named(component, path).replace('.', '_')}"
                tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
                if alpha is not None:
                    tensors[f"{stem}.alpha"] = torch.tensor(alpha)
            else:
                stem = f"{component}.{_named(component, path)}"
                tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up * factor}
            change = up.double().flatten(1) @ down.double().flatten(1) * factor
            changes.setdefault(component, {})[path] = change.view(out, inputs, *kernel)
    return Made(tensors, changes)


def _named(component: str, path: str) -> str:
    """The path as files have it: newer transformers' CLIP lacks the `text_model.` that its older files have."""
    is_clip = component.startswith("text_encoder") and re.match(r"(encoder\.layers|embeddings)\.", path)
    return f"text_model.{path}" if (is_clip and "self_attn" in path) or (is_clip and "mlp" in path) else path


def _kohya_prefix(pipe: Any, component: str) -> str:
    if not component.startswith("text_encoder"):
        return "lora_unet"
    if not hasattr(pipe, "text_encoder_2"):
        return "lora_te"
    return {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]


def plain_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The Linear and Conv2d modules of a model that carries no adapter."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def add_changes(pipe: Any, made: Made, weight: float | dict[str, float] = 1.0) -> None:
    """The oracle: put W + weight · ΔW into the plain weights of a pipeline without adapters."""
    with torch.no_grad():
        for component, changes in made.changes.items():
            factor = weight.get(component, 1.0) if isinstance(weight, dict) else weight
            model = components_of(pipe)[component]
            for path, change in changes.items():
                parameter: Any = model.get_submodule(path).weight
                parameter.copy_((parameter.double() + factor * change).to(parameter.dtype))


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every plain tensor of a model, under its plain name."""
    plain = {k.replace("base_layer.", ""): v for k, v in model.state_dict().items() if not _is_adapters(k)}
    return {key: value.clone() for key, value in plain.items()}


def _is_adapters(key: str) -> bool:
    return re.search(r"\.(lora_|hada_|lokr_|oft_|ia3_|diff|set_weight|a1|a2|b1|b2)", key) is not None


def changed_bits(before: dict[str, Tensor], model: nn.Module) -> list[str]:
    """Names of the plain tensors that are not, bit for bit, what they were."""
    after = bits(model)
    assert before.keys() == after.keys()
    return [key for key, value in before.items() if not _same_bits(value, after[key])]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


@dataclass(frozen=True)
class Photograph:
    """Everything about a pipeline that a failed or undone operation must leave as it was."""

    lists: Any
    active: Any
    keys: tuple[tuple[str, ...], ...]
    tensors: tuple[dict[str, Tensor], ...]
    modules: tuple[tuple[int, ...], ...]
    grads: tuple[tuple[bool, ...], ...]
    training: tuple[tuple[bool, ...], ...]
    configs: tuple[str, ...]
    texts: tuple[str, ...]
    hooks: tuple[int, ...]

    def differences(self, other: "Photograph") -> list[str]:
        names = [n for n in self.__dataclass_fields__ if n != "tensors" and getattr(self, n) != getattr(other, n)]
        for one, two in zip(self.tensors, other.tensors, strict=True):
            names += [key for key, value in one.items() if key in two and not _same_bits(value, two[key])]
        return names


def photograph(pipe: Any) -> Photograph:
    models = list(components_of(pipe).values())
    states = [model.state_dict() for model in models]
    ours = isinstance(pipe, ll.LoraPipelineMixin)  # diffusers' own methods of these names want peft
    listed, active = (pipe.get_list_adapters(), pipe.get_active_adapters()) if ours else ({}, [])
    hook_tables = ("_forward_pre_hooks", "_forward_hooks")
    return Photograph(
        lists=listed,
        active=active,
        keys=tuple(tuple(state) for state in states),
        tensors=tuple({key: value.clone() for key, value in state.items()} for state in states),
        modules=tuple(tuple(id(module) for module in model.modules()) for model in models),
        grads=tuple(tuple(p.requires_grad for p in model.parameters()) for model in models),
        training=tuple(tuple(module.training for module in model.modules()) for model in models),
        configs=tuple(str(getattr(model, "config", "")) for model in models),
        texts=tuple(repr(model) for model in models),
        hooks=tuple(len(getattr(model, table)) for model in models for table in hook_tables),
    )
