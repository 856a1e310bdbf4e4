"""Z-Image: trainers use the fused and the split names, some files both."""

from .family import Family, Shape
from .headers import kohya, model_spec
from .rules import Names
from .text_encoders import LANGUAGE_MODEL

# The siglip parts belong to the omni model.
TRANSFORMER = Names(
    """
final_layer.** -> all_final_layer.2-1.** ; x_embedder -> all_x_embedder.2-1
[layers.{i} ; noise_refiner.{i} ; context_refiner.{i} ; siglip_refiner.{i}]
  attention.qkv -> attention.to_q | attention.to_k | attention.to_v ; attention.out -> attention.to_out.0
  attention.q_norm -> attention.norm_q ; attention.k_norm -> attention.norm_k
""",
    same="""
x_pad_token (p) ; cap_pad_token (p) ; all_final_layer.2-1.linear ; all_final_layer.2-1.adaLN_modulation.1
t_embedder.mlp.0 ; t_embedder.mlp.2 ; cap_embedder.0 ; cap_embedder.1 ; siglip_pad_token (p) ; siglip_embedder.0
siglip_embedder.1
[noise_refiner.{i} ; layers.{i}]
  feed_forward.w1 ; feed_forward.w2 ; feed_forward.w3 ; attention_norm1 ; ffn_norm1 ; attention_norm2 ; ffn_norm2
  adaLN_modulation.0
[context_refiner.{i} ; siglip_refiner.{i}]
  feed_forward.w1 ; feed_forward.w2 ; feed_forward.w3 ; attention_norm1 ; ffn_norm1 ; attention_norm2 ; ffn_norm2
""",
    absent=(
        "siglip_pad_token",
        "siglip_embedder.**",
        "siglip_refiner.**",
    ),
)

Z_IMAGE = Family(
    name="z-image",
    components={"transformer": TRANSFORMER, "text_encoder": LANGUAGE_MODEL},
    model_classes=("ZImageTransformer2DModel",),
    depths={"layers": (30,)},
    shapes=(
        Shape("transformer", "layers.{i}.attention.to_q", (3840, 3840)),
        Shape("transformer", "layers.{i}.attention.to_out.0", (3840, 3840)),
        Shape("transformer", "layers.{i}.feed_forward.w1", (10240, 3840)),
        Shape("transformer", "layers.{i}.adaLN_modulation.0", (15360, 256)),
    ),
    encoders={"text_encoder": "qwen3_4b"},
    trainer_names="diffusers",
    headers={
        "kohya": kohya("lora_zimage", "z_image", "Z-Image", "https://github.com/Tongyi-MAI/Z-Image"),
        "onetrainer": model_spec("Z-Image"),
    },
)
