"""The row language in which a family says its names, and the two-way index that is built from it.

    img_in -> x_embedder                                   rename
    img_mod.linear, img_mod.lin -> norm1.linear            two spellings of one source; the first is written
    linear1 -> attn.to_q | attn.to_k | proj_mlp:4          split of the rows; `:4` is this part's share of them
    final_layer.adaLN_modulation.1 -> norm_out.linear ~    the two halves of the rows change places
    context.adaLN -> norm1_context.linear ~last            … in the last block only, whose rows are two an input
    modulation -> scale_shift_table (p)                    a raw parameter, not a module
    img_attn_qkv -> attn.to_q | attn.to_k | attn.to_v (r)  read, never written: another row says what to write
    mod_y -> norm1_context.linear_1 (last)                 in the last block only; another row is for the others
    qkv_proj -> to_q | to_k | to_v /128                    some files interleave the parts by heads of this width
    adaln_single.** -> time_embed.**                       the rest of the path stays
    llm_adapter.** -> @text_conditioner.**                 another component
    proj_out                                               the same name on both sides
    [double_blocks.{i} -> transformer_blocks.{i} ; …]      prefixes of the indented rows below, on one line or several

Rules are whole-path templates, matched in no order. A name is looked up *flattened*: dots become underscores, and
numbers become holes, so dotted, half-flattened and flattened spellings of one name are one entry, found in one step.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

HOLE = re.compile(r"\{(\w+)\}")
NUMBER = re.compile(r"\d+")
Dialect = Literal["original", "trainer", "xlabs", "diffsynth", "omi", "fused"]

# Names that diffusers gives to projections it has fused, and OneTrainer and SimpleTuner write into files.
FUSED: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("to_q", "to_k", "to_v"), ("to_qkv", "qkv")),
    (("add_q_proj", "add_k_proj", "add_v_proj"), ("to_added_qkv", "added_qkv")),
    (("to_k", "to_v"), ("to_kv",)),
)


@dataclass(frozen=True)
class Rule:
    """One row: a source template and the diffusers templates that its rows of weight go to."""

    source: str
    targets: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    swap: Literal["", "all", "last"] = ""
    parameter: bool = False
    component: str | None = None
    dialect: Dialect | None = "original"
    written: bool = True
    head: int | None = None
    last_only: bool = False


@dataclass(frozen=True)
class Resolved:
    """What a file's module name means: diffusers paths with their share of the rows, and what happens to the rows."""

    rule: Rule
    paths: tuple[str, ...]
    block: int | None

    @property
    def is_diffusers(self) -> bool:
        """Whether the name was a diffusers name already."""
        return self.rule.dialect is None


def flatten(name: str) -> str:
    """Dots to underscores, runs of them to one, `processor` and outer underscores gone."""
    flat = re.sub(r"_+", "_", name.replace(".", "_")).strip("_")
    return flat.replace("processor_", "")


def parse_rows(table: str, dialect: Dialect | None = "original") -> Iterator[Rule]:
    """Read a table in the row language.

    Raises:
        ValueError: a line that is not of the language; tables are source code, so this is a defect of ours.
    """
    prefixes = [("", "")]
    below_prefixes = False
    for line in table.splitlines():
        text = line.split("#")[0].rstrip()
        if not text.strip():
            continue
        if text.startswith("["):
            more = [_prefix(part) for part in text.strip("[] ").split(";")]
            prefixes = [*prefixes, *more] if below_prefixes else more
            below_prefixes = True
            continue
        below_prefixes = False
        if not text.startswith(" "):
            prefixes = [("", "")]
        for row in text.split(";"):
            for before, after in prefixes:
                yield from _parse_row(row.strip(), before, after, dialect)


def _prefix(text: str) -> tuple[str, str]:
    before, _, after = (part.strip() for part in text.partition("->"))
    return f"{before}.", f"{after or before}."


def _parse_row(row: str, before: str, after: str, dialect: Dialect | None) -> Iterator[Rule]:
    text, parameter = _flag(row, "(p)")
    text, readonly = _flag(text, "(r)")
    text, last_only = _flag(text, "(last)")
    text, last = _flag(text, "~last")
    text, swapped = _flag(text, "~")
    text, _, head = text.partition(" /")
    left, arrow, right = text.partition("->")
    sources = [source.strip() for source in left.split(",")]
    targets = [target.strip() for target in (right if arrow else sources[0]).split("|")]
    if not all(sources) or not all(targets):
        raise ValueError(f"not a row of the table language: {row!r}")
    component = None
    if targets[0].startswith("@"):
        component, _, targets[0] = targets[0][1:].partition(".")
        after = ""
    paths, shares = zip(*(target.partition(":")[::2] for target in targets), strict=True)
    same = not arrow and before == after
    for index, source in enumerate(sources):
        yield Rule(
            source=before + source,
            targets=tuple(after + path for path in paths),
            shares=tuple(int(share or 1) for share in shares),
            swap="last" if last else "all" if swapped else "",
            parameter=parameter,
            component=component,
            dialect=None if same else dialect,
            written=index == 0 and not readonly,
            head=int(head) if head else None,
            last_only=last_only,
        )


def _numbered(rule: Rule) -> Iterator[Rule]:
    """OMI's names for the parts of a fused module: `img_attn.qkv.0` is its first part."""
    if len(rule.targets) > 1 and rule.dialect == "original":
        for number, target in enumerate(rule.targets):
            source = f"{rule.source}.{number}"
            yield replace(rule, source=source, targets=(target,), shares=(1,), dialect="omi", head=None)


def _fused(rules: Sequence[Rule]) -> Iterator[Rule]:
    """Read-only names for diffusers' own fusions of modules that stand beside each other."""
    taken = {rule.source for rule in rules}
    shares = {rule.targets: rule.shares for rule in rules}
    paths = dict.fromkeys(target for rule in rules if rule.component is None for target in rule.targets)
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        for parts, names in FUSED:
            targets = tuple(f"{parent}.{part}" for part in parts)
            if parent and leaf == parts[0] and all(target in paths for target in targets):
                for source in (f"{parent}.{name}" for name in names):
                    if source not in taken:
                        equal = (1,) * len(parts)
                        yield Rule(source, targets, shares.get(targets, equal), dialect="fused", written=False)


def _flag(text: str, flag: str) -> tuple[str, bool]:
    return text.removesuffix(flag).rstrip(), text.endswith(flag)


class Names:
    """All names of one component: rows of each dialect, and the names that are equal on both sides.

    Args:
        original: rows of the checkpoint that the model was published with.
        same: rows without an arrow: diffusers' names that no other row mentions.
        trainer: rows of the names that kohya's trainers flatten, where the checkpoint that they read has others.
        xlabs: rows of the XLabs trainers' names.
        diffsynth: rows of the names of DiffSynth's own model class, read only.
        omi: rows of the OMI (OneTrainer) names; those of fused modules' parts follow from the original's, if not given.
        extra: rules made by code, for the families whose block numbering needs arithmetic.
        optional_prefixes: leading path parts that some versions of the model class have and others have not.
        fuses: whether diffusers' own names for fused projections are read, which are cut evenly where no row says else.
        absent: templates of modules that some published sizes lack; a key for them is ignored with that reason.
        aside: templates of a second stream (LTX-2's sound) that most adapters leave alone.
    """

    def __init__(
        self,
        original: str = "",
        *,
        same: str = "",
        trainer: str = "",
        xlabs: str = "",
        diffsynth: str = "",
        omi: str = "",
        extra: Iterable[Rule] = (),
        optional_prefixes: tuple[str, ...] = (),
        fuses: bool = True,
        absent: tuple[str, ...] = (),
        aside: tuple[str, ...] = (),
    ) -> None:
        rules = (*parse_rows(original), *parse_rows(same, None), *extra, *parse_rows(trainer, "trainer"))
        rules = (*rules, *parse_rows(xlabs, "xlabs"), *parse_rows(diffsynth, "diffsynth"))
        own = tuple(parse_rows(omi, "omi"))
        given = {flatten(rule.source) for rule in own}
        numbered = (part for rule in rules for part in _numbered(rule) if flatten(part.source) not in given)
        self.rules = (*rules, *own, *numbered, *(_fused(rules) if fuses else ()))
        self.optional_prefixes = optional_prefixes
        self.absent = absent
        self.aside = aside
        # Files of one family hold the same few hundred names, and each is asked for two or three times a load.
        self.resolve = lru_cache(maxsize=1 << 14)(self._resolve)
        self._written: dict[str, Writing] = {}

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Every diffusers template, once, wildcards left out."""
        own = (target for rule in self.rules if rule.component is None for target in rule.targets)
        return tuple(dict.fromkeys(target for target in own if not target.endswith("**")))

    @cached_property
    def _containers(self) -> Mapping[str, tuple[str, ...]]:
        spoken = {name for rule in self.rules for name in (rule.source, *rule.targets) if not name.endswith("**")}
        held: dict[str, dict[str, None]] = {}
        for parts in (name.split(".") for name in sorted(spoken)):
            for depth in range(1, len(parts)):
                above = NUMBER.sub("#", flatten(HOLE.sub("#", ".".join(parts[:depth]))))
                held.setdefault(above, {})[parts[depth]] = None
        return {above: tuple(children) for above, children in held.items()}

    def held_by(self, name: str) -> tuple[str, ...]:
        """What a container of this name holds, which has no weight of its own."""
        return self._containers.get(NUMBER.sub("#", flatten(name)), ())

    @cached_property
    def _sources(self) -> Mapping[str, list["_Template"]]:
        rules = (rule for rule in self.rules if not rule.source.endswith("**"))
        spoken = (rule for rule in rules if rule.dialect is not None)
        # A leading `transformer.`, which Stable Audio's original has, is taken for a component's in files.
        return _index(
            _Template(name, rule)
            for rule in spoken
            for name in dict.fromkeys((rule.source, rule.source.removeprefix("transformer.")))
        )

    @cached_property
    def _paths(self) -> Mapping[str, list["_Template"]]:
        raw = {target for rule in self.rules if rule.parameter for target in rule.targets}
        plain = [Rule(source=path, targets=(path,), dialect=None, parameter=path in raw) for path in self.modules]
        return _index(_Template(name, rule) for rule in plain for name in self._with_and_without(rule.source))

    def _with_and_without(self, path: str) -> Iterator[str]:
        names = [path]
        for prefix in self.optional_prefixes:
            shorter = (re.sub(rf"(^|\.){re.escape(prefix)}", r"\1", name, count=1) for name in tuple(names))
            names.extend(name for name in shorter if name not in names)
        return iter(names)

    @cached_property
    def _wildcards(self) -> tuple[Rule, ...]:
        """Longest source first, so that the most exact prefix is taken."""
        rules = (rule for rule in self.rules if rule.source.endswith("**"))
        return tuple(sorted(rules, key=lambda rule: -len(rule.source)))

    def _resolve(self, name: str) -> tuple[Resolved, ...]:
        """All readings of a module name in any spelling: none, one, or several, that of diffusers first.

        Several: Wan's `norm3` is another norm in diffusers than in the original, and Mochi's `mod_y` goes to another
        module in the last block than in the others. The rest of the file, or the model, decides.

        Args:
            name: the module's name in the file, prefix and suffix off, dotted or flattened.
        """
        flat = flatten(name)
        found = (*self._lookup(self._paths, flat), *self._lookup(self._sources, flat))
        hits: list[Resolved] = []
        for hit in found:
            if all(hit.paths != other.paths for other in hits):
                hits.append(hit)
        if not hits and flat.endswith("to_out"):  # a container without a weight stands for its first child
            return self.resolve(f"{name}.0")
        if not hits and (hit := self._by_wildcard(name, flat)):
            hits.append(hit)
        if not hits and flat.endswith("_lora"):  # 2023's diffusers: …attn1.processor.to_q_lora
            return self.resolve(flat.removesuffix("_lora"))
        return tuple(hits)

    def _lookup(self, index: Mapping[str, list["_Template"]], flat: str) -> Iterator[Resolved]:
        for template in index.get(NUMBER.sub("#", flat), ()):
            values = template.match(NUMBER.findall(flat))
            if values is not None:
                yield _resolved(template.rule, values)

    def _by_wildcard(self, name: str, flat: str) -> Resolved | None:
        for rule in self._wildcards:
            prefix = flatten(rule.source.removesuffix("**"))
            found = re.match(re.sub(r"\\\{\w+\\\}", r"(\\d+)", re.escape(prefix)) + "_", flat)
            if found is None:
                continue
            values = dict(zip(HOLE.findall(rule.source), found.groups(), strict=True))
            head = _fill(rule.targets[0].removesuffix("**"), values)
            tail = flat[found.end() :]
            known = next(self._lookup(self._paths, flatten(f"{head}.{tail}")), None)
            if known is not None and rule.component is None:
                return Resolved(rule, known.paths, known.block)
            if rule.component is not None or "." in name:
                depth = rule.source.count(".")
                dotted = ".".join(name.split(".")[depth:]) if "." in name else tail
                return Resolved(rule, (head + dotted,), None)
        return None

    def is_optional(self, path: str) -> bool:
        """Whether published sizes of this family lack this module."""
        return self._is_among(path, self.absent)

    def is_often_changed(self, path: str) -> bool:
        """Whether adapters change this module where they change those that are called like it."""
        return not self._is_among(path, (*self.absent, *self.aside))

    def _is_among(self, path: str, templates: Iterable[str]) -> bool:
        flat = NUMBER.sub("#", flatten(path))
        holes = (NUMBER.sub("#", HOLE.sub("#", flatten(template))) for template in templates)
        return any(flat == hole or (hole.endswith("**") and flat.startswith(hole[:-2])) for hole in holes)

    def has(self, dialect: Dialect) -> bool:
        """Whether there are rows of this dialect."""
        return any(rule.dialect == dialect for rule in self.rules)

    def writing(self, dialect: Dialect) -> "Writing":
        """The same table, read from diffusers names to those of a dialect."""
        if dialect not in self._written:
            self._written[dialect] = Writing(self, dialect)
        return self._written[dialect]


class Writing:
    """Diffusers names -> names of a dialect, fused rows regrouped."""

    def __init__(self, names: Names, dialect: Dialect) -> None:
        # What OMI and trainers have no words of their own for, they call as the original does; own rows come first.
        spoken = (dialect, "original") if dialect in ("omi", "trainer") else (dialect,)
        written = [rule for rule in names.rules if rule.written and rule.component is None]
        rules = [rule for own in spoken for rule in written if rule.dialect == own]
        plain = [rule for rule in rules if not rule.source.endswith("**")]
        self._rules = _index(_Template(target, rule) for rule in plain for target in rule.targets)
        self._wildcards = [rule for rule in rules if rule.source.endswith("**")]
        self.source = lru_cache(maxsize=1 << 14)(self._source)

    def _source(self, path: str) -> tuple[str, Resolved]:
        """The name that this diffusers path is part of, and all the paths that share it, in order."""
        flat = flatten(path)
        for template in self._rules.get(NUMBER.sub("#", flat), ()):
            values = template.match(NUMBER.findall(flat))
            if values is not None:
                resolved = _resolved(template.rule, values)
                if path in resolved.paths:
                    return _fill(template.rule.source, values), resolved
        for rule in self._wildcards:
            head = rule.targets[0].removesuffix("**")
            pattern = re.sub(r"\\\{\w+\\\}", r"(\\d+)", re.escape(head))
            found = re.match(pattern, path)
            if found is not None:
                values = dict(zip(HOLE.findall(head), found.groups(), strict=True))
                source = _fill(rule.source.removesuffix("**"), values) + path[found.end() :]
                return source, Resolved(rule, (path,), None)
        return path, Resolved(Rule(path, (path,), dialect=None), (path,), None)


class _Template:
    """A path template, ready to be matched against the numbers of a flattened name."""

    def __init__(self, template: str, rule: Rule) -> None:
        flat = flatten(template)
        self.rule = rule
        self.key = NUMBER.sub("#", HOLE.sub("#", flat))
        self._numbers = re.findall(r"\{\w+\}|\d+", flat)

    def match(self, numbers: list[str]) -> dict[str, str] | None:
        """Values of the holes, or None where a literal number differs."""
        values: dict[str, str] = {}
        for own, number in zip(self._numbers, numbers, strict=True):
            if own[0] != "{":
                if own != number:
                    return None
            elif values.setdefault(own[1:-1], number) != number:
                return None
        return values


def _index(templates: Iterable[_Template]) -> dict[str, list[_Template]]:
    index: dict[str, list[_Template]] = {}
    for template in templates:
        index.setdefault(template.key, []).append(template)
    return index


def _fill(template: str, values: Mapping[str, str]) -> str:
    return HOLE.sub(lambda hole: values[hole[1]], template)


def _resolved(rule: Rule, values: Mapping[str, str]) -> Resolved:
    block = int(values["i"]) if "i" in values else None
    return Resolved(rule, tuple(_fill(target, values) for target in rule.targets), block)
