"""Files and the Hub against tensors and a header: one-blob reads, checked headers, writes whole or not at all."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .atomic import atomic
from .buffers import part_of
from .errors import UNTOUCHED, MalformedAdapterError, UnsafeFileError
from .lazy import FileTensor, SourceFile, Span, bytes_of, form_of, pieces_of, write_all
from .locating import CONFIG_NAME, DEFAULT_NAMES, PICKLES, HubOptions, locate

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SMALL_FLOATS = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
UNSIGNED = {"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16}
OTHERS = {"BOOL": torch.bool, "C64": torch.complex64}
DTYPES: Mapping[str, torch.dtype] = FLOATS | SMALL_FLOATS | INTEGERS | UNSIGNED | OTHERS
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 8 << 20
MAX_HEADER = 100 << 20
LARGEST = (1 << 63) - 1
"""What a size or a stride of a tensor can be at most."""
STRINGS = 5
"""How many strings a header has for each tensor: its name, those of three claims, and the dtype."""


@dataclass(frozen=True)
class Contents:
    """What a source holds: tensors, metadata of the header, PEFT's `adapter_config.json`, and a label for messages."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    config: Mapping[str, Any] | None = None
    label: str = "a dictionary"
    names_only: bool = False
    """Whether the tensors are placeholders and only their names mean anything."""


class Entry(NamedTuple):
    """One tensor as a safetensors header states it; `start` and `stop` count from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    hub: HubOptions | None = None,
    *,
    allow_pickle: bool = False,
    lazily: bool = False,
) -> Contents:
    """Read tensors and metadata from a path, a folder, a Hub id or a dictionary.

    Args:
        source: what to read.
        hub: file name, subfolder, revision, token and cache, for folders and Hub ids.
        allow_pickle: whether a pickle may be read, with torch's weights-only reader.
        lazily: leave the tensors of a safetensors file where they are, see `FileTensor`.

    Raises:
        AdapterFileError: nothing there, or several files and no `weight_name`.
        MalformedAdapterError: truncated, or a header that contradicts itself or the file.
        UnsafeFileError: a pickle, and `allow_pickle` is not set.
    """
    if isinstance(source, Mapping):
        return _from_mapping(source)
    path = locate(source, hub or HubOptions(), allow_pickle=allow_pickle)
    if path.suffix.lower() in PICKLES:
        if not allow_pickle:
            raise UnsafeFileError(
                f"{path} is a pickle, which can run code when it is read",
                mend="If you trust it, pass use_safetensors=False: it is then read with torch's weights-only reader.",
                state=UNTOUCHED,
            )
        return _read_pickle(path)
    tensors, metadata = (open_safetensors if lazily else read_safetensors)(path)
    return Contents(tensors, metadata, adapter_config(path), str(path))


CONFIG_MEND = "Write it anew, or take it away: ranks are read from the tensors, and alpha is the rank then."


def _from_mapping(source: Mapping[str, Tensor]) -> Contents:
    values = list[tuple[str, object]](source.items())
    wrong = [f"{key}: {type(value).__name__}" for key, value in values if not isinstance(value, Tensor)]
    wrong += [f"{key!r}: a key that is no name" for key in list[object](source) if not isinstance(key, str)]
    if wrong:
        raise MalformedAdapterError("a state dictionary holds tensors only, by name", problems=wrong, state=UNTOUCHED)
    return Contents(dict(source))


def adapter_config(path: Path) -> Mapping[str, Any] | None:
    """PEFT's configuration beside its file, None where there is none.

    Raises:
        MalformedAdapterError: it is no JSON.
    """
    file = path.parent / CONFIG_NAME
    if path.name != DEFAULT_NAMES[1] or not file.is_file():
        return None
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise MalformedAdapterError(f"{file} is no JSON: {error}", mend=CONFIG_MEND, state=UNTOUCHED) from error
    if not isinstance(config, dict):
        what = f"{file} holds a {type(config).__name__}, no table of a configuration's fields"
        raise MalformedAdapterError(what, mend=CONFIG_MEND, state=UNTOUCHED)
    return cast(Mapping[str, Any], config)


def _read_pickle(path: Path) -> Contents:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        tensors: Mapping[str, Any] = held.get("state_dict", held)
        tensors = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}
    except Exception as error:  # torch's reader fails in many ways on what is no pickle of tensors
        raise MalformedAdapterError(
            f"{path} cannot be read as a pickle of tensors: {error}",
            mend="Fetch it again, or let its author save it as safetensors.",
            state=UNTOUCHED,
        ) from error
    return Contents(tensors, label=str(path))


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Entries and metadata of a safetensors header, every claim checked against the file, and the header's end.

    Raises:
        MalformedAdapterError: the file is truncated or its header is not to be believed.
    """

    def refuse(what: str) -> MalformedAdapterError:
        mend = "The download or the copy is incomplete or damaged: fetch the file again."
        return MalformedAdapterError(f"{path}: {what}", mend=mend, state=UNTOUCHED)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise refuse(f"the header names {', '.join(twice[:3])} twice")
        return result

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size >= 8 and not length <= MAX_HEADER:
            start = length.to_bytes(8, "little")
            raise refuse(f"no safetensors file: it begins with {start!r}, as a web page or a pointer to a file may")
        if size < 8 or length > size - 8:
            raise refuse(f"{size} bytes, too short for its header of {length} bytes" if size else "an empty file")
        try:
            text = file.read(length).decode()
            header = json.loads(text, parse_constant=_no_constant)
            count = len(header)
            metadata: Any = header.pop("__metadata__", None)
            _check_metadata(metadata)
            expected = count + (STRINGS - 1) * len(header) + 2 * len(metadata or ())
            if _strings_in(text) != expected:  # a string was lost to another of its name, or there are other claims
                json.loads(text, object_pairs_hook=unique)  # as slow as all the rest, and rarely needed
            if "\\u" in text:
                json.dumps(header, ensure_ascii=False).encode()  # fails where half a character is spelled out
            entries = {name: _entry(name, claim) for name, claim in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, MalformedAdapterError):
                raise
            raise refuse(f"the header is no safetensors header ({error})") from error
    stop, before = 0, "the header"
    for start, after, name in sorted((entry.start, entry.stop, name) for name, entry in entries.items()):
        if start != stop:
            raise refuse(f"{before} and {name} {'overlap' if start < stop else 'have a gap between them'}")
        stop, before = after, name
    end = 8 + length
    if end + stop != size:
        raise refuse(f"the header promises {end + stop} bytes, the file has {size}")
    return entries, metadata or {}, end


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _strings_in(text: str) -> int:
    """How many strings a JSON text has, by its quotation marks; those within strings have a backslash."""
    escaped = text.replace("\\\\", "").count('\\"') if "\\" in text else 0
    return (text.count('"') - escaped) // 2


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict | None):
        raise TypeError(f"__metadata__ is a {type(metadata).__name__}, no table")
    wrong = [key for key, value in (metadata or {}).items() if not isinstance(value, str)]
    if wrong:
        raise TypeError(f"metadata are strings, and {', '.join(wrong[:3])} is none")


def _entry(name: str, claim: Mapping[str, Any]) -> Entry:
    if claim["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the unknown dtype {claim['dtype']!r}")
    dtype, shape, offsets = DTYPES[claim["dtype"]], claim["shape"], claim["data_offsets"]
    if type(shape) is not list or {*map(type, shape), *map(type, offsets)} != {int}:  # a bool is an int to isinstance
        raise TypeError(f"{name} has the shape {shape!r} and the offsets {offsets!r}, which are to be whole numbers")
    start, stop = offsets
    if start == stop and math.prod(filter(None, shape)) > LARGEST:  # all others are bounded by the file's size
        raise ValueError(f"{name} has the shape {shape}, whose sizes are larger than a tensor's can be")
    if start < 0 or min(shape, default=0) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {shape} and dtype {claim['dtype']} cannot take {stop - start} bytes")
    return Entry(dtype, tuple(shape), start, stop)


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, as views of one buffer that was read in parallel, and the header's metadata.

    The buffer is page-locked where a GPU is present, so that one fast copy takes it there.

    Raises:
        MalformedAdapterError: see `read_header`.
    """
    path = Path(path)
    entries, metadata, end = read_header(path)
    size = max((entry.stop for entry in entries.values()), default=0)
    blob = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available() and size >= CHUNK)
    if size:
        _read_into(blob, SourceFile(path), end)
    dtypes = {entry.dtype for entry in entries.values()}
    typed = {dtype: blob[: size - size % dtype.itemsize].view(dtype) for dtype in dtypes}
    return {name: _view(blob, typed[entry.dtype], entry) for name, entry in entries.items()}, metadata


def _read_into(blob: Tensor, file: SourceFile, offset: int) -> None:
    """Fill the buffer from the file, in as many parallel reads as it has chunks."""
    target = bytes_of(blob)

    def read_chunk(start: int) -> None:
        file.read_into(target[start : start + CHUNK], offset + start)

    if len(target) <= CHUNK:
        read_chunk(0)
        return
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(read_chunk, range(0, len(target), CHUNK)))


def _view(blob: Tensor, typed: Tensor, entry: Entry) -> Tensor:
    itemsize = entry.dtype.itemsize
    if entry.start % itemsize:  # some writers do not align; a view would be refused
        return blob[entry.start : entry.stop].clone().view(entry.dtype).view(entry.shape)
    return part_of(typed, entry.shape, entry.start // itemsize)


def open_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, left where they are, and the header's metadata.

    Raises:
        MalformedAdapterError: see `read_header`.
    """
    path = Path(path)
    entries, metadata, end = read_header(path)
    file = SourceFile(path)

    def tensor(entry: Entry) -> Tensor:
        return FileTensor.lying_at([Span(file, end + entry.start, end + entry.stop)], form_of(entry.shape, entry.dtype))

    return {name: tensor(entry) for name, entry in entries.items()}, metadata


def write_safetensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write a file whole or not at all, tensor by tensor; they may be views, shared or on any device.

    Bytes that lie in a file are copied there from there. Such a copy can be made again, so it is flushed to the disk
    only where it replaces something.

    Raises:
        MalformedAdapterError: a tensor of a dtype that the format has no word for.
    """
    path = Path(path)
    pieces = {name: list(pieces_of(tensor)) for name, tensor in tensors.items()}

    def place(name: str) -> tuple[int, float, str]:
        # Wide dtypes first, so that all are aligned; then as in the source, so that its bytes are copied in long runs.
        first = pieces[name][0] if pieces[name] else None
        return -tensors[name].itemsize, first.start if isinstance(first, Span) else float("inf"), name

    order = sorted(tensors, key=place)
    header = _header({name: tensors[name] for name in order}, metadata)
    is_copy = any(isinstance(tensor, FileTensor) for tensor in tensors.values())
    # Not truncated: ext4 flushes what was truncated when it is closed, which takes longer than the copying.
    with atomic(path, durable=path.exists() or not is_copy) as temporary, temporary.open("r+b", buffering=0) as file:
        write_all(file.fileno(), memoryview(header))
        for run in _runs(piece for name in order for piece in pieces[name]):
            if isinstance(run, Span):
                run.file.copy_to(file.fileno(), run.start, run.stop)
            elif run.numel():
                numbers = run.read() if isinstance(run, FileTensor) else run
                plain = numbers.detach().to("cpu").contiguous()
                write_all(file.fileno(), bytes_of(plain))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header with its length before it; spaces make it end at a multiple of 8 bytes."""
    unknown = [f"{name}: {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in NAMES]
    if unknown:
        raise MalformedAdapterError(
            "safetensors files hold no such dtype", problems=unknown, state="Nothing was written."
        )
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _runs(pieces: Iterable[Span | Tensor]) -> Iterator[Span | Tensor]:
    """The same bytes in the same order, neighbouring spans of a file as one."""
    run: Span | None = None
    for piece in pieces:
        if run is not None and isinstance(piece, Span) and run[::2] == (piece.file, piece.start):
            run = Span(run.file, run.start, piece.stop)
            continue
        if run is not None:
            yield run
        run = piece if isinstance(piece, Span) else None
        if run is None:
            yield piece
    if run is not None:
        yield run
