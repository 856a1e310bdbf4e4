"""For every LoRA mixin of diffusers a tiny pipeline goes all the way: load, switch, fuse, unfuse, save, reload."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers.loaders.lora_pipeline as lora_pipeline
import pytest
import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from every_pipeline import CASES, READY, build, linears, made, run
from tiny_models import bits, changed_bits
from torch import Tensor

import lora_loaders as ll
from lora_loaders.mixins.components import components_of

MIXINS = [
    name
    for name, value in vars(lora_pipeline).items()
    if inspect.isclass(value) and issubclass(value, LoraBaseMixin) and value is not LoraBaseMixin
]


def test_every_mixin_of_the_installed_diffusers_has_a_pipeline_here() -> None:
    assert len(MIXINS) > 30
    assert sorted(MIXINS) == sorted([*CASES, *READY])
    ours = [name for name in ll.__all__ if name.endswith("LoraLoaderMixin") or name == "LoraLoaderMixin"]
    assert sorted(ours) == sorted(MIXINS)


@pytest.mark.parametrize("mixin", MIXINS)
def test_a_pipeline_is_of_its_mixin(mixin: str) -> None:
    assert mixin in {cls.__name__ for cls in type(build(mixin)).__mro__}


def merged(mixin: str, weights: Mapping[float, Mapping[str, Tensor]]) -> Tensor:
    """The oracle: what a plain pipeline gives whose weights hold the changes."""
    pipe = build(mixin)
    for component, modules in linears(pipe).items():
        for path, module in modules.items():
            for weight, file in weights.items():
                down, up = (file[f"{component}.{path}.lora_{side}.weight"].double() for side in "AB")
                module.weight.data += (weight * up @ down).float()
    return run(mixin, pipe)


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("mixin", MIXINS)
def test_a_tiny_pipeline_loads_switches_fuses_unfuses_saves_and_reloads(mixin: str, tmp_path: Path) -> None:
    pipe: Any = ll.attach(build(mixin))
    plain = run(mixin, pipe)
    assert plain.isfinite().all()
    adapted = linears(pipe)
    one, two = made(pipe, 1), made(pipe, 2)
    pipe.load_lora_weights(one, adapter_name="one")
    alone = run(mixin, pipe)
    assert (alone - plain).abs().max() > 1e-3
    same(alone, merged(mixin, {1.0: one}))
    pipe.load_lora_weights(two, adapter_name="two")
    assert pipe.get_list_adapters() == {name: ["one", "two"] for name, modules in adapted.items() if modules}

    pipe.set_adapters(["one", "two"], 0.0)
    same(run(mixin, pipe), plain)
    pipe.set_adapters(["one", "two"], [0.5, -1.0])
    both = run(mixin, pipe)
    same(both, merged(mixin, {0.5: one, -1.0: two}))
    assert (both - alone).abs().max() > 1e-3

    before = {name: bits(model) for name, model in components_of(pipe).items()}
    pipe.fuse_lora()
    same(run(mixin, pipe), both)
    pipe.unfuse_lora()
    assert [key for name, model in components_of(pipe).items() for key in changed_bits(before[name], model)] == []
    assert torch.equal(run(mixin, pipe), both)

    path = pipe.save_lora_weights(tmp_path, adapter_name="one")
    pipe.unload_lora_weights()
    assert torch.equal(run(mixin, pipe), plain)
    pipe.load_lora_weights(tmp_path, weight_name=Path(path).name, adapter_name="again")
    assert torch.equal(run(mixin, pipe), alone)
