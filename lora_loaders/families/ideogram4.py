"""Ideogram 4."""

from .family import Family, Shape
from .headers import kohya, model_spec
from .rules import Names
from .text_encoders import QWEN3_VL

TRANSFORMER = Names(
    """
[layers.{i}]
  attention.qkv -> attention.to_q | attention.to_k | attention.to_v ; attention.o -> attention.to_out.0
""",
    same="""
input_proj ; llm_cond_norm ; llm_cond_proj ; t_embedding.mlp_in ; t_embedding.mlp_out ; adaln_proj
embed_image_indicator ; final_layer.linear ; final_layer.adaln_modulation
[layers.{i}]
  attention.norm_q ; attention.norm_k ; feed_forward.w1 ; feed_forward.w2 ; feed_forward.w3 ; attention_norm1
  ffn_norm1 ; attention_norm2 ; ffn_norm2 ; adaln_modulation
""",
)

IDEOGRAM4 = Family(
    name="ideogram4",
    components={"transformer": TRANSFORMER, "unconditional_transformer": TRANSFORMER, "text_encoder": QWEN3_VL},
    model_classes=("Ideogram4Transformer2DModel",),
    depths={"layers": (34,)},
    shapes=(
        Shape("transformer", "layers.{i}.attention.to_q", (4608, 4608)),
        Shape("transformer", "layers.{i}.attention.to_out.0", (4608, 4608)),
        Shape("transformer", "layers.{i}.feed_forward.w1", (12288, 4608)),
        Shape("transformer", "layers.{i}.adaln_modulation", (18432, 512)),
    ),
    headers={
        "kohya": kohya("lora_ideogram4", "ideogram4", "Ideogram-4", "https://huggingface.co/Comfy-Org/Ideogram-4"),
        "onetrainer": model_spec("Ideogram"),
    },
)
