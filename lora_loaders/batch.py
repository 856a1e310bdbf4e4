"""Folder -> folder: every file on its own, finished ones recognised by their content, a line of report for each."""

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .adapter import Adapter
from .atomic import atomic
from .conversion import parse
from .converting import convert
from .errors import AdapterFileError
from .families import FAMILIES, Family
from .files import read
from .locating import CONFIG_NAME, DEFAULT_NAMES, PICKLES
from .version import __version__

REPORT_NAME = "conversion_report.jsonl"
FINISHED = ("converted", "unchanged")
CHUNK = 1 << 20
PICKLE_SKIPPED = "a pickle: allow pickles to read it with torch's weights-only reader"


@dataclass(frozen=True)
class Outcome:
    """What became of one file; one line of the report.

    Attributes:
        source: path below the source folder.
        target: path below the target folder.
        status: `converted`; `unchanged` where an earlier run did it and nothing has changed since; `skipped`; `failed`.
        error: what went wrong, or why it was skipped.
        source_sha256: of the file's content, and of its `adapter_config.json` where PEFT's naming has one.
        target_sha256: of what was written.
        settings: format, family, dtype and version of this package, which together with the source decide the target.
        read_as: format and family that were found.
        left_out: reason -> number of keys that are not in the target for it.
        also_fits: families that names and shapes fit as well as the one that was found.
    """

    source: str
    target: str
    status: str
    error: str | None = None
    source_sha256: str | None = None
    target_sha256: str | None = None
    settings: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    read_as: str | None = None
    left_out: Mapping[str, int] = field(default_factory=dict[str, int])
    also_fits: Sequence[str] = ()


@dataclass(frozen=True)
class _Batch:
    """One run over a folder."""

    source: Path
    target: Path
    settings: Mapping[str, str | None]
    dtype: torch.dtype | None
    overwrite: bool
    allow_pickle: bool
    earlier: Mapping[str, Outcome]
    families: Sequence[Family]
    crowded: Collection[Path]
    """Names that several of the files go to."""

    def convert(self, source: Path) -> Outcome:
        """Convert one file unless an earlier run did; whatever goes wrong with it is in the outcome."""
        name = source.relative_to(self.source)
        target = self.target / name.with_suffix(".safetensors")
        outcome = Outcome(
            name.as_posix(), name.with_suffix(".safetensors").as_posix(), "failed", settings=self.settings
        )
        try:
            outcome = replace(outcome, source_sha256=digest(source))
            if self._is_finished(outcome, target):
                return replace(self.earlier[outcome.source], status="unchanged")
            self._check_name(source)
            contents = read(source, allow_pickle=self.allow_pickle, lazily=True)
            adapter = parse(contents, self.settings["family"], families=self.families)
            reasons = list(adapter.ignored.values())
            left_out = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
            outcome = replace(outcome, read_as=adapter.describe(), left_out=left_out, also_fits=adapter.ties)
            status = self._write(adapter, target)
            return replace(outcome, status=status, target_sha256=digest(target))
        except Exception as error:  # of any kind: one bad file never stops the rest
            return replace(outcome, error=f"{type(error).__name__}: {error}")

    def _is_finished(self, outcome: Outcome, target: Path) -> bool:
        """Whether an earlier run made the target of the same content and settings, and it still is what was written."""
        before = self.earlier.get(outcome.source)
        if before is None or before.status not in FINISHED or not target.is_file():
            return False
        same = (before.source_sha256, before.settings) == (outcome.source_sha256, outcome.settings)
        return same and before.target_sha256 == digest(target)

    def _check_name(self, source: Path) -> None:
        rival = source.with_suffix(".safetensors")
        if source != rival and rival in self.crowded:
            raise AdapterFileError(
                f"another file beside it goes to the same name, {rival.name}",
                mend="Rename one of them.",
                state="Nothing was written of this one.",
            )

    def _write(self, adapter: Adapter, target: Path) -> str:
        """Write the target, or find that it is there already to the last bit (a killed run's, which has no line)."""
        if self.overwrite or not target.exists():
            self._convert(adapter, target)
            return "converted"
        with TemporaryDirectory(dir=target.parent, prefix=".", suffix=".part") as folder:
            if digest(self._convert(adapter, Path(folder, target.name))) == digest(target):
                return "unchanged"
        raise AdapterFileError(
            f"{target} is there already, and is not what this file gives with these settings",
            mend="Choose another folder, or allow overwriting.",
            state="It was not changed.",
        )

    def _convert(self, adapter: Adapter, target: Path) -> Path:
        form = str(self.settings["format"])
        return convert(adapter, target, format=form, dtype=self.dtype, families=self.families)


def convert_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    use_safetensors: bool | None = None,
    jobs: int | None = None,
    report: str | os.PathLike[str] | None = None,
    progress: Callable[[int, Outcome | None], None] = lambda total, outcome: None,
    families: Sequence[Family] = FAMILIES,
) -> list[Outcome]:
    """Convert every adapter file below a folder; sub-folders and names are kept, and one bad file never stops the rest.

    A second run continues where the first ended: it skips the files whose content, settings and results are as the
    report has them. Interrupted, it lets those finish that are being converted; no file is ever there by half.

    Args:
        source: the folder; hidden files, and those below `target`, are left alone.
        target: where the files go.
        format: see `lora_loaders.formats`.
        family: read all as this family.
        dtype: floating dtype to write in; as it is by default.
        overwrite: whether files may be replaced that are there and are not what would be written.
        use_safetensors: False converts pickles too, with torch's weights-only reader.
        jobs: files at a time; up to four by default.
        report: JSON lines, one a file; `conversion_report.jsonl` in `target` by default.
        progress: called with the number of files, first with None and then with each outcome.
        families: the families to tell apart; pass your own beside `FAMILIES` to add one.

    Raises:
        AdapterFileError: there is no such folder, nothing in it, or it is the target too.
    """
    source, target = Path(source), Path(target)
    allow_pickle = use_safetensors is False
    files, skipped = _files_below(source, target, allow_pickle)
    report = target / REPORT_NAME if report is None else Path(report)
    outcomes = _earlier(report)
    settings = {"format": format, "family": family, "dtype": str(dtype) if dtype else None}
    settings["version"] = __version__
    names = Counter(file.with_suffix(".safetensors") for file in files)
    crowded = {name for name, files in names.items() if files > 1}
    batch = _Batch(source, target, settings, dtype, overwrite, allow_pickle, dict(outcomes), families, crowded)
    _write_report(report, outcomes)
    lock = threading.Lock()
    done: list[Outcome] = []
    total = len(files) + len(skipped)

    def note(outcome: Outcome) -> None:
        with lock:
            done.append(outcome)
            outcomes[outcome.source] = outcome
            with report.open("a", encoding="utf-8") as lines:
                lines.write(_line(outcome))
            progress(total, outcome)

    progress(total, None)
    for file in skipped:
        name = file.relative_to(source).as_posix()
        note(Outcome(name, "", "skipped", error=PICKLE_SKIPPED, settings=settings))
    pool = ThreadPoolExecutor(jobs or min(4, os.cpu_count() or 1))
    try:
        for future in [pool.submit(lambda file: note(batch.convert(file)), file) for file in files]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        _write_report(report, outcomes)
    return sorted(done, key=lambda outcome: outcome.source)


def digest(path: Path) -> str:
    """SHA-256 of a file's content, and of the `adapter_config.json` beside it where PEFT's naming has one."""
    sha = hashlib.sha256()
    config = path.with_name(CONFIG_NAME)
    for file in (path, config) if path.name == DEFAULT_NAMES[1] and config.is_file() else (path,):
        with file.open("rb", buffering=0) as stream:
            while chunk := stream.read(CHUNK):
                sha.update(chunk)
    return sha.hexdigest()


def _files_below(source: Path, target: Path, allow_pickle: bool) -> tuple[list[Path], list[Path]]:
    """The files to convert, and those that are left alone because they are pickles."""
    endings = (".safetensors", *PICKLES) if allow_pickle else (".safetensors",)
    if source.resolve() == target.resolve():
        raise AdapterFileError(
            f"{source} is the source and the target", mend="Choose another folder.", state="Nothing was written."
        )
    # Links to nothing are among them: they fail by themselves, and are said to.
    below = [
        file
        for file in sorted(source.rglob("*"))
        if file.suffix.lower() in (".safetensors", *PICKLES) and not file.is_dir()
    ]
    aside = os.path.realpath(target)
    seen = [
        file
        for file in below
        if not any(part.startswith(".") for part in file.relative_to(source).parts)
        and not Path(os.path.realpath(file)).is_relative_to(aside)
    ]
    files = [file for file in seen if file.suffix.lower() in endings]
    if not files:
        what = f"{source} holds no {' or '.join(endings)} file" if source.is_dir() else f"no folder {source}"
        problems = [f"{file.relative_to(source)}: {PICKLE_SKIPPED}" for file in seen]
        mend = "Give a folder with adapters."
        raise AdapterFileError(what, problems=problems, mend=mend, state="Nothing was written.")
    return files, [file for file in seen if file.suffix.lower() not in endings]


def _line(outcome: Outcome) -> str:
    return json.dumps(asdict(outcome), ensure_ascii=False) + "\n"


def _write_report(path: Path, outcomes: Mapping[str, Outcome]) -> None:
    """One line a file, in the order of their names."""
    with atomic(path) as temporary:
        temporary.write_text("".join(_line(outcomes[name]) for name in sorted(outcomes)), "utf-8")


def _earlier(path: Path) -> dict[str, Outcome]:
    """Outcomes of an earlier report by source; a line that a killed run left unfinished is none.

    Raises:
        AdapterFileError: the file is no such report.
    """
    if not path.is_file():
        return {}
    lines = path.read_text("utf-8").splitlines(keepends=True)
    outcomes: dict[str, Outcome] = {}
    for number, line in enumerate(lines, 1):
        try:
            fields: dict[str, Any] = json.loads(line)
            outcomes[fields["source"]] = Outcome(**fields)
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise AdapterFileError(
                f"{path}, line {number}: no line of a report ({error})",
                mend="Name another file for the report, or remove this one.",
                state="Nothing was written.",
            ) from error
    return outcomes


def counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Status -> number of files, those that there are."""
    statuses = [outcome.status for outcome in outcomes]
    return {status: statuses.count(status) for status in (*FINISHED, "skipped", "failed") if status in statuses}
