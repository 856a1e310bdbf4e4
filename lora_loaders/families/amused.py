"""aMUSEd."""

from .family import Family, Shape
from .rules import Names
from .text_encoders import CLIP

AMUSED_TRANSFORMER = Names(
    same="""
encoder_proj ; encoder_proj_layer_norm ; embed.embeddings ; embed.layer_norm ; embed.conv ; cond_embed.linear_1
cond_embed.linear_2 ; project_to_hidden_norm ; project_to_hidden ; project_from_hidden_norm ; project_from_hidden
mlm_layer.conv1 ; mlm_layer.layer_norm ; mlm_layer.conv2
[down_block.res_blocks.{i} ; up_block.res_blocks.{i}]
  depthwise ; norm ; channelwise_linear_1 ; channelwise_norm.gamma (p) ; channelwise_norm.beta (p)
  channelwise_linear_2 ; cond_embeds_mapper
[down_block.attention_blocks.{i} ; up_block.attention_blocks.{i}]
  kv_mapper ; norm1 ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0 ; norm2 ; attn2.to_q ; attn2.to_k
  attn2.to_v ; attn2.to_out.0
[transformer_layers.{i}]
  norm1.linear ; norm1.norm ; attn1.to_q ; attn1.to_k ; attn1.to_v ; attn1.to_out.0 ; norm2.linear ; norm2.norm
  attn2.to_q ; attn2.to_k ; attn2.to_v ; attn2.to_out.0 ; norm3.linear ; norm3.norm ; ff.net.0.proj ; ff.net.2
""",
)

AMUSED = Family(
    name="amused",
    components={"transformer": AMUSED_TRANSFORMER, "text_encoder": CLIP},
    model_classes=("UVit2DModel",),
    depths={"transformer_layers": (22,)},
    shapes=(
        Shape("transformer", "transformer_layers.{i}.attn1.to_q", (1024, 1024)),
        Shape("transformer", "transformer_layers.{i}.ff.net.0.proj", (5632, 1024)),
    ),
)
