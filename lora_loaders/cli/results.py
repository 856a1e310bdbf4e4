"""How the commands that make adapters show their progress, write their file and tell what was lost."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lora_loaders.combining.approximating import Approximation
from lora_loaders.errors import AdapterFileError
from lora_loaders.writing import target_path, write_adapter

from .tables import counted, grouped, in_bytes, show_notes


@contextmanager
def counting(what: str) -> Generator[Callable[[str], None]]:
    """A line on stderr that counts modules as they are done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        done = 0

        def tick(place: str) -> None:
            nonlocal done
            done += 1
            progress.update(task, description=f"{what} {done:,}: {place}")

        yield tick


def free_path(output: str, format: str | None, force: bool) -> Path:
    """The file that OUT means, if it may be written: asked before the work rather than after it."""
    path = target_path(output, format or "")
    if path.exists() and not force:
        raise AdapterFileError(
            f"{path} is there already", mend="Choose another name, or pass --force.", state="It was not changed."
        )
    return path


def write_approximation(done: Approximation, path: Path, format: str, force: bool) -> None:
    """Write the file, and print every module's error and that of all together."""
    path = write_adapter(done.adapter, path, format, overwrite=force)
    show_errors(done)
    show_notes(Console(stderr=True), "Left out", grouped(done.left_out, "modules"), "yellow")
    modules = counted(sum(done.adapter.components.values()), "modules")
    size = in_bytes(path.stat().st_size)
    typer.echo(f"{path}: {format}, {modules}, {size}, relative error of ΔW {done.error:.3g}")


def show_errors(done: Approximation) -> None:
    """One line a module: its relative error, its new rank, its place."""
    typer.echo("   error  rank  module")
    for place, fit in done.fits.items():
        typer.echo(f"{fit.error:8.2g}  {fit.rank or '–':>4}  {place}")
