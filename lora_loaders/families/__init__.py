"""Families: what does a model call its modules, and what does diffusers call them? One table a family."""

from .family import Family as Family
from .family import Shape as Shape
from .flux1 import FLUX1
from .qwen_image import QWEN_IMAGE
from .rules import Names as Names
from .sd import SD2, SD15, SDXL

FAMILIES: tuple[Family, ...] = (SD15, SD2, SDXL, FLUX1, QWEN_IMAGE)
