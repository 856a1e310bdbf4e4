"""Converting from file to file: the same tensors as with everything in memory, without holding or parsing them."""

import errno
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from random_files import RANK, RandomFile, same_bits, same_tensors
from spelled_files import SPELLINGS, H, flux_kohya
from test_files import DiskFull, folder
from test_writing import QKV, TARGETS, parts_of_qkv
from torch import Tensor

from lora_loaders.conversion import parse
from lora_loaders.converting import convert
from lora_loaders.errors import ConversionError, MalformedAdapterError
from lora_loaders.files import open_safetensors, read, read_header
from lora_loaders.lazy import SourceFile
from lora_loaders.writing import to_tensors


def saved(file: RandomFile, path: Path) -> Path:
    """The file on disk, its tensors in an order of its own."""
    safetensors.torch.save_file(file.tensors, path, metadata=file.metadata)
    if file.config is not None:
        path = path.rename(path.with_name("adapter_model.safetensors"))
        path.with_name("adapter_config.json").write_text(json.dumps(file.config))
    return path


def in_memory(
    source: Path, file: RandomFile, target: str, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, str]] | ConversionError:
    """What is to be written, from the whole file read at once, or the refusal."""
    adapter = parse(read(source), file.family)
    try:
        return to_tensors(adapter if dtype is None else adapter.to(dtype=dtype), target)[:2]
    except ConversionError as refusal:
        return refusal


def expected_tensors(source: Path, file: RandomFile, target: str) -> dict[str, Tensor]:
    expected = in_memory(source, file, target)
    assert not isinstance(expected, ConversionError), expected
    return expected[0]


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["as it is", "float32"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_streamed_file_holds_what_is_computed_in_memory(tmp_path: Path, name: str, dtype: torch.dtype | None) -> None:
    file = SPELLINGS[name]()
    source = saved(file, tmp_path / "source.safetensors")
    for target in TARGETS:
        path = tmp_path / target / "out.safetensors"
        expected = in_memory(source, file, target, dtype)
        if isinstance(expected, ConversionError):
            with pytest.raises(ConversionError) as caught:
                convert(source, path, format=target, family=file.family, dtype=dtype)
            assert caught.value.problems == expected.problems
            assert not path.exists()
            continue
        convert(source, path, format=target, family=file.family, dtype=dtype)
        assert same_tensors(safetensors.torch.load_file(path), expected[0])
        assert read_header(path)[1] == expected[1]


# What is copied and what is read.


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all that is read into memory."""
    sizes: list[int] = []
    whole = SourceFile.read_into

    def counted(self: SourceFile, target: memoryview, offset: int) -> None:
        sizes.append(len(target))
        whole(self, target, offset)

    monkeypatch.setattr(SourceFile, "read_into", counted)
    return sizes


RENAMED = [
    ("flux kohya", "original"),
    ("flux kohya", "diffusers"),
    ("flux xlabs", "peft"),
    ("flux peft slot", "diffusers"),
]


@pytest.mark.parametrize(("name", "target"), RENAMED)
def test_renamed_and_cut_tensors_are_never_read(tmp_path: Path, reads: list[int], name: str, target: str) -> None:
    file = SPELLINGS[name]()
    source = saved(file, tmp_path / "source.safetensors")
    convert(source, tmp_path / "out.safetensors", format=target, family=file.family)
    # An alpha is one number; whether a factor is block-diagonal, its first row tells.
    assert max(reads, default=0) <= max(RANK * tensor.itemsize for tensor in file.tensors.values())


def test_equal_downs_are_joined_without_reading_the_ups(tmp_path: Path, reads: list[int]) -> None:
    file = parts_of_qkv(same_down=True)
    tensors = {key: tensor.clone() for key, tensor in file.tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    down, up = (file.tensors[f"transformer.transformer_blocks.0.attn.to_q.lora_{end}.weight"] for end in ("down", "up"))
    assert down.nbytes == up.nbytes
    convert(tmp_path / "a.safetensors", tmp_path / "out.safetensors", format="kohya", family="flux1")
    written = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert written[f"{QKV}.lora_down.weight"].shape == (RANK, H)
    assert written[f"{QKV}.lora_up.weight"].shape == (3 * H, RANK)
    # Twice the down of q against those of k and v, and nothing else of that size.
    assert reads.count(down.nbytes) == 4


def test_runs_of_the_source_are_copied_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SPELLINGS["flux diffusers"]()
    source = saved(file, tmp_path / "source.safetensors")
    copies: list[tuple[int, int]] = []
    whole = SourceFile.copy_to

    def counted(self: SourceFile, descriptor: int, start: int, stop: int) -> None:
        copies.append((start, stop))
        whole(self, descriptor, start, stop)

    monkeypatch.setattr(SourceFile, "copy_to", counted)
    convert(source, tmp_path / "out.safetensors", format="peft", family="flux1")
    assert copies == [(read_header(source)[2], source.stat().st_size)]


@pytest.mark.parametrize("failure", ["absent", errno.EXDEV, errno.ENOSYS, errno.EINVAL, "nothing copied"])
def test_copy_goes_through_memory_where_the_kernel_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str | int
) -> None:
    def unable(*_: Any) -> int:
        if isinstance(failure, int):
            raise OSError(failure, os.strerror(failure))
        return 0

    if failure == "absent":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    else:
        monkeypatch.setattr(os, "copy_file_range", unable, raising=False)
    file = flux_kohya()
    source = saved(file, tmp_path / "source.safetensors")
    convert(source, tmp_path / "out.safetensors", format="original", family="flux1")
    expected = expected_tensors(source, file, "original")
    assert same_tensors(safetensors.torch.load_file(tmp_path / "out.safetensors"), expected)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's peak memory there")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """300 MB of zeros (a hole in the file), of which half are cut and half are cast and scaled."""
    shapes = {".lora_down.weight": (512, 3072), ".lora_up.weight": (9216, 512), ".alpha": ()}
    header: dict[str, Any] = {}
    start = 0
    for block, (suffix, shape) in product(range(12), shapes.items()):
        stop = start + 4 * torch.Size(shape).numel()
        key = f"lora_unet_double_blocks_{block}_img_attn_qkv{suffix}"
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)
    script = """
import re, sys, torch, lora_loaders as ll
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
ll.convert(sys.argv[1], sys.argv[2], format="original", family="flux1")
renamed = peak()
ll.convert(sys.argv[1], sys.argv[2], format="diffusers", family="flux1", dtype=torch.bfloat16)
print(renamed - before, peak() - before)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "large.safetensors"), str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    renamed, cast = map(int, done.stdout.split())
    assert start > 280 << 20
    assert renamed < 20 << 10  # KiB
    assert cast < 100 << 10  # one factor of 19 MB, read and cast


# What can go wrong.


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(flux_kohya(), tmp_path / "source.safetensors")
    (tmp_path / "out.safetensors").write_bytes(b"old")

    def full(*_: Any) -> int:
        raise DiskFull(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(DiskFull):
        convert(source, tmp_path / "out.safetensors", format="original", family="flux1")
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"
    assert folder(tmp_path) == {"source.safetensors", "out.safetensors"}


def test_source_that_shrinks_meanwhile_leaves_no_file(tmp_path: Path) -> None:
    source = saved(flux_kohya(), tmp_path / "source.safetensors")
    adapter = parse(read(source, lazily=True), "flux1")
    os.truncate(source, source.stat().st_size // 2)
    with pytest.raises(MalformedAdapterError, match="became shorter"):
        convert(adapter, tmp_path / "out.safetensors", format="original")
    assert folder(tmp_path) == {"source.safetensors"}


def test_file_is_converted_onto_itself(tmp_path: Path) -> None:
    file = flux_kohya()
    source = saved(file, tmp_path / "source.safetensors")
    expected = expected_tensors(source, file, "original")
    convert(source, source, format="original", family="flux1")
    assert same_tensors(safetensors.torch.load_file(source), expected)
    assert folder(tmp_path) == {"source.safetensors"}


def test_tensor_in_a_file_is_not_changed_in_place(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.arange(6.0).view(3, 2)}, tmp_path / "a.safetensors")
    tensor = open_safetensors(tmp_path / "a.safetensors")[0]["a"]
    with pytest.raises(RuntimeError, match="in place"):
        tensor[0] = 1
    with pytest.raises(RuntimeError, match="in place"):
        tensor.mul_(2)
    with pytest.raises(RuntimeError, match="in place"):
        tensor += 1
    assert same_bits(tensor + 0, torch.arange(6.0).view(3, 2))
