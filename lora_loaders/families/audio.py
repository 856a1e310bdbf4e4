"""Music and sound models for which diffusers has a denoiser but no LoRA loader."""

from .family import Family, Shape
from .rules import Names
from .text_encoders import LANGUAGE_MODEL, T5

# As in the published checkpoint, which fuses what diffusers splits.
STABLE_AUDIO_TRANSFORMER = Names(
    """
to_timestep_embed.0 -> timestep_proj.0 ; to_timestep_embed.2 -> timestep_proj.2
to_global_embed.0 -> global_proj.0 ; to_global_embed.2 -> global_proj.2
to_cond_embed.0 -> cross_attention_proj.0 ; to_cond_embed.2 -> cross_attention_proj.2
transformer.project_in -> proj_in ; transformer.project_out -> proj_out
[transformer.layers.{i} -> transformer_blocks.{i}]
  self_attn.to_qkv -> attn1.to_q | attn1.to_k | attn1.to_v ; self_attn.to_out -> attn1.to_out.0
  cross_attn.to_q -> attn2.to_q ; cross_attn.to_kv -> attn2.to_k | attn2.to_v ; cross_attn.to_out -> attn2.to_out.0
  pre_norm -> norm1 ; cross_attend_norm -> norm2 ; ff_norm -> norm3
  ff.ff.0.proj -> ff.net.0.proj ; ff.ff.2 -> ff.net.2
[transformer_blocks.{i}.attn2]
  to_qkv -> to_q:2 | to_k | to_v (r) ; qkv -> to_q:2 | to_k | to_v (r)
""",
    same="""
time_proj ; preprocess_conv ; postprocess_conv
""",
)

STABLE_AUDIO = Family(
    name="stable-audio",
    components={"transformer": STABLE_AUDIO_TRANSFORMER, "text_encoder": T5},
    model_classes=("StableAudioDiTModel",),
    depths={"transformer_blocks": (24,)},
    shapes=(Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (1536, 1536)),),
)

STABLE_AUDIO3_TRANSFORMER = Names(
    same="""
prompt_padding_embedding (p) ; memory_tokens (p) ; to_timestep_embed.0 ; to_timestep_embed.2 ; to_cond_embed.0
to_cond_embed.2 ; to_global_embed.0 ; to_global_embed.2 ; global_cond_embedder.0 ; global_cond_embedder.2
preprocess_conv ; postprocess_conv ; proj_in ; proj_out
[transformer_blocks.{i}]
  to_scale_shift_gate (p) ; pre_norm.gamma (p) ; self_attn.to_qkv ; self_attn.to_out ; self_attn.q_norm.gamma (p)
  self_attn.k_norm.gamma (p) ; cross_attend_norm.gamma (p) ; cross_attn.to_q ; cross_attn.to_kv ; cross_attn.to_out
  cross_attn.q_norm.gamma (p) ; cross_attn.k_norm.gamma (p) ; ff_norm.gamma (p) ; ff.proj_in ; ff.proj_out
  to_local_embed.0 ; to_local_embed.2
""",
)

STABLE_AUDIO3 = Family(
    name="stable-audio-3",
    components={"transformer": STABLE_AUDIO3_TRANSFORMER, "text_encoder": LANGUAGE_MODEL},
    model_classes=("StableAudio3DiTModel",),
)

LONGCAT_AUDIO_TRANSFORMER = Names(
    same="""
time_embed.time_mlp.0 ; time_embed.time_mlp.2 ; input_embed.proj.0 ; input_embed.proj.2 ; text_embed.proj.0
text_embed.proj.2 ; norm_out.linear ; proj_out ; adaln_global_mlp.mlp.1 ; text_conv_layer.0.dwconv
text_conv_layer.0.norm ; text_conv_layer.0.pwconv1 ; text_conv_layer.0.grn.gamma (p)
text_conv_layer.0.grn.beta (p) ; text_conv_layer.0.pwconv2 ; text_conv_layer.1.dwconv ; text_conv_layer.1.norm
text_conv_layer.1.pwconv1 ; text_conv_layer.1.grn.gamma (p) ; text_conv_layer.1.grn.beta (p)
text_conv_layer.1.pwconv2 ; text_conv_layer.2.dwconv ; text_conv_layer.2.norm ; text_conv_layer.2.pwconv1
text_conv_layer.2.grn.gamma (p) ; text_conv_layer.2.grn.beta (p) ; text_conv_layer.2.pwconv2
text_conv_layer.3.dwconv ; text_conv_layer.3.norm ; text_conv_layer.3.pwconv1 ; text_conv_layer.3.grn.gamma (p)
text_conv_layer.3.grn.beta (p) ; text_conv_layer.3.pwconv2 ; latent_embed.proj.0 ; latent_embed.proj.2
latent_cond_embedder.proj.0 ; latent_cond_embedder.proj.2
[blocks.{i}]
  adaln_scale_shift (p) ; self_attn.to_q ; self_attn.to_k ; self_attn.to_v ; self_attn.q_norm ; self_attn.k_norm
  self_attn.to_out.0 ; cross_attn.to_q ; cross_attn.to_k ; cross_attn.to_v ; cross_attn.q_norm ; cross_attn.k_norm
  cross_attn.to_out.0 ; ffn.ff.0 ; ffn.ff.3
""",
)

LONGCAT_AUDIO = Family(
    name="longcat-audio",
    components={"transformer": LONGCAT_AUDIO_TRANSFORMER, "text_encoder": T5},
    model_classes=("LongCatAudioDiTTransformer",),
    depths={"blocks": (24,)},
)

MINIMAX_MUSIC3_TRANSFORMER = Names(
    same="""
time_proj ; time_embed.linear_1 ; time_embed.linear_2 ; preprocess_conv ; proj_in ; proj_out ; postprocess_conv
[transformer_blocks.{i}]
  norm1 ; attn.to_q ; attn.to_k ; attn.to_v ; attn.to_out.0 ; norm2 ; ff_in ; ff_out
""",
)

MINIMAX_MUSIC3 = Family(
    name="minimax-music3",
    components={"transformer": MINIMAX_MUSIC3_TRANSFORMER},
    model_classes=("MiniMaxMusic3Transformer1DModel",),
    depths={"transformer_blocks": (36,)},
    shapes=(Shape("transformer", "transformer_blocks.{i}.attn.to_q", (2048, 2048)),),
)
