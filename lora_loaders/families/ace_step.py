"""ACE-Step 1.5 (music)."""

from .family import Family
from .rules import Names
from .text_encoders import LANGUAGE_MODEL

TRANSFORMER = Names(
    """
proj_in.1 -> proj_in_conv ; proj_out.1 -> proj_out_conv
[layers.{i}.self_attn ; layers.{i}.cross_attn]
  q_proj -> to_q ; k_proj -> to_k ; v_proj -> to_v ; o_proj -> to_out.0
  to_qkv -> to_q:2 | to_k | to_v (r) ; qkv -> to_q:2 | to_k | to_v (r)
""",
    same="""
scale_shift_table (p) ; time_embed.linear_1 ; time_embed.linear_2 ; time_embed.time_proj ; time_embed_r.linear_1
time_embed_r.linear_2 ; time_embed_r.time_proj ; condition_embedder ; norm_out
[layers.{i}]
  scale_shift_table (p) ; self_attn_norm ; self_attn.norm_q ; self_attn.norm_k ; cross_attn_norm ; cross_attn.norm_q
  cross_attn.norm_k ; mlp_norm ; mlp.gate_proj ; mlp.up_proj ; mlp.down_proj
""",
)

ACE_STEP = Family(
    name="ace-step",
    components={"transformer": TRANSFORMER, "text_encoder": LANGUAGE_MODEL},
    model_classes=("AceStepTransformer1DModel",),
    depths={"layers": (24,)},
    level="decoder.",
)
