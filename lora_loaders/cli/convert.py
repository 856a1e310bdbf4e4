"""`lora-loaders convert`: the same adapter in another format."""

from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lora_loaders.batch import REPORT_NAME
from lora_loaders.combining.resizing import resize, to_full
from lora_loaders.conversion import parse
from lora_loaders.converting import convert as convert_adapter
from lora_loaders.errors import AdapterFileError
from lora_loaders.files import read_header
from lora_loaders.inspecting import open_contents
from lora_loaders.locating import DEFAULT_NAMES, PICKLES, HubOptions

from .batch import convert_batch
from .options import (
    FORMAT_NAMES,
    AllowPickle,
    Dtype,
    Energy,
    ErrorBound,
    FamilyName,
    Force,
    ModelPath,
    Rank,
    Revision,
    Subfolder,
    Token,
    WeightName,
    check_format,
)
from .results import show_errors
from .tables import counted, grouped, in_bytes, show_notes


class Algebra(str, Enum):
    """What `--as` can turn any algebra into."""

    lora = "lora"
    full = "full"


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A file, a folder, or a Hub id (owner/name).")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A .safetensors file, or a folder.")],
    format: Annotated[
        str | None,
        typer.Option(
            callback=check_format, help=f"One of {', '.join(FORMAT_NAMES)}; with --as the source's own by default."
        ),
    ] = None,
    weight_name: WeightName = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
    token: Token = None,
    family: FamilyName = None,
    component: Annotated[
        str | None, typer.Option(help="Write what changes this component alone: transformer_2.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Write in this type; as it is by default.")] = None,
    force: Force = False,
    allow_pickle: AllowPickle = False,
    algebra: Annotated[Algebra | None, typer.Option("--as", help="Say every change in this algebra.")] = None,
    rank: Rank = None,
    energy: Energy = None,
    error: ErrorBound = None,
    model: ModelPath = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Files at a time, for a folder; up to four by default.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help=f"Report of a folder; DST/{REPORT_NAME} by default.")] = None,
) -> None:
    """Write an adapter in another format or algebra, whole or not at all; or every adapter below a folder into another.

    A folder is continued where an earlier run ended: what is finished and has not changed since is skipped. Exit code
    1 if any of its files failed.
    """
    if algebra is not Algebra.lora and (rank, energy, error) != (None, None, None):
        raise typer.BadParameter("--rank, --energy and --error go with --as lora")
    if format is None and algebra is None:
        raise typer.BadParameter("give --format, or --as")
    chosen = dtype.torch if dtype else None
    if Path(source).is_dir() and target.suffix != ".safetensors" and weight_name is None and subfolder is None:
        if algebra is not None or component is not None:
            raise typer.BadParameter("--as and --component take one file at a time")
        options = {"format": format, "family": family, "dtype": chosen, "overwrite": force, "jobs": jobs}
        convert_batch(Path(source), target, use_safetensors=not allow_pickle and None, report=report, **options)
        return
    path = _target(target, format or "")
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
        if component is not None:
            adapter = adapter.only(component)
        format = format or adapter.format or "diffusers"
        done = None
        if algebra is not None:
            to_lora = partial(resize, rank=rank, energy=energy, error=error, action="to lora")
            change = to_lora if algebra is Algebra.lora else to_full
            done = change(adapter, dtype=chosen, model=model)
            adapter = done.adapter
        progress.update(task, advance=1, description="writing")
        path = convert_adapter(adapter, path, format=format, dtype=chosen, overwrite=force)
        progress.update(task, advance=1, description="written")
    if done is not None:
        show_errors(done)
    show_notes(console, "Left out", grouped(adapter.ignored, "keys"), "yellow")
    modules, keys = sum(adapter.components.values()), len(read_header(path)[0])
    sizes = f"{counted(modules, 'modules')}, {len(contents.tensors):,} → {keys:,} keys, {in_bytes(path.stat().st_size)}"
    lost = f", relative error of ΔW {done.error:.3g}" if done else ""
    typer.echo(f"{path}: {adapter.describe()} → {format}, {sizes}{lost}")


def _target(target: Path, format: str) -> Path:
    """The file that DST means, as `write_adapter` takes it."""
    if target.suffix in PICKLES:
        raise AdapterFileError(
            f"{target}: only safetensors files are written",
            mend="End the name with .safetensors, or give a folder.",
            state="Nothing was written.",
        )
    return target if target.suffix == ".safetensors" else target / DEFAULT_NAMES[format == "peft"]
