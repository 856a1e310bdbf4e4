"""LTX-Video, LTX-2 and LTX-2.3: most names are equal on both sides."""

from .family import Family, Shape
from .rules import Names
from .text_encoders import GEMMA3, T5

LTX_TRANSFORMER = Names(
    """
patchify_proj -> proj_in ; adaln_single.** -> time_embed.**
[transformer_blocks.{i}.attn1 ; transformer_blocks.{i}.attn2]
  q_norm -> norm_q ; k_norm -> norm_k
""",
    same="""
scale_shift_table (p) ; time_embed.emb.timestep_embedder.linear_1 ; time_embed.emb.timestep_embedder.linear_2
time_embed.linear ; caption_projection.linear_1 ; caption_projection.linear_2 ; proj_out
[transformer_blocks.{i}]
  scale_shift_table (p) ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0 ; attn2.to_q ; attn2.to_k
  attn2.to_v ; attn2.to_out.0 ; ff.net.0.proj ; ff.net.2
""",
)

LTX2_TRANSFORMER = Names(
    """
patchify_proj -> proj_in ; audio_patchify_proj -> audio_proj_in
adaln_single.** -> time_embed.** ; audio_adaln_single.** -> audio_time_embed.**
prompt_adaln_single.** -> prompt_adaln.** ; audio_prompt_adaln_single.** -> audio_prompt_adaln.**
av_ca_video_scale_shift_adaln_single.** -> av_cross_attn_video_scale_shift.**
av_ca_a2v_gate_adaln_single.** -> av_cross_attn_video_a2v_gate.**
av_ca_audio_scale_shift_adaln_single.** -> av_cross_attn_audio_scale_shift.**
av_ca_v2a_gate_adaln_single.** -> av_cross_attn_audio_v2a_gate.**
text_embedding_projection.** -> @connectors.text_embedding_projection.**
video_embeddings_connector.** -> @connectors.video_embeddings_connector.**
audio_embeddings_connector.** -> @connectors.audio_embeddings_connector.**
[transformer_blocks.{i}.attn1 ; transformer_blocks.{i}.audio_attn1 ; transformer_blocks.{i}.audio_to_video_attn]
[transformer_blocks.{i}.attn2 ; transformer_blocks.{i}.audio_attn2 ; transformer_blocks.{i}.video_to_audio_attn]
  q_norm -> norm_q ; k_norm -> norm_k
[transformer_blocks.{i}]
  scale_shift_table_a2v_ca_video -> video_a2v_cross_attn_scale_shift_table (p)
  scale_shift_table_a2v_ca_audio -> audio_a2v_cross_attn_scale_shift_table (p)
""",
    same="""
scale_shift_table (p) ; audio_scale_shift_table (p) ; caption_projection.linear_1 ; caption_projection.linear_2
audio_caption_projection.linear_1 ; audio_caption_projection.linear_2 ; time_embed.emb.timestep_embedder.linear_1
time_embed.emb.timestep_embedder.linear_2 ; time_embed.linear ; audio_time_embed.emb.timestep_embedder.linear_1
audio_time_embed.emb.timestep_embedder.linear_2 ; audio_time_embed.linear
av_cross_attn_video_scale_shift.emb.timestep_embedder.linear_1
av_cross_attn_video_scale_shift.emb.timestep_embedder.linear_2 ; av_cross_attn_video_scale_shift.linear
av_cross_attn_audio_scale_shift.emb.timestep_embedder.linear_1
av_cross_attn_audio_scale_shift.emb.timestep_embedder.linear_2 ; av_cross_attn_audio_scale_shift.linear
av_cross_attn_video_a2v_gate.emb.timestep_embedder.linear_1
av_cross_attn_video_a2v_gate.emb.timestep_embedder.linear_2 ; av_cross_attn_video_a2v_gate.linear
av_cross_attn_audio_v2a_gate.emb.timestep_embedder.linear_1
av_cross_attn_audio_v2a_gate.emb.timestep_embedder.linear_2 ; av_cross_attn_audio_v2a_gate.linear ; proj_out
audio_proj_out ; prompt_adaln.emb.timestep_embedder.linear_1 ; prompt_adaln.emb.timestep_embedder.linear_2
prompt_adaln.linear ; audio_prompt_adaln.emb.timestep_embedder.linear_1
audio_prompt_adaln.emb.timestep_embedder.linear_2 ; audio_prompt_adaln.linear
[transformer_blocks.{i}]
  scale_shift_table (p) ; audio_scale_shift_table (p) ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0
  audio_attn1.to_q ; audio_attn1.to_k ; audio_attn1.to_v ; audio_attn1.to_out.0 ; attn2.to_q ; attn2.to_k
  attn2.to_v ; attn2.to_out.0 ; audio_attn2.to_q ; audio_attn2.to_k ; audio_attn2.to_v ; audio_attn2.to_out.0
  audio_to_video_attn.to_q ; audio_to_video_attn.to_k ; audio_to_video_attn.to_v ; audio_to_video_attn.to_out.0
  video_to_audio_attn.to_q ; video_to_audio_attn.to_k ; video_to_audio_attn.to_v ; video_to_audio_attn.to_out.0
  ff.net.0.proj ; ff.net.2 ; audio_ff.net.0.proj ; audio_ff.net.2 ; prompt_scale_shift_table (p)
  audio_prompt_scale_shift_table (p) ; attn1.to_gate_logits ; audio_attn1.to_gate_logits ; attn2.to_gate_logits
  audio_attn2.to_gate_logits ; audio_to_video_attn.to_gate_logits ; video_to_audio_attn.to_gate_logits
""",
    absent=(
        "prompt_adaln.**",
        "audio_prompt_adaln.**",
        "transformer_blocks.{i}.prompt_scale_shift_table",
        "transformer_blocks.{i}.audio_prompt_scale_shift_table",
        "transformer_blocks.{i}.attn1.to_gate_logits",
        "transformer_blocks.{i}.audio_attn1.to_gate_logits",
        "transformer_blocks.{i}.attn2.to_gate_logits",
        "transformer_blocks.{i}.audio_attn2.to_gate_logits",
        "transformer_blocks.{i}.audio_to_video_attn.to_gate_logits",
        "transformer_blocks.{i}.video_to_audio_attn.to_gate_logits",
    ),
    aside=("transformer_blocks.{i}.audio_**", "transformer_blocks.{i}.video_to_audio_attn.**"),
)

LTX2_CONNECTORS = Names(
    """
text_embedding_projection.aggregate_embed -> text_proj_in
text_embedding_projection.video_aggregate_embed -> video_text_proj_in
text_embedding_projection.audio_aggregate_embed -> audio_text_proj_in
video_embeddings_connector.learnable_registers -> video_connector.learnable_registers (p)
audio_embeddings_connector.learnable_registers -> audio_connector.learnable_registers (p)
[video_embeddings_connector.transformer_1d_blocks.{i} -> video_connector.transformer_blocks.{i}]
[audio_embeddings_connector.transformer_1d_blocks.{i} -> audio_connector.transformer_blocks.{i}]
  attn1.q_norm -> attn1.norm_q ; attn1.k_norm -> attn1.norm_k ; attn1.to_q -> attn1.to_q ; attn1.to_k -> attn1.to_k
  attn1.to_v -> attn1.to_v ; attn1.to_out.0 -> attn1.to_out.0 ; attn1.to_gate_logits -> attn1.to_gate_logits
  ff.net.0.proj -> ff.net.0.proj ; ff.net.2 -> ff.net.2
""",
    absent=(
        "text_proj_in",
        "video_text_proj_in",
        "audio_text_proj_in",
        "video_connector.transformer_blocks.{i}.attn1.to_gate_logits",
        "audio_connector.transformer_blocks.{i}.attn1.to_gate_logits",
    ),
)

LTX = Family(
    name="ltx",
    components={"transformer": LTX_TRANSFORMER, "text_encoder": T5},
    model_classes=("LTXVideoTransformer3DModel",),
    depths={"transformer_blocks": (28, 48)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (2048, 2048), blocks=28),
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (4096, 4096), blocks=48),
        Shape("transformer", "transformer_blocks.{i}.attn2.to_k", (2048, 2048), blocks=28),
        Shape("transformer", "transformer_blocks.{i}.attn2.to_k", (4096, 4096), blocks=48),
        Shape("transformer", "proj_in", (None, 128)),
        Shape("transformer", "proj_out", (128, None)),
        Shape("transformer", "caption_projection.linear_1", (None, 4096)),
    ),
    encoders={"text_encoder": "t5xxl"},
)

LTX2 = Family(
    name="ltx2",
    components={"transformer": LTX2_TRANSFORMER, "connectors": LTX2_CONNECTORS, "text_encoder": GEMMA3},
    model_classes=(
        "LTX2VideoTransformer3DModel",
        "SanaWMLTX2RefinerTransformer3DModel",
    ),
    depths={"transformer_blocks": (48,)},
    shapes=(
        Shape("transformer", "proj_in", (4096, 128)),
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (4096, 4096)),
        Shape("transformer", "transformer_blocks.{i}.audio_attn1.to_q", (2048, 2048)),
        Shape("transformer", "transformer_blocks.{i}.attn2.to_k", (4096, 4096)),
        Shape("transformer", "transformer_blocks.{i}.ff.net.0.proj", (16384, 4096)),
    ),
    encoders={"text_encoder": "gemma3_12b"},
)
