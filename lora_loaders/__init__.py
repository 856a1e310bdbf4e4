"""lora_loaders: LoRA-type adapters for diffusers, loaded whole or not at all, fused and unfused to the bit."""

from typing import TYPE_CHECKING, Any

from .adapter import Adapter
from .batch import convert_folder
from .combining.approximating import Approximation
from .combining.extracting import extract
from .combining.merging import merge
from .combining.resizing import resize, to_full
from .conversion import read_adapter
from .converting import convert
from .deltas import Delta
from .errors import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterStateError,
    CheckpointError,
    ConversionError,
    LoraLoadersError,
    MalformedAdapterError,
    NothingFitsError,
    UnknownFamilyError,
    UnknownFormatError,
    UnsafeFileError,
    UnsupportedBaseError,
)
from .families import FAMILIES, Family
from .formats import FORMATS
from .integrations.instances import attach, detach
from .integrations.patching import patch_diffusers, unpatch_diffusers
from .layers.layer import AdapterLayer
from .loading import LoadReport
from .mixins.families import (
    AceStepLoraLoaderMixin,
    AmusedLoraLoaderMixin,
    AnimaLoraLoaderMixin,
    AuraFlowLoraLoaderMixin,
    BriaFibo2LoraLoaderMixin,
    CogVideoXLoraLoaderMixin,
    CogView4LoraLoaderMixin,
    CosmosLoraLoaderMixin,
    ErnieImageLoraLoaderMixin,
    Flux2LoraLoaderMixin,
    Flux3LoraLoaderMixin,
    FluxLoraLoaderMixin,
    HeliosLoraLoaderMixin,
    HiDreamImageLoraLoaderMixin,
    HunyuanVideoLoraLoaderMixin,
    Ideogram4LoraLoaderMixin,
    KandinskyLoraLoaderMixin,
    Krea2LoraLoaderMixin,
    LoraBaseMixin,
    LoraLoaderMixin,
    LTX2LoraLoaderMixin,
    LTXVideoLoraLoaderMixin,
    Lumina2LoraLoaderMixin,
    MiniMaxH3LoraLoaderMixin,
    Mochi1LoraLoaderMixin,
    PeftAdapterMixin,
    QwenImageLoraLoaderMixin,
    RFD4ProteinaLoraLoaderMixin,
    SanaLoraLoaderMixin,
    SD3LoraLoaderMixin,
    SkyReelsV2LoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
    WanLoraLoaderMixin,
    ZImageLoraLoaderMixin,
)
from .mixins.model import LoraModelMixin
from .mixins.pipeline import LoraPipelineMixin
from .planning import plan
from .plans import AttachPlan
from .saving import adapter_state_dict, load_adapter_state_dict
from .schedules import PerStep
from .tuning.config import LoraConfig
from .verifying import Verification, verify
from .version import __version__ as __version__
from .writing import write_adapter

if TYPE_CHECKING:
    from .mixins.image_prompts import (
        FluxTransformer2DLoadersMixin,
        SD3Transformer2DLoadersMixin,
        UNet2DConditionLoadersMixin,
    )

__all__ = [
    "FAMILIES",
    "FORMATS",
    "AceStepLoraLoaderMixin",
    "Adapter",
    "AdapterFileError",
    "AdapterLayer",
    "AdapterMismatchError",
    "AdapterStateError",
    "AmusedLoraLoaderMixin",
    "AnimaLoraLoaderMixin",
    "Approximation",
    "AttachPlan",
    "AuraFlowLoraLoaderMixin",
    "BriaFibo2LoraLoaderMixin",
    "CheckpointError",
    "CogVideoXLoraLoaderMixin",
    "CogView4LoraLoaderMixin",
    "ConversionError",
    "CosmosLoraLoaderMixin",
    "Delta",
    "ErnieImageLoraLoaderMixin",
    "Family",
    "Flux2LoraLoaderMixin",
    "Flux3LoraLoaderMixin",
    "FluxLoraLoaderMixin",
    "FluxTransformer2DLoadersMixin",
    "HeliosLoraLoaderMixin",
    "HiDreamImageLoraLoaderMixin",
    "HunyuanVideoLoraLoaderMixin",
    "Ideogram4LoraLoaderMixin",
    "KandinskyLoraLoaderMixin",
    "Krea2LoraLoaderMixin",
    "LTX2LoraLoaderMixin",
    "LTXVideoLoraLoaderMixin",
    "LoadReport",
    "LoraBaseMixin",
    "LoraConfig",
    "LoraLoaderMixin",
    "LoraLoadersError",
    "LoraModelMixin",
    "LoraPipelineMixin",
    "Lumina2LoraLoaderMixin",
    "MalformedAdapterError",
    "MiniMaxH3LoraLoaderMixin",
    "Mochi1LoraLoaderMixin",
    "NothingFitsError",
    "PeftAdapterMixin",
    "PerStep",
    "QwenImageLoraLoaderMixin",
    "RFD4ProteinaLoraLoaderMixin",
    "SD3LoraLoaderMixin",
    "SD3Transformer2DLoadersMixin",
    "SanaLoraLoaderMixin",
    "SkyReelsV2LoraLoaderMixin",
    "StableDiffusionLoraLoaderMixin",
    "StableDiffusionXLLoraLoaderMixin",
    "UNet2DConditionLoadersMixin",
    "UnknownFamilyError",
    "UnknownFormatError",
    "UnsafeFileError",
    "UnsupportedBaseError",
    "Verification",
    "WanLoraLoaderMixin",
    "ZImageLoraLoaderMixin",
    "adapter_state_dict",
    "attach",
    "convert",
    "convert_folder",
    "detach",
    "extract",
    "load_adapter_state_dict",
    "merge",
    "patch_diffusers",
    "plan",
    "read_adapter",
    "resize",
    "to_full",
    "unpatch_diffusers",
    "verify",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    """The mixins that are built on diffusers' own classes come with the first use, and diffusers with them."""
    if name.endswith("LoadersMixin"):
        from .mixins import image_prompts

        return getattr(image_prompts, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
