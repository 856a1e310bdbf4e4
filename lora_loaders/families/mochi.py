"""Mochi 1."""

from .family import Family, Shape
from .rules import Names
from .text_encoders import T5

TRANSFORMER = Names(
    """
x_embedder.proj -> patch_embed.proj ; t5_yproj -> time_embed.caption_proj
t_embedder.mlp.0 -> time_embed.timestep_embedder.linear_1 ; t_embedder.mlp.2 -> time_embed.timestep_embedder.linear_2
t5_y_embedder.to_q -> time_embed.pooler.to_q ; t5_y_embedder.to_kv -> time_embed.pooler.to_kv
t5_y_embedder.to_out -> time_embed.pooler.to_out
final_layer.mod -> norm_out.linear ~ ; final_layer.linear -> proj_out
[blocks.{i} -> transformer_blocks.{i}]
  # The last block has no context output: its `mod_y` is `norm1_context.linear_1`, and it lacks `proj_y` and `mlp_y`.
  mod_x -> norm1.linear ; mod_y -> norm1_context.linear ; mod_y -> norm1_context.linear_1 (last)
  attn.qkv_x -> attn1.to_q | attn1.to_k | attn1.to_v ; attn.proj_x -> attn1.to_out.0
  attn.qkv_y -> attn1.add_q_proj | attn1.add_k_proj | attn1.add_v_proj ; attn.proj_y -> attn1.to_add_out
  attn.q_norm_x -> attn1.norm_q ; attn.k_norm_x -> attn1.norm_k
  attn.q_norm_y -> attn1.norm_added_q ; attn.k_norm_y -> attn1.norm_added_k
  mlp_x.w1 -> ff.net.0.proj ~ ; mlp_x.w2 -> ff.net.2
  mlp_y.w1 -> ff_context.net.0.proj ~ ; mlp_y.w2 -> ff_context.net.2
""",
    same="""
pos_frequencies (p)
""",
)

MOCHI = Family(
    name="mochi",
    components={"transformer": TRANSFORMER, "text_encoder": T5},
    model_classes=("MochiTransformer3DModel",),
    depths={"transformer_blocks": (48,)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn1.to_out.0", (3072, 3072)),
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (3072, 3072)),
        Shape("transformer", "transformer_blocks.{i}.attn1.add_q_proj", (3072, 1536)),
        Shape("transformer", "transformer_blocks.{i}.ff.net.0.proj", (16384, 3072)),
        Shape("transformer", "transformer_blocks.{i}.norm1.linear", (12288, 3072)),
    ),
    encoders={"text_encoder": "t5xxl"},
)
