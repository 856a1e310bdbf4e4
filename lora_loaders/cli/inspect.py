"""`lora-loaders inspect`: what a file holds."""

import json

import typer
from rich.console import Console

from lora_loaders.inspecting import inspect_contents, open_header
from lora_loaders.locating import HubOptions

from .options import AllowPickle, AsJson, FamilyName, Revision, SourceArgument, Subfolder, Token, WeightName
from .tables import show_inspection


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
    contents, path = open_header(file, HubOptions(weight_name, subfolder, revision, token), allow_pickle=allow_pickle)
    facts = inspect_contents(contents, path, family)
    if as_json:
        typer.echo(json.dumps(facts.as_json(), indent=2))
    else:
        show_inspection(facts, Console())
