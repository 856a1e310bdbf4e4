"""Files in the making, beside the ΔW that a reader must find in them: `up · down · alpha / rank` in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_loaders.adapter import Adapter
from lora_loaders.conversion import parse
from lora_loaders.files import Contents

RANK = 4
SUFFIXES = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "peft-slot": (".lora_A.default.weight", ".lora_B.default.weight"),
    "peft-bare": (".lora_A", ".lora_B"),
    "dotted": (".lora.down.weight", ".lora.up.weight"),
    "processor": ("_lora.down.weight", "_lora.up.weight"),
    "linear-layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "xlabs": (".down.weight", ".up.weight"),
}


@dataclass
class RandomFile:
    """Tensors under their keys, and the ΔW they say by `component.path`."""

    family: str
    style: str = "kohya"
    dtype: torch.dtype = torch.float64
    tensors: dict[str, Tensor] = field(default_factory=dict)
    expected: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def lora(
        self,
        stem: str,
        targets: str | Sequence[str],
        out_features: int,
        in_features: int,
        kernel: tuple[int, ...] = (),
        *,
        alpha: float | None = None,
        scaling: float | None = None,
        rank: int = RANK,
        shares: Sequence[int] = (),
        swap: bool = False,
        style: str = "",
    ) -> None:
        """Add one module; `scaling` stands where alpha is told outside of the tensors."""
        down = self.randn(rank, in_features, *kernel)
        up = self.randn(out_features, rank, *[1] * len(kernel))
        names = SUFFIXES[style or self.style]
        self.tensors |= {stem + names[0]: down, stem + names[1]: up}
        if alpha is not None:
            self.tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=self.dtype)
        factor = scaling if scaling is not None else 1.0 if alpha is None else alpha / rank
        product = torch.einsum("or,ri->oi", up.double().flatten(1), down.double().flatten(1)) * factor
        self.expect(targets, product.view(out_features, in_features, *kernel), shares, swap)

    def expect(
        self, targets: str | Sequence[str], change: Tensor, shares: Sequence[int] = (), swap: bool = False
    ) -> None:
        if swap:
            half = len(change) // 2
            change = torch.cat([change[half:], change[:half]])
        paths = [targets] if isinstance(targets, str) else list(targets)
        shares = shares or [1] * len(paths)
        unit = len(change) // sum(shares)
        self.expected |= dict(zip(paths, change.split([unit * share for share in shares]), strict=True))

    def contents(self) -> Contents:
        return Contents(self.tensors, self.metadata, self.config)

    def read(self) -> Adapter:
        return parse(self.contents(), self.family)


def found(adapter: Adapter) -> dict[str, Tensor]:
    """ΔW by `component.path`."""
    return {f"{component}.{path}": delta.delta_weight() for component, path, delta in adapter.modules()}


def assert_says(adapter: Adapter, expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Exactly these modules, with these changes."""
    changes = found(adapter)
    assert changes.keys() == expected.keys()
    for path, change in expected.items():
        torch.testing.assert_close(changes[path].double(), change.double(), rtol=tolerance, atol=tolerance, msg=path)


def accounts(adapter: Adapter) -> set[str]:
    """Every key of which the adapter says what became of it."""
    unresolved = {key for module in adapter.unresolved for key in module.keys}
    return set(adapter.bound) | set(adapter.ignored) | unresolved | set(adapter.embeddings)


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Same names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(same_bits(tensor, other[key]) for key, tensor in one.items())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Same dtype, shape and bits; NaN equals itself, and -0 differs from 0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = [tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor for tensor in (one, other)]
    return torch.equal(*bits)


def is_power_of_two(value: float) -> bool:
    return math.frexp(value)[0] == 0.5
