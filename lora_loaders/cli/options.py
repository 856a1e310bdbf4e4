"""Options that several commands share, said once."""

from enum import Enum
from typing import Annotated

import typer

from lora_loaders.formats import FORMATS

FORMAT_NAMES = tuple(form.name for form in FORMATS)


class Dtype(str, Enum):
    """Floating types that files are written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def check_format(name: str) -> str:
    """The name, if a format has it."""
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
