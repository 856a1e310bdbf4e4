"""diffusers' mixin names, so that `class P(FluxLoraLoaderMixin, DiffusionPipeline)` goes on working.

All behaviour is generic; a class says which family its files are of and which components they may change.
"""

from .model import LoraModelMixin
from .pipeline import LoraPipelineMixin


class LoraBaseMixin(LoraPipelineMixin):
    """What all families' mixins are built on."""


class PeftAdapterMixin(LoraModelMixin):
    """The methods of a model."""


class StableDiffusionLoraLoaderMixin(LoraBaseMixin):
    """Stable Diffusion 1.5 and 2."""

    _lora_family = "sd15"
    _lora_loadable_modules = ("unet", "text_encoder")


class StableDiffusionXLLoraLoaderMixin(LoraBaseMixin):
    """Stable Diffusion XL."""

    _lora_family = "sdxl"
    _lora_loadable_modules = ("unet", "text_encoder", "text_encoder_2")


class SD3LoraLoaderMixin(LoraBaseMixin):
    """Stable Diffusion 3."""

    _lora_family = "sd3"
    _lora_loadable_modules = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


class AuraFlowLoraLoaderMixin(LoraBaseMixin):
    """AuraFlow."""

    _lora_family = "auraflow"
    _lora_loadable_modules = ("transformer",)


class FluxLoraLoaderMixin(LoraBaseMixin):
    """Flux.1, its Control pipelines included."""

    _lora_family = "flux1"
    _lora_loadable_modules = ("transformer", "text_encoder", "text_encoder_2")


class CogVideoXLoraLoaderMixin(LoraBaseMixin):
    """CogVideoX."""

    _lora_family = "cogvideox"
    _lora_loadable_modules = ("transformer",)


class Mochi1LoraLoaderMixin(LoraBaseMixin):
    """Mochi 1."""

    _lora_family = "mochi"
    _lora_loadable_modules = ("transformer",)


class LTXVideoLoraLoaderMixin(LoraBaseMixin):
    """LTX-Video."""

    _lora_family = "ltx"
    _lora_loadable_modules = ("transformer",)


class LTX2LoraLoaderMixin(LoraBaseMixin):
    """LTX-2; the connectors between text encoder and transformer can be adapted too."""

    _lora_family = "ltx2"
    _lora_loadable_modules = ("transformer", "connectors")


class SanaLoraLoaderMixin(LoraBaseMixin):
    """Sana."""

    _lora_family = "sana"
    _lora_loadable_modules = ("transformer",)


class HeliosLoraLoaderMixin(LoraBaseMixin):
    """Helios."""

    _lora_family = "helios"
    _lora_loadable_modules = ("transformer",)


class HunyuanVideoLoraLoaderMixin(LoraBaseMixin):
    """HunyuanVideo."""

    _lora_family = "hunyuan-video"
    _lora_loadable_modules = ("transformer",)


class Lumina2LoraLoaderMixin(LoraBaseMixin):
    """Lumina 2."""

    _lora_family = "lumina2"
    _lora_loadable_modules = ("transformer",)


class KandinskyLoraLoaderMixin(LoraBaseMixin):
    """Kandinsky 5."""

    _lora_family = "kandinsky5"
    _lora_loadable_modules = ("transformer",)


class WanLoraLoaderMixin(LoraBaseMixin):
    """Wan 2.1 and 2.2; the latter's second transformer denoises at low noise."""

    _lora_family = "wan"
    _lora_loadable_modules = ("transformer", "transformer_2")


class SkyReelsV2LoraLoaderMixin(LoraBaseMixin):
    """SkyReels V2."""

    _lora_family = "skyreels2"
    _lora_loadable_modules = ("transformer",)


class CogView4LoraLoaderMixin(LoraBaseMixin):
    """CogView4."""

    _lora_family = "cogview4"
    _lora_loadable_modules = ("transformer",)


class HiDreamImageLoraLoaderMixin(LoraBaseMixin):
    """HiDream."""

    _lora_family = "hidream"
    _lora_loadable_modules = ("transformer",)


class QwenImageLoraLoaderMixin(LoraBaseMixin):
    """Qwen-Image."""

    _lora_family = "qwen-image"
    _lora_loadable_modules = ("transformer", "text_encoder")


class Krea2LoraLoaderMixin(LoraBaseMixin):
    """Krea 2."""

    _lora_family = "krea2"
    _lora_loadable_modules = ("transformer",)


class ZImageLoraLoaderMixin(LoraBaseMixin):
    """Z-Image."""

    _lora_family = "z-image"
    _lora_loadable_modules = ("transformer",)


class AnimaLoraLoaderMixin(LoraBaseMixin):
    """Anima: Cosmos with a text conditioner."""

    _lora_family = "anima"
    _lora_loadable_modules = ("transformer", "text_conditioner")


class Flux2LoraLoaderMixin(LoraBaseMixin):
    """Flux.2."""

    _lora_family = "flux2"
    _lora_loadable_modules = ("transformer",)


class Flux3LoraLoaderMixin(LoraBaseMixin):
    """Flux.3."""

    _lora_family = "flux3"
    _lora_loadable_modules = ("transformer",)


class BriaFibo2LoraLoaderMixin(LoraBaseMixin):
    """Bria Fibo 2."""

    _lora_family = "bria-fibo2"
    _lora_loadable_modules = ("transformer",)


class Ideogram4LoraLoaderMixin(LoraBaseMixin):
    """Ideogram 4."""

    _lora_family = "ideogram4"
    _lora_loadable_modules = ("transformer",)


class ErnieImageLoraLoaderMixin(LoraBaseMixin):
    """ERNIE-Image."""

    _lora_family = "ernie-image"
    _lora_loadable_modules = ("transformer",)


class CosmosLoraLoaderMixin(LoraBaseMixin):
    """Cosmos."""

    _lora_family = "cosmos"
    _lora_loadable_modules = ("transformer",)


class AceStepLoraLoaderMixin(LoraBaseMixin):
    """ACE-Step."""

    _lora_family = "ace-step"
    _lora_loadable_modules = ("transformer",)


class MiniMaxH3LoraLoaderMixin(LoraBaseMixin):
    """MiniMax-H3 with its reference partition."""

    _lora_family = "minimax-h3"
    _lora_loadable_modules = ("transformer", "transformer_ref")


class RFD4ProteinaLoraLoaderMixin(LoraBaseMixin):
    """RFdiffusion 4: proteins, which no trainer's names are known of."""

    _lora_loadable_modules = ("transformer",)


class AmusedLoraLoaderMixin(StableDiffusionLoraLoaderMixin):
    """aMUSEd."""

    _lora_family = "amused"
    _lora_loadable_modules = ("transformer", "text_encoder")


class LoraLoaderMixin(StableDiffusionLoraLoaderMixin):
    """The oldest name, of when there was but one family."""
