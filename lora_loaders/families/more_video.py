"""Video and world models for which diffusers has a denoiser but no LoRA loader; names are equal on both sides."""

from .family import Family, Shape
from .rules import Names
from .text_encoders import LANGUAGE_MODEL, QWEN2_5_VL, T5

ALLEGRO_TRANSFORMER = Names(
    same="""
scale_shift_table (p) ; pos_embed.proj ; proj_out ; adaln_single.emb.timestep_embedder.linear_1
adaln_single.emb.timestep_embedder.linear_2 ; adaln_single.linear ; caption_projection.linear_1
caption_projection.linear_2
[transformer_blocks.{i}]
  scale_shift_table (p) ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0 ; attn2.to_q ; attn2.to_k
  attn2.to_v ; attn2.to_out.0 ; ff.net.0.proj ; ff.net.2
""",
)

ALLEGRO = Family(
    name="allegro",
    components={"transformer": ALLEGRO_TRANSFORMER, "text_encoder": T5},
    model_classes=("AllegroTransformer3DModel",),
    depths={"transformer_blocks": (32,)},
    shapes=(Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (2304, 2304)),),
)

LATTE_TRANSFORMER = Names(
    same="""
scale_shift_table (p) ; pos_embed.proj ; proj_out ; adaln_single.emb.timestep_embedder.linear_1
adaln_single.emb.timestep_embedder.linear_2 ; adaln_single.linear ; caption_projection.linear_1
caption_projection.linear_2
[transformer_blocks.{i}]
  scale_shift_table (p) ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0 ; attn2.to_q ; attn2.to_k
  attn2.to_v ; attn2.to_out.0 ; ff.net.0.proj ; ff.net.2
[temporal_transformer_blocks.{i}]
  scale_shift_table (p) ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0 ; ff.net.0.proj ; ff.net.2
""",
)

LATTE = Family(
    name="latte",
    components={"transformer": LATTE_TRANSFORMER, "text_encoder": T5},
    model_classes=("LatteTransformer3DModel",),
    depths={"transformer_blocks": (28,), "temporal_transformer_blocks": (28,)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (1152, 1152)),
        Shape("transformer", "transformer_blocks.{i}.attn2.to_k", (1152, 1152)),
        Shape("transformer", "temporal_transformer_blocks.{i}.attn1.to_q", (1152, 1152)),
    ),
)

EASYANIMATE_TRANSFORMER = Names(
    same="""
time_embedding.linear_1 ; time_embedding.linear_2 ; proj ; text_proj.0 ; text_proj.1 ; norm_final ; norm_out.linear
norm_out.norm ; proj_out
[transformer_blocks.{i}]
  norm1.linear ; norm1.norm ; attn1.norm_q ; attn1.norm_k ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.add_k_proj
  attn1.add_v_proj ; attn1.add_q_proj ; attn1.to_out.0 ; attn1.to_add_out ; attn1.norm_added_q ; attn1.norm_added_k
  norm2.linear ; norm2.norm ; ff.net.0.proj ; ff.net.2 ; txt_ff.net.0.proj ; txt_ff.net.2
""",
)

EASYANIMATE = Family(
    name="easyanimate",
    components={"transformer": EASYANIMATE_TRANSFORMER, "text_encoder": QWEN2_5_VL},
    model_classes=("EasyAnimateTransformer3DModel",),
    depths={"transformer_blocks": (48,)},
    shapes=(Shape("transformer", "transformer_blocks.{i}.attn1.to_q", (3072, 3072)),),
)

MOTIF_VIDEO_TRANSFORMER = Names(
    same="""
x_embedder.proj ; context_embedder.linear_1 ; context_embedder.linear_2 ; time_text_embed.timestep_embedder.linear_1
time_text_embed.timestep_embedder.linear_2 ; image_embedder.norm_in ; image_embedder.linear_1 ; image_embedder.linear_2
image_embedder.norm_out ; norm_out.linear ; proj_out
[transformer_blocks.{i}]
  norm1.linear ; norm1_context.linear ; attn.to_q ; attn.to_k ; attn.to_v ; attn.norm_q ; attn.norm_k
  attn.to_out.0 ; attn.norm_added_q ; attn.norm_added_k ; attn.add_q_proj ; attn.add_k_proj ; attn.add_v_proj
  attn.to_add_out ; ff.net.0.proj ; ff.net.2 ; ff_context.net.0.proj ; ff_context.net.2
[single_transformer_blocks.{i}]
  attn.to_q ; attn.to_k ; attn.to_v ; attn.norm_q ; attn.norm_k ; norm.linear ; proj_mlp ; proj_out
[transformer_blocks.{i}.cross_attn ; single_transformer_blocks.{i}.cross_attn]
  to_q ; to_k ; to_v ; to_out.0 ; norm_q ; norm_k
""",
)

MOTIF_VIDEO = Family(
    name="motif-video",
    components={"transformer": MOTIF_VIDEO_TRANSFORMER, "text_encoder": LANGUAGE_MODEL},
    model_classes=("MotifVideoTransformer3DModel",),
    depths={"transformer_blocks": (12,), "single_transformer_blocks": (24,)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (1536, 1536)),
        Shape("transformer", "single_transformer_blocks.{i}.attn.to_q", (1536, 1536)),
    ),
)

COSMOS3_TRANSFORMER = Names(
    """
[layers.{i}.self_attn]
  to_qkv -> to_q:4 | to_k | to_v (r) ; qkv -> to_q:4 | to_k | to_v (r)
  to_added_qkv -> add_q_proj:4 | add_k_proj | add_v_proj (r) ; added_qkv -> add_q_proj:4 | add_k_proj | add_v_proj (r)
""",
    same="""
embed_tokens ; norm ; norm_moe_gen ; lm_head ; proj_in ; proj_out ; time_embedder.linear_1 ; time_embedder.linear_2
[layers.{i}]
  self_attn.to_q ; self_attn.to_k ; self_attn.to_v ; self_attn.to_out ; self_attn.norm_q ; self_attn.norm_k
  self_attn.add_q_proj ; self_attn.add_k_proj ; self_attn.add_v_proj ; self_attn.to_add_out ; self_attn.norm_added_q
  self_attn.norm_added_k ; mlp.gate_proj ; mlp.up_proj ; mlp.down_proj ; mlp_moe_gen.gate_proj ; mlp_moe_gen.up_proj
  mlp_moe_gen.down_proj ; input_layernorm ; input_layernorm_moe_gen ; post_attention_layernorm
  post_attention_layernorm_moe_gen
""",
)

COSMOS3 = Family(
    name="cosmos3",
    components={"transformer": COSMOS3_TRANSFORMER},
    model_classes=("Cosmos3OmniTransformer",),
    depths={"layers": (36,)},
)

SANA_WM_TRANSFORMER = Names(
    same="""
t_embedder.linear_1 ; t_embedder.linear_2 ; attention_y_norm ; t_block.1 ; x_embedder.proj ; y_embedder.y_proj.fc1
y_embedder.y_proj.fc2 ; plucker_embedder.proj ; raymap_embedder.proj ; final_layer.scale_shift_table (p)
final_layer.linear
[blocks.{i}]
  scale_shift_table (p) ; plucker_proj ; attn.A_log (p) ; attn.dt_bias (p) ; attn.qkv ; attn.proj ; attn.q_norm
  attn.k_norm ; attn.beta_proj ; attn.gate_proj ; attn.output_gate ; attn.conv_k ; attn.q_proj_cam ; attn.k_proj_cam
  attn.v_proj_cam ; attn.out_proj_cam ; attn.q_norm_cam ; attn.k_norm_cam ; attn.conv_k_cam ; cross_attn.q_linear
  cross_attn.kv_linear ; cross_attn.proj ; cross_attn.q_norm ; cross_attn.k_norm ; mlp.inverted_conv.conv
  mlp.depth_conv.conv ; mlp.point_conv.conv ; mlp.t_conv
""",
)

SANA_WM = Family(
    name="sana-wm",
    components={"transformer": SANA_WM_TRANSFORMER, "text_encoder": LANGUAGE_MODEL},
    model_classes=("SanaWMTransformer3DModel",),
)
