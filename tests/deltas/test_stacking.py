"""Stacking parts of any two algebras, wrapped or not: exactly the parts' changes below one another, or a refusal."""

from functools import cache
from itertools import product

import pytest
import torch
from delta_cases import CASES, COLUMNS, ROWS, randn
from torch import Tensor

from lora_loaders.deltas import Delta
from lora_loaders.deltas.base import join_all
from lora_loaders.errors import ConversionError

ALGEBRAS = [name for name, case in CASES.items() if not case.kernel and name not in ("modulation", "sparse")]
SIZED = [name for name in ALGEBRAS if -1 not in (CASES[name].build().shape or ())]
"""Those beside which a file can have a sparse remainder."""
MAGNITUDES = {"": None, "dora": (ROWS, 1), "flat dora": (ROWS,), "dora per input": (1, COLUMNS)}
REMAINDER = {
    "bias_indices": torch.tensor([[0, 7], [9, 0]]),
    "bias_values": randn(2),
    "bias_size": torch.tensor([ROWS, COLUMNS]),
}
WRAPPERS = tuple(product(MAGNITUDES, (False, True)))
PARTS = [(name, *wrapper) for name in ALGEBRAS for wrapper in WRAPPERS if name in SIZED or not wrapper[1]]


@cache
def part(name: str, dora: str, sparse: bool) -> tuple[Delta, Tensor, Tensor]:
    """A delta, its base weight and its ΔW in closed form."""
    case, shape = CASES[name], MAGNITUDES[dora]
    extra: dict[str, Tensor] = {}
    change = case.expected()
    if sparse:
        extra |= REMAINDER
        change = change.index_put(tuple(REMAINDER["bias_indices"]), REMAINDER["bias_values"], accumulate=True)
    if shape is not None:
        extra["magnitude"] = randn(*shape).abs()
        direction = case.base + change
        axis = 0 if shape[0] == 1 else 1
        change = extra["magnitude"].view(-1, 1) if axis else extra["magnitude"]
        change = change * direction / direction.square().sum(axis, keepdim=True).sqrt() - case.base
    return case.build(**extra), case.base, change


@pytest.mark.parametrize("first", PARTS, ids=lambda first: " ".join(map(str, first)))
def test_two_parts_join_exactly_or_are_refused(first: tuple[str, str, bool]) -> None:
    joined = 0
    for second in PARTS:
        (one, above, change), (other, below, difference) = part(*first), part(*second)
        try:
            whole = join_all([one, other])
        except ConversionError:
            continue
        joined += 1
        found = whole.delta_weight(torch.cat([above, below]))
        torch.testing.assert_close(found, torch.cat([change, difference]), rtol=1e-9, atol=1e-9)
    # With itself at least, a per-input magnitude being one of all rows.
    assert (joined > 0) == (first[1] != "dora per input"), joined


def test_parts_of_several_algebras_are_named_however_deep_they_lie() -> None:
    magnitude = randn(ROWS, 1).abs()
    parts = [CASES[name].build(magnitude=magnitude, **REMAINDER) for name in ("lora", "loha", "lora")]
    with pytest.raises(ConversionError, match=r"different algebras \(loha, lora\)"):
        join_all(parts)
