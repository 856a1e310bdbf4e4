import pytest
import torch
from delta_cases import CASES, randn

from lora_loaders.deltas import GloraDelta, build
from lora_loaders.errors import MalformedAdapterError


def test_generations_are_told_apart_by_shape() -> None:
    new, old = CASES["glora"].build(), CASES["glora old"].build()
    assert isinstance(new, GloraDelta)
    assert isinstance(old, GloraDelta)
    assert (new.is_old, old.is_old) == (False, True)
    assert new.shape == old.shape == (24, 10)


def test_an_old_square_module_is_told_by_its_rank() -> None:
    old = build({"a1": randn(2, 6), "a2": randn(6, 2), "b1": randn(2, 6), "b2": randn(6, 2)}, None)
    assert isinstance(old, GloraDelta)
    assert old.is_old


def test_parts_share_all_but_b1() -> None:
    delta = CASES["glora"].build()
    parts = delta.split([8, 16])
    assert all(part.tensors()["a1"] is delta.tensors()["a1"] for part in parts)
    assert [part.tensors()["b1"].shape[0] for part in parts] == [8, 16]


def test_factors_that_do_not_multiply_are_malformed() -> None:
    with pytest.raises(MalformedAdapterError, match="do not multiply"):
        build({**CASES["glora"].slots, "b2": randn(3, 10)}, None)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_equals_lycoris(kind: str) -> None:
    modules = pytest.importorskip("lycoris.modules.glora")
    base = torch.nn.Linear(16, 32) if kind == "linear" else torch.nn.Conv2d(16, 32, 3)
    theirs = modules.GLoRAModule("m", base, lora_dim=4, alpha=2.0)
    with torch.no_grad():
        for name in ("a1", "a2", "b1", "b2"):
            getattr(theirs, name).weight.normal_()
        state = theirs.custom_state_dict()
        slots = {n.removesuffix(".weight"): t.detach() for n, t in state.items() if n != "alpha"}
        ours = build(slots, float(theirs.alpha)).delta_weight(base.weight)
        torch.testing.assert_close(ours, theirs.get_diff_weight()[0], rtol=1e-4, atol=1e-4)
