"""diffusers' own spellings, and PEFT's, of which the first is the second behind a component's name."""

from .format import Format

LOW_RANK = frozenset({"lora", "dora"})

DIFFUSERS = Format(
    name="diffusers",
    style="peft",
    names="diffusers",
    denoiser="{component}.",
    text_encoder="{component}.",
    prefixes=(
        "transformer.",
        "unet.",
        "prior.",
        "text_encoder.",
        "text_encoder_2.",
        "text_encoder_3.",
        "transformer_2.",
    ),
    alpha="metadata",
    algebras=frozenset({*LOW_RANK, "lokr", "loha"}),
    magnitude="out",
)
DIFFUSERS_OLD = Format(
    name="diffusers-old",
    style="diffusers-old",
    names="diffusers",
    denoiser="{component}.",
    text_encoder="{component}.",
    prefixes=DIFFUSERS.prefixes,
    algebras=LOW_RANK,
)
# One model a file, or a folder with `adapter_config.json`; the component's name stands in no key.
PEFT = Format(
    name="peft",
    style="peft",
    names="diffusers",
    denoiser="base_model.model.",
    text_encoder="base_model.model.",
    prefixes=("base_model.model.", ""),
    alpha="metadata",
    algebras=frozenset({*LOW_RANK, "experts", "lokr", "loha", "input-oft", "input-boft", "gain"}),
    slots={"oft_R": ".oft_R.weight"},
    magnitude="out",
    one_model=True,
)
