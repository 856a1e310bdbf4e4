"""Lumina Image 2: the parts of qkv are unequal, 2304, 768 and 768 rows."""

from .family import Family, Shape
from .headers import kohya
from .rules import Names
from .text_encoders import LANGUAGE_MODEL

TRANSFORMER = Names(
    """
t_embedder.mlp.0 -> time_caption_embed.timestep_embedder.linear_1
t_embedder.mlp.2 -> time_caption_embed.timestep_embedder.linear_2
cap_embedder.0 -> time_caption_embed.caption_embedder.0 ; cap_embedder.1 -> time_caption_embed.caption_embedder.1
final_layer.adaLN_modulation.1 -> norm_out.linear_1 ; final_layer.linear -> norm_out.linear_2
[layers.{i} ; noise_refiner.{i}]
  adaLN_modulation.1 -> norm1.linear ; attention_norm1 -> norm1.norm
[context_refiner.{i}]
  attention_norm1 -> norm1
[layers.{i} ; noise_refiner.{i} ; context_refiner.{i}]
  attention.qkv -> attn.to_q:3 | attn.to_k | attn.to_v ; attention.out -> attn.to_out.0
  attention.q_norm -> attn.norm_q ; attention.k_norm -> attn.norm_k ; attention_norm2 -> norm2
  feed_forward.w1 -> feed_forward.linear_1 ; feed_forward.w2 -> feed_forward.linear_2
  feed_forward.w3 -> feed_forward.linear_3
""",
    same="""
x_embedder
[noise_refiner.{i} ; context_refiner.{i} ; layers.{i}]
  ffn_norm1 ; ffn_norm2
""",
)

LUMINA2 = Family(
    name="lumina2",
    components={"transformer": TRANSFORMER, "text_encoder": LANGUAGE_MODEL},
    model_classes=("Lumina2Transformer2DModel",),
    depths={"layers": (26,)},
    shapes=(
        Shape("transformer", "layers.{i}.attn.to_out.0", (2304, 2304)),
        Shape("transformer", "layers.{i}.attn.to_q", (2304, 2304)),
        Shape("transformer", "layers.{i}.attn.to_k", (768, 2304)),
        Shape("transformer", "layers.{i}.feed_forward.linear_1", (9216, 2304)),
        Shape("transformer", "x_embedder", (2304, 64)),
    ),
    encoders={"text_encoder": "gemma2_2b"},
    headers={"kohya": kohya("lora_lumina", "lumina2", "lumina-2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0")},
)
