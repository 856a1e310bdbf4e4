"""Image models for which diffusers has a denoiser but no LoRA loader; names are equal on both sides."""

from .family import Family, Shape
from .rules import Names
from .text_encoders import LANGUAGE_MODEL, QWEN2_5_VL, QWEN3_VL, T5

PRX_TRANSFORMER = Names(
    same="""
img_in ; time_in.in_layer ; time_in.out_layer ; txt_in ; final_layer.linear ; final_layer.adaLN_modulation.1
[blocks.{i}]
  attention.img_qkv_proj ; attention.norm_q ; attention.norm_k ; attention.txt_kv_proj ; attention.norm_added_k
  attention.to_out.0 ; gate_proj ; up_proj ; down_proj ; modulation.lin
""",
)

PRX = Family(
    name="prx",
    components={"transformer": PRX_TRANSFORMER, "text_encoder": LANGUAGE_MODEL},
    model_classes=("PRXTransformer2DModel",),
    depths={"blocks": (16,)},
)

LONGCAT_IMAGE_TRANSFORMER = Names(
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

LONGCAT_IMAGE = Family(
    name="longcat-image",
    components={"transformer": LONGCAT_IMAGE_TRANSFORMER, "text_encoder": QWEN2_5_VL},
    model_classes=("LongCatImageTransformer2DModel",),
    depths={"transformer_blocks": (10,), "single_transformer_blocks": (20,)},
    shapes=(
        Shape("transformer", "context_embedder", (3072, 3584)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (3072, 3072)),
        Shape("transformer", "single_transformer_blocks.{i}.attn.to_q", (3072, 3072)),
    ),
)

OVIS_IMAGE_TRANSFORMER = Names(
    same="""
timestep_embedder.linear_1 ; timestep_embedder.linear_2 ; context_embedder_norm ; context_embedder ; x_embedder
norm_out.linear ; proj_out
[transformer_blocks.{i}]
  norm1.linear ; norm1_context.linear ; attn.norm_q ; attn.norm_k ; attn.to_q ; attn.to_k ; attn.to_v
  attn.to_out.0 ; attn.norm_added_q ; attn.norm_added_k ; attn.add_q_proj ; attn.add_k_proj ; attn.add_v_proj
  attn.to_add_out ; ff.net.0.proj ; ff.net.2 ; ff_context.net.0.proj ; ff_context.net.2
[single_transformer_blocks.{i}]
  norm.linear ; proj_mlp ; proj_out ; attn.norm_q ; attn.norm_k ; attn.to_q ; attn.to_k ; attn.to_v
""",
)

OVIS_IMAGE = Family(
    name="ovis-image",
    components={"transformer": OVIS_IMAGE_TRANSFORMER, "text_encoder": LANGUAGE_MODEL},
    model_classes=("OvisImageTransformer2DModel",),
    depths={"transformer_blocks": (6,), "single_transformer_blocks": (27,)},
    shapes=(
        Shape("transformer", "context_embedder", (3072, 2048)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (3072, 3072)),
        Shape("transformer", "single_transformer_blocks.{i}.attn.to_q", (3072, 3072)),
    ),
)

GLM_IMAGE_TRANSFORMER = Names(
    same="""
image_projector.proj ; glyph_projector.net.0.proj ; glyph_projector.net.2 ; prior_token_embedding
prior_projector.net.0.proj ; prior_projector.net.2 ; time_condition_embed.timestep_embedder.linear_1
time_condition_embed.timestep_embedder.linear_2 ; time_condition_embed.condition_embedder.linear_1
time_condition_embed.condition_embedder.linear_2 ; norm_out.linear ; proj_out
[transformer_blocks.{i}]
  norm1.linear ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0 ; ff.net.0.proj ; ff.net.2
""",
)

GLM_IMAGE = Family(
    name="glm-image",
    components={"transformer": GLM_IMAGE_TRANSFORMER, "text_encoder": T5},
    model_classes=("GlmImageTransformer2DModel",),
    depths={"transformer_blocks": (30,)},
    shapes=(Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (4096, 4096)),),
)

JOY_IMAGE_TRANSFORMER = Names(
    same="""
img_in ; condition_embedder.time_embedder.linear_1 ; condition_embedder.time_embedder.linear_2
condition_embedder.time_proj ; condition_embedder.text_embedder.linear_1 ; condition_embedder.text_embedder.linear_2
proj_out
[double_blocks.{i}]
  img_mod.modulate_table (p) ; img_mlp.net.0.proj ; img_mlp.net.2 ; txt_mod.modulate_table (p) ; txt_mlp.net.0.proj
  txt_mlp.net.2 ; attn.img_attn_qkv ; attn.img_attn_q_norm ; attn.img_attn_k_norm ; attn.img_attn_proj
  attn.txt_attn_qkv ; attn.txt_attn_q_norm ; attn.txt_attn_k_norm ; attn.txt_attn_proj
""",
)

JOY_IMAGE = Family(
    name="joy-image",
    components={"transformer": JOY_IMAGE_TRANSFORMER, "text_encoder": QWEN3_VL},
    model_classes=(
        "JoyImageEditTransformer3DModel",
        "JoyImageEditPlusTransformer3DModel",
    ),
)

NUCLEUS_IMAGE_TRANSFORMER = Names(
    same="""
time_text_embed.timestep_embedder.linear_1 ; time_text_embed.timestep_embedder.linear_2 ; time_text_embed.norm
txt_norm ; img_in ; norm_out.linear ; proj_out
[transformer_blocks.{i}]
  img_mod.1 ; encoder_proj ; attn.norm_q ; attn.norm_k ; attn.to_q ; attn.to_k ; attn.to_v ; attn.add_k_proj
  attn.add_v_proj ; attn.to_out.0 ; attn.norm_added_q ; attn.norm_added_k ; img_mlp.net.0.proj ; img_mlp.net.2
  img_mlp.gate ; img_mlp.experts.gate_up_proj (p) ; img_mlp.experts.down_proj (p) ; img_mlp.shared_expert.net.0.proj
  img_mlp.shared_expert.net.2
""",
)

NUCLEUS_IMAGE = Family(
    name="nucleus-image",
    components={"transformer": NUCLEUS_IMAGE_TRANSFORMER, "text_encoder": QWEN3_VL},
    model_classes=("NucleusMoEImageTransformer2DModel",),
    depths={"transformer_blocks": (24,)},
    shapes=(Shape("transformer", "transformer_blocks.{i}.attn.to_q", (2048, 2048)),),
)

# Four query heads share a key: the default shares of diffusers' fused projections would be wrong.
LUMINA_TRANSFORMER = Names(
    """
[layers.{i}.attn1 ; layers.{i}.attn2]
  to_qkv -> to_q:4 | to_k | to_v (r) ; qkv -> to_q:4 | to_k | to_v (r)
""",
    same="""
pad_token (p) ; patch_embedder.proj ; time_caption_embed.timestep_embedder.linear_1
time_caption_embed.timestep_embedder.linear_2 ; time_caption_embed.caption_embedder.0
time_caption_embed.caption_embedder.1 ; norm_out.linear_1 ; norm_out.linear_2
[layers.{i}]
  gate (p) ; attn1.norm_q ; attn1.norm_k ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn2.norm_q ; attn2.norm_k
  attn2.to_q ; attn2.to_k ; attn2.to_v ; attn2.to_out.0 ; feed_forward.linear_1 ; feed_forward.linear_2
  feed_forward.linear_3 ; norm1.linear ; norm1.norm ; ffn_norm1 ; norm2 ; ffn_norm2 ; norm1_context
""",
)

LUMINA = Family(
    name="lumina",
    components={"transformer": LUMINA_TRANSFORMER, "text_encoder": LANGUAGE_MODEL},
    model_classes=("LuminaNextDiT2DModel",),
    depths={"layers": (24,)},
    shapes=(Shape("transformer", "layers.{i}.attn1.to_q", (2304, 2304)),),
)

# diffusers' scripts/convert_omnigen_to_diffusers.py.
OMNIGEN_TRANSFORMER = Names(
    """
x_embedder.proj -> patch_embedding.output_image_proj ; input_x_embedder.proj -> patch_embedding.input_image_proj
time_token.mlp.0 -> time_token.linear_1 ; time_token.mlp.2 -> time_token.linear_2
t_embedder.mlp.0 -> t_embedder.linear_1 ; t_embedder.mlp.2 -> t_embedder.linear_2
llm.embed_tokens -> embed_tokens ; llm.norm -> norm
final_layer.adaLN_modulation.1 -> norm_out.linear ; final_layer.linear -> proj_out
[llm.layers.{i} -> layers.{i}]
  input_layernorm ; post_attention_layernorm ; mlp.gate_up_proj ; mlp.down_proj
  self_attn.qkv_proj -> self_attn.to_q | self_attn.to_k | self_attn.to_v ; self_attn.o_proj -> self_attn.to_out.0
""",
)

OMNIGEN = Family(
    name="omnigen",
    components={"transformer": OMNIGEN_TRANSFORMER},
    model_classes=("OmniGenTransformer2DModel",),
    depths={"layers": (32,)},
    shapes=(Shape("transformer", "layers.{i}.self_attn.to_q", (3072, 3072)),),
)

DIT_TRANSFORMER = Names(
    same="""
pos_embed.proj ; proj_out_1 ; proj_out_2
[transformer_blocks.{i}]
  norm1.emb.timestep_embedder.linear_1 ; norm1.emb.timestep_embedder.linear_2
  norm1.emb.class_embedder.embedding_table ; norm1.linear ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0
  ff.net.0.proj ; ff.net.2
""",
)

DIT = Family(
    name="dit",
    components={"transformer": DIT_TRANSFORMER},
    model_classes=("DiTTransformer2DModel",),
    depths={"transformer_blocks": (28,)},
    shapes=(Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (1152, 1152)),),
)
