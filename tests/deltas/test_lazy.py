"""Every algebra over tensors that lie in a file gives what it gives over tensors in memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from delta_cases import CASES, Case, join
from torch import Tensor

from lora_loaders.deltas import Delta, build
from lora_loaders.files import open_safetensors, read_safetensors
from lora_loaders.lazy import FileTensor

CHANGES: dict[str, Callable[[Case, Delta], list[Delta]]] = {
    "split": lambda case, delta: delta.split(case.sizes),
    "split and joined": lambda case, delta: [join(delta.split(case.sizes))],
    "swapped": lambda case, delta: [delta.swap_halves()],
    "rows": lambda case, delta: [delta.rows(8, 16)],
}


def slots_after(change: str, case: Case, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]] | str:
    """The slots of what a change gives, or the words that it is refused with."""
    try:
        deltas = CHANGES[change](case, build(tensors, case.alpha))
        return [delta.slots() for delta in deltas]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def numbers(slots: dict[str, Tensor]) -> dict[str, Tensor]:
    return {slot: tensor.read() if isinstance(tensor, FileTensor) else tensor for slot, tensor in slots.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[slot].dtype and tensor.equal(other[slot]) for slot, tensor in one.items()
    )


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CASES)
def test_change_over_a_file_is_the_change_in_memory(tmp_path: Path, name: str, change: str) -> None:
    case = CASES[name]
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({slot: tensor.contiguous() for slot, tensor in case.slots.items()}, path)
    expected = slots_after(change, case, read_safetensors(path)[0])
    actual = slots_after(change, case, open_safetensors(path)[0])
    if isinstance(expected, str) or isinstance(actual, str):
        assert actual == expected
        return
    assert all(same(numbers(one), other) for one, other in zip(actual, expected, strict=True))
