"""Every family in every spelling that can say it: written, read again, the same change of every module."""

import pytest
import torch

from lora_loaders.adapter import Adapter
from lora_loaders.conversion import parse
from lora_loaders.deltas import LoraDelta
from lora_loaders.families import FAMILIES, Family
from lora_loaders.families.rules import HOLE
from lora_loaders.files import Contents
from lora_loaders.writing import to_tensors

UNIT, RANK = 4, 2
SPELLINGS = ("diffusers", "kohya", "original", "omi", "onetrainer")


def denoiser_of(family: Family) -> Adapter:
    """A LoRA on each module of the first blocks, rows in the proportions of the family's fused modules."""
    names = family.components[family.denoiser]
    raw = {path for rule in names.rules if rule.parameter or rule.last_only for path in rule.targets}
    raw |= {"blocks.{i}.norm3"} & set(
        names.absent
    )  # Wan's, which has no weights: its name is the original's second norm
    shares = {path: n for rule in names.rules for path, n in zip(rule.targets, rule.shares, strict=True) if n > 1}
    generator = torch.Generator().manual_seed(0)
    deltas: dict[str, LoraDelta] = {}
    for template in names.modules:
        if template not in raw:
            rows = 2 * UNIT * shares.get(template, 1)
            up, down = (torch.randn(size, generator=generator) for size in ((rows, RANK), (RANK, UNIT)))
            deltas[HOLE.sub("0", template)] = LoraDelta(up=up, down=down, alpha=3.0)
    return Adapter({family.denoiser: deltas}, family=family.name)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.name != "wan"], ids=lambda family: family.name
)
def test_what_is_written_is_read_as_the_same_change(family: Family, spelling: str) -> None:
    adapter = denoiser_of(family)
    if spelling == "omi" and "omi" not in {rule.dialect for rule in family.components[family.denoiser].rules}:
        pytest.skip("none of its modules is fused, so OMI has no names of its own for it")
    tensors, metadata, _ = to_tensors(adapter, spelling)
    again = parse(Contents(tensors, metadata), family.name)
    assert not again.unresolved
    found = again.deltas[family.denoiser]
    assert found.keys() == adapter.deltas[family.denoiser].keys()
    for path, delta in adapter.deltas[family.denoiser].items():
        torch.testing.assert_close(found[path].delta_weight(), delta.delta_weight(), rtol=0, atol=1e-6, msg=path)
