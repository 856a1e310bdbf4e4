"""Weights that follow the denoising: each step has the weight that its progress says, and the calls leave nothing."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.modular_pipelines import FluxAutoBlocks
from every_pipeline import CASES, build, made
from tiny_models import adapter_file, bits, changed_bits, patching, pipeline, render
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_loaders as ll
from lora_loaders.activity import follow
from lora_loaders.layout import adapter_layers
from lora_loaders.schedules import Step

STEPS = 4
SIZE = {"height": 8, "width": 8, "output_type": "latent"}


def one_minus(progress: float) -> float:
    return 1 - progress


def adapted(family: str, *, attach: bool = True) -> Any:
    """A pipeline with two adapters."""
    pipe = ll.attach(pipeline(family)) if attach else pipeline(family)
    for seed, name in enumerate(("a", "b"), 1):
        pipe.load_lora_weights(adapter_file(pipeline(family), seed=seed).tensors, adapter_name=name)
    return pipe


def draw(pipe: Any, steps: int = STEPS, **options: Any) -> Tensor:
    return render(pipe, num_inference_steps=steps, **options)


def weights_of(model: Any, name: str = "a") -> set[float]:
    return {layer.weights[name] for _, layer in adapter_layers(model) if name in layer.weights}


@contextmanager
def observed(pipe: Any) -> Iterator[list[float]]:
    """The weight of `a` in each forward of the denoiser."""
    seen: list[float] = []
    model = getattr(pipe, "transformer", None) or pipe.unet
    hook = model.register_forward_pre_hook(lambda module, args: seen.extend(weights_of(module)))
    try:
        yield seen
    finally:
        hook.remove()


@torch.no_grad()
def loop_of_sd15(pipe: Any, set_weights: Callable[[int], None]) -> Tensor:
    """Stable Diffusion by hand, with guidance 7.5 in one batch."""
    set_weights(0)
    prompt, negative = pipe.encode_prompt("a cat", torch.device("cpu"), 1, True)
    pipe.scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7)) * pipe.scheduler.init_noise_sigma
    for number, time in enumerate(pipe.scheduler.timesteps):
        set_weights(number)
        given = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), time)
        plain, asked = pipe.unet(given, time, encoder_hidden_states=torch.cat([negative, prompt]), return_dict=False)[
            0
        ].chunk(2)
        latents = pipe.scheduler.step(plain + 7.5 * (asked - plain), time, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def loop_of_flux(pipe: Any, set_weights: Callable[[int], None]) -> Tensor:
    """Flux by hand, with its distilled guidance of 3.5."""
    set_weights(0)
    prompt, pooled, text_ids = pipe.encode_prompt("a cat", "a cat", max_sequence_length=8)
    latents, image_ids = pipe.prepare_latents(
        1, 4, 8, 8, prompt.dtype, torch.device("cpu"), torch.Generator().manual_seed(7)
    )
    pipe.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / STEPS, STEPS, dtype=torch.float64).tolist(), mu=0.5)
    for number, time in enumerate(pipe.scheduler.timesteps):
        set_weights(number)
        predicted = pipe.transformer(
            hidden_states=latents,
            timestep=time.expand(1) / 1000,
            guidance=torch.full([1], 3.5),
            pooled_projections=pooled,
            encoder_hidden_states=prompt,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        latents = pipe.scheduler.step(predicted, time, latents, return_dict=False)[0]
    return latents


LOOPS = {"sd15": loop_of_sd15, "flux1": loop_of_flux}


@pytest.mark.parametrize("way", ["attach", "patch_diffusers"])
@pytest.mark.parametrize("family", LOOPS)
def test_a_schedule_gives_what_a_loop_by_hand_gives_to_the_bit(family: str, way: str) -> None:
    by_hand = adapted(family)

    def set_weights(number: int) -> None:
        progress = number / (STEPS - 1)
        by_hand.set_adapters(["a", "b"], [1 - progress, (0.25, 0.5, 2.0, 2.0)[number]])

    expected = LOOPS[family](by_hand, set_weights)
    given = [one_minus, ll.PerStep([0.25, 0.5, 2.0])]
    if way == "attach":
        pipe = adapted(family)
        pipe.set_adapters(["a", "b"], given)
        assert torch.equal(draw(pipe), expected)
        assert torch.equal(draw(pipe), expected)  # it begins anew
        pipe.set_adapters(["a", "b"], [1.0, 0.25])
        assert not torch.equal(draw(pipe), expected)
        return
    with patching():
        pipe = adapted(family, attach=False)
        pipe.set_adapters(["a", "b"], given)
        assert torch.equal(draw(pipe), expected)


def test_a_class_of_ones_own_follows_schedules() -> None:
    class Own(ll.StableDiffusionLoraLoaderMixin, diffusers.StableDiffusionPipeline):  # type: ignore[misc]
        def __call__(self, prompt: str, **options: Any) -> Any:
            """A call of its own around that of its parent."""
            return super().__call__(prompt, **options)

    pipe = adapted("sd15")
    pipe.set_adapters(["a", "b"], [one_minus, 0.5])
    expected = draw(pipe)
    own = Own(**pipeline("sd15").components, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    for seed, name in enumerate(("a", "b"), 1):
        own.load_lora_weights(adapter_file(pipeline("sd15"), seed=seed).tensors, adapter_name=name)
    own.set_adapters(["a", "b"], [one_minus, 0.5])
    assert torch.equal(draw(own), expected)


def test_progress_goes_from_0_to_1_and_is_0_in_a_single_step() -> None:
    pipe, asked = adapted("sd15"), list[float]()
    pipe.set_adapters("a", lambda progress: asked.append(progress) or progress)
    for steps, expected in ((4, [0, 1 / 3, 2 / 3, 1]), (2, [0, 1]), (1, [0])):
        with observed(pipe) as seen:
            draw(pipe, steps)
        assert seen == expected
        assert weights_of(pipe.unet) == {0.0}
    assert set(asked) == {0, 1 / 3, 2 / 3, 1}


@pytest.mark.parametrize(("values", "expected"), [([0.5, 1], [0.5, 1, 1, 1]), ([3, 2, 1, 0, 9], [3, 2, 1, 0])])
def test_the_last_of_a_list_holds_and_what_is_too_much_is_left(values: list[float], expected: list[float]) -> None:
    pipe = adapted("sd15")
    pipe.set_adapters("a", ll.PerStep(values))
    with observed(pipe) as seen:
        draw(pipe)
    assert seen == expected


@pytest.mark.parametrize("family", ["sd15", "flux1"])
def test_a_list_in_an_adapters_place_is_a_weight_for_each_step(family: str) -> None:
    pipe = adapted(family)
    denoiser = "unet" if family == "sd15" else "transformer"
    for names, weights in ((["a"], [[0.0, 0.5, 1.0]]), (["a", "b"], [{denoiser: (0.0, 0.5, 1.0)}, 0.25])):
        pipe.set_adapters(names, weights)
        with observed(pipe) as seen:
            draw(pipe)
        assert seen == [0.0, 0.5, 1.0, 1.0]
    before = draw(pipe)
    for weights in ([0.0, 0.5, 1.0], [["x"]], [[]]):
        with pytest.raises(ll.AdapterStateError, match="PerStep"):
            pipe.set_adapters("a", weights)
    with pytest.raises(ll.AdapterStateError, match="PerStep"):
        getattr(pipe, denoiser).set_adapters("a", [[0.0, 0.5]])
    assert torch.equal(draw(pipe), before)


def test_the_users_callback_goes_first_and_its_tensors_are_heeded() -> None:
    pipe, plain = adapted("sd15"), adapted("sd15")

    def halve(pipe: Any, index: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        calls.append((index, weights_of(pipe.unet)))
        return {"latents": tensors["latents"] / 2, "noise_pred": tensors.get("noise_pred")}

    calls: list[Any] = []
    for each in (pipe, plain):
        each.set_adapters("a", (lambda progress: 0.5) if each is pipe else 0.5)
    expected = draw(plain, callback_on_step_end=halve)
    calls.clear()
    assert torch.equal(draw(pipe, callback_on_step_end=halve), expected)
    assert [index for index, _ in calls] == [0, 1, 2, 3]
    pipe.set_adapters("a", one_minus)
    calls.clear()
    draw(pipe, callback_on_step_end=halve)
    assert [weights for _, weights in calls] == [{1 - n / 3} for n in range(4)]


def test_callbacks_of_diffusers_own_class_say_which_tensors_they_want() -> None:
    pipe, plain = adapted("sd15"), adapted("sd15")
    pipe.set_adapters("a", lambda progress: 0.5)
    plain.set_adapters("a", 0.5)
    options: Any = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.5)}
    assert torch.equal(draw(pipe, **options), draw(plain, **options))


def test_after_an_error_in_the_call_the_weights_are_those_of_before() -> None:
    pipe = adapted("sd15")
    before = draw(pipe, 1)
    pipe.set_adapters(["a", "b"], [one_minus, 0.0])
    resting = draw(pipe, 1)

    def fail(pipe: Any, index: int, time: Any, tensors: Any) -> Any:
        if index == 2:
            raise RuntimeError("stop")
        return tensors

    with pytest.raises(RuntimeError, match="stop"):
        draw(pipe, callback_on_step_end=fail)
    assert weights_of(pipe.unet) == {1.0}
    assert torch.equal(draw(pipe, 1), resting)
    pipe.set_adapters(["b"], [1.0])
    assert torch.equal(draw(pipe, 1), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much", None])
def test_a_function_that_gives_no_number_says_where(value: Any) -> None:
    pipe = adapted("sd15")
    pipe.set_adapters("a", 0.5)
    resting = draw(pipe, 1)
    with pytest.raises(ll.AdapterStateError, match="schedule of a at progress 0: "):
        pipe.set_adapters("a", lambda progress: value)
    assert torch.equal(draw(pipe, 1), resting)
    pipe.set_adapters("a", lambda progress: 0.5 if progress < 0.5 else value)
    with pytest.raises(ll.AdapterStateError, match=r"schedule of a at progress 0\.666667: "):
        draw(pipe)
    assert torch.equal(draw(pipe, 1), resting)


@pytest.mark.parametrize("function", [lambda: 0.5, lambda progress, *, more: 0.5])
def test_a_function_that_does_not_take_the_progress_is_refused_by_its_adapters_name(function: Any) -> None:
    pipe = adapted("sd15")
    pipe.set_adapters("a", 0.5)
    with pytest.raises(ll.AdapterStateError, match="the schedule of a does not take the progress"):
        pipe.set_adapters("a", function)
    assert {layer.weights["a"] for _, layer in adapter_layers(pipe.unet) if "a" in layer.weights} == {0.5}


@pytest.mark.parametrize("values", [[], [float("nan")], ["a"]])
def test_a_list_of_no_numbers_is_refused(values: Any) -> None:
    with pytest.raises(ll.AdapterStateError):
        ll.PerStep(values)


@pytest.mark.parametrize(
    ("names", "weights", "says"),
    [
        ("a", {"transformer": one_minus, "unet": 1.0}, "transformer"),
        ("a", {"no_such_block": one_minus}, "no_such_block"),
        (["a", "b"], [one_minus], "Length"),
        ("c", one_minus, "not in the list"),
    ],
)
def test_schedules_for_what_is_not_there_change_nothing(names: Any, weights: Any, says: str) -> None:
    pipe = adapted("sd15")
    pipe.set_adapters("a", ll.PerStep([0.5, 1.0]))
    before = draw(pipe)
    with pytest.raises(ll.AdapterStateError, match=says):
        pipe.set_adapters(names, weights)
    assert torch.equal(draw(pipe), before)


def test_components_and_blocks_have_schedules_of_their_own() -> None:
    pipe = adapted("sd15")
    pipe.set_adapters("a", {"unet": {"down": one_minus, "mid": 0.25}, "text_encoder": 0.5})
    seen: list[dict[str, float]] = []

    def look(pipe: Any, index: int, time: Any, tensors: Any) -> Any:
        seen.append({path.split("_")[0]: layer.weights["a"] for path, layer in adapter_layers(pipe.unet)})
        return tensors

    draw(pipe, 3, callback_on_step_end=look)
    assert [(s["down"], s["mid"], s["up"]) for s in seen] == [(1.0, 0.25, 1.0), (0.5, 0.25, 1.0), (0.0, 0.25, 1.0)]
    assert weights_of(pipe.text_encoder) == {0.5}


def test_a_number_or_taking_the_adapter_out_ends_its_schedule(tmp_path: Any) -> None:
    pipe = adapted("sd15")
    for end in (
        lambda: pipe.set_adapters("a", 1.0),
        lambda: pipe.unet.set_adapters("a", 1.0),
        lambda: (pipe.delete_adapters("a"), pipe.load_lora_weights(adapter_file(pipeline("sd15")).tensors, "a")),
    ):
        pipe.set_adapters("a", {"unet": one_minus})
        end()
        with observed(pipe) as seen:
            draw(pipe, 2)
        assert seen == [1.0, 1.0]


def test_fusing_and_schedules_exclude_each_other() -> None:
    pipe = adapted("sd15")
    pipe.set_adapters(["a", "b"], [one_minus, 1.0])
    for fuse in (pipe.fuse_lora, lambda: pipe.fuse_lora(adapter_names=["a"]), pipe.unet.fuse_lora):
        with pytest.raises(ll.AdapterStateError, match="weight of a follows the denoising"):
            fuse()
    assert not pipe.fused_loras
    pipe.fuse_lora(adapter_names=["b"])
    with pytest.raises(ll.AdapterStateError, match="b is fused"):
        pipe.set_adapters(["a", "b"], one_minus)
    with pytest.raises(ll.AdapterStateError, match="number"):
        pipe.fuse_lora(lora_scale=one_minus)


def test_a_model_alone_refuses_a_schedule() -> None:
    pipe = adapted("sd15")
    for weight in (one_minus, [ll.PerStep([1.0])], {"down": one_minus}):
        with pytest.raises(ll.AdapterStateError, match="pipeline"):
            pipe.unet.set_adapters(["a"], weight)


def test_saving_under_a_schedule_writes_what_was_loaded(tmp_path: Any) -> None:
    pipe = adapted("sd15")
    pipe.set_adapters(["a", "b"], [1.0, 1.0])
    plain = ll.read_adapter(pipe.save_lora_weights(tmp_path / "plain", adapter_name="a"))
    pipe.set_adapters(["a", "b"], [one_minus, ll.PerStep([0.0])])
    scheduled = ll.read_adapter(pipe.save_lora_weights(tmp_path / "scheduled", adapter_name="a"))
    for one, other in zip(plain.modules(), scheduled.modules(), strict=True):
        assert torch.equal(one.delta.delta_weight(), other.delta.delta_weight())


def test_a_part_of_the_way_is_a_whole_way_for_a_picture_that_is_given() -> None:
    pipe = ll.attach(
        diffusers.StableDiffusionImg2ImgPipeline(**pipeline("sd15").components, requires_safety_checker=False)
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(adapter_file(pipeline("sd15")).tensors, "a")
    pipe.set_adapters("a", lambda progress: progress)
    with observed(pipe) as seen, torch.no_grad():
        pipe("a cat", image=torch.rand(1, 3, 8, 8), strength=0.5, num_inference_steps=6, output_type="latent")
    assert seen == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("scheduler", "given"),
    [
        (diffusers.DDPMScheduler, {"timesteps": [900, 500, 450, 3]}),
        (diffusers.EulerDiscreteScheduler, {"timesteps": [999, 10, 5, 1]}),
        (diffusers.EulerDiscreteScheduler, {"sigmas": [14.0, 3.0, 0.5, 0.0]}),
    ],
)
def test_progress_counts_the_steps_and_not_the_times_that_the_user_gives(scheduler: Any, given: Any) -> None:
    pipe, turns = adapted("sd15"), list[int]()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_adapters("a", lambda progress: progress)

    def note(pipe: Any, index: int, time: Any, tensors: Any) -> Any:
        turns.append(index)
        return tensors

    with observed(pipe) as seen:
        draw(pipe, 50, callback_on_step_end=note, **given)
    assert len(turns) == len(seen) > 2
    assert seen == [turn / turns[-1] for turn in turns]


def test_sigmas_and_strength_together_leave_a_whole_way() -> None:
    parts = pipeline("flux1").components
    pipe = ll.attach(diffusers.FluxImg2ImgPipeline(**{k: v for k, v in parts.items() if v is not None}))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(adapter_file(pipeline("flux1")).tensors, "a")
    pipe.set_adapters("a", lambda progress: progress)
    with observed(pipe) as seen, torch.no_grad():
        pipe(
            "a cat",
            image=torch.rand(1, 3, 8, 8),
            strength=0.6,
            num_inference_steps=5,
            sigmas=[1.0, 0.7, 0.5, 0.2, 0.1],
            max_sequence_length=8,
            **SIZE,
        )
    assert seen == [0, 0.5, 1]


def test_a_callback_that_interrupts_leaves_the_weights_at_rest() -> None:
    pipe = adapted("sd15")
    pipe.set_adapters("a", lambda progress: progress)

    def stop(pipe: Any, index: int, time: Any, tensors: Any) -> Any:
        pipe._interrupt = index == 1
        return tensors

    with observed(pipe) as seen:
        draw(pipe, 4, callback_on_step_end=stop)
    assert seen == [0, 1 / 3]
    assert weights_of(pipe.unet) == {0.0}


def test_a_copy_follows_its_schedules_by_itself() -> None:
    pipe = adapted("sd15")
    pipe.set_adapters(["a", "b"], [lambda progress: progress, ll.PerStep([1.0, 0.5])])
    expected = draw(pipe)
    twin = copy.deepcopy(pipe)
    pipe.set_adapters(["a", "b"], 0.0)
    assert torch.equal(draw(twin), expected)
    twin.set_adapters("a", one_minus)
    twin.unet = pickle.loads(pickle.dumps(twin.unet))
    with observed(twin) as seen:
        draw(twin)
    assert seen == [1, 1 - 1 / 3, 1 - 2 / 3, 0]


def test_a_function_that_cannot_be_pickled_says_so_and_a_pipeline_is_saved_all_the_same(tmp_path: Any) -> None:
    pipe = adapted("sd15")
    plain = bits(pipe.unet)
    pipe.set_adapters("a", {"unet": {"down": lambda progress: progress}})
    for write in (pickle.dumps, lambda model: torch.save(model, tmp_path / "model.pt")):
        with pytest.raises(ll.AdapterStateError, match=r"(?s)schedule of a cannot be pickled: .*lambda.*PerStep"):
            write(pipe.unet)
    pipe.unet.save_pretrained(tmp_path)
    read = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert changed_bits(plain, read) == []
    with observed(pipe) as seen:
        draw(pipe, 2)
    assert set(seen) == {0.0, 1.0}


def test_each_turn_of_a_second_order_scheduler_is_a_step() -> None:
    pipe = adapted("sd15")
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_adapters("a", lambda progress: progress)
    with observed(pipe) as seen:
        draw(pipe, 3)
    assert len(seen) == 5  # as the callback counts
    assert seen == [0, 0.25, 0.5, 0.75, 1]


def test_two_transformers_share_one_progress_and_so_do_both_forwards_of_guidance() -> None:
    pipe: Any = ll.attach(build("WanLoraLoaderMixin"))
    pipe.load_lora_weights(made(pipe, 1), adapter_name="a")
    pipe.set_adapters("a", lambda progress: progress)
    seen: list[tuple[str, float]] = []
    for name in ("transformer", "transformer_2"):
        model = getattr(pipe, name)
        model.register_forward_pre_hook(lambda model, args, name=name: seen.append((name, *weights_of(model))))
    call = CASES["WanLoraLoaderMixin"].call() | {"guidance_scale": 5.0, "num_inference_steps": 5}
    pipe(**call, negative_prompt_embeds=call["prompt_embeds"] * 0)
    high, low = (["transformer"] * 2, ["transformer_2"] * 8)
    assert seen == [(name, n // 2 / 4) for n, name in enumerate([*high, *low])]


def test_a_modular_pipeline_is_followed_by_its_scheduler() -> None:
    parts = pipeline("flux1")
    pipe = FluxAutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in parts.components.items() if name in pipe.component_names})
    pipe = ll.attach(pipe)
    pipe.load_lora_weights(adapter_file(parts, components=["transformer"]).tensors, "a")
    pipe.set_adapters("a", lambda progress: progress)
    call: Any = {"prompt": "a cat", "max_sequence_length": 8, "output": "latents", **SIZE}
    with observed(pipe) as seen, torch.no_grad():
        pipe(num_inference_steps=3, **call)
    assert seen == [0, 0.5, 1]
    assert weights_of(pipe.transformer) == {0.0}


class Bare(diffusers.DiffusionPipeline):
    """A pipeline without a callback, and with a second scheduler made of the first as those for sound have."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, steps: int, stages: int = 1, begin: int = 0, fails: bool = False) -> Any:
        """Loops, one after the other."""
        latents = torch.ones(1, 4, 8, 8)
        for _ in range(stages):
            self.scheduler.set_timesteps(steps)
            other = copy.deepcopy(self.scheduler)
            for time in self.scheduler.timesteps[begin:]:
                predicted = self.unet(latents, time, torch.ones(1, 3, 32), return_dict=False)[0]
                latents = self.scheduler.step(predicted, timestep=time, sample=latents).prev_sample
                other.step(predicted, time, latents)
            if fails:
                raise RuntimeError("stop")
        return latents


@pytest.mark.parametrize("way", ["attach", "patch_diffusers"])
def test_a_pipeline_without_a_callback_is_followed_by_its_scheduler(way: str) -> None:
    with patching():
        parts = pipeline("sd15")
        pipe: Any = Bare(parts.unet, parts.scheduler)
        if way == "attach":
            ll.unpatch_diffusers()
            ll.attach(pipe)
        pipe.load_lora_weights(adapter_file(pipeline("sd15"), components=["unet"]).tensors, "a")
        pipe.set_adapters("a", lambda progress: progress)
        cls = type(pipe.scheduler)
        for options, expected in (
            ({"steps": 3}, [0, 0.5, 1]),
            ({"steps": 3, "stages": 2}, [0, 0.5, 1, 0, 0.5, 1]),
            ({"steps": 5, "begin": 2}, [0, 0.5, 1]),
            ({"steps": 1}, [0]),
        ):
            with observed(pipe) as seen:
                pipe(**options)
            assert seen == expected
            assert weights_of(pipe.unet) == {0.0}
            assert type(pipe.scheduler) is cls
        with pytest.raises(RuntimeError, match="stop"):
            pipe(3, fails=True)
        assert weights_of(pipe.unet) == {0.0}
        assert type(pipe.scheduler) is cls


def test_a_pipeline_that_cannot_say_how_far_it_is_says_so() -> None:
    class Single(diffusers.DiffusionPipeline):
        def __init__(self, unet: Any) -> None:
            super().__init__()
            self.register_modules(unet=unet)

        def __call__(self) -> None:
            """Nothing."""

    pipe: Any = ll.attach(Single(pipeline("sd15").unet))
    pipe.load_lora_weights(adapter_file(pipeline("sd15"), components=["unet"]).tensors, "a")
    pipe.set_adapters("a", one_minus)
    with pytest.raises(ll.AdapterStateError, match="neither callback_on_step_end nor a scheduler"):
        pipe()


def test_steps_recompile_nothing_and_take_no_memory() -> None:
    torch._dynamo.reset()
    pipe = adapted("flux1")
    pipe.set_adapters(["a", "b"], [one_minus, ll.PerStep([0.25, 0.5])])
    expected = draw(pipe)
    slots = _addresses(pipe.transformer)
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert torch.equal(draw(pipe), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(draw(pipe), expected)
    assert _addresses(pipe.transformer) == slots


def test_a_step_makes_no_tensor_as_large_as_a_slot() -> None:
    class Made(TorchDispatchMode):
        names: Sequence[str] = ()
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            self.calls += 1
            known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
            if any(t.untyped_storage().data_ptr() not in known for t in _tensors(result)):
                self.names = [*self.names, str(func)]
            return result

    pipe = adapted("flux1")
    pipe.set_adapters(["a", "b"], [one_minus, 0.5])
    watch = Made()

    def look(pipe: Any, index: int, time: Any, tensors: Any) -> Any:
        with watch:
            follow(pipe.transformer, Step(index + 1, STEPS + 1))
        return tensors

    draw(pipe, callback_on_step_end=look)
    assert watch.calls >= STEPS
    assert not watch.names


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _addresses(model: Any) -> list[int]:
    return [layer.slot_down.data_ptr() for _, layer in adapter_layers(model) if layer.slot_down is not None]


def test_a_forward_in_another_thread_sees_one_step_whole() -> None:
    pipe = adapted("flux1")
    pipe.set_adapters("a", 1.0)
    call: list[Any] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, args, given: call.append(given), with_kwargs=True)
    draw(pipe, 1)
    hook.remove()

    def run() -> Tensor:
        with torch.no_grad():
            return pipe.transformer(**call[0])[0]

    wanted: list[Tensor] = []
    for number in range(STEPS):
        pipe.set_adapters("a", number / (STEPS - 1))
        wanted.append(run())
    pipe.set_adapters("a", lambda progress: progress)
    seen: list[Tensor] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.append(run())

    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(3):
        draw(pipe)
    over.set()
    thread.join()
    assert seen
    assert [one for one in seen if not any(torch.equal(one, other) for other in wanted)] == []


def test_calls_of_two_threads_that_share_a_scheduled_model_take_turns() -> None:
    def interrupt(pipe: Any, index: int, time: Any, tensors: Any) -> Any:
        raise KeyError(index)

    first = adapted("flux1")
    first.set_adapters(["a", "b"], [one_minus, ll.PerStep([0.25, 0.5, 2.0])])
    second = ll.attach(type(first)(**{**first.components, "scheduler": copy.deepcopy(first.scheduler)}))
    second.set_progress_bar_config(disable=True)
    expected = {first: draw(first), second: draw(second, 3)}
    assert not torch.equal(*expected.values())
    with pytest.raises(KeyError):
        draw(first, callback_on_step_end=interrupt)  # a call that fails holds nothing any more
    inside, over = threading.Event(), threading.Event()

    def wait(pipe: Any, index: int, time: Any, tensors: Any) -> Any:
        if index == 1:
            inside.set()
            assert not over.wait(1)  # the second call waits, however long this one takes
            draw(second, 1)  # a call within the call does not
        return tensors

    found: dict[Any, Tensor] = {}

    def run_first() -> None:
        found[first] = draw(first, callback_on_step_end=wait)

    def run_second() -> None:
        inside.wait(30)
        found[second] = draw(second, 3)
        over.set()

    threads = [threading.Thread(target=run, daemon=True) for run in (run_first, run_second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found.keys() == expected.keys(), "threads wait for each other"
    assert all(torch.equal(found[pipe], picture) for pipe, picture in expected.items())
