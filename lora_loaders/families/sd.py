"""Stable Diffusion 1.5, 2 and XL: UNet names, with the block numbering of the original checkpoints worked out."""

from collections.abc import Iterator, Sequence

from .family import Family, Shape
from .headers import kohya, model_spec
from .rules import Names, Rule, parse_rows
from .text_encoders import CLIP

RESNET = """
  in_layers.0 -> norm1 ; in_layers.2 -> conv1 ; emb_layers.1 -> time_emb_proj
  out_layers.0 -> norm2 ; out_layers.3 -> conv2 ; skip_connection -> conv_shortcut
"""

# The same on both sides inside an attention block.
TRANSFORMER = """
  norm ; proj_in ; proj_out
"""
BLOCK = """
  attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0 ; attn2.to_q ; attn2.to_k ; attn2.to_v ; attn2.to_out.0
  ff.net.0.proj ; ff.net.2 ; norm1 ; norm2 ; norm3
"""

DIFFUSERS = f"""
conv_in ; conv_norm_out ; conv_out ; time_embedding.linear_1 ; time_embedding.linear_2
add_embedding.linear_1 ; add_embedding.linear_2
[down_blocks.{{i}}.attentions.{{j}} ; up_blocks.{{i}}.attentions.{{j}} ; mid_block.attentions.{{j}}]
{TRANSFORMER}
[down_blocks.{{i}}.attentions.{{j}}.transformer_blocks.{{k}} ; mid_block.attentions.{{j}}.transformer_blocks.{{k}}]
[up_blocks.{{i}}.attentions.{{j}}.transformer_blocks.{{k}}]
{BLOCK}
[down_blocks.{{i}}.resnets.{{j}} ; up_blocks.{{i}}.resnets.{{j}} ; mid_block.resnets.{{j}}]
  norm1 ; conv1 ; time_emb_proj ; norm2 ; conv2 ; conv_shortcut
[down_blocks.{{i}}]
  downsamplers.0.conv
[up_blocks.{{i}}]
  upsamplers.0.conv
"""


def original_rows(down_attention: Sequence[bool], layers: int = 2) -> Iterator[Rule]:
    """Rows of a UNet whose level i has attention where `down_attention[i]` says so, with `layers` resnets a level.

    The original numbers its blocks through all levels: input block 0 is `conv_in`, then each level has `layers` blocks
    and, but for the last, a downsampler. Output blocks mirror them with `layers + 1` a level.
    """
    levels = len(down_attention)
    step = layers + 1
    table = [
        "time_embed.0 -> time_embedding.linear_1 ; time_embed.2 -> time_embedding.linear_2",
        "label_emb.0.0 -> add_embedding.linear_1 ; label_emb.0.2 -> add_embedding.linear_2",
        "input_blocks.0.0 -> conv_in ; out.0 -> conv_norm_out ; out.2 -> conv_out",
        "middle_block.1.** -> mid_block.attentions.0.**",
    ]
    resnets = ["middle_block.0 -> mid_block.resnets.0", "middle_block.2 -> mid_block.resnets.1"]
    for i in range(levels):
        up_attention = down_attention[levels - 1 - i]
        for j in range(layers):
            n = step * i + j + 1
            resnets.append(f"input_blocks.{n}.0 -> down_blocks.{i}.resnets.{j}")
            if down_attention[i]:
                table.append(f"input_blocks.{n}.1.** -> down_blocks.{i}.attentions.{j}.**")
        for j in range(step):
            n = step * i + j
            resnets.append(f"output_blocks.{n}.0 -> up_blocks.{i}.resnets.{j}")
            if up_attention:
                table.append(f"output_blocks.{n}.1.** -> up_blocks.{i}.attentions.{j}.**")
        if i < levels - 1:
            table.append(f"input_blocks.{step * (i + 1)}.0.op -> down_blocks.{i}.downsamplers.0.conv")
            slot = 2 if up_attention else 1
            table.append(f"output_blocks.{step * i + layers}.{slot}.conv -> up_blocks.{i}.upsamplers.0.conv")
    yield from parse_rows("\n".join([*table, f"[{' ; '.join(resnets)}]", RESNET]))


# Which levels have attention.
LEVELS15 = (True, True, True, False)
LEVELSXL = (False, True, True)
LEVELS_REFINER = (False, True, True, False)
# The middle block keeps its width, so its resnets need no shortcut.
MIDDLE = "mid_block.resnets.{j}.conv_shortcut"
# One transformer block an attention, in 1.5 and 2: a name with a higher number is SDXL's.
SHALLOW = DIFFUSERS.replace("transformer_blocks.{k}", "transformer_blocks.0")
SD_UNET = Names(same=SHALLOW, extra=original_rows(LEVELS15), absent=("add_embedding.linear_{i}", MIDDLE))
SDXL_UNET = Names(same=DIFFUSERS, extra=original_rows(LEVELSXL), absent=(MIDDLE,))

REFINER_UNET = Names(same=DIFFUSERS, extra=original_rows(LEVELS_REFINER), absent=(MIDDLE,))


def _traversal() -> Iterator[tuple[str, str]]:
    """Linears of 2022's UNet: its transformer blocks held attn1, ff, attn2, and `mid_block` was registered last."""
    down = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)]
    up = [f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)]
    for attention in [*down, *up, "mid_block.attentions.0"]:
        block = f"{attention}.transformer_blocks.0"
        yield from (("CrossAttention", f"{block}.attn1.{name}") for name in ("to_q", "to_k", "to_v", "to_out.0"))
        yield ("GEGLU", f"{block}.ff.net.0.proj")
        yield from (("CrossAttention", f"{block}.attn2.{name}") for name in ("to_q", "to_k", "to_v", "to_out.0"))


def _clip_traversal() -> Iterator[tuple[str, str]]:
    for i in range(12):
        layer = f"text_model.encoder.layers.{i}.self_attn"
        yield from (("CLIPAttention", f"{layer}.{name}") for name in ("k_proj", "v_proj", "q_proj", "out_proj"))


CROSS_K = "down_blocks.{i}.attentions.{j}.transformer_blocks.{k}.attn2.to_k"
UP_CROSS_K = "up_blocks.{i}.attentions.{j}.transformer_blocks.{k}.attn2.to_k"
MID_CROSS_K = "mid_block.attentions.{j}.transformer_blocks.{k}.attn2.to_k"


def _cross_attention(width: int) -> tuple[Shape, ...]:
    return tuple(Shape("unet", path, (None, width)) for path in (CROSS_K, UP_CROSS_K, MID_CROSS_K))


SD15 = Family(
    name="sd15",
    components={"unet": SD_UNET, "text_encoder": CLIP},
    model_classes=("UNet2DConditionModel",),
    shapes=(*_cross_attention(768), Shape("text_encoder", "text_model.encoder.layers.{i}.mlp.fc1", (3072, 768))),
    encoders={"text_encoder": "clip_l"},
    trainer_names="diffusers",
    traversal={"unet": tuple(_traversal()), "text_encoder": tuple(_clip_traversal())},
    headers={"kohya": kohya("lora", "sd_v1", "stable-diffusion-v1"), "onetrainer": model_spec("stable-diffusion-v1")},
)
SD2 = Family(
    name="sd2",
    components={"unet": SD_UNET, "text_encoder": CLIP},
    model_classes=("UNet2DConditionModel",),
    shapes=(*_cross_attention(1024), Shape("text_encoder", "text_model.encoder.layers.{i}.mlp.fc1", (4096, 1024))),
    config_facts={"cross_attention_dim": 1024},
    encoders={"text_encoder": "clip_h"},
    trainer_names="diffusers",
    headers={
        "kohya": {**kohya("lora", "sd_v2"), "ss_v2": "True"},
        "onetrainer": {**model_spec("stable-diffusion-v2"), "ss_v2": "True"},
    },
)
SDXL = Family(
    name="sdxl",
    components={"unet": SDXL_UNET, "text_encoder": CLIP, "text_encoder_2": CLIP},
    model_classes=("UNet2DConditionModel",),
    shapes=(*_cross_attention(2048), Shape("text_encoder_2", "text_model.encoder.layers.{i}.mlp.fc1", (5120, 1280))),
    config_facts={"addition_embed_type": "text_time"},
    encoders={"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    headers={
        "kohya": kohya(
            "lora", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models"
        ),
        "onetrainer": {**model_spec("stable-diffusion-xl-v1-base"), "ss_base_model_version": "sdxl_"},
    },
)
# Its one encoder is the second of the pair, and its pipeline calls it so.
SDXL_REFINER = Family(
    name="sdxl-refiner",
    components={"unet": REFINER_UNET, "text_encoder_2": CLIP},
    model_classes=("UNet2DConditionModel",),
    shapes=(*_cross_attention(1280), Shape("text_encoder_2", "text_model.encoder.layers.{i}.mlp.fc1", (5120, 1280))),
    config_facts={"addition_embed_type": "text_time", "cross_attention_dim": 1280},
    encoders={"text_encoder_2": "clip_g"},
)
