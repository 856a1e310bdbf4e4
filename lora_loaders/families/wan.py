"""Wan 2.1 and 2.2 with VACE and Animate, and what was built on them: SkyReels V2, Helios, Wan Animate 2."""

from .family import Family, Shape
from .headers import kohya
from .rules import Names
from .text_encoders import T5

# Every model of the lineage.
ROWS = """
time_embedding.0 -> condition_embedder.time_embedder.linear_1
time_embedding.2 -> condition_embedder.time_embedder.linear_2
text_embedding.0 -> condition_embedder.text_embedder.linear_1
text_embedding.2 -> condition_embedder.text_embedder.linear_2
time_projection.1 -> condition_embedder.time_proj ; head.head -> proj_out
[blocks.{i}.self_attn -> blocks.{i}.attn1 ; blocks.{i}.cross_attn -> blocks.{i}.attn2]
  q -> to_q ; k -> to_k ; v -> to_v ; o -> to_out.0 ; norm_q -> norm_q ; norm_k -> norm_k
[blocks.{i}]
  ffn.0 -> ffn.net.0.proj ; ffn.2 -> ffn.net.2
  # diffusers has a norm3 too, without weights: the one name whose owner the file's other names must tell.
  norm3 -> norm2 ; norm3 ; modulation -> scale_shift_table (p)
"""
# Image to video (2.1): a picture's embedding beside the text's.
IMAGE = """
[img_emb.proj -> condition_embedder.image_embedder]
  0 -> norm1 ; 1 -> ff.net.0.proj ; 3 -> ff.net.2 ; 4 -> norm2
[blocks.{i}.cross_attn -> blocks.{i}.attn2]
  k_img -> add_k_proj ; v_img -> add_v_proj ; norm_k_img -> norm_added_k
"""
HEAD = """
head.modulation -> scale_shift_table (p)
"""
VACE = """
[vace_blocks.{i}.self_attn -> vace_blocks.{i}.attn1 ; vace_blocks.{i}.cross_attn -> vace_blocks.{i}.attn2]
  q -> to_q ; k -> to_k ; v -> to_v ; o -> to_out.0 ; norm_q -> norm_q ; norm_k -> norm_k
[vace_blocks.{i}]
  ffn.0 -> ffn.net.0.proj ; ffn.2 -> ffn.net.2 ; norm3 -> norm2 ; norm3 ; modulation -> scale_shift_table (p)
  before_proj -> proj_in ; after_proj -> proj_out
"""
ANIMATE = """
face_encoder.conv1_local.conv -> face_encoder.conv1_local
face_encoder.conv2.conv -> face_encoder.conv2 ; face_encoder.conv3.conv -> face_encoder.conv3
[face_adapter.fuser_blocks.{i} -> face_adapter.{i}]
  linear1_q -> to_q ; linear1_kv -> to_k | to_v ; linear2 -> to_out ; q_norm -> norm_q ; k_norm -> norm_k
"""
# Animate's face encoder; diffusers counts its blocks from 0.
MOTION = """
[motion_encoder.enc -> motion_encoder]
  net_app.convs.0.0 -> conv_in ; net_app.convs.8 -> conv_out ; fc.{i} -> motion_network.{i}
""" + "".join(
    f"""
[motion_encoder.enc.net_app.convs.{block + 1} -> motion_encoder.res_blocks.{block}]
  conv1.0 -> conv1 ; conv2.1 -> conv2 ; skip.1 -> conv_skip
"""
    for block in range(7)
)

TRANSFORMER = Names(
    ROWS + IMAGE + HEAD + VACE + ANIMATE + MOTION,
    same="""
patch_embedding ; condition_embedder.image_embedder.pos_embed (p) ; vace_patch_embedding ; pose_patch_embedding
motion_encoder.motion_synthesis_weight (p) ; motion_encoder.conv_in.act_fn ; face_encoder.padding_tokens (p)
face_encoder.out_proj ; condition_embedder.delta_embedder.linear_1 ; condition_embedder.delta_embedder.linear_2
far_patch_embedding
[motion_encoder.res_blocks.{i}]
  conv1.act_fn ; conv2.act_fn
""",
    absent=(
        "condition_embedder.image_embedder.**",
        "blocks.{i}.attn2.add_k_proj",
        "blocks.{i}.attn2.add_v_proj",
        "blocks.{i}.attn2.norm_added_k",
        "blocks.{i}.norm3",
        "vace_patch_embedding",
        "vace_blocks.**",
        "pose_patch_embedding",
        "motion_encoder.**",
        "face_encoder.**",
        "face_adapter.**",
        "condition_embedder.delta_embedder.**",
        "far_patch_embedding",
    ),
)

FRAME_RATE = """
fps_projection.0 -> fps_projection.net.0.proj ; fps_projection.2 -> fps_projection.net.2
"""
SKYREELS2_TRANSFORMER = Names(
    ROWS + IMAGE + HEAD + FRAME_RATE,
    same="""
patch_embedding ; fps_embedding
""",
    absent=(
        "condition_embedder.image_embedder.**",
        "blocks.{i}.attn2.add_k_proj",
        "blocks.{i}.attn2.add_v_proj",
        "blocks.{i}.attn2.norm_added_k",
        "blocks.{i}.norm3",
        "fps_embedding",
        "fps_projection.**",
    ),
)

HELIOS_TRANSFORMER = Names(
    ROWS,
    same="""
patch_embedding ; patch_short ; patch_mid ; patch_long ; norm_out.scale_shift_table (p)
""",
    absent=("blocks.{i}.norm3",),
)

ANIMATE2_TRANSFORMER = Names(
    """
[blocks.{i}.block.self_attn -> blocks.{i}.self_attn]
  q -> to_q ; k -> to_k ; v -> to_v ; o -> to_out.0 ; norm_q -> norm_q ; norm_k -> norm_k
[blocks.{i}.block.cross_attn -> blocks.{i}.cross_attn]
  q -> to_q ; k -> to_k ; v -> to_v ; o -> to_out.0 ; norm_q -> norm_q ; norm_k -> norm_k
  k_img -> add_k_proj ; v_img -> add_v_proj ; norm_k_img -> norm_added_k
[blocks.{i}.block -> blocks.{i}]
  ffn.0 -> ffn.0 ; ffn.2 -> ffn.2 ; norm3 -> norm3 ; modulation -> modulation (p)
""",
    same="""
patch_embedding ; text_embedding.0 ; text_embedding.2 ; time_embedding.0 ; time_embedding.2 ; time_projection.1
head.modulation (p) ; head.head ; img_emb.proj.0 ; img_emb.proj.1 ; img_emb.proj.3 ; img_emb.proj.4
""",
)

WAN = Family(
    name="wan",
    components={"transformer": TRANSFORMER, "transformer_2": TRANSFORMER, "text_encoder": T5},
    model_classes=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "ChronoEditTransformer3DModel",
        "AnyFlowTransformer3DModel",
        "AnyFlowFARTransformer3DModel",
    ),
    depths={"blocks": (30, 40)},
    shapes=(
        Shape("transformer", "blocks.{i}.attn1.to_q", (5120, 5120), blocks=40),
        Shape("transformer", "blocks.{i}.attn1.to_q", (3072, 3072), blocks=30),
        Shape("transformer", "blocks.{i}.attn1.to_q", (1536, 1536), blocks=30),
        Shape("transformer", "condition_embedder.text_embedder.linear_1", (None, 4096)),
        Shape("transformer", "condition_embedder.time_embedder.linear_1", (None, 256)),
    ),
    encoders={"text_encoder": "umt5xxl"},
    apart=("transformer_2",),
    headers={"kohya": kohya("lora_wan", "wan", "wan2.1", "https://github.com/Wan-Video/Wan2.1")},
)

SKYREELS2 = Family(
    name="skyreels2",
    components={"transformer": SKYREELS2_TRANSFORMER, "text_encoder": T5},
    model_classes=("SkyReelsV2Transformer3DModel",),
    depths={"blocks": (30, 40)},
    shapes=(
        Shape("transformer", "blocks.{i}.attn1.to_q", (5120, 5120), blocks=40),
        Shape("transformer", "blocks.{i}.attn1.to_q", (1536, 1536), blocks=30),
        Shape("transformer", "condition_embedder.text_embedder.linear_1", (None, 4096)),
        Shape("transformer", "condition_embedder.time_embedder.linear_1", (None, 256)),
    ),
    encoders={"text_encoder": "umt5xxl"},
)

HELIOS = Family(
    name="helios",
    components={"transformer": HELIOS_TRANSFORMER, "text_encoder": T5},
    model_classes=("HeliosTransformer3DModel",),
    depths={"blocks": (40,)},
    shapes=(
        Shape("transformer", "blocks.{i}.attn1.to_q", (5120, 5120)),
        Shape("transformer", "blocks.{i}.ffn.net.0.proj", (13824, 5120)),
        Shape("transformer", "proj_out", (64, 5120)),
    ),
    encoders={"text_encoder": "umt5xxl"},
)

WAN_ANIMATE2 = Family(
    name="wan-animate2",
    components={"transformer": ANIMATE2_TRANSFORMER, "text_encoder": T5},
    model_classes=("WanAnimate2Transformer3DModel",),
    depths={"blocks": (40,)},
    shapes=(
        Shape("transformer", "blocks.{i}.self_attn.to_q", (5120, 5120)),
        Shape("transformer", "blocks.{i}.ffn.0", (13824, 5120)),
    ),
    encoders={"text_encoder": "umt5xxl"},
)
