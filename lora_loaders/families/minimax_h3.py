"""MiniMax-H3: two transformers of one layout, one of them for reference pictures."""

from .family import Family, Shape
from .rules import Names
from .text_encoders import QWEN3_VL

# The rows of qkv are q, k, v in files of every producer but DiffSynth, whose files (`.default.` over these names) have
# them head by head, 128 wide.
TRANSFORMER = Names(
    """
video_patch_proj -> proj_in ; audio_patch_proj -> audio_proj_in ; condition_proj -> context_embedder
time_embedder.proj_in -> time_embedder.linear_1 ; time_embedder.proj_out -> time_embedder.linear_2
final_layer.adaln_proj.linear -> norm_out.linear ; final_layer.norm -> norm_out.norm
final_layer.video_out -> proj_out ; final_layer.audio_out -> audio_proj_out
blocks.{i}.adaln_proj.linear -> transformer_blocks.{i}.adaln_proj.linear
[blocks.{i} -> transformer_blocks.{i} ; token_refiner.blocks.{i} -> token_refiner.refiner_blocks.{i}]
  attn.qkv_proj -> attn.to_q | attn.to_k | attn.to_v /128
  attn.out_proj -> attn.to_out.0 ; attn.q_norm -> attn.norm_q ; attn.k_norm -> attn.norm_k
  mlp.fc1 -> ff.net.0.proj ~ ; mlp.fc2 -> ff.net.2
""",
    same="""
token_refiner.final_norm
[token_refiner.refiner_blocks.{i} ; transformer_blocks.{i}]
  norm1 ; norm2
""",
)

MINIMAX_H3 = Family(
    name="minimax-h3",
    components={"transformer": TRANSFORMER, "transformer_ref": TRANSFORMER, "text_encoder": QWEN3_VL},
    model_classes=("MiniMaxH3Transformer3DModel",),
    depths={"transformer_blocks": (50,)},
    shapes=(
        Shape("transformer", "proj_in", (5376, 96)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (7168, 5376)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_out.0", (5376, 7168)),
        Shape("transformer", "transformer_blocks.{i}.ff.net.2", (5376, 14336)),
    ),
    apart=("transformer_ref",),
)
