"""Deltas under the names that a format uses: a component's prefix, a module's name, fused modules' parts joined."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .adapter import Adapter
from .deltas import Delta, ExpertsDelta, LoraDelta
from .deltas.base import join_all
from .detection import is_last_by_rows
from .errors import ConversionError
from .families import Family, Names
from .families.rules import Resolved
from .formats import Format
from .kohya_names import Flattened

APART = "Write one file for each component: convert has component=…, the command line --component."


@dataclass
class Writing:
    """What is gathered while one adapter is written."""

    form: Format
    family: Family | None
    trainer_names: Flattened = "diffusers"
    """Whose names the spelling of kohya's trainers flattens."""
    stand_in: str | None = None
    """The one model beside the denoiser that is written in its place, as files of its own have it."""
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    alphas: dict[str, dict[str, LoraDelta | ExpertsDelta]] = field(
        default_factory=dict[str, dict[str, LoraDelta | ExpertsDelta]]
    )
    """Component -> name as written -> the LoRA under it, whose rank and alpha the metadata states."""
    doras: set[str] = field(default_factory=set[str])
    """Those of them, as `component.name`, that are under DoRA."""
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Path of each raw parameter that is changed -> its owner's in the model's order."""
    tuned: dict[str, Delta] = field(default_factory=dict[str, Delta])
    """Name as written -> any other delta in PEFT's own format, which a configuration of its tuner describes."""
    changes: list[Delta] = field(default_factory=list[Delta])
    """Every delta as it is written."""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    """PEFT's configuration of what is written."""
    problems: list[str] = field(default_factory=list[str])
    mends: dict[str, str] = field(default_factory=dict[str, str])
    """Problem -> the way out that its error knows."""

    def refuse(self, error: ConversionError, where: str = "") -> None:
        """Note what cannot be said, and the way out that the error knows."""
        self.problems.append(f"{where}: {error.what}" if where else error.what)
        if error.mend:
            self.mends[self.problems[-1]] = error.mend

    def refuse_component(self, component: str, reason: str = "") -> None:
        """Note that the format has no word for a component; the way out is a file of its own, where it has such."""
        apart = self.family is not None and component in self.family.apart
        what = f"{component}: the format has no word for this component{reason}"
        self.refuse(ConversionError(what, mend=APART if apart else ""))


def prefix_of(component: str, writing: Writing) -> str | None:
    """What stands before the names of a component's modules; None where the format has no word for the component."""
    form, family = writing.form, writing.family
    is_encoder = component.startswith("text_encoder")
    template = form.text_encoder if is_encoder else form.denoiser
    if template is None or (family is not None and component not in family.components):
        return None
    number = family.encoder_number(component) if is_encoder and family else ""
    encoder = family.encoders.get(component, "") if family else ""
    if form.encoders is not None:
        encoder = form.encoders.get(encoder, "")
    if "{encoder}" in template and not encoder:
        return None  # its name is not known
    if "{component}" in template or form.one_model:
        return template.format(component=component)
    if family is None or is_encoder:
        return template.format(number=number, encoder=encoder)
    # The original has the names of some components among the denoiser's own, diffusers those of none.
    if component not in (family.denoiser, writing.stand_in) and (
        dialect_of(component, writing) == "diffusers" or not _routes(component, family)
    ):
        return None
    return template + (family.level if form.has_level else "")


def stand_in(adapter: Adapter, family: Family | None) -> str | None:
    """The only denoiser of this adapter, if its own files call it as they call the first (Wan's low-noise expert)."""
    if family is None or family.denoiser in adapter.components:
        return None
    apart = [component for component in adapter.components if component in family.apart]
    return apart[0] if len(apart) == 1 else None


def _routes(component: str, family: Family) -> bool:
    """Whether the denoiser's own names hold this component's modules (Anima's text conditioner)."""
    return any(rule.component == component for rule in family.components[family.denoiser].rules)


def dialect_of(component: str, writing: Writing) -> str:
    """Whose names the format gives to a component's modules."""
    family, form = writing.family, writing.form
    names = writing.trainer_names if form.names == "trainer" else form.names
    if not component.startswith("text_encoder"):
        return names
    # Trainers, XLabs and OMI call an encoder's modules as transformers does, ComfyUI as the checkpoint does.
    if form.trainer == "kohya" and family is not None:
        return "trainer" if family.components[component].has("trainer") else "diffusers"
    return names if form.names == "original" else "diffusers"


def renamed(deltas: Mapping[str, Delta], component: str, writing: Writing) -> list[tuple[str, Delta]]:
    """Deltas under the names that the format uses: joined and swapped back where the table says so."""
    family, form = writing.family, writing.form
    if form.name == "indexed":
        return _indexed(deltas, component, writing)
    if form.one_model and family is not None and component != writing.stand_in:
        _refuse_strangers(deltas, component, family, writing)
    names = dialect_of(component, writing)
    if names == "diffusers" or family is None:
        if form.names in ("xlabs", "omi") and not component.startswith("text_encoder"):
            writing.problems.append(f"{component}: no {names} names are known for this family")
        return list(deltas.items())
    return _joined(deltas, family.components[component], names, component, writing)


def _refuse_strangers(deltas: Mapping[str, Delta], component: str, family: Family, writing: Writing) -> None:
    """Note the modules whose names alone, with no component's before them, are those of another component."""
    owners = {path: _reader(path, family) for path in deltas}
    strangers = {path: owner for path, owner in owners.items() if owner not in (component, None)}
    if len(strangers) == len(deltas):
        others = ", ".join(sorted({str(owner) for owner in strangers.values()}))
        writing.refuse_component(component, f", and its names are read as those of {others}")
    else:
        writing.problems += [f"{component}.{path}: read as one of {owner}" for path, owner in strangers.items()]


def _reader(path: str, family: Family) -> str | None:
    """The component that a name without a prefix is read for: the first that knows it."""
    for component, names in family.components.items():
        if readings := names.resolve(path):
            return readings[0].rule.component or component
    return None


def _joined(
    deltas: Mapping[str, Delta], names: Names, dialect: Any, component: str, writing: Writing
) -> list[tuple[str, Delta]]:
    reader = names.writing(dialect)
    groups: dict[str, tuple[Resolved, dict[str, Delta]]] = {}
    for path, delta in deltas.items():
        source, resolved = reader.source(path)
        if dialect == "xlabs" and resolved.is_diffusers:
            writing.problems.append(f"{component}.{path}: the format has no name for this module")
            continue
        if resolved.is_diffusers and (other := _owner(source, names)):
            # Wan's `norm3`: written so, it would be read as the other module's, or take its place in the file.
            writing.problems.append(f"{component}.{path}: the format means {other} by this name, and has none for it")
            continue
        groups.setdefault(source, (resolved, {}))[1][path] = delta
    named: list[tuple[str, Delta]] = []
    for source, (resolved, parts) in groups.items():
        try:
            delta = _join(resolved, parts)
            swap = resolved.rule.swap
            swapped = swap == "all" or (swap == "last" and _ends(resolved, delta, deltas, writing.family))
            named.append((source, delta.swap_halves() if swapped else delta))
        except ConversionError as error:
            writing.refuse(error, f"{component}.{source}")
    return named


def _owner(name: str, names: Names) -> str | None:
    """The module that the original calls as diffusers calls another one."""
    return next((r.paths[0] for r in names.resolve(name) if not r.is_diffusers and name not in r.paths), None)


def _ends(resolved: Resolved, delta: Delta, deltas: Mapping[str, Delta], family: Family | None) -> bool:
    """Whether this is the last block: its rows say it, or a published model has as many; reading asks the same."""
    told = is_last_by_rows(delta)
    if told is not None:
        return told
    blocks = resolved.paths[0].partition(".")[0]
    depths = family.depths.get(blocks, ()) if family else ()
    last = max(int(path.split(".")[1]) for path in deltas if path.startswith(f"{blocks}."))
    return resolved.block == last and last + 1 in depths


def _join(resolved: Resolved, parts: Mapping[str, Delta]) -> Delta:
    if len(resolved.paths) == 1:
        return next(iter(parts.values()))
    shares = dict(zip(resolved.paths, resolved.rule.shares, strict=True))
    known, sample = next(iter(parts.items()))
    unit = sample.out_features // shares[known]
    whole = [parts.get(path) or _zero(sample, unit * shares[path]) for path in resolved.paths]
    return join_all(whole)


def _zero(like: Delta, rows: int) -> Delta:
    """No change, in the algebra of its sister part: zero rows on the same `down`."""
    if not isinstance(like, LoraDelta):
        raise ConversionError(f"a part of this fused module is missing, and {like.kind} cannot say no change")
    up = like.up.new_zeros(rows, *like.up.shape[1:])
    return replace(like, up=up, up_bias=None, bias=None)


def _indexed(deltas: Mapping[str, Delta], component: str, writing: Writing) -> list[tuple[str, Delta]]:
    order = writing.family.traversal.get(component, ()) if writing.family else ()
    places = {path: index for index, (_, path) in enumerate(order)}
    named: list[tuple[str, Delta]] = []
    for path, delta in deltas.items():
        if path in places:
            named.append((f":{places[path]}", delta))
        else:
            writing.problems.append(f"{component}.{path}: not among the modules that this format numbers")
    missing = len(order) - len(named)
    if missing and not writing.problems:
        writing.problems.append(f"{component}: the format numbers {len(order)} modules and {missing} have no change")
    return named
