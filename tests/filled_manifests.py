"""Key listings of published files filled with tensors: at their real size on the meta device, or small and random.

Shapes that a listing does not give are taken from the model that its family has on the meta device.
"""

import math
from collections.abc import Mapping

import torch
from shared_files import Manifest
from torch import Tensor, nn

from lora_loaders import formats
from lora_loaders.detection import family_named
from lora_loaders.families import Family
from lora_loaders.formats import RawModule
from lora_loaders.layout import ModelLayout, base_of

RANK = 4
SHRINK = 16
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
PARTNERS = ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight"))
Shapes = dict[str, tuple[int, ...]]

# Listings whose numbers cannot be: LoKr factors whose Kronecker product is another size than the module.
IMPOSSIBLE = ("invokeai_flux_lokr_bfl_format", "invokeai_qwen_image_lora_kohya_format")
# Listings of module names rather than keys.
MODULE_LISTS = ("lorainspector_js_sdxl_modules",)


def optional_prefixes(family: Family) -> dict[str, tuple[str, ...]]:
    return {component: names.optional_prefixes for component, names in family.components.items()}


def layout_of(family: Family, models: Mapping[str, nn.Module]) -> ModelLayout:
    return ModelLayout(models, optional_prefixes(family))


def completed(manifest: Manifest) -> list[str]:
    """The listing's keys, with the partners of those that a partial listing tore apart."""
    keys = dict.fromkeys(manifest.shapes)
    if manifest.name in MODULE_LISTS:
        return [key + suffix for key in keys for suffix in PARTNERS[0]]
    for key in list(keys):
        for pair in PARTNERS:
            for one, other in (pair, pair[::-1]):
                if key.endswith(one):
                    keys[key.removesuffix(one) + other] = None
        stem, found, _ = key.partition(".lora_magnitude_vector")
        if found:
            keys |= dict.fromkeys(stem + suffix for suffix in PARTNERS[1])
        stem, found, _ = key.partition(".lora_mid.weight")
        if found:
            keys |= dict.fromkeys(stem + suffix for suffix in PARTNERS[0])
    return list(keys)


def shapes_of(manifest: Manifest, models: Mapping[str, nn.Module]) -> Shapes:
    """Every key's shape: the listing's own, or what the module it is for has."""
    if manifest.has_shapes:
        return {key: shape for key, shape in manifest.shapes.items() if shape is not None}
    family = family_named(manifest.family)
    layout = layout_of(family, models)
    modules, left, _ = formats.read_modules(completed(manifest))
    shapes: Shapes = dict.fromkeys(left, (1,))
    for module in modules:
        rows, columns, kernel = weight_shape(module, family, layout)
        slots = slot_shapes(rows, columns, kernel, "mid" in module.keys)
        shapes |= {key: slots[slot] for slot, key in module.keys.items()}
    return shapes


def weight_shape(module: RawModule, family: Family, layout: ModelLayout) -> tuple[int, int, tuple[int, ...]]:
    """Rows, inputs and kernel of the weight that a name in a file is for; those of 1 where no module has the name."""
    for component in family.named_component(module.component):
        for reading in family.components[component].resolve(module.name):
            found = [layout.module(component, path) for path in reading.paths]
            weights = [base_of(place[1]).weight for place in found if place is not None]
            if len(weights) == len(reading.paths):
                sizes = [weight.shape for weight in weights if isinstance(weight, Tensor)]
                return sum(size[0] for size in sizes), sizes[0][1], tuple(sizes[0][2:])
    return 1, 1, ()


def slot_shapes(rows: int, columns: int, kernel: tuple[int, ...], has_core: bool) -> Shapes:
    ones = (1,) * len(kernel)
    flat = columns * torch.Size(kernel).numel()
    return {
        "alpha": (),
        "down": (RANK, columns, *(ones if has_core else kernel)),
        "up": (rows, RANK, *ones),
        "mid": (RANK, RANK, *kernel),
        "bias": (rows,),
        "magnitude": (rows, 1, *ones),
        "magnitude_out": (1, rows, *ones) if kernel else (rows,),
        "up_bias": (rows,),
        "diff": (rows, columns, *kernel),
        "lokr_w1": (math.gcd(rows, RANK), math.gcd(columns, RANK)),
        "lokr_w2": (rows // math.gcd(rows, RANK), columns // math.gcd(columns, RANK), *kernel),
        "hada_w1_a": (rows, RANK),
        "hada_w2_a": (rows, RANK),
        "hada_w1_b": (RANK, flat),
        "hada_w2_b": (RANK, flat),
    }


def at_real_size(manifest: Manifest, models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Tensors without data."""
    return {key: torch.empty(shape, device="meta") for key, shape in shapes_of(manifest, models).items()}


def small(manifest: Manifest, models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Random tensors with the listing's dtypes and ranks, sixteen times narrower than the real ones."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for key, shape in shapes_of(manifest, models).items():
        dtype = DTYPES[manifest.dtypes.get(key) or "F32"]
        if key.endswith(".alpha"):
            tensors[key] = torch.full(shape, 3.0, dtype=dtype)
        else:
            tensors[key] = torch.randn(narrow(key, shape), generator=generator).to(dtype)
    return tensors


def narrow(key: str, shape: tuple[int, ...], by: int = SHRINK) -> tuple[int, ...]:
    """The shape with its widths a sixteenth and its rank and kernel whole."""
    if len(shape) < 2:
        return tuple(max(1, size // by) if size > 1 else size for size in shape)
    if "lora_mid" in key:
        return shape
    own_rank = 0 if key.endswith(("down.weight", "A.weight", "_b")) else 1 if "scale" not in key else None
    sizes = [size if axis == own_rank or size == 1 else max(1, size // by) for axis, size in enumerate(shape[:2])]
    return (*sizes, *shape[2:])
