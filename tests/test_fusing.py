"""Fusing and unfusing: every bit comes back, whatever was called in between."""

import copy
import pickle
import random
from typing import Any

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from tiny_models import Made, adapter_file, bits, changed_bits, components_of, photograph, pipeline, render
from torch import Tensor, nn
from torch.nn.utils import prune

import lora_loaders as ll
from lora_loaders import fusing, records
from lora_loaders.adapter import Adapter
from lora_loaders.attaching import apply
from lora_loaders.deltas import Delta, build
from lora_loaders.layers.slots import refresh
from lora_loaders.layout import adapter_layers
from lora_loaders.plans import plan_adapter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def pipe() -> Any:
    return ll.attach(pipeline("sd15"))


@pytest.fixture
def files(pipe: Any) -> dict[str, Made]:
    return {
        "a": adapter_file(pipe, seed=1, scale=0.1),
        "b": adapter_file(pipe, seed=2, scale=0.1, only="to_q|to_v|conv"),
        "c": adapter_file(pipe, seed=3, scale=0.1, only="to_k|proj", components=["unet"]),
    }


def net(dtype: torch.dtype, *awkward: float) -> nn.Module:
    """One layer of every kind, with awkward values in each weight: zero, minus zero, tiny, and those given."""
    torch.manual_seed(0)
    model = nn.ModuleDict({
        "linear": nn.Linear(12, 12),
        "plain": nn.Linear(12, 12, bias=False),
        "conv": nn.Conv2d(12, 12, 3, padding=1),
        "embedding": nn.Embedding(12, 12),
        "norm": nn.LayerNorm(12),
    })  # fmt: skip
    model = model.to(dtype)
    for module in model.values():
        with torch.no_grad():
            values = torch.tensor([0.0, -0.0, 1e-7, -6e-5, *awkward], dtype=dtype)
            module.weight.view(-1)[: len(values)] = values
    return model.requires_grad_(False)


def some(shape: tuple[int, ...], kind: str, seed: int, scale: float = 0.1) -> Delta:
    torch.manual_seed(seed)
    out, inputs, *kernel = shape if len(shape) > 1 else (*shape, 1)
    ones = [1] * len(kernel)
    lora = {"down": torch.randn(3, inputs, *kernel) * scale, "up": torch.randn(out, 3, *ones) * scale}
    slots = {
        "lora": lora,
        "bias": {**lora, "bias": torch.randn(out) * scale},
        "dora": {**lora, "magnitude": torch.rand(out, 1, *ones) + 0.5},
        "full": {"diff": torch.randn(shape) * scale, "bias": torch.randn(out) * scale},
        "ia3": {"weight": torch.randn(out) * scale, "on_input": torch.tensor(0)},
        "set": {"set_weight": torch.randn(shape)},
    }
    return build(slots[kind], 2.0 if kind in ("lora", "bias") else None)


KINDS = {
    "linear": ("lora", "bias", "dora", "full", "ia3", "set"),
    "plain": ("lora", "full", "bias"),
    "conv": ("lora", "dora", "bias"),
    "embedding": ("lora", "dora"),
    "norm": ("full", "set"),
}


class Machine:
    """A model under random calls, and beside it what the calls should have come to, in float64.

    State: adapters (path -> delta), active names, weights, enabled, fused coefficients.
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.random = random.Random(seed)
        self.dtype = dtype
        self.model: Any = net(dtype)
        self.plain = bits(self.model)
        self.adapters: dict[str, dict[str, Delta]] = {}
        self.active: list[str] = []
        self.weights: dict[str, float] = {}
        self.fused: dict[str, float] = {}
        self.counter = 0

    def names(self, least: int = 1) -> list[str]:
        present = sorted(self.adapters)
        return self.random.sample(present, self.random.randint(least, len(present))) if len(present) >= least else []

    def step(self) -> str:
        call = self.random.choice(
            ["load", "load", "set", "set", "fuse", "fuse", "fuse_active", "unfuse", "unfuse_one", "delete"]
        )
        getattr(self, f"do_{call}")()
        return call

    def do_load(self) -> None:
        if len(self.adapters) >= 4:
            return
        self.counter += 1
        name = f"n{self.counter}"
        paths = self.random.sample(sorted(KINDS), self.random.randint(1, 4))
        deltas = {
            path: some(
                tuple(self.model.get_submodule(path).weight.shape), self.random.choice(KINDS[path]), self.counter
            )
            for path in paths
        }
        apply(plan_adapter({"model": self.model}, Adapter({"model": deltas})), name)
        self.model.__dict__.setdefault("peft_config", {})[name] = None
        held = {path: layer.delta(name) for path, layer in adapter_layers(self.model) if name in layer.templates}
        self.adapters[name] = {
            p: d.map_tensors(lambda t: t.detach().double() if t.is_floating_point() else t) for p, d in held.items()
        }
        self.active, self.weights[name] = [name], 1.0

    def do_set(self) -> None:
        from lora_loaders import activity

        names = self.names()
        if names:
            weights = [self.random.choice([0.0, 0.5, 1.0, -0.7, 2.0]) for _ in names]
            activity.set_active(self.model, names, weights)
            self.active = names
            self.weights |= dict(zip(names, weights, strict=True))

    def do_fuse(self) -> None:
        names, scale = self.names(), self.random.choice([1.0, 0.5, 0.3])
        if names:
            fusing.fuse(self.model, names, lora_scale=scale, safe_fusing=self.random.random() < 0.3)
            self.fused |= {name: self.weights[name] * scale for name in names}

    def do_fuse_active(self) -> None:
        fusing.fuse(self.model)
        self.fused |= {name: self.weights[name] for name in self.active}

    def do_unfuse(self) -> None:
        fusing.unfuse(self.model)
        self.fused = {}

    def do_unfuse_one(self) -> None:
        if self.fused:
            name = self.random.choice(sorted(self.fused))
            fusing.unfuse(self.model, [name])
            del self.fused[name]

    def do_delete(self) -> None:
        from lora_loaders import activity

        names = self.names()[:2]
        if names:
            activity.delete(self.model, names)
            for name in names:
                del self.adapters[name]
                self.fused.pop(name, None)
            self.active = [name for name in self.active if name not in names]

    def coefficients(self) -> dict[str, float]:
        unfused = {name: self.weights[name] for name in self.active if name not in self.fused}
        return {**unfused, **self.fused}

    def check(self, trail: list[str]) -> None:
        assert fusing.fused_adapters(self.model) == set(self.fused), trail
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 8e-3}[self.dtype]
        for path, (got, wanted) in self.outputs().items():
            size = wanted.abs().max().clamp(min=1.0)
            assert ((got - wanted).abs().max() / size).item() < tolerance, (path, trail)

    def outputs(self) -> dict[str, tuple[Tensor, Tensor]]:
        results: dict[str, tuple[Tensor, Tensor]] = {}
        inputs = {"conv": torch.randn(1, 12, 4, 4), "embedding": torch.arange(12)}
        clean: Any = net(self.dtype).double()
        for path in KINDS:
            x = inputs.get(path, torch.randn(3, 12))
            x = x if path == "embedding" else x.to(self.dtype)
            module = clean[path]
            original = module.weight.clone()
            for name, factor in self.coefficients().items():
                delta = self.adapters[name].get(path)
                if delta is None:
                    continue
                if delta.shape is not None:
                    module.weight += factor * delta.delta_weight(original).view(original.shape)
                if (bias := delta.delta_bias()) is not None:
                    module.bias = nn.Parameter(bias * 0, requires_grad=False) if module.bias is None else module.bias
                    module.bias += factor * bias
            with torch.no_grad():
                results[path] = (self.model[path](x).double(), module(x.double() if path != "embedding" else x))
        return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_calls_computes_what_it_should_and_gives_every_bit_back(dtype: torch.dtype, seed: int) -> None:
    machine = Machine(dtype, seed)
    trail: list[str] = []
    for _ in range(25):
        trail.append(machine.step())
        machine.check(trail)
        if not machine.fused:
            assert changed_bits(machine.plain, machine.model) == [], trail
    machine.do_unfuse()
    assert changed_bits(machine.plain, machine.model) == [], trail


def overflowing(model: nn.Module) -> Adapter:
    huge = some((12, 12), "lora", 1, scale=1e10)
    return Adapter({"model": {"linear": huge, "plain": some((12, 12), "lora", 2)}})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_swallow_the_change_come_back(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    model: Any = net(dtype, 3e4, largest, -largest, torch.finfo(dtype).tiny, float("inf"), float("nan"))
    before = bits(model)
    deltas = {"linear": some((12, 12), "lora", 1, scale=2.0), "conv": some((12, 12, 3, 3), "lora", 2, scale=2.0)}
    apply(plan_adapter({"model": model}, Adapter({"model": deltas})), "x")
    fusing.fuse(model)
    assert len(changed_bits(before, model)) == 2
    fusing.unfuse(model)
    assert changed_bits(before, model) == []


# The pipeline's state machine


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fuse_and_unfuse_change_no_bit(pipe: Any, files: dict[str, Made], dtype: torch.dtype) -> None:
    for model in components_of(pipe).values():
        model.to(dtype)
    before = [bits(model) for model in components_of(pipe).values()]
    for name, made in files.items():
        pipe.load_lora_weights(made.tensors, name)
    pipe.set_adapters(list(files), [0.5, 1.0, -0.25])
    pipe.fuse_lora()
    assert pipe.fused_loras == set(files)
    assert pipe.num_fused_loras == 3
    assert any(changed_bits(b, m) for b, m in zip(before, components_of(pipe).values(), strict=True))
    pipe.set_adapters(["b"], 0.1)
    pipe.disable_lora()
    pipe.unfuse_lora()
    assert pipe.fused_loras == set()
    assert [changed_bits(b, m) for b, m in zip(before, components_of(pipe).values(), strict=True)] == [[], []]


def test_a_fused_adapter_beside_an_active_one_gives_both(pipe: Any, files: dict[str, Made]) -> None:
    for name in "ab":
        pipe.load_lora_weights(files[name].tensors, name)
    pipe.set_adapters(["a", "b"], [0.5, 0.8])
    both = render(pipe)
    pipe.fuse_lora(adapter_names=["a"])
    torch.testing.assert_close(render(pipe), both, rtol=1e-4, atol=1e-4)
    pipe.set_adapters(["b"], 0.8)
    torch.testing.assert_close(render(pipe), both, rtol=1e-4, atol=1e-4)
    assert pipe.get_active_adapters() == ["b"]


def test_loading_beside_a_fused_adapter_keeps_it_fused(pipe: Any, files: dict[str, Made]) -> None:
    pipe.load_lora_weights(files["a"].tensors, "a")
    pipe.fuse_lora()
    pipe.load_lora_weights(files["b"].tensors, "b")
    assert pipe.fused_loras == {"a"}
    got = render(pipe)
    pipe.unfuse_lora()
    pipe.set_adapters(["a", "b"])
    torch.testing.assert_close(got, render(pipe), rtol=1e-4, atol=1e-4)


def test_lora_scale_leaves_no_residue(pipe: Any, files: dict[str, Made]) -> None:
    pipe.load_lora_weights(files["a"].tensors, "a")
    pipe.set_adapters("a", 0.8)
    whole = render(pipe)
    before = bits(pipe.unet)
    pipe.fuse_lora(lora_scale=0.5)
    half = render(pipe)
    pipe.unfuse_lora()
    assert changed_bits(before, pipe.unet) == []
    assert torch.equal(render(pipe), whole)
    pipe.set_adapters("a", 0.4)
    torch.testing.assert_close(render(pipe), half, rtol=1e-4, atol=1e-4)


def test_fusing_again_takes_the_new_scale(pipe: Any, files: dict[str, Made]) -> None:
    pipe.load_lora_weights(files["a"].tensors, "a")
    pipe.fuse_lora(lora_scale=0.5)
    once = bits(pipe.unet)
    pipe.fuse_lora(lora_scale=0.3)
    pipe.fuse_lora(lora_scale=0.5)
    assert changed_bits(once, pipe.unet) == []


def test_the_order_of_fusing_does_not_matter_beyond_rounding_and_undoes_exactly(
    pipe: Any, files: dict[str, Made]
) -> None:
    before = bits(pipe.unet)
    for name in "ab":
        pipe.load_lora_weights(files[name].tensors, name)
    pipe.fuse_lora(adapter_names=["a"])
    pipe.fuse_lora(adapter_names=["b"])
    one = bits(pipe.unet)
    pipe.unfuse_lora()
    pipe.fuse_lora(adapter_names=["b"])
    pipe.fuse_lora(adapter_names=["a"])
    other = bits(pipe.unet)
    assert all(torch.allclose(one[key], other[key], rtol=1e-6, atol=1e-7) for key in one)
    pipe.unfuse_lora()
    assert changed_bits(before, pipe.unet) == []


def test_components_fuse_apart(pipe: Any, files: dict[str, Made]) -> None:
    pipe.load_lora_weights(files["a"].tensors, "a")
    unet, encoder = bits(pipe.unet), bits(pipe.text_encoder)
    pipe.fuse_lora(components=["text_encoder"])
    assert changed_bits(unet, pipe.unet) == []
    assert changed_bits(encoder, pipe.text_encoder)
    pipe.unfuse_lora(components=["unet"])
    assert changed_bits(encoder, pipe.text_encoder)
    pipe.unfuse_lora(components=["text_encoder"])
    assert changed_bits(encoder, pipe.text_encoder) == []


@pytest.mark.parametrize(("arguments", "words"), [
    ({"components": []}, "none given"),
    ({"components": ["transformer"]}, "transformer"),
    ({"adapter_names": ["zzz"]}, "zzz"),
])  # fmt: skip
def test_unknown_components_and_names_are_refused(
    pipe: Any, files: dict[str, Made], arguments: Any, words: str
) -> None:
    pipe.load_lora_weights(files["a"].tensors, "a")
    before = photograph(pipe)
    with pytest.raises(ll.AdapterStateError, match=words):
        pipe.fuse_lora(**arguments)
    assert before.differences(photograph(pipe)) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_fusing_is_all_or_nothing_across_components(pipe: Any, files: dict[str, Made], value: float) -> None:
    last = [key for key in files["a"].tensors if key.startswith("text_encoder") and "lora_B" in key][-1]
    tensors = {**files["a"].tensors, last: torch.full_like(files["a"].tensors[last], value)}
    pipe.load_lora_weights(tensors, "a")
    pipe.load_lora_weights(files["b"].tensors, "b")
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    pipe.fuse_lora(adapter_names=["b"], lora_scale=0.5)
    before = photograph(pipe)
    with pytest.raises(ll.AdapterStateError, match="NaN"):
        pipe.fuse_lora(safe_fusing=True, adapter_names=["b", "a"])
    assert before.differences(photograph(pipe)) == []
    assert pipe.fused_loras == {"b"}


def test_safe_fusing_looks_at_biases_too() -> None:
    model: Any = net(torch.float32)
    bad = build({"diff": torch.ones(12, 12), "bias": torch.full((12,), float("nan"))}, None)
    deltas = {"conv": some((12, 12, 3, 3), "lora", 1), "linear": bad}
    apply(plan_adapter({"model": model}, Adapter({"model": deltas})), "x")
    before = bits(model)
    with pytest.raises(ll.AdapterStateError, match="NaN"):
        fusing.fuse(model, safe_fusing=True)
    assert changed_bits(before, model) == []


def test_a_bias_is_not_fused_where_the_layer_would_not_heed_it() -> None:
    model: Any = nn.ModuleDict({"linear": nn.Linear(12, 12), "norm": nn.RMSNorm(12)})
    deltas = {
        "linear": some((12, 12), "lora", 1),
        "norm": build({"w_norm": torch.ones(12), "b_norm": torch.ones(12)}, None),
    }
    apply(plan_adapter({"model": model}, Adapter({"model": deltas})), "x")
    before = bits(model)
    with pytest.raises(ll.UnsupportedBaseError, match="bias"):
        fusing.fuse(model)
    assert changed_bits(before, model) == []


def test_safe_fusing_refuses_an_overflow_of_the_dtype() -> None:
    model: Any = net(torch.float16)
    apply(plan_adapter({"model": model}, overflowing(model)), "x")
    before = bits(model)
    with pytest.raises(ll.AdapterStateError, match="NaN"):
        fusing.fuse(model, safe_fusing=True)
    assert changed_bits(before, model) == []


def test_deleting_a_fused_adapter_unfuses_it(pipe: Any, files: dict[str, Made]) -> None:
    before = photograph(pipe)
    for name in "ab":
        pipe.load_lora_weights(files[name].tensors, name)
    pipe.set_adapters(["a", "b"])
    pipe.fuse_lora()
    pipe.delete_adapters("a")
    assert pipe.fused_loras == {"b"}
    got = render(pipe)
    pipe.unfuse_lora()
    torch.testing.assert_close(got, render(pipe), rtol=1e-4, atol=1e-4)
    pipe.delete_adapters("b")
    assert before.differences(photograph(pipe)) == []


def test_unloading_what_is_fused_is_refused_unless_told_what_to_do(pipe: Any, files: dict[str, Made]) -> None:
    plain = photograph(pipe)
    pipe.load_lora_weights(files["a"].tensors, "a")
    pipe.fuse_lora()
    fused = photograph(pipe)
    with pytest.raises(ll.AdapterStateError, match="unfuse_lora"):
        pipe.unload_lora_weights()
    assert fused.differences(photograph(pipe)) == []
    picture = render(pipe)
    twin = copy.deepcopy(pipe.unet)
    twin.unload_lora(keep_fused=True)
    assert adapter_layers(twin) == []
    pipe.unload_lora_weights(keep_fused=False)
    assert plain.differences(photograph(pipe)) == []
    pipe.load_lora_weights(files["a"].tensors, "a")
    pipe.fuse_lora()
    pipe.unload_lora_weights(keep_fused=True)
    assert adapter_layers(pipe.unet) == []
    assert torch.equal(render(pipe), picture)
    assert pipe.fused_loras == set()


def test_disabling_leaves_what_is_fused(pipe: Any, files: dict[str, Made]) -> None:
    for name in "ab":
        pipe.load_lora_weights(files[name].tensors, name)
    pipe.set_adapters(["a", "b"])
    pipe.fuse_lora(adapter_names=["a"])
    pipe.disable_lora()
    disabled = render(pipe)
    pipe.enable_lora()
    pipe.set_adapters("a")
    torch.testing.assert_close(render(pipe), disabled, rtol=1e-4, atol=1e-4)


def test_hotswapping_a_fused_adapter_is_refused(pipe: Any, files: dict[str, Made]) -> None:
    pipe.load_lora_weights(files["a"].tensors, "a")
    pipe.fuse_lora(components=["text_encoder"])
    before = photograph(pipe)
    with pytest.raises(ll.AdapterStateError, match="fused"):
        pipe.load_lora_weights(files["b"].tensors, "a", hotswap=True)
    assert before.differences(photograph(pipe)) == []


def test_a_fused_pipeline_saves_plain_keys(pipe: Any, files: dict[str, Made], tmp_path: Any) -> None:
    import diffusers

    keys = set(pipe.unet.state_dict())
    pipe.load_lora_weights(files["a"].tensors, "a")
    pipe.fuse_lora()
    pipe.unet.save_pretrained(tmp_path)
    read = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert set(read.state_dict()) == keys
    assert [k for k, v in bits(pipe.unet).items() if not torch.equal(v, read.state_dict()[k])] == []
    assert adapter_layers(pipe.unet)
    assert pipe.get_active_adapters() == ["a"]


def test_an_unfused_pipeline_saves_its_plain_weights(pipe: Any, files: dict[str, Made], tmp_path: Any) -> None:
    import diffusers

    before = bits(pipe.unet)
    pipe.load_lora_weights(files["a"].tensors, "a")
    pipe.unet.save_pretrained(tmp_path)
    read = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert changed_bits(before, read) == []


def test_biases_are_fused_and_come_back() -> None:
    model: Any = net(torch.bfloat16)
    before = bits(model)
    deltas = {"linear": some((12, 12), "bias", 1), "plain": some((12, 12), "bias", 2)}
    apply(plan_adapter({"model": model}, Adapter({"model": deltas})), "x")
    x = torch.randn(3, 12).bfloat16()
    unfused = model["linear"](x), model["plain"](x)
    fusing.fuse(model)
    assert model["plain"].base_layer.bias is not None
    for got, wanted in zip((model["linear"].base_layer(x), model["plain"].base_layer(x)), unfused, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.03, atol=0.03)
    fusing.unfuse(model)
    assert model["plain"].base_layer.bias is None
    assert changed_bits(before, model) == []


def test_a_bias_is_fused_into_a_norm_of_diffusers_that_has_none() -> None:
    model: Any = nn.ModuleDict({"norm": RMSNorm(12, 1e-6), "biased": RMSNorm(12, 1e-6, bias=True)}).double()
    before, x, change = bits(model), torch.randn(3, 12).double(), torch.randn(12).double()
    wanted = {path: norm(x) + change for path, norm in model.items()}
    apply(
        plan_adapter({"model": model}, Adapter({"model": {path: build({"bias": change}, None) for path in model}})), "x"
    )
    fusing.fuse(model)
    for path, norm in model.items():
        torch.testing.assert_close(norm.base_layer(x), wanted[path])
        torch.testing.assert_close(norm(x), wanted[path])
    fusing.unfuse(model)
    assert model["norm"].base_layer.bias is None
    assert changed_bits(before, model) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_record_is_far_smaller_than_a_copy(dtype: torch.dtype) -> None:
    """A realistic change has a root mean square of 1 % of the weight's; it takes 4 to 5 % of its bytes."""
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"it": nn.Linear(1024, 1024, bias=False)}).to(dtype).requires_grad_(False)
    weight = model["it"].weight
    down, up = torch.randn(4, 1024), torch.randn(1024, 4)
    size = 0.01 * weight.float().std() / (up @ down).std()
    apply(plan_adapter({"model": model}, Adapter({"model": {"it": build({"down": down, "up": up * size}, None)}})), "x")
    fusing.fuse(model)
    kept = model["it"].fused.memory()
    assert kept < 0.06 * weight.numel() * weight.element_size()


@pytest.mark.parametrize("size", [(63, 67), (62, 65), (64, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_record_of_any_size_gives_every_bit_back(dtype: torch.dtype, size: tuple[int, int]) -> None:
    """Misses are looked for in words of eight bytes; these weights end in the middle of one, at one, and in between."""
    torch.manual_seed(0)
    outputs, inputs = size
    model: Any = nn.ModuleDict({name: nn.Linear(inputs, outputs, bias=False) for name in "abc"}).to(dtype)
    before = bits(model)
    down, up = torch.randn(2, inputs) * 0.03, torch.randn(outputs, 2) * 0.03
    deltas = {name: build({"down": down, "up": up * (1 + number)}, None) for number, name in enumerate("abc")}
    apply(plan_adapter({"model": model}, Adapter({"model": deltas})), "x")
    fusing.fuse(model)
    assert all(model[name].fused.copy is None and model[name].fused.where.numel() for name in "abc")
    fusing.unfuse(model)
    assert changed_bits(before, model) == []


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_weight_that_was_changed_since_is_not_silently_restored_wrong(kind: str) -> None:
    model: Any = nn.ModuleDict({"linear": nn.Linear(128, 128)})  # of a smaller one a copy is kept in any case
    apply(plan_adapter({"model": model}, Adapter({"model": {"linear": some((128, 128), kind, 1)}})), "x")
    fusing.fuse(model)
    with torch.no_grad():
        model["linear"].base_layer.weight[3] += 1.0  # of one place alone the record may hold the original value
    changed = bits(model)
    with pytest.raises(ll.AdapterStateError, match="changed"):  # of DoRA a copy is kept: what was changed would be lost
        fusing.unfuse(model)
    assert changed_bits(changed, model) == []


def test_an_adapter_that_is_trained_while_fused_unfuses_exactly() -> None:
    model: Any = net(torch.float32)
    before = bits(model)
    apply(plan_adapter({"model": model}, Adapter({"model": {"linear": some((12, 12), "lora", 1)}})), "x")
    fusing.fuse(model)
    with torch.no_grad():
        for parameter in model["linear"].parameters_of("x"):
            parameter.mul_(2.0)
    fusing.unfuse(model)
    assert changed_bits(before, model) == []


def test_dora_beside_a_fused_adapter_uses_the_original_weight() -> None:
    model: Any = net(torch.float32)
    deltas = {name: some((12, 12), kind, seed) for seed, (name, kind) in enumerate({"x": "lora", "y": "dora"}.items())}
    for name, delta in deltas.items():
        apply(plan_adapter({"model": model}, Adapter({"model": {"linear": delta}})), name, requires_grad=name == "y")
    layer = model["linear"]
    layer.active = ("x", "y")
    refresh([layer])
    x = torch.randn(3, 12)
    wanted = layer(x).detach()
    fusing.fuse(model, ["x"])
    torch.testing.assert_close(layer(x).detach(), wanted)
    model.requires_grad_(False)
    torch.testing.assert_close(layer(x), wanted)


def test_a_copy_of_a_fused_model_unfuses_on_its_own(pipe: Any, files: dict[str, Made]) -> None:
    before = bits(pipe.unet)
    pipe.load_lora_weights(files["a"].tensors, "a")
    pipe.fuse_lora()
    twin = copy.deepcopy(pipe.unet)
    twin.unfuse_lora()
    assert changed_bits(before, twin) == []
    assert changed_bits(before, pipe.unet)


def test_a_packed_weight_is_refused_before_anything_is_fused() -> None:
    model: Any = nn.ModuleDict({"one": nn.Linear(12, 12), "two": nn.Linear(12, 12)})
    deltas = {"one": some((12, 12), "lora", 1), "two": some((12, 12), "lora", 2)}
    apply(plan_adapter({"model": model}, Adapter({"model": deltas})), "x")
    model["two"].base_layer.weight = nn.Parameter(torch.zeros(12, 6, dtype=torch.uint8), requires_grad=False)
    before = bits(model)
    with pytest.raises(ll.UnsupportedBaseError):
        fusing.fuse(model)
    assert changed_bits(before, model) == []


def test_merge_and_unload_leaves_a_plain_model(pipe: Any, files: dict[str, Made]) -> None:
    pipe.load_lora_weights(files["c"].tensors, "c")
    wanted = render(pipe)
    assert pipe.unet.merge_and_unload() is pipe.unet
    assert adapter_layers(pipe.unet) == []
    torch.testing.assert_close(render(pipe), wanted, rtol=1e-4, atol=1e-4)


def test_a_model_in_channels_last_is_fused_and_unfused_to_the_bit(pipe: Any, files: dict[str, Made]) -> None:
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.load_lora_weights(files["b"].tensors, "b")
    before, unfused = bits(pipe.unet), render(pipe)
    pipe.fuse_lora()
    assert changed_bits(before, pipe.unet)
    assert torch.allclose(render(pipe), unfused, atol=1e-5)
    pipe.unfuse_lora()
    assert changed_bits(before, pipe.unet) == []


def test_weights_are_fused_alike_in_batches_of_any_size(
    pipe: Any, files: dict[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bits(pipe.unet)
    pipe.load_lora_weights(files["a"].tensors, "a")
    pipe.fuse_lora()
    fused = bits(pipe.unet)
    pipe.unfuse_lora()
    for elements in (1, 300):
        monkeypatch.setattr(records, "LARGEST", elements)
        pipe.fuse_lora()
        assert changed_bits(fused, pipe.unet) == []
        pipe.unfuse_lora()
        assert changed_bits(before, pipe.unet) == []


def test_unfusing_in_another_dtype_says_how_to_get_every_bit_back(pipe: Any, files: dict[str, Made]) -> None:
    pipe.unet.to(torch.bfloat16)
    pipe.load_lora_weights(files["c"].tensors, "c")
    before = bits(pipe.unet)
    pipe.fuse_lora(components=["unet"])
    pipe.unet.to(torch.float32)
    with pytest.raises(ll.AdapterStateError, match=r"Call \.to\(torch\.bfloat16\) first"):
        pipe.unfuse_lora(components=["unet"])
    pipe.unet.to(torch.bfloat16)
    pipe.unfuse_lora(components=["unet"])
    assert changed_bits(before, pipe.unet) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [0.005, 0.1])
def test_what_is_kept_for_unfusing_never_takes_more_than_a_copy_of_the_weights(
    dtype: torch.dtype, scale: float
) -> None:
    torch.manual_seed(0)
    model: Any = ll.attach(nn.ModuleDict({f"l{n}": nn.Linear(512, 512, bias=False) for n in range(4)}).to(dtype))
    tensors = {}
    for n in range(4):
        strength = scale if n else 0.001  # the first one's record is small in any case
        tensors[f"l{n}.lora_A.weight"] = torch.randn(16, 512) * strength
        tensors[f"l{n}.lora_B.weight"] = torch.randn(512, 16) * strength
    model.load_lora_adapter(tensors, prefix=None)
    before = bits(model)
    model.fuse_lora()
    memories: dict[int, int] = {}
    for _, layer in adapter_layers(model):
        fused = layer.fused
        change = fused.change
        for tensor in (fused.where, fused.values, fused.copy, *((change.down, change.up) if change else ())):
            if tensor is not None:
                memories[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert sum(memories.values()) <= sum(tensor.nbytes for tensor in before.values())
    model.unfuse_lora()
    assert changed_bits(before, model) == []


class Tied(nn.Module):
    """Two layers over one weight, as T5's embeddings are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.b.weight = self.a.weight


def test_a_weight_of_two_modules_is_not_fused_into_for_one_of_them() -> None:
    model: Any = ll.attach(Tied())
    torch.manual_seed(0)
    tensors = {f"{m}.lora_{side}.weight": torch.randn(8, 8) for m in "ac" for side in "AB"}
    model.load_lora_adapter(tensors, prefix=None, adapter_name="x")
    before = bits(model)

    with pytest.raises(ll.UnsupportedBaseError, match="several modules") as caught:
        model.fuse_lora()

    assert list(caught.value.problems) == ["a.base_layer", "b"]
    assert changed_bits(before, model) == []
    model.delete_adapters("x")
    model.load_lora_adapter({k: v for k, v in tensors.items() if k[0] == "c"}, prefix=None, adapter_name="c")
    model.fuse_lora()
    assert changed_bits(before, model) == ["c.weight"]
    model.unfuse_lora()
    assert changed_bits(before, model) == []


def test_unfusing_after_a_narrowing_cast_promises_nothing(pipe: Any, files: dict[str, Made]) -> None:
    pipe.load_lora_weights(files["c"].tensors, "c")
    pipe.fuse_lora(components=["unet"])
    pipe.unet.to(torch.bfloat16)
    with pytest.raises(ll.AdapterStateError, match="lost bits for good"):
        pipe.unfuse_lora(components=["unet"])


def test_a_pruned_factor_is_switched_and_fused_as_it_is_pruned() -> None:
    torch.manual_seed(0)
    model: Any = ll.attach(nn.ModuleDict({"l": nn.Linear(16, 16, bias=False)}))
    model.load_lora_adapter(
        {"l.lora_A.weight": torch.randn(4, 16), "l.lora_B.weight": torch.randn(16, 4)}, prefix=None, adapter_name="x"
    )
    layer, x = model["l"], torch.randn(2, 16)
    prune.l1_unstructured(layer.lora_A["x"], "weight", 0.5)

    model.set_adapters("x", 0.5)

    down, up = layer.lora_A["x"].weight, layer.lora_B["x"].weight
    assert int((down == 0).sum()) == 32
    expected = x @ (layer.base_layer.weight + 0.5 * up @ down).t()
    torch.testing.assert_close(layer(x), expected)
    model.fuse_lora()
    torch.testing.assert_close(layer(x), expected)


SIDES = {"A": (2, 64), "B": (64, 2)}


def stack(layers: int) -> Any:
    torch.manual_seed(0)
    model: Any = ll.attach(nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(layers)]).requires_grad_(False))
    factors = {
        f"{n}.lora_{side}.weight": 0.1 * torch.randn(shape) for n in range(layers) for side, shape in SIDES.items()
    }
    model.load_lora_adapter(factors, prefix=None, adapter_name="a")
    model.fuse_lora()
    assert all(len(model[n].fused.where) for n in range(layers))
    return model


def test_a_pickle_of_a_fused_model_grows_with_its_layers_and_not_with_their_square(tmp_path: Any) -> None:
    def size(thing: Any) -> int:
        torch.save(thing, tmp_path / "model.pt")
        written = (tmp_path / "model.pt").stat().st_size
        assert abs(len(pickle.dumps(thing)) - written) < 0.1 * written + 100_000
        return written

    small, large = stack(20), stack(40)
    assert size(large) < 2.1 * size(small)
    assert size(large[0]) < 1.1 * size(small[0]) + 4096
    for own in (copy.deepcopy(large[0]).fused, pickle.loads(pickle.dumps(large[0])).fused):
        for tensor in (own.where, own.values, own.checksum, own.change.down, own.change.up):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_fused_model_read_from_a_pickle_is_unfused_to_the_bit() -> None:
    torch.manual_seed(0)
    plain = [layer.weight.clone() for layer in nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(3)])]
    for twin in (pickle.loads(pickle.dumps(stack(3))), copy.deepcopy(stack(3))):
        assert not any(torch.equal(layer.weight, weight) for layer, weight in zip(twin, plain, strict=True))
        twin.unfuse_lora()
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(twin, plain, strict=True))
