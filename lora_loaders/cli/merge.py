"""`lora-loaders merge`: several adapters as one."""

from typing import Annotated

import typer

from lora_loaders.combining.arithmetic import METHODS
from lora_loaders.combining.merging import merge as merge_adapters

from .options import Device, Dtype, Energy, ErrorBound, FamilyName, Force, FormatName, ModelPath, Rank
from .results import counting, free_path, write_approximation


def _check_method(name: str) -> str:
    if name not in METHODS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(METHODS)}.")
    return name


def merge(
    files: Annotated[list[str], typer.Argument(metavar="FILE…", help="Files, folders, or Hub ids.")],
    output: Annotated[str, typer.Option("--output", "-o", help="A .safetensors file, or a folder.")],
    weight: Annotated[list[float] | None, typer.Option(help="Factor of each file, in order; 1 by default.")] = None,
    method: Annotated[str, typer.Option(callback=_check_method, help=f"One of {', '.join(METHODS)}.")] = "linear",
    rank: Rank = None,
    energy: Energy = None,
    error: ErrorBound = None,
    density: Annotated[float, typer.Option(help="Share of the entries that pruning keeps.")] = 0.5,
    seed: Annotated[int, typer.Option(help="For random pruning.")] = 0,
    format: FormatName = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Write in this type; the widest of the files by default.")] = None,
    model: ModelPath = None,
    family: FamilyName = None,
    device: Device = None,
    force: Force = False,
) -> None:
    """Put several adapters together on ΔW: exactly, or to a rank; prints what each module loses."""
    chosen = free_path(output, format, force)
    with counting("merging") as tick:
        done = merge_adapters(
            files,
            weight or None,
            method=method,  # type: ignore[arg-type]
            rank=rank,
            energy=energy,
            error=error,
            density=density,
            seed=seed,
            dtype=dtype.torch if dtype else None,
            model=model,
            family=family,
            device=device,
            on_module=tick,
        )
    write_approximation(done, chosen, format or done.adapter.format or "diffusers", force)
