"""Flux.1: dev, schnell, Kontext, Fill and the Control files, plus XLabs' spelling."""

from .family import Family, Shape
from .headers import kohya, model_spec
from .rules import Names
from .text_encoders import CLIP, T5

TRANSFORMER = Names(
    """
img_in -> x_embedder ; txt_in -> context_embedder
time_in.in_layer -> time_text_embed.timestep_embedder.linear_1
time_in.out_layer -> time_text_embed.timestep_embedder.linear_2
vector_in.in_layer -> time_text_embed.text_embedder.linear_1
vector_in.out_layer -> time_text_embed.text_embedder.linear_2
guidance_in.in_layer -> time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer -> time_text_embed.guidance_embedder.linear_2
final_layer.linear -> proj_out ; final_layer.adaLN_modulation.1 -> norm_out.linear ~
[double_blocks.{i} -> transformer_blocks.{i}]
  img_attn.qkv -> attn.to_q | attn.to_k | attn.to_v
  txt_attn.qkv -> attn.add_q_proj | attn.add_k_proj | attn.add_v_proj
  img_attn.proj -> attn.to_out.0 ; txt_attn.proj -> attn.to_add_out
  img_mlp.0 -> ff.net.0.proj ; img_mlp.2 -> ff.net.2
  txt_mlp.0 -> ff_context.net.0.proj ; txt_mlp.2 -> ff_context.net.2
  img_mod.lin -> norm1.linear ; txt_mod.lin -> norm1_context.linear
  img_attn.norm.query_norm -> attn.norm_q ; img_attn.norm.key_norm -> attn.norm_k
  txt_attn.norm.query_norm -> attn.norm_added_q ; txt_attn.norm.key_norm -> attn.norm_added_k
[single_blocks.{i} -> single_transformer_blocks.{i}]
  linear1 -> attn.to_q | attn.to_k | attn.to_v | proj_mlp:4
  linear2 -> proj_out ; modulation.lin -> norm.linear
  norm.query_norm -> attn.norm_q ; norm.key_norm -> attn.norm_k
  # ComfyUI's name for XLabs' part of it, and OneTrainer's for the whole.
  linear1_qkv -> attn.to_q | attn.to_k | attn.to_v (r)
[single_transformer_blocks.{i}]
  qkv_mlp -> attn.to_q | attn.to_k | attn.to_v | proj_mlp:4 (r)
""",
    # 1 is the image stream, 2 the text stream; a single block's qkv has no mlp part here.
    xlabs="""
[double_blocks.{i} -> transformer_blocks.{i}]
  processor.qkv_lora1 -> attn.to_q | attn.to_k | attn.to_v
  processor.qkv_lora2 -> attn.add_q_proj | attn.add_k_proj | attn.add_v_proj
  processor.proj_lora1 -> attn.to_out.0 ; processor.proj_lora2 -> attn.to_add_out
[single_blocks.{i} -> single_transformer_blocks.{i}]
  processor.qkv_lora -> attn.to_q | attn.to_k | attn.to_v ; processor.proj_lora -> proj_out
""",
    # DiffSynth-Studio trains its own model class; the names are those of its flux_dit.py.
    diffsynth="""
time_embedder.timestep_embedder.0 -> time_text_embed.timestep_embedder.linear_1
time_embedder.timestep_embedder.2 -> time_text_embed.timestep_embedder.linear_2
guidance_embedder.timestep_embedder.0 -> time_text_embed.guidance_embedder.linear_1
guidance_embedder.timestep_embedder.2 -> time_text_embed.guidance_embedder.linear_2
pooled_text_embedder.0 -> time_text_embed.text_embedder.linear_1
pooled_text_embedder.2 -> time_text_embed.text_embedder.linear_2
final_norm_out.linear -> norm_out.linear ~ ; final_proj_out -> proj_out
[blocks.{i} -> transformer_blocks.{i}]
  attn.a_to_qkv -> attn.to_q | attn.to_k | attn.to_v
  attn.b_to_qkv -> attn.add_q_proj | attn.add_k_proj | attn.add_v_proj
  attn.a_to_out -> attn.to_out.0 ; attn.b_to_out -> attn.to_add_out
  ff_a.0 -> ff.net.0.proj ; ff_a.2 -> ff.net.2 ; ff_b.0 -> ff_context.net.0.proj ; ff_b.2 -> ff_context.net.2
  norm1_a.linear -> norm1.linear ; norm1_b.linear -> norm1_context.linear
  attn.norm_q_a -> attn.norm_q ; attn.norm_k_a -> attn.norm_k
  attn.norm_q_b -> attn.norm_added_q ; attn.norm_k_b -> attn.norm_added_k
[single_blocks.{i} -> single_transformer_blocks.{i}]
  to_qkv_mlp -> attn.to_q | attn.to_k | attn.to_v | proj_mlp:4 ; proj_out -> proj_out ; norm.linear -> norm.linear
  norm_q_a -> attn.norm_q ; norm_k_a -> attn.norm_k
""",
    absent=("time_text_embed.guidance_embedder.linear_{i}",),
)

ATTENTION = tuple(
    Shape("transformer", f"{block}.attn.{name}", (3072, 3072))
    for block in ("transformer_blocks.{i}", "single_transformer_blocks.{i}")
    for name in ("to_q", "to_k")
)

FLUX1 = Family(
    name="flux1",
    components={"transformer": TRANSFORMER, "text_encoder": CLIP, "text_encoder_2": T5},
    model_classes=("FluxTransformer2DModel",),
    # Flex.1-alpha and Flux.1-lite keep 8 of the 19.
    depths={"transformer_blocks": (8, 19), "single_transformer_blocks": (38,)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn.to_out.0", (3072, 3072)),
        Shape("transformer", "transformer_blocks.{i}.ff.net.0.proj", (12288, 3072)),
        Shape("transformer", "single_transformer_blocks.{i}.proj_out", (3072, 15360)),
        *ATTENTION,
        Shape("transformer", "single_transformer_blocks.{i}.norm.linear", (9216, 3072)),
        Shape("transformer", "x_embedder", (3072, 64)),
        Shape("transformer", "context_embedder", (3072, 4096)),
    ),
    # A Control file brings an x_embedder for the picture's and the control's channels side by side.
    widens=("x_embedder",),
    encoders={"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    encoder_numbers={"text_encoder_2": 3},
    headers={
        "kohya": kohya("lora_flux", "flux1", "flux-1-dev", "https://github.com/black-forest-labs/flux"),
        "onetrainer": model_spec("Flux.1-dev"),
    },
)
