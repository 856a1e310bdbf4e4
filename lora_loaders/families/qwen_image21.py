"""Qwen-Image 2.1: one stream, one modulation for all blocks."""

from .family import Family, Shape
from .rules import Names
from .text_encoders import QWEN3_VL

TRANSFORMER = Names(
    """
# ComfyUI's checkpoints have the gate and the value in one matrix.
[transformer_blocks.{i}]
  img_mlp.gate_up -> img_mlp.gate_layer | img_mlp.proj
""",
    same="""
time_text_embed.timestep_embedder.linear_1 ; time_text_embed.timestep_embedder.linear_2 ; txt_in.text_norm
txt_in.in_layer ; txt_in.out_layer ; img_in ; modulation.1 ; norm_out.linear ; proj_out
[transformer_blocks.{i}]
  attn.to_q ; attn.to_k ; attn.to_v ; attn.to_out.0 ; attn.norm_q ; attn.norm_k ; img_mlp.out
""",
)

QWEN_IMAGE21 = Family(
    name="qwen-image-2.1",
    components={"transformer": TRANSFORMER, "text_encoder": QWEN3_VL},
    model_classes=("QwenImage21Transformer2DModel",),
    depths={"transformer_blocks": (32,)},
    shapes=(
        Shape("transformer", "img_in", (4096, 64)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (4096, 4096)),
        Shape("transformer", "transformer_blocks.{i}.img_mlp.out", (4096, 12288)),
    ),
)
