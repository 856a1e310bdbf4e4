"""Files and the Hub: what a damaged, missing or dangerous file leads to, and that writing is whole or not at all."""

import json
import os
import pickle
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from random_files import same_bits, same_tensors

from lora_loaders.conversion import read_adapter
from lora_loaders.errors import AdapterFileError, LoraLoadersError, MalformedAdapterError, UnsafeFileError
from lora_loaders.files import (
    DTYPES,
    atomic,
    open_safetensors,
    read,
    read_header,
    read_safetensors,
    write_safetensors,
)
from lora_loaders.locating import HubOptions, choose

Header = dict[str, Any]
GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw_file(path: Path, header: Header | bytes, data: bytes = bytes(8)) -> Path:
    """A safetensors file written by hand, lies included."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def lora_tensors() -> dict[str, torch.Tensor]:
    return {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.randn(4, 3072),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.randn(3072, 4),
    }


def assert_says_all_four(error: LoraLoadersError, where: str) -> None:
    """What, where, how to mend it, and the state that things are in."""
    text = str(error)
    assert error.what
    assert error.mend
    assert error.state
    assert where in text
    assert error.mend in text
    assert error.state in text


LIES: dict[str, tuple[Header | bytes, bytes, str]] = {
    "shape and span disagree": ({"a": {**GOOD, "shape": [3]}}, bytes(8), "cannot take 8 bytes"),
    "span runs backward": ({"a": {**GOOD, "data_offsets": [8, 0]}}, bytes(8), "cannot take"),
    "negative start": ({"a": {**GOOD, "data_offsets": [-8, 0]}}, bytes(8), "cannot take"),
    "negative size": ({"a": {**GOOD, "shape": [-1, -2]}}, bytes(8), "cannot take"),
    "unknown dtype": ({"a": {**GOOD, "dtype": "F31"}}, bytes(8), "unknown dtype"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "dtype"),
    "no offsets": ({"a": {"shape": [2], "dtype": "F32"}}, bytes(8), "data_offsets"),
    "three offsets": ({"a": {**GOOD, "data_offsets": [0, 8, 8]}}, bytes(8), "header"),
    "shape is no list": ({"a": {**GOOD, "shape": 2}}, bytes(8), "header"),
    "entry is no dictionary": ({"a": 3}, bytes(8), "header"),
    "header is a list": (b"[1, 2]", bytes(8), "header"),
    "header is no JSON": (b"{not json", bytes(8), "header"),
    "header is not UTF-8": (b"\xff\xfe\x00", bytes(8), "header"),
    "promises more than there is": ({"a": {**GOOD, "shape": [4], "data_offsets": [0, 16]}}, bytes(8), "promises"),
    "holds more than is promised": ({"a": GOOD}, bytes(12), "promises"),
    "nothing is promised and something is there": ({}, bytes(8), "promises"),
    "a gap before the data": ({"a": {**GOOD, "data_offsets": [4, 12]}}, bytes(12), "the header and a have a gap"),
    "a gap in the data": ({"a": GOOD, "b": {**GOOD, "data_offsets": [12, 20]}}, bytes(20), "a and b have a gap"),
    "tensors overlap": ({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, bytes(12), "a and b overlap"),
    "twice the same span": ({"a": GOOD, "b": GOOD}, bytes(8), "a and b overlap"),
    "key named twice": (f'{{"a": {json.dumps(GOOD)}, "a": {json.dumps(GOOD)}}}'.encode(), bytes(8), "names a twice"),
    "key named twice, null first": (f'{{"a": null, "a": {json.dumps(GOOD)}}}'.encode(), bytes(8), "names a twice"),
    "key spelled twice": (f'{{"a": {json.dumps(GOOD)}, "\\u0061": {json.dumps(GOOD)}}}'.encode(), bytes(8), "a twice"),
    "escapes about a key named twice": (
        rb'{"__metadata__": {"\\": "\\\"", "x": "1", "x": "\""}}',
        b"",
        "names x twice",
    ),
    "claim named twice": (
        b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        bytes(8),
        "dtype twice",
    ),
    "metadata twice": (b'{"__metadata__": null, "__metadata__": {"x": "1"}}', b"", "names __metadata__ twice"),
}


@pytest.mark.parametrize("lie", LIES)
def test_header_that_lies_is_refused_by_name(tmp_path: Path, lie: str) -> None:
    header, data, word = LIES[lie]
    path = raw_file(tmp_path / "lie.safetensors", header, data)
    with pytest.raises(MalformedAdapterError, match=word) as caught:
        read_safetensors(path)
    assert_says_all_four(caught.value, "lie.safetensors")


def with_text(**claims: str) -> bytes:
    """A header of one good entry, some claims of which are replaced by this text."""
    entry = {claim: json.dumps(value) for claim, value in GOOD.items()} | claims
    return f'{{"a": {{{", ".join(f"{json.dumps(claim)}: {text}" for claim, text in entry.items())}}}}}'.encode()


NOTHING = json.dumps([0, 0])
HEADERS: dict[str, tuple[Header | bytes, bytes]] = {
    "good": ({"a": GOOD}, bytes(8)),
    "a scalar": ({"a": {**GOOD, "shape": [], "data_offsets": [0, 4]}}, bytes(4)),
    "nothing": ({}, b""),
    "empty tensors": (
        {n: {**GOOD, "shape": [0], "data_offsets": [at, at]} for n, at in (("b", 0), ("c", 8))} | {"a": GOOD},
        bytes(8),
    ),
    "an empty tensor within another": ({"a": GOOD, "b": {**GOOD, "shape": [0], "data_offsets": [4, 4]}}, bytes(8)),
    "an empty tensor with a large size": (with_text(shape=f"[0, {2**62}]", data_offsets=NOTHING), b""),
    "a size beyond a machine word": (with_text(shape=f"[0, {2**70}]", data_offsets=NOTHING), b""),
    "sizes whose product is": (with_text(shape=f"[{2**62}, {2**62}, 0]", data_offsets=NOTHING), b""),
    "an infinite size": (with_text(shape="[1e999]"), bytes(8)),
    "an infinite offset": (with_text(data_offsets="[0, 1e999]"), bytes(8)),
    "a broken size": (with_text(shape="[2.9]"), bytes(8)),
    "a size with a point": (with_text(shape="[2.0]"), bytes(8)),
    "a shape in quotes": (with_text(shape='"2"'), bytes(8)),
    "an empty string for a scalar's shape": (with_text(shape='""', data_offsets="[0, 4]"), bytes(4)),
    "a table for a scalar's shape": (with_text(shape="{}", data_offsets="[0, 4]"), bytes(4)),
    "offsets in quotes": (with_text(data_offsets='["0", "8"]'), bytes(8)),
    "a boolean size": (with_text(shape="[2, true]"), bytes(8)),
    "a boolean offset": (with_text(data_offsets="[false, 8]"), bytes(8)),
    "thousands of digits": (with_text(shape=f"[{'9' * 5000}]"), bytes(8)),
    "a list for a dtype": (with_text(dtype='["F32"]'), bytes(8)),
    "one more claim": (with_text(more="[1, null]"), bytes(8)),
    "one more claim that is no number": (with_text(more="NaN"), bytes(8)),
    "a claim with an escape": (with_text().replace(b"dtype", rb"\u0064type"), bytes(8)),
    "a null for a claim": ({"a": None}, b""),
    "metadata": ({"__metadata__": {"x": "1", "y": '"\\"'}, "a": GOOD}, bytes(8)),
    "metadata: null": ({"__metadata__": None, "a": GOOD}, bytes(8)),
    "metadata: a list": ({"__metadata__": [], "a": GOOD}, bytes(8)),
    "metadata: a number in it": ({"__metadata__": {"x": 1}, "a": GOOD}, bytes(8)),
    "metadata: a table in it": ({"__metadata__": {"x": {}}, "a": GOOD}, bytes(8)),
    "metadata: a null in it": ({"__metadata__": {"x": None}, "a": GOOD}, bytes(8)),
    "brackets without end": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", b""),
    "half a character": (rb'{"\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}', b""),
    "a character in two halves": (rb'{"\ud83d\ude00": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}', b""),
    "another encoding": (json.dumps({"a": GOOD}).encode("utf-16-le"), bytes(8)),
    "a mark of byte order": (b"\xef\xbb\xbf" + json.dumps({"a": GOOD}).encode(), bytes(8)),
    "spaces around": (json.dumps({"a": GOOD}).encode().join([b" ", b"\n\t "]), bytes(8)),
    "something after it": (json.dumps({"a": GOOD}).encode() + b"\0", bytes(8)),
    **{dtype: ({"a": {**GOOD, "dtype": dtype, "shape": [8 // DTYPES[dtype].itemsize]}}, bytes(8)) for dtype in DTYPES},
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("reader", [read_safetensors, open_safetensors])
def test_what_safetensors_reads_is_read_and_what_it_refuses_is_refused(
    tmp_path: Path, header: str, reader: Any
) -> None:
    path = raw_file(tmp_path / "odd.safetensors", *HEADERS[header])
    try:
        with safetensors.safe_open(path, "pt") as file:
            expected, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError:
        with pytest.raises(MalformedAdapterError) as caught:
            reader(path)
        assert_says_all_four(caught.value, "odd.safetensors")
        return
    tensors, given = reader(path)
    assert given == metadata
    assert {key: (t.shape, t.dtype) for key, t in tensors.items()} == {
        k: (t.shape, t.dtype) for k, t in expected.items()
    }


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = safetensors.torch.save({"a": torch.arange(6.0), "b": torch.ones(3, dtype=torch.int16)})
    path = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(MalformedAdapterError) as caught:
            read_safetensors(path)
        assert_says_all_four(caught.value, "cut.safetensors")


def test_empty_file_is_called_empty(tmp_path: Path) -> None:
    path = tmp_path / "nothing.safetensors"
    path.touch()
    with pytest.raises(MalformedAdapterError, match="an empty file"):
        read_adapter(path)


def test_garbage_is_refused_without_a_large_allocation(tmp_path: Path) -> None:
    path = tmp_path / "garbage.safetensors"
    path.write_bytes(b"\xff" * 4096)  # as a length of the header: 16 EiB
    with pytest.raises(MalformedAdapterError, match="no safetensors file"):
        read_adapter(path)


def test_web_page_saved_as_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.safetensors"
    path.write_text("<!DOCTYPE html><html><body>Log in to download</body></html>")
    with pytest.raises(MalformedAdapterError, match=r"page\.safetensors"):
        read_adapter(path)


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    safetensors.torch.save_file(lora_tensors(), tmp_path / "style_v2.safetensors")
    with pytest.raises(AdapterFileError, match="no file") as caught:
        read_adapter(tmp_path / "style.safetensors")
    assert any("style_v2.safetensors" in problem for problem in caught.value.problems)
    assert_says_all_four(caught.value, "style.safetensors")


@pytest.mark.parametrize("source", [None, 3])
def test_what_is_no_source_at_all_is_refused(source: Any) -> None:
    with pytest.raises(AdapterFileError, match=f"a path, a Hub id or a dictionary, not from {source}"):
        read_adapter(source)


def test_missing_weight_name_names_its_neighbours(tmp_path: Path) -> None:
    safetensors.torch.save_file(lora_tensors(), tmp_path / "style_v2.safetensors")
    with pytest.raises(AdapterFileError, match="no file") as caught:
        read_adapter(tmp_path, hub=HubOptions(weight_name="style.safetensors"))
    assert any("style_v2.safetensors" in problem for problem in caught.value.problems)


def test_folder_with_several_files_asks_for_a_weight_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        safetensors.torch.save_file(lora_tensors(), tmp_path / f"{name}.safetensors")
    with pytest.raises(AdapterFileError, match="2 adapter files") as caught:
        read_adapter(tmp_path)
    assert set(caught.value.problems) == {"one.safetensors", "two.safetensors"}
    assert "weight_name" in caught.value.mend
    chosen = read_adapter(tmp_path, hub=HubOptions(weight_name="two.safetensors"))
    assert chosen.source.endswith("two.safetensors")


def test_folder_prefers_the_usual_name_and_passes_over_training_state(tmp_path: Path) -> None:
    for name in ("other", "pytorch_lora_weights", "optimizer"):
        safetensors.torch.save_file(lora_tensors(), tmp_path / f"{name}.safetensors")
    assert read_adapter(tmp_path).source.endswith("pytorch_lora_weights.safetensors")
    assert choose(["a.safetensors", "optimizer.safetensors", "scheduler.bin"], "there") == "a.safetensors"


def test_subfolder_is_looked_into(tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    safetensors.torch.save_file(lora_tensors(), tmp_path / "loras" / "a.safetensors")
    assert read_adapter(tmp_path, hub=HubOptions(subfolder="loras")).components == {"transformer": 1}


def test_empty_folder_is_said_to_hold_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="no adapter file"):
        read_adapter(tmp_path)


def test_dictionary_of_other_things_than_tensors_is_refused() -> None:
    with pytest.raises(MalformedAdapterError, match="tensors only") as caught:
        read_adapter({"a": torch.ones(1), "b": [1, 2]})
    assert caught.value.problems == ("b: list",)


# The Hub, without a network.


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty Hub cache, and huggingface_hub as HF_HUB_OFFLINE=1 makes it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def cached_repo(cache: Path, repo: str, name: str) -> None:
    """A file in the Hub's cache as a download leaves it."""
    root = cache / f"models--{repo.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True)
    safetensors.torch.save_file(lora_tensors(), root / "snapshots" / commit / name)


def test_offline_hub_without_a_weight_name_says_diffusers_sentence(offline: Path) -> None:
    with pytest.raises(AdapterFileError, match="you must specify a `weight_name`") as caught:
        read_adapter("someone/style", hub=HubOptions(cache_dir=offline))
    assert_says_all_four(caught.value, "someone/style")


@pytest.mark.parametrize("by", ["environment", "argument"])
def test_offline_hub_with_nothing_cached_is_a_file_error(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", by == "environment")
    options = HubOptions(
        weight_name="a.safetensors", cache_dir=tmp_path, local_files_only=True if by == "argument" else None
    )
    with pytest.raises(AdapterFileError, match=r"cannot get a\.safetensors") as caught:
        read_adapter("someone/style", hub=options)
    assert_says_all_four(caught.value, "someone/style")


def test_offline_hub_reads_what_is_cached(offline: Path) -> None:
    cached_repo(offline, "someone/style", "a.safetensors")
    options = HubOptions(weight_name="a.safetensors", cache_dir=offline)
    assert read_adapter("someone/style", hub=options).components == {"transformer": 1}


def test_offline_hub_finds_the_usual_name_by_itself(offline: Path) -> None:
    cached_repo(offline, "someone/style", "pytorch_lora_weights.safetensors")
    assert read_adapter("someone/style", hub=HubOptions(cache_dir=offline)).components == {"transformer": 1}


# Pickles.


class Dangerous:
    """Runs code when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.witness),))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickle_is_refused_unless_allowed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"lora{suffix}"
    torch.save(lora_tensors(), path)
    with pytest.raises(UnsafeFileError, match="use_safetensors=False") as caught:
        read_adapter(path)
    assert_says_all_four(caught.value, path.name)
    assert read_adapter(path, use_safetensors=False).components == {"transformer": 1}


def test_folder_of_pickles_is_refused_unless_allowed(tmp_path: Path) -> None:
    torch.save(lora_tensors(), tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(UnsafeFileError, match="use_safetensors=False"):
        read_adapter(tmp_path)
    assert read_adapter(tmp_path, use_safetensors=False).components == {"transformer": 1}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_allowed_pickle_still_runs_no_code(tmp_path: Path) -> None:
    witness = tmp_path / "it_ran"
    for writer in (torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))):
        path = tmp_path / "evil.bin"
        writer({"a": Dangerous(witness)}, path)
        with pytest.raises(MalformedAdapterError, match=r"evil\.bin"):
            read_adapter(path, use_safetensors=False)
    assert not witness.exists()


def test_pickle_of_no_dictionary_is_a_malformed_file(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "tensor.bin")
    with pytest.raises(MalformedAdapterError):
        read_adapter(tmp_path / "tensor.bin", use_safetensors=False)


# What is read equals what safetensors' own reader reads.


def every_dtype() -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, dtype in DTYPES.items():
        whole = torch.randint(0, 2, (7, 5)) if dtype == torch.bool else torch.randn(7, 5) * 10
        tensors |= {f"{name}.matrix": whole.to(dtype), f"{name}.scalar": whole[0, 0].to(dtype).clone()}
        tensors |= {f"{name}.empty": torch.empty(0, 3, dtype=dtype), f"{name}.one": whole[:1, :1].to(dtype).clone()}
    return tensors


def test_reading_equals_safetensors_own_reader_for_every_dtype(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    safetensors.torch.save_file(every_dtype(), path, metadata={"a": "b"})
    tensors, metadata = read_safetensors(path)
    assert same_tensors(tensors, safetensors.torch.load_file(path))
    assert metadata == {"a": "b"}


def test_reading_keeps_nan_infinity_and_negative_zero(tmp_path: Path) -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    safetensors.torch.save_file({"a": values}, tmp_path / "a.safetensors")
    assert same_bits(read_safetensors(tmp_path / "a.safetensors")[0]["a"], values)


def test_large_file_read_in_parallel_equals_safetensors_own_reader(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    tensors = {f"{i}": torch.arange(i * 1_000_000, (i + 1) * 1_000_000, dtype=torch.int32) for i in range(9)}
    safetensors.torch.save_file(tensors, path)
    assert path.stat().st_size > 4 * (8 << 20)
    assert same_tensors(read_safetensors(path)[0], safetensors.torch.load_file(path))


def test_unaligned_data_is_read_right(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.5])
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "float": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    # The header's own length is odd here as well.
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    path = raw_file(tmp_path / "odd.safetensors", text, b"\x07" + values.numpy().tobytes())
    tensors, _ = read_safetensors(path)
    assert tensors["byte"].tolist() == [7]
    assert same_bits(tensors["float"], values)


def test_file_without_tensors_is_read_as_none(tmp_path: Path) -> None:
    safetensors.torch.save_file({}, tmp_path / "none.safetensors", metadata={"format": "pt"})
    assert read_safetensors(tmp_path / "none.safetensors") == ({}, {"format": "pt"})


def test_header_alone_tells_shapes_without_reading_data(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2, 3, dtype=torch.bfloat16)}, path, metadata={"x": "y"})
    entries, metadata, end = read_header(path)
    assert (entries["a"].dtype, entries["a"].shape) == (torch.bfloat16, (2, 3))
    assert metadata == {"x": "y"}
    assert end + 12 == path.stat().st_size


# Writing.


def test_what_is_written_is_read_by_safetensors_own_reader(tmp_path: Path) -> None:
    tensors = every_dtype()
    write_safetensors(tensors, tmp_path / "all.safetensors", {"a": "b"})
    assert same_tensors(safetensors.torch.load_file(tmp_path / "all.safetensors"), tensors)
    with safetensors.safe_open(tmp_path / "all.safetensors", "pt") as file:
        assert file.metadata() == {"a": "b"}


def test_views_and_shared_tensors_are_written_whole(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = {"view": base[2:4, 1:], "transposed": base.t(), "whole": base, "again": base, "learned": base.clone()}
    tensors["learned"].requires_grad_()
    write_safetensors(tensors, tmp_path / "a.safetensors", {})
    read_back = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert same_tensors(read_back, {name: tensor.detach() for name, tensor in tensors.items()})


class DiskFull(OSError):
    pass


def folder(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def test_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(DiskFull), atomic(path) as temporary:  # noqa: PT012
        temporary.write_bytes(b"half of the ne")
        raise DiskFull
    assert path.read_bytes() == b"old"
    assert folder(tmp_path) == {"a.safetensors"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_that_fails_at_the_end_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors({"a": torch.zeros(2)}, path, {})
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise DiskFull

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(DiskFull):
        write_safetensors({"a": torch.ones(2)}, path, {})
    assert path.read_bytes() == before
    assert folder(tmp_path) == {"a.safetensors"}


def test_interrupted_write_leaves_no_part_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "new.safetensors") as temporary:  # noqa: PT012
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert folder(tmp_path) == set()


def test_reader_of_the_old_file_is_not_disturbed_by_a_write(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors({"a": torch.zeros(1000)}, path, {})
    with path.open("rb") as old:
        write_safetensors({"a": torch.ones(1000)}, path, {})
        assert old.read().count(b"\x80\x3f") == 0


def test_write_keeps_the_permissions_of_the_file_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.touch()
    path.chmod(0o640)
    write_safetensors({"a": torch.zeros(1)}, path, {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_new_file_gets_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_safetensors({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_safetensors({"a": torch.zeros(1)}, tmp_path / "x" / "y" / "a.safetensors", {})
    assert read(tmp_path / "x" / "y" / "a.safetensors").tensors["a"].tolist() == [0.0]


def test_a_header_whose_metadata_is_no_table_is_malformed(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": ["a"]}).encode()
    (file := tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(MalformedAdapterError, match="__metadata__ is a list"):
        read_adapter(file)


def test_a_configuration_that_is_no_table_is_malformed(tmp_path: Path) -> None:
    tensors = {"base_model.model.x.lora_A.weight": torch.ones(1, 2)}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(MalformedAdapterError, match=r"adapter_config\.json holds a list"):
        read_adapter(tmp_path)


def test_a_key_that_is_no_string_is_malformed() -> None:
    with pytest.raises(MalformedAdapterError, match="1: a key that is no name"):
        read_adapter({1: torch.ones(2)})  # type: ignore[dict-item]


def test_a_place_that_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterFileError, match=r"(?s)file/below.*Nothing was written") as error:
        write_safetensors({"x": torch.ones(2)}, tmp_path / "file" / "below" / "x.safetensors", {})
    assert error.value.mend
    assert (tmp_path / "file").read_text() == "x"
