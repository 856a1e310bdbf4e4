"""Plan touches nothing, apply is all or nothing, detach gives everything back."""

import copy
import gc
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from tiny_models import Made, adapter_file, components_of, flux, photograph, pipeline, render
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders import attaching, widening
from lora_loaders.adapter import Adapter
from lora_loaders.attaching import apply, detach_adapters
from lora_loaders.deltas import build
from lora_loaders.errors import MalformedAdapterError
from lora_loaders.layers.banks import Bank
from lora_loaders.layers.layer import AdapterLayer
from lora_loaders.layout import ModelLayout, adapter_layers, named_bases
from lora_loaders.plans import plan_adapter


@pytest.fixture
def pipe() -> Any:
    return ll.attach(pipeline("sd15"))


@pytest.fixture
def made(pipe: Any) -> Made:
    return adapter_file(pipe)


def lora(out: int, inputs: int, rank: int = 2) -> Any:
    return build({"down": torch.randn(rank, inputs), "up": torch.randn(out, rank)}, None)


def adapter_of(**deltas: Any) -> Adapter:
    return Adapter({"model": {path.replace("__", "."): delta for path, delta in deltas.items()}}, source="a test")


def small() -> nn.Module:
    norm = nn.LayerNorm(6, elementwise_affine=False)
    return nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 4), "n": norm, "act": nn.SiLU()})


# Plan


def test_plan_touches_nothing(pipe: Any, made: Made) -> None:
    before = photograph(pipe)
    versions = [p._version for model in components_of(pipe).values() for p in model.parameters()]
    plan = ll.plan(pipe, made.tensors)
    assert len(plan.matched) == sum(map(len, made.changes.values()))
    assert before.differences(photograph(pipe)) == []
    assert versions == [p._version for model in components_of(pipe).values() for p in model.parameters()]


def test_plan_works_on_the_meta_device(made: Made) -> None:
    with torch.device("meta"):
        model = pipeline("sd15").unet
    plan = ll.plan(model, made.tensors)
    assert plan.components == {"unet": len(made.changes["unet"])}
    assert not plan.problems


def test_every_problem_is_gathered_into_one_error() -> None:
    model = small()
    adapter = adapter_of(a=lora(6, 5), b=lora(3, 6), n=build({"diff": torch.ones(6)}, None), act=lora(6, 6))
    plan = plan_adapter({"model": model}, adapter)
    assert len(plan.problems) == 4
    with pytest.raises(ll.AdapterMismatchError) as error:
        apply(plan, "x")
    assert error.value.problems == plan.problems
    for part in ("model.a", "(6, 5)", "(6, 4)", "model.b", "model.n", "model.act", "The model was not changed."):
        assert part in str(error.value)


def test_a_bias_of_another_length_is_a_problem() -> None:
    plan = plan_adapter({"model": small()}, adapter_of(a=build({"bias": torch.ones(5)}, None)))
    assert len(plan.problems) == 1
    both = build({"down": torch.ones(2, 4), "up": torch.ones(6, 2), "bias": torch.ones(5)}, None)
    assert len(plan_adapter({"model": small()}, adapter_of(a=both)).problems) == 1


def test_an_unknown_module_is_named_with_the_nearest_one() -> None:
    plan = ll.plan(
        flux(), {f"transformer.transformer_blocks.0.attn.to_qq.lora_{s}.weight": torch.ones(32, 32) for s in "AB"}
    )
    assert list(plan.unmatched) == ["transformer.transformer_blocks.0.attn.to_qq"]
    assert "transformer_blocks.0.attn.to_q" in plan.unmatched["transformer.transformer_blocks.0.attn.to_qq"]


def test_the_layout_sees_through_adapters(pipe: Any, made: Made) -> None:
    before = [name for name, _ in named_bases(pipe.unet)]
    layout = ModelLayout({"unet": pipe.unet})
    rows = {path: layout.rows("unet", path) for path in made.changes["unet"]}
    pipe.load_lora_weights(made.tensors, "a")
    assert [name for name, _ in named_bases(pipe.unet)] == before
    assert {path: layout.rows("unet", path) for path in made.changes["unet"]} == rows


# Apply


class Injected(Exception):
    pass


def raising_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> Callable[[], bool]:
    """Let the given call of a function raise; returns whether it did."""
    original = getattr(owner, name)
    calls: list[int] = []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise Injected
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return lambda: len(calls) >= call


STEPS = [
    (AdapterLayer, "__init__", 1),
    (AdapterLayer, "__init__", 40),
    (AdapterLayer, "add", 1),
    (AdapterLayer, "add", 88),
    (torch.Tensor, "_make_subclass", 1),  # which each parameter is made by
    (torch.Tensor, "_make_subclass", 2),
    (torch.Tensor, "_make_subclass", 101),
    (attaching, "_settled", 1),
    (attaching, "refresh", 1),
    (torch, "_foreach_copy_", 1),
    (torch, "stack", 1),
    (Bank, "empty", 1),
    (Bank, "write", 1),
    (Bank, "write", 3),
]


@pytest.mark.parametrize(("owner", "name", "call"), STEPS, ids=[f"{s[1]} {s[2]}" for s in STEPS])
@pytest.mark.parametrize("loaded", [0, 2], ids=["fresh", "beside two others"])
def test_an_exception_at_any_step_leaves_everything_as_it_was(
    pipe: Any, made: Made, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, loaded: int
) -> None:
    for number in range(loaded):
        other = adapter_file(pipeline("sd15"), seed=number + 5, only="to_q")
        pipe.load_lora_weights(other.tensors, f"other{number}")
    if loaded:
        pipe.set_adapters(["other1", "other0"], [0.5, -1.0])
        pipe.disable_lora()
    before = photograph(pipe)
    with torch.no_grad():
        picture = pipe.unet(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 3, 32)).sample
    with monkeypatch.context() as patch:
        happened = raising_at(patch, owner, name, call)
        if owner is AdapterLayer and name == "__init__" and call > 1 and loaded:
            call = 1
        with pytest.raises(Injected):
            pipe.load_lora_weights(made.tensors, "new")
        assert happened()
    assert before.differences(photograph(pipe)) == []
    with torch.no_grad():
        assert torch.equal(pipe.unet(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 3, 32)).sample, picture)
    pipe.load_lora_weights(made.tensors, "new")


def test_an_interrupt_is_undone_as_an_error_is(pipe: Any, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(layers: Any) -> None:
        raise KeyboardInterrupt

    before = photograph(pipe)
    with monkeypatch.context() as patch:
        patch.setattr(attaching, "_settled", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipe.load_lora_weights(made.tensors, "a")
    assert before.differences(photograph(pipe)) == []


@pytest.mark.parametrize("name", ["", "a.b", "keys", "pop", "items", "training", "forward"])
def test_a_name_that_cannot_be_part_of_a_parameters_name_is_refused(pipe: Any, made: Made, name: str) -> None:
    before = photograph(pipe)
    with pytest.raises(ll.AdapterStateError, match="cannot name an adapter"):
        pipe.load_lora_weights(made.tensors, name)
    assert before.differences(photograph(pipe)) == []


@pytest.mark.parametrize(
    "name", ["0", "a", "lora_A", "lora_B", "weight", "base_layer", "default", "to_q", "Größe", "a b"]
)
def test_a_name_that_is_part_of_other_names_is_no_trouble(pipe: Any, made: Made, name: str) -> None:
    before = photograph(pipe)
    pipe.load_lora_weights(made.tensors, name)
    assert pipe.get_active_adapters() == [name]
    assert any(key.endswith(f"lora_A.{name}.weight") for key in pipe.unet.state_dict())
    pipe.delete_adapters(name)
    assert before.differences(photograph(pipe)) == []


def test_parameters_share_no_memory_with_the_caller_or_each_other(pipe: Any) -> None:
    shared = torch.randn(4, 16)
    tensors: dict[str, Tensor] = {}
    for name in ("to_q", "to_k", "to_v"):
        stem = f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.{name}"
        tensors |= {f"{stem}.lora_A.weight": shared, f"{stem}.lora_B.weight": torch.randn(16, 4)}
    pipe.load_lora_weights(tensors, "a")
    own = [p for name, p in pipe.unet.named_parameters() if "lora_" in name]
    assert len(own) == 6
    spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in own)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))
    outside = {(t.data_ptr()) for t in tensors.values()}
    assert not outside & {p.data_ptr() for p in own}
    kept = {key: t.clone() for key, t in tensors.items()}
    with torch.no_grad():
        for parameter in own:
            parameter.zero_()
    assert all(torch.equal(kept[key], tensors[key]) for key in kept)


def test_the_callers_dictionary_and_adapter_stay_as_they_are(pipe: Any, made: Made) -> None:
    keys, tensors = list(made.tensors), {key: (t, t.clone()) for key, t in made.tensors.items()}
    pipe.load_lora_weights(made.tensors, "a")
    assert list(made.tensors) == keys
    assert all(made.tensors[key] is t and torch.equal(t, twin) for key, (t, twin) in tensors.items())


def test_an_inference_load_leaves_the_gradients_of_the_base_alone(pipe: Any, made: Made) -> None:
    pipe.unet.conv_in.requires_grad_(False)
    before = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    pipe.load_lora_weights(made.tensors, "a")
    after = {n.replace("base_layer.", ""): p.requires_grad for n, p in pipe.unet.named_parameters() if "lora_" not in n}
    assert after == before
    assert not any(p.requires_grad for name, p in pipe.unet.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("training", [False, True])
def test_new_modules_inherit_the_mode(pipe: Any, made: Made, training: bool) -> None:
    pipe.unet.train(training)
    pipe.load_lora_weights(made.tensors, "a")
    assert {module.training for module in pipe.unet.modules()} == {training}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_take_the_models_dtype(pipe: Any, made: Made, dtype: torch.dtype) -> None:
    pipe.unet.to(dtype)
    pipe.load_lora_weights(made.tensors, "a")
    assert {p.dtype for p in pipe.unet.parameters()} == {dtype}


# Detach


def test_detach_gives_back_the_same_objects_and_bits(pipe: Any, made: Made) -> None:
    pipe.unet.conv_in.register_forward_hook(lambda *a: None)
    pipe.unet.conv_in.weight.grad = torch.ones_like(pipe.unet.conv_in.weight)
    parameters = [id(p) for model in components_of(pipe).values() for p in model.parameters()]
    before = photograph(pipe)
    for name in "abc":
        pipe.load_lora_weights(made.tensors, name)
    assert sum(len(adapter_layers(model)) for model in components_of(pipe).values()) == sum(
        map(len, made.changes.values())
    )
    pipe.set_adapters(["a", "c"], [0.5, 2.0])
    pipe.unload_lora_weights()
    assert before.differences(photograph(pipe)) == []
    assert parameters == [id(p) for model in components_of(pipe).values() for p in model.parameters()]
    assert len(pipe.unet.conv_in._forward_hooks) == 1
    assert pipe.unet.conv_in.weight.grad is not None


def test_the_last_adapter_of_a_layer_takes_the_wrapper_with_it(pipe: Any) -> None:
    queries = adapter_file(pipe, only="to_q", components=["unet"])
    keys = adapter_file(pipe, only="to_k|to_q", components=["unet"])
    pipe.load_lora_weights(queries.tensors, "q")
    pipe.load_lora_weights(keys.tensors, "qk")
    pipe.delete_adapters("qk")
    assert {path for path, _ in adapter_layers(pipe.unet)} == set(queries.changes["unet"])
    pipe.delete_adapters("q")
    assert adapter_layers(pipe.unet) == []


def test_nothing_of_an_adapter_stays_in_memory() -> None:
    model = small()
    delta = lora(6, 4)
    apply(plan_adapter({"model": model}, adapter_of(a=delta)), "x")
    layer: Any = model["a"]  # type: ignore[index]
    watched = [weakref.ref(parameter) for parameter in layer.parameters_of("x")]
    detach_adapters(model)
    del layer
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_a_module_in_two_places_is_wrapped_in_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = nn.Linear(4, 4)

    model = Twice()
    base = model.one
    apply(plan_adapter({"model": model}, adapter_of(one=lora(4, 4), two=lora(4, 4))), "x")
    assert model.one is not model.two
    assert model.one.base_layer is model.two.base_layer is base
    detach_adapters(model)
    assert model.one is model.two is base


def test_a_hook_on_the_base_goes_on_working(pipe: Any, made: Made) -> None:
    seen: list[int] = []
    path = next(path for path in made.changes["unet"] if path.endswith("to_q"))
    pipe.unet.get_submodule(path).register_forward_hook(lambda *a: seen.append(1))
    pipe.load_lora_weights(made.tensors, "a")
    with torch.no_grad():
        pipe.unet(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 3, 32))
    assert seen


# Widening


def control_file(pipe: Any, inputs: int = 32, seed: int = 3) -> Made:
    made = adapter_file(pipe, components=["transformer"], only="attn", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(4, inputs, generator=generator) * 0.3, torch.randn(32, 4, generator=generator) * 0.3
    stem = "transformer.x_embedder"
    made.tensors.update({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up})
    made.changes["transformer"]["x_embedder"] = up.double() @ down.double()
    return made


def widened_by_hand(pipe: Any, inputs: int = 32) -> Any:
    """The oracle: a transformer that had the wide layer from the start."""
    model = flux(in_channels=inputs)
    state = pipe.transformer.state_dict()
    state["x_embedder.weight"] = torch.nn.functional.pad(state["x_embedder.weight"], (0, inputs - 16))
    model.load_state_dict(state)
    return model


def flux_inputs(channels: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "hidden_states": torch.randn(1, 16, channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, 6, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
        "guidance": torch.tensor([3.5]),
    }


def test_a_control_file_widens_the_input_layer_and_the_configuration() -> None:
    pipe: Any = pipeline("flux1-control")
    by_hand = widened_by_hand(pipe)
    ll.attach(pipe)
    made = control_file(pipe)
    before = photograph(pipe)
    pipe.load_lora_weights(made.tensors, "control")
    assert pipe.transformer.config.in_channels == 32
    assert pipe.transformer.x_embedder.in_features == 32
    with torch.no_grad():
        for path, change in made.changes["transformer"].items():
            weight: Any = by_hand.get_submodule(path).weight
            weight += change.float()
        wanted = by_hand(**flux_inputs(32)).sample
        torch.testing.assert_close(pipe.transformer(**flux_inputs(32)).sample, wanted, rtol=1e-5, atol=1e-6)
    pipe.unload_lora_weights()
    assert pipe.transformer.config.in_channels == 16
    assert before.differences(photograph(pipe)) == []


def test_an_empty_slot_that_stays_is_as_narrow_as_before_a_control_file() -> None:
    pipe: Any = ll.attach(pipeline("flux1-control"))
    with torch.no_grad():
        plain = pipe.transformer(**flux_inputs(16)).sample
        pipe.enable_lora_hotswap(target_rank=8)
        for _ in range(2):
            pipe.load_lora_weights(control_file(pipe).tensors, "control")
            pipe.delete_adapters("control")
            assert pipe.transformer.config.in_channels == 16
            assert torch.equal(pipe.transformer(**flux_inputs(16)).sample, plain)


def test_a_model_is_saved_wide_only_if_what_widened_it_is_fused(tmp_path: Path) -> None:
    pipe: Any = ll.attach(pipeline("flux1-control"))
    model = pipe.transformer
    plain = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    pipe.load_lora_weights(control_file(pipe).tensors, "control")
    before = photograph(pipe)
    model.save_pretrained(tmp_path / "unfused")
    # Saving notes class and version in the configuration.
    assert set(before.differences(photograph(pipe))) <= {"configs"}
    assert (model.config.in_channels, model.x_embedder.in_features) == (32, 32)
    pipe.fuse_lora()
    fused = {key.replace(".base_layer", ""): t.clone() for key, t in model.state_dict().items() if "lora_" not in key}
    model.save_pretrained(tmp_path / "fused")
    for folder, channels, weights in (("unfused", 16, plain), ("fused", 32, fused)):
        saved = type(model).from_pretrained(tmp_path / folder)
        assert saved.config.in_channels == channels
        assert saved.state_dict().keys() == weights.keys()
        assert all(torch.equal(tensor, weights[key]) for key, tensor in saved.state_dict().items()), folder


def test_a_control_file_is_a_clear_error_for_a_plain_pipeline() -> None:
    pipe: Any = ll.attach(pipeline("flux1"))
    before = photograph(pipe)
    with pytest.raises(ll.AdapterMismatchError, match="FluxControlPipeline"):
        pipe.load_lora_weights(control_file(pipe).tensors, "control")
    assert before.differences(photograph(pipe)) == []


def test_a_narrow_adapter_goes_onto_a_widened_model() -> None:
    pipe: Any = ll.attach(pipeline("flux1-control"))
    narrow = adapter_file(pipe, components=["transformer"], only="x_embedder|to_q", seed=8)
    by_hand = widened_by_hand(pipe)
    pipe.load_lora_weights(narrow.tensors, "before")
    pipe.load_lora_weights(control_file(pipe).tensors, "control")
    pipe.load_lora_weights(narrow.tensors, "after")
    with torch.no_grad():
        for path, change in narrow.changes["transformer"].items():
            weight: Any = by_hand.get_submodule(path).weight
            weight[:, : change.shape[1]] += change.float()
        wanted = by_hand(**flux_inputs(32)).sample
        for name in ("before", "after"):
            pipe.set_adapters(name)
            torch.testing.assert_close(pipe.transformer(**flux_inputs(32)).sample, wanted, rtol=1e-5, atol=1e-6)
        pipe.set_adapters(["before", "control", "after"], [0.5, 0.0, 0.5])
        torch.testing.assert_close(pipe.transformer(**flux_inputs(32)).sample, wanted, rtol=1e-5, atol=1e-6)


def test_a_failed_control_load_narrows_everything_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = ll.attach(pipeline("flux1-control"))
    pipe.load_lora_weights(adapter_file(pipe, components=["transformer"], only="x_embedder").tensors, "a")
    before = photograph(pipe)
    for owner, name in ((attaching, "_settled"), (widening, "_widened"), (attaching, "refresh")):
        with monkeypatch.context() as patch:
            raising_at(patch, owner, name, 1)
            with pytest.raises(Injected):
                pipe.load_lora_weights(control_file(pipe).tensors, "control")
        assert before.differences(photograph(pipe)) == []


def test_a_fused_input_layer_is_not_widened() -> None:
    pipe: Any = ll.attach(pipeline("flux1-control"))
    pipe.load_lora_weights(adapter_file(pipe, components=["transformer"], only="x_embedder").tensors, "a")
    pipe.fuse_lora()
    before = photograph(pipe)
    with pytest.raises(ll.AdapterMismatchError, match="unfuse_lora"):
        pipe.load_lora_weights(control_file(pipe).tensors, "control")
    assert before.differences(photograph(pipe)) == []


def test_a_widened_and_fused_layer_stays_wide_where_fusing_is_kept() -> None:
    pipe: Any = ll.attach(pipeline("flux1-control"))
    pipe.load_lora_weights(control_file(pipe).tensors, "control")
    pipe.fuse_lora()
    with torch.no_grad():
        wanted = pipe.transformer(**flux_inputs(32)).sample
        pipe.unload_lora_weights(keep_fused=True)
        assert type(pipe.transformer.x_embedder) is nn.Linear
        assert pipe.transformer.config.in_channels == 32
        assert torch.equal(pipe.transformer(**flux_inputs(32)).sample, wanted)


def test_a_widened_layer_narrows_in_the_dtype_it_has_by_then() -> None:
    pipe: Any = ll.attach(pipeline("flux1-control"))
    weight = pipe.transformer.x_embedder.weight.detach().clone()
    pipe.load_lora_weights(control_file(pipe).tensors, "control")
    assert not [key for key in pipe.transformer.state_dict() if "narrow" in key]
    pipe.transformer.to(torch.bfloat16)
    pipe.unload_lora_weights()
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    assert torch.equal(pipe.transformer.x_embedder.weight, weight.bfloat16())


def test_a_copy_of_an_adapted_model_is_independent(pipe: Any, made: Made) -> None:
    hooks = list(pipe.unet._forward_pre_hooks.values())
    pipe.load_lora_weights(made.tensors, "a")
    twin = copy.deepcopy(pipe.unet)
    before = photograph(pipe)
    twin.delete_adapters("a")
    assert adapter_layers(twin) == []
    assert list(twin._forward_pre_hooks.values()) == hooks
    assert before.differences(photograph(pipe)) == []


@pytest.mark.parametrize("shape", [(7, 1), (5,), (1, 1), (1, 5)])
def test_a_dora_magnitude_of_another_size_is_a_problem_of_the_plan(shape: tuple[int, ...]) -> None:
    model = nn.ModuleDict({"it": nn.Linear(16, 32)})
    slots = {"down": torch.randn(2, 16), "up": torch.randn(32, 2), "magnitude": torch.rand(shape)}
    plan = plan_adapter({"m": model}, Adapter({"m": {"it": build(slots, 1.0)}}))
    assert [str(shape) in problem for problem in plan.problems] == [True]


def test_a_factor_of_six_axes_is_malformed() -> None:
    with pytest.raises(MalformedAdapterError, match="do not multiply"):
        build({"down": torch.randn(2, 16, 1, 1, 1, 1), "up": torch.randn(32, 2)}, 1.0)


def test_savers_of_whole_state_dictionaries_keep_every_parameter(pipe: Any, made: Made, tmp_path: Path) -> None:
    pipe.load_lora_weights(made.tensors, "a")
    save_model(pipe.unet, str(tmp_path / "model.safetensors"))
    saved = load_file(tmp_path / "model.safetensors")
    own = {key: tensor for key, tensor in pipe.unet.state_dict().items() if "lora_" in key}
    assert own
    assert [key for key, tensor in own.items() if key not in saved or not torch.equal(saved[key], tensor)] == []


# Inference mode


def changes_in_inference_mode() -> dict[str, Callable[[Any, Made], object]]:
    return {
        "load": lambda pipe, made: pipe.load_lora_weights(made.tensors, "b"),
        "delete": lambda pipe, made: (pipe.load_lora_weights(made.tensors, "b"), pipe.delete_adapters("a")),
        "fuse and unfuse": lambda pipe, made: (pipe.fuse_lora(), pipe.unfuse_lora()),
        "move": lambda pipe, made: pipe.set_lora_device(["a"], "cpu"),
        "follow": lambda pipe, made: pipe.set_adapters("a", lambda progress: progress),
    }


@pytest.mark.parametrize("change", changes_in_inference_mode())
@pytest.mark.parametrize("algebra", ["lora", "dora"])
def test_what_inference_mode_made_can_be_written_to_outside(change: str, algebra: str, pipe: Any, made: Made) -> None:
    if algebra == "dora":
        sizes = {key: len(tensor) for key, tensor in made.tensors.items() if "lora_B" in key}
        made.tensors.update({k.replace("lora_B.weight", "dora_scale"): torch.ones(n, 1) for k, n in sizes.items()})
    with torch.inference_mode():
        pipe.load_lora_weights(made.tensors, "a")
        changes_in_inference_mode()[change](pipe, made)
    names = pipe.get_list_adapters()["unet"]
    for weight in (0.5, 0.25):
        pipe.set_adapters(names, [weight] * len(names))
    pipe.load_lora_weights(made.tensors, names[-1], hotswap=True)
    plain = ll.attach(pipeline("sd15"))
    for name in names:
        plain.load_lora_weights(made.tensors, name)
    plain.set_adapters(names, [0.25] * len(names))
    assert torch.equal(render(pipe), render(plain))
