"""Which adapters of a model are active, with which weight: switching rewrites the slots' data and no module."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .attaching import detach_adapters
from .buffers import writable
from .errors import AdapterStateError
from .fusing import fused_adapters, unfuse
from .gates import changing, exclusive
from .integrations.scale import is_compiled
from .layers.arrangement import switch
from .layers.layer import AdapterLayer
from .layers.peft_names import train_active
from .layers.slots import refresh, reweigh
from .layout import adapter_layers, shared_of
from .loading import adapter_names, unregister, unwatch
from .schedules import NOTHING, START, Step, at_step, is_scheduled
from .weights import by_path, number, one_each


@exclusive()
def set_active(model: nn.Module, names: Sequence[str], weights: Any = None) -> None:
    """Make these adapters the active ones, with these weights, and enable them; see `weights.by_path`.

    Names that the model has not are skipped: an adapter need not change every component. A weight that follows the
    denoising is taken at its start, and kept for `follow`.

    Raises:
        AdapterStateError: a list of weights of another length, a weight that names no module, or a schedule for what
            is fused.
    """
    given = dict(zip(names, one_each(names, weights), strict=True))
    scheduled = {name: weight for name, weight in given.items() if is_scheduled(weight)}
    fused = fused_adapters(model).intersection(scheduled) if scheduled else ()
    if fused:
        raise AdapterStateError(
            f"{', '.join(sorted(fused))} is fused into the weights and can follow no schedule",
            mend="Call unfuse_lora() first.",
            state=NOTHING,
        )
    layers = adapter_layers(model)
    _weigh(model, layers, given, START)
    shared = shared_of(model)
    if shared is not None:
        shared.schedules = {n: w for n, w in shared.schedules.items() if n not in given} | scheduled
    _activate([layer for _, layer in layers], names)


@exclusive()
def follow(model: nn.Module, step: Step) -> None:
    """Give the adapters that have a schedule its weights for this step; which are active stays as it is.

    Raises:
        AdapterStateError: a function gives no number.
    """
    shared = shared_of(model)
    if shared is not None and shared.schedules:
        reweigh(_weigh(model, adapter_layers(model), shared.schedules, step), shared.schedules)


def _weigh(
    model: nn.Module, layers: Sequence[tuple[str, AdapterLayer]], given: Mapping[str, Any], step: Step
) -> list[AdapterLayer]:
    """Note the weights of a step; the layers of which they change any."""
    common: dict[str, float] = {}
    tables: dict[str, dict[str, float]] = {}
    for name, weight in given.items():
        if not any(name in layer.templates for _, layer in layers):
            continue
        try:
            now = at_step(weight, step, name)
            if isinstance(now, Mapping):
                paths = [path for path, layer in layers if name in layer.templates]
                tables[name] = by_path(now, paths, (path for path, _ in model.named_modules()))
            else:
                common[name] = number(now)
        except AdapterStateError as error:
            what = f"adapter {name!r}, {type(model).__name__}: {error.what}"
            raise AdapterStateError(what, problems=error.problems, mend=error.mend, state=error.state) from error
    changed: list[AdapterLayer] = []
    # Layers of equal weights share them from here on, so that the next time one of them tells for all.
    merged: dict[int, tuple[Mapping[str, float], Mapping[str, float]]] = {}
    equal: dict[tuple[tuple[str, float], ...], Mapping[str, float]] = {}
    for path, layer in layers:
        before = layer.weights
        known = merged.get(id(before))
        if known is None:
            new = {**before, **{name: weight for name, weight in common.items() if name in before}}
            known = merged[id(before)] = before, equal.setdefault(tuple(new.items()), new)
        weights = known[1]
        if tables:
            weights = {**weights, **{name: table[path] for name, table in tables.items() if path in table}}
        if weights != before:
            layer.weigh(weights)
            changed.append(layer)
    return changed


@exclusive()
def choose(model: nn.Module, names: Sequence[str]) -> None:
    """Make these adapters the active ones with the weights they have, and enable them."""
    _activate([layer for _, layer in adapter_layers(model)], names)


def _activate(layers: list[AdapterLayer], names: Sequence[str]) -> None:
    active = tuple(names)
    for layer in layers:
        layer.activate(active)
    for layer in layers[:1]:
        layer.shared.enabled = True
    train_active(layers)
    switch(layers, active)


def active_names(model: nn.Module) -> list[str]:
    """Adapters that are active on the model, in the order they were set."""
    present = adapter_names(model)
    return [
        name for name in dict.fromkeys(n for _, layer in adapter_layers(model) for n in layer.active) if name in present
    ]


@exclusive()
def enable(model: nn.Module, enabled: bool) -> None:
    """Switch the adapters' contribution on or off; what is fused stays in the weights."""
    shared = shared_of(model)
    if shared is None:
        return
    shared.enabled = enabled
    layers = [layer for _, layer in adapter_layers(model)]
    train_active(layers)
    refresh(layers)


def names_of(given: Any) -> list[str]:
    """Adapter names from one name or several.

    Raises:
        AdapterStateError: something that is no string, or a name twice.
    """
    names: list[Any] = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    for name in names:
        check_string(name)
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise AdapterStateError(f"{', '.join(twice)} is named twice", state="Nothing was changed.")
    return names


def check_string(name: Any) -> None:
    """Raise unless an adapter's name is a string.

    Raises:
        AdapterStateError: it is something else.
    """
    if not isinstance(name, str):
        raise AdapterStateError(
            f"an adapter's name is a string, not a {type(name).__name__}", state="Nothing was changed."
        )


def require(names: Iterable[str], present: Iterable[str]) -> None:
    """Raise unless every name is there.

    Raises:
        AdapterStateError: with what is there.
    """
    known = set(present)
    missing = set(names) - known
    if missing:
        raise AdapterStateError(
            f"Adapter name(s) {missing} not in the list of present adapters: {known or set()}.",
            mend="get_list_adapters() lists them.",
            state="Nothing was changed.",
        )


@exclusive()
def delete(model: nn.Module, names: Sequence[str]) -> None:
    """Take adapters out for good; those that are fused are unfused first, and a layer without any goes."""
    fused = [name for name in names if name in fused_adapters(model)]
    if fused:
        unfuse(model, fused)
    for name in names:
        unregister(model, name)
    shared = shared_of(model)
    if shared is not None:
        shared.schedules = {name: weight for name, weight in shared.schedules.items() if name not in names}
    detach_adapters(model, names)


@exclusive()
def unload(
    model: nn.Module, *, keep_fused: bool | None = None, keep_wide: bool = False, keep_room: bool = False
) -> None:
    """Take all adapters out, and the room that was reserved for them.

    Args:
        model: the model.
        keep_fused: what becomes of fused adapters: False takes them out of the weights first, True leaves them in for
            good (the record for unfusing goes).
        keep_wide: whether input layers that a Control file widened stay wide.
        keep_room: whether the room stays in a model that is compiled, which would compile again without it.

    Raises:
        AdapterStateError: adapters are fused and `keep_fused` does not say what to do.
    """
    fused = fused_adapters(model)
    if fused and keep_fused is None:
        raise AdapterStateError(
            f"{', '.join(sorted(fused))} is fused into the weights of {type(model).__name__}",
            mend="Call unfuse_lora() first to get the plain weights back, or pass keep_fused=True to leave it in them.",
            state="Nothing was changed.",
        )
    if keep_fused:
        for _, layer in adapter_layers(model):
            if layer.fused is not None and layer.fused.coefficients:
                layer.fused, layer.narrow_bases = None, ()  # a widened layer stays wide with what is fused
    if keep_wide:
        for _, layer in adapter_layers(model):
            layer.narrow_bases = ()
    shared = shared_of(model)
    if shared is not None and shared.reserved and not (keep_room and is_compiled(model)):
        shared.reserved = 0
        if not adapter_names(model):
            unwatch(model)
    # The layers' own names too: diffusers' unload does not know these layers, and takes away the table alone.
    of_layers = (name for _, layer in adapter_layers(model) for name in layer.templates)
    delete(model, list(dict.fromkeys([*adapter_names(model), *of_layers])))


def move(models: Iterable[nn.Module], names: Sequence[str], device: torch.device | str | int) -> None:
    """Put these adapters' parameters on a device; the forward fetches them if the base is elsewhere.

    Raises:
        AdapterStateError: torch cannot put them there: no such device, or no room on it.
    """
    models = list(models)
    with changing(models):
        layers = [layer for model in models for _, layer in adapter_layers(model)]
        found = [p for layer in layers for name in names if name in layer.templates for p in layer.parameters_of(name)]
        try:
            with writable():
                moved = [parameter.data.to(device) for parameter in found]
            for parameter, data in zip(found, moved, strict=True):
                parameter.data = data  # one that is on another kind of device (meta) is refused, the first at once
        except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
            raise AdapterStateError(
                f"{', '.join(names)} cannot be put on {device}: {str(error).splitlines()[0]}",
                mend="Give a device that torch has here, such as 'cpu' or 'cuda:0', with room for them.",
                state=NOTHING,
            ) from error
        refresh(layers)


Activity = list[tuple[tuple[str, ...], Mapping[str, float], bool, Mapping[str, Any]]]


def snapshot(model: nn.Module) -> Activity:
    """Activity and weights of every adapter layer, for `restore`."""
    layers = [layer for _, layer in adapter_layers(model)]
    return [(layer.active, layer.weights, layer.shared.enabled, layer.shared.schedules) for layer in layers]


@exclusive()
def restore(model: nn.Module, state: Activity) -> None:
    """Take activity and weights back to a snapshot."""
    layers = [layer for _, layer in adapter_layers(model)]
    for layer, (active, weights, enabled, schedules) in zip(layers, state, strict=True):
        layer.active, layer.weights = active, weights
        layer.shared.enabled, layer.shared.schedules = enabled, schedules
    train_active(layers)
    refresh(layers)
