"""lora_loaders: LoRA-type adapters for diffusers, loaded whole or not at all, fused and unfused to the bit."""

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
    ConversionError,
    LoraLoadersError,
    MalformedAdapterError,
    UnknownFamilyError,
    UnknownFormatError,
    UnsafeFileError,
    UnsupportedBaseError,
)
from .families import FAMILIES, Family
from .formats import FORMATS
from .integrations.instances import attach, detach
from .loading import LoadReport
from .mixins.families import (
    FluxLoraLoaderMixin,
    QwenImageLoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
)
from .mixins.model import LoraModelMixin
from .mixins.pipeline import LoraPipelineMixin
from .planning import plan
from .plans import AttachPlan
from .tuning.config import LoraConfig
from .verifying import Verification, verify
from .version import __version__ as __version__
from .writing import write_adapter

__all__ = [
    "FAMILIES",
    "FORMATS",
    "Adapter",
    "AdapterFileError",
    "AdapterMismatchError",
    "AdapterStateError",
    "Approximation",
    "AttachPlan",
    "ConversionError",
    "Delta",
    "Family",
    "FluxLoraLoaderMixin",
    "LoadReport",
    "LoraConfig",
    "LoraLoadersError",
    "LoraModelMixin",
    "LoraPipelineMixin",
    "MalformedAdapterError",
    "QwenImageLoraLoaderMixin",
    "StableDiffusionLoraLoaderMixin",
    "StableDiffusionXLLoraLoaderMixin",
    "UnknownFamilyError",
    "UnknownFormatError",
    "UnsafeFileError",
    "UnsupportedBaseError",
    "Verification",
    "attach",
    "convert",
    "convert_folder",
    "detach",
    "extract",
    "merge",
    "plan",
    "read_adapter",
    "resize",
    "to_full",
    "verify",
    "write_adapter",
]
