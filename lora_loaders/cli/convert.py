"""`lora-loaders convert`: the same adapter in another format."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lora_loaders.conversion import parse
from lora_loaders.converting import convert as convert_adapter
from lora_loaders.errors import AdapterFileError
from lora_loaders.files import read_header
from lora_loaders.inspecting import open_contents
from lora_loaders.locating import DEFAULT_NAMES, PICKLES, HubOptions

from .options import FORMAT_NAMES, AllowPickle, Dtype, FamilyName, Revision, Subfolder, Token, WeightName, check_format
from .tables import counted, grouped, in_bytes, show_notes


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A file, a folder, or a Hub id (owner/name).")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A .safetensors file, or a folder.")],
    format: Annotated[str, typer.Option(callback=check_format, help=f"One of {', '.join(FORMAT_NAMES)}.")],
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
