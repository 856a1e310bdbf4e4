"""What the command line shows of an inspection and of a plan, as rich tables."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lora_loaders.adapter import Adapter
from lora_loaders.inspecting import Group, Inspection
from lora_loaders.plans import AttachPlan
from lora_loaders.verifying import Verification

SHOWN = 12
DIGITS = re.compile(r"\d+")


def show_inspection(facts: Inspection, console: Console) -> None:
    """Print the facts of a file."""
    path = Path(facts.path)
    console.print(f"\n[bold]{escape(path.name)}[/]  [dim]{escape(str(path.parent))}[/]\n", soft_wrap=True)
    console.print(_overview(facts))
    if facts.groups:
        console.print(_group_table(facts.groups))
    show_notes(console, "No place found by name", grouped(facts.unresolved, "modules"), "yellow")
    show_notes(console, "Ignored", grouped(facts.ignored, "keys"), "yellow")
    if facts.metadata:
        _show_metadata(facts.metadata, console)


def _show_metadata(metadata: Mapping[str, str], console: Console) -> None:
    folded = _folded(metadata)
    shown, hidden = folded[: 2 * SHOWN], folded[2 * SHOWN :]
    width = min(40, max(len(key) for key, _ in shown))
    console.print(f"[bold]Metadata[/]  [dim]{counted(len(metadata), 'entries')}[/]")
    for key, value in shown:
        line = Text.assemble((f"  {key:<{width}}  ", "cyan"), value)
        console.print(line, no_wrap=True, overflow="ellipsis")
    console.print(f"  [dim]{f'… and {len(hidden)} more; ' if hidden else ''}--json gives all, unshortened[/]\n")


def _overview(facts: Inspection) -> Padding:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan")
    table.add_column()
    family = f"[green]{facts.family}[/]" if facts.family else "[yellow]unknown: no family has these names[/]"
    if facts.other_families:
        family += f"  [dim]names and shapes also fit {', '.join(facts.other_families)}[/]"
    dtypes = facts.dtypes.items()
    kinds = ", ".join(dtype if len(facts.dtypes) == 1 else f"{dtype} ×{count}" for dtype, count in dtypes)
    tokens = ", ".join(f"{token} {list(shape)}" for token, shape in facts.embeddings.items())
    rows = {
        "Format": f"[green]{facts.format}[/]" if facts.modules else "learned token embeddings alone",
        "Family": family if facts.modules else "",
        "Modules": counted(facts.modules) if facts.modules else "",
        "Parameters": f"{counted(facts.parameters)} in {counted(facts.tensors, 'tensors')}",
        "Dtype": kinds,
        "Size": in_bytes(facts.size),
        "Tokens": f"{escape(tokens)}  [dim]loadable as textual inversion[/]" if tokens else "",
    }
    for label, value in rows.items():
        if value:
            table.add_row(label, value)
    return Padding(table, (0, 0, 1, 2), expand=False)


def _group_table(groups: Sequence[Group]) -> Padding:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan", collapse_padding=True)
    for label in ("Component", "Algebra"):
        table.add_column(label)
    table.add_column("Modules", justify="right")
    for label in ("Rank", "Alpha", "Scaling"):
        table.add_column(label)
    for group in groups:
        name = escape(group.component or "?") + ("" if group.known else " [yellow](names unknown)[/]")
        histograms = [_values(values, group.modules) for values in (group.ranks, group.alphas, group.scalings)]
        table.add_row(name, group.algebra, counted(group.modules), *histograms)
    return Padding(table, (0, 0, 1, 2), expand=False)


def _values(histogram: Mapping[str, int], total: int) -> str:
    """`16`, or `16 ×304, 8 ×20, … 3 more`."""
    known = [(value.replace("none", "–"), count) for value, count in histogram.items()]
    shown = ", ".join(value if count == total else f"{value} [dim]×{count}[/]" for value, count in known[:4])
    return shown + (f", … {len(known) - 4} more" if len(known) > 4 else "")


def _folded(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """Entries on one line each; those that differ by a number in the key alone (`unet:12:rank`) share one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key, value in metadata.items():
        groups.setdefault((DIGITS.sub("#", key), value), []).append(key)
    lines = [(keys[0] if len(keys) == 1 else f"{like} ×{len(keys)}", v) for (like, v), keys in groups.items()]
    return [(key, " ".join(value.split())[:400]) for key, value in lines]


def grouped(reasons: Mapping[str, str], what: str) -> list[str]:
    """One line a reason, with the first names it holds for."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return [
        f"{name if len(names) == 1 else f'{counted(len(names), what)}, as {name}'}: {reason}"
        for reason, names in groups.items()
        for name in names[:1]
    ]


def show_notes(console: Console, title: str, lines: Sequence[str], style: str) -> None:
    """Print a titled list, shortened to a dozen lines; nothing where it is empty."""
    if not lines:
        return
    console.print(Text(title, f"bold {style}"))
    for line in lines[:SHOWN]:
        # Not wrapped, so that a line stays one line for grep.
        console.print(Text(f"  {line}"), soft_wrap=True)
    if len(lines) > SHOWN:
        console.print(f"  [dim]… and {len(lines) - SHOWN} more[/]")
    console.print()


def counted(number: int, what: str = "") -> str:
    """`1,482 keys`, `1 key`."""
    if what and number == 1:
        what = {"entries": "entry"}.get(what, what.removesuffix("s"))
    return f"{number:,} {what}".rstrip()


def in_bytes(size: int) -> str:
    """A size in the unit that suits it."""
    value, units = float(size), ["bytes", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} bytes" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


def show_plan(
    plan: AttachPlan, unchecked: Mapping[str, int], likely: Sequence[str], fits: bool, console: Console
) -> None:
    """Print what a plan found.

    Args:
        plan: the plan.
        unchecked: components of the file that no model was given for -> their numbers of modules.
        likely: families that the file looks like it is for, where nothing of it fits.
        fits: the verdict.
        console: where to.
    """
    source = Path(plan.adapter.source)
    console.print(f"\n[bold]{escape(source.name)}[/]  [dim]{escape(plan.adapter.describe())}[/]\n", soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan")
    for label in ("Component", "Model"):
        table.add_column(label)
    for label in ("Matched", "Wrong shape", "No place"):
        table.add_column(label, justify="right")
    for component, model in plan.models.items():
        wrong, lost = (sum(p.startswith(f"{component}.") for p in places) for places in (plan.problems, plan.unmatched))
        cells = [str(plan.components.get(component, 0)), *(f"[red]{n}[/]" if n else "0" for n in (wrong, lost))]
        table.add_row(component, type(model).__name__, *cells)
    console.print(Padding(table, (0, 0, 1, 2), expand=False))
    show_notes(console, "Wrong shape", plan.problems, "red")
    show_notes(console, "No place", [f"{place}: {reason}" for place, reason in plan.unmatched.items()], "red")
    lost_keys = {key for module in plan.adapter.unresolved for key in module.keys}
    ignored = {key: reason for key, reason in plan.ignored.items() if key not in lost_keys}
    show_notes(console, "Ignored", grouped(ignored, "keys"), "yellow")
    aside = [f"{component}: {counted(count, 'modules')}" for component, count in unchecked.items()]
    show_notes(console, "Not checked: no model was given for it", aside, "yellow")
    if fits:
        console.print(f"[bold green]Everything fits:[/] {counted(len(plan.bindings), 'modules')}.\n")
        return
    bad = len(plan.problems) + len(plan.unmatched)
    guess = f" It looks like a file for {' or '.join(likely[:3])}." if likely else ""
    console.print(f"[bold red]Does not fit:[/] {bad:,} of {counted(bad + len(plan.bindings), 'modules')}.{guess}\n")


def show_keys(adapter: Adapter, keys: Mapping[str, str], likely: Sequence[str], unknown: int, console: Console) -> None:
    """Print one line a key: where its name leads, without a model."""
    source, ties = Path(adapter.source), ", ".join(name for name in likely if name != adapter.family)
    described = adapter.describe() + (f" (or {ties})" if ties and adapter.family else "")
    console.print(f"\n[bold]{escape(source.name)}[/]  [dim]{escape(described)}[/]\n", soft_wrap=True)
    for key, fate in keys.items():
        console.print(Text(f"  {key}: {fate}"), soft_wrap=True)
    console.print(f"\n{counted(len(keys), 'keys')}, {unknown:,} unknown. Give --model to check shapes.\n")


def show_verification(outcome: Verification, console: Console) -> None:
    """Print the checks of a file, the problems below."""
    path = Path(outcome.path)
    console.print(f"\n[bold]{escape(path.name)}[/]  [dim]{escape(str(path.parent))}[/]\n", soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    words = {True: "[green]good[/]", False: "[bold red]bad[/]", None: "[yellow]?[/]"}
    for check in outcome.checks:
        table.add_row(words[check.passed], f"[bold cyan]{check.name}[/]", escape(check.found))
    console.print(Padding(table, (0, 0, 1, 2), expand=False))
    for check in outcome.checks:
        show_notes(console, check.name.capitalize(), check.problems, "red")
