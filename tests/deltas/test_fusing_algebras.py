"""Fusing any algebra into any kind of layer in any dtype, and back: every bit returns."""

from typing import Any

import pytest
import torch
from delta_cases import CASES, COLUMNS, ROWS, randn
from torch import Tensor, nn

from lora_loaders import fusing
from lora_loaders.adapter import Adapter
from lora_loaders.attaching import apply
from lora_loaders.deltas import Delta, build
from lora_loaders.plans import plan_adapter

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
AWKWARD = [0.0, -0.0, 1e-7, -6e-5, 300.0]
MAGNITUDES = {"": None, " under DoRA": (ROWS, 1), " under DoRA per input": (1, COLUMNS)}


def layers_for(kernel: tuple[int, ...]) -> dict[str, nn.Module]:
    if not kernel:
        return {"linear": nn.Linear(COLUMNS, ROWS), "embedding": nn.Embedding(ROWS, COLUMNS)}
    return {
        "conv2d": nn.Conv2d(COLUMNS, ROWS, kernel, padding_mode="circular", padding=1),
        "grouped": nn.Conv2d(COLUMNS * 2, ROWS, kernel, groups=2, dilation=2),
    }


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8).clone()


def attached(base: nn.Module, delta: Delta) -> Any:
    model = nn.ModuleDict({"it": base})
    plan = plan_adapter({"m": model}, Adapter({"m": {"it": delta}}))
    assert not plan.problems
    apply(plan, "x")
    return model["it"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrapped", MAGNITUDES)
@pytest.mark.parametrize("name", CASES)
def test_unfusing_restores_every_bit_and_fusing_adds_the_change(name: str, wrapped: str, dtype: torch.dtype) -> None:
    case, shape = CASES[name], MAGNITUDES[wrapped]
    torch.manual_seed(11)
    extra = {} if shape is None else {"magnitude": randn(*shape, *[1] * len(case.kernel)).abs() + 1}
    for base in layers_for(case.kernel).values():
        base = base.to(dtype).requires_grad_(False)
        weight: Any = base.weight
        weight.view(-1)[: len(AWKWARD)] = torch.tensor(AWKWARD, dtype=dtype)
        before = {key: bits(tensor) for key, tensor in base.state_dict().items()}
        layer = attached(base, build({**case.slots, **extra}, case.alpha).map_tensors(lambda t: t.to(dtype)))
        plain, delta = weight.double().clone(), layer.delta("x")
        fusing.fuse(nn.ModuleDict({"it": layer}), ["x"], lora_scale=0.7)
        wanted = plain + 0.7 * delta.delta_weight(plain.to(dtype)).double().view(plain.shape)
        scale = max(1.0, wanted.abs().max().item(), plain.abs().max().item())
        assert (weight.double() - wanted).abs().max().item() <= 4 * torch.finfo(dtype).eps * scale
        assert not torch.equal(bits(weight), before["weight"])
        fusing.unfuse(nn.ModuleDict({"it": layer}))
        after = {key: bits(tensor) for key, tensor in layer.base_layer.state_dict().items()}
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)


TRAINED = ["loha", "loha tucker", "lokr", "lokr both", "lokr tucker", "glora", "oft", "input oft", "input boft"]


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("wrapped", ["", " under DoRA"])
def test_gradients_of_every_parameter_are_those_of_finite_differences(name: str, wrapped: str) -> None:
    """Later training stands on this; DoRA's norm is a constant for the gradient, so only its magnitude is tried."""
    case = CASES[name]
    torch.manual_seed(2)
    magnitude = {"magnitude": randn(ROWS, *[1] * (1 + len(case.kernel))).abs() + 1} if wrapped else {}
    delta = case.build(**magnitude)
    tensors = {slot: t.clone().requires_grad_() for slot, t in delta.tensors().items() if t.is_floating_point()}
    if wrapped:
        tensors = {"magnitude": tensors["magnitude"]}
    names = list(tensors)

    def change(*values: Tensor) -> Tensor:
        own = {**delta.tensors(), **dict(zip(names, values, strict=True))}
        return delta.with_tensors(own).delta_weight(case.base).flatten()[::7]

    assert torch.autograd.gradcheck(change, tuple(tensors.values()), fast_mode=True)
