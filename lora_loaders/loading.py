"""One load, from a source to attached layers: read, plan all components, check, apply, report."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .adapter import Adapter
from .attaching import apply, detach_adapters
from .collecting import uncollected
from .conversion import parse, with_live_names
from .detection import rank_families, readings_of, sample_of
from .errors import AdapterFileError, AdapterMismatchError, AdapterStateError, NothingFitsError
from .families import FAMILIES, Family
from .families.family import means_encoder
from .files import Contents
from .formats import NO_SUFFIX, RawModule, read_modules
from .fusing import fused_adapters
from .gates import changing, unwatch_forwards, versions, watch_forwards
from .hotswap import check_swap
from .integrations.equipping import is_equipped
from .integrations.scale import unwatch_scale, watch_scale
from .layers.peft_names import train_active
from .layout import CONFIGS, LOADED, ModelLayout, adapter_layers, is_foreign, shared_of
from .plans import AttachPlan, Binding, plan_adapter
from .tuning.config import LoraConfig, config_of

logger = logging.getLogger(__name__)
MISPLACED, CERTAIN = 0.4, 0.9
"""A file that finds no place for more of its names than the first share is another family's which knows the second."""


@dataclass(frozen=True)
class LoadReport:
    """What a load did.

    Attributes:
        adapter_name: the adapter's name.
        family: family of the file.
        format: its spelling.
        components: component -> number of modules that got a change.
        unmatched: `component.path` or name in the file -> why it has no place.
        ignored: key in the file -> why it was left out.
        embeddings: learned tokens that the file brings; load them with `load_textual_inversion`.
        widened: `component.path` of input layers that a Control file made wider.
        padded: `component.path` of modules whose adapter was filled up with zeros, for a layer that is wider.
        norms: `component.path` of norms whose weight or bias the adapter changes.
    """

    adapter_name: str
    family: str | None
    format: str | None
    components: Mapping[str, int]
    unmatched: Mapping[str, str] = field(default_factory=dict[str, str])
    ignored: Mapping[str, str] = field(default_factory=dict[str, str])
    embeddings: tuple[str, ...] = ()
    widened: tuple[str, ...] = ()
    padded: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()


def family_of(model: nn.Module, families: Sequence[Family] = FAMILIES) -> Family | None:
    """The family whose denoiser this model is, told by its class and, for the UNets, by its configuration."""
    names = {cls.__name__ for cls in type(model).__mro__}
    candidates = [family for family in families if names & set(family.model_classes)]
    config: Mapping[str, Any] = getattr(model, "config", None) or {}

    def agreement(family: Family) -> int:
        facts = family.config_facts
        return sum(1 if config.get(key) == value else -1 for key, value in facts.items())

    return max(candidates, key=agreement, default=None)


def may_widen(pipeline_class: str) -> bool:
    """Whether this pipeline's Control files may widen the input layer; a ControlNet is another thing."""
    return "Control" in pipeline_class and "ControlNet" not in pipeline_class


def layout_of(models: Mapping[str, nn.Module], family: Family | None) -> ModelLayout:
    """The live models' names and sizes, with the path variants that the family knows of."""
    names = family.components if family else {}
    return ModelLayout(models, {component: table.optional_prefixes for component, table in names.items()})


def plan_contents(
    models: Mapping[str, nn.Module],
    contents: Contents | Adapter,
    family: Family | None,
    *,
    may_widen: bool = False,
    layout: ModelLayout | None = None,
) -> AttachPlan:
    """Plan what a file, or an adapter, would change in these models; touches nothing."""
    layout = layout or layout_of(models, family)
    known = isinstance(contents, Adapter)
    adapter = with_live_names(contents, layout) if known else parse(contents, family, layout)
    return plan_adapter(
        models,
        adapter,
        layout=layout,
        widens=family.widens if family else (),
        may_widen=may_widen,
        is_optional={c: table.is_optional for c, table in family.components.items()} if family else None,
    )


@uncollected()
def load(
    models: Mapping[str, nn.Module],
    contents: Contents | Adapter,
    *,
    name: str | None = None,
    family: Family | None = None,
    strict: bool = False,
    hotswap: bool = False,
    may_widen: bool = False,
) -> LoadReport:
    """Attach a file's adapter to all the models it changes, or to none.

    Args:
        models: component -> model.
        contents: what was read.
        name: the adapter's name; `default_0`, `default_1`, … if None.
        family: the models' family.
        strict: whether modules without a place are an error rather than a warning.
        hotswap: replace the adapter of this name.
        may_widen: whether a Control file may widen its input layer.

    Raises:
        AdapterMismatchError: nothing fits, a shape is wrong, or, if strict, something has no place.
        AdapterStateError: the name is taken, or for `hotswap`, is not there.
    """
    chosen = _check_name(name, models, hotswap)
    check_foreign(models)
    seen = versions(models.values())
    plan = _planned(models, contents, family, chosen, may_widen)
    _check_plan(plan, chosen, family, contents, strict)
    with changing(models.values(), reads_bases=plan.needs_bases):
        if versions(models.values()) != seen:  # another thread changed them while this one planned
            chosen = _check_name(name, models, hotswap)
            plan = plan_contents(models, contents, family, may_widen=may_widen)
            _check_plan(plan, chosen, family, contents, strict)
        configs = {component: config_of(plan.adapter, component) for component in plan.components}
        if hotswap:
            _swap(plan, models, chosen)
        else:
            apply(plan, chosen)
        for component, config in configs.items():
            register(models[component], chosen, config)
    _tell(plan, chosen)
    return _report(plan, chosen)


def _report(plan: AttachPlan, name: str) -> LoadReport:
    def where(is_meant: Callable[[Binding], bool]) -> tuple[str, ...]:
        return tuple(f"{binding.component}.{binding.path}" for binding in plan.bindings if is_meant(binding))

    return LoadReport(
        name,
        plan.family,
        plan.format,
        plan.components,
        plan.unmatched,
        plan.ignored,
        embeddings=tuple(plan.adapter.embeddings),
        widened=where(lambda binding: binding.widens),
        padded=where(lambda binding: binding.pads),
        norms=where(lambda binding: binding.kind.name == "norm"),
    )


def register(model: nn.Module, name: str, config: LoraConfig) -> None:
    """Note an adapter where diffusers and PEFT look for it, and let the model's forward take a scale."""
    model.__dict__.setdefault(CONFIGS, {})[name] = config
    model.__dict__[LOADED] = True
    watch_scale(model)
    watch_forwards(model)


def unregister(model: nn.Module, name: str) -> None:
    """Undo `register`; after the last adapter the gradients, hooks and flags of before are back.

    Room that was reserved for hot-swapping stays, and the hooks with it: a compiled model must not see them go.
    """
    configs: dict[str, LoraConfig] = model.__dict__.get(CONFIGS, {})
    configs.pop(name, None)
    shared = shared_of(model)
    if shared is not None:
        shared.trained.discard(name)
    if configs:
        return
    model.__dict__.pop(CONFIGS, None)
    model.__dict__.pop(LOADED, None)
    if shared is not None:
        for parameter in shared.frozen:
            parameter.requires_grad_(True)
        shared.frozen = []
    if shared is None or not shared.reserved:
        unwatch(model)


def unwatch(model: nn.Module) -> None:
    """Take away the hooks of a model that has no adapters."""
    if not is_equipped(model):
        unwatch_forwards(model)
        unwatch_scale(model)


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters on a model, in the order they came."""
    configs: Mapping[str, LoraConfig] = model.__dict__.get(CONFIGS, {})
    return list(configs)


def _check_name(name: str | None, models: Mapping[str, nn.Module], hotswap: bool) -> str:
    present = {name for model in models.values() for name in adapter_names(model)}
    if name is None and not hotswap:
        return next(f"default_{n}" for n in range(len(present) + 1) if f"default_{n}" not in present)
    if name is None or (hotswap and name not in present):
        raise AdapterStateError(
            f"Trying to hotswap LoRA adapter '{name}' but there is no existing adapter by that name. "
            "Please choose an existing adapter name or set `hotswap=False` to prevent hotswapping.",
            problems=[f"present: {other}" for other in sorted(present)],
            state="Nothing was loaded or changed.",
        )
    if not hotswap and name in present:
        raise AdapterStateError(
            f"Adapter name {name} already in use in the model - please select a new adapter name.",
            mend="Delete it first with delete_adapters, replace it with hotswap=True, or choose another name.",
            state="Nothing was loaded or changed.",
        )
    return name


def check_foreign(models: Mapping[str, nn.Module]) -> None:
    """Raise where peft has put layers of its own into a model: the two would not see each other's adapters.

    Raises:
        AdapterStateError: it has.
    """
    for component, model in models.items():
        if is_foreign(model):
            raise AdapterStateError(
                f"{component} carries peft's layers, for adapters {', '.join(adapter_names(model)) or 'that are gone'}",
                mend="Unload them first with diffusers' own unload_lora_weights(), before attach or patch_diffusers.",
                state="Nothing was changed.",
            )


def _planned(
    models: Mapping[str, nn.Module], contents: Contents | Adapter, family: Family | None, name: str, may_widen: bool
) -> AttachPlan:
    """The plan, unless the file is another family's; that is asked only where something in it does not fit."""
    layout = layout_of(models, family)
    try:
        plan = plan_contents(models, contents, family, may_widen=may_widen, layout=layout)
    except AdapterFileError:  # another family's names may look like damage: two that mean one module here
        _check_family(layout, contents, family, name)
        raise
    if plan.unmatched or plan.problems:
        _check_family(layout, contents, family, name)
    return plan


def _check_family(layout: ModelLayout, contents: Contents | Adapter, family: Family | None, name: str) -> None:
    """Raise where a good part of the denoiser's names has no place here, and all of them have one in another family.

    Families that look alike go on: a Flux file finds three quarters of its modules in Chroma.
    """
    if isinstance(contents, Adapter) or family is None:
        return
    modules, _, spelling = read_modules(list(contents.tensors))
    denoising = sample_of([m for m in modules if not means_encoder(m.component)])
    lost = [module for module in denoising if not _has_place(module, family, layout)]
    if len(lost) <= MISPLACED * len(denoising):
        return
    ranking = rank_families(denoising, contents.tensors, [family, *(f for f in FAMILIES if f.name != family.name)])
    (score, likely), own = ranking[0], next(score for score, known in ranking if known is family)
    if likely.name == family.name or score.names < CERTAIN or score[:3] <= own[:3]:
        return
    classes = ", ".join(type(model).__name__ for model in layout.components.values())
    fits = "nothing in it fits" if len(lost) == len(denoising) else "the most of it does not fit"
    raise NothingFitsError(
        f"adapter {name!r} ({spelling}; {contents.label}) is for {likely.name}: {fits} {classes}",
        problems=[f"{module.name}: no such module in this {family.name}" for module in lost],
        mend=f"Load it into a pipeline of {likely.name}.",
        state="The model was not changed.",
    )


def _has_place(module: RawModule, family: Family, layout: ModelLayout) -> bool:
    """Whether the model has what this name means, or could have it in another size."""
    for component, resolved in readings_of(module, family):
        table = family.components[component]
        if component not in layout.components or all(
            layout.module(component, path) is not None or table.is_optional(path) for path in resolved.paths
        ):
            return True
    return layout.find(family.denoiser, module.name) is not None


def _check_plan(plan: AttachPlan, name: str, family: Family | None, contents: Contents | Adapter, strict: bool) -> None:
    plan.check(name)
    unread = {key: reason for key, reason in plan.ignored.items() if reason == NO_SUFFIX}
    if plan.bindings and not (strict and (plan.unmatched or unread)):
        return
    if not plan.bindings and plan.adapter.embeddings and not plan.adapter.deltas:
        what = f"{plan.adapter.source} holds learned tokens only"
        raise NothingFitsError(what, mend="Load it with load_textual_inversion.", state="Nothing was changed.")
    classes = ", ".join(type(model).__name__ for model in plan.models.values())
    count = len(plan.unmatched) + len(unread)
    raise (AdapterMismatchError if plan.bindings else NothingFitsError)(
        f"adapter {name!r} ({plan.adapter.describe()}; {plan.adapter.source}): "
        + (f"{count} modules or keys have no place in {classes}" if plan.bindings else f"nothing in it fits {classes}"),
        problems=[f"{label}: {reason}" for label, reason in {**plan.unmatched, **unread}.items()],
        mend=_guess(contents, family) if not plan.bindings else "Pass strict=False to load the rest.",
        state="The model was not changed.",
    )


def _guess(contents: Contents | Adapter, family: Family | None) -> str:
    """A word on what the file is for, where its names tell."""
    if isinstance(contents, Adapter):
        likely = contents.family
    else:
        modules, _, _ = read_modules(list(contents.tensors))
        ranking = rank_families(modules, contents.tensors) if modules else []
        likely = ranking[0][1].name if ranking and ranking[0][0].names > 0.5 else None
    if likely is None or (family is not None and likely == family.name):
        return "`lora-loaders inspect` shows what the file holds."
    return f"It looks like a file for {likely}" + (f", this is {family.name}." if family else ".")


def _swap(plan: AttachPlan, models: Mapping[str, nn.Module], name: str) -> None:
    """Put a plan's adapter in the place of the one of this name, whose weight and activity it takes over."""
    holders = {component: model for component, model in models.items() if name in adapter_names(model)}
    for component, model in holders.items():
        if name in fused_adapters(model):
            raise AdapterStateError(
                f"adapter {name!r} is fused into {component} and cannot be swapped",
                mend="Call unfuse_lora() first.",
                state="Nothing was changed.",
            )
    check_swap(plan, name)
    active = any(name in layer.active for model in holders.values() for _, layer in adapter_layers(model))
    weight = _common_weight(holders.values(), name)
    before = {c: layers[0][1].active for c, model in models.items() if (layers := adapter_layers(model))}
    incoming = f"incoming_{name}"
    apply(plan, incoming, activate=False)
    for component in holders.keys() | plan.components.keys():
        model = models[component]
        others = before.get(component, ())
        layers = [layer for _, layer in adapter_layers(model)]
        for layer in layers:
            own, dropout = layer.weights.get(name, weight), layer.dropouts.get(name, 0.0)
            layer.remove(name)
            if incoming in layer.templates:
                layer.rename(incoming, name)
                layer.reweigh({name: own})
                layer.dropouts[name] = dropout
            layer.active = (*others, name) if active and name not in others else others
        if component not in plan.components:
            unregister(model, name)
        train_active(layers)
        detach_adapters(model, [])


def _common_weight(models: Iterable[nn.Module], name: str) -> float:
    """The weight that all layers of an adapter share, 1 if they do not."""
    layers = (layer for model in models for _, layer in adapter_layers(model))
    weights = {layer.weights[name] for layer in layers if name in layer.templates}
    return weights.pop() if len(weights) == 1 else 1.0


def _tell(plan: AttachPlan, name: str) -> None:
    """One line for what was loaded, one for what was not."""
    ranks = {delta.rank for _, _, delta in plan.adapter.modules() if delta.rank is not None}
    shown = f"rank {min(ranks)}" + (f" to {max(ranks)}" if len(ranks) > 1 else "") if ranks else "no rank"
    logger.info("loaded %r (%s): %d modules, %s", name, plan.adapter.describe(), len(plan.bindings), shown)
    if plan.unmatched:
        samples = "; ".join(f"{label}: {reason}" for label, reason in list(plan.unmatched.items())[:3])
        logger.warning("%r (%s): %d modules have no place: %s", name, plan.adapter.source, len(plan.unmatched), samples)
    unread = [key for key, reason in plan.ignored.items() if reason == NO_SUFFIX]
    if unread:
        samples = ", ".join(unread[:3])
        logger.warning("%r (%s): %d keys are no adapter's: %s", name, plan.adapter.source, len(unread), samples)
    if plan.ignored:
        reasons = dict.fromkeys(plan.ignored.values())
        logger.info("%r: %d keys ignored: %s", name, len(plan.ignored), "; ".join(list(reasons)[:3]))
