"""Flux.2 dev and klein: the single blocks stay fused in diffusers too."""

from .family import Family, Shape
from .headers import kohya, model_spec
from .rules import Names
from .text_encoders import MISTRAL3

TRANSFORMER = Names(
    """
img_in -> x_embedder ; txt_in -> context_embedder
time_in.in_layer -> time_guidance_embed.timestep_embedder.linear_1
time_in.out_layer -> time_guidance_embed.timestep_embedder.linear_2
guidance_in.in_layer -> time_guidance_embed.guidance_embedder.linear_1
guidance_in.out_layer -> time_guidance_embed.guidance_embedder.linear_2
double_stream_modulation_img.lin -> double_stream_modulation_img.linear
double_stream_modulation_txt.lin -> double_stream_modulation_txt.linear
single_stream_modulation.lin -> single_stream_modulation.linear
final_layer.linear -> proj_out ; final_layer.adaLN_modulation.1 -> norm_out.linear ~
[double_blocks.{i} -> transformer_blocks.{i}]
  img_attn.qkv -> attn.to_q | attn.to_k | attn.to_v
  txt_attn.qkv -> attn.add_q_proj | attn.add_k_proj | attn.add_v_proj
  img_attn.proj -> attn.to_out.0 ; txt_attn.proj -> attn.to_add_out
  img_mlp.0 -> ff.linear_in ; img_mlp.2 -> ff.linear_out
  txt_mlp.0 -> ff_context.linear_in ; txt_mlp.2 -> ff_context.linear_out
  img_attn.norm.query_norm -> attn.norm_q ; img_attn.norm.key_norm -> attn.norm_k
  txt_attn.norm.query_norm -> attn.norm_added_q ; txt_attn.norm.key_norm -> attn.norm_added_k
[single_blocks.{i} -> single_transformer_blocks.{i}]
  linear1 -> attn.to_qkv_mlp_proj ; linear2 -> attn.to_out
  norm.query_norm -> attn.norm_q ; norm.key_norm -> attn.norm_k
""",
    absent=("time_guidance_embed.guidance_embedder.**",),
)

# dev reads prompts with Mistral 3, klein with Qwen 3: one table of a decoder serves both.
FLUX2 = Family(
    name="flux2",
    components={"transformer": TRANSFORMER, "text_encoder": MISTRAL3},
    model_classes=("Flux2Transformer2DModel",),
    depths={"transformer_blocks": (5, 8), "single_transformer_blocks": (20, 24, 48)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn.to_out.0", (6144, 6144)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_out.0", (3072, 3072)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_out.0", (4096, 4096)),
        Shape("transformer", "single_transformer_blocks.{i}.attn.to_qkv_mlp_proj", (55296, 6144)),
        Shape("transformer", "single_transformer_blocks.{i}.attn.to_qkv_mlp_proj", (27648, 3072)),
        Shape("transformer", "single_transformer_blocks.{i}.attn.to_qkv_mlp_proj", (36864, 4096)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (6144, 6144)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (3072, 3072)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (4096, 4096)),
        Shape("transformer", "x_embedder", (None, 128)),
        Shape("transformer", "proj_out", (128, None)),
        Shape("transformer", "time_guidance_embed.timestep_embedder.linear_1", (None, 256)),
    ),
    encoders={"text_encoder": "mistral3_24b"},
    headers={"kohya": kohya("lora_flux_2"), "onetrainer": model_spec("Flux.2")},
)
