"""Stable Cascade and its forerunner Würstchen: stage C is the prior, stage B the decoder."""

from .family import Family, Shape
from .headers import model_spec
from .rules import Names
from .text_encoders import CLIP

# The checkpoint's attention is fused; ComfyUI has the parts, and LoRAs are named so.
CHECKPOINT_ATTENTION = """
[down_blocks.{i}.{j}.attention ; up_blocks.{i}.{j}.attention]
  attn.in_proj -> to_q | to_k | to_v
"""

OMI_ATTENTION = """
[down_blocks.{i}.{j}.attention ; up_blocks.{i}.{j}.attention]
  attn.in_proj.0 -> to_q ; attn.in_proj.1 -> to_k ; attn.in_proj.2 -> to_v
"""

STAGE_C = Names(
    """
[down_blocks.{i}.{j}.attention ; up_blocks.{i}.{j}.attention]
  attn.to_q -> to_q ; attn.to_k -> to_k ; attn.to_v -> to_v ; attn.out_proj -> to_out.0
""",
    same="""
clip_txt_pooled_mapper ; clip_txt_mapper ; clip_img_mapper ; embedding.1 ; down_downscalers.{i}.1.blocks.{j}
up_upscalers.{i}.1.blocks.{j} ; clf.1
[down_blocks.{i}.{j} ; up_blocks.{i}.{j}]
  depthwise ; channelwise.0 ; channelwise.2.gamma (p) ; channelwise.2.beta (p) ; channelwise.4 ; mapper ; mapper_sca
  mapper_crp ; kv_mapper.1
""",
    trainer=CHECKPOINT_ATTENTION,
    omi=OMI_ATTENTION,
)

STAGE_B = Names(
    """
clip_mapper -> clip_txt_pooled_mapper
[down_blocks.{i}.{j}.attention ; up_blocks.{i}.{j}.attention]
  attn.to_q -> to_q ; attn.to_k -> to_k ; attn.to_v -> to_v ; attn.out_proj -> to_out.0
""",
    same="""
effnet_mapper.0 ; effnet_mapper.2 ; pixels_mapper.0 ; pixels_mapper.2 ; embedding.1 ; up_repeat_mappers.{i}.{j}
clf.1
[down_blocks.{i}.{j} ; up_blocks.{i}.{j}]
  depthwise ; channelwise.0 ; channelwise.2.gamma (p) ; channelwise.2.beta (p) ; channelwise.4 ; mapper ; mapper_sca
  kv_mapper.1
[down_downscalers.{i} ; up_upscalers.{i}]
  1
""",
    trainer=CHECKPOINT_ATTENTION,
)

CASCADE = Family(
    name="cascade",
    components={"prior": STAGE_C, "decoder": STAGE_B, "text_encoder": CLIP},
    model_classes=("StableCascadeUNet",),
    shapes=(
        Shape("prior", "down_blocks.{i}.{j}.attention.to_q", (2048, 2048)),
        Shape("prior", "up_blocks.{i}.{j}.attention.to_q", (2048, 2048)),
        Shape("prior", "down_blocks.{i}.{j}.channelwise.0", (8192, 2048)),
        Shape("decoder", "down_blocks.{i}.{j}.attention.to_q", (1280, 1280)),
    ),
    encoders={"text_encoder": "clip_g"},
    headers={"onetrainer": model_spec("stable-cascade-v1-prior")},
)

WUERSTCHEN_PRIOR = Names(
    """
[blocks.{i}.attention]
  attn.in_proj -> to_q | to_k | to_v ; attn.out_proj -> to_out.0
""",
    same="""
projection ; cond_mapper.0 ; cond_mapper.2 ; out.1
[blocks.{i}]
  depthwise ; channelwise.0 ; channelwise.2.gamma (p) ; channelwise.2.beta (p) ; channelwise.4 ; mapper ; kv_mapper.1
""",
)
WUERSTCHEN_DECODER = Names(
    """
[down_blocks.{i}.{j}.attention ; up_blocks.{i}.{j}.attention]
  attn.in_proj -> to_q | to_k | to_v ; attn.out_proj -> to_out.0
""",
    same="""
clip_mapper ; embedding.1 ; clf.1 ; effnet_mappers.{i}
[down_blocks.{i}.{j} ; up_blocks.{i}.{j}]
  depthwise ; channelwise.0 ; channelwise.2.gamma (p) ; channelwise.2.beta (p) ; channelwise.4 ; mapper ; kv_mapper.1
  1
""",
)
WUERSTCHEN = Family(
    name="wuerstchen",
    components={"prior": WUERSTCHEN_PRIOR, "decoder": WUERSTCHEN_DECODER, "text_encoder": CLIP},
    model_classes=("WuerstchenPrior", "WuerstchenDiffNeXt"),
    shapes=(Shape("prior", "blocks.{i}.attention.to_q", (1536, 1536)),),
    headers={"onetrainer": model_spec("wuerstchen-v2-prior")},
)
