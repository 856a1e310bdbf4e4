"""Qwen-Image, Qwen-Image-Edit and -Edit-Plus: trainers keep diffusers' names."""

from .family import Family, Shape
from .headers import kohya, model_spec
from .rules import Names
from .text_encoders import QWEN2_5_VL

TRANSFORMER = Names(
    same="""
img_in ; txt_in ; txt_norm ; norm_out.linear ; proj_out
time_text_embed.timestep_embedder.linear_1 ; time_text_embed.timestep_embedder.linear_2
time_text_embed.addition_t_embedding
[transformer_blocks.{i}]
  img_mod.1 ; txt_mod.1
  attn.to_q ; attn.to_k ; attn.to_v ; attn.add_q_proj ; attn.add_k_proj ; attn.add_v_proj
  attn.to_out.0 ; attn.to_add_out ; attn.norm_q ; attn.norm_k ; attn.norm_added_q ; attn.norm_added_k
  img_mlp.net.0.proj ; img_mlp.net.2 ; txt_mlp.net.0.proj ; txt_mlp.net.2
""",
    # The layered model alone is told whether a layer has an alpha channel.
    absent=("time_text_embed.addition_t_embedding",),
)

QWEN_IMAGE = Family(
    name="qwen-image",
    components={"transformer": TRANSFORMER, "text_encoder": QWEN2_5_VL},
    model_classes=("QwenImageTransformer2DModel",),
    depths={"transformer_blocks": (60,)},
    encoders={"text_encoder": "qwen25_7b"},
    shapes=(
        Shape("transformer", "img_in", (3072, 64)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (3072, 3072)),
        Shape("transformer", "transformer_blocks.{i}.img_mod.1", (18432, 3072)),
    ),
    headers={
        "kohya": kohya("lora_qwen_image", "qwen_image", "Qwen-Image", "https://github.com/QwenLM/Qwen-Image"),
        "onetrainer": model_spec("Qwen-Image"),
    },
)
