"""Cosmos 1, 2 and 2.5, and Anima, which is Cosmos 2 with a text conditioner of its own."""

from dataclasses import replace

from .family import Family, Shape
from .headers import kohya, model_spec
from .rules import Names, parse_rows
from .text_encoders import LANGUAGE_MODEL, QWEN2_5_VL, T5

# What all versions call alike.
SHARED = """
x_embedder.proj.1 -> patch_embed.proj ; t_embedder.1.** -> time_embed.t_embedder.** ; final_layer.linear -> proj_out
"""
POSITIONS = """
extra_pos_embedder.pos_emb_t -> learnable_pos_embed.pos_emb_t (p)
extra_pos_embedder.pos_emb_h -> learnable_pos_embed.pos_emb_h (p)
extra_pos_embedder.pos_emb_w -> learnable_pos_embed.pos_emb_w (p)
"""
ROWS = """
t_embedding_norm -> time_embed.norm
final_layer.adaln_modulation.1 -> norm_out.linear_1 ; final_layer.adaln_modulation.2 -> norm_out.linear_2
[blocks.{i} -> transformer_blocks.{i}]
  adaln_modulation_self_attn.1 -> norm1.linear_1 ; adaln_modulation_self_attn.2 -> norm1.linear_2
  adaln_modulation_cross_attn.1 -> norm2.linear_1 ; adaln_modulation_cross_attn.2 -> norm2.linear_2
  adaln_modulation_mlp.1 -> norm3.linear_1 ; adaln_modulation_mlp.2 -> norm3.linear_2
  mlp.layer1 -> ff.net.0.proj ; mlp.layer2 -> ff.net.2
[blocks.{i}.self_attn -> transformer_blocks.{i}.attn1 ; blocks.{i}.cross_attn -> transformer_blocks.{i}.attn2]
  q_proj -> to_q ; k_proj -> to_k ; v_proj -> to_v ; output_proj -> to_out.0 ; q_norm -> norm_q ; k_norm -> norm_k
"""
COSMOS1_ROWS = """
affline_norm -> time_embed.norm
final_layer.adaLN_modulation.1 -> norm_out.linear_1 ; final_layer.adaLN_modulation.2 -> norm_out.linear_2
[blocks.block{i} -> transformer_blocks.{i}]
  blocks.0.adaLN_modulation.1 -> norm1.linear_1 ; blocks.0.adaLN_modulation.2 -> norm1.linear_2
  blocks.1.adaLN_modulation.1 -> norm2.linear_1 ; blocks.1.adaLN_modulation.2 -> norm2.linear_2
  blocks.2.adaLN_modulation.1 -> norm3.linear_1 ; blocks.2.adaLN_modulation.2 -> norm3.linear_2
  blocks.2.block.layer1 -> ff.net.0.proj ; blocks.2.block.layer2 -> ff.net.2
[blocks.block{i}.blocks.0.block.attn -> transformer_blocks.{i}.attn1]
[blocks.block{i}.blocks.1.block.attn -> transformer_blocks.{i}.attn2]
  to_q.0 -> to_q ; to_k.0 -> to_k ; to_v.0 -> to_v ; to_out.0 -> to_out.0 ; to_q.1 -> norm_q ; to_k.1 -> norm_k
"""

TRANSFORMER = Names(
    SHARED + POSITIONS + ROWS,
    same="""
time_embed.t_embedder.linear_1 ; time_embed.t_embedder.linear_2 ; crossattn_proj.0 ; img_context_proj.0
[transformer_blocks.{i}]
  attn2.q_img ; attn2.k_img ; attn2.v_img ; attn2.q_img_norm ; attn2.k_img_norm
""",
    absent=(
        "learnable_pos_embed.**",
        "transformer_blocks.{i}.attn2.q_img",
        "transformer_blocks.{i}.attn2.k_img",
        "transformer_blocks.{i}.attn2.v_img",
        "transformer_blocks.{i}.attn2.q_img_norm",
        "transformer_blocks.{i}.attn2.k_img_norm",
        "crossattn_proj.0",
        "img_context_proj.0",
    ),
)

# Small models of all versions have the first's class and settings, so Cosmos 2's names are read for this one too.
COSMOS1_TRANSFORMER = Names(
    SHARED + POSITIONS + COSMOS1_ROWS,
    same="""
time_embed.t_embedder.linear_1 ; time_embed.t_embedder.linear_2
""",
    extra=[replace(rule, written=False) for rule in parse_rows(ROWS)],
    absent=("learnable_pos_embed.**",),
)

ANIMA_TRANSFORMER = Names(
    SHARED + ROWS + "llm_adapter.** -> @text_conditioner.**",
    same="""
time_embed.t_embedder.linear_1 ; time_embed.t_embedder.linear_2
""",
)

TEXT_CONDITIONER = Names(
    "llm_adapter.** -> **",
    same="""
embed ; out_proj ; norm
[blocks.{i}]
  norm_self_attn ; self_attn.q_proj ; self_attn.q_norm ; self_attn.k_proj ; self_attn.k_norm ; self_attn.v_proj
  self_attn.o_proj ; norm_cross_attn ; cross_attn.q_proj ; cross_attn.q_norm ; cross_attn.k_proj ; cross_attn.k_norm
  cross_attn.v_proj ; cross_attn.o_proj ; norm_mlp ; mlp.0 ; mlp.2
""",
)

ANIMA = Family(
    name="anima",
    components={"transformer": ANIMA_TRANSFORMER, "text_conditioner": TEXT_CONDITIONER, "text_encoder": LANGUAGE_MODEL},
    model_classes=("CosmosTransformer3DModel",),
    depths={"transformer_blocks": (28,)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (2048, 2048)),
        Shape("transformer", "transformer_blocks.{i}.attn2.to_k", (2048, 1024)),
        Shape("transformer", "transformer_blocks.{i}.ff.net.0.proj", (8192, 2048)),
        Shape("text_conditioner", "blocks.{i}.self_attn.q_proj", (1024, 1024)),
    ),
    encoders={"text_encoder": "qwen3_06b"},
    headers={
        "kohya": kohya("lora_anima", "anima", "anima-preview", "https://huggingface.co/circlestone-labs/Anima"),
        "onetrainer": model_spec("Anima"),
    },
)

COSMOS = Family(
    name="cosmos",
    components={"transformer": TRANSFORMER, "text_encoder": QWEN2_5_VL},
    model_classes=("CosmosTransformer3DModel",),
    depths={"transformer_blocks": (28, 36)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (2048, 2048), blocks=28),
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (5120, 5120), blocks=36),
        Shape("transformer", "transformer_blocks.{i}.attn2.to_k", (None, 1024)),
    ),
    encoders={"text_encoder": "qwen25_7b"},
)

COSMOS1 = Family(
    name="cosmos1",
    components={"transformer": COSMOS1_TRANSFORMER, "text_encoder": T5},
    model_classes=("CosmosTransformer3DModel",),
    depths={"transformer_blocks": (28, 36)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (4096, 4096), blocks=28),
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (5120, 5120), blocks=36),
        Shape("transformer", "transformer_blocks.{i}.attn2.to_k", (None, 1024)),
    ),
    config_facts={"extra_pos_embed_type": "learnable"},
    extends="cosmos",
    encoders={"text_encoder": "t5xxl"},
)
