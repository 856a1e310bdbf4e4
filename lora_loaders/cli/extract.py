"""`lora-loaders extract`: what a tuned model has learned."""

from enum import Enum
from typing import Annotated

import typer

from lora_loaders.combining.extracting import extract as extract_adapter

from .options import ConvRank, Device, Dtype, Energy, ErrorBound, FamilyName, Force, FormatName, OutputFile, Rank
from .results import counting, free_path, write_approximation


class Algebra(str, Enum):
    """What a difference can be said in."""

    lora = "lora"
    lokr = "lokr"
    full = "full"


def extract(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The changed model: a folder or a checkpoint.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that it was made from.")],
    output: OutputFile,
    algebra: Annotated[Algebra, typer.Option("--as", help="The algebra of the adapter.")] = Algebra.lora,
    rank: Rank = None,
    energy: Energy = None,
    error: ErrorBound = None,
    conv_rank: ConvRank = None,
    factor: Annotated[int, typer.Option(help="Largest size of w1 for lokr; -1: next to the square root.")] = -1,
    vectors: Annotated[bool, typer.Option("--vectors", help="Keep changes of biases and norms too.")] = False,
    format: FormatName = "kohya",
    dtype: Annotated[Dtype, typer.Option(help="Write in this type.")] = Dtype.float16,
    component: Annotated[str | None, typer.Option(help="What adapters call a lone model.")] = None,
    family: FamilyName = None,
    device: Device = None,
    force: Force = False,
) -> None:
    """Write the difference of two models as an adapter, weight by weight; prints what each module loses."""
    chosen = free_path(output, format, force)
    with counting("extracting") as tick:
        done = extract_adapter(
            tuned,
            base,
            algebra=algebra.value,
            rank=rank,
            energy=energy,
            error=error,
            conv_rank=conv_rank,
            factor=factor,
            vectors=vectors,
            dtype=dtype.torch,
            family=family,
            component=component,
            device=device,
            on_module=tick,
        )
    write_approximation(done, chosen, format or "kohya", force)
