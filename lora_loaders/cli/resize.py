"""`lora-loaders resize`: smaller ranks at the least loss."""

from typing import Annotated

import typer

from lora_loaders.combining.resizing import resize as resize_adapter

from .options import (
    ConvRank,
    Device,
    Dtype,
    Energy,
    ErrorBound,
    FamilyName,
    Force,
    FormatName,
    ModelPath,
    OutputFile,
    Rank,
    SourceArgument,
)
from .results import counting, free_path, write_approximation


def resize(
    file: SourceArgument,
    output: OutputFile,
    rank: Rank = None,
    energy: Energy = None,
    error: ErrorBound = None,
    conv_rank: ConvRank = None,
    format: FormatName = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Write in this type; as it is by default.")] = None,
    model: ModelPath = None,
    family: FamilyName = None,
    device: Device = None,
    force: Force = False,
) -> None:
    """Give every module the smallest change that keeps so much of it; prints what each one loses."""
    if rank is None and energy is None and error is None:
        raise typer.BadParameter("give --rank, --energy or --error")
    chosen = free_path(output, format, force)
    with counting("resizing") as tick:
        done = resize_adapter(
            file,
            rank=rank,
            energy=energy,
            error=error,
            conv_rank=conv_rank,
            dtype=dtype.torch if dtype else None,
            model=model,
            family=family,
            device=device,
            on_module=tick,
        )
    write_approximation(done, chosen, format or done.adapter.format or "diffusers", force)
