"""Names of the checkpoint that a model was published with, as ComfyUI, BFL and ai-toolkit write them; and XLabs'."""

from .format import Format

ORIGINAL = Format(
    name="original",
    style="peft",
    names="original",
    denoiser="diffusion_model.",
    text_encoder="text_encoders.{encoder}.transformer.",
    prefixes=("diffusion_model.", "model.diffusion_model.", "net.", "conditional_transformer."),
    slots={"magnitude": ".dora_scale"},
    core_style="kohya",
    tells_shape=True,
    has_level=True,
)
# BFL's own Control files: no prefix, bias on the up factor, replaced norm scales.
BFL = Format(
    name="bfl",
    style="peft",
    names="original",
    denoiser="",
    text_encoder=None,
    prefixes=("",),
    slots={"magnitude": ".dora_scale", "set_weight": ".scale"},
)
# OneTrainer's, which puts diffusers' name of the denoiser before the original's names of its modules.
OMI = Format(
    name="omi",
    style="kohya",
    names="omi",
    denoiser="{component}.",
    text_encoder="{encoder}.",
    prefixes=("clip_l.", "clip_g.", "t5.", "llama."),
    encoders={"clip_l": "clip_l", "clip_g": "clip_g", "t5xxl": "t5", "llama": "llama"},
    trainer="onetrainer",
    # The branch on which OneTrainer got the format; InvokeAI knows a file of it by no other sign.
    metadata={"ot_branch": "omi_format"},
)
XLABS = Format(
    name="xlabs",
    style="kohya",
    names="xlabs",
    denoiser="",
    text_encoder=None,
    prefixes=("",),
    alpha="folded",
    algebras=frozenset({"lora"}),
    slots={"down": ".down.weight", "up": ".up.weight"},
)
