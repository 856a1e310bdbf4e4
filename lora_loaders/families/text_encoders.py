"""Names of the text encoders that pipelines share; trainers write them as transformers has them."""

from .rules import Names

# transformers 5.6 dropped the `text_model.` level of CLIPTextModel and kept it in CLIPTextModelWithProjection.
CLIP = Names(
    # 2023's diffusers called the attention's projections as in the UNet.
    """
[text_model.encoder.layers.{i}.self_attn]
  to_q -> q_proj ; to_k -> k_proj ; to_v -> v_proj ; to_out -> out_proj
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

# Qwen2.5-VL: `model.language_model.layers…` in transformers 5, `model.layers…` before, `layers…` in trainers.
QWEN2_5_VL = Names(
    same="""
lm_head ; model.language_model.embed_tokens ; model.language_model.norm
model.visual.patch_embed.proj ; model.visual.merger.ln_q ; model.visual.merger.mlp.0 ; model.visual.merger.mlp.2
[model.language_model.layers.{i}]
  self_attn.q_proj ; self_attn.k_proj ; self_attn.v_proj ; self_attn.o_proj
  mlp.gate_proj ; mlp.up_proj ; mlp.down_proj ; input_layernorm ; post_attention_layernorm
[model.visual.blocks.{i}]
  attn.qkv ; attn.proj ; mlp.gate_proj ; mlp.up_proj ; mlp.down_proj ; norm1 ; norm2
""",
    optional_prefixes=("model.language_model.", "model."),
)
