"""Merging against Σ w·ΔW in float64 and against PEFT's own arithmetic."""

import pytest
import torch
from deltas.delta_cases import CASES, randn
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.combining.arithmetic import METHODS, Method, combine
from lora_loaders.deltas import Delta, DoraDelta, FullDelta, LohaDelta, LoraDelta

PRUNING = [method for method in METHODS if method != "linear"]


def adapter(delta: Delta, path: str = "a") -> ll.Adapter:
    return ll.Adapter({"transformer": {path: delta}})


def lora(rank: int, alpha: float | None = None, **extra: Tensor) -> LoraDelta:
    return LoraDelta(up=randn(12, rank), down=randn(rank, 9), alpha=alpha, **extra)


def only(done: ll.Approximation) -> Delta:
    return done.adapter.deltas["transformer"]["a"]


def test_linear_is_the_exact_weighted_sum_of_any_ranks_and_scalings() -> None:
    one, other = lora(3, alpha=1.0), LoraDelta(up=randn(12, 4), down=randn(4, 9), alpha=8.0, rslora=True)
    done = ll.merge([adapter(one), adapter(other)], [0.7, -0.3])
    wanted = 0.7 / 3 * one.up @ one.down - 0.3 * 8 / 2 * other.up @ other.down
    made = only(done)
    assert made.rank == 7
    torch.testing.assert_close(made.delta_weight(), wanted)
    assert done.error < 1e-7


def test_a_goal_gives_the_best_adapter_of_that_rank() -> None:
    one, other = lora(3), lora(4)
    done = ll.merge([adapter(one), adapter(other)], [0.7, -0.3], rank=2)
    wanted = 0.7 * one.up @ one.down - 0.3 * other.up @ other.down
    sigma = torch.linalg.svdvals(wanted)
    error = (only(done).delta_weight() - wanted).norm() / wanted.norm()
    assert float(error) == pytest.approx(float(sigma[2:].norm() / sigma.norm()), rel=1e-6)
    assert done.error == pytest.approx(float(error), rel=1e-6)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.build().shape is not None and n != "modulation"])
def test_any_algebra_is_added_to_a_lora(name: str) -> None:
    case = CASES[name]
    columns = case.base[0].numel()
    other = LoraDelta(up=randn(24, 2), down=randn(2, columns).view(2, *case.base.shape[1:]))
    model = nn.ModuleDict({"a": nn.Identity()})
    model["a"].weight = nn.Parameter(case.base)  # type: ignore[assignment]
    done = ll.merge([adapter(case.build()), adapter(other)], [2.0, 0.5], model=model)
    wanted = 2 * case.expected() + 0.5 * (other.up @ other.down.flatten(1)).view(case.base.shape)
    torch.testing.assert_close(only(done).delta_weight().view(wanted.shape), wanted, rtol=1e-7, atol=1e-8)


def test_biases_are_added_with_their_scalings() -> None:
    one, other = lora(2, alpha=1.0, up_bias=randn(12)), lora(2, bias=randn(12))
    made = only(ll.merge([adapter(one), adapter(other)], [2.0, 3.0]))
    torch.testing.assert_close(made.delta_bias(), 2 * 0.5 * one.up_bias + 3 * other.bias)  # type: ignore[operator]
    own = only(ll.merge([adapter(one), adapter(one)], [2.0, 1.0]))
    assert own.bias is None  # PEFT's word for it stays, which PEFT and diffusers can read
    torch.testing.assert_close(own.delta_bias(), 3 * 0.5 * one.up_bias)  # type: ignore[operator]


def test_a_module_of_one_adapter_stays_in_its_algebra() -> None:
    loha = LohaDelta(hada_w1_a=randn(12, 2), hada_w1_b=randn(2, 9), hada_w2_a=randn(12, 2), hada_w2_b=randn(2, 9))
    done = ll.merge([adapter(loha, "b"), adapter(lora(2))])
    assert isinstance(done.adapter.deltas["transformer"]["b"], LohaDelta)
    torch.testing.assert_close(done.adapter.deltas["transformer"]["b"].delta_weight(), loha.delta_weight())


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_flattened_kernel_takes_the_others_shape_in_any_order(reverse: bool, method: Method) -> None:
    flat, whole = CASES["loha conv"], CASES["lora conv"]
    parts = [adapter(case.build(), "conv1") for case in (flat, whole)][:: -1 if reverse else 1]
    made = ll.merge(parts, method=method, density=1.0, rank=24).adapter.deltas["transformer"]["conv1"]
    assert made.shape == (24, 10, 3, 3)
    changes = [case.expected() for case in (flat, whole)]
    torch.testing.assert_close(made.delta_weight(), combine(changes, [1, 1], method), rtol=1e-6, atol=1e-9)


def test_a_kernel_that_no_file_tells_asks_for_the_model() -> None:
    flat = adapter(CASES["loha conv"].build(), "conv1")
    with pytest.raises(ll.ConversionError, match="base model's weights"):
        ll.merge([flat, flat])
    model = nn.ModuleDict({"conv1": nn.Conv2d(10, 24, 3)})
    made = ll.merge([flat, flat], model=model).adapter.deltas["transformer"]["conv1"]
    assert made.shape == (24, 10, 3, 3)
    torch.testing.assert_close(made.delta_weight(), 2 * CASES["loha conv"].expected())


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "full"])
def test_the_rounding_of_a_module_of_one_adapter_is_told(name: str) -> None:
    case = CASES[name]
    done = ll.merge([adapter(case.build(), "b"), adapter(lora(2))], dtype=torch.bfloat16)
    fit = done.fits["transformer.b"]
    lost = done.adapter.deltas["transformer"]["b"].delta_weight().double() - case.expected()
    assert fit.norm == pytest.approx(float(case.expected().norm()), rel=1e-6)
    assert fit.error == pytest.approx(float(lost.norm() / case.expected().norm()), rel=1e-3)
    assert fit.error > 1e-4


def test_pruning_keeps_all_of_the_energy_where_that_is_asked_for() -> None:
    one, other = lora(2), lora(3)
    done = ll.merge([adapter(one), adapter(other)], method="ties", energy=1.0, dtype=torch.float64)
    assert done.error < 1e-6


def test_full_differences_stay_full_and_vectors_are_added() -> None:
    matrices, vectors = [randn(12, 9), randn(12, 9)], [randn(12), randn(12)]
    made = only(ll.merge([adapter(FullDelta(diff=m)) for m in matrices], [1, 2]))
    torch.testing.assert_close(made.delta_weight(), matrices[0] + 2 * matrices[1])
    made = only(ll.merge([adapter(FullDelta(diff=v, norm=True)) for v in vectors], [1, 2]))
    torch.testing.assert_close(made.delta_weight(), vectors[0] + 2 * vectors[1])


@pytest.mark.parametrize("method", PRUNING)
def test_pruning_methods_work_on_the_change_itself(method: Method) -> None:
    one, other = lora(2), lora(3)
    changes = [one.up @ one.down, other.up @ other.down]
    done = ll.merge([adapter(one), adapter(other)], [0.5, 2.0], method=method, density=0.4, rank=9, seed=5)
    generator = torch.Generator().manual_seed(5)
    wanted = combine(changes, [0.5, 2.0], method, density=0.4, generator=generator)
    torch.testing.assert_close(only(done).delta_weight(), wanted, rtol=1e-6, atol=1e-9)
    assert only(ll.merge([adapter(one), adapter(other)], method=method)).rank == 3


@pytest.mark.parity
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("method", METHODS)
def test_the_arithmetic_is_pefts(method: Method, majority: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft.utils.merge_utils", reason="compares with peft")
    changes, weights = [randn(12, 9) for _ in range(3)], [0.5, -1.0, 2.0]
    settings = {"majority_sign_method": majority} if method.endswith("ties") else {}
    if method != "linear":
        settings["density"] = 0.3
    theirs = peft.task_arithmetic if method == "linear" else getattr(peft, method)
    if method.startswith("dare"):  # whose random numbers differ: the same entries are kept in both by zeros and ones
        keep = [torch.rand(12, 9).double() < 0.3 for _ in changes]
        monkeypatch.setattr(peft, "random_pruning", lambda t, d, rescale: t)
        changes = [change * mask / 0.3 for change, mask in zip(changes, keep, strict=True)]
        ours = combine(changes, weights, "ties" if method.endswith("ties") else "linear", majority=majority)  # type: ignore[arg-type]
    else:
        ours = combine(changes, weights, method, density=0.3, majority=majority)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs(changes, torch.tensor(weights), **settings))


def test_random_pruning_keeps_the_expected_sum() -> None:
    change = torch.ones(400, 400)
    made = combine([change], [1.0], "dare_linear", density=0.25, generator=torch.Generator().manual_seed(0))
    assert set(made.unique().tolist()) == {0.0, 4.0}
    assert float(made.mean()) == pytest.approx(1, abs=0.02)


def test_what_does_not_go_together_is_refused() -> None:
    one = ll.Adapter({"unet": {}}, family="sdxl")
    with pytest.raises(ll.ConversionError, match="several families: flux1, sdxl"):
        ll.merge([one, ll.Adapter({}, family="flux1")])
    with pytest.raises(ll.ConversionError, match="1 weights for 2 adapters"):
        ll.merge([one, one], [1.0])
    with pytest.raises(ll.ConversionError, match="no method 'sum'"):
        ll.merge([one, one], method="sum")  # type: ignore[arg-type]
    with pytest.raises(ll.ConversionError, match="density=2"):
        ll.merge([one, one], method="ties", density=2)
    other = LoraDelta(up=randn(10, 2), down=randn(2, 9))
    with pytest.raises(ll.ConversionError, match="modules that cannot be merged") as refused:
        ll.merge([adapter(lora(2)), adapter(other)])
    assert "transformer.a: changes of the shapes" in refused.value.problems[0]
    dora = DoraDelta(inner=lora(2), magnitude=randn(12, 1))
    with pytest.raises(ll.ConversionError, match="base model's weights"):
        ll.merge([adapter(lora(2)), adapter(dora)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_exact_merge_of_one_scale_loses_nothing_in_low_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    one = LoraDelta(
        up=(torch.randn(64, 128) * 0.005).to(dtype), down=(torch.randn(128, 64) * 0.02).to(dtype), alpha=1.0
    )
    done = ll.merge([adapter(one), adapter(one)], [0.1, 0.1])
    assert done.error < 1e-6
    torch.testing.assert_close(only(done).delta_weight(), 0.2 * one.delta_weight())
