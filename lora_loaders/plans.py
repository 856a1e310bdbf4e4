"""Planning: the module of every delta is found and everything is checked, and nothing is touched."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .deltas import Delta, ExpertsDelta, LoraDelta, SetDelta
from .deltas.vectors import misfit_of_vectors
from .errors import AdapterMismatchError
from .joining import parted
from .layers.base_weight import is_plain, logical_shape
from .layers.kinds import EMBEDDING, PARAMETER, Kind, kind_of
from .layers.raw import RawParameter
from .layout import ModelLayout, base_of
from .siblings import on_model
from .widening import hinders_widening


@dataclass(frozen=True)
class Binding:
    """One delta and the module it goes to."""

    component: str
    path: str
    module: nn.Module
    kind: Kind
    delta: Delta
    widens: bool = False
    pads: bool = False


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

    def __repr__(self) -> str:
        counts = [f"{component}: {count} modules" for component, count in self.components.items()] or ["no modules"]
        counts += [f"{len(found)} {word}" for word in ("unmatched", "problems") if (found := getattr(self, word))]
        return f"<AttachPlan {self.adapter.describe()} ({self.adapter.source}; {', '.join(counts)})>"

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
    def needs_bases(self) -> bool:
        """Whether a change is computed from the weight that it changes, or written into it at once."""
        return any(binding.delta.needs_base or binding.kind is PARAMETER for binding in self.bindings)

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
        answer |= dict.fromkeys(self.adapter.embeddings, "a learned token: load_textual_inversion loads it")
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
    for component, path, delta in _parts_of(adapter, models):
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
        delta, problem = on_model(delta, component, layout)
        if problem is not None:
            problems.append(f"{component}.{true_path}: {problem}")
            continue
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


def _parts_of(adapter: Adapter, models: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, Delta]]:
    """Every delta, those of joined projections part by part."""
    for component, path, delta in adapter.modules():
        model = models.get(component)
        for own_path, own in parted(model, path, delta) if model is not None else ((path, delta),):
            yield component, own_path, own


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
    if isinstance(delta, ExpertsDelta) and isinstance(base, RawParameter):
        delta = replace(delta, transposed=base.is_transposed)
    shape = delta.shape
    own = logical_shape(base)
    tensors = delta.tensors()
    unreal = base.weight.is_meta
    for slot, tensor in tensors.items():
        if not tensor.is_floating_point() or delta.rank == 0:
            return None, f"{slot} of {tensor.dtype} and shape {tuple(tensor.shape)} is no weight"
        if tensor.is_meta and not unreal:
            return None, f"{slot} holds no data: it is on the meta device"
    if kind is EMBEDDING and not tensors.keys().isdisjoint(("bias", "up_bias")):
        return None, "the adapter changes a bias too, and an embedding has none"
    if (problem := misfit_of_vectors(delta, own)) is not None:
        return None, problem
    if kind is PARAMETER and (problem := _hinders_parameter(base, delta)):
        return None, problem
    if shape is None or kind is PARAMETER:
        return Binding(component, path, module, kind, delta), None
    if (problem := _hinders_groups(base, delta, own)) is not None:
        return None, problem
    if shape == own:
        return Binding(component, path, module, kind, delta), None
    if delta.fits(own):
        return Binding(component, path, module, kind, fit(delta, own)), None
    if widenable and len(shape) == len(own) == 2 and shape[0] == own[0]:
        if shape[1] < own[1] and isinstance(delta, LoraDelta):
            padding = delta.down.new_zeros(delta.down.shape[0], own[1] - shape[1])
            padded = replace(delta, down=torch.cat([delta.down, padding], 1))
            return Binding(component, path, module, kind, padded, pads=True), None
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


def _hinders_groups(base: nn.Module, delta: Delta, own: tuple[int, ...]) -> str | None:
    """Why this is no change of a convolution with so many groups, or with none."""
    if len(own) < 3:
        return None
    groups: int = getattr(base, "groups", 1)
    told = delta.input_groups(own)
    if told not in (1, groups) and delta.fits(own):
        return f"the adapter is for a convolution of {told} groups, this one has {groups}"
    columns = math.prod((delta.shape or ())[1:])
    if groups > 1 and columns == groups * math.prod(own[1:]) and not delta.fits(own):
        return (
            f"the adapter, for {columns} inputs, joins inputs that the groups of this convolution keep apart: "
            "its weight has no place for such a change"
        )
    return None


def _hinders_parameter(base: nn.Module, delta: Delta) -> str | None:
    """Why this cannot change a raw parameter."""
    own = logical_shape(base)
    if delta.bias is not None:
        return "the adapter changes a bias too, and a raw parameter has none"
    if delta.shape is not None and not _fits_parameter(delta, delta.shape, own):
        return f"the adapter is for a parameter of shape {delta.shape}, this one has {own}"
    return None if is_plain(base) else "the parameter is quantised or sharded and cannot be written"


def _fits_parameter(delta: Delta, shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    """Whether the shapes agree but for ones, or the file's is flat: publishers keep diffusers' `[6, d]` as `[1, 6, d]`
    or `[6·d]`. Rows and columns that ΔW is computed from must be the parameter's own, though.
    """
    bare, wanted = (tuple(size for size in sizes if size != 1) for sizes in (shape, own))
    if bare in (wanted, (math.prod(own),)) and (isinstance(delta, SetDelta) or not delta.needs_base):
        return True
    return bool(own) and delta.fits(own)


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
