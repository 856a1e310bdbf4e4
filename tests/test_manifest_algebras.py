"""Published files of other algebras than plain LoRA load onto their architecture, and every ΔW is its formula's.

Names, algebras, ranks and dtypes are the files'; the architecture is the real one, module by module, thirty-two
times narrower and in float64. The formulas are scripts/parity's, which know nothing of the package.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from filled_manifests import DTYPES, IMPOSSIBLE, layout_of, narrow, shapes_of
from shared_files import Manifest, manifests, needs_shared
from torch import Tensor, nn

from lora_loaders import fusing
from lora_loaders.attaching import apply
from lora_loaders.conversion import parse
from lora_loaders.detection import family_named
from lora_loaders.families import FAMILIES
from lora_loaders.files import Contents
from lora_loaders.formats import read_modules
from lora_loaders.layers.layer import AdapterLayer
from lora_loaders.layout import ModelLayout, adapter_layers, base_of
from lora_loaders.plans import AttachPlan, plan_adapter

pytestmark = needs_shared
Models = dict[str, nn.Module]
Slots = dict[str, Tensor]
Place = tuple[str, str]

SHRINK = 32
SIZES = {"flux2-klein": ("flux2", "flux2-klein-4b"), "sd3.5-medium": ("sd3", "sd3.5-medium")}
"""Family of a listing -> ours and the size in the list of architectures, where they are not that word itself."""
ENCODERS = {"sdxl": ("clip_l", "clip_g"), "flux1": ("clip_l", "t5"), "sd15": ("clip_l",)}
NAMES = [*SIZES, *(family.name for family in FAMILIES)]
LISTINGS = {
    m.name: m
    for m in manifests(*NAMES)
    if any(module.keys.keys() - {"alpha", "down", "up"} for module in read_modules(list(m.shapes))[0])
}
# The Kronecker product that its numbers make is sixty-four times the module's size; its names and algebras are real.
UNFIT = (*IMPOSSIBLE, "invokeai_anima_lora_lokr_format")
FUSED = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"), ("to_q", "to_k", "to_v", "proj_mlp"))
"""The parts of fused projections, in the order of their rows in the published checkpoints."""
SWAPPED = ("final_layer.adaLN_modulation.1",)
"""Modules whose halves (shift, scale) diffusers has the other way round."""


@pytest.fixture(scope="module")
def formulas() -> ModuleType:
    """scripts/parity/formulas.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "scripts" / "parity"))
        return import_module("formulas")


def ours(manifest: Manifest) -> tuple[str, str]:
    return SIZES.get(manifest.family, (manifest.family, manifest.family))


@pytest.fixture(scope="module")
def pipeline(denoiser: Callable[[str], nn.Module], text_encoder: Callable[[str], nn.Module]) -> Callable[..., Models]:
    def build(manifest: Manifest) -> Models:
        family, size = ours(manifest)
        encoders = enumerate(ENCODERS.get(family, ()), 1)
        named = {f"text_encoder_{n}".removesuffix("_1"): text_encoder(name) for n, name in encoders}
        return {family_named(family).denoiser: denoiser(size), **named}

    return build


def narrower(model: nn.Module) -> nn.Module:
    """A tree of the same names, of small layers with weights: every width is a thirty-second."""
    layer = small_layer(model)
    if layer is not None:
        return layer
    tree = nn.Module()
    for name, parameter in model.named_parameters(recurse=False):
        tree.register_parameter(name, nn.Parameter(torch.empty(narrow(name, tuple(parameter.shape), SHRINK))))
    for name, child in model.named_children():
        tree.add_module(name, narrower(child))
    return tree


def small_layer(model: nn.Module) -> nn.Module | None:
    has_bias = getattr(model, "bias", None) is not None
    if isinstance(model, nn.Linear):
        return nn.Linear(shrunk(model.in_features), shrunk(model.out_features), bias=has_bias)
    if isinstance(model, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        rows, columns = shrunk(model.out_channels), shrunk(model.in_channels)
        return type(model)(columns, rows, model.kernel_size, model.stride, bias=has_bias)  # type: ignore[arg-type]
    norm = type(model).__name__.endswith("RMSNorm") and getattr(model, "weight", None) is not None
    return nn.RMSNorm(shrunk(model.weight.numel())) if norm else None  # type: ignore[union-attr, operator]


def shrunk(size: int) -> int:
    return narrow("", (size,), SHRINK)[0]


def filled(manifest: Manifest, models: Models) -> Slots:
    """Random tensors of the listing's shapes, narrower; where it has none that can be, of those of its modules."""
    if manifest.has_shapes and manifest.name not in UNFIT:
        shapes = {key: narrow(key, shape, SHRINK) for key, shape in manifest.shapes.items() if shape is not None}
    else:
        unknown: dict[str, tuple[int, ...] | None] = dict.fromkeys(manifest.shapes)
        shapes = shapes_of(replace(manifest, family=ours(manifest)[0], shapes=unknown), models)
    generator = torch.Generator().manual_seed(0)

    def fill(key: str, shape: tuple[int, ...]) -> Tensor:
        dtype = DTYPES[manifest.dtypes.get(key) or "F32"]
        return torch.full(shape, 3.0, dtype=dtype) if key.endswith(".alpha") else randn(shape, generator).to(dtype)

    return {key: fill(key, shape) for key, shape in shapes.items()}


def randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def planned(manifest: Manifest, models: Models, tensors: Slots) -> tuple[AttachPlan, ModelLayout]:
    family = family_named(ours(manifest)[0])
    layout = layout_of(family, models)
    adapter = parse(Contents(tensors, label=manifest.name), family, layout)
    return plan_adapter(models, adapter, layout=layout, widens=family.widens, may_widen=True), layout


def change_of(slots: Slots, weight: Tensor, bias: Tensor, formulas: Any) -> tuple[Tensor, Tensor]:
    """ΔW and the change of the bias that a module's own keys mean."""
    s = {slot: tensor.double() for slot, tensor in slots.items() if slot != "alpha"}
    alpha = float(slots["alpha"]) if "alpha" in slots else None
    if "magnitude_out" in s:
        s["magnitude"] = s["magnitude_out"].flatten()  # PEFT's are per output
    of_slot: Mapping[str, Any] = {
        "lokr_w1": formulas.kronecker,
        "hada_w1_a": formulas.hadamard,
        "down": formulas.low_rank,
        "diff": formulas.full,
        "set_weight": formulas.replaced,
        "bias": formulas.nothing,
    }
    formula = next(formula for slot, formula in of_slot.items() if slot in s)
    formula = formulas.decomposed(formula) if "magnitude" in s else formula
    return formula(s, weight, alpha), formulas.bias_change(s, bias, alpha)


def live_place(layout: ModelLayout, target: str) -> str:
    component, _, path = target.partition(".")
    found = layout.module(component, path)
    assert found is not None
    return f"{component}.{found[0]}"


def after(tensors: Slots, plan: AttachPlan, layout: ModelLayout, formulas: Any) -> dict[Place, tuple[Tensor, Tensor]]:
    """Component and path -> weight and bias with the file in them; each of its modules as its publisher lays it out."""
    bases: dict[str, Any] = {f"{b.component}.{b.path}": base_of(b.module) for b in plan.bindings}
    done: dict[Place, tuple[Tensor, Tensor]] = {}
    for module in read_modules(list(tensors))[0]:
        slots = {slot: tensors[key] for slot, key in module.keys.items()}
        targets = plan.adapter.bound[next(iter(module.keys.values()))]
        if len(targets) > 1:
            assert tuple(target.rpartition(".")[2] for target in targets) in FUSED
        places = [live_place(layout, target) for target in targets]
        weights = [widened(bases[place].weight.detach(), slots) for place in places]
        rows = [len(weight) for weight in weights]
        biases = [bias_of(bases[place], size) for place, size in zip(places, rows, strict=True)]
        order = halves_swapped if module.name.endswith(SWAPPED) else torch.clone
        weight, bias = order(torch.cat(weights)), order(torch.cat(biases))
        change, change_of_bias = change_of(slots, weight, bias, formulas)
        new = order(weight + change).split(rows), order(bias + change_of_bias).split(rows)
        for place, own_weight, own_bias in zip(places, *new, strict=True):
            component, _, path = place.partition(".")
            assert (component, path) not in done
            done[component, path] = own_weight, own_bias
    return done


def halves_swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def widened(weight: Tensor, slots: Slots) -> Tensor:
    """With zeros for the inputs that only the adapter has."""
    columns = slots["down"].shape[1] if weight.ndim == 2 and "down" in slots else 0
    return F.pad(weight, (0, max(0, columns - weight.shape[1]))) if columns else weight


def bias_of(base: Any, rows: int) -> Tensor:
    bias = getattr(base, "bias", None)
    return torch.zeros(rows, dtype=torch.float64) if bias is None else bias.detach()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {path: t.detach().clone() for path, t in model.state_dict().items() if "base_layer." in path}


def assert_close(got: Tensor, wanted: Tensor) -> None:
    error = float((got - wanted).abs().max() / wanted.abs().max())
    assert error <= 1e-12, error


def own(layer: AdapterLayer, bias: Tensor) -> dict[str, Tensor]:
    return {} if layer.bias is None else {"bias": bias}


@pytest.mark.parametrize("name", LISTINGS)
def test_every_module_of_a_published_file_has_its_formulas_weight(
    name: str, pipeline: Callable[[Manifest], Models], formulas: Any
) -> None:
    manifest = LISTINGS[name]
    torch.manual_seed(0)
    with torch.device("meta"):
        models = {component: narrower(model).double() for component, model in pipeline(manifest).items()}
    tensors = filled(manifest, models)
    plan, layout = planned(manifest, models, tensors)
    for binding in plan.bindings:  # the rest is not needed
        for parameter in binding.module.to_empty(device="cpu").parameters():
            nn.init.normal_(parameter.requires_grad_(False))
    assert (plan.problems, plan.unmatched, plan.ignored) == ((), {}, {})
    wanted = after(tensors, plan, layout, formulas)
    apply(plan, "a")
    layers = {(c, path): layer for c, model in models.items() for path, layer in adapter_layers(model)}
    assert layers.keys() == wanted.keys()
    generator = torch.Generator().manual_seed(1)
    for place, layer in layers.items():
        weight, bias = wanted[place]
        if layer.kind.name in ("linear", "convolution"):  # a widened one too: it runs with all its inputs
            x = torch.randn(2, weight.shape[1], *[4] * (weight.ndim - 2), generator=generator, dtype=torch.float64)
            truth = torch.func.functional_call(layer.base_layer, {"weight": weight, **own(layer, bias)}, (x,))
            assert_close(layer(x), truth)
    before = {component: state(model) for component, model in models.items()}
    for model in models.values():
        fusing.fuse(model)
    for place, layer in layers.items():
        assert_close(layer.weight, wanted[place][0])
        if layer.bias is not None:
            assert_close(layer.bias, wanted[place][1])
    for component, model in models.items():
        fusing.unfuse(model)
        assert all(torch.equal(tensor, before[component][path]) for path, tensor in state(model).items())


def test_the_listings_are_not_quietly_empty() -> None:
    assert len(LISTINGS) >= 16
    assert {manifest.family for manifest in LISTINGS.values()} >= {"flux1", "sdxl", "sd15", "z-image", *SIZES}
