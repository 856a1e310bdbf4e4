"""`add_weighted_adapter` beside PEFT's own, on the same adapters."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_loaders as ll

WEIGHTS = [0.7, -0.4]
# PEFT draws its random numbers elsewhere; what they do is tested with the arithmetic.
COMBINATIONS = ["svd", "cat", "linear", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8))


def factors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0": (12, 20), "2": (20, 8)}
    return {
        f"{path}.{name}.weight": torch.randn(shape, generator=generator)
        for path, (inputs, outputs) in shapes.items()
        for name, shape in (("lora_A", (4, inputs)), ("lora_B", (outputs, 4)))
    }


def ours() -> Any:
    made = ll.attach(model())
    for name, seed in (("one", 1), ("two", 2)):
        tensors = {f"transformer.{key}": tensor for key, tensor in factors(seed).items()}
        alphas = {f"transformer.{path}.alpha": torch.tensor(2.0) for path in ("0", "2")}
        made.load_lora_adapter({**tensors, **alphas}, adapter_name=name)
    return made


@pytest.mark.parity
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_way_gives_what_pefts_gives(combination: str) -> None:
    peft = pytest.importorskip("peft", reason="compares with peft")
    theirs = peft.get_peft_model(model(), peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0", "2"]), "one")
    theirs.add_adapter("two", peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0", "2"]))
    for name, seed in (("one", 1), ("two", 2)):
        own = {f"base_model.model.{key}": tensor for key, tensor in factors(seed).items()}
        peft.set_peft_model_state_dict(theirs, own, adapter_name=name)
    settings = {} if combination in ("svd", "cat", "linear") else {"density": 0.5}
    made = ours()
    for each in (theirs, made):
        each.add_weighted_adapter(["one", "two"], WEIGHTS, "both", combination_type=combination, **settings)
    theirs.set_adapter("both")
    made.set_adapters("both")
    x = torch.randn(3, 12)
    torch.testing.assert_close(made(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_cat_is_the_exact_sum_and_the_active_adapters_stay() -> None:
    made, plain = ours(), model()
    made.set_adapters("one")
    x = torch.randn(3, 12)
    before = made(x)
    made.add_weighted_adapter(["one", "two"], WEIGHTS, "both", combination_type="cat")
    assert made.active_adapters() == ["one"]
    torch.testing.assert_close(made(x), before)
    made.set_adapters("both")
    with torch.no_grad():
        for path in ("0", "2"):
            base = plain.get_parameter(f"{path}.weight")
            for seed, weight in zip((1, 2), WEIGHTS, strict=True):
                own = factors(seed)
                base += weight * 2 / 4 * own[f"{path}.lora_B.weight"] @ own[f"{path}.lora_A.weight"]
    torch.testing.assert_close(made(x), plain(x), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_combined_is_refused_and_changes_nothing() -> None:
    made = ours()
    with pytest.raises(ll.AdapterStateError, match="already exists"):
        made.add_weighted_adapter(["one", "two"], WEIGHTS, "one")
    with pytest.raises(ll.ConversionError, match="no combination 'sum'"):
        made.add_weighted_adapter(["one", "two"], WEIGHTS, "both", "sum")
    with pytest.raises(ll.ConversionError, match="give density"):
        made.add_weighted_adapter(["one", "two"], WEIGHTS, "both", "ties")
    with pytest.raises(ll.AdapterStateError):
        made.add_weighted_adapter(["one", "three"], WEIGHTS, "both")
    with pytest.raises(ll.AdapterStateError, match="length of the weights 1"):
        made.add_weighted_adapter(["one", "two"], [1.0], "both")
    with pytest.raises(ll.AdapterStateError, match="function"):
        made.add_weighted_adapter(["one"], [lambda progress: progress], "both")
    assert [name for name in ("one", "two", "both") if name in made.peft_config] == ["one", "two"]
