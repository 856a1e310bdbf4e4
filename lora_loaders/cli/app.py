"""The command line put together: the commands, and how an error ends."""

import re
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from lora_loaders.errors import LoraLoadersError

from .convert import convert
from .extract import extract
from .inspect import inspect
from .merge import merge
from .plan import plan
from .resize import resize
from .verify import verify

COMMANDS = (inspect, plan, verify, convert, resize, merge, extract)


class _Commands(TyperGroup):
    """Ends errors that are no defects of ours as a message without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (LoraLoadersError, OSError) as error:
            head, _, rest = _in_options(str(error)).partition("\n")
            message = Text.assemble(
                (type(error).__name__, "bold red"), ": ", (head, "bold"), f"\n{rest}" if rest else ""
            )
            Console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(2) from error


def _in_options(message: str) -> str:
    """A message that speaks of Python arguments, in words of the command line."""
    message = message.replace("use_safetensors=False", "--allow-pickle")
    return re.sub(r"\b([a-z_]+)=…", lambda match: f"--{match[1].replace('_', '-')} …", message)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    # A traceback with local variables would print tokens.
    pretty_exceptions_show_locals=False,
    help="Look into LoRA-type adapters for diffusers, check them against a model, and convert them.",
)
for command in COMMANDS:
    app.command()(command)
