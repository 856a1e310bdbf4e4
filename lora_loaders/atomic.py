"""Files that are written whole or not at all."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Generator
from pathlib import Path

from .errors import AdapterFileError

_UMASK = threading.Lock()


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str], *, durable: bool = True) -> Generator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and vanishes when it does not.

    Args:
        path: the file.
        durable: flush it to the disk first, so that it is whole also after a power cut.

    Raises:
        AdapterFileError: its folder cannot be made or written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise AdapterFileError(
            f"{path} cannot be written: {error.strerror or error}",
            mend="Choose a folder that can be written to.",
            state="Nothing was written.",
        ) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        temporary.replace(path)
        if durable:
            _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    with _UMASK:  # it is told only by setting it, and of two threads one would see and restore the other's 0
        mask = os.umask(0)
        os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
