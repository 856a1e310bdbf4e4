"""Grouped convolutions: a change that keeps the groups apart is exact, one that joins their inputs is refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.deltas import Delta, GainDelta, InputOftDelta, build
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


JOINING: dict[str, dict[str, Tensor]] = {
    # Eight inputs to a block, twelve to a group: the middle one of three reaches into both.
    "blocks across groups": {"oft_R": torch.zeros(GROUPS * COLUMNS * 2 // 8, 28)},
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
    ],
    ids=["rotation", "gain"],
)
@pytest.mark.parametrize("groups", [1, 3])
def test_a_file_for_another_number_of_groups_is_refused(delta: Delta, groups: int) -> None:
    net = Net()
    net.it = nn.Conv2d(groups * COLUMNS, 18, (1, 2), groups=groups).double()
    (problem,) = plan(net, ll.Adapter({"transformer": {"it": delta}})).problems
    assert f"for a convolution of {GROUPS} groups, this one has {groups}" in problem
