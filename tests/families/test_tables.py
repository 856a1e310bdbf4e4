"""The tables against the published models: every module is known, nothing is named twice, nothing is invented."""

import re
from collections import defaultdict
from collections.abc import Mapping

import pytest

from lora_loaders.families import FAMILIES, Family, Names
from lora_loaders.families.rules import HOLE, NUMBER, Rule, flatten

from .published import ARCHITECTURES, LEFT_OUT, PUBLISHED, Published, needs_list

DIALECTS = ("original", "trainer", "xlabs", "diffsynth", "omi")
# The original's third norm is diffusers' second, and diffusers has a third too; in Hunyuan-DiT they change places.
TWO_READINGS = re.compile(r"(vace_)?blocks\.\d+\.norm[23]")

each_model = pytest.mark.parametrize("published", PUBLISHED, ids=str)
COMPONENTS = [(family, component) for family in FAMILIES for component in family.components]
# Text encoders have a test of their own, and a second transformer is a copy of the first.
PUBLISHED_COMPONENTS = [
    (family, component)
    for family, component in COMPONENTS
    if any(model.family is family and model.component == component for model in PUBLISHED)
]
each_published_component = pytest.mark.parametrize(
    ("family", "component"), PUBLISHED_COMPONENTS, ids=lambda x: getattr(x, "name", x)
)
each_component = pytest.mark.parametrize(("family", "component"), COMPONENTS, ids=lambda x: getattr(x, "name", x))


@each_model
def test_every_module_is_known_by_its_dotted_and_its_flattened_name(published: Published) -> None:
    lost: list[tuple[str, list[tuple[str, ...]]]] = []
    for path, address in published.addresses.items():
        for spelling in (path, flatten(path)):
            readings = published.names.resolve(spelling)
            collides = published.label == "hunyuan-dit" and TWO_READINGS.fullmatch(path)
            if len(readings) != (2 if collides else 1) or readings[0].paths != (path,):
                lost.append((spelling, [reading.paths for reading in readings]))
            elif readings[0].rule.parameter != address.is_parameter:
                lost.append((spelling, [("a parameter" if address.is_parameter else "a module",)]))
    assert not lost


@each_model
def test_every_module_comes_back_from_its_original_name(published: Published) -> None:
    lost: list[tuple[str, str]] = []
    writing = published.names.writing("original")
    for path in published.addresses:
        source, resolved = writing.source(path)
        for spelling in (source, flatten(source)):
            readings = published.names.resolve(spelling)
            if resolved.paths not in [reading.paths for reading in readings] or path not in resolved.paths:
                lost.append((path, spelling))
            if len(readings) > 1 and not (TWO_READINGS.fullmatch(source) or source.endswith(".mod_y")):
                lost.append((path, f"{spelling} is ambiguous"))
    assert not lost


@each_model
def test_two_modules_never_share_a_flattened_name(published: Published) -> None:
    by_flat: dict[str, list[str]] = defaultdict(list)
    for path in published.addresses:
        by_flat[flatten(path)].append(path)
    assert not {flat: paths for flat, paths in by_flat.items() if len(paths) > 1}


@each_model
def test_shares_are_the_proportions_of_the_rows(published: Published) -> None:
    wrong: list[tuple[str, list[int]]] = []
    for rule in published.names.rules:
        if len(rule.targets) == 1:
            continue
        pattern = _pattern(rule.targets[0])
        for path in published.addresses:
            found = pattern.fullmatch(path)
            if found is None:
                continue
            paths = [_filled(template, found.groupdict()) for template in rule.targets]
            rows = [published.addresses[path].shape[0] for path in paths]
            if any(count * rule.shares[0] != rows[0] * share for count, share in zip(rows, rule.shares, strict=True)):
                wrong.append((rule.source, rows))
    assert not wrong


@each_model
def test_telling_widths_are_those_of_the_published_models(published: Published) -> None:
    shapes = [shape for shape in published.family.shapes if shape.component == published.component]
    for path, address in published.addresses.items():
        if shapes and len(address.shape) >= 2 and not address.is_parameter:
            assert published.family.fitting(published.component, path, *address.shape[:2]) != () or _other_size(
                published
            ), path


def _other_size(published: Published) -> bool:
    """Default configurations that nobody published: their widths are nobody's."""
    return published.label in ("skyreels2",)


@needs_list
@each_published_component
def test_every_template_exists_in_a_published_model_or_is_declared_absent(family: Family, component: str) -> None:
    models = [model for model in PUBLISHED if model.family is family and model.component == component]
    paths = [set(model.addresses) for model in models]
    names = family.components[component]
    general = [_pattern(template) for template in names.modules if HOLE.search(template)]
    for template in names.modules:
        if not HOLE.search(template) and any(pattern.fullmatch(template) for pattern in general):
            continue  # the UNets' numbered blocks, each of them written out
        pattern = _pattern(template)
        present = [any(pattern.fullmatch(path) for path in known) for known in paths]
        optional = names.is_optional(HOLE.sub("0", template))
        assert any(present) or optional, f"{template} is in no published model"
        assert all(present) or optional, f"{template} is not in {models[present.index(False)]}, and not declared"
    for template in names.absent:
        pattern = _pattern(template)
        assert any(pattern.fullmatch(HOLE.sub("0", known)) for known in names.modules), template


@each_component
def test_no_name_is_given_twice(family: Family, component: str) -> None:
    names = family.components[component]
    for dialect in DIALECTS:
        rules = [rule for rule in names.rules if rule.dialect == dialect and rule.component is None]
        sources: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        for rule in rules:
            sources[flatten(rule.source)].add(rule.targets)
        twice = {source for source, targets in sources.items() if len(targets) > 1}
        assert twice <= {"blocks_{i}_mod_y"}, twice
        written = [target for rule in rules if rule.written for target in rule.targets]
        assert len(written) == len(set(written)), _repeated(written)
    same = [rule.source for rule in names.rules if rule.dialect is None]
    assert len(same) == len(set(same)), _repeated(same)


@needs_list
def test_every_listed_architecture_has_a_family() -> None:
    covered = {published.label for published in PUBLISHED}
    assert set(ARCHITECTURES) - covered == set(LEFT_OUT)


def test_families_have_names_of_their_own() -> None:
    names = [family.name for family in FAMILIES]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in names)


def _pattern(template: str) -> re.Pattern[str]:
    """A template as a pattern of dotted paths; `**` is any rest."""
    seen: set[str] = set()

    def hole(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return rf"(?P<{name}>\d+)"

    dotted = re.escape(template).replace(r"\{", "{").replace(r"\}", "}").replace(r"\*\*", ".*")
    return re.compile(HOLE.sub(hole, dotted))


def _filled(template: str, values: Mapping[str, str]) -> str:
    return HOLE.sub(lambda hole: values[hole[1]], template)


def _repeated(names: list[str]) -> set[str]:
    return {name for name in names if names.count(name) > 1}


def test_rows_that_hold_names_twice_are_refused_by_the_flattened_index() -> None:
    """Within a table two holes never stand for the same flattened text: one key, one template."""
    for family, component in COMPONENTS:
        names: Names = family.components[component]
        keys: dict[str, set[str]] = defaultdict(set)
        for template in names.modules:
            keys[HOLE.sub("#", flatten(template))].add(template)
        assert all(len(templates) == 1 for templates in keys.values()), family.name
        assert all(NUMBER.sub("#", key) for key in keys)


def test_what_is_only_read_can_be_written_under_another_name() -> None:
    for family, component in COMPONENTS:
        rules: tuple[Rule, ...] = family.components[component].rules
        written = {target for rule in rules if rule.written for target in rule.targets}
        readonly = {t for rule in rules if not rule.written and rule.component is None for t in rule.targets}
        assert readonly <= written, readonly - written
