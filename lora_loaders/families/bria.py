"""Bria 3, FIBO and FIBO 2."""

from .family import Family, Shape
from .rules import Names
from .text_encoders import LANGUAGE_MODEL, QWEN3_VL, T5

BRIA_FIBO2_TRANSFORMER = Names(
    same="""
x_embedder ; t_embedder.mlp.0 ; t_embedder.mlp.2 ; perceiver.latent_queries (p) ; perceiver.norm_out
final_layer.linear ; final_layer.adaLN_modulation.1
[noise_refiner.{i}]
  attention.to_q ; attention.to_k ; attention.to_v ; attention.to_out.0 ; attention.norm_q ; attention.norm_k
  feed_forward.w1 ; feed_forward.w2 ; feed_forward.w3 ; attention_norm1 ; ffn_norm1 ; attention_norm2 ; ffn_norm2
  adaLN_modulation.0
[perceiver.layers.{i}]
  cross_attn_norm ; cross_attention.to_q ; cross_attention.to_k ; cross_attention.to_v ; cross_attention.to_out.0
  cross_attention.norm_q ; cross_attention.norm_k ; self_attn_norm ; self_attention.to_q ; self_attention.to_k
  self_attention.to_v ; self_attention.to_out.0 ; self_attention.norm_q ; self_attention.norm_k ; ffn_norm ; ffn.w1
  ffn.w2 ; ffn.w3
[layers.{i}]
  attention.to_q ; attention.to_k ; attention.to_v ; attention.to_out.0 ; attention.norm_q ; attention.norm_k
  feed_forward.w1 ; feed_forward.w2 ; feed_forward.w3 ; attention_norm1 ; ffn_norm1 ; attention_norm2 ; ffn_norm2
  adaLN_modulation.0 ; cross_attn_gate (p) ; cross_attn_norm1 ; cross_attention.to_q ; cross_attention.to_k
  cross_attention.to_v ; cross_attention.to_out.0 ; cross_attention.norm_q ; cross_attention.norm_k
  cross_attn_norm2
""",
)

BRIA_FIBO2 = Family(
    name="bria-fibo2",
    components={"transformer": BRIA_FIBO2_TRANSFORMER, "text_encoder": QWEN3_VL},
    model_classes=("BriaFibo2Transformer2DModel",),
    depths={"layers": (44,)},
)

BRIA_FIBO_TRANSFORMER = Names(
    same="""
time_embed.timestep_embedder.linear_1 ; time_embed.timestep_embedder.linear_2 ; context_embedder ; x_embedder
norm_out.linear ; proj_out
[transformer_blocks.{i}]
  norm1.linear ; norm1_context.linear ; attn.norm_q ; attn.norm_k ; attn.to_q ; attn.to_k ; attn.to_v
  attn.to_out.0 ; attn.norm_added_q ; attn.norm_added_k ; attn.add_q_proj ; attn.add_k_proj ; attn.add_v_proj
  attn.to_add_out ; ff.net.0.proj ; ff.net.2 ; ff_context.net.0.proj ; ff_context.net.2
[single_transformer_blocks.{i}]
  norm.linear ; proj_mlp ; proj_out ; attn.norm_q ; attn.norm_k ; attn.to_q ; attn.to_k ; attn.to_v
[caption_projection.{i}]
  linear
""",
)

BRIA_FIBO = Family(
    name="bria-fibo",
    components={"transformer": BRIA_FIBO_TRANSFORMER, "text_encoder": LANGUAGE_MODEL},
    model_classes=("BriaFiboTransformer2DModel",),
    depths={"transformer_blocks": (8,), "single_transformer_blocks": (38,)},
    shapes=(
        Shape("transformer", "context_embedder", (3072, 4096)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (3072, 3072)),
        Shape("transformer", "single_transformer_blocks.{i}.attn.to_q", (3072, 3072)),
    ),
)

BRIA_TRANSFORMER = Names(
    same="""
time_embed.timestep_embedder.linear_1 ; time_embed.timestep_embedder.linear_2 ; context_embedder ; x_embedder
norm_out.linear ; proj_out
[transformer_blocks.{i}]
  norm1.linear ; norm1_context.linear ; attn.norm_q ; attn.norm_k ; attn.to_q ; attn.to_k ; attn.to_v
  attn.to_out.0 ; attn.norm_added_q ; attn.norm_added_k ; attn.add_q_proj ; attn.add_k_proj ; attn.add_v_proj
  attn.to_add_out ; ff.net.0.proj ; ff.net.2 ; ff_context.net.0.proj ; ff_context.net.2
[single_transformer_blocks.{i}]
  norm.linear ; proj_mlp ; proj_out ; attn.norm_q ; attn.norm_k ; attn.to_q ; attn.to_k ; attn.to_v
""",
)

BRIA = Family(
    name="bria",
    components={"transformer": BRIA_TRANSFORMER, "text_encoder": T5},
    model_classes=("BriaTransformer2DModel",),
    depths={"transformer_blocks": (8,), "single_transformer_blocks": (28,)},
    shapes=(
        Shape("transformer", "context_embedder", (3072, 4096)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (3072, 3072)),
        Shape("transformer", "single_transformer_blocks.{i}.attn.to_q", (3072, 3072)),
    ),
)
