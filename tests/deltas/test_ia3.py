import pytest
import torch
from delta_cases import CASES, join, randn

from lora_loaders.deltas import build
from lora_loaders.errors import ConversionError, MalformedAdapterError


def test_gains_of_the_inputs_are_the_same_for_all_parts() -> None:
    delta = CASES["ia3 input"].build()
    assert all(part.tensors()["weight"] is delta.tensors()["weight"] for part in delta.split([8, 8, 8]))


def test_gains_of_rows_trained_apart_join() -> None:
    base = randn(24, 10)
    parts = [build({"weight": randn(size), "on_input": torch.tensor(0)}, None) for size in (8, 16)]
    joined = join(parts)
    apart = torch.cat([part.delta_weight(rows) for part, rows in zip(parts, base.split([8, 16]), strict=True)])
    torch.testing.assert_close(joined.delta_weight(base), apart)


def test_different_gains_of_the_inputs_do_not_join() -> None:
    parts = [build({"weight": randn(10), "on_input": torch.tensor(1)}, None) for _ in range(2)]
    with pytest.raises(ConversionError, match="fused"):
        join(parts)


def test_a_weight_without_its_flag_is_no_adapter() -> None:
    with pytest.raises(MalformedAdapterError, match="on_input missing"):
        build({"weight": randn(10)}, None)


@pytest.mark.parity
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_equals_lycoris(kind: str, on_input: bool) -> None:
    modules = pytest.importorskip("lycoris.modules.ia3")
    base = torch.nn.Linear(16, 32) if kind == "linear" else torch.nn.Conv2d(16, 32, 3)
    theirs = modules.IA3Module("m", base, train_on_input=on_input)
    with torch.no_grad():
        theirs.weight.normal_()
        ours = build({"weight": theirs.weight.detach(), "on_input": theirs.on_input}, None)
        torch.testing.assert_close(ours.delta_weight(base.weight), theirs.get_diff_weight()[0])
