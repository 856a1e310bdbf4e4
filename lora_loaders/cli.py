"""The command line: `lora-loaders inspect | plan | convert`. The one place of the package that prints.

Results go to stdout, progress, warnings and errors to stderr. Exit codes: 0 well, 1 `plan` found that a file does not
fit, 2 an error.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from torch import nn
from typer.core import TyperGroup

from .adapter import Adapter
from .architectures import Blueprint, build, build_all, find_blueprints, is_text_encoder
from .conversion import parse
from .detection import family_named
from .errors import AdapterFileError, LoraLoadersError
from .families import Family
from .files import Contents, read_header
from .formats import FORMATS
from .inspecting import inspect_contents, likely_families, open_contents
from .loading import family_of, layout_of, may_widen, plan_contents
from .locating import DEFAULT_NAMES, PICKLES, HubOptions
from .plans import AttachPlan
from .tables import counted, grouped, in_bytes, show_inspection, show_notes, show_plan
from .writing import convert as convert_adapter

FORMAT_NAMES = tuple(form.name for form in FORMATS)


class Dtype(str, Enum):
    """Floating types that `convert` writes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class _Commands(TyperGroup):
    """Ends errors that are no defects of ours as a message without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (LoraLoadersError, OSError) as error:
            head, _, rest = _in_options(str(error)).partition("\n")
            message = Text.assemble(
                (type(error).__name__, "bold red"), ": ", (head, "bold"), f"\n{rest}" if rest else ""
            )
            Console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(2) from error


def _in_options(message: str) -> str:
    """A message that speaks of Python arguments, in words of the command line."""
    message = message.replace("use_safetensors=False", "--allow-pickle")
    return re.sub(r"\b([a-z_]+)=…", lambda match: f"--{match[1].replace('_', '-')} …", message)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    # A traceback with local variables would print tokens.
    pretty_exceptions_show_locals=False,
    help="Look into LoRA-type adapters for diffusers, check them against a model, and convert them.",
)


def _check_format(name: str) -> str:
    if name not in FORMAT_NAMES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(FORMAT_NAMES)}.")
    return name


SourceArgument = Annotated[str, typer.Argument(help="A file, a folder, or a Hub id (owner/name).", metavar="FILE")]
WeightName = Annotated[str | None, typer.Option(help="Which file of a folder or Hub repository.")]
Subfolder = Annotated[str | None, typer.Option(help="Folder inside the folder or Hub repository.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Token = Annotated[str | None, typer.Option(help="Hub token; the stored login is used without it.")]
FamilyName = Annotated[str | None, typer.Option("--family", help="Read as this family, whatever the names say.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read a pickle, with torch's weights-only reader.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command()
def inspect(
    file: SourceArgument,
    weight_name: WeightName = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
    token: Token = None,
    family: FamilyName = None,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Show what a file holds: format, family, algebras, ranks, alphas, sizes, metadata."""
    contents, path = open_contents(file, HubOptions(weight_name, subfolder, revision, token), allow_pickle=allow_pickle)
    facts = inspect_contents(contents, path, family)
    if as_json:
        typer.echo(json.dumps(facts.as_json(), indent=2))
    else:
        show_inspection(facts, Console())


@app.command()
def plan(
    file: SourceArgument,
    model: Annotated[Path, typer.Option(help="A pipeline's folder, a model's folder, or a config.json.")],
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
    contents, _ = open_contents(file, HubOptions(weight_name, subfolder, revision, token), allow_pickle=allow_pickle)
    outcome, unchecked = _plan(contents, model, component, family_named(family) if family else None)
    fits = bool(outcome.bindings) and not outcome.problems and not outcome.unmatched
    likely = [] if outcome.bindings else likely_families(contents)
    if as_json:
        typer.echo(json.dumps(_plan_facts(outcome, unchecked, likely, fits), indent=2))
    else:
        show_plan(outcome, unchecked, likely, fits, Console())
    raise typer.Exit(0 if fits else 1)


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
    }


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A file, a folder, or a Hub id (owner/name).")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A .safetensors file, or a folder.")],
    format: Annotated[str, typer.Option(callback=_check_format, help=f"One of {', '.join(FORMAT_NAMES)}.")],
    weight_name: WeightName = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
    token: Token = None,
    family: FamilyName = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Write in this type; as it is by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write an adapter in another format, whole or not at all."""
    path = _target(target, format)
    if path.exists() and not force:
        raise AdapterFileError(
            f"{path} is there already", mend="Choose another name, or pass --force.", state="It was not changed."
        )
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("reading", total=3)
        hub = HubOptions(weight_name, subfolder, revision, token)
        contents, _ = open_contents(source, hub, allow_pickle=allow_pickle)
        progress.update(task, advance=1, description="naming")
        adapter = parse(contents, family)
        progress.update(task, advance=1, description="writing")
        chosen = getattr(torch, dtype.value) if dtype else None
        path = convert_adapter(adapter, path, format=format, dtype=chosen, overwrite=force)
        progress.update(task, advance=1, description="written")
    show_notes(console, "Left out", grouped(adapter.ignored, "keys"), "yellow")
    modules, keys = sum(adapter.components.values()), len(read_header(path)[0])
    sizes = f"{counted(modules, 'modules')}, {len(contents.tensors):,} → {keys:,} keys, {in_bytes(path.stat().st_size)}"
    typer.echo(f"{path}: {adapter.describe()} → {format}, {sizes}")


def _target(target: Path, format: str) -> Path:
    """The file that DST means, as `write_adapter` takes it."""
    if target.suffix in PICKLES:
        raise AdapterFileError(
            f"{target}: only safetensors files are written",
            mend="End the name with .safetensors, or give a folder.",
            state="Nothing was written.",
        )
    return target if target.suffix == ".safetensors" else target / DEFAULT_NAMES[format == "peft"]


if __name__ == "__main__":
    app()
