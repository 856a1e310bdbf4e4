"""`lora-loaders verify`: is a file what it says it is?"""

import json

import typer
from rich.console import Console

from lora_loaders.locating import HubOptions
from lora_loaders.verifying import verify as verify_file

from .options import AllowPickle, AsJson, FamilyName, Revision, SourceArgument, Subfolder, Token, WeightName
from .tables import show_verification


def verify(
    file: SourceArgument,
    weight_name: WeightName = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
    token: Token = None,
    family: FamilyName = None,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Check a file: whole, finite, pairs complete, names known, header true; exit code 1 if something is wrong."""
    hub = HubOptions(weight_name, subfolder, revision, token)
    outcome = verify_file(file, family=family, hub=hub, use_safetensors=False if allow_pickle else None)
    if as_json:
        typer.echo(json.dumps(outcome.as_json(), indent=2))
    else:
        show_verification(outcome, Console())
    raise typer.Exit(0 if outcome.passed else 1)
