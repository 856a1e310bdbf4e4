"""Resizing against torch.linalg.svd in float64: the optimum is reached, and the stated error is the true one."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deltas.delta_cases import CASES, randn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.adapter import Adapter
from lora_loaders.combining.approximating import Approximation, as_full, as_lokr, as_lora
from lora_loaders.combining.goals import Goal
from lora_loaders.combining.truncating import of_matrix, of_product
from lora_loaders.deltas import DoraDelta, ExpertsDelta, FullDelta, LokrDelta, LoraDelta, SetDelta, build
from lora_loaders.errors import ConversionError
from lora_loaders.lazy import FileTensor

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
MATRICES = [name for name, case in CASES.items() if case.build().shape is not None and name != "modulation"]

LOW_RANK = [name for name in MATRICES if not CASES[name].build().needs_base and CASES[name].build().factors()]


def best_error(change: Tensor, rank: int) -> float:
    """Eckart and Young: the root of the squared singular values that are left out, relative to all."""
    sigma = torch.linalg.svdvals(change.double().flatten(1))
    return float(sigma[rank:].norm() / sigma.norm())


def error_of(change: Tensor, made: Tensor) -> float:
    return float((made.double().reshape(change.shape) - change).norm() / change.norm())


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("rank", [1, 3])
def test_every_algebra_reaches_the_optimum_of_its_formula(name: str, rank: int) -> None:
    case = CASES[name]
    change = case.expected()
    made, fit = as_lora(case.build(), Goal(rank=rank), case.base)
    assert isinstance(made, LoraDelta)
    assert made.rank <= rank
    best = best_error(change, made.rank)
    error = error_of(change, made.delta_weight())
    assert error == pytest.approx(best, rel=1e-2, abs=1e-6)
    assert fit.error == pytest.approx(error, rel=1e-6, abs=1e-7)
    assert fit.norm == pytest.approx(float(change.norm()), rel=1e-9)


@pytest.mark.parametrize("name", MATRICES)
def test_every_algebra_in_full_is_its_formula(name: str) -> None:
    case = CASES[name]
    made, fit = as_full(case.build(), case.base)
    assert isinstance(made, FullDelta)
    torch.testing.assert_close(made.diff, case.expected().reshape(case.base.shape), rtol=1e-9, atol=1e-9)
    assert fit.error < 1e-9


@pytest.mark.parametrize("name", LOW_RANK)
def test_without_a_goal_a_low_rank_algebra_keeps_its_change(name: str) -> None:
    case = CASES[name]
    made, fit = as_lora(case.build(), Goal(), case.base)
    torch.testing.assert_close(made.delta_weight(), case.expected().reshape(made.shape or ()), rtol=1e-9, atol=1e-9)
    assert fit.error < 1e-7


@pytest.mark.parametrize("rank", [8, 99])
def test_a_lora_that_is_small_enough_is_left_alone(rank: int) -> None:
    slots = {"up": randn(16, 8, 1, 1).half(), "down": randn(8, 12, 3, 3).half()}
    delta = build(slots, 4.0)
    made, fit = as_lora(delta, Goal(rank=rank))
    assert made.alpha_value == 4.0
    assert all(torch.equal(made.tensors()[name], tensor) for name, tensor in slots.items())
    assert fit.error == 0.0


@pytest.mark.parametrize("goal", [{}, {"rank": 8}, {"rank": 99}], ids=str)
def test_a_tucker_core_is_multiplied_in_and_peft_reads_the_file(goal: dict[str, int], tmp_path: Path) -> None:
    up, mid, down = randn(16, 8), randn(8, 8, 3, 3), randn(8, 12)
    change = torch.einsum("or,rskl,si->oikl", up, mid, down) * 4 / 8
    cells = {"up": up[..., None, None], "mid": mid, "down": down[..., None, None]}
    delta = build({name: tensor.float() for name, tensor in cells.items()}, 4.0)
    done = ll.resize(ll.Adapter({"transformer": {"conv": delta}}), **goal)
    made = done.adapter.deltas["transformer"]["conv"]
    assert set(made.tensors()) == {"up", "down"}
    assert (made.rank, made.alpha_value) == (8, 4.0)
    assert error_of(change, made.delta_weight()) < 1e-6
    assert done.error < 1e-6
    peft = pytest.importorskip("peft", reason="reads the file with peft")
    ll.write_adapter(done.adapter, tmp_path, "peft")
    read = peft.PeftModel.from_pretrained(nn.ModuleDict({"conv": nn.Conv2d(12, 16, 3)}), str(tmp_path))
    layer = read.base_model.model["conv"]
    assert error_of(change, layer.get_delta_weight(layer.active_adapter[0]).detach()) < 1e-6


@pytest.mark.parametrize("goal", [Goal(), Goal(rank=8)], ids=["no goal", "its own rank"])
def test_a_lora_that_is_only_rounded_tells_the_error_of_it(goal: Goal) -> None:
    slots = {"up": randn(16, 8), "down": randn(8, 12)}
    made, fit = as_lora(build(slots, None), goal, dtype=torch.bfloat16)
    rounded = slots["up"].bfloat16().double() @ slots["down"].bfloat16().double()
    assert isinstance(made, LoraDelta)
    assert fit.error == pytest.approx(error_of(slots["up"] @ slots["down"], rounded), rel=1e-4)
    assert fit.error > 1e-4


EMBEDDED = {
    "dora": lambda: build(
        {"embedding_down": randn(4, 20), "embedding_up": randn(8, 4), "magnitude": randn(8).abs()}, 2.0
    ),
    "oft": lambda: build({"oft_embedding_R": randn(2, 6) / 4}, None),
    "loha": lambda: build(
        {f"hada_w{n}_{s}": randn(*((20, 2) if s == "a" else (2, 8))) for n in (1, 2) for s in "ab"}, 1.0
    ),
}


@pytest.mark.parametrize("kind", EMBEDDED)
def test_an_embedding_stays_one_and_peft_reads_the_file(kind: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"tokens": nn.Embedding(20, 8)})
    weight = model["tokens"].get_parameter("weight").detach()
    delta = EMBEDDED[kind]().map_tensors(lambda tensor: tensor.float())
    change = delta.delta_weight(weight).double()
    done = ll.resize(ll.Adapter({"transformer": {"tokens": delta}}), rank=8, model=model)
    ll.write_adapter(done.adapter, tmp_path, "peft")
    names = {f"base_model.model.tokens.lora_embedding_{side}" for side in "AB"}
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == names
    peft = pytest.importorskip("peft", reason="reads the file with peft")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).base_model.model["tokens"]
    assert error_of(change, (read(torch.arange(20)) - weight).detach()) < 1e-4


class Experts(nn.Module):
    """Three experts' weights in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 12, 9))

    def forward(self, x: Tensor) -> Tensor:
        """`[experts, rows, 9]` to `[experts, rows, 12]`."""
        return x @ self.weight.mT


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("goal", [{"rank": 2}, {"rank": 5}, {"rank": 2, "conv_rank": 1}, {"energy": 0.9}, {}], ids=str)
def test_stacked_experts_are_cut_each_for_itself_and_peft_reads_the_file(
    goal: dict[str, Any], transposed: bool, rslora: bool, tmp_path: Path
) -> None:
    # PEFT's layout: rows of `down` run over experts first, columns of `up` over the rank first.
    ups, downs = randn(3, 12, 4), randn(3, 4, 9)
    change = ups @ downs * -2 / (math.sqrt(4) if rslora else 4)
    delta = ExpertsDelta(
        down=downs.flatten(0, 1).float(),
        up=ups.permute(1, 2, 0).flatten(1).float(),
        experts=3,
        alpha=-2.0,
        rslora=rslora,
        transposed=transposed,
        of_parameter=True,
    )
    done = ll.resize(ll.Adapter({"transformer": {"experts.weight": delta}}), **goal)
    made = done.adapter.deltas["transformer"]["experts.weight"]
    sigma = torch.linalg.svdvals(change)
    lost = [float(sigma[:, rank:].norm() / sigma.norm()) for rank in range(5)]
    wanted = (
        next(rank for rank in range(5) if lost[rank] ** 2 <= 0.1) if goal == {"energy": 0.9} else goal.get("rank", 4)
    )
    assert isinstance(made, ExpertsDelta)
    assert made.rank == min(wanted, 4)
    assert error_of(change.mT if transposed else change, made.delta_weight()) == pytest.approx(
        lost[made.rank], abs=1e-6
    )
    assert done.error == pytest.approx(lost[made.rank], abs=1e-6)
    if transposed:
        return  # of transformers' modules alone, which say so themselves
    peft = pytest.importorskip("peft", reason="reads the file with peft")
    ll.write_adapter(done.adapter, tmp_path, "peft")
    model = nn.ModuleDict({"experts": Experts()})
    model.forward = lambda x: model["experts"](x)
    read = peft.PeftModel.from_pretrained(model, str(tmp_path))
    outputs = read(torch.eye(9).expand(3, 9, 9)).detach()
    assert error_of(change, outputs.mT) == pytest.approx(lost[made.rank], abs=1e-6)


def test_dora_is_cut_with_its_base_weight_and_refused_without() -> None:
    base, up, down = randn(12, 9), randn(12, 4), randn(4, 9)
    dora = DoraDelta(inner=LoraDelta(up=up, down=down, alpha=4.0), magnitude=randn(12, 1).abs())
    turned = base + up @ down
    change = dora.magnitude / turned.norm(dim=1, keepdim=True) * turned - base
    made, fit = as_lora(dora, Goal(rank=3), base)
    assert error_of(change, made.delta_weight()) == pytest.approx(best_error(change, 3), rel=1e-6)
    assert fit.error == pytest.approx(best_error(change, 3), rel=1e-6)
    with pytest.raises(ll.ConversionError, match="depends on the weight"):
        as_lora(dora, Goal(rank=3))


def test_rank_scaling_and_biases_of_a_lora_are_kept_as_they_are_meant() -> None:
    up_bias, bias = randn(12), randn(12)
    delta = LoraDelta(up=randn(12, 8), down=randn(8, 9), up_bias=up_bias, bias=bias, alpha=2.0, rslora=True)
    made, _ = as_lora(delta, Goal(rank=3))
    assert isinstance(made, LoraDelta)
    assert made.scaling == pytest.approx(2 / math.sqrt(8))
    assert made.rslora
    torch.testing.assert_close(made.delta_bias(), 2 / math.sqrt(8) * up_bias + bias)


@pytest.mark.parametrize(("energy", "error"), [(0.9, None), (0.5, None), (None, 0.2), (None, 0.05)])
@pytest.mark.parametrize("from_factors", [True, False])
def test_the_smallest_rank_that_keeps_the_share_is_taken(
    energy: float | None, error: float | None, from_factors: bool
) -> None:
    up, down = randn(200, 20) * torch.logspace(0, -2, 20, dtype=torch.float64), randn(20, 300)
    goal = Goal(energy=energy, error=error)
    pair = of_product(up, down, goal) if from_factors else of_matrix(up @ down, goal)
    squares = torch.linalg.svdvals(up @ down).square()
    share = energy if error is None else 1 - error**2
    wanted = int((squares.cumsum(0) / squares.sum() < share).sum()) + 1
    assert pair.up.shape[1] == wanted


@pytest.mark.parametrize("error", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize(
    "spectrum", [0.97 ** torch.arange(256), 0.8 ** torch.arange(256), torch.arange(1, 257) ** -1.5]
)
def test_a_bound_on_the_error_holds_in_float32(spectrum: Tensor, error: float) -> None:
    """Sums of squares in float32 know their total to 1e-7 alone, which is an error of 3e-4."""
    torch.manual_seed(1)
    left, right = (torch.linalg.qr(randn(256, 256)).Q for _ in range(2))
    change = ((left * spectrum) @ right).float()
    up, down = of_matrix(change, Goal(error=error))
    sigma = torch.linalg.svdvals(change.double())
    assert error_of(change.double(), up.double() @ down.double()) <= error
    assert up.shape[1] == next(r for r in range(257) if sigma[r:].norm() <= error * sigma.norm())


def test_the_rank_caps_the_share() -> None:
    assert of_product(randn(30, 10), randn(10, 30), Goal(rank=2, energy=0.999)).up.shape[1] == 2


SPECTRA = {
    "flat": lambda i: torch.ones_like(i),
    "slow": lambda i: i**-0.25,
    "harmonic": lambda i: 1 / i,
    "exponential": lambda i: torch.exp(-i / 10),
    "cliff": lambda i: torch.where(i <= 20, 1.0, 1e-3),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(320, 400), (640, 320)])
def test_a_sketch_reaches_the_optimum_within_a_hundredth(spectrum: str, shape: tuple[int, int]) -> None:
    size = min(shape)
    sigma = SPECTRA[spectrum](torch.arange(1, size + 1, dtype=torch.float64))
    left, right = (torch.linalg.qr(randn(length, size)).Q for length in shape)
    matrix = ((left * sigma) @ right.mT).float()
    pair = of_matrix(matrix, Goal(rank=24))
    error = float((matrix.double() - pair.up.double() @ pair.down.double()).norm())
    assert float(sigma[24:].norm()) * (1 - 1e-3) <= error <= float(sigma[24:].norm()) * 1.01


def test_a_kronecker_product_is_found_again() -> None:
    w1, w2 = randn(4, 3), randn(6, 5, 3, 3)
    change = torch.einsum("pq,mnij->pmqnij", w1, w2).reshape(24, 15, 3, 3)
    made, fit = as_lokr(FullDelta(diff=change), Goal(), factor=4)
    assert isinstance(made, LokrDelta)
    assert fit.error < 1e-6
    torch.testing.assert_close(made.delta_weight(), change, rtol=1e-6, atol=1e-6)


def test_a_kronecker_product_is_the_nearest_one() -> None:
    change = randn(12, 15)
    made, fit = as_lokr(FullDelta(diff=change), Goal(), factor=3)
    # Van Loan and Pitsianis: blocks as rows, and the first singular value is what one product can hold.
    blocks = torch.stack([block.flatten() for row in change.chunk(3) for block in row.chunk(3, 1)])
    sigma = torch.linalg.svdvals(blocks)
    assert fit.error == pytest.approx(float(sigma[1:].norm() / sigma.norm()), rel=1e-6)
    cut, _ = as_lokr(FullDelta(diff=change), Goal(rank=2), factor=3)
    assert (made.rank, cut.rank) == (None, 2)
    left, right = cut.tensors()["lokr_w2_a"], cut.tensors()["lokr_w2_b"]
    whole = made.tensors()["lokr_w2"]
    assert error_of(whole, left @ right) == pytest.approx(best_error(whole, 2), rel=1e-6)


def near_kronecker(miss: float) -> tuple[Tensor, float]:
    """A change that a product nearly says, and the relative error that the best product leaves."""
    w2 = (torch.linalg.qr(randn(6, 5)).Q * 0.5 ** torch.arange(5)) @ torch.linalg.qr(randn(5, 5)).Q
    change = torch.kron(randn(4, 3), w2)
    noise = randn(24, 15)
    change = change + noise * (miss * change.norm() / noise.norm())
    blocks = torch.stack([block.flatten() for row in change.chunk(4) for block in row.chunk(3, 1)])
    sigma = torch.linalg.svdvals(blocks)
    return change, float(sigma[1:].norm() / sigma.norm())


@pytest.mark.parametrize(
    "goal", [{"error": 0.3}, {"error": 0.2}, {"error": 0.12}, {"energy": 0.9}, {"energy": 0.98}], ids=str
)
def test_a_bound_on_a_kronecker_product_counts_what_the_product_itself_misses(goal: dict[str, float]) -> None:
    change, miss = near_kronecker(0.1)
    made, fit = as_lokr(FullDelta(diff=change), Goal(**goal), factor=4)
    bound = goal.get("error", math.sqrt(1 - goal.get("energy", 0)))
    assert fit.error == pytest.approx(error_of(change, made.delta_weight()), rel=1e-6)
    assert miss < fit.error <= bound
    # One rank less breaks the bound.
    smaller, _ = as_lokr(FullDelta(diff=change), Goal(rank=(made.rank or 6) - 1), factor=4)
    assert error_of(change, smaller.delta_weight()) > bound


def test_a_bound_that_no_kronecker_product_reaches_is_refused() -> None:
    change, miss = near_kronecker(0.1)
    for goal in (Goal(error=0.9 * miss), Goal(error=0), Goal(energy=1), Goal(rank=3, error=0.05)):
        with pytest.raises(ll.ConversionError, match=f"relative error of {miss:.3g} at any rank"):
            as_lokr(FullDelta(diff=change), goal, factor=4)
    exact, _ = near_kronecker(0)
    for dtype in (torch.float64, torch.float32):
        made, fit = as_lokr(FullDelta(diff=exact.to(dtype)), Goal(error=0), factor=4)
        assert made.rank is None
        assert fit.error < 1e-6


@pytest.mark.parametrize(
    "goal", [{"rank": 0}, {"conv_rank": 0}, {"energy": 0}, {"energy": 1.1}, {"error": 1}, {"energy": 0.9, "error": 0.1}]
)
def test_goals_that_mean_nothing_are_refused(goal: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(goal))):
        Goal(**goal)


# Whole adapters


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {
        f"{UNET}.attn1.to_q.lora_A.weight": torch.randn(16, 320),
        f"{UNET}.attn1.to_q.lora_B.weight": torch.randn(320, 16),
        "unet.down_blocks.0.resnets.0.conv1.lora_A.weight": torch.randn(8, 320, 3, 3),
        "unet.down_blocks.0.resnets.0.conv1.lora_B.weight": torch.randn(320, 8, 1, 1),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"author": "me", "ss_network_dim": "16", "ss_network_alpha": "8"})
    return tmp_path / "a.safetensors"


def test_resized_file_is_written_whole_with_what_was_done(file: Path) -> None:
    before = ll.read_adapter(file)
    done = ll.resize(file, rank=4, conv_rank=2)
    target = ll.write_adapter(done.adapter, file.parent / "b.safetensors", "kohya")
    after = ll.read_adapter(target)
    assert [delta.rank for _, _, delta in after.modules()] == [4, 2]
    changes = [delta.delta_weight().double() for _, _, delta in before.modules()]
    made = [delta.delta_weight().double() for _, _, delta in after.modules()]
    errors = [error_of(change, new) for change, new in zip(changes, made, strict=True)]
    assert errors == pytest.approx([best_error(c, r) for c, r in zip(changes, (4, 2), strict=True)], rel=1e-4)
    assert [fit.error for fit in done.fits.values()] == pytest.approx(errors, rel=1e-4)
    norms = [float(change.norm()) for change in changes]
    whole = math.hypot(*(e * n for e, n in zip(errors, norms, strict=True))) / math.hypot(*norms)
    assert done.error == pytest.approx(whole, rel=1e-4)
    step = json.loads(after.metadata["lora_loaders.history"])[0]
    assert (step["action"], step["rank"], step["conv_rank"], step["modules"]) == ("resize", 4, 2, 2)
    assert step["relative_error"] == pytest.approx(whole, rel=1e-4)
    assert step["from"][0]["name"] == "a.safetensors"
    assert len(step["from"][0]["sha256"]) == 64
    # The old header's rank is no longer true.
    assert after.metadata["author"] == "me"
    assert after.metadata.get("ss_network_dim") != "16"


def test_a_second_step_is_added_to_the_history(file: Path) -> None:
    done = ll.resize(ll.resize(file, rank=4).adapter, energy=0.5)
    assert [step["action"] for step in json.loads(done.adapter.metadata["lora_loaders.history"])] == ["resize"] * 2


def test_modules_that_need_weights_are_all_named_and_work_with_them() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 8), "b": nn.Linear(6, 8)})
    loras = {path: LoraDelta(up=randn(8, 2), down=randn(2, 6)) for path in model}
    doras = {path: DoraDelta(inner=lora, magnitude=randn(8, 1).abs()) for path, lora in loras.items()}
    adapter = ll.Adapter({"transformer": doras})
    with pytest.raises(ll.ConversionError, match="depends on the weight") as refused:
        ll.resize(adapter, rank=2)
    assert [problem.split(":")[0] for problem in refused.value.problems] == ["transformer.a", "transformer.b"]
    done = ll.to_full(adapter, model=model)
    for path, dora in doras.items():
        wanted = dora.delta_weight(model[path].weight.detach())
        torch.testing.assert_close(done.adapter.deltas["transformer"][path].delta_weight(), wanted)


@pytest.mark.parametrize("has_live_model", [True, False])
def test_a_change_in_full_waits_until_it_is_written_unless_a_live_model_may_change(has_live_model: bool) -> None:
    model, norms = nn.ModuleDict({"a": nn.Linear(6, 8)}).double(), randn(8, 1).abs()
    lora = LoraDelta(up=randn(8, 3), down=randn(3, 6))
    weight = model["a"].get_parameter("weight").data
    whole = weight + lora.up @ lora.down
    change = norms / whole.norm(dim=1, keepdim=True) * whole - weight if has_live_model else lora.up @ lora.down
    adapter = ll.Adapter({"transformer": {"a": DoraDelta(inner=lora, magnitude=norms) if has_live_model else lora}})
    made = ll.to_full(adapter, model=model if has_live_model else None).adapter.deltas["transformer"]["a"]
    assert isinstance(made.tensors()["diff"], FileTensor) == (not has_live_model)
    weight.mul_(3)
    torch.testing.assert_close(made.delta_weight(), change)


WRONG = {
    "lora": LoraDelta(up=randn(9, 3), down=randn(3, 6)),
    "full": FullDelta(diff=randn(8, 5)),
    "dora": DoraDelta(inner=LoraDelta(up=randn(9, 3), down=randn(3, 6)), magnitude=randn(9, 1)),
    "set": SetDelta(value=randn(9, 9)),
    "norm": SetDelta(value=randn(8)),
    "oft": build({"oft_blocks": randn(5, 3, 3)}, None),
    "ia3": build({"weight": randn(7), "on_input": torch.tensor(1)}, None),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_base_model_of_other_shapes_is_refused(name: str) -> None:
    model, adapter = nn.ModuleDict({"a": nn.Linear(6, 8)}), ll.Adapter({"transformer": {"a": WRONG[name]}})
    for make in (
        lambda: ll.resize(adapter, rank=2, model=model),
        lambda: ll.to_full(adapter, model=model),
        lambda: ll.merge([adapter, adapter], rank=2, model=model),
    ):
        with pytest.raises(ConversionError) as refused:
            make()
        assert "for a weight of shape" in refused.value.problems[0]
        assert "has (8, 6)" in refused.value.problems[0]


def test_a_control_lora_is_made_with_the_model_that_it_widens() -> None:
    """W with zeros for the inputs that only the adapter has, then the change."""
    model = nn.ModuleDict({"a": nn.Linear(6, 8)}).double()
    lora = LoraDelta(up=randn(8, 3), down=randn(3, 12))
    dora = DoraDelta(inner=lora, magnitude=randn(8, 1).abs())
    padded = torch.cat([model["a"].weight.detach(), torch.zeros(8, 6, dtype=torch.float64)], 1)
    whole = padded + lora.up @ lora.down
    for delta, wanted in ((lora, whole - padded), (dora, dora.magnitude * whole / whole.norm(dim=1)[:, None] - padded)):
        done = ll.to_full(ll.Adapter({"transformer": {"a": delta}}), model=model)
        torch.testing.assert_close(done.adapter.deltas["transformer"]["a"].delta_weight(), wanted)
        cut = ll.resize(ll.Adapter({"transformer": {"a": delta}}), rank=2, model=model)
        assert cut.error == pytest.approx(best_error(wanted, 2), rel=1e-6)


def test_a_replaced_norm_stays_what_it_is_without_a_model() -> None:
    """As in BFL's Control files, beside their LoRAs."""
    norm = SetDelta(value=randn(8))
    adapter = ll.Adapter({"transformer": {"a": LoraDelta(up=randn(8, 3), down=randn(3, 6)), "b": norm}})
    for done in (ll.resize(adapter, rank=2), ll.to_full(adapter)):
        made = done.adapter.deltas["transformer"]["b"]
        assert isinstance(made, SetDelta)
        assert torch.equal(made.value, norm.value)


@pytest.mark.parametrize("goal", [{"energy": 1.0}, {"error": 0.0}, {"error": 1e-9}], ids=str)
def test_all_of_the_energy_is_a_goal(goal: dict[str, float]) -> None:
    change = randn(8, 6)
    done = ll.resize(ll.Adapter({"transformer": {"a": FullDelta(diff=change)}}), **goal)  # type: ignore[arg-type]
    made = done.adapter.deltas["transformer"]["a"]
    assert made.rank == 6
    torch.testing.assert_close(made.delta_weight(), change)


def test_a_change_without_a_rank_asks_for_a_goal() -> None:
    adapter = ll.Adapter({"transformer": {"a": FullDelta(diff=randn(8, 6))}})
    with pytest.raises(ll.ConversionError, match="has no rank of its own"):
        ll.resize(adapter)


def test_names_that_are_not_known_are_never_left_out_silently(file: Path) -> None:
    name = "lora_unet_never_seen"
    save_file({f"{name}.lora_down.weight": torch.zeros(2, 4), f"{name}.lora_up.weight": torch.zeros(4, 2)}, file)
    with pytest.raises(ll.UnknownFamilyError, match="never_seen"):
        ll.resize(file, rank=1)
    with pytest.raises(ll.ConversionError, match="names that are not known"):
        ll.resize(file, rank=1, family="sd15")


@pytest.mark.parametrize("make", [lambda a, m: ll.resize(a, rank=9, model=m), lambda a, m: ll.to_full(a, model=m)])
def test_gains_of_outputs_change_the_bias_too(make: Callable[[Adapter, nn.Module], Approximation]) -> None:
    model = nn.ModuleDict({"a": nn.Linear(9, 12)}).double()
    gains = torch.rand(12, 1, dtype=torch.float64) + 0.5
    made = make(Adapter({"transformer": {"a": build({"ia3_l": gains}, None)}}), model)
    bias = made.adapter.deltas["transformer"]["a"].delta_bias()
    assert bias is not None
    torch.testing.assert_close(bias, (gains.flatten() - 1) * model["a"].bias.detach())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named_and_nothing_is_made_of_them(value: float) -> None:
    up = torch.randn(12, 2)
    up[3, 1] = value
    source = Adapter({"transformer": {"a": build({"down": torch.randn(2, 9), "up": up}, 1.0)}})
    for make in (lambda: ll.resize(source, rank=1), lambda: ll.to_full(source), lambda: ll.merge([source, source])):
        with pytest.raises(ConversionError, match=r"transformer\.a: NaN or infinity in up"):
            make()


def test_a_flattened_kernel_asks_for_the_model_and_then_has_its_own_rank() -> None:
    path = "down_blocks.0.resnets.0.conv1"
    slots = {f"hada_w{n}_{side}": torch.randn(*((12, 2) if side == "a" else (2, 36))) for n in (1, 2) for side in "ab"}
    source = Adapter({"unet": {path: build(slots, 1.0)}})
    for make in (lambda: ll.resize(source, rank=2), lambda: ll.to_full(source)):
        with pytest.raises(ConversionError, match="model="):
            make()
    resnets = nn.ModuleDict({"resnets": nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(4, 12, 3)})])})
    model = nn.ModuleDict({"down_blocks": nn.ModuleList([resnets])})
    made = ll.resize(source, rank=4, conv_rank=1, model={"unet": model}).adapter.deltas["unet"][path]
    assert made.rank == 1
    assert made.tensors()["down"].shape == (1, 4, 3, 3)
