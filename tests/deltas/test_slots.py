"""Slots that stand beside an algebra, and sets of slots that make none."""

import pytest
import torch
from delta_cases import CASES, randn

from lora_loaders.deltas import DoraDelta, FullDelta, LoraDelta, SparseDelta, build
from lora_loaders.errors import MalformedAdapterError


def test_a_modulation_difference_is_written_back_under_its_own_name() -> None:
    delta = build({"diff_m": randn(1, 6, 10)}, None)
    assert isinstance(delta, FullDelta)
    assert delta.shape == (1, 6, 10)
    assert delta.slots().keys() == {"diff_m"}


def test_reshape_weight_is_checked_and_not_kept() -> None:
    slots = CASES["lora"].slots
    delta = build({**slots, "reshape_weight": torch.tensor([24, 10])}, None)
    assert isinstance(delta, LoraDelta)
    assert delta.slots().keys() == slots.keys()
    with pytest.raises(MalformedAdapterError, match="reshape_weight"):
        build({**slots, "reshape_weight": torch.tensor([24, 11])}, None)


def test_a_magnitude_norms_the_weight_with_its_sparse_remainder() -> None:
    delta = CASES["sparse"].build(magnitude=torch.ones(24, 1, dtype=torch.float64))
    assert isinstance(delta, DoraDelta)
    assert isinstance(delta.inner, SparseDelta)
    base = CASES["sparse"].base
    turned = base + delta.delta_weight(base)
    torch.testing.assert_close(turned.norm(dim=1), torch.ones(24, dtype=torch.float64))


def test_a_cast_leaves_sparse_indices_alone() -> None:
    delta = CASES["sparse"].build().map_tensors(lambda tensor: tensor.to(torch.bfloat16))
    assert not delta.slots()["bias_indices"].is_floating_point()
    assert delta.slots()["bias_values"].dtype == torch.bfloat16


@pytest.mark.parametrize("missing", ["bias_indices", "bias_values", "bias_size"])
def test_a_sparse_remainder_with_a_missing_slot_is_malformed(missing: str) -> None:
    slots = {name: tensor for name, tensor in CASES["sparse"].slots.items() if name != missing}
    with pytest.raises(MalformedAdapterError, match=missing):
        build(slots, None)


def test_a_sparse_remainder_of_another_size_is_malformed() -> None:
    with pytest.raises(MalformedAdapterError, match="remainder"):
        CASES["sparse"].build(bias_size=torch.tensor([24, 11]))


@pytest.mark.parametrize("name", CASES)
def test_a_foreign_slot_is_malformed(name: str) -> None:
    with pytest.raises(MalformedAdapterError):
        CASES[name].build(initial_norm=randn(24, 1))


@pytest.mark.parametrize("name", [name for name in CASES if len(CASES[name].slots) > 1 and name != "lora tucker"])
def test_half_of_an_algebra_is_malformed(name: str) -> None:
    slots = dict(CASES[name].slots)
    if name in ("oft conv", "oft constrained", "boft", "input oft scaled"):
        slots = {"rescale": randn(24, 1)}
    else:
        slots.popitem() if name != "glora tucker" else slots.pop("a1")
        if name in ("sparse", "lokr tucker"):
            slots.pop("up", None)
            slots.pop("lokr_w2_b", None)
    with pytest.raises(MalformedAdapterError):
        build(slots, None)
