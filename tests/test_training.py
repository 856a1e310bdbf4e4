"""Which adapters train: gradients follow what is active among those that `add_adapter` made."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import adapter_file, patching, pipeline, unet
from torch import Tensor, nn

import lora_loaders as ll
import lora_loaders.attaching as attaching
from lora_loaders.layout import adapter_layers

GEN = ll.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False)
FAKE = ll.LoraConfig(r=3, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)


def run(model: Any, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 32, generator=generator)
    return model(x, 1, context).sample


def trained(model: nn.Module) -> set[str]:
    """Names of the adapters that have gradients; of a parameter that is no adapter's the whole name."""
    wanted = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name.split(".")[-2] if ".lora_" in name else name for name in wanted}


def of_unet(seed: int = 0) -> dict[str, Tensor]:
    return dict(adapter_file(pipeline("sd15"), components=["unet"], scale=0.1, seed=seed).tensors)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    made: Any = ll.attach(unet())
    made.load_lora_adapter(of_unet(), adapter_name="loaded")
    made.add_adapter(GEN, "gen")
    made.add_adapter(FAKE, "fake")
    return made


SWITCHES: list[tuple[Callable[[Any], object], set[str]]] = [
    (lambda m: m.set_adapter("gen"), {"gen"}),
    (lambda m: m.set_adapter("fake"), {"fake"}),
    (lambda m: m.set_adapter(["gen", "fake"]), {"gen", "fake"}),
    (lambda m: m.set_adapters(["gen"], [0.5]), {"gen"}),
    (lambda m: m.set_adapters(["loaded", "fake"]), {"fake"}),
    (lambda m: m.disable_adapters(), set()),
    (lambda m: m.enable_adapters(), {"fake"}),
    (lambda m: m.disable_lora(), set()),
    (lambda m: m.enable_lora(), {"fake"}),
    (lambda m: m.set_adapter("loaded"), set()),
    (lambda m: m.set_adapter("gen"), {"gen"}),
    (lambda m: m.load_lora_adapter(of_unet(1), adapter_name="another"), set()),
    (lambda m: m.set_adapter(["another", "gen", "fake"]), {"gen", "fake"}),
    (lambda m: m.delete_adapters("fake"), {"gen"}),
    (lambda m: m.delete_adapters("another"), {"gen"}),
]


def test_gradients_follow_the_active_adapters(model: Any) -> None:
    assert trained(model) == {"fake"}
    for switch, expected in SWITCHES:
        switch(model)
        assert trained(model) == expected
        loss = run(model).square().mean()
        assert loss.requires_grad == bool(expected)
        model.zero_grad()
        if expected:
            loss.backward()
        got = {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert got == expected
    model.unload_lora()
    assert trained(model) == {name for name, _ in unet().named_parameters()}  # as it came


@pytest.mark.parity
def test_the_gradients_are_pefts() -> None:
    peft = pytest.importorskip("peft", reason="parity with PEFT needs PEFT (scripts/setup_peers)")
    torch.manual_seed(0)
    theirs: Any = unet()
    for name, config in (("gen", GEN), ("fake", FAKE)):
        fields = ("r", "lora_alpha", "target_modules", "init_lora_weights")
        theirs.add_adapter(peft.LoraConfig(**{field: getattr(config, field) for field in fields}), name)
    ours: Any = ll.attach(unet())
    ours.add_adapter(GEN, "gen")
    ours.add_adapter(FAKE, "fake")
    ours.load_state_dict(theirs.state_dict())
    switches: list[Callable[[Any], object]] = [
        lambda m: m.set_adapter("gen"),
        lambda m: m.set_adapter("fake"),
        lambda m: m.set_adapters(["gen", "fake"], [0.5, -0.75]),
        lambda m: m.disable_adapters(),
        lambda m: m.enable_adapters(),
        lambda m: m.set_adapters("fake", 0.25),
        lambda m: m.set_adapter("gen"),
        lambda m: m.delete_adapters("fake"),
    ]
    for switch in switches:
        gradients: list[dict[str, Tensor]] = []
        for m in (theirs, ours):
            switch(m)
            m.zero_grad()
            loss = run(m).square().mean()
            if loss.requires_grad:
                loss.backward()
            gradients.append({name: p.grad for name, p in m.named_parameters() if p.grad is not None})
        assert trained(theirs) == trained(ours)
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_alternating_steps_have_the_formulas_gradients() -> None:
    torch.manual_seed(0)
    net: Any = ll.attach(nn.Sequential(nn.Linear(5, 3, dtype=torch.float64)))
    for name in ("gen", "fake"):
        net.add_adapter(ll.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False), name)
    optimisers = {
        name: torch.optim.SGD(next(layer for _, layer in adapter_layers(net)).parameters_of(name), 0.01)
        for name in ("gen", "fake")
    }
    x, goal = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for name in ("gen", "fake", "gen", "fake"):
        net.set_adapter(name)
        optimisers[name].zero_grad()
        down, up = (getattr(net[0], factor)[name].weight for factor in ("lora_A", "lora_B"))
        out = net(x)
        (out - goal).square().sum().backward()
        slope = 2 * (x @ net[0].weight.T + net[0].bias + 3 * x @ down.T @ up.T - goal).detach()
        torch.testing.assert_close(up.grad, 3 * slope.T @ (x @ down.detach().T))
        torch.testing.assert_close(down.grad, 3 * up.detach().T @ slope.T @ x)
        optimisers[name].step()


def test_a_backward_finds_what_its_forward_saw_after_others_were_active(model: Any) -> None:
    """As in distillation: the generator's graph waits while other adapters, or none, score what it made."""

    def gradients(score: Callable[[], object]) -> dict[str, Tensor]:
        model.zero_grad()
        model.set_adapters(["loaded", "gen"], [1.0, 0.5])
        made = run(model)
        with torch.no_grad():
            score()
        model.set_adapters(["loaded", "gen"], [1.0, 0.5])
        made.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def score() -> None:
        for names in (["loaded", "fake"], ["loaded"]):
            model.set_adapters(names, 0.3)
            run(model)
        model.disable_adapters()
        run(model)

    plain, alternated = gradients(lambda: None), gradients(score)
    assert all(".gen." in name for name in plain)
    assert plain.keys() == alternated.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(alternated[name], gradient)


@pytest.mark.parametrize("patched", [False, True])
def test_a_pipelines_switches_move_training_in_every_component(patched: bool) -> None:
    with patching() if patched else nullcontext():
        pipe: Any = pipeline("sd15") if patched else ll.attach(pipeline("sd15"))
        for name in ("one", "two"):
            pipe.unet.add_adapter(ll.LoraConfig(r=2, target_modules=["to_q"]), name)
            pipe.text_encoder.add_adapter(ll.LoraConfig(r=2, target_modules=["q_proj"]), name)
        both = (pipe.unet, pipe.text_encoder)
        for switch, expected in (
            (lambda: pipe.set_adapters("one"), {"one"}),
            (lambda: pipe.set_adapters(["one", "two"], [{"unet": 0.5}, 1.0]), {"one", "two"}),
            (pipe.disable_lora, set[str]()),
            (pipe.enable_lora, {"one", "two"}),
            (lambda: pipe.delete_adapters("two"), {"one"}),
        ):
            switch()
            assert [trained(component) for component in both] == [expected, expected]
        with pytest.raises(ll.LoraLoadersError):
            pipe.set_adapters("one", [{"unet": {"nowhere": 1.0}}])
        assert [trained(component) for component in both] == [{"one"}, {"one"}]


def test_a_layers_own_switch_moves_its_training(model: Any) -> None:
    for _, layer in adapter_layers(model):
        layer.set_adapter("gen")
    assert trained(model) == {"gen"}


def test_loaded_adapters_stay_frozen_whatever_is_active() -> None:
    pipe: Any = ll.attach(pipeline("sd15"))
    pipe.unet.requires_grad_(False)
    pipe.load_lora_weights(of_unet(), "a")
    for call in (lambda: pipe.unet.set_adapter("a"), lambda: pipe.set_adapters("a", 0.5), pipe.enable_lora):
        call()
        assert trained(pipe.unet) == set()
    pipe.unet.add_adapter(GEN, "a_new_one")
    pipe.delete_adapters("a_new_one")
    pipe.load_lora_weights(of_unet(1), "a_new_one")
    pipe.set_adapters(["a", "a_new_one"])
    assert trained(pipe.unet) == set()


def test_a_failed_load_leaves_training_where_it_was(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.set_adapter("gen")
    refresh, calls = attaching.refresh, iter([True])

    def once(layers: Any) -> Any:
        if next(calls, False):
            raise MemoryError
        return refresh(layers)

    monkeypatch.setattr(attaching, "refresh", once)
    with pytest.raises(MemoryError):
        model.load_lora_adapter(of_unet(1), adapter_name="another")
    assert (trained(model), model.active_adapters()) == ({"gen"}, ["gen"])
    calls = iter([True])
    with pytest.raises(MemoryError):
        model.add_adapter(GEN, "another")
    assert (trained(model), model.active_adapters()) == ({"gen"}, ["gen"])
    model.load_lora_adapter(of_unet(1), adapter_name="another")
    model.set_adapter("another")
    assert trained(model) == set()


def test_what_combines_adapters_leaves_training_where_it_was(model: Any) -> None:
    model.set_adapter("gen")
    model.add_weighted_adapter(["gen", "fake"], [0.5, 0.5], "both", "cat")
    assert trained(model) == {"gen"}
    model.set_adapter("both")
    assert trained(model) == set()


# Going on with a training


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_a_training_goes_on_from_what_it_saved(options: dict[str, Any], tmp_path: Path) -> None:
    config = ll.LoraConfig(r=4, target_modules=["to_q", "conv1"], init_lora_weights=False, **options)
    torch.manual_seed(0)
    first: Any = ll.attach(unet())
    first.add_adapter(config)
    mixin = ll.StableDiffusionLoraLoaderMixin
    mixin.save_lora_weights(tmp_path, unet_lora_layers=ll.adapter_state_dict(first))
    torch.manual_seed(0)
    second: Any = ll.attach(unet())
    torch.manual_seed(1)
    second.add_adapter(config)
    held = [p for p in second.parameters() if p.requires_grad]
    assert not torch.equal(run(second), run(first))
    state = ll.adapter_state_dict(first)
    if "use_dora" not in options:  # whose magnitudes have another name in diffusers' files
        read, *_ = mixin.lora_state_dict(tmp_path)
        state = {key.removeprefix("unet."): tensor for key, tensor in read.items()}
    ll.load_adapter_state_dict(second, state)
    assert [id(p) for p in second.parameters() if p.requires_grad] == [id(p) for p in held]
    torch.testing.assert_close(run(second), run(first), rtol=0, atol=0)
    second.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(run(second), run(first), rtol=1e-4, atol=1e-5)


@pytest.mark.parity
def test_a_training_goes_on_as_with_peft() -> None:
    peft = pytest.importorskip("peft", reason="parity with PEFT needs PEFT (scripts/setup_peers)")
    models: list[Any] = []
    for is_peft in (True, False):
        torch.manual_seed(0)
        model: Any = unet() if is_peft else ll.attach(unet())
        fields: dict[str, Any] = {"r": 4, "target_modules": ["to_q"]}
        model.add_adapter(peft.LoraConfig(**fields) if is_peft else ll.LoraConfig(**fields))
        models.append(model)
    theirs, ours = models
    state = {key: torch.randn_like(tensor) for key, tensor in peft.get_peft_model_state_dict(theirs).items()}
    assert not peft.set_peft_model_state_dict(theirs, dict(state)).unexpected_keys
    ll.load_adapter_state_dict(ours, state)
    torch.testing.assert_close(run(ours), run(theirs), rtol=1e-4, atol=1e-5)
    assert trained(ours) == trained(theirs) == {"default"}


def test_another_adapters_state_is_refused_and_changes_nothing(model: Any) -> None:
    state = ll.adapter_state_dict(model, "gen")
    before = {key: tensor.clone() for key, tensor in state.items()}
    first = next(iter(state))
    wrong = {key: tensor + 1 for key, tensor in state.items() if key != first} | {
        "nowhere.lora_A.weight": torch.ones(1)
    }
    second = next(iter(wrong))
    wrong[second] = torch.ones(1, 1)
    with pytest.raises(ll.AdapterMismatchError) as error:
        ll.load_adapter_state_dict(model, wrong, "gen")
    for said in (f"{first}: missing", "nowhere.lora_A.weight: no such", f"{second}: shape (1, 1)"):
        assert said in str(error.value)
    with pytest.raises(ll.AdapterStateError, match="no adapter 'default' is loaded"):
        ll.load_adapter_state_dict(model, state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in ll.adapter_state_dict(model, "gen").items())


@pytest.mark.parametrize("active", [True, False])
def test_an_adapter_that_takes_a_trained_ones_place_is_trained(model: Any, active: bool) -> None:
    model.set_adapter("gen" if active else "fake")
    loaded = {key: torch.randn_like(tensor) for key, tensor in ll.adapter_state_dict(model, "gen").items()}
    model.load_lora_adapter(loaded, prefix=None, adapter_name="gen", hotswap=True)
    assert trained(model) == {"gen" if active else "fake"}
    model.set_adapter("gen")
    assert trained(model) == {"gen"}
    run(model).sum().backward()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in ll.adapter_state_dict(model, "gen").items())


def test_an_adapter_that_takes_a_trained_ones_place_has_its_dropout(model: Any) -> None:
    model.add_adapter(ll.LoraConfig(r=2, target_modules=["to_k"], lora_dropout=0.25), "dropping")
    state = dict(ll.adapter_state_dict(model, "dropping"))
    model.load_lora_adapter(state, prefix=None, adapter_name="dropping", hotswap=True)
    layers = [layer for _, layer in adapter_layers(model) if "dropping" in layer.templates]
    assert {layer.dropouts["dropping"] for layer in layers} == {0.25}
