"""The house plan, kept true by reading the imports: who may know whom, and what may be imported when."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import lora_loaders

PACKAGE = Path(lora_loaders.__file__).parent
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
LONGEST = 400

READING = {"adapter", "deltas", "detection", "errors", "families", "files", "formats"}
READING |= {"atomic", "lazy", "locating", "peft_parameters", "peft_types", "scaling"}
LIVE = {"adapter", "deltas", "errors", "families", "layers"}
# Room -> the rooms it may import from. A room that is not named here may import from any, but never in a circle.
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "locating": {"errors"},
    "lazy": {"errors"},
    "buffers": set(),
    "collecting": set(),
    "atomic": {"errors"},
    "files": {"atomic", "buffers", "errors", "lazy", "locating"},
    "remote": {"errors", "files", "locating"},
    "deltas": {"errors"},
    "adapter": {"buffers", "deltas", "errors"},
    "peft_types": {"deltas", "errors"},
    "peft_parameters": {"errors", "formats"},
    "scaling": {"deltas", "errors", "peft_parameters", "peft_types"},
    "formats": {"adapter", "deltas", "errors"},
    "families": {"adapter", "deltas", "errors"},
    "detection": {"deltas", "errors", "families", "formats"},
    "conversion": READING,
    "kohya_names": READING,
    "headers": READING | {"kohya_names"},
    "spelling": {"deltas", "errors", "formats", "peft_types", "scaling"},
    "naming": READING | {"kohya_names"},
    "writing": READING | {"headers", "kohya_names", "naming", "spelling"},
    "converting": READING | {"conversion", "writing"},
    "batch": READING | {"conversion", "converting", "version"},
    "layers": {"deltas", "errors"},
    # A live model's names are flattened by the same rule as those of a file.
    "layout": LIVE,
    "widening": LIVE | {"layout"},
    "siblings": LIVE | {"layout"},
    "plans": LIVE | {"layout", "widening", "joining", "siblings"},
    "joining": LIVE | {"layout"},
    "offloading": LIVE | {"layout"},
    "gates": LIVE | {"collecting", "layout", "offloading"},
    "attaching": LIVE | {"buffers", "gates", "layout", "plans", "widening", "joining"},
    "fuse_report": LIVE,
    "changes": LIVE,
    "records": LIVE | {"changes"},
    "fusing": LIVE
    | {"attaching", "changes", "fuse_report", "gates", "joining", "layout", "plans", "records", "widening"},
}
# A layer that is written to tells its slots, which are built on layers: imported when it happens.
LATE = [("layers/layer.py", "layers/slots.py")]
OPTIONAL = {"accelerate", "bitsandbytes", "gguf", "matplotlib", "optimum", "PIL", "ray", "torchao", "transformers"}
COMMAND_LINE = {"cli", "__main__"}


class Import(NamedTuple):
    """One imported module, absolute, and whether it is imported only when a function runs."""

    name: str
    line: int
    is_lazy: bool


def imports(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text("utf-8"))
    lazy: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node):
            lazy |= {id(child) for child in ast.walk(node)}
    package = ["lora_loaders", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) in lazy)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            # `from lora_loaders import formats` imports a room, `from lora_loaders.errors import X` a name.
            for alias in node.names if name == "lora_loaders" else ():
                yield Import(f"{name}.{alias.name}", node.lineno, id(node) in lazy)
            if name != "lora_loaders":
                yield Import(name, node.lineno, id(node) in lazy)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def room(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")


def rooms_used(file: str) -> Iterator[tuple[str, int]]:
    for found in imports(FILES[file]):
        parts = found.name.split(".")
        if parts[0] == "lora_loaders" and len(parts) > 1:
            yield parts[1], found.line


@pytest.mark.parametrize("file", [file for file in FILES if room(file) in BELOW])
def test_rooms_know_only_those_below_them(file: str) -> None:
    allowed = BELOW[room(file)] | {room(file)}
    assert [f"{file}:{line} imports {used}" for used, line in rooms_used(file) if used not in allowed] == []


def modules_used(file: str) -> set[str]:
    """Files of the package that a file imports, at once or later."""
    used: set[str] = set()
    for found in imports(FILES[file]):
        if found.name.startswith("lora_loaders."):
            path = "/".join(found.name.split(".")[1:])
            used |= {name for name in (f"{path}.py", f"{path}/__init__.py") if name in FILES}
    return used - {file}


def test_no_circle_among_modules() -> None:
    uses = {file: modules_used(file) for file in FILES}
    for file, late in LATE:
        uses[file].discard(late)
    while uses:
        free = {file for file, used in uses.items() if not used & uses.keys()}
        assert free, f"a circle among { ({file: sorted(used & uses.keys()) for file, used in uses.items()}) }"
        for file in free:
            del uses[file]


@pytest.mark.parametrize("file", FILES)
def test_peft_is_never_imported(file: str) -> None:
    assert [found.line for found in imports(FILES[file]) if found.name.split(".")[0] == "peft"] == []


@pytest.mark.parametrize("file", FILES)
def test_optional_packages_are_imported_when_they_are_needed(file: str) -> None:
    found = [
        f"{file}:{i.line} {i.name}" for i in imports(FILES[file]) if not i.is_lazy and i.name.split(".")[0] in OPTIONAL
    ]
    assert found == []


@pytest.mark.parametrize("file", [file for file in FILES if room(file) not in COMMAND_LINE])
def test_only_the_command_line_prints(file: str) -> None:
    tree = ast.parse(FILES[file].read_text("utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"] == []
    assert [i.line for i in imports(FILES[file]) if i.name.split(".")[0] in ("rich", "typer")] == []


@pytest.mark.parametrize("file", FILES)
def test_no_module_is_longer_than_a_person_reads_at_once(file: str) -> None:
    assert len(FILES[file].read_text("utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("word", ["utils", "helpers", "misc", "common"])
def test_no_room_is_a_drawer(word: str) -> None:
    assert [file for file in FILES if Path(file).stem == word] == []
