"""AuraFlow."""

from .family import Family, Shape
from .rules import Names
from .text_encoders import T5

TRANSFORMER = Names(
    """
t_embedder.mlp.0 -> time_step_proj.linear_1 ; t_embedder.mlp.2 -> time_step_proj.linear_2
cond_seq_linear -> context_embedder ; init_x_linear -> pos_embed.proj ; final_linear -> proj_out
positional_encoding -> pos_embed.pos_embed (p) ; modF.1 -> norm_out.linear ~
[double_layers.{i} -> joint_transformer_blocks.{i}]
  attn.w2q -> attn.to_q ; attn.w2k -> attn.to_k ; attn.w2v -> attn.to_v ; attn.w2o -> attn.to_out.0
  attn.w1q -> attn.add_q_proj ; attn.w1k -> attn.add_k_proj ; attn.w1v -> attn.add_v_proj
  attn.w1o -> attn.to_add_out ; modX.1 -> norm1.linear ; modC.1 -> norm1_context.linear
  mlpX.c_fc1 -> ff.linear_1 ; mlpX.c_fc2 -> ff.linear_2 ; mlpX.c_proj -> ff.out_projection
  mlpC.c_fc1 -> ff_context.linear_1 ; mlpC.c_fc2 -> ff_context.linear_2 ; mlpC.c_proj -> ff_context.out_projection
[single_layers.{i} -> single_transformer_blocks.{i}]
  attn.w1q -> attn.to_q ; attn.w1k -> attn.to_k ; attn.w1v -> attn.to_v ; attn.w1o -> attn.to_out.0
  modCX.1 -> norm1.linear ; mlp.c_fc1 -> ff.linear_1 ; mlp.c_fc2 -> ff.linear_2 ; mlp.c_proj -> ff.out_projection
""",
    same="""
register_tokens (p)
""",
)

AURAFLOW = Family(
    name="auraflow",
    components={"transformer": TRANSFORMER, "text_encoder": T5},
    model_classes=("AuraFlowTransformer2DModel",),
    depths={"joint_transformer_blocks": (4,), "single_transformer_blocks": (32,)},
    shapes=(
        Shape("transformer", "context_embedder", (3072, 2048)),
        Shape("transformer", "joint_transformer_blocks.{i}.attn.to_q", (3072, 3072)),
        Shape("transformer", "single_transformer_blocks.{i}.attn.to_q", (3072, 3072)),
        Shape("transformer", "single_transformer_blocks.{i}.ff.linear_1", (8192, 3072)),
    ),
    encoders={"text_encoder": "pile_t5xl"},
)
