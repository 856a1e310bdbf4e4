"""Tensors that stay in their file until their numbers are asked for; a conversion runs on them as on any others."""

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .errors import UNTOUCHED, MalformedAdapterError

# Functions that torch answers on the meta device without loading its compiler, and what they give.
COUNTS = frozenset(("size", "dim", "numel", "nelement", "stride", "storage_offset", "__len__"))
QUESTIONS = COUNTS | {"is_contiguous", "is_floating_point"}
SHAPINGS = frozenset(("view", "flatten", "reshape", "unflatten", "t", "transpose", "permute", "squeeze", "unsqueeze"))
VIEWS = SHAPINGS | {"detach", "narrow", "split", "chunk", "unbind"}
COPIES = frozenset(("contiguous", "clone", "double", "float", "half", "bfloat16", "new_zeros"))
SCALINGS = frozenset(("mul", "div", "__mul__", "__truediv__"))
CHUNK = 1 << 20
NOT_IN_KERNEL = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""What copying between two files within the kernel fails with where they or the kernel cannot do it."""
ASSIGNMENTS = frozenset(("__setitem__", "__set__"))


@dataclass(frozen=True, eq=False)
class SourceFile:
    """A file that is held open, so that it stays readable when another takes its name."""

    path: Path
    descriptor: int = field(init=False)

    def __post_init__(self) -> None:
        """Open it; it is closed when the last tensor that lies in it is gone."""
        descriptor = os.open(self.path, os.O_RDONLY)
        object.__setattr__(self, "descriptor", descriptor)
        weakref.finalize(self, os.close, descriptor)

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill the buffer with the bytes from `offset` on.

        Raises:
            MalformedAdapterError: the file ends before.
        """
        while target:
            count = os.preadv(self.descriptor, [target], offset)
            if count == 0:
                raise MalformedAdapterError(f"{self.path} became shorter while it was read", state=UNTOUCHED)
            target, offset = target[count:], offset + count

    def copy_to(self, descriptor: int, start: int, stop: int) -> None:
        """Append the bytes `start` to `stop` to another file, within the kernel where it can do that.

        Raises:
            MalformedAdapterError: the file ends before.
        """
        while start < stop and hasattr(os, "copy_file_range"):
            try:
                count = os.copy_file_range(self.descriptor, descriptor, stop - start, start)
            except OSError as error:
                if error.errno not in NOT_IN_KERNEL:
                    raise
                break
            if count == 0:
                break
            start += count
        buffer = memoryview(bytearray(min(CHUNK, stop - start)))
        while start < stop:
            part = buffer[: stop - start]
            self.read_into(part, start)
            write_all(descriptor, part)
            start += len(part)


class Span(NamedTuple):
    """Consecutive bytes of a file."""

    file: SourceFile
    start: int
    stop: int


class FileTensor(Tensor):
    """A tensor whose bytes still lie in a file, or that is computed from such tensors each time it is asked for.

    Views, and rows put one after another, remain spans of the file; casts, scalings, other copies and joins are noted
    down. Whatever else is done with one reads it and gives a plain tensor. Nothing is kept of what is read, so memory
    holds what is being computed and no more.

    Only Python's side of torch is told of it (`__torch_function__`): `__torch_dispatch__` and computing on the meta
    device import 70 MB of compiler on first use.

    Attributes:
        form: dtype, shape, strides and offset, as a tensor on the meta device.
        spans: the bytes that its storage consists of; None where it is computed.
        parts: tensors whose rows are its rows, one after another, where they do not all lie in the file.
    """

    form: Tensor
    spans: tuple[Span, ...] | None
    parts: tuple[Tensor, ...]
    _compute: Callable[[], Tensor] | None

    # Said here, because what goes through torch takes fifty times as long.
    shape = property(lambda self: self.form.shape)  # pyright: ignore[reportAssignmentType]
    dtype = property(lambda self: self.form.dtype)  # pyright: ignore[reportAssignmentType]
    ndim = property(lambda self: self.form.ndim)  # pyright: ignore[reportAssignmentType]
    itemsize = property(lambda self: self.form.itemsize)  # pyright: ignore[reportAssignmentType]
    nbytes = property(lambda self: self.form.nbytes)  # pyright: ignore[reportAssignmentType]
    device = property(lambda self: torch.device("cpu"))  # pyright: ignore[reportAssignmentType]
    is_meta = property(lambda self: False)  # pyright: ignore[reportAssignmentType]

    @classmethod
    def lying_at(cls, spans: Sequence[Span], form: Tensor) -> "FileTensor":
        """The tensor that these bytes of a file are.

        Args:
            spans: the bytes of its storage, in order.
            form: a tensor on the meta device: dtype, shape, strides, offset in the storage.
        """
        self = form.as_subclass(cls)
        self.form, self.spans, self.parts, self._compute = form, tuple(spans), (), None
        return self

    @classmethod
    def computed(cls, form: Tensor, compute: Callable[[], Tensor], parts: Sequence[Tensor] = ()) -> "FileTensor":
        """The tensor of this form that the function gives."""
        self = form.as_subclass(cls)
        self.form, self.spans, self.parts, self._compute = form, None, tuple(parts), compute
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer from the form, note down what is to be done, or read and do it."""
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        options = kwargs or {}
        if name == "cat":
            return cls._joined(*args, **options)
        if not _has_known_form(name, func, args, options):
            if name in ASSIGNMENTS or (name.endswith("_") and not name.endswith("__")) or "out" in options:
                raise RuntimeError(f"{name}: a tensor that lies in a file cannot be changed in place")
            return func(*_read_all(args), **_read_all(options))
        source: FileTensor = args[0]
        # Scaling keeps the form, and computing it on the meta device would load torch's compiler.
        forms = form_of(source.shape, source.dtype) if name in SCALINGS else func(source.form, *args[1:], **options)
        if isinstance(forms, Tensor):
            return source._noted(forms, func, args[1:], options)
        if name in VIEWS:
            return tuple(source._noted(form, func, args[1:], options, number) for number, form in enumerate(forms))
        return forms

    def _noted(
        self, form: Tensor, func: Any, args: tuple[Any, ...], options: Mapping[str, Any], number: int | None = None
    ) -> "FileTensor":
        """What a function of known form gives: another view of the same bytes, or what is to be computed."""
        if self.spans is not None and _storage(form) == _storage(self.form):
            return FileTensor.lying_at(self.spans, form)

        def compute() -> Tensor:
            if func.__name__ == "new_zeros":
                return torch.zeros(form.shape, dtype=form.dtype)
            result = func(self.read(), *args, **options)
            return result if number is None else result[number]

        return FileTensor.computed(form, compute)

    @classmethod
    def _joined(cls, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        first = tensors[0]
        if any(part.dtype != first.dtype or part.ndim != first.ndim for part in tensors):
            return torch.cat(_read_all(tensors), dim)
        shape = list(first.shape)
        shape[dim] = sum(part.shape[dim] for part in tensors)
        form = form_of(shape, first.dtype)
        pieces = [piece for part in tensors for piece in pieces_of(part)] if dim == 0 else []
        spans = [piece for piece in pieces if isinstance(piece, Span)]
        if dim == 0 and len(spans) == len(pieces):
            return cls.lying_at(spans, form)
        return cls.computed(form, lambda: torch.cat(_read_all(tensors), dim), tensors if dim == 0 else ())

    def lies_at(self) -> list[Span] | None:
        """The bytes of the file that are this tensor in order, None where it must be read or computed."""
        if self.spans is None or not self.form.is_contiguous():
            return None
        start = int(self.form.storage_offset()) * self.form.itemsize
        return _cut(self.spans, start, start + self.form.nbytes)

    def read(self) -> Tensor:
        """The numbers, as a plain tensor of its own."""
        if self._compute is not None:
            return self._compute()
        form = self.form
        if form.numel() == 0:
            return torch.empty(form.shape, dtype=form.dtype)
        extent = sum((size - 1) * stride for size, stride in zip(form.shape, form.stride(), strict=True)) + 1
        start, size = int(form.storage_offset()) * form.itemsize, extent * form.itemsize
        # Large ones apart from the heap, which would keep their memory: between them lie small things that stay.
        memory = mmap.mmap(-1, size) if size >= CHUNK else bytearray(size)
        target = memoryview(memory)
        for file, begin, end in _cut(self.spans or (), start, start + size):
            file.read_into(target[: end - begin], begin)
            target = target[end - begin :]
        return torch.frombuffer(memory, dtype=form.dtype).as_strided(form.shape, form.stride())


def pieces_of(tensor: Tensor) -> Iterator[Span | Tensor]:
    """What a tensor's bytes consist of, in order: spans of a file, and tensors that are to be read or computed."""
    if not isinstance(tensor, FileTensor):
        yield tensor
        return
    spans = tensor.lies_at()
    if spans is not None:
        yield from spans
    elif tensor.parts:
        for part in tensor.parts:
            yield from pieces_of(part)
    else:
        yield tensor


def form_of(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor on the meta device."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of it: one call takes 2 GiB at most, and less where it is interrupted."""
    while data:
        data = data[os.write(descriptor, data) :]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU; the tensor must outlive the view."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _has_known_form(name: str, func: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    """Whether torch can tell the result's shape and dtype without numbers, and without loading its compiler."""
    if not isinstance(args[0], FileTensor):
        return False
    if func.__name__ == "__get__" or name in QUESTIONS or name in VIEWS or name in COPIES:
        return True
    if name == "__getitem__":
        keys = args[1] if isinstance(args[1], tuple) else args[1:]
        return all(isinstance(key, int | slice | None) or key is Ellipsis for key in keys)
    if name == "to":
        return all(isinstance(value, torch.dtype) for value in (*args[1:], *options.values()))
    if name in SCALINGS:
        return args[0].is_floating_point() and not options and isinstance(args[1], int | float)
    return False


def _read_all(values: Any) -> Any:
    return tree_map_only(FileTensor, FileTensor.read, values)


def _cut(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The bytes `start` to `stop` of those that the spans make up one after another."""
    begins = accumulate((span.stop - span.start for span in spans), initial=0)
    cuts = [
        Span(span.file, span.start + max(0, start - begin), min(span.stop, span.start + stop - begin))
        for span, begin in zip(spans, begins, strict=False)
    ]
    return [cut for cut in cuts if cut.start < cut.stop]
