"""Every exception of the package; a message says what, where, how to mend it and what state things are in.

LoraLoadersError
├─ AdapterFileError (ValueError)      the file itself
│  ├─ UnknownFormatError              keys that no spelling explains
│  │  └─ CheckpointError              a model's own weights, which change nothing
│  ├─ UnknownFamilyError              names that belong to no family, or to several
│  ├─ MalformedAdapterError           truncated, half a pair, ranks that disagree, NaN
│  └─ UnsafeFileError                 a pickle, without leave to read it
├─ ConversionError (ValueError)       what a target format cannot say, and which modules
├─ AdapterMismatchError (ValueError)  adapter against model; `.problems` holds every one
│  └─ NothingFitsError                nothing in the adapter has a place in the model
├─ AdapterStateError (ValueError)     no such adapter, name taken, fused and must not be
└─ UnsupportedBaseError (TypeError)   a base layer that cannot carry or merge this
"""

from collections.abc import Sequence

SHOWN = 12
UNTOUCHED = "Nothing was loaded or changed."


class LoraLoadersError(Exception):
    """Base of all errors of this package.

    Args:
        what: one sentence: what went wrong.
        problems: where, one line a place; all are kept in `.problems`, the first dozen are printed.
        mend: how to mend it.
        state: what state things are in now.
    """

    def __init__(self, what: str, *, problems: Sequence[str] = (), mend: str = "", state: str = "") -> None:
        self.what = what
        self.problems = tuple(problems)
        self.mend = mend
        self.state = state
        lines = [what, *(f"  {problem}" for problem in self.problems[:SHOWN])]
        if len(self.problems) > SHOWN:
            lines.append(f"  … and {len(self.problems) - SHOWN} more (all of them in .problems)")
        super().__init__("\n".join([*lines, *filter(None, (mend, state))]))


class AdapterFileError(LoraLoadersError, ValueError):
    """The file cannot be read as an adapter."""


class UnknownFormatError(AdapterFileError):
    """No known spelling explains the keys."""


class CheckpointError(UnknownFormatError):
    """The file holds a model's own weights, not changes to them."""


class UnknownFamilyError(AdapterFileError):
    """The module names belong to no model family, or to several."""


class MalformedAdapterError(AdapterFileError):
    """The file is truncated, or its tensors contradict one another."""


class UnsafeFileError(AdapterFileError):
    """The file is a pickle and nobody allowed reading it."""


class ConversionError(LoraLoadersError, ValueError):
    """The adapter cannot be said in the target format."""


class AdapterMismatchError(LoraLoadersError, ValueError):
    """The adapter does not fit the model."""


class NothingFitsError(AdapterMismatchError):
    """Nothing in the adapter has a place in the model."""


class AdapterStateError(LoraLoadersError, ValueError):
    """The request does not go with the adapters' present state."""


class UnsupportedBaseError(LoraLoadersError, TypeError):
    """A base layer cannot carry this change, or cannot have it merged."""
