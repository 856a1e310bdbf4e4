"""How `lora-loaders convert` shows the conversion of a folder."""

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lora_loaders.batch import REPORT_NAME, Outcome, convert_folder, counts

from .tables import show_notes

INTERRUPTED = 130
"""What shells report of a command that ended by Ctrl-C."""


def convert_batch(source: Path, target: Path, **options: Any) -> None:
    """Convert a folder under one progress bar; options are those of `convert_folder`."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    seen: list[Outcome] = []
    interrupted = False
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("converting", total=None)

        def advance(total: int, outcome: Outcome | None) -> None:
            progress.update(task, total=total, advance=0 if outcome is None else 1)
            seen.extend([outcome] if outcome else [])

        try:
            convert_folder(source, target, progress=advance, **options)
        except KeyboardInterrupt:
            interrupted = True
    failed = sorted((outcome.source, str(outcome.error)) for outcome in seen if outcome.status == "failed")
    show_notes(console, "Failed", [f"{name}: {error.splitlines()[0]}" for name, error in failed], "red")
    skipped = {outcome.source: str(outcome.error) for outcome in seen if outcome.status == "skipped"}
    show_notes(console, "Skipped", [f"{name}: {reason}" for name, reason in sorted(skipped.items())], "yellow")
    numbers = ", ".join(f"{number:,} {status}" for status, number in counts(seen).items()) or "nothing done"
    report = options.get("report") or target / REPORT_NAME
    typer.echo(f"{target}: {numbers}{'; interrupted, the same command continues' if interrupted else ''} ({report})")
    raise typer.Exit(INTERRUPTED if interrupted else 1 if failed else 0)
