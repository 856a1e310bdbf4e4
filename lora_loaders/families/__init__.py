"""Families: what does a model call its modules, and what does diffusers call them? One table a family."""

from .ace_step import ACE_STEP
from .amused import AMUSED
from .audio import LONGCAT_AUDIO, MINIMAX_MUSIC3, STABLE_AUDIO, STABLE_AUDIO3
from .auraflow import AURAFLOW
from .bria import BRIA, BRIA_FIBO, BRIA_FIBO2
from .cascade import CASCADE, WUERSTCHEN
from .chroma import CHROMA
from .cogvideo import COGVIDEOX, COGVIEW3, COGVIEW4
from .cosmos import ANIMA, COSMOS, COSMOS1
from .ernie_image import ERNIE_IMAGE
from .family import Family as Family
from .family import Shape as Shape
from .flux1 import FLUX1
from .flux2 import FLUX2
from .flux3 import FLUX3
from .hidream import HIDREAM
from .hunyuan import HUNYUAN_IMAGE, HUNYUAN_VIDEO, HUNYUAN_VIDEO15
from .hunyuan_dit import HUNYUAN_DIT
from .ideogram4 import IDEOGRAM4
from .kandinsky import KANDINSKY5, KANDINSKY6, KANDINSKY6_SR
from .krea2 import KREA2
from .ltx import LTX, LTX2
from .lumina2 import LUMINA2
from .minimax_h3 import MINIMAX_H3
from .mochi import MOCHI
from .more_image import (
    DIT,
    GLM_IMAGE,
    JOY_IMAGE,
    LONGCAT_IMAGE,
    LUMINA,
    NUCLEUS_IMAGE,
    OMNIGEN,
    OVIS_IMAGE,
    PRX,
)
from .more_unet import (
    ANIMATEDIFF,
    ANIMATEDIFF_XL,
    AUDIOLDM2,
    DEEPFLOYD_IF,
    DREAMLITE,
    I2VGEN_XL,
    KANDINSKY2,
    KANDINSKY2_PRIOR,
    KANDINSKY3,
    SVD,
    TEXT_TO_VIDEO,
)
from .more_video import ALLEGRO, COSMOS3, EASYANIMATE, LATTE, MOTIF_VIDEO, SANA_WM
from .pixart import PIXART
from .qwen_image import QWEN_IMAGE
from .qwen_image21 import QWEN_IMAGE21
from .rfd4_proteina import RFD4_PROTEINA
from .rules import Names as Names
from .sana import SANA, SANA_VIDEO
from .sd import SD2, SD15, SDXL, SDXL_REFINER
from .sd3 import SD3
from .wan import HELIOS, SKYREELS2, WAN, WAN_ANIMATE2
from .z_image import Z_IMAGE

# Where names and widths of a file fit several families, the first is taken: of look-alikes the one with more files.
# A video-only LTX-2 file is one of LTX-Video's 13 B too, Anima's transformer is Cosmos 2's, SkyReels' is Wan's.
FAMILIES: tuple[Family, ...] = (
    *(SD15, SD2, SDXL, FLUX1, SD3, CHROMA, FLUX2, FLUX3, QWEN_IMAGE, QWEN_IMAGE21, Z_IMAGE, LUMINA2),
    *(WAN, SKYREELS2, HELIOS, WAN_ANIMATE2, HUNYUAN_VIDEO, HUNYUAN_VIDEO15, HUNYUAN_IMAGE, LTX2, LTX),
    *(
        KREA2,
        ANIMA,
        COSMOS,
        COSMOS1,
        MINIMAX_H3,
        IDEOGRAM4,
        ACE_STEP,
        AURAFLOW,
        PIXART,
        SANA,
        SANA_VIDEO,
        COGVIDEOX,
        MOCHI,
        CASCADE,
    ),
    *(HIDREAM, ERNIE_IMAGE, COGVIEW4, COGVIEW3, KANDINSKY5, KANDINSKY6, BRIA_FIBO2, BRIA_FIBO, BRIA),
    *(AMUSED, HUNYUAN_DIT, PRX, LONGCAT_IMAGE, OVIS_IMAGE, GLM_IMAGE, JOY_IMAGE, NUCLEUS_IMAGE, LUMINA, OMNIGEN, DIT),
    *(ALLEGRO, LATTE, EASYANIMATE, MOTIF_VIDEO, COSMOS3, SANA_WM),
    *(STABLE_AUDIO, STABLE_AUDIO3, LONGCAT_AUDIO, MINIMAX_MUSIC3, AUDIOLDM2, RFD4_PROTEINA, KANDINSKY6_SR),
    *(SDXL_REFINER, ANIMATEDIFF, ANIMATEDIFF_XL, SVD, TEXT_TO_VIDEO, I2VGEN_XL, KANDINSKY2, KANDINSKY2_PRIOR),
    *(KANDINSKY3, DEEPFLOYD_IF, DREAMLITE, WUERSTCHEN),
)
