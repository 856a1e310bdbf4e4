"""`lora-loaders plan`: what a file would change in a model, without the model's weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from torch import nn

from lora_loaders.adapter import Adapter
from lora_loaders.architectures import Blueprint, build, build_all, find_blueprints, is_text_encoder
from lora_loaders.conversion import parse
from lora_loaders.detection import family_named
from lora_loaders.errors import LoraLoadersError
from lora_loaders.families import Family
from lora_loaders.files import Contents
from lora_loaders.formats import NO_SUFFIX
from lora_loaders.inspecting import likely_families, open_header
from lora_loaders.loading import family_of, layout_of, may_widen, plan_contents
from lora_loaders.locating import HubOptions
from lora_loaders.plans import AttachPlan, plan_adapter

from .options import AllowPickle, AsJson, FamilyName, Revision, SourceArgument, Subfolder, Token, WeightName
from .tables import show_keys, show_plan


def plan(
    file: SourceArgument,
    model: Annotated[
        Path | None, typer.Option(help="A pipeline's folder, a model's folder, or a config.json; names alone without.")
    ] = None,
    component: Annotated[str | None, typer.Option(help="Check this component alone, or name a lone model.")] = None,
    weight_name: WeightName = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
    token: Token = None,
    family: FamilyName = None,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Tell what would match in a model, without loading any weights; exit code 1 if not everything fits."""
    contents, _ = open_header(file, HubOptions(weight_name, subfolder, revision, token), allow_pickle=allow_pickle)
    if model is None:
        _plan_by_names(parse(contents, family), contents, as_json)
    outcome, unchecked = _plan(contents, model, component, family_named(family) if family else None)
    fits = bool(outcome.bindings) and not outcome.problems and not outcome.unmatched
    likely = [] if outcome.bindings else likely_families(contents)
    if as_json:
        typer.echo(json.dumps(_plan_facts(outcome, unchecked, likely, fits), indent=2))
    else:
        show_plan(outcome, unchecked, likely, fits, Console())
    raise typer.Exit(0 if fits else 1)


def _plan_by_names(adapter: Adapter, contents: Contents, as_json: bool) -> NoReturn:
    """Say of each key what it is bound to by its name alone, or why it is not."""
    keys = plan_adapter({}, replace(adapter, deltas={})).keys
    unknown = {key for module in adapter.unresolved for key in module.keys}
    unknown |= {key for key, reason in adapter.ignored.items() if reason == NO_SUFFIX}
    fates = {key: keys[key] for key in contents.tensors}
    keys = fates | {key: fates[key].replace("ignored: ", "unknown: ") for key in unknown}
    likely = likely_families(contents)
    if as_json:
        facts = {"file": adapter.source, "format": adapter.format, "family": adapter.family}
        typer.echo(json.dumps({**facts, "likely_families": likely, "unknown": len(unknown), "keys": keys}, indent=2))
    else:
        show_keys(adapter, keys, likely, len(unknown), Console())
    raise typer.Exit(1 if unknown else 0)


def _plan(
    contents: Contents, model: Path, component: str | None, family: Family | None
) -> tuple[AttachPlan, dict[str, int]]:
    """The plan, and the components of the file that were left aside with their numbers of modules."""
    blueprints, pipeline = find_blueprints(model)
    if pipeline is None:
        models = _lone_model(blueprints[""], component)
    else:
        if component is not None and component not in blueprints:
            known = ", ".join(blueprints)
            raise LoraLoadersError(f"{model} has no component {component!r}", mend=f"It has {known}.")
        chosen = {component} if component else {name for name in blueprints if not is_text_encoder(name)}
        models = build_all(blueprints, chosen)
    family = family or next((found for m in models.values() if (found := family_of(m))), None)
    if family is None and (guess := parse(contents).family):
        family = family_named(guess)  # an encoder alone does not tell
    adapter = parse(contents, family, layout_of(models, family))
    is_whole = pipeline is not None and component is None
    if is_whole:
        # Encoders take longest to build, and most files leave them alone.
        named = {*adapter.components, *(module.component for module in adapter.unresolved)}
        models |= build_all(blueprints, named - models.keys())
        adapter = parse(contents, family, layout_of(models, family))
    checked, unchecked = (adapter, dict[str, int]()) if is_whole else _only(adapter, models)
    widens = pipeline is not None and may_widen(pipeline)
    return plan_contents(models, checked, family, may_widen=widens), unchecked


def _lone_model(blueprint: Blueprint, component: str | None) -> dict[str, nn.Module]:
    """The model under its component's name: the given one, the family's, or the folder's."""
    model = build(blueprint)
    family = family_of(model)
    by_folder = blueprint.folder if is_text_encoder(blueprint.folder) else None
    fallback = "transformer" if "_class_name" in blueprint.config else "text_encoder"
    return {component or (family.denoiser if family else by_folder or fallback): model}


def _only(adapter: Adapter, models: Mapping[str, nn.Module]) -> tuple[Adapter, dict[str, int]]:
    """The part of an adapter that concerns these models, and the modules of each component that is left aside."""
    aside = {component: count for component, count in adapter.components.items() if component not in models}
    unresolved = tuple(m for m in adapter.unresolved if m.component in models or not is_text_encoder(m.component))
    deltas = {component: deltas for component, deltas in adapter.deltas.items() if component in models}
    bound = {k: targets for k, targets in adapter.bound.items() if any(t.partition(".")[0] in models for t in targets)}
    return replace(adapter, deltas=deltas, unresolved=unresolved, bound=bound), aside


def _plan_facts(plan: AttachPlan, unchecked: Mapping[str, int], likely: Sequence[str], fits: bool) -> dict[str, Any]:
    return {
        "fits": fits,
        "file": plan.adapter.source,
        "format": plan.format,
        "family": plan.family,
        "likely_families": list(likely),
        "models": {component: type(model).__name__ for component, model in plan.models.items()},
        "components": plan.components,
        "matched": list(plan.matched),
        "unmatched": dict(plan.unmatched),
        "problems": list(plan.problems),
        "ignored": dict(plan.ignored),
        "unchecked": dict(unchecked),
        "keys": plan.keys,
    }
