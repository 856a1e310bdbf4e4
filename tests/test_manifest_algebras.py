"""Published files of other algebras than LoRA: ΔW of each module equals the closed formula on its own keys."""

from typing import Any

import pytest
import torch
from filled_manifests import IMPOSSIBLE, small
from shared_files import Manifest, manifests, needs_shared
from torch import Tensor

from lora_loaders.conversion import parse
from lora_loaders.families import FAMILIES
from lora_loaders.files import Contents
from lora_loaders.formats import read_modules

pytestmark = needs_shared
NAMES = [family.name for family in FAMILIES]
KINDS = ("lokr_w1", "hada_w1_a", "dora_scale", "lora_mid")
LISTINGS = {
    m.name: m
    for m in manifests(*NAMES)
    if m.has_shapes and m.name not in IMPOSSIBLE and any(kind in key for key in m.shapes for kind in KINDS)
}


def direction(s: dict[str, Tensor]) -> Tensor:
    """The change before any magnitude, written out in float64 from the slots of one module."""
    alpha = float(s["alpha"]) if "alpha" in s else None
    if "lokr_w1" in s or "lokr_w1_a" in s:
        first = s["lokr_w1"] if "lokr_w1" in s else s["lokr_w1_a"] @ s["lokr_w1_b"]
        second = s["lokr_w2"] if "lokr_w2" in s else s["lokr_w2_a"] @ s["lokr_w2_b"]
        rank = next((len(s[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in s), None)
        return torch.kron(first, second) * (alpha / rank if alpha and rank else 1.0)
    if "hada_w1_a" in s:
        change = (s["hada_w1_a"] @ s["hada_w1_b"]) * (s["hada_w2_a"] @ s["hada_w2_b"])
        return change * (alpha / len(s["hada_w1_b"]) if alpha else 1.0)
    return (s["up"].flatten(1) @ s["down"].flatten(1)) * (alpha / len(s["down"]) if alpha else 1.0)


def formula(slots: dict[str, Tensor], base: Tensor) -> Tensor:
    s = {name: tensor.double() for name, tensor in slots.items()}
    if "magnitude" not in s:
        return direction(s)
    turned, magnitude = base + direction(s), s["magnitude"]
    if magnitude.ndim > 1 and magnitude.shape[0] == 1:
        return magnitude.view(1, -1) / turned.norm(dim=0) * turned - base
    return magnitude.view(-1, 1) / turned.norm(dim=1, keepdim=True) * turned - base


@pytest.mark.parametrize("name", LISTINGS)
def test_every_module_of_a_published_file_has_its_formulas_change(name: str) -> None:
    manifest: Manifest = LISTINGS[name]
    tensors = small(manifest, {})
    adapter = parse(Contents(tensors, label=name), manifest.family)
    assert not adapter.unresolved
    modules, _, _ = read_modules(list(tensors))
    compared = 0
    for module in modules:
        slots = {slot: tensors[key] for slot, key in module.keys.items()}
        targets = adapter.bound[next(iter(module.keys.values()))]
        parts: list[Any] = [adapter.deltas[t.split(".")[0]][t.partition(".")[2]] for t in targets]
        generator = torch.Generator().manual_seed(compared)
        sizes = [part.shape for part in parts]
        bases = [torch.randn(*size, generator=generator, dtype=torch.float64).flatten(1) for size in sizes]
        got = torch.cat([p.delta_weight(b.view(p.shape)).flatten(1) for p, b in zip(parts, bases, strict=True)])
        wanted = formula(slots, torch.cat(bases))
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        compared += 1
    assert compared == len(modules) > 0


def test_the_listings_are_not_quietly_empty() -> None:
    assert len(LISTINGS) >= 2
