"""Apply and detach: putting an adapter's deltas into modules, all of them or none.

`apply` swaps pointers and takes them back on any exception; `detach_adapters` restores the modules that stood there.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .buffers import BufferMover, tensors_apart, writable
from .deltas import Delta
from .errors import AdapterStateError
from .gates import changing, exclusive
from .joining import follow_parts
from .layers.base_weight import adapter_place
from .layers.kinds import PARAMETER
from .layers.layer import AdapterLayer
from .layers.parameter import ParameterLayer, install, layer_for, uninstall
from .layers.peft_names import train_active
from .layers.shared import Shared
from .layers.slots import refresh
from .layout import adapter_layers, base_of, parent_of, shared_of
from .plans import AttachPlan, Binding
from .widening import narrow, register_inputs, unwidened, widen

RESERVED_RANK = "_lora_reserved_rank"
"""Where a model notes the rank that hot-swapping is to have room for, before its first adapter comes."""


def check_name(name: str) -> None:
    """Raise unless the name can be part of a parameter's name.

    Raises:
        AdapterStateError: empty, with a dot, or a word that module containers use themselves.
    """
    if not name or "." in name or hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise AdapterStateError(
            f"{name!r} cannot name an adapter: names become part of parameter names",
            mend="Use a non-empty name without dots that is no method of a module.",
            state="The model was not changed.",
        )


@dataclass
class _Undo:
    """What has been done so far, so that it can be taken back in reverse."""

    installed: list[tuple[nn.Module, str, AdapterLayer]] = field(
        default_factory=list[tuple[nn.Module, str, AdapterLayer]]
    )
    added: list[AdapterLayer] = field(default_factory=list[AdapterLayer])
    states: list[tuple[AdapterLayer, tuple[str, ...]]] = field(
        default_factory=list[tuple[AdapterLayer, tuple[str, ...]]]
    )
    switched: list[tuple[Shared, bool]] = field(default_factory=list[tuple[Shared, bool]])
    widened: list[tuple[AdapterLayer, nn.Module]] = field(default_factory=list[tuple[AdapterLayer, nn.Module]])


def apply(
    plan: AttachPlan,
    name: str,
    *,
    activate: bool = True,
    requires_grad: bool = False,
    dropout: float = 0.0,
) -> None:
    """Attach a plan under a name: all of it, or nothing on any exception.

    Args:
        plan: what `plan_adapter` made.
        name: name of the new adapter.
        activate: make it the only active adapter of its components, as diffusers does, and enable them.
        requires_grad: whether its parameters are to be trained.
        dropout: dropout on its input while training.

    Raises:
        AdapterMismatchError: the plan has problems.
        AdapterStateError: a bad name, or a raw parameter's adapter is to be trained.
    """
    plan.check(name)
    check_name(name)
    raw = [binding.path for binding in plan.bindings if binding.kind is PARAMETER]
    if requires_grad and raw:
        raise AdapterStateError(
            "adapters of raw parameters cannot be trained: their owners' forwards read a value, not a sum",
            problems=raw,
            mend="Leave them out of the adapter that is trained.",
            state="The model was not changed.",
        )
    with changing(plan.models.values(), reads_bases=plan.needs_bases):
        _apply(plan, name, activate, requires_grad, dropout)


def _apply(plan: AttachPlan, name: str, activate: bool, requires_grad: bool, dropout: float) -> None:
    undo = _Undo()
    try:
        touched = {component: _shared_for(plan.models[component]) for component in plan.components}
        layers = [_ensure_layer(b, plan.models[b.component], touched[b.component], undo) for b in plan.bindings]
        deltas = _settled(list(zip(plan.bindings, layers, strict=True)))
        for layer, delta in zip(layers, deltas, strict=True):
            undo.added.append(layer)
            layer.add(name, delta, requires_grad=requires_grad, dropout=dropout)
        for shared in touched.values() if requires_grad else ():
            shared.trained.add(name)
        if activate:
            for component in plan.components:
                undo.switched.append((touched[component], touched[component].enabled))
                touched[component].enabled = True
                present = [layer for _, layer in adapter_layers(plan.models[component])]
                for layer in present:
                    undo.states.append((layer, layer.active))
                    layer.activate((name,))
                train_active(present)
        refresh(layer for layer, _ in undo.states)
        for component in plan.components:
            follow_parts(plan.models[component])
    except BaseException:
        _take_back(undo, name)
        for model in plan.models.values():
            follow_parts(model)
        raise


def _take_back(undo: _Undo, name: str) -> None:
    for layer in reversed(undo.added):
        layer.remove(name)
        layer.shared.trained.discard(name)
    for layer, active in undo.states:
        layer.active = active
    for shared, enabled in undo.switched:
        shared.enabled = enabled
    for layer, _ in undo.states:
        train_active([layer])
    for layer, model in undo.widened:
        narrow(layer, model)
    for parent, child, layer in reversed(undo.installed):
        uninstall(parent, child, layer)
    refresh(layer for layer, _ in undo.states if layer.templates)


def _shared_for(model: nn.Module) -> Shared:
    """The model's common state, made now if it has no adapter layer yet."""
    return shared_of(model) or Shared(reserved=model.__dict__.get(RESERVED_RANK, 0))


def _ensure_layer(binding: Binding, model: nn.Module, shared: Shared, undo: _Undo) -> AdapterLayer:
    """The adapter layer at the binding's path, installed now if there was none."""
    parent, child = parent_of(model, binding.path)
    present = vars(parent)["_modules"].get(child)  # an attribute may be the raw parameter beside it
    if isinstance(present, AdapterLayer):
        layer = present
    else:
        layer = layer_for(base_of(binding.module) if present is None else present, binding.kind, shared)
        install(parent, child, layer)
        undo.installed.append((parent, child, layer))
    if binding.widens:
        assert binding.delta.shape is not None
        undo.widened.append((layer, model))
        widen(layer, model, binding.delta.shape[1])
    return layer


_Place = tuple[torch.device, torch.dtype]


def _settled(bindings: Sequence[tuple[Binding, AdapterLayer]]) -> list[Delta]:
    """The deltas where their layers compute and in their dtype, in memory of their own.

    Parts of a fused module share one `down`, and a caller's dictionary shares everything; parameters share nothing, not
    even a storage: savers of a whole state dict (accelerate's, safetensors' `save_model`) keep one tensor of each. One
    allocation for each device and dtype, filled in one batched copy, costs less than one a tensor.
    """
    groups: dict[_Place, list[Tensor]] = {}
    wanted: list[tuple[Delta, dict[str, _Place]]] = []
    for binding, layer in bindings:
        device, dtype = adapter_place(layer.base_layer)
        places: dict[str, _Place] = {}
        absolute = binding.delta.absolute
        for slot, tensor in binding.delta.tensors().items():
            wide = torch.promote_types(dtype, torch.float32) if slot in absolute else dtype
            places[slot] = place = (device or tensor.device, wide)
            groups.setdefault(place, []).append(tensor)
        wanted.append((binding.delta, places))
    settled = {place: iter(_copies(tensors, *place)) for place, tensors in groups.items()}
    return [delta.with_tensors({s: next(settled[place]) for s, place in places.items()}) for delta, places in wanted]


def _copies(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Copies of the tensors, in one new allocation."""
    move = BufferMover(device)
    with writable():
        targets = tensors_apart([tensor.shape for tensor in tensors], dtype, device)
    torch._foreach_copy_(targets, [move(tensor.detach()) for tensor in tensors])  # pyright: ignore[reportPrivateUsage]
    return targets


@exclusive()
def detach_adapters(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Take adapters out; a layer that is left with none goes, and the module that stood there returns.

    Where room is reserved the layer stays, empty and as narrow as it was.

    Args:
        model: the model.
        names: adapters to take out; all of them if None.
    """
    wanted = None if names is None else set(names)
    kept: list[AdapterLayer] = []
    for path, layer in adapter_layers(model):
        for name in [name for name in layer.templates if wanted is None or name in wanted]:
            layer.remove(name)
        if layer.templates or layer.fused is not None:
            kept.append(layer)
            continue
        narrow(layer, model)
        if layer.shared.reserved:
            kept.append(layer)
        else:
            parent, child = parent_of(model, path)
            uninstall(parent, child, layer)
    refresh(kept)
    follow_parts(model)


@contextmanager
def without_layers(model: nn.Module) -> Generator[None]:
    """The model as if no adapter layer were there, for as long as the block lasts (saving plain keys).

    What a Control file widened is narrow in it, unless that file is fused.
    """
    taken: list[tuple[nn.Module, str, AdapterLayer]] = []
    narrowed: list[tuple[int, int]] = []
    with changing([model], reads_bases=True):
        try:
            for path, layer in adapter_layers(model):
                parent, child = parent_of(model, path)
                uninstall(parent, child, layer)
                taken.append((parent, child, layer))
                plain = unwidened(layer)
                if plain is not None:
                    setattr(parent, child, plain)
                    narrowed.append((plain.in_features, layer.weight.shape[1]))
                    register_inputs(model, *reversed(narrowed[-1]))
            yield
        finally:
            for parent, child, layer in taken:
                install(parent, child, layer)
            for widths in narrowed:
                register_inputs(model, *widths)
            refresh(layer for _, _, layer in taken if isinstance(layer, ParameterLayer))
