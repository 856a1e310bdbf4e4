"""PixArt-α and PixArt-Σ."""

from .family import Family, Shape
from .rules import Names
from .text_encoders import T5

# Σ has no embedders of the picture's size.
TRANSFORMER = Names(
    """
x_embedder.proj -> pos_embed.proj ; t_block.1 -> adaln_single.linear ; final_layer.linear -> proj_out
y_embedder.y_proj.fc1 -> caption_projection.linear_1 ; y_embedder.y_proj.fc2 -> caption_projection.linear_2
final_layer.scale_shift_table -> scale_shift_table (p)
[t_embedder.mlp -> adaln_single.emb.timestep_embedder]
  0 -> linear_1 ; 2 -> linear_2
[csize_embedder.mlp -> adaln_single.emb.resolution_embedder]
  0 -> linear_1 ; 2 -> linear_2
[ar_embedder.mlp -> adaln_single.emb.aspect_ratio_embedder]
  0 -> linear_1 ; 2 -> linear_2
[blocks.{i} -> transformer_blocks.{i}]
  attn.qkv -> attn1.to_q | attn1.to_k | attn1.to_v ; attn.proj -> attn1.to_out.0
  cross_attn.q_linear -> attn2.to_q ; cross_attn.kv_linear -> attn2.to_k | attn2.to_v
  cross_attn.proj -> attn2.to_out.0
  mlp.fc1 -> ff.net.0.proj ; mlp.fc2 -> ff.net.2 ; scale_shift_table -> scale_shift_table (p)
""",
    absent=(
        "adaln_single.emb.resolution_embedder.**",
        "adaln_single.emb.aspect_ratio_embedder.**",
    ),
)

PIXART = Family(
    name="pixart",
    components={"transformer": TRANSFORMER, "text_encoder": T5},
    model_classes=("PixArtTransformer2DModel",),
    depths={"transformer_blocks": (28,)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn1.to_out.0", (1152, 1152)),
        Shape("transformer", "caption_projection.linear_1", (1152, 4096)),
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (1152, 1152)),
        Shape("transformer", "transformer_blocks.{i}.attn2.to_k", (1152, 1152)),
        Shape("transformer", "transformer_blocks.{i}.ff.net.0.proj", (4608, 1152)),
    ),
    encoders={"text_encoder": "t5xxl"},
)
