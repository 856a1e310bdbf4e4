"""Projections that diffusers joins (`fuse_qkv_projections`): adapters stay on the parts, the joined layer heeds them.

diffusers computes q, k and v with one layer, made from the parts' weights, and keeps the parts beside it. A hook on
that layer adds what the parts' adapters add, so names, weights by path and saving never see that anything was joined.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .deltas import Delta, parts_of
from .layers.held import held
from .layers.layer import AdapterLayer
from .layout import every_module

PARTS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
"""Name of a joined projection -> the projections whose rows it holds, in order."""


class JoinedHook:
    """Adds to a joined projection's output what the adapters on its parts add; weights follow what is fused there."""

    def __init__(self, owner: nn.Module, names: tuple[str, ...]) -> None:
        self.owner = owner
        self.names = names

    @property
    def parts(self) -> list[Any]:
        """The parts as they stand now, with or without adapters."""
        return [getattr(self.owner, name) for name in self.names]

    def __call__(self, joined: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """The joined output with every part's adapters."""
        parts = self.parts
        if not any(isinstance(part, AdapterLayer) for part in parts):
            return out
        pieces = out.split([part.out_features for part in parts], -1)
        return torch.cat([_with_adapters(part, args[0], own) for part, own in zip(parts, pieces, strict=True)], -1)

    @torch.no_grad()
    def follow(self, joined: nn.Module) -> None:
        """Copy the parts' weights, into which adapters may be fused by now, or out of which they were taken."""
        for name in ("weight", "bias"):
            target = held(joined, name)
            values = [held(getattr(part, "base_layer", part), name) for part in self.parts]
            if target is not None and all(value is not None for value in values):
                torch.cat([value.detach().to(target.device) for value in values], out=target.detach())


def _with_adapters(part: Any, x: Tensor, out: Tensor) -> Tensor:
    if not isinstance(part, AdapterLayer):
        return out
    return part.add_to(out, x) if part.only_adds else part(x)


def follow_parts(model: nn.Module) -> None:
    """Bring every joined projection up to date with its parts: adapters on them are heeded, what is fused is copied."""
    for owner in every_module(model, adapters=False):
        if not vars(owner).get("fused_projections", False):
            continue
        for name, names in PARTS.items():
            joined: Any = vars(owner)["_modules"].get(name)
            parts = [vars(owner)["_modules"].get(part) for part in names]
            if joined is None or any(part is None for part in parts):
                continue
            joined = getattr(joined, "base_layer", joined)
            hook = next((hook for hook in joined._forward_hooks.values() if isinstance(hook, JoinedHook)), None)
            adapted = any(isinstance(part, AdapterLayer) for part in parts)
            if hook is None and adapted:
                hook = JoinedHook(owner, names)
                joined.register_forward_hook(hook)
            if hook is not None:
                hook.follow(joined)
            if hook is not None and not adapted:
                joined._forward_hooks = type(joined._forward_hooks)(
                    (key, other) for key, other in joined._forward_hooks.items() if other is not hook
                )


def parted(model: nn.Module, path: str, delta: Delta) -> list[tuple[str, Delta]]:
    """A delta of a joined projection as deltas of its parts, which are always there; else the delta as it is."""
    owner_path, _, name = path.rpartition(".")
    if name not in PARTS:
        return [(path, delta)]
    try:
        owner = model.get_submodule(owner_path)
    except AttributeError:
        return [(path, delta)]
    parts: list[Any] = [getattr(owner, part, None) for part in PARTS[name]]
    if any(getattr(part, "out_features", None) is None for part in parts):
        return [(path, delta)]
    rows = [part.out_features for part in parts]
    if delta.shape is None or delta.shape[0] != sum(rows):
        return [(path, delta)]
    paths = [f"{owner_path}.{part}".lstrip(".") for part in PARTS[name]]
    return list(parts_of(delta, dict(zip(paths, rows, strict=True))).items())
