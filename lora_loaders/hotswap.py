"""Room for hot-swapping: slots that stand ready before their adapters come, so that compiled code finds them there."""

import logging
from collections.abc import Collection, Mapping
from typing import Any, Literal

from torch import nn

from .attaching import RESERVED_RANK
from .errors import AdapterMismatchError, AdapterStateError
from .gates import changing, watch_forwards
from .integrations.scale import is_compiled, watch_scale
from .layers.kinds import kind_of
from .layers.layer import AdapterLayer
from .layers.parameter import install, uninstall
from .layers.shared import Shared
from .layers.slots import refresh
from .layout import adapter_layers, parent_of, shared_of
from .plans import AttachPlan
from .tuning.adding import target_modules
from .tuning.config import LoraConfig

logger = logging.getLogger(__name__)
Check = Literal["error", "warn", "ignore"]
CHECK = "_lora_check_compiled"
"""Where a model keeps what a swap does that its compiled code cannot follow; beside `RESERVED_RANK`."""
Targets = str | Collection[str]
"""Modules, by PEFT's rules: names or endings of paths, one regular expression for whole paths, or "all-linear"."""


def reserve(
    models: Mapping[str, nn.Module],
    rank: int,
    targets: Targets | Mapping[str, Targets] | None = None,
    check_compiled: Check = "error",
) -> None:
    """Give every slot, of present and of coming layers, room for this rank, so that swapping finds the same storage.

    Args:
        models: component -> model.
        rank: the sum of the ranks that are to be active together, in one layer.
        targets: modules that get an empty slot now, whether they have an adapter or not; by component if a mapping.
        check_compiled: what becomes of a change that compiled code can follow only by being compiled again: of making
            this room now, and of a later swap that finds none. "error" refuses it, "warn" says so, "ignore" does it.

    Raises:
        ValueError: no positive whole rank, or another word for `check_compiled`.
        AdapterMismatchError: targets that mean no module, or a component that is not there.
        AdapterStateError: a model is compiled, has not this room, and `check_compiled` is "error".
    """
    if not isinstance(rank, int) or rank <= 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"target_rank is a positive whole number, not {rank!r}")
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(  # in diffusers' words, slip included: its tests match them
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead."
        )
    with changing(models.values()):
        chosen = _chosen(models, targets)
        for component, model in models.items():
            present = (path for path, layer in adapter_layers(model) if layer.kind.low_rank is not None)
            _check(component, model, dict.fromkeys([*present, *chosen.get(component, ())], rank), check_compiled)
        for component, model in models.items():
            _reserve(model, rank, chosen.get(component, {}))
            model.__dict__[CHECK] = check_compiled


def check_swap(plan: AttachPlan, name: str) -> None:
    """See that an adapter finds room in all models that have some reserved, where the one of this name stood.

    Raises:
        AdapterStateError: a compiled model has no room for it, and `enable_lora_hotswap` was told to refuse that.
    """
    for component in plan.components:
        model = plan.models[component]
        if CHECK in model.__dict__:
            beside = {path: _active_rank(layer, name) for path, layer in adapter_layers(model)}
            own = [binding for binding in plan.bindings if binding.component == component]
            ranks = {b.path: (b.delta.rank or 1) + beside.get(b.path, 0) for b in own}
            _check(component, model, ranks, model.__dict__[CHECK])


def _active_rank(layer: AdapterLayer, leaving: str) -> int:
    names = [name for name in layer.active if name in layer.templates and name != leaving]
    return sum(layer.templates[name].rank or 0 for name in names)


def _check(component: str, model: nn.Module, ranks: Mapping[str, int], check_compiled: Check) -> None:
    """Say of a compiled model, or refuse, that a slot is too small where it is; ranks are by the layer's path."""
    if not ranks or not is_compiled(model):
        return
    slots = {path: layer.slot_down for path, layer in adapter_layers(model)}
    room = {path: 0 if (slot := slots.get(path)) is None else slot.shape[0] for path in ranks}
    lacking = [f"{path}: room for rank {room[path]}, not {rank}" for path, rank in ranks.items() if rank > room[path]]
    what = f"{component} is compiled, and {len(lacking)} of its layers have not the room that is asked for"
    if lacking and check_compiled == "error":
        raise AdapterStateError(
            what,
            problems=lacking,
            mend="Call enable_lora_hotswap with a sufficient target_rank and targets before compiling, or with "
            'check_compiled="ignore" to let the next forward compile again.',
            state="Nothing was changed.",
        )
    if lacking and check_compiled == "warn":
        logger.warning("%s (%s): the next forward compiles again", what, "; ".join(lacking[:3]))


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
    shared.arrangements.clear()  # they leave alone what gets its slot only now
    try:
        for path in modules.keys() - dict(present).keys():
            parent, child = parent_of(model, path)
            kind = kind_of(modules[path])
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
