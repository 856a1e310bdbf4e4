"""HiDream-I1."""

from .family import Family, Shape
from .headers import model_spec
from .rules import Names
from .text_encoders import CLIP, LANGUAGE_MODEL, T5

HIDREAM_TRANSFORMER = Names(
    same="""
t_embedder.timestep_embedder.linear_1 ; t_embedder.timestep_embedder.linear_2 ; p_embedder.pooled_embedder.linear_1
p_embedder.pooled_embedder.linear_2 ; x_embedder.proj ; final_layer.linear ; final_layer.adaLN_modulation.1
[double_stream_blocks.{i}]
  block.adaLN_modulation.1 ; block.attn1.to_q ; block.attn1.to_k ; block.attn1.to_v ; block.attn1.to_out
  block.attn1.q_rms_norm ; block.attn1.k_rms_norm ; block.attn1.to_q_t ; block.attn1.to_k_t ; block.attn1.to_v_t
  block.attn1.to_out_t ; block.attn1.q_rms_norm_t ; block.attn1.k_rms_norm_t ; block.ff_i.shared_experts.w1
  block.ff_i.shared_experts.w2 ; block.ff_i.shared_experts.w3 ; block.ff_i.gate ; block.ff_t.w1 ; block.ff_t.w2
  block.ff_t.w3
[double_stream_blocks.{i}.block.ff_i.experts.{j} ; single_stream_blocks.{i}.block.ff_i.experts.{j}]
  w1 ; w2 ; w3
[single_stream_blocks.{i}]
  block.adaLN_modulation.1 ; block.attn1.to_q ; block.attn1.to_k ; block.attn1.to_v ; block.attn1.to_out
  block.attn1.q_rms_norm ; block.attn1.k_rms_norm ; block.ff_i.shared_experts.w1 ; block.ff_i.shared_experts.w2
  block.ff_i.shared_experts.w3 ; block.ff_i.gate
[caption_projection.{i}]
  linear
""",
)

HIDREAM = Family(
    name="hidream",
    components={
        "transformer": HIDREAM_TRANSFORMER,
        "text_encoder": CLIP,
        "text_encoder_2": CLIP,
        "text_encoder_3": T5,
        "text_encoder_4": LANGUAGE_MODEL,
    },
    model_classes=("HiDreamImageTransformer2DModel",),
    depths={"double_stream_blocks": (16,), "single_stream_blocks": (32,)},
    shapes=(
        Shape("transformer", "double_stream_blocks.{i}.block.attn1.to_q", (2560, 2560)),
        Shape("transformer", "single_stream_blocks.{i}.block.attn1.to_q", (2560, 2560)),
        Shape("transformer", "double_stream_blocks.{i}.block.ff_t.w1", (6912, 2560)),
    ),
    encoders={
        "text_encoder": "clip_l",
        "text_encoder_2": "clip_g",
        "text_encoder_3": "t5xxl",
        "text_encoder_4": "llama",
    },
    headers={"onetrainer": model_spec("hidream-i1")},
)
