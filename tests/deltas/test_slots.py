"""Slots that stand beside an algebra, and sets of slots that make none."""

import pytest
import torch
from delta_cases import CASES, randn
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.deltas import DoraDelta, FullDelta, LoraDelta, SparseDelta, build
from lora_loaders.errors import MalformedAdapterError
from lora_loaders.planning import plan


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


@pytest.mark.parametrize(
    "beside",
    [{"diff": randn(16)}, {"w_norm": randn(16)}, {"set_weight": randn(16)}, {"bias": randn(16)}, {}],
    ids=lambda beside: " ".join(beside) or "nothing",
)
def test_a_magnitude_with_no_rows_and_columns_to_norm_is_malformed(beside: dict[str, Tensor]) -> None:
    """Norms of a vector's entries are their absolute values, and W' would be ±magnitude whatever the change."""
    slots = {**beside, "magnitude": randn(16, 1).abs()}
    with pytest.raises(MalformedAdapterError, match="magnitude beside no change") as caught:
        build(slots, None)
    assert "alpha" not in str(caught.value)
    spelled = {"magnitude": "dora_scale", "bias": "diff_b"}
    stem = "transformer.transformer_blocks.0.attn.norm_q"
    with pytest.raises(MalformedAdapterError, match=r"norm_q: .*beside no change"):
        ll.read_adapter({f"{stem}.{spelled.get(slot, slot)}": t for slot, t in slots.items()}, family="flux1")


@pytest.mark.parametrize("name", ["lora", "oft"])
def test_a_magnitude_of_columns_does_not_fit_a_vector(name: str) -> None:
    shapes = {"lora": {"down": (2, 1), "up": (16, 2)}, "oft": {"oft_blocks": (4, 4, 4)}}[name]
    slots = {slot: randn(*shape) for slot, shape in shapes.items()}
    assert build(slots, None).fits((16,))
    delta = build({**slots, "magnitude": randn(16, 1).abs()}, None)
    net = nn.ModuleDict({"it": nn.LayerNorm(16)})
    (problem,) = plan(net, ll.Adapter({"transformer": {"it": delta}})).problems
    assert "the module has (16,)" in problem
