"""Options that several commands share, said once."""

from enum import Enum
from typing import Annotated

import torch
import typer

from lora_loaders.formats import FORMATS

FORMAT_NAMES = tuple(form.name for form in FORMATS)


class Dtype(str, Enum):
    """Floating types that files are written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    @property
    def torch(self) -> torch.dtype:
        """The type itself."""
        return getattr(torch, self.value)


def check_format(name: str | None) -> str | None:
    """The name, if a format has it."""
    if name is not None and name not in FORMAT_NAMES:
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
OutputFile = Annotated[str, typer.Argument(metavar="OUT", help="A .safetensors file, or a folder.")]
FormatName = Annotated[
    str | None, typer.Option("--format", callback=check_format, help=f"One of {', '.join(FORMAT_NAMES)}.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")]
Rank = Annotated[int | None, typer.Option(help="Rank of each module; beside --energy or --error their most.", min=1)]
ConvRank = Annotated[int | None, typer.Option(help="Rank for kernels larger than 1; as --rank by default.", min=1)]
Energy = Annotated[float | None, typer.Option(help="Smallest rank that keeps this share of the squares, 0 to 1.")]
ErrorBound = Annotated[float | None, typer.Option("--error", help="Smallest rank within this relative error, 0 to 1.")]
ModelPath = Annotated[
    str | None,
    typer.Option("--model", help="Base weights, where ΔW depends on them (DoRA, OFT, IA3, GLoRA): a folder or file."),
]
Device = Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, …")]
