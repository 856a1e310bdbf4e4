"""Hunyuan-DiT."""

from .family import Family, Shape
from .rules import Names
from .text_encoders import BERT, T5

HUNYUAN_DIT_TRANSFORMER = Names(
    same="""
text_embedding_padding (p) ; text_embedder.linear_1 ; text_embedder.linear_2 ; pos_embed.proj
time_extra_emb.timestep_embedder.linear_1 ; time_extra_emb.timestep_embedder.linear_2
time_extra_emb.pooler.positional_embedding (p) ; time_extra_emb.pooler.k_proj ; time_extra_emb.pooler.q_proj
time_extra_emb.pooler.v_proj ; time_extra_emb.pooler.c_proj ; time_extra_emb.style_embedder
time_extra_emb.extra_embedder.linear_1 ; time_extra_emb.extra_embedder.linear_2 ; norm_out.linear ; proj_out
[blocks.{i}]
  norm1.linear ; norm1.norm ; attn1.norm_q ; attn1.norm_k ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0
  norm2 ; attn2.norm_q ; attn2.norm_k ; attn2.to_q ; attn2.to_k ; attn2.to_v ; attn2.to_out.0 ; norm3
  ff.net.0.proj ; ff.net.2 ; skip_norm ; skip_linear
""",
)

HUNYUAN_DIT = Family(
    name="hunyuan-dit",
    components={"transformer": HUNYUAN_DIT_TRANSFORMER, "text_encoder": BERT, "text_encoder_2": T5},
    model_classes=("HunyuanDiT2DModel",),
    shapes=(
        Shape("transformer", "blocks.{i}.attn1.to_q", (1408, 1408)),
        Shape("transformer", "blocks.{i}.attn2.to_k", (1408, 1024)),
        Shape("transformer", "blocks.{i}.ff.net.0.proj", (5632, 1408)),
    ),
)
