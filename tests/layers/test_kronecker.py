"""Whole LoKr factors run through two small products, ΔW unbuilt; other changes in full keep to a memory budget."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_loaders import fusing
from lora_loaders.adapter import Adapter
from lora_loaders.attaching import apply
from lora_loaders.deltas import Delta, LokrDelta, build
from lora_loaders.layers import slots
from lora_loaders.layers.slots import refresh
from lora_loaders.plans import plan_adapter

BASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 30), (2, 3, 12)),
    "conv1d": (lambda: nn.Conv1d(12, 30, 3, stride=2, padding=1), (2, 12, 9)),
    "conv2d": (lambda: nn.Conv2d(12, 30, 3, padding=1, padding_mode="circular", dilation=2), (2, 12, 8, 8)),
    "conv2d without a batch": (lambda: nn.Conv2d(12, 30, 3), (12, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(12, 30, (1, 3, 3)), (2, 12, 2, 5, 5)),
}
KERNELS = {
    "embedding": (),
    "linear": (),
    "conv1d": (3,),
    "conv2d": (3, 3),
    "conv2d without a batch": (3, 3),
    "conv3d": (1, 3, 3),
}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def lokr(kernel: tuple[int, ...], p: int = 5, q: int = 4) -> Delta:
    return build({"lokr_w1": randn(p, q), "lokr_w2": randn(30 // p, 12 // q, *kernel)}, None)


def attached(base: nn.Module, deltas: Sequence[Delta]) -> Any:
    model = nn.ModuleDict({"it": base})
    for number, delta in enumerate(deltas):
        apply(plan_adapter({"m": model}, Adapter({"m": {"it": delta}})), f"a{number}")
    return model["it"]


def run(layer: Any, weights: dict[str, float]) -> None:
    layer.activate(tuple(weights))
    layer.reweigh(weights)
    refresh([layer])


def with_changes(base: Any, x: Tensor, terms: Sequence[tuple[Delta, float]]) -> Tensor:
    """The base layer's output with Σ weight · ΔW added to its weight."""
    plain = base.weight.detach().clone()
    total = sum((delta.delta_weight(plain).view(plain.shape) * weight for delta, weight in terms), plain)
    return torch.func.functional_call(base, {"weight": total}, (x,))


@pytest.mark.parametrize("name", BASES)
def test_whole_factors_run_without_their_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    (make, shape), kernel = BASES[name], KERNELS[name]
    base, x = make().double(), randn(*shape)
    deltas = [lokr(kernel), lokr(kernel), lokr(kernel, 3, 2)]
    wanted = [
        with_changes(base, x, [(deltas[0], 0.7)]),
        with_changes(base, x, [(deltas[0], -0.5), (deltas[1], 2.0)]),
        with_changes(base, x, list(zip(deltas, (1.0, 0.3, -1.1), strict=True))),
    ]
    layer = attached(base, deltas)
    with torch.no_grad():
        run(layer, {"a0": 1.0, "a1": 0.3, "a2": -1.1})
        torch.testing.assert_close(layer(x), wanted[2])
        monkeypatch.setattr(LokrDelta, "delta_weight", None)  # one shape needs it no more
        run(layer, {"a0": -0.5, "a1": 2.0})
        assert layer.slot_dense is None
        torch.testing.assert_close(layer(x), wanted[1])
        first = layer.slot_first
        run(layer, {"a1": 2.0, "a0": -0.5})
        assert layer.slot_first is first  # compiled code has seen it
        torch.testing.assert_close(layer(x), wanted[1])
        run(layer, {"a0": 0.7})
        torch.testing.assert_close(layer(x), wanted[0])
        run(layer, {})
        assert layer.slot_first is None


def test_an_embedding_reads_its_rows_from_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base, x, deltas = nn.Embedding(30, 12).double(), torch.randint(0, 30, (2, 7)), [lokr(()), lokr(())]
    wanted = with_changes(base, x, [(deltas[0], 0.7), (deltas[1], -2.0)])
    layer = attached(base, deltas)
    monkeypatch.setattr(LokrDelta, "delta_weight", None)
    with torch.no_grad():
        run(layer, {"a0": 0.7, "a1": -2.0})
        torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", [*BASES, "embedding"])
def test_rows_that_are_cut_inside_blocks_run_through_the_blocks_that_they_touch(
    name: str, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 7 to 37 of 50 in blocks of 10, as a part of a fused projection is."""
    torch.manual_seed(0)
    kernel = KERNELS[name]
    if name == "embedding":
        base, x = nn.Embedding(30, 12).double(), torch.randint(0, 30, (2, 7))
    else:
        make, shape = BASES[name]
        base, x = make().double(), randn(*shape)
    inners = [{"lokr_w1": randn(5, 4), "lokr_w2": randn(10, 3, *kernel)} for _ in range(2)]
    parts = [build(slots, None).split([7, 30, 13])[1] for slots in inners]
    others = [lokr(kernel), build(inners[0], None).split([20, 30])[1]]
    weight: Any = base.weight.detach()
    total = weight.clone()
    for factors, factor in zip(inners, (0.7, -2.0), strict=True):
        second = factors["lokr_w2"].reshape(10, 3, -1)
        whole = torch.stack(
            [torch.kron(factors["lokr_w1"], second[:, :, k].contiguous()) for k in range(second[0, 0].numel())], 2
        )
        total += factor * whole.reshape(50, *weight.shape[1:])[7:37]
    wanted = torch.func.functional_call(base, {"weight": total}, (x,))
    mixed = with_changes(base, x, [(parts[0], 1.0), (others[0], -1.0), (others[1], 0.5)])
    layer = attached(base, [*parts, *others])
    run(layer, {"a0": 1.0, "a2": -1.0, "a3": 0.5})
    torch.testing.assert_close(layer(x), mixed)
    monkeypatch.setattr(LokrDelta, "delta_weight", None)
    monkeypatch.setattr(LokrDelta, "weight_rows", None)
    for parameter in layer.parameters_of("a0"):
        parameter.requires_grad_(trained)
    run(layer, {"a0": 0.7, "a1": -2.0})
    torch.testing.assert_close(layer(x), wanted)


def test_factors_that_are_trained_get_the_gradients_of_the_product() -> None:
    torch.manual_seed(0)
    base, x, delta = nn.Linear(12, 30).double(), randn(4, 12), lokr(())
    layer = attached(base, [delta])
    for parameter in layer.parameters_of("a0"):
        parameter.requires_grad_(True)
    refresh([layer])
    layer(x).square().sum().backward()
    w1, w2 = (delta.tensors()[name].clone().requires_grad_(True) for name in ("lokr_w1", "lokr_w2"))
    nn.functional.linear(x, base.weight.detach() + torch.kron(w1, w2), base.bias.detach()).square().sum().backward()
    for parameter, own in zip(layer.parameters_of("a0"), (w1, w2), strict=True):
        torch.testing.assert_close(parameter.grad, own.grad)


def test_a_grouped_convolution_and_a_fused_adapter_are_exact_too() -> None:
    torch.manual_seed(0)
    grouped, x = nn.Conv2d(24, 30, 3, groups=2).double(), randn(2, 24, 6, 6)
    delta = lokr((3, 3))
    wanted = with_changes(grouped, x, [(delta, 1.0)])
    torch.testing.assert_close(attached(grouped, [delta])(x), wanted)
    base, x = nn.Linear(12, 30).double(), randn(4, 12)
    deltas = [lokr(()), lokr(())]
    wanted = with_changes(base, x, [(deltas[0], 1.0), (deltas[1], 1.0)])
    layer = attached(base, deltas)
    run(layer, {"a0": 1.0, "a1": 1.0})
    fusing.fuse(nn.ModuleDict({"it": layer}), ["a0"])
    torch.testing.assert_close(layer(x), wanted)


def test_a_change_in_full_is_computed_in_the_forward_where_the_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(12, 30).double(), randn(4, 12)
    turned = build({"oft_blocks": randn(5, 6, 6) * 0.2}, None)
    loha = build({f"hada_w{n}_{s}": randn(*((30, 8) if s == "a" else (8, 12))) for n in (1, 2) for s in "ab"}, 1.0)
    wanted = with_changes(base, x, [(turned, 0.5), (loha, 2.0)])
    layer = attached(base, [turned, loha])
    run(layer, {})
    monkeypatch.setattr(slots, "memory_of", lambda device: (100 + 30 * 12 * 8 - 1, 1000))
    with torch.no_grad():
        run(layer, {"a0": 0.5, "a1": 2.0})
        assert layer.slot_dense is None
        torch.testing.assert_close(layer(x), wanted)
        monkeypatch.setattr(slots, "memory_of", lambda device: (100 + 30 * 12 * 8, 1000))
        run(layer, {"a0": 0.5, "a1": 2.0})
        assert layer.slot_dense is not None
        torch.testing.assert_close(layer(x), wanted)
        run(layer, {})
        torch.testing.assert_close(layer(x), base(x))
