"""kohya sd-scripts, musubi-tuner and LyCORIS: flattened names with `lora_unet_` and `lora_te_` before them."""

from dataclasses import replace

from .format import Format

KOHYA = Format(
    name="kohya",
    style="kohya",
    names="trainer",
    denoiser="lora_unet_",
    text_encoder="lora_te{number}_",
    prefixes=("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "oft_unet_"),
    flat=True,
    tells_shape=True,
    trainer="kohya",
)
# The same with names that are the other kind in some families; ComfyUI reads the original's in all of them.
KOHYA_ORIGINAL = replace(KOHYA, name="kohya-original", names="original", prefixes=())
KOHYA_DIFFUSERS = replace(KOHYA, name="kohya-diffusers", names="diffusers", prefixes=())
ONETRAINER = Format(
    name="onetrainer",
    style="kohya",
    names="diffusers",
    denoiser="lora_transformer_",
    text_encoder="lora_te{number}_",
    prefixes=("lora_transformer_", "lora_prior_unet_", "lora_prior_"),
    flat=True,
    tells_shape=True,
    trainer="onetrainer",
)
LYCORIS = Format(
    name="lycoris",
    style="kohya",
    names="diffusers",
    denoiser="lycoris_",
    text_encoder=None,
    prefixes=("lycoris_",),
    flat=True,
    tells_shape=True,
)
