"""Writes docs/families/: a page a family, with the rows of its tables, from `lora_loaders.FAMILIES`.

scripts/family_pages.py            write the pages anew
scripts/family_pages.py --check    exit with 1 if that would change one
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_loaders import FAMILIES
from lora_loaders.families import Family, Names
from lora_loaders.families.rules import Rule

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "families"
SWAPS = {"": "", "all": " (halves swapped)", "last": " (halves swapped in the last block)"}
NOTE = "Written by `scripts/family_pages.py` from the tables in `lora_loaders/families/`."


def row(rule: Rule) -> str:
    """One line of a table: the name in files, and where it goes."""
    shares = [f" ×{share}" if share > 1 else "" for share in rule.shares]
    targets = " \\| ".join(f"`{path}`{share}" for path, share in zip(rule.targets, shares, strict=True))
    routed = f"{rule.component}: " if rule.component else ""
    notes = SWAPS[rule.swap] + (" (a parameter)" if rule.parameter else "") + ("" if rule.written else " (read only)")
    return f"| `{rule.source}` | {routed}{targets}{notes} |"


def table(names: Names) -> Iterator[str]:
    """All rows that rename or split; names that are equal on both sides, and derived ones, have none."""
    for dialect in ("original", "trainer", "xlabs", "diffsynth"):
        rules = [rule for rule in names.rules if rule.dialect == dialect]
        if rules:
            yield from ("", f"| {dialect} name | diffusers |", "|---|---|", *map(row, rules))


def page(family: Family) -> str:
    """A family's page."""
    lines = [f"# `{family.name}`", "", NOTE, ""]
    lines.append(f"Denoiser: {', '.join(f'`{name}`' for name in family.model_classes)}.")
    if family.depths:
        depths = (f"`{path}` {' or '.join(map(str, counts))}" for path, counts in family.depths.items())
        lines.append(f"Blocks of published models: {', '.join(depths)}.")
    seen: dict[int, str] = {}
    for component, names in family.components.items():
        lines += ["", f"## `{component}`", ""]
        if id(names) in seen:
            lines.append(f"As `{seen[id(names)]}`.")
            continue
        seen[id(names)] = component
        lines.append(
            f"{len(names.modules)} modules under diffusers' names; those without a row are called so everywhere."
        )
        if names.absent:
            lines += ["", "Absent from some sizes: " + ", ".join(f"`{path}`" for path in names.absent) + "."]
        lines += table(names)
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """File name -> text, the index among them."""
    index = ["# Families", "", NOTE, "", *(f"- [{family.name}]({family.name}.md)" for family in FAMILIES)]
    return {"README.md": "\n".join(index) + "\n", **{f"{family.name}.md": page(family) for family in FAMILIES}}


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Write or check; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    wanted = pages()
    present = {path.name: path.read_text("utf-8") for path in folder.glob("*.md")} if folder.is_dir() else {}
    if list(arguments) == ["--check"]:
        if present != wanted:
            print(f"{folder} is stale: run scripts/family_pages.py", file=sys.stderr)
        return int(present != wanted)
    folder.mkdir(parents=True, exist_ok=True)
    for name in present.keys() - wanted.keys():
        (folder / name).unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
