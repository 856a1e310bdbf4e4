"""CogVideoX with ConsisID, and CogView 3 Plus and 4."""

from .family import Family, Shape
from .rules import Names
from .text_encoders import LANGUAGE_MODEL, T5

# The names of SAT, which the models were trained with (scripts/convert_cogvideox_to_diffusers.py in diffusers); other
# readers of adapters have diffusers' names. Its adaLN_modulations interleave the rows of norm1 and norm2, and have no
# row: SAT's LoRA changes attention alone.
SAT = """
time_embed.0 -> time_embedding.linear_1 (r) ; time_embed.2 -> time_embedding.linear_2 (r)
ofs_embed.0 -> ofs_embedding.linear_1 (r) ; ofs_embed.2 -> ofs_embedding.linear_2 (r)
mixins.patch_embed.proj -> patch_embed.proj (r) ; mixins.patch_embed.text_proj -> patch_embed.text_proj (r)
mixins.final_layer.adaLN_modulation.1 -> norm_out.linear (r) ; mixins.final_layer.norm_final -> norm_out.norm (r)
mixins.final_layer.linear -> proj_out (r) ; transformer.final_layernorm -> norm_final (r)
mixins.adaln_layer.query_layernorm_list.{i} -> transformer_blocks.{i}.attn1.norm_q (r)
mixins.adaln_layer.key_layernorm_list.{i} -> transformer_blocks.{i}.attn1.norm_k (r)
[transformer.layers.{i} -> transformer_blocks.{i}]
  input_layernorm -> norm1.norm (r) ; post_attention_layernorm -> norm2.norm (r)
  attention.query_key_value -> attn1.to_q | attn1.to_k | attn1.to_v (r) ; attention.dense -> attn1.to_out.0 (r)
  mlp.dense_h_to_4h -> ff.net.0.proj (r) ; mlp.dense_4h_to_h -> ff.net.2 (r)
"""

COGVIDEOX_TRANSFORMER = Names(
    SAT,
    same="""
patch_embed.proj ; patch_embed.text_proj ; time_embedding.linear_1 ; time_embedding.linear_2 ; norm_final
norm_out.linear ; norm_out.norm ; proj_out ; ofs_embedding.linear_1 ; ofs_embedding.linear_2
local_facial_extractor.latents (p) ; local_facial_extractor.proj_out (p) ; local_facial_extractor.mapping_0.0
local_facial_extractor.mapping_0.1 ; local_facial_extractor.mapping_0.3 ; local_facial_extractor.mapping_0.4
local_facial_extractor.mapping_0.6 ; local_facial_extractor.mapping_1.0 ; local_facial_extractor.mapping_1.1
local_facial_extractor.mapping_1.3 ; local_facial_extractor.mapping_1.4 ; local_facial_extractor.mapping_1.6
local_facial_extractor.mapping_2.0 ; local_facial_extractor.mapping_2.1 ; local_facial_extractor.mapping_2.3
local_facial_extractor.mapping_2.4 ; local_facial_extractor.mapping_2.6 ; local_facial_extractor.mapping_3.0
local_facial_extractor.mapping_3.1 ; local_facial_extractor.mapping_3.3 ; local_facial_extractor.mapping_3.4
local_facial_extractor.mapping_3.6 ; local_facial_extractor.mapping_4.0 ; local_facial_extractor.mapping_4.1
local_facial_extractor.mapping_4.3 ; local_facial_extractor.mapping_4.4 ; local_facial_extractor.mapping_4.6
local_facial_extractor.id_embedding_mapping.0 ; local_facial_extractor.id_embedding_mapping.1
local_facial_extractor.id_embedding_mapping.3 ; local_facial_extractor.id_embedding_mapping.4
local_facial_extractor.id_embedding_mapping.6
[transformer_blocks.{i}]
  norm1.linear ; norm1.norm ; attn1.norm_q ; attn1.norm_k ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0
  norm2.linear ; norm2.norm ; ff.net.0.proj ; ff.net.2
[local_facial_extractor.layers.{i}.{j}]
  norm1 ; norm2 ; to_q ; to_kv ; to_out ; 0 ; 1 ; 3
[perceiver_cross_attention.{i}]
  norm1 ; norm2 ; to_q ; to_kv ; to_out
""",
    absent=(
        "ofs_embedding.**",
        "local_facial_extractor.**",
        "perceiver_cross_attention.**",
    ),
)

COGVIDEOX = Family(
    name="cogvideox",
    components={"transformer": COGVIDEOX_TRANSFORMER, "text_encoder": T5},
    model_classes=(
        "CogVideoXTransformer3DModel",
        "ConsisIDTransformer3DModel",
    ),
    depths={"transformer_blocks": (30, 42)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (1920, 1920), blocks=30),
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (3072, 3072), blocks=42),
        Shape("transformer", "transformer_blocks.{i}.norm1.linear", (None, 512)),
        Shape("transformer", "time_embedding.linear_2", (512, 512)),
    ),
    encoders={"text_encoder": "t5xxl"},
)

COGVIEW4_TRANSFORMER = Names(
    same="""
patch_embed.proj ; patch_embed.text_proj ; time_condition_embed.timestep_embedder.linear_1
time_condition_embed.timestep_embedder.linear_2 ; time_condition_embed.condition_embedder.linear_1
time_condition_embed.condition_embedder.linear_2 ; norm_out.linear ; proj_out
[transformer_blocks.{i}]
  norm1.linear ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0 ; ff.net.0.proj ; ff.net.2
""",
)

COGVIEW4 = Family(
    name="cogview4",
    components={"transformer": COGVIEW4_TRANSFORMER, "text_encoder": LANGUAGE_MODEL},
    model_classes=("CogView4Transformer2DModel",),
    depths={"transformer_blocks": (28,)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (4096, 4096)),
        Shape("transformer", "transformer_blocks.{i}.ff.net.0.proj", (16384, 4096)),
        Shape("transformer", "transformer_blocks.{i}.norm1.linear", (49152, 512)),
    ),
)

COGVIEW3_TRANSFORMER = Names(
    same="""
patch_embed.proj ; patch_embed.text_proj ; time_condition_embed.timestep_embedder.linear_1
time_condition_embed.timestep_embedder.linear_2 ; time_condition_embed.condition_embedder.linear_1
time_condition_embed.condition_embedder.linear_2 ; norm_out.linear ; proj_out
[transformer_blocks.{i}]
  norm1.linear ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0 ; ff.net.0.proj ; ff.net.2
""",
)

COGVIEW3 = Family(
    name="cogview3",
    components={"transformer": COGVIEW3_TRANSFORMER, "text_encoder": T5},
    model_classes=("CogView3PlusTransformer2DModel",),
    depths={"transformer_blocks": (30,)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (2560, 2560)),
        Shape("transformer", "transformer_blocks.{i}.norm1.linear", (30720, 512)),
    ),
)
