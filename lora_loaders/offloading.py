"""Groups of tensors that diffusers' group offloading moves: kept in step with the adapters that come and go.

Hooks stay where they are. Without streams they look at a module's tensors anew each time; with streams they hold pinned
copies by tensor, and on disk they hold a list of tensors and a file, both made when offloading was switched on.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from itertools import repeat
from operator import contains
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from .layers.layer import AdapterLayer
from .layers.parameter import ParameterLayer
from .layout import adapter_layers, every_module

Group = tuple[nn.Module, Any]
"""A module with a hook, and what the hook moves together."""


def groups_of(model: nn.Module) -> list[Group]:
    """Every group of tensors that is offloaded together, with the module whose hook moves it."""
    found: dict[int, Group] = {}
    if not any(map(contains, map(vars, every_module(model, adapters=False)), repeat("_diffusers_hook"))):
        return []
    for module in every_module(model):
        registry = vars(module).get("_diffusers_hook")
        hook = registry.get_hook("group_offloading") if registry is not None else None
        if hook is not None:
            found.setdefault(id(hook.group), (module, hook.group))
    return list(found.values())


@contextmanager
def in_step(model: nn.Module, *, reads_bases: bool) -> Generator[bool]:
    """Adapters of this model may be changed in the block; afterwards its groups move what is there then.

    Args:
        model: the model.
        reads_bases: whether base weights must hold their values in the block; those that are kept on disk are read
            into memory for it, and written again.

    Yields:
        Whether all base weights hold their values.
    """
    groups = groups_of(model)
    if not groups:
        yield True
        return
    on_disk = [group for _, group in groups if group.offload_to_disk_path]
    for _, group in groups:
        if group.stream is not None and not group.offload_to_disk_path:
            group.offload_()  # after an error in a forward some are not: what is written now must not be lost then
    for group in on_disk:
        _take_out(group, model)
    read = on_disk if reads_bases or _need_bases(model) else []
    for group in read:
        _read(group)
    try:
        yield len(read) == len(on_disk)
    finally:
        for group in read:
            _write(group)
        for module, group in groups:
            _follow(module, group)


def _need_bases(model: nn.Module) -> bool:
    return any(
        isinstance(layer, ParameterLayer) or any(delta.needs_base for delta in layer.templates.values())
        for _, layer in adapter_layers(model)
    )


def _tensors(group: Any) -> list[Tensor]:
    inside = [t for module in group.modules for t in (*module.parameters(), *module.buffers())]
    return [*inside, *group.parameters, *group.buffers]


def _follow(module: nn.Module, group: Any) -> None:
    """Make a group hold exactly the tensors that its modules have now."""
    if isinstance(module, AdapterLayer) and not group.modules:
        group.buffers = list(module.buffers(recurse=False))
    if group.stream is None or group.offload_to_disk_path:
        return
    slots = {id(t) for m in (module, *group.modules) for layer in m.modules() for t in _slots(layer)}
    present = {id(tensor): tensor for tensor in _tensors(group)}
    for tensor in [tensor for tensor in group.cpu_param_dict if id(tensor) not in present]:
        del group.cpu_param_dict[tensor]
    for key, tensor in present.items():
        if tensor not in group.cpu_param_dict or key in slots:
            group.cpu_param_dict[tensor] = group._to_cpu(tensor, group.low_cpu_mem_usage)
            if key not in slots:
                tensor.data = group.cpu_param_dict[tensor]


def _slots(module: nn.Module) -> list[Tensor]:
    return list(module.buffers(recurse=False)) if isinstance(module, AdapterLayer) else []


def _take_out(group: Any, model: nn.Module) -> None:
    """Bring adapters' tensors back from a group's file, for good: they are small, and are read at every switch."""
    layers = [layer for _, layer in adapter_layers(model)]
    bases = {id(t) for layer in layers for t in (*layer.base_layer.parameters(), *layer.base_layer.buffers())}
    own = {id(t) for layer in layers for t in (*layer.parameters(), *layer.buffers())} - bases
    ours = [tensor for tensor in group.tensor_to_key if id(tensor) in own]
    values = load_file(group.safetensors_file_path) if ours else {}
    for tensor in ours:
        key = group.tensor_to_key.pop(tensor)
        del group.key_to_tensor[key]
        tensor.data = values[key]


def _read(group: Any) -> None:
    values = load_file(group.safetensors_file_path)
    for key, tensor in group.key_to_tensor.items():
        tensor.data = values[key]


def _write(group: Any) -> None:
    """Write a group anew; diffusers keeps a file that is there."""
    os.remove(group.safetensors_file_path)
    group._is_offloaded_to_disk = False
    group.offload_()
