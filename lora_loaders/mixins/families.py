"""diffusers' mixin names, so that `class P(FluxLoraLoaderMixin, DiffusionPipeline)` goes on working."""

from .pipeline import LoraPipelineMixin


class StableDiffusionLoraLoaderMixin(LoraPipelineMixin):
    """Stable Diffusion 1.5 and 2: unet, text_encoder."""

    _lora_loadable_modules = ("unet", "text_encoder")


class StableDiffusionXLLoraLoaderMixin(LoraPipelineMixin):
    """Stable Diffusion XL: unet, text_encoder, text_encoder_2."""

    _lora_loadable_modules = ("unet", "text_encoder", "text_encoder_2")


class FluxLoraLoaderMixin(LoraPipelineMixin):
    """Flux.1: transformer, text_encoder, text_encoder_2."""

    _lora_loadable_modules = ("transformer", "text_encoder", "text_encoder_2")


class QwenImageLoraLoaderMixin(LoraPipelineMixin):
    """Qwen-Image: transformer, text_encoder."""

    _lora_loadable_modules = ("transformer", "text_encoder")
