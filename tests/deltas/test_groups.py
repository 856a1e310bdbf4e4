"""Grouped convolutions: a change that keeps the groups apart is exact, one that joins their inputs is refused."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.deltas import Delta, GainDelta, InputBoftDelta, InputOftDelta, build
from lora_loaders.planning import plan

GROUPS, ROWS, COLUMNS = 2, 8, 6
BLOCK = 3


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * 0.2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.it = nn.Conv2d(GROUPS * COLUMNS, ROWS, (1, 2), groups=GROUPS).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.it(x)


def turns(triangles: Tensor) -> Tensor:
    """R = I + 2Q + 2Q² + 2Q³ + Q⁴ block by block, in the formula of PEFT's paper."""
    q = torch.zeros(len(triangles), BLOCK, BLOCK, dtype=torch.float64)
    rows, columns = torch.triu_indices(BLOCK, BLOCK, 1)
    q[:, rows, columns] = triangles
    q = q - q.mT
    return torch.eye(BLOCK, dtype=torch.float64) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q


def test_rotations_of_all_inputs_turn_each_group_by_its_own() -> None:
    torch.manual_seed(0)
    count = COLUMNS * 2 // BLOCK
    triangles, x = randn(GROUPS * count, 3), randn(2, GROUPS * COLUMNS, 3, 4)
    model: Any = ll.attach(Net())
    plain = model.it.weight.detach().clone()
    model.load_lora_adapter({"it.oft_R": triangles}, adapter_name="a", prefix=None)
    own = turns(triangles)
    parts = [torch.block_diag(*own[group * count : (group + 1) * count]) for group in range(GROUPS)]
    turned = torch.cat([rows @ part for rows, part in zip(plain.flatten(1).chunk(GROUPS), parts, strict=True)])
    wanted = F.conv2d(x, turned.view_as(plain), model.it.bias, groups=GROUPS)
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
    model.fuse_lora()
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
    model.unfuse_lora()
    assert torch.equal(model.it.base_layer.weight, plain)


def test_rotations_of_one_groups_inputs_are_the_same_for_all_groups() -> None:
    torch.manual_seed(0)
    triangles, weight = randn(COLUMNS * 2 // BLOCK, 3), randn(ROWS, COLUMNS, 1, 2)
    once, twice = build({"oft_R": triangles}, None), build({"oft_R": triangles.repeat(2, 1)}, None)
    assert isinstance(once, InputOftDelta)
    torch.testing.assert_close(once.delta_weight(weight), twice.delta_weight(weight))
    assert (once.input_groups(weight.shape), twice.input_groups(weight.shape)) == (1, 2)


def as_one_group(weight: Tensor) -> Tensor:
    """The weight of the same convolution without groups: zeros where they are kept apart."""
    parts = [
        F.pad(rows, (0, 0, 0, 0, g * COLUMNS, (GROUPS - 1 - g) * COLUMNS)) for g, rows in enumerate(halves(weight))
    ]
    return torch.cat(parts)


def halves(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.chunk(GROUPS)


def of_one_group(dense: Tensor) -> Tensor:
    """The grouped weight again; nothing may stand where it has no place."""
    parts = [rows[:, g * COLUMNS : (g + 1) * COLUMNS] for g, rows in enumerate(halves(dense))]
    weight = torch.cat(parts)
    torch.testing.assert_close(as_one_group(weight), dense, rtol=0, atol=1e-15)
    return weight


@pytest.mark.parity
def test_a_butterfly_of_all_inputs_is_pefts_of_the_same_convolution_without_groups() -> None:
    peft = pytest.importorskip("peft", reason="says what its BOFT makes of a weight")
    torch.manual_seed(0)
    net = Net()
    whole = copy.deepcopy(net)
    whole.it = nn.Conv2d(GROUPS * COLUMNS, ROWS, 2, bias=False).double()
    # PEFT wants square kernels.
    net.it = nn.Conv2d(GROUPS * COLUMNS, ROWS, 2, groups=GROUPS, bias=False).double()
    whole.it.weight.data = as_one_group(net.it.weight.data)
    wrapped = peft.get_peft_model(whole, peft.BOFTConfig(target_modules=["it"], boft_block_size=4)).double()
    layer = wrapped.base_model.model.it
    blocks, factors = layer.boft_R["default"], layer.boft_s["default"]
    assert blocks.shape[1] * 4 == GROUPS * COLUMNS * 4
    blocks.data, factors.data = randn(*blocks.shape), 1 + randn(*factors.shape)
    delta = build({"boft_R": blocks.data, "boft_s": factors.data}, None)
    (binding,) = plan(net, ll.Adapter({"transformer": {"it": delta}})).bindings
    plain = net.it.weight.detach()
    changed = plain + binding.delta.delta_weight(plain)
    torch.testing.assert_close(changed, of_one_group(wrapped.merge_and_unload().it.weight.data), rtol=1e-12, atol=1e-12)


def evens_first(inputs: int, group: int, half: int) -> list[int]:
    """The inputs of each group, those of its halves of even number before the others; PEFT's permutation."""
    starts = [
        start + part for start in range(0, inputs, group) for odd in (0, half) for part in range(odd, group, 2 * half)
    ]
    return [start + step for start in starts for step in range(half)]


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_butterflies_that_reach_into_no_other_group_turn_each_by_its_own(stages: int) -> None:
    torch.manual_seed(0)
    size = 4
    columns = size << (stages - 1)  # the least
    inputs = GROUPS * columns
    blocks, factors, base = randn(stages, inputs // size, size, size), randn(ROWS, 1), randn(ROWS, columns, 1)
    delta = build({"boft_R": blocks, "boft_s": factors}, None)
    assert delta.fits(base.shape)
    assert delta.input_groups(base.shape) == GROUPS
    apart = torch.block_diag(*base.flatten(1).chunk(GROUPS))
    turned, identity = apart, torch.eye(size, dtype=torch.float64)
    for stage, skews in enumerate((blocks - blocks.mT) / 2):
        order = evens_first(inputs, size << stage, size // 2 if stages > 1 else size)
        permutation = torch.eye(inputs, dtype=torch.float64)[order]
        whole = torch.block_diag(*[(identity - q) @ torch.linalg.inv(identity + q) for q in skews])
        turned = turned @ (permutation @ whole @ permutation.T).T
    parts = (factors * turned - apart).chunk(GROUPS)
    wanted = torch.cat([part[:, group * columns : (group + 1) * columns] for group, part in enumerate(parts)])
    torch.testing.assert_close(torch.block_diag(*wanted.chunk(GROUPS)), torch.cat(parts), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(delta.delta_weight(base).flatten(1), wanted, rtol=1e-12, atol=1e-14)


JOINING: dict[str, dict[str, Tensor]] = {
    # Eight inputs to a block, twelve to a group: the middle one of three reaches into both.
    "blocks across groups": {"oft_R": torch.zeros(GROUPS * COLUMNS * 2 // 8, 28)},
    # The third stage turns halves of four blocks together: eight inputs, and a group has twelve.
    "butterflies across groups": {"boft_R": torch.zeros(3, 12, 2, 2), "boft_s": torch.ones(1, ROWS)},
    "blocks of butterflies across groups": {"boft_R": torch.zeros(1, 3, 8, 8), "boft_s": torch.ones(1, ROWS)},
    "peft's lora": {
        "lora_A.weight": torch.zeros(4, GROUPS * COLUMNS, 1, 2),
        "lora_B.weight": torch.zeros(ROWS, 4 // GROUPS, 1, 1),
    },
    "lycoris's glora": {
        "a1.weight": torch.zeros(GROUPS * COLUMNS, 3, 1, 1),
        "a2.weight": torch.zeros(3, GROUPS * COLUMNS, 1, 1),
        "b1.weight": torch.zeros(ROWS, 3, 1, 1),
        "b2.weight": torch.zeros(3, GROUPS * COLUMNS, 1, 2),
    },
}


@pytest.mark.parametrize("case", JOINING)
def test_what_joins_inputs_of_several_groups_is_refused_with_the_reason(case: str) -> None:
    model: Any = ll.attach(Net())
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises((ll.AdapterMismatchError, ll.MalformedAdapterError), match="groups of this convolution keep"):
        model.load_lora_adapter({f"it.{key}": t for key, t in JOINING[case].items()}, adapter_name="a", prefix=None)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    "delta",
    [
        InputOftDelta(oft_R=torch.zeros(GROUPS * COLUMNS * 2 // BLOCK, 3)),
        GainDelta(ia3_l=torch.ones(1, GROUPS * COLUMNS, 1, 1), on_input=True),
        InputBoftDelta(boft_R=torch.zeros(1, GROUPS * COLUMNS * 2 // BLOCK, BLOCK, BLOCK), boft_s=torch.ones(1, 18)),
    ],
    ids=["rotation", "gain", "butterfly"],
)
@pytest.mark.parametrize("groups", [1, 3])
def test_a_file_for_another_number_of_groups_is_refused(delta: Delta, groups: int) -> None:
    net = Net()
    net.it = nn.Conv2d(groups * COLUMNS, 18, (1, 2), groups=groups).double()
    (problem,) = plan(net, ll.Adapter({"transformer": {"it": delta}})).problems
    assert f"for a convolution of {GROUPS} groups, this one has {groups}" in problem
