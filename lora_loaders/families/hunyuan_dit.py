"""Hunyuan-DiT."""

from .family import Family, Shape
from .rules import Names
from .text_encoders import BERT, T5

# The original's second and third norm change places, a collision as that of Wan's `norm3`.
HUNYUAN_DIT_TRANSFORMER = Names(
    """
x_embedder.proj -> pos_embed.proj ; mlp_t5.0 -> text_embedder.linear_1 ; mlp_t5.2 -> text_embedder.linear_2
t_embedder.mlp.0 -> time_extra_emb.timestep_embedder.linear_1
t_embedder.mlp.2 -> time_extra_emb.timestep_embedder.linear_2
extra_embedder.0 -> time_extra_emb.extra_embedder.linear_1
extra_embedder.2 -> time_extra_emb.extra_embedder.linear_2
pooler.** -> time_extra_emb.pooler.** ; style_embedder -> time_extra_emb.style_embedder
final_layer.linear -> proj_out ; final_layer.adaLN_modulation.1 -> norm_out.linear ~
[blocks.{i}]
  norm1 -> norm1.norm ; default_modulation.1 -> norm1.linear ; norm2 -> norm3 ; norm3 -> norm2
  attn1.Wqkv -> attn1.to_q | attn1.to_k | attn1.to_v ; attn1.out_proj -> attn1.to_out.0
  attn1.q_norm -> attn1.norm_q ; attn1.k_norm -> attn1.norm_k
  attn2.q_proj -> attn2.to_q ; attn2.kv_proj -> attn2.to_k | attn2.to_v ; attn2.out_proj -> attn2.to_out.0
  attn2.q_norm -> attn2.norm_q ; attn2.k_norm -> attn2.norm_k
  mlp.fc1 -> ff.net.0.proj ; mlp.fc2 -> ff.net.2
""",
    same="""
text_embedding_padding (p) ; time_extra_emb.pooler.positional_embedding (p) ; time_extra_emb.pooler.k_proj
time_extra_emb.pooler.q_proj ; time_extra_emb.pooler.v_proj ; time_extra_emb.pooler.c_proj
[blocks.{i}]
  skip_norm ; skip_linear
""",
)

HUNYUAN_DIT = Family(
    name="hunyuan-dit",
    components={"transformer": HUNYUAN_DIT_TRANSFORMER, "text_encoder": BERT, "text_encoder_2": T5},
    model_classes=("HunyuanDiT2DModel",),
    depths={"blocks": (40,)},
    shapes=(
        Shape("transformer", "blocks.{i}.attn1.to_q", (1408, 1408)),
        Shape("transformer", "blocks.{i}.attn2.to_k", (1408, 1024)),
        Shape("transformer", "blocks.{i}.ff.net.0.proj", (5632, 1408)),
    ),
)
