"""Flux.3: one stack of blocks for each mode, then joint single blocks."""

from .family import Family, Shape
from .rules import Names
from .text_encoders import QWEN3_VL

TRANSFORMER = Names(
    """
emb_in.image -> x_embedders.image ; emb_in.image_cond -> x_embedders.image_cond ; txt_in -> context_embedder
time_in.in_layer -> timestep_embedder.linear_1 ; time_in.out_layer -> timestep_embedder.linear_2
ref_time_in.in_layer -> target_timestep_embedder.linear_1 ; ref_time_in.out_layer -> target_timestep_embedder.linear_2
final_layer.image.linear -> proj_out ; final_layer.image.adaLN_modulation.1 -> norm_out.linear ~
[early_stream_modulations ; single_stream_modulations]
  image.lin -> image.linear ; image_cond.lin -> image_cond.linear ; txt.lin -> txt.linear
[content_mode_blocks.image.{i} -> mode_blocks.image.{i}]
[content_mode_blocks.image_cond.{i} -> mode_blocks.image_cond.{i}]
[txt_mode_blocks.{i} -> txt_mode_blocks.{i} ; single_blocks.{i} -> single_transformer_blocks.{i}]
  q_proj -> attn.to_q ; k_proj -> attn.to_k ; v_proj -> attn.to_v ; attn_out -> attn.to_out.0
  mlp_in -> ff.linear_in ; mlp_out -> ff.linear_out
  norm.query_norm -> attn.norm_q ; norm.key_norm -> attn.norm_k
""",
    absent=("target_timestep_embedder.**",),
)

FLUX3 = Family(
    name="flux3",
    components={"transformer": TRANSFORMER, "text_encoder": QWEN3_VL},
    model_classes=("Flux3Transformer2DModel",),
    depths={"single_transformer_blocks": (28,)},
    shapes=(
        Shape("transformer", "context_embedder", (3072, 20480)),
        Shape("transformer", "mode_blocks.image.{i}.attn.to_q", (3072, 3072)),
        Shape("transformer", "txt_mode_blocks.{i}.ff.linear_in", (18432, 3072)),
        Shape("transformer", "single_transformer_blocks.{i}.ff.linear_in", (18432, 3072)),
    ),
)
