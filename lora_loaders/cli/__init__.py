"""The command line, one file a command: the one room of the package that prints.

Results go to stdout, progress, warnings and errors to stderr. Exit codes: 0 well, 1 `plan` found that a file does not
fit, 2 an error.
"""

from .app import app

__all__ = ["app"]
