"""Plan, apply, detach: putting an adapter's deltas into modules, all of them or none.

`plan` looks and touches nothing; `apply` swaps pointers and takes them back on any exception; `detach` restores the
modules that stood there before.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, BufferMover
from .deltas import Delta, LoraDelta
from .errors import AdapterMismatchError, AdapterStateError
from .families.rules import flatten
from .layers.base_weight import adapter_device, adapter_dtype, is_plain, logical_shape
from .layers.kinds import Kind, kind_of
from .layers.layer import AdapterLayer, Shared
from .layers.slots import refresh

ALIGNMENT = 64
"""Elements between the starts of neighbouring parameters in one buffer, so that each is aligned for any kernel."""


RESERVED_RANK = "_lora_reserved_rank"
"""Where a model notes the rank that hot-swapping is to have room for, before its first adapter comes."""


class ModelLayout:
    """Names and sizes of a pipeline's live components, for the names layer; see `conversion.Layout`.

    Args:
        components: component name -> model.
        optional_prefixes: component -> leading path parts that some versions of its class lack.
    """

    def __init__(
        self, components: Mapping[str, nn.Module], optional_prefixes: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        self.components = components
        self._prefixes = optional_prefixes or {}
        self._flat: dict[str, dict[str, str]] = {}

    def module(self, component: str, path: str) -> tuple[str, nn.Module] | None:
        """The live module at a path and its true path; optional prefixes may be missing, containers mean their `.0`."""
        model = self.components.get(component)
        if model is None:
            return None
        for candidate in self._spellings(component, path):
            module = _submodule(model, candidate)
            if module is None:
                continue
            if isinstance(module, AdapterLayer) or kind_of(module) is not None or not len(list(module.children())):
                return candidate, module
            first = _submodule(module, "0")
            if isinstance(first, AdapterLayer) or (first is not None and kind_of(first) is not None):
                return f"{candidate}.0", first
        return None

    def _spellings(self, component: str, path: str) -> Iterator[str]:
        spellings = {path: None}
        for prefix in self._prefixes.get(component, ()):
            spellings |= {p.replace(prefix, "", 1) if prefix in p else prefix + p: None for p in list(spellings)}
        yield from spellings

    def rows(self, component: str, path: str) -> int | None:
        """Output rows of the module at this path."""
        found = self.module(component, path)
        base = found and base_of(found[1])
        return logical_shape(base)[0] if base is not None and getattr(base, "weight", None) is not None else None

    def blocks(self, component: str, path: str) -> int | None:
        """Length of the module list that the path's first number indexes."""
        model = self.components.get(component)
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        blocks = None if model is None or at is None else _submodule(model, ".".join(parts[:at]))
        return len(blocks) if isinstance(blocks, nn.ModuleList) else None

    def find(self, component: str, name: str) -> str | None:
        """The path of the module that a name, dotted or flattened, means."""
        model = self.components.get(component)
        if model is None:
            return None
        if component not in self._flat:
            paths = (path for path, module in named_bases(model) if kind_of(module) is not None)
            self._flat[component] = {flatten(path): path for path in paths}
        flat = flatten(name)
        return self._flat[component].get(flat, self._flat[component].get(f"{flat}_0"))

    def nearest(self, component: str, path: str) -> str | None:
        """The most similar path that exists, for messages."""
        model = self.components.get(component)
        if model is None:
            return None
        paths = [name for name, module in named_bases(model) if kind_of(module) is not None]
        close = get_close_matches(path, paths, n=1, cutoff=0.7)
        return close[0] if close else None


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in path.split("."):
        child = getattr(module, part, None)
        module = child if isinstance(child, nn.Module) else None
    return module


def base_of(module: nn.Module) -> nn.Module:
    """The base layer of an adapter layer, or the module itself."""
    return module.base_layer if isinstance(module, AdapterLayer) else module


def adapter_layers(model: nn.Module) -> list[tuple[str, AdapterLayer]]:
    """Every adapter layer of a model with its path."""
    return list(_walk(model, ""))


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, AdapterLayer]]:
    for name, child in module.named_children():
        if isinstance(child, AdapterLayer):
            yield prefix + name, child
        else:
            yield from _walk(child, f"{prefix}{name}.")


def named_bases(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` as if no adapter were there."""
    for name, child in model.named_children():
        base = base_of(child)
        yield prefix + name, base
        yield from named_bases(base, f"{prefix}{name}.")


@dataclass(frozen=True)
class Binding:
    """One delta and the module it goes to."""

    component: str
    path: str
    module: nn.Module
    kind: Kind
    delta: Delta
    widens: bool = False


@dataclass(frozen=True)
class AttachPlan:
    """What attaching would do; nothing was touched for it.

    Attributes:
        matched: `component.path` of every module that gets a change.
        unmatched: `component.path` or name in the file -> why it has no place (with the nearest module).
        ignored: key in the file -> why it is left out on purpose.
        problems: everything that makes attaching impossible.
        keys: key in the file -> what it is bound to, or why not; filled for every key.
    """

    adapter: Adapter
    models: Mapping[str, nn.Module]
    bindings: tuple[Binding, ...]
    unmatched: Mapping[str, str] = field(default_factory=dict[str, str])
    ignored: Mapping[str, str] = field(default_factory=dict[str, str])
    problems: tuple[str, ...] = ()

    @cached_property
    def matched(self) -> tuple[str, ...]:
        """`component.path` of every module that gets a change."""
        return tuple(f"{binding.component}.{binding.path}" for binding in self.bindings)

    @property
    def components(self) -> dict[str, int]:
        """Component -> number of modules that get a change."""
        counts: dict[str, int] = {}
        for binding in self.bindings:
            counts[binding.component] = counts.get(binding.component, 0) + 1
        return counts

    @property
    def family(self) -> str | None:
        """The adapter's family."""
        return self.adapter.family

    @property
    def format(self) -> str | None:
        """The adapter's format."""
        return self.adapter.format

    @cached_property
    def keys(self) -> dict[str, str]:
        """Key in the file -> what it is bound to, or why it is not."""
        answer = {key: ", ".join(targets) for key, targets in self.adapter.bound.items()}
        for key, targets in self.adapter.bound.items():
            reasons = [self.unmatched[target] for target in targets if target in self.unmatched]
            if reasons:
                answer[key] = f"no place: {reasons[0]}"
        return answer | {key: f"ignored: {reason}" for key, reason in self.ignored.items()}

    def check(self, name: str) -> None:
        """Raise if anything stands in the way.

        Raises:
            AdapterMismatchError: with every problem.
        """
        if self.problems:
            classes = ", ".join(type(model).__name__ for model in self.models.values())
            raise AdapterMismatchError(
                f"adapter {name!r} ({self.adapter.describe()}; {self.adapter.source}) does not fit {classes}: "
                f"{len(self.problems)} of {len(self.bindings) + len(self.problems)} modules",
                problems=self.problems,
                mend="Is the file for another family or another size of this model? `lora-loaders inspect` tells.",
                state="The model was not changed.",
            )


def plan_adapter(
    models: Mapping[str, nn.Module],
    adapter: Adapter,
    *,
    layout: ModelLayout | None = None,
    widens: Sequence[str] = (),
    may_widen: bool = False,
    is_optional: Mapping[str, Any] | None = None,
) -> AttachPlan:
    """Find the module of every delta and check all of them; touches nothing and works on the meta device.

    Args:
        models: component -> model.
        adapter: what to attach.
        layout: names of the models; built from them if not given.
        widens: paths whose input a file may widen; done only with `may_widen`.
        may_widen: whether widening is allowed here.
        is_optional: component -> predicate of paths that some published sizes lack.
    """
    layout = layout or ModelLayout(models)
    bindings: list[Binding] = []
    problems: list[str] = []
    unmatched: dict[str, str] = {}
    absent: dict[str, str] = {}
    for component, path, delta in adapter.modules():
        found = layout.module(component, path)
        if found is None:
            label = f"{component}.{path}"
            optional = (is_optional or {}).get(component)
            if component not in models:
                unmatched[label] = f"this pipeline has no {component}"
            elif optional is not None and optional(path):
                absent[label] = "some sizes of this family have this module, this one has not"
            else:
                unmatched[label] = "no such module"
            continue
        true_path, module = found
        binding, problem = _bind(component, true_path, module, delta, path in widens, may_widen)
        if problem is not None:
            problems.append(f"{component}.{true_path}: {problem}")
        elif binding is not None:
            bindings.append(binding)
    for module in adapter.unresolved:
        unmatched[f"{module.component}.{module.name}"] = module.reason
    _name_nearest(unmatched, layout, adapter)
    ignored = dict(adapter.ignored)
    for key, targets in adapter.bound.items():
        reasons = [absent[target] for target in targets if target in absent]
        if len(reasons) == len(targets):
            ignored[key] = reasons[0]
    ignored |= {key: unmatched[f"{m.component}.{m.name}"] for m in adapter.unresolved for key in m.keys}
    return AttachPlan(adapter, models, tuple(bindings), unmatched, ignored, tuple(problems))


def _name_nearest(unmatched: dict[str, str], layout: ModelLayout, adapter: Adapter) -> None:
    """Add the most similar module to the first few reasons; finding it is slow and a dozen lines are shown."""
    for label in list(unmatched)[:12]:
        component, _, path = label.partition(".")
        near = layout.nearest(component, path)
        if near is not None:
            unmatched[label] += f" (nearest: {near})"


def _bind(
    component: str, path: str, module: nn.Module, delta: Delta, widenable: bool, may_widen: bool
) -> tuple[Binding | None, str | None]:
    base = base_of(module)
    kind = kind_of(base)
    if kind is None:
        return None, f"a {type(base).__name__} can carry no adapter"
    shape = delta.shape
    own = logical_shape(base)
    tensors = delta.tensors()
    for bias in (tensors[name] for name in ("bias", "up_bias") if name in tensors):
        if bias.shape != own[:1]:
            return None, f"the adapter's bias has the shape {tuple(bias.shape)}, the module {own[0]} outputs"
    if shape is None:
        return Binding(component, path, module, kind, delta), None
    if delta.fits(own):
        return Binding(component, path, module, kind, fit(delta, own)), None
    if widenable and len(shape) == len(own) == 2 and shape[0] == own[0]:
        if shape[1] < own[1] and isinstance(delta, LoraDelta):
            padding = delta.down.new_zeros(delta.down.shape[0], own[1] - shape[1])
            return Binding(
                component, path, module, kind, replace(delta, down=torch.cat([delta.down, padding], 1))
            ), None
        if shape[1] > own[1]:
            if may_widen:
                hindrance = hinders_widening(module)
                binding = Binding(component, path, module, kind, delta, widens=True)
                return (None, hindrance) if hindrance else (binding, None)
            return None, (
                f"the adapter is for a weight of shape {shape}, the module has {own}: a Control LoRA; "
                "load it with FluxControlPipeline"
            )
    return None, f"the adapter is for a weight of shape {shape}, the module has {own}"


def fit(delta: Delta, shape: tuple[int, ...]) -> Delta:
    """The delta with its factors shaped for this weight: files hold 1x1 convolutions for linear layers, and back."""
    if delta.shape == shape:
        return delta
    tensors = delta.tensors()
    changed: dict[str, Tensor] = {}
    if "down" in tensors and "mid" not in tensors:
        changed["down"] = tensors["down"].reshape(-1, *shape[1:])
        changed["up"] = tensors["up"].reshape(shape[0], -1, *[1] * (len(shape) - 2))
    for name in ("diff", "value"):
        if name in tensors:
            changed[name] = tensors[name].reshape(shape)
    return delta.with_tensors({**tensors, **changed}) if changed else delta


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

    installed: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list[tuple[nn.Module, str, nn.Module]])
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
        AdapterStateError: a bad name.
    """
    plan.check(name)
    check_name(name)
    undo = _Undo()
    try:
        touched = {component: _shared_for(plan.models[component]) for component in plan.components}
        layers = [_ensure_layer(b, plan.models[b.component], touched[b.component], undo) for b in plan.bindings]
        deltas = _settled(list(zip(plan.bindings, layers, strict=True)))
        for layer, delta in zip(layers, deltas, strict=True):
            undo.added.append(layer)
            layer.add(name, delta, requires_grad=requires_grad, dropout=dropout)
        if activate:
            for component in plan.components:
                undo.switched.append((touched[component], touched[component].enabled))
                touched[component].enabled = True
                for _, layer in adapter_layers(plan.models[component]):
                    undo.states.append((layer, layer.active))
                    layer.active = (name,)
        refresh(layer for layer, _ in undo.states)
    except BaseException:
        _take_back(undo, name)
        raise


def _take_back(undo: _Undo, name: str) -> None:
    for layer in reversed(undo.added):
        layer.remove(name)
    for layer, active in undo.states:
        layer.active = active
    for shared, enabled in undo.switched:
        shared.enabled = enabled
    for layer, model in undo.widened:
        narrow(layer, model)
    for parent, child, module in reversed(undo.installed):
        setattr(parent, child, module)
    refresh(layer for layer, _ in undo.states if layer.templates)


def shared_of(model: nn.Module) -> Shared | None:
    """The common state of a model's adapter layers, None if it has none."""
    layer = next(_walk(model, ""), None)
    return None if layer is None else layer[1].shared


def _shared_for(model: nn.Module) -> Shared:
    """The model's common state, made now if it has no adapter layer yet."""
    return shared_of(model) or Shared(reserved=model.__dict__.get(RESERVED_RANK, 0))


def _ensure_layer(binding: Binding, model: nn.Module, shared: Shared, undo: _Undo) -> AdapterLayer:
    """The adapter layer at the binding's path, installed now if there was none."""
    parent_path, _, child = binding.path.rpartition(".")
    parent = _submodule(model, parent_path) if parent_path else model
    assert parent is not None
    present = getattr(parent, child)
    if isinstance(present, AdapterLayer):
        layer = present
    else:
        layer = AdapterLayer(present, binding.kind, shared)
        setattr(parent, child, layer)
        undo.installed.append((parent, child, present))
    if binding.widens:
        assert binding.delta.shape is not None
        undo.widened.append((layer, model))
        widen(layer, model, binding.delta.shape[1])
    return layer


def hinders_widening(module: nn.Module) -> str | None:
    """Why the input of this layer cannot be widened now, None if it can."""
    if not is_plain(base_of(module)):
        return "a Control LoRA widens this layer, which a packed or quantised weight does not allow"
    if not isinstance(module, AdapterLayer):
        return None
    if module.narrow_bases:
        return "another Control LoRA has widened this layer to another size; delete it first"
    if module.fused is not None:
        fused = ", ".join(module.fused.coefficients)
        return f"a Control LoRA widens this layer, into which {fused} is fused; call unfuse_lora() first"
    stiff = [n for n in module.templates if not isinstance(module.delta(n), LoraDelta)]
    return f"a Control LoRA widens this layer, which {', '.join(stiff)} does not allow" if stiff else None


def widen(layer: AdapterLayer, model: nn.Module, inputs: int) -> None:
    """Give a layer more inputs that it does not heed yet, its adapters too, and say so in the model's configuration."""
    base = layer.base_layer
    assert isinstance(base, nn.Linear)
    before = base.in_features
    layer.base_layer, layer.narrow_bases = _widened(base, inputs), (base,)
    layer.resize_inputs(inputs)
    _register_inputs(model, before, inputs)


def narrow(layer: AdapterLayer, model: nn.Module) -> None:
    """Undo `widen`: the layer of before returns, on the device and in the dtype that the wide one has by now."""
    if not layer.narrow_bases:
        return
    base, wide = layer.narrow_bases[0], layer.base_layer
    assert isinstance(base, nn.Linear)
    assert isinstance(wide, nn.Linear)
    weight = wide.weight.detach()[:, : base.in_features]
    if (weight.device, weight.dtype) != (base.weight.device, base.weight.dtype):
        base.weight.data = weight.contiguous()
    base.bias = wide.bias
    layer.base_layer, layer.narrow_bases = base, ()
    layer.resize_inputs(base.in_features)
    _register_inputs(model, wide.in_features, base.in_features)


def _register_inputs(model: nn.Module, before: int, after: int) -> None:
    """Pipelines read the number of channels from the configuration."""
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(model, "register_to_config") and config.get("in_channels") == before:
        register: Any = model.register_to_config
        register(in_channels=after)


def _widened(narrow: nn.Linear, inputs: int) -> nn.Linear:
    """The same map on the first inputs, and zero on the further ones."""
    weight = narrow.weight
    wide = nn.Linear(inputs, narrow.out_features, bias=False, device="meta", dtype=weight.dtype)
    data = weight.new_zeros(narrow.out_features, inputs)
    data[:, : narrow.in_features] = weight.detach()
    wide.weight = nn.Parameter(data, requires_grad=weight.requires_grad)
    wide.bias = narrow.bias
    return wide.train(narrow.training)


def _settled(bindings: Sequence[tuple[Binding, AdapterLayer]]) -> list[Delta]:
    """The deltas where their layers compute and in their dtype, in memory of their own.

    Parts of a fused module share one `down`, and a caller's dictionary shares everything; parameters share nothing.
    One buffer for each device and dtype, filled in one batched copy, costs less than a copy a tensor.
    """
    wanted: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for binding, layer in bindings:
        device, dtype = adapter_device(layer.base_layer), adapter_dtype(layer.base_layer)
        for tensor in binding.delta.tensors().values():
            place = (device or tensor.device, dtype if tensor.is_floating_point() else tensor.dtype)
            wanted.setdefault(place, []).append(tensor)
    settled: dict[tuple[torch.device, torch.dtype], Iterator[Tensor]] = {}
    for (device, dtype), tensors in wanted.items():
        move = BufferMover(device)
        starts = [0]
        for tensor in tensors:
            starts.append(starts[-1] + -(-tensor.numel() // ALIGNMENT) * ALIGNMENT)
        buffer = torch.empty(starts[-1], dtype=dtype, device=device)
        targets = [buffer[s : s + t.numel()].view(t.shape) for s, t in zip(starts, tensors, strict=False)]
        torch._foreach_copy_(targets, [move(tensor) for tensor in tensors])  # pyright: ignore[reportPrivateUsage]
        settled[device, dtype] = iter(targets)

    def settle(layer: AdapterLayer, tensor: Tensor) -> Tensor:
        device, dtype = adapter_device(layer.base_layer), adapter_dtype(layer.base_layer)
        return next(settled[device or tensor.device, dtype if tensor.is_floating_point() else tensor.dtype])

    return [binding.delta.map_tensors(lambda t, layer=layer: settle(layer, t)) for binding, layer in bindings]


def detach_adapters(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Take adapters out; a layer that is left with none goes, and the module that stood there returns.

    Args:
        model: the model.
        names: adapters to take out; all of them if None.
    """
    wanted = None if names is None else set(names)
    kept: list[AdapterLayer] = []
    for path, layer in adapter_layers(model):
        for name in [name for name in layer.templates if wanted is None or name in wanted]:
            layer.remove(name)
        if layer.templates or layer.fused is not None or layer.shared.reserved:
            kept.append(layer)
        else:
            narrow(layer, model)
            parent_path, _, child = path.rpartition(".")
            parent = _submodule(model, parent_path) if parent_path else model
            assert parent is not None
            setattr(parent, child, layer.base_layer)
    refresh(kept)


@contextmanager
def without_layers(model: nn.Module) -> Generator[None]:
    """The model as if no adapter layer were there, for as long as the block lasts (saving plain keys)."""
    taken: list[tuple[nn.Module, str, AdapterLayer]] = []
    try:
        for path, layer in adapter_layers(model):
            parent_path, _, child = path.rpartition(".")
            parent = _submodule(model, parent_path) if parent_path else model
            assert parent is not None
            setattr(parent, child, layer.base_layer)
            taken.append((parent, child, layer))
        yield
    finally:
        for parent, child, layer in taken:
            setattr(parent, child, layer)
