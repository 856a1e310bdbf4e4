"""Krea 2."""

from .family import Family, Shape
from .headers import kohya, model_spec
from .rules import Names
from .text_encoders import QWEN3_VL

TRANSFORMER = Names(
    """
first -> img_in ; last.linear -> final_layer.linear ; last.norm -> final_layer.norm
tmlp.0 -> time_embed.linear_1 ; tmlp.2 -> time_embed.linear_2 ; tproj.1 -> time_mod_proj
txtmlp.0 -> txt_in.norm ; txtmlp.1 -> txt_in.linear_1 ; txtmlp.3 -> txt_in.linear_2
txtfusion.projector -> text_fusion.projector
# The original keeps a block's six modulation vectors in one flat parameter.
last.modulation.lin -> final_layer.scale_shift_table (p)
blocks.{i}.mod.lin -> transformer_blocks.{i}.scale_shift_table (p)
[blocks.{i} -> transformer_blocks.{i} ; txtfusion.refiner_blocks.{i} -> text_fusion.refiner_blocks.{i}]
[txtfusion.layerwise_blocks.{i} -> text_fusion.layerwise_blocks.{i}]
  attn.wq -> attn.to_q ; attn.wk -> attn.to_k ; attn.wv -> attn.to_v ; attn.wo -> attn.to_out.0
  attn.gate -> attn.to_gate
  mlp.gate -> ff.gate ; mlp.up -> ff.up ; mlp.down -> ff.down ; prenorm -> norm1 ; postnorm -> norm2
  attn.qknorm.qnorm -> attn.norm_q ; attn.qknorm.knorm -> attn.norm_k
# SimpleTuner fuses; there are four times as many query heads as keys.
[transformer_blocks.{i}.attn]
  to_qkv -> to_q:4 | to_k | to_v (r) ; qkv -> to_q:4 | to_k | to_v (r)
""",
)

KREA2 = Family(
    name="krea2",
    components={"transformer": TRANSFORMER, "text_encoder": QWEN3_VL},
    model_classes=("Krea2Transformer2DModel",),
    depths={"transformer_blocks": (28,)},
    shapes=(
        Shape("transformer", "img_in", (6144, 64)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_q", (6144, 6144)),
        Shape("transformer", "transformer_blocks.{i}.attn.to_k", (1536, 6144)),
        Shape("transformer", "transformer_blocks.{i}.ff.gate", (16384, 6144)),
        Shape("transformer", "text_fusion.refiner_blocks.{i}.attn.to_q", (2560, 2560)),
    ),
    headers={
        "kohya": kohya("lora_krea2", "krea2", "Krea-2", "https://github.com/krea-ai/krea-2"),
        "onetrainer": model_spec("Krea-2"),
    },
)
