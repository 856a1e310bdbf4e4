"""Kandinsky 5 and 6."""

from .family import Family, Shape
from .headers import kohya
from .rules import Names
from .text_encoders import CLIP, QWEN2_5_VL

KANDINSKY5_TRANSFORMER = Names(
    same="""
time_embeddings.in_layer ; time_embeddings.out_layer ; text_embeddings.in_layer ; text_embeddings.norm
pooled_text_embeddings.in_layer ; pooled_text_embeddings.norm ; visual_embeddings.in_layer
out_layer.modulation.out_layer ; out_layer.out_layer
[text_transformer_blocks.{i}]
  text_modulation.out_layer ; self_attention.to_query ; self_attention.to_key ; self_attention.to_value
  self_attention.query_norm ; self_attention.key_norm ; self_attention.out_layer ; feed_forward.in_layer
  feed_forward.out_layer
[visual_transformer_blocks.{i}]
  visual_modulation.out_layer ; self_attention.to_query ; self_attention.to_key ; self_attention.to_value
  self_attention.query_norm ; self_attention.key_norm ; self_attention.out_layer ; cross_attention.to_query
  cross_attention.to_key ; cross_attention.to_value ; cross_attention.query_norm ; cross_attention.key_norm
  cross_attention.out_layer ; feed_forward.in_layer ; feed_forward.out_layer
""",
)

KANDINSKY5 = Family(
    name="kandinsky5",
    components={"transformer": KANDINSKY5_TRANSFORMER, "text_encoder": QWEN2_5_VL, "text_encoder_2": CLIP},
    model_classes=("Kandinsky5Transformer3DModel",),
    depths={"visual_transformer_blocks": (32, 50, 60)},
    shapes=(
        Shape("transformer", "visual_transformer_blocks.{i}.self_attention.to_query", (1792, 1792), blocks=32),
        Shape("transformer", "visual_transformer_blocks.{i}.self_attention.to_query", (2560, 2560), blocks=50),
        Shape("transformer", "visual_transformer_blocks.{i}.self_attention.to_query", (4096, 4096), blocks=60),
        Shape("transformer", "text_embeddings.in_layer", (None, 3584)),
        Shape("transformer", "pooled_text_embeddings.in_layer", (None, 768)),
    ),
    encoders={"text_encoder": "qwen25_7b", "text_encoder_2": "clip_l"},
    headers={
        "kohya": kohya("lora_kandinsky", "kandinsky5", "Kandinsky-5", "https://github.com/kandinskylab/kandinsky-5")
    },
)

KANDINSKY6_TRANSFORMER = Names(
    same="""
visual_embeddings.in_layer ; out_layer.modulation.out_layer ; out_layer.out_layer ; audio_embeddings.in_layer
audio_embeddings.norm ; audio_out_layer.modulation.out_layer ; audio_out_layer.out_layer
video_time_embeddings.timestep_embedder.linear_1 ; video_time_embeddings.timestep_embedder.linear_2
video_text_embeddings.in_layer ; video_text_embeddings.norm ; video_pooled_text_embeddings.in_layer
video_pooled_text_embeddings.norm ; audio_time_embeddings.timestep_embedder.linear_1
audio_time_embeddings.timestep_embedder.linear_2 ; audio_text_embeddings.in_layer ; audio_text_embeddings.norm
audio_pooled_text_embeddings.in_layer ; audio_pooled_text_embeddings.norm
[video_text_transformer_blocks.{i} ; audio_text_transformer_blocks.{i}]
  text_modulation.out_layer ; attn.to_query ; attn.to_key ; attn.to_value ; attn.query_norm ; attn.key_norm
  attn.out_layer ; feed_forward.net.0.proj ; feed_forward.net.2
[visual_transformer_blocks.{i}]
  video_dec_block.visual_modulation.out_layer ; video_dec_block.self_attention.to_query
  video_dec_block.self_attention.to_key ; video_dec_block.self_attention.to_value
  video_dec_block.self_attention.query_norm ; video_dec_block.self_attention.key_norm
  video_dec_block.self_attention.out_layer ; video_dec_block.cross_attention.to_query
  video_dec_block.cross_attention.to_key ; video_dec_block.cross_attention.to_value
  video_dec_block.cross_attention.query_norm ; video_dec_block.cross_attention.key_norm
  video_dec_block.cross_attention.out_layer ; video_dec_block.feed_forward.net.0.proj
  video_dec_block.feed_forward.net.2 ; audio_dec_block.visual_modulation.out_layer
  audio_dec_block.self_attention.to_query ; audio_dec_block.self_attention.to_key
  audio_dec_block.self_attention.to_value ; audio_dec_block.self_attention.query_norm
  audio_dec_block.self_attention.key_norm ; audio_dec_block.self_attention.out_layer
  audio_dec_block.cross_attention.to_query ; audio_dec_block.cross_attention.to_key
  audio_dec_block.cross_attention.to_value ; audio_dec_block.cross_attention.query_norm
  audio_dec_block.cross_attention.key_norm ; audio_dec_block.cross_attention.out_layer
  audio_dec_block.feed_forward.net.0.proj ; audio_dec_block.feed_forward.net.2 ; va_cross_attention.to_query
  va_cross_attention.to_key ; va_cross_attention.to_value ; va_cross_attention.query_norm
  va_cross_attention.key_norm ; va_cross_attention.out_layer ; av_cross_attention.to_query
  av_cross_attention.to_key ; av_cross_attention.to_value ; av_cross_attention.query_norm
  av_cross_attention.key_norm ; av_cross_attention.out_layer ; va_modulation.out_layer ; av_modulation.out_layer
""",
)

KANDINSKY6 = Family(
    name="kandinsky6",
    components={"transformer": KANDINSKY6_TRANSFORMER, "text_encoder": QWEN2_5_VL, "text_encoder_2": CLIP},
    model_classes=("Kandinsky6Transformer3DModel",),
    depths={"visual_transformer_blocks": (60,)},
    encoders={"text_encoder": "qwen25_7b", "text_encoder_2": "clip_l"},
)

# The super-resolution model beside it reads no text.
KANDINSKY6_SR = Family(
    name="kandinsky6-sr",
    components={
        "transformer": Names(
            same="""
pooled_bias (p) ; time_embeddings.timestep_embedder.linear_1 ; time_embeddings.timestep_embedder.linear_2
visual_embeddings.in_layer ; out_layer.modulation.out_layer ; out_layer.out_layer
[visual_transformer_blocks.{i}]
  visual_modulation.out_layer ; self_attention.to_query ; self_attention.to_key ; self_attention.to_value
  self_attention.query_norm ; self_attention.key_norm ; self_attention.out_layer ; feed_forward.net.0.proj
  feed_forward.net.2
"""
        )
    },
    model_classes=("Kandinsky6SRTransformer3DModel",),
)
