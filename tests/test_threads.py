"""Threads: changes come one after the other, and a forward sees what was active before a change or after it."""

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_compile import INPUTS, WAYS
from tiny_models import adapter_file, bits, changed_bits, components_of, flux, pipeline, render
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders import loading
from lora_loaders.errors import AdapterStateError
from lora_loaders.gates import Gate, changing, gate_of
from lora_loaders.integrations.scale import scaled
from lora_loaders.layers.layer import AdapterLayer

WAIT = 30.0
"""Seconds after which a test says that threads wait for each other for ever."""


def together(*tasks: Callable[[], Any]) -> None:
    """Run the tasks at the same time, from a common start; the first error of any is raised."""
    start = threading.Barrier(len(tasks))
    errors: list[BaseException] = []

    def run(task: Callable[[], Any]) -> None:
        start.wait(WAIT)
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other"
    if errors:
        raise errors[0]


class Slow(nn.Module):
    """Layers that stop between one and the next until they are told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between: Callable[[], None] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(x)
        self.between()
        return self.late(x)


def slow() -> Any:
    torch.manual_seed(0)
    return ll.attach(Slow().requires_grad_(False))


def change_of(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    keys = [f"{path}.lora_{side}.weight" for path in ("early", "late") for side in "AB"]
    return {key: torch.randn(2, 4) if "lora_A" in key else torch.randn(4, 2) for key in keys}


CHANGES: dict[str, Callable[[Any], Any]] = {
    "load": lambda m: m.load_lora_adapter(change_of(3), adapter_name="c", prefix=None),
    "set": lambda m: m.set_adapters("b"),
    "weight": lambda m: m.set_adapters("a", 0.25),
    "swap": lambda m: m.load_lora_adapter(change_of(4), adapter_name="a", prefix=None, hotswap=True),
    "disable": lambda m: m.disable_lora(),
    "fuse": lambda m: m.fuse_lora(lora_scale=2.0),
    "delete": lambda m: m.delete_adapters("a"),
    "unload": lambda m: m.unload_lora(),
    "first load": lambda m: m.load_lora_adapter(change_of(3), adapter_name="c", prefix=None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_forward_sees_the_adapters_before_a_change_or_after_it_and_no_mixture(change: str) -> None:
    model = slow()
    if change != "first load":
        for seed, name in enumerate("ab"):
            model.load_lora_adapter(change_of(seed), adapter_name=name, prefix=None)
        model.set_adapters("a")
    x = torch.randn(3, 4)
    old = model(x)
    entered, changed = threading.Event(), threading.Event()
    seen: list[Tensor] = []

    def stop_once() -> None:
        model.between = lambda: None
        entered.set()
        # The change must wait for this forward: it is not done however long that takes.
        assert not changed.wait(0.2)

    model.between = stop_once

    def generate() -> None:
        seen.append(model(x))

    def switch() -> None:
        entered.wait(WAIT)
        CHANGES[change](model)
        changed.set()

    together(generate, switch)

    assert torch.equal(seen[0], old)
    new = model(x)
    assert not torch.equal(new, old)


@pytest.mark.parametrize("outer", [0, 1])
def test_a_change_of_two_models_lets_a_forward_of_one_run_the_other(outer: int) -> None:
    """Had it entered one and waited for the other, that forward would wait for it in turn, for ever."""
    models = sorted((slow(), slow()), key=id)
    for model in models:
        model.load_lora_adapter(change_of(0), adapter_name="a", prefix=None)
    calling, called = models[outer], models[1 - outer]
    entered, done = threading.Event(), []
    x = torch.randn(3, 4)

    def run_the_other() -> None:
        entered.set()
        while not gate_of(calling)._waiting and not gate_of(called)._waiting:
            pass
        called(x)

    calling.between = run_the_other

    def change() -> None:
        entered.wait(WAIT)
        with changing(models):
            done.append(True)

    together(lambda: calling(x), change)
    assert done


@pytest.mark.parametrize("first", ["compile", "load"])
@pytest.mark.parametrize("way", ["model.compile", "torch.compile"])
def test_a_change_waits_for_a_forward_of_a_model_that_is_compiled_as_a_whole(way: str, first: str) -> None:
    """Its hooks are traced into the graph and cannot wait; what stands before the graph does."""
    torch._dynamo.reset()
    pipe: Any = ll.attach(pipeline("flux1"))
    made = adapter_file(pipe, components=["transformer"], scale=0.3)
    entered, changed = threading.Event(), threading.Event()

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                entered.set()
                assert not changed.wait(0.2)
            return graph(*args)

        return run

    if first == "load":
        pipe.load_lora_weights(made.tensors, "a")
    pipe.transformer = WAYS[way](pipe.transformer, backend=backend, fullgraph=True)
    if first == "compile":
        pipe.load_lora_weights(made.tensors, "a")
    pipe.set_adapters("a", 0.5)
    with torch.no_grad():
        old = pipe.transformer(**INPUTS)[0]
    seen: list[Tensor] = []

    def generate() -> None:
        with torch.no_grad():
            seen.append(pipe.transformer(**INPUTS)[0])

    def switch() -> None:
        entered.wait(WAIT)
        pipe.set_adapters("a", 1.0)
        changed.set()

    together(generate, switch)
    assert torch.equal(seen[0], old)
    with torch.no_grad():
        assert not torch.equal(pipe.transformer(**INPUTS)[0], old)
    before = pipe.transformer
    ll.detach(pipe)
    assert not vars(before)["_forward_pre_hooks"]
    with torch.no_grad():
        before(**INPUTS)  # nothing of ours is left that could be in the way


def test_forwards_go_on_while_another_thread_plans_its_load(monkeypatch: pytest.MonkeyPatch) -> None:
    model = slow()
    model.load_lora_adapter(change_of(0), adapter_name="a", prefix=None)
    x = torch.randn(3, 4)
    old, plans = model(x), loading.plan_contents
    planning, went_on = threading.Event(), threading.Event()

    def plan(*args: Any, **options: Any) -> Any:
        planning.set()
        assert went_on.wait(WAIT)
        return plans(*args, **options)

    def generate() -> None:
        planning.wait(WAIT)
        assert torch.equal(model(x), old)
        model.set_adapters("a", 2.0)  # a change goes before it as well
        went_on.set()

    monkeypatch.setattr(loading, "plan_contents", plan)
    together(lambda: model.load_lora_adapter(change_of(3), adapter_name="c", prefix=None), generate)
    assert model.active_adapters() == ["c"]
    assert model.early.weights == {"a": 2.0, "c": 1.0}


def test_a_forward_that_comes_during_a_change_waits_and_sees_all_of_it() -> None:
    model = slow()
    model.load_lora_adapter(change_of(0), adapter_name="a", prefix=None)
    x = torch.randn(3, 4)
    inside, seen = threading.Event(), []

    def change() -> None:
        with changing([model]):
            model.set_adapters("a", 0.5)
            inside.set()
            assert not finished.wait(0.2)
            model.set_adapters("a", -1.0)

    finished = threading.Event()

    def generate() -> None:
        inside.wait(WAIT)
        seen.append(model(x))
        finished.set()

    together(change, generate)

    assert torch.equal(seen[0], model(x))


def test_threads_that_load_different_adapters_at_once_leave_what_one_after_the_other_leaves() -> None:
    pipe, other = ll.attach(pipeline("sd15")), ll.attach(pipeline("sd15"))
    files = {name: adapter_file(pipe, seed=n, scale=0.1) for n, name in enumerate("abcd")}

    together(*(lambda n=name: pipe.load_lora_weights(files[n].tensors, adapter_name=n) for name in files))
    for name, made in files.items():
        other.load_lora_weights(made.tensors, adapter_name=name)

    assert sorted(pipe.get_list_adapters()["unet"]) == list(files)
    for one in (pipe, other):
        one.set_adapters(list(files), [0.5, -0.25, 1.0, 2.0])
    for component, model in components_of(pipe).items():
        layers = {path: m for path, m in model.named_modules() if isinstance(m, AdapterLayer)}
        twins = {p: m for p, m in components_of(other)[component].named_modules() if isinstance(m, AdapterLayer)}
        assert layers.keys() == twins.keys()
        for path, layer in layers.items():
            for name in layer.templates:
                for key, tensor in layer.delta(name).tensors().items():
                    assert torch.equal(tensor, twins[path].delta(name).tensors()[key])


def test_one_name_goes_to_one_thread_and_numbers_never_collide() -> None:
    model = slow()
    refused: list[AdapterStateError] = []

    def load() -> None:
        try:
            model.load_lora_adapter(change_of(0), adapter_name="same", prefix=None)
        except AdapterStateError as error:
            refused.append(error)

    together(load, load, load)
    assert len(refused) == 2
    together(*[lambda: model.load_lora_adapter(change_of(1), prefix=None)] * 4)
    assert sorted(model.peft_config) == [*(f"default_{n}" for n in range(4)), "same"]


def test_pipelines_that_share_a_model_change_it_one_after_the_other() -> None:
    one = ll.attach(pipeline("sd15"))
    two: Any = ll.attach(type(one)(**one.components))
    file = {name: adapter_file(one, seed=n, scale=0.1) for n, name in enumerate("ab")}

    def work(pipe: Any, name: str) -> None:
        for _ in range(3):
            pipe.load_lora_weights(file[name].tensors, adapter_name=name)
            pipe.set_adapters(name, 0.5)
            pipe.delete_adapters(name)

    together(lambda: work(one, "a"), lambda: work(two, "b"))

    assert one.get_list_adapters() == two.get_list_adapters() == {}
    assert not [m for model in components_of(one).values() for m in model.modules() if isinstance(m, AdapterLayer)]


def test_fusing_through_two_pipelines_that_share_their_models_gives_every_bit_back() -> None:
    one = ll.attach(pipeline("sd15"))
    two: Any = ll.attach(type(one)(**one.components))
    file = {name: adapter_file(one, seed=n, scale=0.1) for n, name in enumerate("ab")}
    before, plain = {name: bits(model) for name, model in components_of(one).items()}, render(one)

    def work(pipe: Any, name: str) -> None:
        for _ in range(3):
            pipe.load_lora_weights(file[name].tensors, adapter_name=name)
            pipe.fuse_lora(adapter_names=[name])
            assert name in pipe.fused_loras
            pipe.delete_adapters(name)

    together(lambda: work(one, "a"), lambda: work(two, "b"))

    assert one.fused_loras == two.fused_loras == set()
    assert [key for name, model in components_of(one).items() for key in changed_bits(before[name], model)] == []
    assert torch.equal(render(two), plain)


def test_opposite_orders_of_two_models_do_not_wait_for_each_other() -> None:
    a, b = slow(), slow()

    def take(*models: nn.Module) -> None:
        for _ in range(200):
            with changing(models):
                pass

    together(lambda: take(a, b), lambda: take(b, a))


def test_an_error_in_a_forward_or_in_a_change_opens_the_gate_again() -> None:
    model = slow()
    model.load_lora_adapter(change_of(0), adapter_name="a", prefix=None)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5))
    with pytest.raises(ZeroDivisionError), changing([model]):
        _ = 1 / 0

    together(lambda: model.set_adapters("a", 0.5), lambda: model(torch.randn(3, 4)))


def test_a_callback_may_change_the_model_in_its_own_forward() -> None:
    model = slow()
    model.load_lora_adapter(change_of(0), adapter_name="a", prefix=None)
    model.between = lambda: model.set_adapters("a", 0.5)

    together(lambda: model(torch.randn(3, 4)))

    assert model.early.weights == {"a": 0.5}


def test_two_forwards_that_both_change_the_model_do_not_wait_for_each_other() -> None:
    model = slow()
    model.load_lora_adapter(change_of(0), adapter_name="a", prefix=None)
    both = threading.Barrier(2)

    def change() -> None:
        both.wait(WAIT)
        model.set_adapters("a", 0.5)

    model.between = change
    with pytest.raises(AdapterStateError, match="wait for each other"):
        together(*[lambda: model(torch.randn(3, 4))] * 2)

    assert model.early.weights == {"a": 0.5}
    model.between = lambda: None
    together(lambda: model.set_adapters("a", 0.25), lambda: model(torch.randn(3, 4)))


def test_the_gate_is_no_part_of_the_model() -> None:
    model = ll.attach(flux())
    twin = copy.deepcopy(model)

    assert gate_of(model) is not gate_of(twin)
    assert not any(isinstance(value, Gate) for value in vars(model).values())
    assert pickle.loads(pickle.dumps(model)) is not None


@pytest.mark.parametrize("compiled", [False, True])
def test_every_thread_has_the_scale_of_its_own_call(compiled: bool) -> None:
    """No forward is scaled as another thread's, and none is a mixture; compiled code reads one tensor for all."""
    torch._dynamo.reset()
    model: Any = ll.attach(flux())
    model.load_lora_adapter(adapter_file(pipeline("flux1"), components=["transformer"]).tensors, adapter_name="a")
    if compiled:
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
    scales = (None, 0.0, 0.5)

    def forward(scale: float | None) -> Tensor:
        with torch.no_grad():
            return model(**INPUTS, joint_attention_kwargs=None if scale is None else {"scale": scale})[0]

    expected = {scale: forward(scale) for scale in scales}
    assert not torch.equal(expected[None], expected[0.5])
    wrong: list[float | None] = []

    def run(scale: float | None) -> None:
        wrong.extend(scale for _ in range(20) if not torch.equal(forward(scale), expected[scale]))

    together(*(lambda scale=scale: run(scale) for scale in scales))
    assert wrong == []
    assert torch.equal(forward(None), expected[None])


def test_adapters_that_go_in_a_scaled_forward_leave_no_thread_waiting() -> None:
    model = slow()
    model.load_lora_adapter(change_of(1), adapter_name="a", prefix=None)
    x = torch.ones(1, 4)
    with torch.no_grad():
        model.between = model.unload_lora
        model(x)
        model.between = lambda: None
        together(lambda: model(x), lambda: model(x))
    assert gate_of(model)._scaled == {}


def scaling() -> Any:
    """A model that takes a scale."""
    model: Any = ll.attach(flux())
    model.load_lora_adapter(adapter_file(pipeline("flux1"), components=["transformer"]).tensors, adapter_name="a")
    return model


def scaled_output(model: Any, scale: float | None = None) -> Tensor:
    with torch.no_grad():
        return model(**INPUTS, joint_attention_kwargs=None if scale is None else {"scale": scale})[0]


INTERRUPTIONS = (KeyboardInterrupt, SystemExit, asyncio.CancelledError)


def interrupt(layer: nn.Module, error: type[BaseException], call: Callable[[], Any]) -> None:
    def stop(*_: Any) -> None:
        raise error

    hook = layer.register_forward_hook(stop)
    with pytest.raises(error):
        call()
    hook.remove()


@pytest.mark.parametrize("error", INTERRUPTIONS)
def test_no_scale_stays_after_a_forward_that_was_interrupted(error: type[BaseException]) -> None:
    model = scaling()
    plain, half = scaled_output(model), scaled_output(model, 0.5)
    for _ in range(2):
        interrupt(model.proj_out, error, lambda: scaled_output(model, 0.1))
    assert torch.equal(scaled_output(model), plain)
    assert torch.equal(scaled_output(model, 0.5), half)
    assert torch.equal(scaled_output(model), plain)
    interrupt(model.proj_out, error, lambda: scaled_output(model, 0.1))
    with scaled([model], 0.5):
        assert torch.equal(scaled_output(model), half)
        interrupt(model.proj_out, error, lambda: scaled_output(model, 0.1))
        assert torch.equal(scaled_output(model), half)
        interrupt(model.proj_out, error, lambda: scaled_output(model, 0.1))
    assert torch.equal(scaled_output(model), plain)
    assert gate_of(model)._scaled == {}


def test_an_interrupted_forward_within_another_leaves_the_other_its_scale() -> None:
    model = scaling()
    half, plain = scaled_output(model, 0.5), scaled_output(model)

    def nested(*_: Any) -> None:
        hook.remove()
        interrupt(model.proj_out, KeyboardInterrupt, lambda: scaled_output(model, 0.1))
        assert torch.equal(scaled_output(model), half)

    hook = model.transformer_blocks[0].register_forward_pre_hook(nested)
    scaled_output(model, 0.5)
    assert torch.equal(scaled_output(model), plain)
    together(model.disable_lora)


def test_a_compiled_forward_waits_for_no_scale_of_one_that_was_interrupted() -> None:
    torch._dynamo.reset()
    model = scaling()
    half = scaled_output(model, 0.5)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    together(lambda: interrupt(model.proj_out, SystemExit, lambda: scaled_output(model, 0.1)))
    together(lambda: torch.testing.assert_close(scaled_output(model, 0.5), half))


@pytest.mark.parametrize("error", INTERRUPTIONS)
def test_an_interrupted_forward_holds_no_change_back(error: type[BaseException]) -> None:
    model = slow()
    model.load_lora_adapter(change_of(0), adapter_name="a", prefix=None)
    x = torch.randn(3, 4)
    call = lambda: interrupt(model.late.base_layer, error, lambda: model(x))  # noqa: E731
    call()
    together(lambda: model.set_adapters("a", 0.5))  # while the interrupted thread lives
    together(call)
    model.set_adapters("a", 0.25)  # after it died
    assert model.early.weights == {"a": 0.25}


def test_a_thread_that_was_interrupted_waits_for_a_change_like_any_other() -> None:
    model = slow()
    model.load_lora_adapter(change_of(0), adapter_name="a", prefix=None)
    x = torch.randn(3, 4)
    interrupted, inside, finished = threading.Event(), threading.Event(), threading.Event()
    seen: list[Tensor] = []

    def change() -> None:
        interrupted.wait(WAIT)
        with changing([model]):
            inside.set()
            assert not finished.wait(0.3)
            model.set_adapters("a", -1.0)

    def generate() -> None:
        interrupt(model.late.base_layer, KeyboardInterrupt, lambda: model(x))
        interrupted.set()
        inside.wait(WAIT)
        seen.append(model(x))
        finished.set()

    together(change, generate)
    assert torch.equal(seen[0], model(x))
