"""Room for hot-swapping: slots that stand ready before their adapters come, so that compiled code finds them there."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from .attaching import RESERVED_RANK
from .errors import AdapterMismatchError
from .gates import changing, watch_forwards
from .integrations.scale import watch_scale
from .layers.kinds import kind_of
from .layers.layer import AdapterLayer
from .layers.parameter import install, uninstall
from .layers.shared import Shared
from .layers.slots import refresh
from .layout import adapter_layers, shared_of, submodule_at
from .tuning.adding import target_modules
from .tuning.config import LoraConfig

Targets = str | Collection[str]
"""Modules, by PEFT's rules: names or endings of paths, one regular expression for whole paths, or "all-linear"."""


def reserve(models: Mapping[str, nn.Module], rank: int, targets: Targets | Mapping[str, Targets] | None = None) -> None:
    """Give every slot, of present and of coming layers, room for this rank, so that swapping finds the same storage.

    Args:
        models: component -> model.
        rank: the sum of the ranks that are to be active together, in one layer.
        targets: modules that get an empty slot now, whether they have an adapter or not; by component if a mapping.

    Raises:
        ValueError: no positive rank.
        AdapterMismatchError: targets that mean no module, or a component that is not there.
    """
    if rank <= 0:
        raise ValueError(f"target_rank is a positive number, not {rank}")
    with changing(models.values()):
        chosen = _chosen(models, targets)
        for component, model in models.items():
            _reserve(model, rank, chosen.get(component, {}))


def _chosen(
    models: Mapping[str, nn.Module], targets: Targets | Mapping[str, Targets] | None
) -> dict[str, dict[str, nn.Module]]:
    """Component -> path -> module that `targets` means."""
    if targets is None:
        return {}
    wanted: Mapping[str, Targets] = targets if isinstance(targets, Mapping) else dict.fromkeys(models, targets)
    found = {c: _modules(models[c], names) for c, names in wanted.items() if c in models}
    empty = [c for c in wanted if not found.get(c)]
    if empty and (isinstance(targets, Mapping) or not any(found.values())):
        raise AdapterMismatchError(
            f"targets={targets!r} means no module of {', '.join(empty)}",
            mend='Give names or endings of paths of Linear, Conv or Embedding modules, or "all-linear".',
            state="Nothing was changed.",
        )
    return found


def _modules(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    names: Any = targets if isinstance(targets, str) else list(targets)
    return target_modules(model, LoraConfig(target_modules=names))


def _reserve(model: nn.Module, rank: int, modules: Mapping[str, nn.Module]) -> None:
    present = adapter_layers(model)
    shared = shared_of(model) or Shared()
    before = shared.reserved
    active = present[0][1].active if present else ()
    installed: list[tuple[nn.Module, str, AdapterLayer]] = []
    shared.reserved = rank
    try:
        for path in modules.keys() - dict(present).keys():
            parent_path, _, child = path.rpartition(".")
            parent = submodule_at(model, parent_path) if parent_path else model
            kind = kind_of(modules[path])
            assert parent is not None
            assert kind is not None
            layer = AdapterLayer(modules[path], kind, shared)
            layer.activate(active)
            install(parent, child, layer)
            installed.append((parent, child, layer))
        refresh(layer for _, layer in adapter_layers(model))
    except BaseException:
        shared.reserved = before
        for parent, child, layer in reversed(installed):
            uninstall(parent, child, layer)
        raise
    model.__dict__[RESERVED_RANK] = rank
    if installed:
        # Now, because a compiled model has its hooks in its graph.
        watch_scale(model)
        watch_forwards(model)
