"""Sana, Sana Sprint and Sana Video."""

from .family import Family, Shape
from .headers import model_spec
from .rules import Names
from .text_encoders import LANGUAGE_MODEL

# Sprint alone has guidance and norms of queries and keys.
TRANSFORMER = Names(
    """
x_embedder.proj -> patch_embed.proj ; t_block.1 -> time_embed.linear ; attention_y_norm -> caption_norm
y_embedder.y_proj.fc1 -> caption_projection.linear_1 ; y_embedder.y_proj.fc2 -> caption_projection.linear_2
t_embedder.mlp.0 -> time_embed.emb.timestep_embedder.linear_1
t_embedder.mlp.2 -> time_embed.emb.timestep_embedder.linear_2
final_layer.linear -> proj_out ; final_layer.scale_shift_table -> scale_shift_table (p)
[blocks.{i} -> transformer_blocks.{i}]
  attn.qkv -> attn1.to_q | attn1.to_k | attn1.to_v ; attn.proj -> attn1.to_out.0
  cross_attn.q_linear -> attn2.to_q ; cross_attn.kv_linear -> attn2.to_k | attn2.to_v
  cross_attn.proj -> attn2.to_out.0
  mlp.inverted_conv.conv -> ff.conv_inverted ; mlp.depth_conv.conv -> ff.conv_depth
  mlp.point_conv.conv -> ff.conv_point
  scale_shift_table -> scale_shift_table (p)
""",
    same="""
time_embed.timestep_embedder.linear_1 ; time_embed.timestep_embedder.linear_2
time_embed.guidance_embedder.linear_1 ; time_embed.guidance_embedder.linear_2
[transformer_blocks.{i}]
  attn1.norm_q ; attn1.norm_k ; attn2.norm_q ; attn2.norm_k
""",
    absent=(
        "time_embed.emb.**",
        "time_embed.timestep_embedder.**",
        "time_embed.guidance_embedder.**",
        "transformer_blocks.{i}.attn1.norm_q",
        "transformer_blocks.{i}.attn1.norm_k",
        "transformer_blocks.{i}.attn2.norm_q",
        "transformer_blocks.{i}.attn2.norm_k",
    ),
)

VIDEO_TRANSFORMER = Names(
    same="""
scale_shift_table (p) ; patch_embedding ; time_embed.emb.timestep_embedder.linear_1
time_embed.emb.timestep_embedder.linear_2 ; time_embed.linear ; caption_projection.linear_1
caption_projection.linear_2 ; caption_norm ; proj_out
[transformer_blocks.{i}]
  scale_shift_table (p) ; attn1.norm_q ; attn1.norm_k ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0
  attn2.norm_q ; attn2.norm_k ; attn2.to_q ; attn2.to_k ; attn2.to_v ; attn2.to_out.0 ; ff.conv_inverted
  ff.conv_depth ; ff.conv_point ; ff.conv_temp
""",
)

SANA = Family(
    name="sana",
    components={"transformer": TRANSFORMER, "text_encoder": LANGUAGE_MODEL},
    model_classes=("SanaTransformer2DModel",),
    depths={"transformer_blocks": (20, 28, 60)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn1.to_out.0", (2240, 2240)),
        Shape("transformer", "transformer_blocks.{i}.attn1.to_out.0", (1152, 1152), blocks=28),
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (2240, 2240)),
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (1152, 1152), blocks=28),
        Shape("transformer", "transformer_blocks.{i}.attn2.to_k", (2240, 2240)),
        Shape("transformer", "transformer_blocks.{i}.attn2.to_k", (1152, 1152), blocks=28),
        Shape("transformer", "caption_projection.linear_1", (None, 2304)),
        Shape("transformer", "proj_out", (32, None)),
        Shape("transformer", "time_embed.emb.timestep_embedder.linear_1", (None, 256)),
    ),
    encoders={"text_encoder": "gemma2_2b"},
    headers={"onetrainer": model_spec("sana", "https://github.com/NVlabs/Sana")},
)

SANA_VIDEO = Family(
    name="sana-video",
    components={"transformer": VIDEO_TRANSFORMER, "text_encoder": LANGUAGE_MODEL},
    model_classes=("SanaVideoTransformer3DModel",),
    depths={"transformer_blocks": (20,)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (2240, 2240)),
        Shape("transformer", "transformer_blocks.{i}.attn2.to_k", (2240, 2240)),
        Shape("transformer", "caption_projection.linear_1", (2240, 2304)),
    ),
    encoders={"text_encoder": "gemma2_2b"},
)
