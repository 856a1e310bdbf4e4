"""UNets beside Stable Diffusion's own: motion and video, Kandinsky 2 and 3, DeepFloyd IF, DreamLite, AudioLDM 2."""

from .family import Family, Shape
from .rules import Names
from .sd import BLOCK, DIFFUSERS, LEVELS15, LEVELSXL, MIDDLE, original_rows
from .text_encoders import CLIP, T5

# AnimateDiff: Stable Diffusion with a motion module behind each resnet. Motion LoRAs of the first release name the
# modules as the original code does.
MOTION_PARTS = (
    "down_blocks.{i}.motion_modules.{j}",
    "up_blocks.{i}.motion_modules.{j}",
    "mid_block.motion_modules.{j}",
)
MOTION = "\n".join(
    f"""
[{part}.temporal_transformer -> {part}]
  norm -> norm ; proj_in -> proj_in ; proj_out -> proj_out
[{part}.temporal_transformer.transformer_blocks.{{k}} -> {part}.transformer_blocks.{{k}}]
  norms.0 -> norm1 ; norms.1 -> norm2 ; ff_norm -> norm3 ; ff.net.0.proj -> ff.net.0.proj ; ff.net.2 -> ff.net.2
[{part}.temporal_transformer.transformer_blocks.{{k}}.attention_blocks.0 -> {part}.transformer_blocks.{{k}}.attn1]
[{part}.temporal_transformer.transformer_blocks.{{k}}.attention_blocks.1 -> {part}.transformer_blocks.{{k}}.attn2]
  to_q -> to_q ; to_k -> to_k ; to_v -> to_v ; to_out.0 -> to_out.0
"""
    for part in MOTION_PARTS
)
# Early modules have none in the middle, and SDXL's has no embedding of sizes that 1.5 lacks.
MOTION_ABSENT = ("add_embedding.linear_{i}", MIDDLE, "mid_block.motion_modules.**")
ANIMATEDIFF = Family(
    name="animatediff",
    components={
        "unet": Names(MOTION, same=DIFFUSERS, extra=original_rows(LEVELS15), absent=MOTION_ABSENT),
        "text_encoder": CLIP,
    },
    model_classes=("UNetMotionModel",),
    extends="sd15",
    shapes=(Shape("unet", "down_blocks.{i}.attentions.{j}.transformer_blocks.{k}.attn2.to_k", (None, 768)),),
    encoders={"text_encoder": "clip_l"},
    trainer_names="diffusers",
)
ANIMATEDIFF_XL = Family(
    name="animatediff-xl",
    components={
        "unet": Names(MOTION, same=DIFFUSERS, extra=original_rows(LEVELSXL), absent=MOTION_ABSENT),
        "text_encoder": CLIP,
        "text_encoder_2": CLIP,
    },
    model_classes=("UNetMotionModel",),
    extends="sdxl",
    shapes=(Shape("unet", "down_blocks.{i}.attentions.{j}.transformer_blocks.{k}.attn2.to_k", (None, 2048)),),
    config_facts={"addition_embed_type": "text_time"},
    encoders={"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
)

SPATIO_TEMPORAL = """
  spatial_res_block.norm1 ; spatial_res_block.conv1 ; spatial_res_block.time_emb_proj ; spatial_res_block.norm2
  spatial_res_block.conv2 ; temporal_res_block.norm1 ; temporal_res_block.conv1 ; temporal_res_block.time_emb_proj
  temporal_res_block.norm2 ; temporal_res_block.conv2 ; time_mixer.mix_factor (p)
"""
SVD = Family(
    name="svd",
    components={
        "unet": Names(
            same=f"""
conv_in ; time_embedding.linear_1 ; time_embedding.linear_2 ; add_embedding.linear_1 ; add_embedding.linear_2
conv_norm_out ; conv_out
[down_blocks.{{i}}.attentions.{{j}} ; up_blocks.{{i}}.attentions.{{j}} ; mid_block.attentions.{{j}}]
  norm ; proj_in ; time_pos_embed.linear_1 ; time_pos_embed.linear_2 ; time_mixer.mix_factor (p) ; proj_out
[down_blocks.{{i}}.attentions.{{j}}.transformer_blocks.{{k}} ; mid_block.attentions.{{j}}.transformer_blocks.{{k}}]
[up_blocks.{{i}}.attentions.{{j}}.transformer_blocks.{{k}}]
{BLOCK}
[down_blocks.{{i}}.attentions.{{j}}.temporal_transformer_blocks.{{k}}]
[up_blocks.{{i}}.attentions.{{j}}.temporal_transformer_blocks.{{k}}]
[mid_block.attentions.{{j}}.temporal_transformer_blocks.{{k}}]
  norm_in ; ff_in.net.0.proj ; ff_in.net.2
{BLOCK}
[down_blocks.{{i}}.resnets.{{j}} ; up_blocks.{{i}}.resnets.{{j}}]
  spatial_res_block.conv_shortcut
[down_blocks.{{i}}.resnets.{{j}} ; up_blocks.{{i}}.resnets.{{j}} ; mid_block.resnets.{{j}}]
{SPATIO_TEMPORAL}
[down_blocks.{{i}}]
  downsamplers.0.conv
[up_blocks.{{i}}]
  upsamplers.0.conv
"""
        )
    },
    model_classes=("UNetSpatioTemporalConditionModel",),
    shapes=(Shape("unet", "down_blocks.{i}.attentions.{j}.temporal_transformer_blocks.{k}.attn2.to_k", (None, 1024)),),
)

VIDEO_UNET = f"""
conv_in ; time_embedding.linear_1 ; time_embedding.linear_2 ; transformer_in.norm ; transformer_in.proj_in
transformer_in.proj_out ; conv_norm_out ; conv_out
[transformer_in.transformer_blocks.{{i}} ; down_blocks.{{i}}.attentions.{{j}}.transformer_blocks.{{k}}]
[down_blocks.{{i}}.temp_attentions.{{j}}.transformer_blocks.{{k}} ; mid_block.attentions.{{i}}.transformer_blocks.{{j}}]
[up_blocks.{{i}}.attentions.{{j}}.transformer_blocks.{{k}} ; mid_block.temp_attentions.{{i}}.transformer_blocks.{{j}}]
[up_blocks.{{i}}.temp_attentions.{{j}}.transformer_blocks.{{k}}]
{BLOCK}
[down_blocks.{{i}}.resnets.{{j}} ; up_blocks.{{i}}.resnets.{{j}}]
  conv_shortcut
[down_blocks.{{i}}.resnets.{{j}} ; up_blocks.{{i}}.resnets.{{j}} ; mid_block.resnets.{{i}}]
  norm1 ; conv1 ; time_emb_proj ; norm2 ; conv2
[down_blocks.{{i}}.temp_convs.{{j}} ; up_blocks.{{i}}.temp_convs.{{j}} ; mid_block.temp_convs.{{i}}]
  conv1.0 ; conv1.2 ; conv2.0 ; conv2.3 ; conv3.0 ; conv3.3 ; conv4.0 ; conv4.3
[down_blocks.{{i}}.attentions.{{j}} ; down_blocks.{{i}}.temp_attentions.{{j}} ; up_blocks.{{i}}.attentions.{{j}}]
[up_blocks.{{i}}.temp_attentions.{{j}} ; mid_block.attentions.{{i}} ; mid_block.temp_attentions.{{i}}]
  norm ; proj_in ; proj_out
[down_blocks.{{i}}]
  downsamplers.0.conv
[up_blocks.{{i}}]
  upsamplers.0.conv
"""
TEXT_TO_VIDEO = Family(
    name="text-to-video",
    components={"unet": Names(same=VIDEO_UNET), "text_encoder": CLIP},
    model_classes=("UNet3DConditionModel",),
    shapes=(Shape("unet", "down_blocks.{i}.attentions.{j}.transformer_blocks.{k}.attn2.to_k", (None, 1024)),),
)
I2VGEN_XL = Family(
    name="i2vgen-xl",
    components={
        "unet": Names(
            same=VIDEO_UNET
            + """
image_latents_proj_in.0 ; image_latents_proj_in.2 ; image_latents_proj_in.4 ; image_latents_temporal_encoder.norm1
image_latents_context_embedding.0 ; image_latents_context_embedding.3 ; image_latents_context_embedding.5
context_embedding.0 ; context_embedding.2 ; fps_embedding.0 ; fps_embedding.2
[image_latents_temporal_encoder]
  attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0 ; ff.net.0.proj ; ff.net.2
"""
        ),
        "text_encoder": CLIP,
    },
    model_classes=("I2VGenXLUNet",),
    extends="text-to-video",
)

# Kandinsky 2 and DeepFloyd IF attend without transformer blocks, keys of text and picture side by side.
ADDED_KEYS = Names(
    same="""
conv_in ; conv_norm_out ; conv_out ; time_embedding.linear_1 ; time_embedding.linear_2
encoder_hid_proj ; encoder_hid_proj.image_embeds ; encoder_hid_proj.image_proj ; encoder_hid_proj.text_proj
encoder_hid_proj.norm ; add_embedding.norm1 ; add_embedding.proj ; add_embedding.norm2 ; add_embedding.text_proj
add_embedding.text_norm ; add_embedding.image_proj ; add_embedding.image_norm ; add_embedding.pool.k_proj
add_embedding.pool.q_proj ; add_embedding.pool.v_proj ; add_embedding.pool.positional_embedding (p)
class_embedding.linear_1 ; class_embedding.linear_2
[down_blocks.{i}.attentions.{j} ; up_blocks.{i}.attentions.{j} ; mid_block.attentions.{j}]
  group_norm ; norm_cross ; to_q ; to_k ; to_v ; add_k_proj ; add_v_proj ; to_out.0
[down_blocks.{i}.resnets.{j} ; up_blocks.{i}.resnets.{j} ; mid_block.resnets.{j}]
[down_blocks.{i}.downsamplers.{j} ; up_blocks.{i}.upsamplers.{j}]
  norm1 ; conv1 ; time_emb_proj ; norm2 ; conv2 ; conv_shortcut
""",
    absent=(
        *("encoder_hid_proj", "encoder_hid_proj.**", "add_embedding.**", "class_embedding.**"),
        *("mid_block.resnets.{j}.conv_shortcut", "down_blocks.{i}.downsamplers.{j}.conv_shortcut"),
        *("up_blocks.{i}.upsamplers.{j}.conv_shortcut", "down_blocks.{i}.attentions.{j}.norm_cross"),
        *("up_blocks.{i}.attentions.{j}.norm_cross", "mid_block.attentions.{j}.norm_cross"),
    ),
)
KANDINSKY2 = Family(
    name="kandinsky2",
    components={"unet": ADDED_KEYS, "text_encoder": CLIP},
    model_classes=("UNet2DConditionModel",),
    shapes=(Shape("unet", "mid_block.attentions.{j}.add_k_proj", (None, 768)),),
    config_facts={"cross_attention_dim": 768, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
)
DEEPFLOYD_IF = Family(
    name="deepfloyd-if",
    components={"unet": ADDED_KEYS, "text_encoder": T5},
    model_classes=("UNet2DConditionModel",),
    config_facts={"encoder_hid_dim": 4096, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
)
KANDINSKY2_PRIOR = Family(
    name="kandinsky2-prior",
    components={
        "prior": Names(
            same="""
positional_embedding (p) ; prd_embedding (p) ; clip_mean (p) ; clip_std (p) ; time_embedding.linear_1
time_embedding.linear_2 ; proj_in ; embedding_proj ; encoder_hidden_states_proj ; norm_out ; proj_to_clip_embeddings
[transformer_blocks.{i}]
  norm1 ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0 ; norm3 ; ff.net.0.proj ; ff.net.2
"""
        ),
        "text_encoder": CLIP,
    },
    model_classes=("PriorTransformer",),
    depths={"transformer_blocks": (20,)},
    shapes=(Shape("prior", "transformer_blocks.{i}.attn1.to_q", (2048, 2048)),),
)
KANDINSKY3 = Family(
    name="kandinsky3",
    components={
        "unet": Names(
            same="""
time_embedding.linear_1 ; time_embedding.linear_2 ; conv_in ; encoder_hid_proj.projection_linear
encoder_hid_proj.projection_norm ; conv_norm_out ; conv_out
[add_time_condition.attention]
  to_q ; to_k ; to_v ; to_out.0
[down_blocks.{i}.resnets_in.{j} ; up_blocks.{i}.resnets_out.{j}]
  shortcut_projection
[down_blocks.{i}.resnets_in.{j}.resnet_blocks.{k} ; up_blocks.{i}.resnets_out.{j}.resnet_blocks.{k}]
[down_blocks.{i}.resnets_out.{j}.resnet_blocks.{k} ; up_blocks.{i}.resnets_in.{j}.resnet_blocks.{k}]
  group_norm.context_mlp.1 ; projection
[down_blocks.{i}.resnets_out.{j}]
  shortcut_down_sample ; resnet_blocks.{k}.down_sample
[up_blocks.{i}.resnets_in.{j}]
  shortcut_up_sample ; resnet_blocks.{k}.up_sample
[down_blocks.{i}.attentions.{j} ; up_blocks.{i}.attentions.{j}]
  in_norm.context_mlp.1 ; attention.to_q ; attention.to_k ; attention.to_v ; attention.to_out.0
  out_norm.context_mlp.1 ; feed_forward.0 ; feed_forward.2
"""
        ),
        "text_encoder": T5,
    },
    model_classes=("Kandinsky3UNet",),
)
DREAMLITE = Family(
    name="dreamlite",
    components={
        "unet": Names(
            same=f"""
conv_in ; time_embedding.linear_1 ; time_embedding.linear_2 ; conv_norm_out ; conv_out
[down_blocks.{{i}}.attentions.{{j}} ; up_blocks.{{i}}.attentions.{{j}} ; mid_block.attentions.{{j}}]
  norm ; proj_in ; proj_out
[down_blocks.{{i}}.attentions.{{j}}.transformer_blocks.{{k}} ; mid_block.attentions.{{j}}.transformer_blocks.{{k}}]
[up_blocks.{{i}}.attentions.{{j}}.transformer_blocks.{{k}}]
  attn1.norm_q ; attn1.norm_k ; attn2.norm_q ; attn2.norm_k
{BLOCK}
[down_blocks.{{i}}.resnets.{{j}} ; up_blocks.{{i}}.resnets.{{j}}]
  conv_shortcut
[down_blocks.{{i}}.resnets.{{j}} ; up_blocks.{{i}}.resnets.{{j}} ; mid_block.resnets.{{j}}]
  norm1 ; conv1.depthwise ; conv1.pointwise ; time_emb_proj ; norm2 ; conv2.depthwise ; conv2.pointwise
[down_blocks.{{i}}]
  downsamplers.0.conv
[up_blocks.{{i}}]
  upsamplers.0.conv
""",
            # Its queries share one key.
            fuses=False,
        )
    },
    model_classes=("DreamLiteUNetModel",),
)
AUDIOLDM2 = Family(
    name="audioldm2",
    components={"unet": Names(same=DIFFUSERS, absent=("add_embedding.linear_{i}", MIDDLE))},
    model_classes=("AudioLDM2UNet2DConditionModel",),
    extends="sd15",
)
