"""ERNIE-Image."""

from .family import Family, Shape
from .headers import model_spec
from .rules import Names
from .text_encoders import MISTRAL3

ERNIE_IMAGE_TRANSFORMER = Names(
    same="""
x_embedder.proj ; text_proj ; time_embedding.linear_1 ; time_embedding.linear_2 ; adaLN_modulation.1
final_norm.linear ; final_linear
[layers.{i}]
  adaLN_sa_ln ; self_attention.to_q ; self_attention.to_k ; self_attention.to_v ; self_attention.norm_q
  self_attention.norm_k ; self_attention.to_out.0 ; adaLN_mlp_ln ; mlp.gate_proj ; mlp.up_proj ; mlp.linear_fc2
""",
)

ERNIE_IMAGE = Family(
    name="ernie-image",
    components={"transformer": ERNIE_IMAGE_TRANSFORMER, "text_encoder": MISTRAL3},
    model_classes=("ErnieImageTransformer2DModel",),
    depths={"layers": (36,)},
    shapes=(Shape("transformer", "layers.{i}.self_attention.to_q", (4096, 4096)),),
    headers={"onetrainer": model_spec("Ernie")},
)
