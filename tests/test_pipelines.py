"""The pipelines' methods, family by family: load, switch, scale, save, hotswap, and bad input that changes nothing."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    DENOISERS,
    FAMILIES,
    Made,
    adapter_file,
    add_changes,
    components_of,
    photograph,
    pipeline,
    render,
    scale_argument,
)
from torch import Tensor

import lora_loaders as ll
from lora_loaders.layout import adapter_layers

ROUNDING = {"rtol": 2e-4, "atol": 2e-4}
"""Two float32 orders of the same sums, through a tiny model whose latents reach some tens."""


MADE: dict[str, Made] = {}


def made_for(family: str, **options: Any) -> Made:
    """The same file for the same options; its scale keeps pictures near the plain one, so that rounding stays small."""
    key = f"{family} {sorted(options.items())}"
    if key not in MADE:
        MADE[key] = adapter_file(pipeline(family), **{"scale": 0.1, **options})
    return MADE[key]


def with_weights(family: str, *changes: tuple[Made, float | dict[str, float]]) -> Tensor:
    """The oracle: a plain pipeline with changed weights."""
    pipe = pipeline(family)
    for made, weight in changes:
        add_changes(pipe, made, weight)
    return render(pipe)


def attached(family: str) -> Any:
    return ll.attach(pipeline(family))


def denoiser(family: str) -> str:
    return DENOISERS.get(family, "transformer")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_a_loaded_adapter_paints_what_changed_weights_paint(family: str, style: str) -> None:
    if style == "kohya" and family in ("flux1", "qwen-image"):
        pytest.skip("their trainers fuse names, which the tests of reading cover")
    made = made_for(family, style=style)
    pipe = attached(family)
    plain = render(pipe)
    report = pipe.load_lora_weights(made.tensors, "a")
    assert report.components == {component: len(changes) for component, changes in made.changes.items()}
    assert report.unmatched == report.ignored == {}
    assert report.family == family
    got = render(pipe)
    assert (got - plain).abs().max() > 1e-2
    torch.testing.assert_close(got, with_weights(family, (made, 1.0)), **ROUNDING)
    pipe.unload_lora_weights()
    assert torch.equal(render(pipe), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_several_adapters_add_up(family: str) -> None:
    one, two = made_for(family), made_for(family, seed=2, rank=3, only="to_q|q_proj|SelfAttention.q")
    pipe = attached(family)
    pipe.load_lora_weights(one.tensors, "one")
    pipe.load_lora_weights(two.tensors, "two")
    assert pipe.get_active_adapters() == ["two"]
    torch.testing.assert_close(render(pipe), with_weights(family, (two, 1.0)), **ROUNDING)
    pipe.set_adapters(["one", "two"], [0.5, -0.8])
    torch.testing.assert_close(render(pipe), with_weights(family, (one, 0.5), (two, -0.8)), **ROUNDING)
    pipe.set_adapters(["two", "one"])
    torch.testing.assert_close(render(pipe), with_weights(family, (one, 1.0), (two, 1.0)), **ROUNDING)
    assert pipe.get_active_adapters() == ["two", "one"]
    pipe.set_adapters("one", 0.3)
    torch.testing.assert_close(render(pipe), with_weights(family, (one, 0.3)), **ROUNDING)
    pipe.set_adapters([])
    assert torch.equal(render(pipe), render(pipeline(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_by_component(family: str) -> None:
    made = made_for(family)
    pipe = attached(family)
    pipe.load_lora_weights(made.tensors, "a")
    weights = {denoiser(family): 0.5, "text_encoder": -0.5}
    for given in (weights, [weights]):
        pipe.set_adapters("a", given)
        torch.testing.assert_close(render(pipe), with_weights(family, (made, weights)), **ROUNDING)
    pipe.set_adapters("a", {denoiser(family): 0.0})  # what is not named keeps 1, as in diffusers
    torch.testing.assert_close(render(pipe), with_weights(family, (made, {denoiser(family): 0.0})), **ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.7])
def test_the_scale_of_a_call_holds_for_that_call(family: str, scale: float) -> None:
    made = made_for(family)
    pipe = attached(family)
    pipe.load_lora_weights(made.tensors, "a")
    pipe.set_adapters("a", 0.5)
    before = render(pipe)
    # Qwen-Image's pipeline gives the scale to the denoiser only; its prompt was encoded before the call here.
    factor = dict.fromkeys(components_of(pipe), 0.5 * scale)
    if family == "qwen-image":
        factor["text_encoder"] = 0.5
    got = render(pipe, **scale_argument(family, scale))
    torch.testing.assert_close(got, with_weights(family, (made, factor)), **ROUNDING)
    assert torch.equal(render(pipe), before)


def test_the_scale_is_gone_after_an_error_too() -> None:
    pipe = attached("sd15")
    pipe.load_lora_weights(made_for("sd15").tensors, "a")
    before = render(pipe)
    kept = pipe.unet.conv_out.forward

    def failing(x: Tensor) -> Tensor:
        raise RuntimeError("out of luck")

    pipe.unet.conv_out.forward = failing
    with pytest.raises(RuntimeError, match="luck"):
        render(pipe, cross_attention_kwargs={"scale": 0.1})
    pipe.unet.conv_out.forward = kept
    assert torch.equal(render(pipe), before)


def test_the_callers_scale_dictionary_is_left_alone() -> None:
    pipe = attached("sd15")
    pipe.load_lora_weights(made_for("sd15").tensors, "a")
    given = {"scale": 0.5}
    render(pipe, cross_attention_kwargs=given)
    assert given == {"scale": 0.5}


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux1"])
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_encode_prompt_takes_the_text_encoders_scale(family: str, scale: float) -> None:
    made = made_for(family)
    pipe, oracle = attached(family), pipeline(family)
    pipe.load_lora_weights(made.tensors, "a")
    add_changes(oracle, made, scale)
    arguments = {"prompt": "a dog", "device": "cpu", "num_images_per_prompt": 1}
    arguments |= {
        "sd15": {"do_classifier_free_guidance": False},
        "flux1": {"prompt_2": None, "max_sequence_length": 8},
    }.get(family, {})
    with torch.no_grad():
        got, wanted = pipe.encode_prompt(**arguments, lora_scale=scale), oracle.encode_prompt(**arguments)
        for one, other in zip(got, wanted, strict=True):
            if isinstance(one, Tensor):
                torch.testing.assert_close(one, other, **ROUNDING)
        unscaled = pipe.encode_prompt(**arguments)
        assert (unscaled[0] - got[0]).abs().max() > 1e-3


def test_unet_blocks_have_weights_of_their_own() -> None:
    family = "sd15"
    made = made_for(family, components=["unet"], only=r"attn\d\.to_|mid_block|up_blocks")
    pipe, oracle = attached(family), pipeline(family)
    pipe.load_lora_weights(made.tensors, "a")
    pipe.set_adapters("a", {"unet": {"down": 0.3, "mid": 0.0, "up": {"block_0": 0.5, "block_1": [0.7, -0.2]}}})

    def weight(path: str) -> float:
        if path.startswith("up_blocks.1"):
            return [0.7, -0.2][int(path.split(".")[3])] if "sampler" not in path else 0.7
        return {"down": 0.3, "mid_": 0.0, "up_b": 0.5}.get(path[:4], 1.0)

    with torch.no_grad():
        for path, change in made.changes["unet"].items():
            parameter = oracle.unet.get_submodule(path).weight
            parameter += (weight(path) if not path.startswith("down") else 0.3) * change.float()
    torch.testing.assert_close(render(pipe), render(oracle), **ROUNDING)


def test_transformer_blocks_have_weights_of_their_own() -> None:
    made = made_for("flux1", components=["transformer"])
    pipe, oracle = attached("flux1"), pipeline("flux1")
    pipe.load_lora_weights(made.tensors, "a")
    pipe.set_adapters("a", {"transformer": {"transformer_blocks.0": 0.5, "single_transformer_blocks.0.attn": -0.3}})
    with torch.no_grad():
        for path, change in made.changes["transformer"].items():
            factor = (
                0.5
                if path.startswith("transformer_blocks.0")
                else -0.3
                if "single" in path and ".attn" in path
                else 1.0
            )
            oracle.transformer.get_submodule(path).weight += factor * change.float()
    torch.testing.assert_close(render(pipe), render(oracle), **ROUNDING)


@pytest.mark.parametrize(("names", "weights"), [
    ("zzz", None),
    (["a", "zzz"], None),
    ("a", [1.0, 2.0]),
    ("a", {"unet": 1.0, "transformer": 0.5}),
    ("a", {"unet": {"down": {"block_9": 1.0}}}),
    ("a", {"text_encoder": {"no.such.path": 1.0}}),
    ("a", "much"),
    ("a", {"unet": 0.5, "text_encoder": "much"}),
])  # fmt: skip
def test_a_refused_switch_changes_nothing(names: Any, weights: Any) -> None:
    pipe = attached("sd15")
    pipe.load_lora_weights(made_for("sd15").tensors, "a")
    pipe.load_lora_weights(made_for("sd15", seed=2).tensors, "b")
    pipe.set_adapters(["a", "b"], [0.5, 0.25])
    pipe.disable_lora()
    before, off = photograph(pipe), render(pipe)
    with pytest.raises(ll.AdapterStateError):
        pipe.set_adapters(names, weights)
    assert before.differences(photograph(pipe)) == []
    assert torch.equal(render(pipe), off)


def test_an_adapter_of_one_component_leaves_the_other_components_to_the_others() -> None:
    pipe = attached("sd15")
    both = made_for("sd15")
    unet_only = made_for("sd15", seed=2, components=["unet"])
    pipe.load_lora_weights(both.tensors, "both")
    pipe.load_lora_weights(unet_only.tensors, "unet_only")
    assert pipe.get_list_adapters() == {"unet": ["both", "unet_only"], "text_encoder": ["both"]}
    assert pipe.unet.active_adapters() == ["unet_only"]
    assert pipe.text_encoder.active_adapters() == ["both"]
    pipe.set_adapters(["both", "unet_only"], [0.5, 1.0])
    torch.testing.assert_close(render(pipe), with_weights("sd15", (both, 0.5), (unet_only, 1.0)), **ROUNDING)
    pipe.set_adapters("unet_only")
    torch.testing.assert_close(render(pipe), with_weights("sd15", (unet_only, 1.0)), **ROUNDING)


def test_disable_and_enable() -> None:
    made = made_for("sd15")
    pipe = attached("sd15")
    plain = render(pipe)
    pipe.load_lora_weights(made.tensors, "a")
    with_it = render(pipe)
    pipe.disable_lora()
    assert torch.equal(render(pipe), plain)
    pipe.enable_lora()
    assert torch.equal(render(pipe), with_it)
    pipe.disable_lora()
    pipe.set_adapters("a")  # switching on by name switches on
    assert torch.equal(render(pipe), with_it)
    pipe.disable_lora()
    pipe.load_lora_weights(made.tensors, "b")  # and so does loading
    assert torch.equal(render(pipe), with_it)


def test_unnamed_adapters_get_the_first_free_number() -> None:
    tensors = made_for("sd15", components=["unet"]).tensors
    pipe = attached("sd15")
    assert [pipe.load_lora_weights(tensors).adapter_name for _ in range(3)] == ["default_0", "default_1", "default_2"]
    pipe.delete_adapters("default_1")
    second = made_for("sd15", seed=4, components=["unet"])
    assert pipe.load_lora_weights(second.tensors).adapter_name == "default_1"
    pipe.set_adapters("default_2")
    torch.testing.assert_close(
        render(pipe), with_weights("sd15", (made_for("sd15", components=["unet"]), 1.0)), **ROUNDING
    )


def test_methods_without_any_adapter_do_nothing() -> None:
    pipe = attached("sd15")
    before = photograph(pipe)
    pipe.disable_lora()
    pipe.enable_lora()
    pipe.unload_lora_weights()
    pipe.fuse_lora()
    pipe.unfuse_lora()
    assert pipe.get_list_adapters() == {}
    assert pipe.get_active_adapters() == []
    assert (pipe.fused_loras, pipe.num_fused_loras) == (set(), 0)
    with pytest.raises(ll.AdapterStateError, match="zzz"):
        pipe.delete_adapters("zzz")
    with pytest.raises(ll.AdapterStateError, match="No adapter loaded"):
        pipe.unet.active_adapters()
    assert before.differences(photograph(pipe)) == []


def test_parking_an_adapter_keeps_the_picture() -> None:
    pipe = attached("sd15")
    pipe.load_lora_weights(made_for("sd15").tensors, "a")
    before = render(pipe)
    pipe.set_lora_device(["a"], "cpu")
    assert torch.equal(render(pipe), before)
    with pytest.raises(ll.AdapterStateError, match="zzz"):
        pipe.set_lora_device(["zzz"], "cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "meta:1:2", "meta"])
def test_a_device_that_is_not_there_moves_nothing(device: str) -> None:
    pipe = attached("sd15")
    pipe.load_lora_weights(made_for("sd15").tensors, "a")
    before = photograph(pipe)
    with pytest.raises(ll.AdapterStateError, match=device) as caught:
        pipe.set_lora_device(["a"], device)
    assert "Nothing was changed" in str(caught.value)
    assert before.differences(photograph(pipe)) == []


# Saving


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya", "original", "diffusers-old"])
def test_what_is_loaded_can_be_saved_and_loaded_again(family: str, format: str, tmp_path: Path) -> None:
    made = made_for(family)
    if format == "peft":  # a PEFT folder is for one model
        made = made_for(family, components=[denoiser(family)])
    pipe = attached(family)
    pipe.load_lora_weights(made.tensors, "a")
    wanted = render(pipe)
    path = pipe.save_lora_weights(tmp_path, format=format)
    assert path.is_file()
    again = attached(family)
    report = again.load_lora_weights(tmp_path)
    assert report.components == {component: len(changes) for component, changes in made.changes.items()}
    assert torch.equal(render(again), wanted)


def test_alpha_and_rank_patterns_survive_a_round_trip(tmp_path: Path) -> None:
    one = made_for("sd15", rank=4, alpha=2.0, style="kohya", only="to_q")
    two = made_for("sd15", rank=8, alpha=3.0, style="kohya", only="to_k", seed=9)
    tensors = {**one.tensors, **two.tensors}
    pipe = attached("sd15")
    pipe.load_lora_weights(tensors, "a")
    wanted = render(pipe)
    pipe.save_lora_weights(tmp_path / "x")
    metadata = json.loads(ll.read_adapter(tmp_path / "x").metadata["lora_adapter_metadata"])
    assert {metadata["unet.r"], *metadata["unet.rank_pattern"].values()} == {4, 8}
    assert {metadata["unet.lora_alpha"], *metadata["unet.alpha_pattern"].values()} == {2.0, 3.0}
    pipe.load_lora_weights(tmp_path / "x", adapter_name="b")
    assert torch.equal(render(pipe), wanted)
    path = pipe.save_lora_weights(tmp_path / "y", adapter_name="a", format="kohya")
    written = load_file(path)
    for key, tensor in tensors.items():
        assert torch.equal(written[key], tensor), key


def test_saving_says_which_adapters_there_are(tmp_path: Path) -> None:
    pipe = attached("sd15")
    with pytest.raises(ll.AdapterStateError, match="no adapters are loaded"):
        pipe.save_lora_weights(tmp_path)
    for name in "ab":
        pipe.load_lora_weights(made_for("sd15", components=["unet"]).tensors, name)
    with pytest.raises(ll.AdapterStateError, match="loaded: b"):
        pipe.save_lora_weights(tmp_path)
    with pytest.raises(ll.AdapterStateError, match="zzz"):
        pipe.save_lora_weights(tmp_path, adapter_name="zzz")
    assert list(tmp_path.iterdir()) == []
    assert pipe.save_lora_weights(tmp_path, adapter_name="a", is_main_process=False) is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ll.AdapterFileError, match="directory"):
        pipe.save_lora_weights(tmp_path / "file", adapter_name="a")


def test_layers_that_are_handed_over_are_saved_by_class_and_instance(tmp_path: Path) -> None:
    pipe = attached("flux1")
    layers = {
        "single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.randn(4, 64)[:, ::2],
        "single_transformer_blocks.0.attn.to_q.lora_B.weight": torch.randn(32, 4),
    }
    metadata = {"r": 4, "lora_alpha": 8, "target_modules": {"to_q"}}
    for owner in (pipe, type(pipe), ll.FluxLoraLoaderMixin):
        path = owner.save_lora_weights(
            tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
        )
        written = load_file(path)
        assert set(written) == {f"transformer.{key}" for key in layers}
        assert all(torch.equal(written[f"transformer.{key}"], tensor) for key, tensor in layers.items())
    delta = ll.read_adapter(path).deltas["transformer"]["single_transformer_blocks.0.attn.to_q"]
    assert delta.alpha_value == 8
    with pytest.raises(ValueError, match="at least one"):
        ll.FluxLoraLoaderMixin.save_lora_weights(tmp_path)
    with pytest.raises(TypeError, match="nonsense"):
        pipe.save_lora_weights(tmp_path, nonsense=1)


# Bad input: a typed error, and nothing changed


def q(path: str = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q") -> tuple[str, str]:
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


def bad_tensors(kind: str) -> dict[str, Tensor]:
    good = adapter_file(pipeline("sd15"), only="to_k|q_proj").tensors
    down, up = q()
    encoder = next(key for key in good if key.startswith("text_encoder"))
    return {
        "rank mismatch": {**good, down: torch.ones(4, 16), up: torch.ones(16, 3)},
        "wrong shape": {**good, down: torch.ones(4, 17), up: torch.ones(16, 4)},
        "wrong shape in the last component": {**good, encoder: torch.ones(4, 7)},
        "half a pair": {**good, down: torch.ones(4, 16)},
        "another family": adapter_file(pipeline("flux1"), components=["transformer"]).tensors,
        "a whole model": dict(pipeline("sd15").unet.state_dict()),
        "empty": {},
        "foreign keys": {"abc": torch.ones(2), "def.weight": torch.ones(3)},
        "nothing fits": {k.replace("blocks.", "blocks.7"): t for k, t in good.items() if k.startswith("unet")},
        "one dimension": {**good, down: torch.ones(4), up: torch.ones(16, 4)},
    }[kind]


KINDS = [
    "rank mismatch",
    "wrong shape",
    "wrong shape in the last component",
    "half a pair",
    "another family",
    "a whole model",
    "empty",
    "foreign keys",
    "nothing fits",
    "one dimension",
]


@pytest.fixture(scope="module")
def loaded() -> Any:
    """A pipeline with two weighted adapters; tests on it must leave it as it is."""
    pipe = attached("sd15")
    pipe.load_lora_weights(made_for("sd15").tensors, "a")
    pipe.load_lora_weights(made_for("sd15", seed=2).tensors, "b")
    pipe.set_adapters(["a", "b"], [0.5, 0.25])
    return pipe


@pytest.mark.parametrize("from_file", [False, True], ids=["dictionary", "file"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_load_leaves_model_and_active_set_as_they_were(
    loaded: Any, kind: str, from_file: bool, tmp_path: Path
) -> None:
    source: Any = bad_tensors(kind)
    if from_file:
        save_file({key: tensor.contiguous() for key, tensor in source.items()}, tmp_path / "x.safetensors")
        source = tmp_path / "x.safetensors"
    before, picture = photograph(loaded), render(loaded)
    with pytest.raises((ll.AdapterFileError, ll.AdapterMismatchError)) as error:
        loaded.load_lora_weights(source, "new")
    assert error.value.state, "the message says what state things are in"
    assert before.differences(photograph(loaded)) == []
    assert torch.equal(render(loaded), picture)


@pytest.mark.parametrize("kind", ["truncated", "garbage", "empty file", "missing", "pickle", "lying header"])
def test_a_bad_file_leaves_everything_as_it_was(loaded: Any, kind: str, tmp_path: Path) -> None:
    good = adapter_file(pipeline("sd15"), only="to_k").tensors
    path = tmp_path / "x.safetensors"
    save_file(good, path)
    data = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[:-100])
    elif kind == "garbage":
        path.write_bytes(b"garbage" * 100)
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "missing":
        path = tmp_path / "y.safetensors"
    elif kind == "lying header":
        path.write_bytes((2**40).to_bytes(8, "little") + data[8:])
    else:
        path = tmp_path / "x.bin"
        torch.save(good, path)
    before = photograph(loaded)
    with pytest.raises(ll.AdapterFileError):
        loaded.load_lora_weights(path, "new")
    assert before.differences(photograph(loaded)) == []


def test_an_offline_hub_is_a_clear_error(loaded: Any) -> None:
    before = photograph(loaded)
    with pytest.raises(ll.AdapterFileError, match="nobody/nothing"):
        loaded.load_lora_weights("nobody/nothing", local_files_only=True, weight_name="x.safetensors")
    assert before.differences(photograph(loaded)) == []


def test_a_taken_name_is_refused_in_diffusers_words(loaded: Any) -> None:
    before = photograph(loaded)
    with pytest.raises(
        ValueError, match=r"Adapter name a already in use in the model - please select a new adapter name\."
    ):
        loaded.load_lora_weights(made_for("sd15").tensors, "a")
    assert before.differences(photograph(loaded)) == []


def test_unknown_options_are_refused(loaded: Any) -> None:
    with pytest.raises(TypeError, match="adapter_nam"):
        loaded.load_lora_weights(made_for("sd15").tensors, adapter_nam="x")


def test_some_keys_without_a_place_are_one_warning_or_an_error(caplog: pytest.LogCaptureFixture) -> None:
    pipe = attached("sd15")
    stray = q("unet.down_blocks.0.attentions.5.transformer_blocks.0.attn1.to_q")
    tensors = {**made_for("sd15").tensors, stray[0]: torch.ones(4, 16), stray[1]: torch.ones(16, 4)}
    before = photograph(pipe)
    with pytest.raises(ll.AdapterMismatchError, match=re.escape("attentions.5")) as error:
        pipe.load_lora_weights(tensors, "a", strict=True)
    assert "nearest" in str(error.value)
    assert before.differences(photograph(pipe)) == []
    with caplog.at_level(logging.WARNING, "lora_loaders"):
        report = pipe.load_lora_weights(tensors, "a")
    assert list(report.unmatched) == ["unet.down_blocks.0.attentions.5.transformer_blocks.0.attn1.to_q"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "attentions.5" in caplog.records[0].getMessage()
    torch.testing.assert_close(render(pipe), with_weights("sd15", (made_for("sd15"), 1.0)), **ROUNDING)


def test_a_missing_text_encoder_is_tolerated() -> None:
    pipe = pipeline("sd15")
    pipe.text_encoder = None
    ll.attach(pipe)
    report = pipe.load_lora_weights(made_for("sd15").tensors, "a")
    assert list(report.components) == ["unet"]
    assert all("text_encoder" in label for label in report.unmatched)
    with pytest.raises(ll.AdapterMismatchError):
        pipe.load_lora_weights(made_for("sd15").tensors, "b", strict=True)


def test_nan_loads_and_is_named_by_safe_fusing_only() -> None:
    tensors = made_for("sd15", components=["unet"]).tensors
    key = next(iter(tensors))
    pipe = attached("sd15")
    pipe.load_lora_weights({**tensors, key: torch.full_like(tensors[key], float("nan"))}, "a")
    with pytest.raises(ll.AdapterStateError, match="NaN"):
        pipe.fuse_lora(safe_fusing=True)


# Hotswap


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hotswap_takes_over_weight_and_activity(family: str) -> None:
    one, two, other = made_for(family), made_for(family, seed=2, rank=6), made_for(family, seed=3, only="to_q")
    pipe = attached(family)
    pipe.load_lora_weights(one.tensors, "a")
    pipe.load_lora_weights(other.tensors, "other")
    pipe.set_adapters(["a", "other"], [0.5, 0.25])
    pipe.load_lora_weights(two.tensors, "a", hotswap=True)
    assert pipe.get_active_adapters() == ["a", "other"]
    torch.testing.assert_close(render(pipe), with_weights(family, (two, 0.5), (other, 0.25)), **ROUNDING)
    pipe.set_adapters("other")
    pipe.load_lora_weights(one.tensors, "a", hotswap=True)
    assert pipe.get_active_adapters() == ["other"]
    torch.testing.assert_close(render(pipe), with_weights(family, (other, 1.0)), **ROUNDING)


def storage(model: Any) -> dict[str, tuple[int, int, int]]:
    """Each layer's object and its slot's memory, by path."""
    layers: list[tuple[str, Any]] = list(adapter_layers(model))
    return {path: (id(layer), layer.slot_down.data_ptr(), layer.slot_up.data_ptr()) for path, layer in layers}


def test_a_hotswap_writes_into_the_same_storage() -> None:
    pipe = attached("sd15")
    pipe.enable_lora_hotswap(target_rank=16)
    pipe.load_lora_weights(made_for("sd15", rank=4).tensors, "a")
    before = storage(pipe.unet)
    fewer = made_for("sd15", rank=16, seed=2, only="to_q|to_v")
    pipe.load_lora_weights(fewer.tensors, "a", hotswap=True)
    assert storage(pipe.unet) == before
    torch.testing.assert_close(render(pipe), with_weights("sd15", (fewer, 1.0)), **ROUNDING)
    pipe.unload_lora_weights()
    assert adapter_layers(pipe.unet) == []


def test_a_hotswap_may_change_other_modules_and_components() -> None:
    pipe = attached("sd15")
    unet_only = made_for("sd15", components=["unet"], only="to_q", seed=2)
    encoder_only = made_for("sd15", components=["text_encoder"], seed=3)
    pipe.load_lora_weights(made_for("sd15").tensors, "a")
    pipe.load_lora_weights(unet_only.tensors, "a", hotswap=True)
    assert pipe.get_list_adapters() == {"unet": ["a"]}
    torch.testing.assert_close(render(pipe), with_weights("sd15", (unet_only, 1.0)), **ROUNDING)
    pipe.load_lora_weights(encoder_only.tensors, "a", hotswap=True)
    assert pipe.get_list_adapters() == {"text_encoder": ["a"]}
    assert adapter_layers(pipe.unet) == []
    torch.testing.assert_close(render(pipe), with_weights("sd15", (encoder_only, 1.0)), **ROUNDING)


def test_a_refused_hotswap_changes_nothing(loaded: Any) -> None:
    before = photograph(loaded)
    for name in ("zzz", None):  # diffusers wants the name of what is replaced, too
        with pytest.raises(ll.AdapterStateError, match=f"'{name}' but there is no existing adapter by that name"):
            loaded.load_lora_weights(made_for("sd15").tensors, name, hotswap=True)
    with pytest.raises((ll.AdapterMismatchError, ll.AdapterFileError)):
        loaded.load_lora_weights(bad_tensors("wrong shape in the last component"), "a", hotswap=True)
    assert before.differences(photograph(loaded)) == []


# Control


def test_a_control_pipeline_paints_with_its_control_file() -> None:
    pipe = attached("flux1-control")
    made = adapter_file(pipe, components=["transformer"], only="attn")
    stem = "transformer.x_embedder"
    tensors = {**made.tensors, f"{stem}.lora_A.weight": torch.randn(4, 32), f"{stem}.lora_B.weight": torch.randn(32, 4)}
    before = photograph(pipe)
    pipe.load_lora_weights(tensors, "control")
    picture = render(pipe)
    assert picture.isfinite().all()
    assert (render(pipe, joint_attention_kwargs={"scale": 0.0}) - picture).abs().max() > 1e-3
    pipe.fuse_lora()
    torch.testing.assert_close(render(pipe), picture, rtol=1e-3, atol=1e-3)
    pipe.unfuse_lora()
    pipe.delete_adapters("control")
    assert before.differences(photograph(pipe)) == []


def test_lora_state_dict_returns_what_diffusers_returns() -> None:
    tensors = adapter_file(pipeline("sd15"), style="kohya").tensors
    state, alphas = ll.StableDiffusionLoraLoaderMixin.lora_state_dict(tensors)
    assert all(re.match(r"(unet|text_encoder)\..+\.lora", key) for key in state)
    assert set(alphas.values()) == {2.0}
    state, alphas, metadata = ll.StableDiffusionXLLoraLoaderMixin.lora_state_dict(tensors, return_lora_metadata=True)
    assert metadata is None or isinstance(metadata, dict)
    flux = adapter_file(pipeline("flux1"), components=["transformer"]).tensors
    assert set(ll.FluxLoraLoaderMixin.lora_state_dict(flux)) == set(flux)
    assert isinstance(ll.FluxLoraLoaderMixin.lora_state_dict(flux, return_alphas=True), tuple)
