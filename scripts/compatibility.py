"""Writes the table of formats and families into README.md, from `lora_loaders.FORMATS` and `FAMILIES`.

scripts/compatibility.py            rewrite what stands between the markers
scripts/compatibility.py --check    exit with 1 if that would change the file
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from lora_loaders import FAMILIES, FORMATS, Adapter, ConversionError
from lora_loaders.deltas import LoraDelta
from lora_loaders.families import Family
from lora_loaders.formats import Format
from lora_loaders.formats.format import ALL_ALGEBRAS
from lora_loaders.writing import to_tensors

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- compatibility: written by scripts/compatibility.py -->"
END = "<!-- end of compatibility -->"
ALPHA = {"tensor": "a tensor a module", "metadata": "the header", "folded": "multiplied into `up`"}
EXAMPLES = (("flux1", "transformer_blocks.0.attn.to_out.0"), ("sd15", None))
# Flux' trainers write the original's names anyway.
OTHER_EXAMPLES = {"kohya-original": (("z-image", "layers.0.attention.to_out.0"),)}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def example_adapters(form: Format) -> Iterator[Adapter]:
    """Tiny adapters of which at least one can be said in this format."""
    families = {family.name: family for family in FAMILIES}
    for name, path in OTHER_EXAMPLES.get(form.name, EXAMPLES):
        family = families[name]
        component = family.denoiser
        paths = [path] if path else [path for _, path in family.traversal[component]]
        deltas = {path: LoraDelta(down=torch.zeros(1, 1), up=torch.zeros(1, 1)) for path in paths}
        yield Adapter({component: deltas}, family=name)


def example_key(form: Format) -> str:
    """How this format spells the down factor of one module."""
    for adapter in example_adapters(form):
        try:
            tensors, _, _ = to_tensors(adapter, form.name)
        except ConversionError:
            continue
        return next(iter(tensors))
    raise ValueError(f"no example can be written as {form.name}")


def algebras(form: Format) -> str:
    """The kinds of delta that a format has words for."""
    return "all" if form.algebras == ALL_ALGEBRAS else ", ".join(sorted(form.algebras))


def format_rows() -> Iterator[Sequence[str]]:
    for form in FORMATS:
        encoders = "yes" if form.text_encoder else "no"
        yield f"`{form.name}`", f"`{example_key(form)}`", ALPHA[form.alpha], encoders, algebras(form)


def spoken_names(family: Family) -> str:
    """Whose module names are known for the denoiser beside diffusers' own."""
    names = family.components[family.denoiser]
    known = {rule.dialect for rule in names.rules if rule.dialect is not None and rule.written}
    return ", ".join(dialect for dialect in ("original", "xlabs", "omi") if dialect in known) or "the same"


def family_rows() -> Iterator[Sequence[str]]:
    for family in FAMILIES:
        classes = ", ".join(f"`{name}`" for name in family.model_classes)
        yield f"`{family.name}`", classes, ", ".join(family.components), spoken_names(family)


def compatibility() -> str:
    """Everything that stands between the markers."""
    lines = [
        f"**{len(FORMATS)} formats**, each read and written. All algebras: {', '.join(sorted(ALL_ALGEBRAS))}.",
        "",
        *table(("format", "a key of it", "alpha lives in", "text encoders", "algebras"), format_rows()),
        "",
        f"**{len(FAMILIES)} families**. Diffusers' names are always known; the last column says which others are. "
        '"The same" means that the published checkpoint uses diffusers\' names.',
        "",
        "<details><summary>All families</summary>",
        "",
        *table(("family", "denoiser", "components", "other names"), family_rows()),
        "",
        "</details>",
    ]
    return "\n".join(lines)


def renewed(text: str) -> str:
    """The README's text with what stands between the markers made anew."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{compatibility()}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None, readme: Path = README) -> int:
    """Rewrite or check; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    old = readme.read_text("utf-8")
    new = renewed(old)
    if list(arguments) == ["--check"]:
        if new != old:
            print(f"{readme.name} is stale: run scripts/compatibility.py", file=sys.stderr)
        return int(new != old)
    readme.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
