"""Stable Diffusion 3 and 3.5."""

from .family import Family, Shape
from .headers import kohya
from .rules import Names
from .text_encoders import CLIP, T5

TRANSFORMER = Names(
    """
x_embedder.proj -> pos_embed.proj ; context_embedder
t_embedder.mlp.0 -> time_text_embed.timestep_embedder.linear_1
t_embedder.mlp.2 -> time_text_embed.timestep_embedder.linear_2
y_embedder.mlp.0 -> time_text_embed.text_embedder.linear_1
y_embedder.mlp.2 -> time_text_embed.text_embedder.linear_2
final_layer.linear -> proj_out ; final_layer.adaLN_modulation.1 -> norm_out.linear ~
[joint_blocks.{i} -> transformer_blocks.{i}]
  x_block.attn.qkv -> attn.to_q | attn.to_k | attn.to_v
  context_block.attn.qkv -> attn.add_q_proj | attn.add_k_proj | attn.add_v_proj
  x_block.attn2.qkv -> attn2.to_q | attn2.to_k | attn2.to_v
  x_block.attn.proj -> attn.to_out.0 ; context_block.attn.proj -> attn.to_add_out
  x_block.attn2.proj -> attn2.to_out.0
  x_block.mlp.fc1 -> ff.net.0.proj ; x_block.mlp.fc2 -> ff.net.2
  context_block.mlp.fc1 -> ff_context.net.0.proj ; context_block.mlp.fc2 -> ff_context.net.2
  # The last block has no context output, and its context modulation has scale and shift the other way round.
  x_block.adaLN_modulation.1 -> norm1.linear ; context_block.adaLN_modulation.1 -> norm1_context.linear ~last
  x_block.attn.ln_q -> attn.norm_q ; x_block.attn.ln_k -> attn.norm_k
  context_block.attn.ln_q -> attn.norm_added_q ; context_block.attn.ln_k -> attn.norm_added_k
  x_block.attn2.ln_q -> attn2.norm_q ; x_block.attn2.ln_k -> attn2.norm_k
""",
    absent=(
        "transformer_blocks.{i}.attn.norm_q",
        "transformer_blocks.{i}.attn.norm_k",
        "transformer_blocks.{i}.attn.norm_added_q",
        "transformer_blocks.{i}.attn.norm_added_k",
        "transformer_blocks.{i}.attn2.**",
    ),
)

SD3 = Family(
    name="sd3",
    components={"transformer": TRANSFORMER, "text_encoder": CLIP, "text_encoder_2": CLIP, "text_encoder_3": T5},
    model_classes=("SD3Transformer2DModel",),
    depths={"transformer_blocks": (24, 38)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn.to_out.0", (1536, 1536), blocks=24),
        Shape("transformer", "transformer_blocks.{i}.attn.to_out.0", (2432, 2432), blocks=38),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (1536, 1536), blocks=24),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (2432, 2432), blocks=38),
        Shape("transformer", "context_embedder", (None, 4096)),
        Shape("transformer", "proj_out", (64, None)),
        Shape("transformer", "time_text_embed.text_embedder.linear_1", (None, 2048)),
    ),
    encoders={"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    headers={"kohya": kohya("lora_sd3")},
)
