"""The README keeps its promises: the generated table is fresh, and what it names is there."""

import re
import textwrap
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import lora_loaders

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


@pytest.fixture
def compatibility(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return import_module("compatibility")


def test_table_of_formats_and_families_is_fresh(compatibility: ModuleType) -> None:
    assert compatibility.main(["--check"]) == 0, "run scripts/compatibility.py"


def test_check_fails_on_a_stale_table_and_a_rewrite_mends_it(compatibility: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README.replace("`flux1`", "`flux0`", 1), "utf-8")
    assert compatibility.main(["--check"], readme) == 1
    assert "`flux0`" in readme.read_text("utf-8")
    assert compatibility.main([], readme) == 0
    assert readme.read_text("utf-8") == README


@pytest.fixture
def family_pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return import_module("family_pages")


def test_pages_of_the_families_are_fresh(family_pages: ModuleType, tmp_path: Path) -> None:
    assert family_pages.main(["--check"]) == 0, "run scripts/family_pages.py"
    assert family_pages.main(["--check"], tmp_path) == 1
    assert family_pages.main([], tmp_path) == 0
    (tmp_path / "gone.md").write_text("a family that was taken out")
    assert family_pages.main(["--check"], tmp_path) == 1
    assert family_pages.main([], tmp_path) == 0
    assert family_pages.main(["--check"], tmp_path) == 0


def test_every_format_is_shown_with_a_key_of_its_own(compatibility: ModuleType) -> None:
    keys = [compatibility.example_key(form) for form in lora_loaders.FORMATS]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\bll\.(\w+)", README))))
def test_public_names_exist(name: str) -> None:
    assert hasattr(lora_loaders, name)


def documented(folders: str) -> list[str]:
    """Paths of the repository that the README names and that it does not ask to be written."""
    paths = re.findall(rf"`((?:{folders})/[\w./]+)`", README)
    return sorted({path for path in paths if "yours" not in path})


@pytest.mark.parametrize("path", documented("lora_loaders|scripts|tests"))
def test_named_paths_exist(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", documented("deltas|families|formats|layers"))
def test_named_modules_exist(path: str) -> None:
    assert (ROOT / "lora_loaders" / path).exists()


def test_python_examples_parse() -> None:
    examples: list[str] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    parse: Callable[[str], object] = lambda text: compile(text, "README.md", "exec")  # noqa: E731
    assert all(parse(textwrap.dedent(example)) for example in examples)
