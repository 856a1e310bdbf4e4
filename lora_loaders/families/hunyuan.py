"""HunyuanVideo, FramePack, HunyuanVideo 1.5 and HunyuanImage 2.1.

ComfyUI's own names are written as the original's: it reads only some of the published ones (comfy/lora.py), and
trainers' files are renamed for it (`convert_hunyuan_*_lora_to_comfy.py` of sd-scripts and musubi-tuner).
"""

from .family import Family, Shape
from .headers import kohya, model_spec
from .rules import Names
from .text_encoders import CLIP, LLAVA, QWEN2_5_VL, T5

# The token refiner's modulation, unlike the last one, keeps the order of its halves.
ROWS = """
img_in.proj -> x_embedder.proj
final_layer.linear -> proj_out ; final_layer.adaLN_modulation.1 -> norm_out.linear ~
txt_in.input_embedder -> context_embedder.proj_in
[txt_in -> context_embedder.time_text_embed]
  t_embedder.in_layer -> timestep_embedder.linear_1 ; t_embedder.out_layer -> timestep_embedder.linear_2
  c_embedder.in_layer -> text_embedder.linear_1 ; c_embedder.out_layer -> text_embedder.linear_2
[txt_in.individual_token_refiner.blocks.{i} -> context_embedder.token_refiner.refiner_blocks.{i}]
  self_attn.qkv -> attn.to_q | attn.to_k | attn.to_v ; self_attn.proj -> attn.to_out.0
  mlp.0 -> ff.net.0.proj ; mlp.2 -> ff.net.2 ; adaLN_modulation.1 -> norm_out.linear ; norm1 -> norm1 ; norm2 -> norm2
[double_blocks.{i} -> transformer_blocks.{i}]
  img_attn.qkv -> attn.to_q | attn.to_k | attn.to_v
  txt_attn.qkv -> attn.add_q_proj | attn.add_k_proj | attn.add_v_proj
  img_attn.proj -> attn.to_out.0 ; txt_attn.proj -> attn.to_add_out
  img_mod.lin -> norm1.linear ; txt_mod.lin -> norm1_context.linear
  img_mlp.0 -> ff.net.0.proj ; img_mlp.2 -> ff.net.2
  txt_mlp.0 -> ff_context.net.0.proj ; txt_mlp.2 -> ff_context.net.2
  img_attn.norm.query_norm -> attn.norm_q ; img_attn.norm.key_norm -> attn.norm_k
  txt_attn.norm.query_norm -> attn.norm_added_q ; txt_attn.norm.key_norm -> attn.norm_added_k
"""
# Their names in the published checkpoint, which trainers flatten, where those differ.
PUBLISHED = """
[txt_in -> context_embedder.time_text_embed]
  t_embedder.mlp.0 -> timestep_embedder.linear_1 ; t_embedder.mlp.2 -> timestep_embedder.linear_2
  c_embedder.linear_1 -> text_embedder.linear_1 ; c_embedder.linear_2 -> text_embedder.linear_2
[txt_in.individual_token_refiner.blocks.{i} -> context_embedder.token_refiner.refiner_blocks.{i}]
  self_attn_qkv -> attn.to_q | attn.to_k | attn.to_v ; self_attn_proj -> attn.to_out.0
  mlp.fc1 -> ff.net.0.proj ; mlp.fc2 -> ff.net.2
[double_blocks.{i} -> transformer_blocks.{i}]
  img_attn_proj -> attn.to_out.0 ; txt_attn_proj -> attn.to_add_out
  img_mod.linear -> norm1.linear ; txt_mod.linear -> norm1_context.linear
  img_mlp.fc1 -> ff.net.0.proj ; img_mlp.fc2 -> ff.net.2
  txt_mlp.fc1 -> ff_context.net.0.proj ; txt_mlp.fc2 -> ff_context.net.2
  img_attn_q_norm -> attn.norm_q ; img_attn_k_norm -> attn.norm_k
  txt_attn_q_norm -> attn.norm_added_q ; txt_attn_k_norm -> attn.norm_added_k
"""
# OneTrainer's, as published but for a few of its own.
OMI = """
[txt_in -> context_embedder.time_text_embed]
  t_embedder.linear_1 -> timestep_embedder.linear_1 ; t_embedder.linear_2 -> timestep_embedder.linear_2
  c_embedder.linear_1 -> text_embedder.linear_1 ; c_embedder.linear_2 -> text_embedder.linear_2
[txt_in.individual_token_refiner.blocks.{i} -> context_embedder.token_refiner.refiner_blocks.{i}]
  self_attn_qkv.0 -> attn.to_q ; self_attn_qkv.1 -> attn.to_k ; self_attn_qkv.2 -> attn.to_v
  self_attn_proj -> attn.to_out.0 ; mlp.fc0 -> ff.net.0.proj ; mlp.fc2 -> ff.net.2
[double_blocks.{i} -> transformer_blocks.{i}]
  img_attn_qkv.0 -> attn.to_q ; img_attn_qkv.1 -> attn.to_k ; img_attn_qkv.2 -> attn.to_v
  txt_attn_qkv.0 -> attn.add_q_proj ; txt_attn_qkv.1 -> attn.add_k_proj ; txt_attn_qkv.2 -> attn.add_v_proj
  img_attn_proj -> attn.to_out.0 ; txt_attn_proj -> attn.to_add_out
  img_mod.linear -> norm1.linear ; txt_mod.linear -> norm1_context.linear
  img_mlp.fc0 -> ff.net.0.proj ; img_mlp.fc2 -> ff.net.2
  txt_mlp.fc0 -> ff_context.net.0.proj ; txt_mlp.fc2 -> ff_context.net.2
[single_blocks.{i} -> single_transformer_blocks.{i}]
  modulation.linear -> norm.linear
"""
SINGLE = """
[single_blocks.{i} -> single_transformer_blocks.{i}]
  linear1 -> attn.to_q | attn.to_k | attn.to_v | proj_mlp:4 ; linear2 -> proj_out
  modulation.lin -> norm.linear ; norm.query_norm -> attn.norm_q ; norm.key_norm -> attn.norm_k
"""
PUBLISHED_FUSED = """
[double_blocks.{i} -> transformer_blocks.{i}]
  img_attn_qkv -> attn.to_q | attn.to_k | attn.to_v
  txt_attn_qkv -> attn.add_q_proj | attn.add_k_proj | attn.add_v_proj
[single_blocks.{i} -> single_transformer_blocks.{i}]
  modulation.linear -> norm.linear ; q_norm -> attn.norm_q ; k_norm -> attn.norm_k
"""
# 1.5 and HunyuanImage were published with split attention; sd-scripts fuses HunyuanImage's, musubi-tuner leaves 1.5's.
SPLIT = """
[double_blocks.{i} -> transformer_blocks.{i}]
  img_attn_q -> attn.to_q ; img_attn_k -> attn.to_k ; img_attn_v -> attn.to_v
  txt_attn_q -> attn.add_q_proj ; txt_attn_k -> attn.add_k_proj ; txt_attn_v -> attn.add_v_proj
"""
SPLIT_IMAGE = """
[double_blocks.{i} -> transformer_blocks.{i}]
  img_attn_q -> attn.to_q (r) ; img_attn_k -> attn.to_k (r) ; img_attn_v -> attn.to_v (r)
  txt_attn_q -> attn.add_q_proj (r) ; txt_attn_k -> attn.add_k_proj (r) ; txt_attn_v -> attn.add_v_proj (r)
[single_blocks.{i} -> single_transformer_blocks.{i}]
  linear1_q -> attn.to_q (r) ; linear1_k -> attn.to_k (r) ; linear1_v -> attn.to_v (r)
  linear1_mlp -> proj_mlp (r) ; linear2.fc -> proj_out (r)
"""
BYT5 = """
[byt5_in -> context_embedder_2]
  layernorm -> norm ; fc1 -> linear_1 ; fc2 -> linear_2 ; fc3 -> linear_3
"""
VIDEO = """
vector_in.in_layer -> time_text_embed.text_embedder.linear_1
vector_in.out_layer -> time_text_embed.text_embedder.linear_2
"""
VIDEO15 = """
cond_type_embedding -> cond_type_embed
[vision_in.proj -> image_embedder]
  0 -> norm_in ; 1 -> linear_1 ; 3 -> linear_2 ; 4 -> norm_out
"""


def embedder(name: str, path: str) -> tuple[str, str]:
    """Rows of an embedder of numbers, in ComfyUI and as published."""
    targets = f"{path}.linear_1", f"{path}.linear_2"
    return (
        f"{name}.in_layer -> {targets[0]} ; {name}.out_layer -> {targets[1]}\n",
        f"{name}.mlp.0 -> {targets[0]} ; {name}.mlp.2 -> {targets[1]}\n",
    )


TIME = embedder("time_in", "time_text_embed.timestep_embedder")
GUIDANCE = embedder("guidance_in", "time_text_embed.guidance_embedder")
TIME15 = embedder("time_in", "time_embed.timestep_embedder")
MEAN15 = embedder("time_r_in", "time_embed.timestep_embedder_r")
IMAGE_TIME = embedder("time_in", "time_guidance_embed.timestep_embedder")
IMAGE_GUIDANCE = embedder("guidance_in", "time_guidance_embed.guidance_embedder")
IMAGE_MEAN = embedder("time_r_in", "time_guidance_embed.timestep_embedder_r")

TRANSFORMER = Names(
    TIME[0] + GUIDANCE[0] + VIDEO + ROWS + SINGLE,
    trainer=TIME[1] + GUIDANCE[1] + PUBLISHED + PUBLISHED_FUSED,
    omi=TIME[1] + GUIDANCE[1] + OMI,
    same="""
clean_x_embedder.proj ; clean_x_embedder.proj_2x ; clean_x_embedder.proj_4x ; image_projection.up
image_projection.down
""",
    absent=(
        "time_text_embed.guidance_embedder.**",
        "clean_x_embedder.**",
        "image_projection.**",
    ),
)

TRANSFORMER15 = Names(
    TIME15[0] + MEAN15[0] + VIDEO15 + BYT5 + ROWS,
    trainer=TIME15[1] + MEAN15[1] + PUBLISHED + SPLIT,
    absent=("time_embed.timestep_embedder_r.**",),
)

IMAGE_TRANSFORMER = Names(
    IMAGE_TIME[0] + IMAGE_GUIDANCE[0] + IMAGE_MEAN[0] + BYT5 + ROWS + SINGLE,
    trainer=IMAGE_TIME[1] + IMAGE_GUIDANCE[1] + IMAGE_MEAN[1] + PUBLISHED + PUBLISHED_FUSED + SPLIT_IMAGE,
    absent=(
        "context_embedder_2.**",
        "time_guidance_embed.timestep_embedder_r.**",
        "time_guidance_embed.guidance_embedder.**",
    ),
)

HUNYUAN_VIDEO = Family(
    name="hunyuan-video",
    components={"transformer": TRANSFORMER, "text_encoder": LLAVA, "text_encoder_2": CLIP},
    model_classes=(
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
    ),
    depths={"transformer_blocks": (20,), "single_transformer_blocks": (40,)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn.to_out.0", (3072, 3072)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (3072, 3072)),
        Shape("transformer", "single_transformer_blocks.{i}.norm.linear", (9216, 3072)),
        Shape("transformer", "context_embedder.proj_in", (3072, 4096)),
    ),
    encoders={"text_encoder": "llama", "text_encoder_2": "clip_l"},
    trainer_names="trainer",
    headers={
        "kohya": kohya("lora", "hunyuan_video", "hunyuan-video", "https://github.com/Tencent/HunyuanVideo"),
        "onetrainer": model_spec("hunyuan-video"),
    },
)

HUNYUAN_VIDEO15 = Family(
    name="hunyuan-video-1.5",
    components={"transformer": TRANSFORMER15, "text_encoder": QWEN2_5_VL, "text_encoder_2": T5},
    model_classes=("HunyuanVideo15Transformer3DModel",),
    depths={"transformer_blocks": (54,)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn.to_out.0", (2048, 2048)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (2048, 2048)),
        Shape("transformer", "transformer_blocks.{i}.ff.net.0.proj", (8192, 2048)),
        Shape("transformer", "transformer_blocks.{i}.norm1.linear", (12288, 2048)),
        Shape("transformer", "context_embedder.proj_in", (2048, 3584)),
    ),
    encoders={"text_encoder": "qwen25_7b", "text_encoder_2": "byt5_small"},
    trainer_names="trainer",
    headers={
        "kohya": kohya(
            "lora_hv_1_5",
            "hunyuan_video_1_5",
            "hunyuan-video-1.5",
            "https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5",
        )
    },
)

HUNYUAN_IMAGE = Family(
    name="hunyuan-image",
    components={"transformer": IMAGE_TRANSFORMER, "text_encoder": QWEN2_5_VL, "text_encoder_2": T5},
    model_classes=("HunyuanImageTransformer2DModel",),
    depths={"transformer_blocks": (20,), "single_transformer_blocks": (40,)},
    shapes=(
        Shape("transformer", "transformer_blocks.{i}.attn.to_out.0", (3584, 3584)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (3584, 3584)),
        Shape("transformer", "transformer_blocks.{i}.norm1.linear", (21504, 3584)),
        Shape("transformer", "single_transformer_blocks.{i}.norm.linear", (10752, 3584)),
        Shape("transformer", "context_embedder.proj_in", (3584, 3584)),
    ),
    encoders={"text_encoder": "qwen25_7b", "text_encoder_2": "byt5_small"},
    trainer_names="trainer",
    headers={"kohya": kohya("lora_hunyuan_image", "hunyuan-image-2.1", "hunyuan-image-2.1")},
)
