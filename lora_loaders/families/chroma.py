"""Chroma: Flux.1's blocks without modulation, vector, time and guidance embedders."""

from .family import Family, Shape
from .headers import kohya, model_spec
from .rules import Names
from .text_encoders import T5

TRANSFORMER = Names(
    """
img_in -> x_embedder ; txt_in -> context_embedder ; final_layer.linear -> proj_out
distilled_guidance_layer.layers.{i}.in_layer -> distilled_guidance_layer.layers.{i}.linear_1
distilled_guidance_layer.layers.{i}.out_layer -> distilled_guidance_layer.layers.{i}.linear_2
[double_blocks.{i} -> transformer_blocks.{i}]
  img_attn.qkv -> attn.to_q | attn.to_k | attn.to_v
  txt_attn.qkv -> attn.add_q_proj | attn.add_k_proj | attn.add_v_proj
  img_attn.proj -> attn.to_out.0 ; txt_attn.proj -> attn.to_add_out
  img_mlp.0 -> ff.net.0.proj ; img_mlp.2 -> ff.net.2
  txt_mlp.0 -> ff_context.net.0.proj ; txt_mlp.2 -> ff_context.net.2
  img_attn.norm.query_norm -> attn.norm_q ; img_attn.norm.key_norm -> attn.norm_k
  txt_attn.norm.query_norm -> attn.norm_added_q ; txt_attn.norm.key_norm -> attn.norm_added_k
[single_blocks.{i} -> single_transformer_blocks.{i}]
  linear1 -> attn.to_q | attn.to_k | attn.to_v | proj_mlp:4
  linear2 -> proj_out ; norm.query_norm -> attn.norm_q ; norm.key_norm -> attn.norm_k
""",
    same="""
distilled_guidance_layer.in_proj ; distilled_guidance_layer.norms.{i} ; distilled_guidance_layer.out_proj
""",
)

CHROMA = Family(
    name="chroma",
    components={"transformer": TRANSFORMER, "text_encoder": T5},
    model_classes=("ChromaTransformer2DModel",),
    depths={"transformer_blocks": (19,), "single_transformer_blocks": (38,)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn.to_out.0", (3072, 3072)),
        Shape("transformer", "transformer_blocks.{i}.ff.net.0.proj", (12288, 3072)),
        Shape("transformer", "distilled_guidance_layer.in_proj", (5120, 64)),
        Shape("transformer", "distilled_guidance_layer.out_proj", (3072, 5120)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (3072, 3072)),
        Shape("transformer", "single_transformer_blocks.{i}.proj_out", (3072, 15360)),
    ),
    encoders={"text_encoder": "t5xxl"},
    headers={
        "kohya": kohya("lora_flux", "chroma", "chroma", "https://huggingface.co/lodestones/Chroma"),
        "onetrainer": model_spec("Chroma1"),
    },
)
