"""A layer with adapters computes what the base layer would with the weight W + Σ weight · ΔW."""

import copy
import inspect
import pickle
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lora_loaders.adapter import Adapter
from lora_loaders.attaching import apply, detach_adapters
from lora_loaders.deltas import Delta, build
from lora_loaders.layers.layer import AdapterLayer
from lora_loaders.layers.places import Factor
from lora_loaders.layers.slots import refresh
from lora_loaders.layout import adapter_layers
from lora_loaders.plans import plan_adapter

torch.manual_seed(0)
Slots = dict[str, Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


BASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(10, 12), (2, 3, 10)),
    "linear without bias": (lambda: nn.Linear(10, 12, bias=False), (2, 10)),
    "conv1d": (lambda: nn.Conv1d(10, 12, 3, stride=2, padding=1), (2, 10, 9)),
    "conv2d": (lambda: nn.Conv2d(10, 12, 3, padding=1), (2, 10, 6, 6)),
    "conv2d strided": (lambda: nn.Conv2d(10, 12, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 10, 6, 6)),
    "conv2d dilated": (lambda: nn.Conv2d(10, 12, 3, dilation=2, padding=2), (2, 10, 6, 6)),
    "conv2d circular": (lambda: nn.Conv2d(10, 12, 3, padding=1, padding_mode="circular"), (2, 10, 6, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(10, 12, 3, padding=1, padding_mode="reflect"), (2, 10, 6, 6)),
    "conv2d same": (lambda: nn.Conv2d(10, 12, 3, padding="same"), (2, 10, 6, 6)),
    "conv2d 1x1": (lambda: nn.Conv2d(10, 12, 1), (2, 10, 6, 6)),
    "conv2d without a batch": (lambda: nn.Conv2d(10, 12, 3, padding=1), (10, 6, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(10, 12, 3, padding=1, groups=2), (2, 10, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(10, 12, (1, 3, 3), padding=(0, 1, 1)), (2, 10, 2, 4, 4)),
    "embedding": (lambda: nn.Embedding(12, 10), (2, 5)),
}
LOW_RANK = ["lora", "lora bias", "tucker", "loha", "lokr", "dora rows", "dora columns", "full", "set", "bias"]
ALGEBRAS = [*LOW_RANK, "ia3 outputs", "ia3 inputs", "oft", "lora full"]


def slots_for(algebra: str, weight: Tensor) -> tuple[Slots, float | None]:
    """The tensors of one adapter of this algebra for such a weight."""
    out, inputs, *kernel = weight.shape
    ones = [1] * len(kernel)
    lora = {"down": randn(3, inputs, *kernel), "up": randn(out, 3, *ones)}
    flat = inputs * torch.Size(kernel).numel()
    loha = {f"hada_w{n}_{side}": randn(*((out, 2) if side == "a" else (2, flat))) for n in (1, 2) for side in "ab"}
    slots: dict[str, Slots] = {
        "lora": lora,
        "lora bias": {**lora, "up_bias": randn(out), "bias": randn(out)},
        "tucker": {"down": randn(3, inputs, *ones), "mid": randn(3, 3, *kernel), "up": randn(out, 3, *ones)},
        "loha": loha,
        "lokr": {"lokr_w1": randn(2, 1), "lokr_w2_a": randn(out // 2, 2), "lokr_w2_b": randn(2, flat)},
        "dora rows": {**lora, "magnitude": randn(out, 1, *ones).abs() + 1},
        "dora columns": {**lora, "magnitude": randn(1, inputs, *ones).abs() + 1},
        "full": {"diff": randn(*weight.shape), "bias": randn(out)},
        "set": {"set_weight": randn(*weight.shape)},
        "bias": {"bias": randn(out)},
        "ia3 outputs": {"weight": randn(out), "on_input": torch.tensor(0)},
        "ia3 inputs": {"weight": randn(inputs), "on_input": torch.tensor(1)},
        "oft": {"oft_blocks": randn(3, out // 3, out // 3) * 0.1},
        "lora full": {"down": randn(flat, inputs, *kernel), "up": randn(out, flat, *ones)},
    }
    return slots[algebra], 2.0 if algebra in ("lora", "lora bias", "tucker", "dora rows", "loha", "lora full") else None


def base_of(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    make, shape = BASES[name]
    module = make().to(dtype)
    x = torch.randint(0, 12, shape) if name == "embedding" else randn(*shape).to(dtype)
    return module, x


def delta_for(algebra: str, weight: Tensor, seed: int = 5) -> Delta:
    torch.manual_seed(seed)
    return build(*slots_for(algebra, weight))


def wrapped(base: nn.Module, *deltas: Delta, weights: Sequence[float] = (), **options: Any) -> nn.Module:
    """A container whose `it` carries these deltas, named a, b, c, …, all active."""
    model = nn.ModuleDict({"it": base})
    names = "abcdef"[: len(deltas)]
    for name, delta in zip(names, deltas, strict=True):
        apply(plan_adapter({"model": model}, Adapter({"model": {"it": delta}})), name, **options)
    layer: Any = model["it"]
    layer.active = tuple(names)
    layer.weights |= dict(zip(names, weights or [1.0] * len(names), strict=True))
    refresh([layer])
    return model


def expected(base: nn.Module, x: Tensor, deltas: Sequence[Delta], weights: Sequence[float]) -> Tensor:
    """The base layer with another weight and bias: no adapter code but ΔW itself, which has tests of its own."""
    twin: Any = copy.deepcopy(base)
    weight = twin.weight.detach().clone()
    with torch.no_grad():
        for delta, factor in zip(deltas, weights, strict=True):
            if delta.shape is not None:
                twin.weight += factor * delta.delta_weight(weight).view(weight.shape)
            if (bias := delta.delta_bias()) is not None:
                if twin.bias is None:
                    twin.bias = nn.Parameter(torch.zeros_like(bias))
                twin.bias += factor * bias
        return twin(x)


def close(one: Tensor, other: Tensor, tolerance: float) -> None:
    scale = other.abs().max().item()
    assert (one - other).abs().max().item() <= tolerance * max(scale, 1.0)


def fits(algebra: str, base: str) -> bool:
    if base == "embedding":
        return "bias" not in algebra and algebra not in ("full", "tucker")
    return algebra != "tucker" or base.startswith("conv")


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("algebra", ALGEBRAS)
def test_one_adapter_equals_a_changed_weight(name: str, algebra: str) -> None:
    if not fits(algebra, name):
        pytest.skip("an embedding has no bias, and only convolutions have a core")
    base, x = base_of(name)
    delta = delta_for(algebra, base.weight)  # type: ignore[arg-type]
    with torch.no_grad():
        got = wrapped(base, delta, weights=[0.7])["it"](x)  # type: ignore[index]
    close(got, expected(base, x, [delta], [0.7]), 1e-12)


@pytest.mark.parametrize("name", ["linear", "linear without bias", "conv2d", "conv2d grouped", "embedding"])
@pytest.mark.parametrize("trained", [False, True], ids=["slot", "trained"])
@pytest.mark.parametrize("algebras", [
    ("lora", "loha", "full"),
    ("ia3 outputs", "ia3 inputs", "lora"),
    ("dora rows", "dora columns", "set"),
    ("lora", "ia3 outputs", "dora rows", "oft"),
], ids="+".join)  # fmt: skip
def test_several_adapters_add_up_whatever_their_algebras(name: str, trained: bool, algebras: tuple[str, ...]) -> None:
    base, x = base_of(name)
    algebras = tuple(a for a in algebras if fits(a, name))
    deltas = [delta_for(a, base.weight, seed) for seed, a in enumerate(algebras)]  # type: ignore[arg-type]
    weights = [0.7, -0.4, 1.3, 0.2][: len(deltas)]
    model: Any = wrapped(base, *deltas, weights=weights, requires_grad=trained)
    close(model["it"](x).detach(), expected(base, x, deltas, weights), 1e-12)


@pytest.mark.parametrize("name", BASES)
def test_float32_is_right_to_rounding(name: str) -> None:
    base, x = base_of(name, torch.float32)
    algebras = [a for a in ("lora", "dora rows", "lokr", "full") if fits(a, name)]
    deltas = [delta_for(a, base.weight, seed).map_tensors(Tensor.float) for seed, a in enumerate(algebras)]  # type: ignore[arg-type]
    weights = [0.5, 0.25, 1.5, -1.0][: len(deltas)]
    with torch.no_grad():
        got = wrapped(base, *deltas, weights=weights)["it"](x)  # type: ignore[index]
    wide = copy.deepcopy(base).double()
    wanted = expected(
        wide, x.double() if x.is_floating_point() else x, [d.map_tensors(Tensor.double) for d in deltas], weights
    )
    close(got.double(), wanted, 1e-6)


def norms() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    from diffusers.models.normalization import RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm
    from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

    return {
        "layer norm": (nn.LayerNorm(10), (2, 3, 10)),
        "layer norm without bias": (nn.LayerNorm(10, bias=False), (2, 3, 10)),
        "group norm": (nn.GroupNorm(2, 10), (2, 10, 4, 4)),
        "rms norm": (nn.RMSNorm(10, eps=1e-6), (2, 3, 10)),
        "rms norm with torch's epsilon": (nn.RMSNorm(10), (2, 3, 10)),
        "rms norm over two dimensions": (nn.RMSNorm((2, 5)), (3, 2, 5)),
        "diffusers' rms norm": (RMSNorm(10, eps=1e-6), (2, 3, 10)),
        "diffusers' rms norm with bias": (RMSNorm(10, eps=1e-6, bias=True), (2, 3, 10)),
        "T5's layer norm": (T5LayerNorm(10), (2, 3, 10)),
        "UMT5's layer norm": (UMT5LayerNorm(10), (2, 3, 10)),
    }


@pytest.mark.parametrize("name", norms())
@pytest.mark.parametrize("trained", [False, True], ids=["slot", "trained"])
def test_a_norm_takes_differences_and_other_values(name: str, trained: bool) -> None:
    base, shape = norms()[name]
    base = base.double()
    x = randn(*shape)
    own, has_bias = base.get_parameter("weight").shape, getattr(base, "bias", None) is not None
    first = build({"w_norm": randn(*own), **({"b_norm": randn(*own)} if has_bias else {})}, None)
    second = build({"set_weight": randn(*own)}, None)
    model: Any = wrapped(base, first, second, weights=[0.5, 0.25], requires_grad=trained)
    close(model["it"](x).detach(), expected(base, x, [first, second], [0.5, 0.25]), 1e-12)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(
    "algebra", ["lora", "tucker", "dora rows", "dora columns", "loha", "lokr", "ia3 inputs", "oft"]
)
def test_training_and_inference_compute_the_same(name: str, algebra: str) -> None:
    if not fits(algebra, name):
        pytest.skip("only convolutions have a core")
    base, x = base_of(name)
    delta = delta_for(algebra, base.weight)  # type: ignore[arg-type]
    model: Any = wrapped(base, delta, requires_grad=True)
    trained = model["it"](x).detach()
    model.requires_grad_(False)
    with torch.no_grad():
        close(model["it"](x), trained, 1e-12)


@pytest.mark.parametrize(
    "algebra", ["lora", "lora bias", "bias", "dora rows", "loha", "lokr", "ia3 outputs", "full", "oft"]
)
def test_gradients_reach_the_adapter_and_nothing_else(algebra: str) -> None:
    base, x = base_of("linear")
    base.requires_grad_(False)
    model: Any = wrapped(base, delta_for(algebra, base.weight), requires_grad=True)  # type: ignore[arg-type]
    model["it"](x).square().sum().backward()
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_gradients_equal_those_of_the_closed_formula() -> None:
    base, x = base_of("linear")
    delta: Any = delta_for("lora", base.weight)  # type: ignore[arg-type]
    model: Any = wrapped(base.requires_grad_(False), delta, requires_grad=True)
    model["it"](x).pow(3).sum().backward()
    down, up = delta.down.clone().requires_grad_(), delta.up.clone().requires_grad_()
    (base(x) + x @ down.T @ up.T * (2.0 / 3.0)).pow(3).sum().backward()  # type: ignore[operator]
    close(model["it"].lora_A["a"].weight.grad, down.grad, 1e-12)
    close(model["it"].lora_B["a"].weight.grad, up.grad, 1e-12)


def test_gradients_flow_through_a_frozen_adapter_to_the_input() -> None:
    base, x = base_of("linear")
    delta = delta_for("lora", base.weight)  # type: ignore[arg-type]
    model: Any = wrapped(base.requires_grad_(False), delta)
    x.requires_grad_()
    model["it"](x).sum().backward()
    weight: Any = base.weight
    close(x.grad, (weight + delta.delta_weight()).sum(0).expand_as(x), 1e-12)  # type: ignore[arg-type]


def test_an_optimiser_step_shows_when_gradients_are_switched_off_afterwards() -> None:
    base, x = base_of("linear")
    model: Any = wrapped(base.requires_grad_(False), delta_for("lora", base.weight), requires_grad=True)  # type: ignore[arg-type]
    parameters = [p for p in model.parameters() if p.requires_grad]
    model["it"](x).square().sum().backward()
    torch.optim.SGD(parameters, 0.1).step()
    trained = model["it"](x).detach()
    model.requires_grad_(False)
    with torch.no_grad():
        close(model["it"](x), trained, 1e-12)


def test_a_state_dictionary_that_is_loaded_shows_in_the_forward() -> None:
    base, x = base_of("linear")
    model: Any = wrapped(base, delta_for("lora", base.weight))  # type: ignore[arg-type]
    other: Any = wrapped(copy.deepcopy(base), delta_for("lora", base.weight, seed=9))  # type: ignore[arg-type]
    with torch.no_grad():
        model.load_state_dict(other.state_dict())
        close(model["it"](x), other["it"](x), 1e-12)


def test_dropout_acts_while_training_only() -> None:
    base, x = base_of("linear")
    delta = delta_for("lora", base.weight)  # type: ignore[arg-type]
    model: Any = wrapped(base, delta, requires_grad=True, dropout=0.5)
    model.eval()
    close(model["it"](x).detach(), expected(base, x, [delta], [1.0]), 1e-12)
    model.train()
    first, second = model["it"](x), model["it"](x)
    assert (first - second).abs().max() > 0.01
    torch.manual_seed(0)
    mean = sum(model["it"](x).detach() for _ in range(4000)) / 4000
    plain = expected(base, x, [delta], [1.0])
    assert (mean - plain).abs().max() < 0.15 * plain.abs().max()  # 4000 draws: a deviation of 1.6 % of |ΔWx|


def test_a_frozen_adapter_has_no_dropout_even_in_train_mode() -> None:
    base, x = base_of("linear")
    delta = delta_for("lora", base.weight)  # type: ignore[arg-type]
    model: Any = wrapped(base, delta, dropout=0.5).train()
    close(model["it"](x).detach(), expected(base, x, [delta], [1.0]), 1e-12)


def test_parameters_are_named_as_the_field_names_them() -> None:
    model = wrapped(
        base_of("linear")[0], *(delta_for(a, nn.Linear(10, 12).weight.double()) for a in ("lora", "dora rows"))
    )
    assert list(model.state_dict()) == [
        "it.base_layer.weight",
        "it.base_layer.bias",
        "it.lora_A.a.weight",
        "it.lora_A.b.weight",
        "it.lora_B.a.weight",
        "it.lora_B.b.weight",
        "it.lora_magnitude_vector.b.weight",
    ]
    assert model.state_dict()["it.lora_A.a.weight"].shape == (3, 10)
    assert model.state_dict()["it.lora_B.a.weight"].shape == (12, 3)
    embedding = wrapped(
        nn.Embedding(12, 10), build({"embedding_down": torch.ones(3, 12), "embedding_up": torch.ones(10, 3)}, None)
    )
    keys = embedding.state_dict()
    assert keys["it.lora_embedding_A.a"].shape == (3, 12)
    assert keys["it.lora_embedding_B.a"].shape == (10, 3)


def test_removing_an_adapter_takes_its_names_away() -> None:
    model: Any = wrapped(base_of("linear")[0], *(delta_for(a, nn.Linear(10, 12).weight.double()) for a in ALGEBRAS[:2]))
    detach_adapters(model, ["b"])
    assert {key.split(".")[2] for key in model.state_dict() if "base" not in key} == {"a"}
    assert {key.split(".")[1] for key in model.state_dict()} == {"base_layer", "lora_A", "lora_B"}


@pytest.mark.parametrize("active", [("a",), ("b",), ("b", "a"), ("a", "b", "c"), ()])
def test_switching_writes_the_slot_in_place(active: tuple[str, ...]) -> None:
    base, x = base_of("linear")
    deltas = {name: delta_for("lora", base.weight, seed) for seed, name in enumerate("abc")}  # type: ignore[arg-type]
    model: Any = wrapped(base, *deltas.values())
    layer = model["it"]
    layer.shared.reserved = 16
    refresh([layer])
    before = (layer.slot_down.data_ptr(), layer.slot_up.data_ptr(), layer.slot_down.shape, layer.slot_up.shape)
    layer.active = active
    layer.weights |= {"a": 0.25, "b": -2.0}
    refresh([layer])
    assert before == (layer.slot_down.data_ptr(), layer.slot_up.data_ptr(), layer.slot_down.shape, layer.slot_up.shape)
    chosen = [deltas[name] for name in active]
    with torch.no_grad():
        close(layer(x), expected(base, x, chosen, [layer.weights[name] for name in active]), 1e-12)


def test_switching_to_fewer_adapters_leaves_nothing_of_the_others() -> None:
    base, x = base_of("linear")
    deltas = [delta_for(a, base.weight, seed) for seed, a in enumerate(("lora", "ia3 inputs", "full", "lora bias"))]  # type: ignore[arg-type]
    model: Any = wrapped(base, *deltas)
    model["it"].active = ("a",)
    refresh([model["it"]])
    with torch.no_grad():
        close(model["it"](x), expected(base, x, deltas[:1], [1.0]), 1e-12)


def test_the_scale_of_a_call_multiplies_every_contribution() -> None:
    base, x = base_of("linear")
    for algebra in ALGEBRAS:
        if algebra == "tucker":
            continue
        for trained in (False, True):
            delta = delta_for(algebra, base.weight)  # type: ignore[arg-type]
            model: Any = wrapped(copy.deepcopy(base), delta, weights=[0.5], requires_grad=trained)
            model["it"].shared.scale = 0.3
            close(model["it"](x).detach(), expected(base, x, [delta], [0.15]), 1e-12)


def test_switching_does_not_recompile() -> None:
    base, x = base_of("linear", torch.float32)
    deltas = [delta_for("lora", base.weight, seed).map_tensors(Tensor.float) for seed in range(3)]  # type: ignore[arg-type]
    model: Any = wrapped(base, *deltas)
    layer = model["it"]
    layer.shared.reserved = 16
    refresh([layer])
    compiled = torch.compile(model["it"], backend="eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x)
        for active, weights in ((("a",), {"a": 0.5}), (("c", "b"), {"b": 2.0, "c": -1.0}), (("a", "b", "c"), {})):
            layer.active = active
            layer.weights |= weights
            refresh([layer])
            chosen = [deltas["abc".index(name)].map_tensors(Tensor.double) for name in active]
            wanted = expected(copy.deepcopy(base).double(), x.double(), chosen, [layer.weights[n] for n in active])
            close(compiled(x).double(), wanted, 1e-6)


def test_low_precision_input_keeps_its_dtype() -> None:
    base, x = base_of("linear", torch.bfloat16)
    model: Any = wrapped(base, delta_for("lora", base.weight.double()))  # type: ignore[union-attr]
    with torch.no_grad():
        assert model["it"](x).dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def nearly(weight: Tensor) -> dict[str, Slots]:
    """Tensors that change a weight by about 0.35 %, of which half precision keeps nothing, or the double of it."""
    out, inputs = weight.shape
    lora = {"down": torch.zeros(2, inputs), "up": torch.zeros(out, 2)}
    turn = torch.eye(4).repeat(out // 4, 1, 1)
    turn[:, 0, 1], turn[:, 1, 0] = 0.0005, -0.0005
    factor, ones = 1.0035, torch.ones(out, 1)
    return {
        "dora rows": {**lora, "magnitude": factor * weight.norm(dim=1, keepdim=True)},
        "dora columns": {**lora, "magnitude": factor * weight.norm(dim=0, keepdim=True)},
        "rescale": {"oft_blocks": torch.zeros(out // 4, 4, 4), "rescale": factor * ones},
        "rotation": {"oft_diag": turn, "rescale": factor * ones},
        "gain": {"ia3_l": factor * ones},
        "boft": {"boft_R": torch.zeros(1, inputs // 2, 2, 2), "boft_s": factor * ones},
        "set": {"set_weight": factor * weight},
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", nearly(torch.ones(4, 4)))
def test_a_change_that_half_precision_would_round_off_is_kept(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = nn.Linear(64, 64).requires_grad_(False).to(dtype)
    weight, x = base.weight.double(), torch.randn(64, 64).to(dtype)
    delta = build({slot: tensor.float() for slot, tensor in nearly(weight)[name].items()}, None)
    change = delta.delta_weight(weight).double()
    assert change.norm() > 0.003 * weight.norm()
    model: Any = wrapped(copy.deepcopy(base), delta)
    layer = model["it"]
    close(layer.delta("a").delta_weight(weight) / change.abs().max(), change / change.abs().max(), 1e-3)
    wanted = x.double() @ change.T
    # Each output is rounded to its own precision; that the change is there, and once, shows over all of them.
    share = ((layer(x).double() - base(x).double()) * wanted).sum() / wanted.square().sum()
    assert 0.5 < share < 1.5


@pytest.mark.parametrize("on_input", [False, True])
def test_a_small_gain_acts_in_inference_as_in_training(on_input: bool) -> None:
    base, x = nn.Linear(64, 64).requires_grad_(False).bfloat16(), randn(64, 64).bfloat16()
    gain = {"weight": torch.full((64,), 0.0035), "on_input": torch.tensor(int(on_input))}
    model: Any = wrapped(copy.deepcopy(base), build(gain, None))
    layer = model["it"]
    changed = (layer(x) != base(x)).double().mean().item()
    for parameter in layer.parameters_of("a"):
        parameter.requires_grad_(True)
    assert changed == pytest.approx((layer(x) != base(x)).double().mean().item(), abs=0.1)
    assert changed > 0.5


def test_a_layer_runs_under_autocast() -> None:
    base, x = base_of("linear", torch.float32)
    delta = delta_for("lora", base.weight.double()).map_tensors(Tensor.float)  # type: ignore[union-attr]
    for trained in (False, True):
        model: Any = wrapped(copy.deepcopy(base), delta, requires_grad=trained)
        with torch.autocast("cpu", torch.bfloat16):
            got = model["it"](x)
        assert got.dtype == torch.bfloat16
        close(got.detach().float(), expected(base, x, [delta], [1.0]), 0.02)


def test_the_layer_answers_for_its_base() -> None:
    base, _ = base_of("conv2d strided")
    layer: Any = wrapped(base, delta_for("lora", base.weight))["it"]  # type: ignore[arg-type,index]
    assert isinstance(layer, AdapterLayer)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.in_channels, layer.stride, layer.get_base_layer()) == (10, (2, 1), base)
    with pytest.raises(AttributeError):
        layer.no_such_thing  # noqa: B018


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_computes_the_same_and_is_independent(through: Callable[[Any], Any]) -> None:
    base, x = base_of("linear")
    model: Any = wrapped(base, *(delta_for(a, base.weight) for a in ("lora", "dora rows", "full")))  # type: ignore[arg-type]
    twin = through(model)
    with torch.no_grad():
        wanted = model["it"](x)
        # Not to the bit: a copy lies at other addresses, where some processors' BLAS sums in another order.
        torch.testing.assert_close(twin["it"](x), wanted, rtol=1e-12, atol=1e-12)
        detach_adapters(twin)
        torch.testing.assert_close(twin["it"](x), base(x), rtol=1e-12, atol=1e-12)
        assert torch.equal(model["it"](x), wanted)
    assert [path for path, _ in adapter_layers(model)] == ["it"]


def test_a_factors_hooks_are_asked_of_its_class_without_an_error() -> None:
    assert {name for name, _ in inspect.getmembers(Factor)} >= {"forward", "_forward_hooks"}
    assert mock.create_autospec(Factor)
    one, other = Factor.blank(training=True), Factor.blank(training=True)
    assert one._forward_hooks == {}
    assert one._forward_hooks is one._forward_hooks is not other._forward_hooks
