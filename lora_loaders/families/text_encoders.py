"""Names of the text encoders that pipelines share; trainers write them as transformers has them."""

from collections.abc import Mapping

from .rules import Names

ATTENTION_INPUTS = tuple(f"self_attn.{letter}_proj" for letter in "qkv")
DECODER_INPUTS = ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj")
DECODERS = ("model", "model.language_model")

# ComfyUI's name of an encoder -> its width, which is that of the inputs of the modules below.
WIDTHS: Mapping[str, int] = {
    "clip_l": 768,
    "clip_h": 1024,
    "clip_g": 1280,
    "t5xxl": 4096,
    "umt5xxl": 4096,
    "pile_t5xl": 2048,
    "byt5_small": 1472,
    "llama": 4096,
    "mistral3_24b": 5120,
    "gemma2_2b": 2304,
    "gemma3_12b": 3840,
    "qwen25_7b": 3584,
    "qwen3_06b": 1024,
    "qwen3_4b": 2560,
}
READ_BY = (
    *(f"text_model.encoder.layers.{{i}}.{name}" for name in (*ATTENTION_INPUTS, "mlp.fc1")),
    *(f"encoder.block.{{i}}.layer.0.SelfAttention.{name}" for name in "qkv"),
    *(f"encoder.block.{{i}}.layer.1.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1")),
    *(f"{level}.layers.{{i}}.{name}" for level in DECODERS for name in (*ATTENTION_INPUTS, *DECODER_INPUTS)),
)
"""Modules whose inputs are as wide as their encoder."""

# transformers 5.6 dropped the `text_model.` level of CLIPTextModel and kept it in CLIPTextModelWithProjection.
CLIP = Names(
    """
# 2023's diffusers called the attention's projections as in the UNet.
[text_model.encoder.layers.{i}.self_attn]
  to_q -> q_proj (r) ; to_k -> k_proj (r) ; to_v -> v_proj (r) ; to_out -> out_proj (r)
# OpenCLIP's, in the checkpoints of Stable Diffusion 2 and XL.
ln_final -> text_model.final_layer_norm (r) ; token_embedding -> text_model.embeddings.token_embedding (r)
positional_embedding -> text_model.embeddings.position_embedding (r)
[transformer.resblocks.{i} -> text_model.encoder.layers.{i}]
  attn.in_proj -> self_attn.q_proj | self_attn.k_proj | self_attn.v_proj (r) ; attn.out_proj -> self_attn.out_proj (r)
  mlp.c_fc -> mlp.fc1 (r) ; mlp.c_proj -> mlp.fc2 (r) ; ln_1 -> layer_norm1 (r) ; ln_2 -> layer_norm2 (r)
""",
    same="""
text_model.embeddings.token_embedding ; text_model.embeddings.position_embedding ; text_model.final_layer_norm
text_projection
[text_model.encoder.layers.{i}]
  self_attn.q_proj ; self_attn.k_proj ; self_attn.v_proj ; self_attn.out_proj
  mlp.fc1 ; mlp.fc2 ; layer_norm1 ; layer_norm2
""",
    optional_prefixes=("text_model.",),
    absent=("text_projection",),
)

T5 = Names(
    same="""
shared ; encoder.embed_tokens ; encoder.final_layer_norm
[encoder.block.{i}.layer]
  0.SelfAttention.q ; 0.SelfAttention.k ; 0.SelfAttention.v ; 0.SelfAttention.o
  0.SelfAttention.relative_attention_bias ; 0.layer_norm
  1.DenseReluDense.wi_0 ; 1.DenseReluDense.wi_1 ; 1.DenseReluDense.wi ; 1.DenseReluDense.wo ; 1.layer_norm
""",
)

# One table for every decoder-only encoder: Llama, Qwen, Gemma, Mistral, GLM, SmolLM3. The causal model has
# `model.layers`, the bare one `layers`; the norms are the union of them all.
DECODER_LAYER = """
  self_attn.q_proj ; self_attn.k_proj ; self_attn.v_proj ; self_attn.o_proj ; self_attn.q_norm ; self_attn.k_norm
  mlp.gate_proj ; mlp.up_proj ; mlp.gate_up_proj ; mlp.down_proj ; input_layernorm ; post_attention_layernorm
  pre_feedforward_layernorm ; post_feedforward_layernorm ; post_self_attn_layernorm ; post_mlp_layernorm
"""
LANGUAGE_MODEL = Names(
    same=f"""
lm_head ; model.embed_tokens ; model.norm
[model.layers.{{i}}]
{DECODER_LAYER}
""",
    # sd-scripts trains the bare one.
    trainer=f"""
[layers.{{i}} -> model.layers.{{i}}]
{DECODER_LAYER}
""",
    optional_prefixes=("model.",),
)


def _read_only(rows: str) -> str:
    return "\n".join(
        "  " + " ; ".join(f"{row.strip()} (r)" for row in line.split(";")) for line in rows.split("\n  ")[1:]
    )


VISION_LANGUAGE_ROWS = f"""
lm_head ; model.language_model.embed_tokens ; model.language_model.norm
[model.language_model.layers.{{i}}]
{DECODER_LAYER}
"""

# As their checkpoints, and ComfyUI after them, call the language half; and as transformers did before 4.52.
VISION_LANGUAGE_ORIGINAL = f"""
model.embed_tokens -> model.language_model.embed_tokens ; model.norm -> model.language_model.norm
[model.layers.{{i}} -> model.language_model.layers.{{i}}]
{DECODER_LAYER}
[language_model.model.layers.{{i}} -> model.language_model.layers.{{i}}]
{_read_only(DECODER_LAYER)}
"""
QWEN2_5_TOWER = """
  attn.qkv ; attn.proj ; mlp.gate_proj ; mlp.up_proj ; mlp.down_proj ; norm1 ; norm2
"""

# `model.language_model.layers…` in transformers 5, `model.layers…` before, `layers…` in trainers and bare models.
VISION_LANGUAGE_PREFIXES = ("model.", "language_model.")

QWEN2_5_VL = Names(
    f"""
{VISION_LANGUAGE_ORIGINAL}
[visual -> model.visual]
  patch_embed.proj ; merger.ln_q ; merger.mlp.0 ; merger.mlp.2
[visual.blocks.{{i}} -> model.visual.blocks.{{i}}]
{QWEN2_5_TOWER}
""",
    same=f"""
{VISION_LANGUAGE_ROWS}
model.visual.patch_embed.proj ; model.visual.merger.ln_q ; model.visual.merger.mlp.0 ; model.visual.merger.mlp.2
[model.visual.blocks.{{i}}]
{QWEN2_5_TOWER}
""",
    optional_prefixes=VISION_LANGUAGE_PREFIXES,
)

QWEN3_VL = Names(
    VISION_LANGUAGE_ORIGINAL,
    same=f"""
{VISION_LANGUAGE_ROWS}
model.visual.patch_embed.proj ; model.visual.pos_embed
[model.visual.blocks.{{i}}]
  attn.qkv ; attn.proj ; mlp.linear_fc1 ; mlp.linear_fc2 ; norm1 ; norm2
[model.visual.merger ; model.visual.deepstack_merger_list.{{i}}]
  norm ; linear_fc1 ; linear_fc2
""",
    optional_prefixes=VISION_LANGUAGE_PREFIXES,
)

# Mistral 3 (Pixtral's vision tower), Gemma 3 (SigLIP's) and LLaVA (CLIP's); only the language half is ever trained for
# pictures, the vision halves are named for completeness.
MISTRAL3 = Names(
    VISION_LANGUAGE_ORIGINAL,
    same=f"""
{VISION_LANGUAGE_ROWS}
model.vision_tower.patch_conv ; model.vision_tower.ln_pre
model.multi_modal_projector.norm ; model.multi_modal_projector.patch_merger.merging_layer
model.multi_modal_projector.linear_1 ; model.multi_modal_projector.linear_2
[model.vision_tower.transformer.layers.{{i}}]
  attention.q_proj ; attention.k_proj ; attention.v_proj ; attention.o_proj ; attention_norm ; ffn_norm
  feed_forward.gate_proj ; feed_forward.up_proj ; feed_forward.down_proj
""",
    optional_prefixes=VISION_LANGUAGE_PREFIXES,
)
_CLIP_TOWER = """
model.vision_tower.embeddings.patch_embedding ; model.vision_tower.embeddings.position_embedding
model.vision_tower.post_layernorm
[model.vision_tower.encoder.layers.{i}]
  self_attn.q_proj ; self_attn.k_proj ; self_attn.v_proj ; self_attn.out_proj
  mlp.fc1 ; mlp.fc2 ; layer_norm1 ; layer_norm2
"""
GEMMA3 = Names(
    f"""
{VISION_LANGUAGE_ORIGINAL}
[multi_modal_projector -> model.multi_modal_projector]
  mm_input_projection_weight (p) ; mm_soft_emb_norm
""",
    same=f"""
{VISION_LANGUAGE_ROWS}{_CLIP_TOWER}
model.vision_tower.head.probe (p) ; model.vision_tower.head.attention.in_proj_weight (p)
model.vision_tower.head.attention.in_proj_bias (p) ; model.vision_tower.head.attention.out_proj
model.vision_tower.head.layernorm ; model.vision_tower.head.mlp.fc1 ; model.vision_tower.head.mlp.fc2
model.multi_modal_projector.mm_input_projection_weight (p) ; model.multi_modal_projector.mm_soft_emb_norm
""",
    optional_prefixes=VISION_LANGUAGE_PREFIXES,
)
LLAVA = Names(
    VISION_LANGUAGE_ORIGINAL,
    same=f"""
{VISION_LANGUAGE_ROWS}{_CLIP_TOWER}
model.vision_tower.embeddings.class_embedding (p) ; model.vision_tower.pre_layrnorm
model.multi_modal_projector.linear_1 ; model.multi_modal_projector.linear_2
""",
    optional_prefixes=VISION_LANGUAGE_PREFIXES,
)

BERT = Names(
    same="""
embeddings.word_embeddings ; embeddings.position_embeddings ; embeddings.token_type_embeddings ; embeddings.LayerNorm
pooler.dense
[encoder.layer.{i}]
  attention.self.query ; attention.self.key ; attention.self.value
  attention.output.dense ; attention.output.LayerNorm ; intermediate.dense ; output.dense ; output.LayerNorm
""",
)
