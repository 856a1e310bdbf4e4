"""Formats: how does a trainer write an adapter into keys? One instance of `Format` each."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lora_loaders.errors import UnknownFormatError

from .diffusers import DIFFUSERS as DIFFUSERS
from .diffusers import DIFFUSERS_OLD, PEFT
from .format import Format as Format
from .grammar import NO_SUFFIX as NO_SUFFIX
from .grammar import Key, read_keys
from .grammar import RawModule as RawModule
from .grammar import is_embedding as is_embedding
from .indexed import INDEXED, is_indexed, read_indexed
from .indexed import adapted_classes as adapted_classes
from .kohya import KOHYA as KOHYA
from .kohya import KOHYA_DIFFUSERS, KOHYA_ORIGINAL, LYCORIS, ONETRAINER
from .original import BFL, OMI, ORIGINAL, XLABS

FORMATS: tuple[Format, ...] = (
    *(PEFT, DIFFUSERS, DIFFUSERS_OLD, KOHYA, KOHYA_ORIGINAL, KOHYA_DIFFUSERS, ORIGINAL, BFL, XLABS),
    *(ONETRAINER, LYCORIS, OMI, INDEXED),
)

# Formats of the same prefixes and suffixes, told apart by whose names they write: what the keys alone are taken for ->
# what the file may be instead.
ALIKE: Mapping[str, tuple[Format, ...]] = {
    PEFT.name: (BFL,),
    ORIGINAL.name: (BFL,),
    DIFFUSERS.name: (OMI,),
    DIFFUSERS_OLD.name: (XLABS,),
    OMI.name: (DIFFUSERS_OLD,),
}

KOHYAS = (KOHYA.name, KOHYA_ORIGINAL.name, KOHYA_DIFFUSERS.name)
"""Those that kohya's trainers and their readers know by the same prefix, suffixes and header."""


def format_named(name: str) -> Format:
    """The format of this name.

    Raises:
        UnknownFormatError: no such format.
    """
    for form in FORMATS:
        if form.name == name:
            return form
    raise UnknownFormatError(
        f"no format {name!r}",
        mend=f"There are {', '.join(form.name for form in FORMATS)}.",
        state="Nothing was read or written.",
    )


def read_modules(keys: Sequence[str]) -> tuple[list[RawModule], dict[str, str], str]:
    """Group a file's keys by module.

    Returns:
        The modules; the keys that belong to none, with the reason; and the name of the format.
    """
    if keys and is_indexed(keys):
        modules, left, _ = read_indexed(keys)
        return modules, left, INDEXED.name
    modules, left, parsed = read_keys(keys)
    return modules, left, detect(parsed)


def detect(keys: Iterable[Key]) -> str:
    """Name of the format that most keys speak for."""
    votes = Counter(_format_of(key) for key in keys)
    if not votes:
        return "unknown"
    specific = [name for name in votes if name in (ONETRAINER.name, LYCORIS.name)]
    return specific[0] if specific else max(votes, key=lambda name: votes[name])


def told_by_names(spelling: str, names: str | None) -> str:
    """The format, where names tell it from one of the same prefixes and suffixes; None: they are the same in both."""
    return next((form.name for form in ALIKE.get(spelling, ()) if form.names == names), spelling)


def _format_of(key: Key) -> str:
    if key.prefix == "":
        return {"peft": PEFT.name, "diffusers-old": DIFFUSERS_OLD.name}.get(key.style or "", ORIGINAL.name)
    if key.prefix in DIFFUSERS.prefixes:
        return {"kohya": OMI.name, "diffusers-old": DIFFUSERS_OLD.name}.get(key.style or "", DIFFUSERS.name)
    return next((form.name for form in FORMATS if key.prefix in form.prefixes), ORIGINAL.name)
