"""Compiled models: whatever becomes of the adapters, nothing is compiled again, and the result is the right one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Made, adapter_file, add_changes, flux, pipeline, render
from torch import Tensor
from torch._dynamo.exc import RecompileError

import lora_loaders as ll
from lora_loaders.layout import adapter_layers

INPUTS = {
    "hidden_states": torch.linspace(-1, 1, 64).view(1, 4, 16),
    "encoder_hidden_states": torch.linspace(-1, 1, 96).view(1, 3, 32),
    "pooled_projections": torch.linspace(-1, 1, 32).view(1, 32),
    "timestep": torch.tensor([0.5]),
    "img_ids": torch.zeros(4, 3),
    "txt_ids": torch.zeros(3, 3),
    "guidance": torch.tensor([3.5]),
    "return_dict": False,
}
RANK = 16
no_recompile = torch._dynamo.config.patch(error_on_recompile=True)


def _repeated_blocks(model: Any, **options: Any) -> Any:
    model.compile_repeated_blocks(**options)
    return model


def _in_place(model: Any, **options: Any) -> Any:
    model.compile(**options)
    return model


WAYS: dict[str, Callable[..., Any]] = {
    "repeated blocks": _repeated_blocks,
    "model.compile": _in_place,
    "torch.compile": torch.compile,
}


def made_for(modules: Sequence[str], rank: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file for some modules, and the change that it makes of each."""
    made: Made = adapter_file(pipeline("flux1"), components=["transformer"], seed=seed, rank=rank, scale=0.3)
    own = tuple(f".{module}" for module in modules)
    tensors = {key: t for key, t in made.tensors.items() if key.split(".lora")[0].removesuffix(".alpha").endswith(own)}
    return tensors, {path: c for path, c in made.changes["transformer"].items() if path.endswith(own)}


def fresh() -> Any:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return ll.attach(flux())


def wanted(*terms: tuple[float, dict[str, Tensor]]) -> Tensor:
    """What a plain model gives whose weights hold the changes."""
    torch.manual_seed(0)
    model = flux()
    with torch.no_grad():
        for weight, changes in terms:
            for path, change in changes.items():
                model.get_submodule(path).weight += weight * change.float()
        return model(**INPUTS)[0]


def check(model: Any, expected: Tensor, **kwargs: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(**INPUTS, **kwargs)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["compile", "load"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_that_becomes_of_adapters_recompiles(way: str, first: str) -> None:
    model = fresh()
    model.enable_lora_hotswap(target_rank=RANK, targets="all-linear")
    (a, of_a), (b, of_b), (c, of_c) = (
        made_for(["to_q", "to_k"], 4, 1),
        made_for(["to_k", "proj_mlp"], 8, 2),
        made_for(["to_v", "norm1.linear"], 2, 3),
    )
    full, of_full = made_for(["to_out.0", "to_k"], RANK, 4)
    assert of_a.keys() & of_b.keys()
    assert not of_a.keys() & of_c.keys()
    assert (wanted((1.0, of_a)) - wanted()).abs().max() > 1e-3
    if first == "load":
        model.load_lora_adapter(a, adapter_name="a")
    compiled = WAYS[way](model, backend="eager", fullgraph=True)
    check(compiled, wanted((1.0, of_a)) if first == "load" else wanted())
    with no_recompile:
        if first == "compile":
            model.load_lora_adapter(a, adapter_name="a")
        check(compiled, wanted((1.0, of_a)))
        model.load_lora_adapter(b, adapter_name="b")
        check(compiled, wanted((1.0, of_b)))
        model.set_adapters(["a", "b"], [0.5, -2.0])
        check(compiled, wanted((0.5, of_a), (-2.0, of_b)))
        model.disable_lora()
        check(compiled, wanted())
        model.enable_lora()
        model.load_lora_adapter(c, adapter_name="a", hotswap=True)  # other modules, another rank, the weight of before
        check(compiled, wanted((0.5, of_c), (-2.0, of_b)))
        model.delete_adapters("b")
        check(compiled, wanted((0.5, of_c)))
        model.load_lora_adapter(full, adapter_name="a", hotswap=True)  # as high as there is room
        check(compiled, wanted((0.5, of_full)))
        model.delete_adapters("a")
        check(compiled, wanted())
        model.load_lora_adapter(b, adapter_name="d")
        check(compiled, wanted((1.0, of_b)))


def test_a_unet_swaps_convolutions_too_without_recompiling() -> None:
    torch._dynamo.reset()
    pipe: Any = ll.attach(pipeline("sd15"))
    inputs = (torch.linspace(-1, 1, 256).view(1, 4, 8, 8), 5, torch.linspace(-1, 1, 96).view(1, 3, 32))
    low, high = (adapter_file(pipe, components=["unet"], seed=s, rank=r) for s, r in ((1, 2), (2, RANK)))
    pipe.load_lora_weights(low.tensors, "a")
    pipe.enable_lora_hotswap(target_rank=RANK)
    pipe.unet.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        pipe.unet(*inputs)
        with no_recompile:
            pipe.load_lora_weights(high.tensors, "a", hotswap=True)
            swapped = pipe.unet(*inputs).sample
            pipe.set_adapters("a", {"unet": {"down": 0.5, "mid": 0.0}})
            pipe.unet(*inputs)
            pipe.delete_adapters("a")
            pipe.unet(*inputs)
        plain: Any = pipeline("sd15")
        add_changes(plain, high)
        torch.testing.assert_close(swapped, plain.unet(*inputs).sample, rtol=1e-3, atol=1e-4)


def test_a_number_as_scale_recompiles_no_block() -> None:
    model = fresh()
    tensors, changes = made_for(["to_q"], 4, 1)
    model.load_lora_adapter(tensors, adapter_name="a")
    _repeated_blocks(model, backend="aot_eager", fullgraph=True)
    check(model, wanted((1.0, changes)))
    with no_recompile:
        for scale in (0.5, 0.0, 1.0, -3.0):
            check(model, wanted((scale, changes)), joint_attention_kwargs={"scale": scale})
            check(model, wanted((1.0, changes)))


def test_a_tensor_as_scale_does_not_recompile_a_whole_model() -> None:
    model = fresh()
    tensors, changes = made_for(["to_q"], 4, 1)
    model.load_lora_adapter(tensors, adapter_name="a")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    check(compiled, wanted((0.7, changes)), joint_attention_kwargs={"scale": torch.tensor(0.7)})
    with no_recompile:
        for scale in (0.5, 0.0, 1.0):
            check(compiled, wanted((scale, changes)), joint_attention_kwargs={"scale": torch.tensor(scale)})
    check(compiled, wanted((1.0, changes)))


def test_a_text_encoder_swaps_without_recompiling() -> None:
    torch._dynamo.reset()
    pipe: Any = ll.attach(pipeline("sd15"))
    ids = torch.arange(8).view(1, 8)
    one, two = (adapter_file(pipe, components=["text_encoder"], seed=s, rank=r) for s, r in ((1, 2), (2, 8)))
    pipe.enable_lora_hotswap(target_rank=RANK, targets={"text_encoder": ["q_proj", "v_proj", "k_proj", "out_proj"]})
    pipe.text_encoder.compile(backend="eager")
    with torch.no_grad():
        pipe.load_lora_weights(one.tensors, "a")
        first = pipe.text_encoder(ids)[0]
        with no_recompile:
            pipe.load_lora_weights(two.tensors, "a", hotswap=True)
            swapped = pipe.text_encoder(ids)[0]
        pipe.text_encoder._compiled_call_impl = None
        torch.testing.assert_close(swapped, pipe.text_encoder(ids)[0])
    assert (first - swapped).abs().max() > 1e-4


def test_a_full_change_recompiles_once_and_then_never() -> None:
    model = fresh()
    model.enable_lora_hotswap(target_rank=RANK, targets=["to_q"])
    _, changes = made_for(["to_q"], 4, 1)
    path, change = next(iter(changes.items()))
    model.load_lora_adapter({f"transformer.{path}.diff": change.float()}, adapter_name="full")
    _repeated_blocks(model, backend="eager", fullgraph=True)
    check(model, wanted((1.0, {path: change})))
    with no_recompile:
        model.disable_lora()
        check(model, wanted())
        model.set_adapters("full", 0.5)
        check(model, wanted((0.5, {path: change})))
        model.delete_adapters("full")
        check(model, wanted())


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The package's own words; torch logs as well."""
    return [record.message for record in caplog.records if record.name == "lora_loaders.hotswap"]


@pytest.mark.parametrize("way", ["repeated blocks", "model.compile"])
def test_room_that_is_made_in_a_compiled_model_is_refused_said_or_made(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = fresh()
    tensors, changes = made_for(["to_q"], 4, 1)
    model.load_lora_adapter(tensors, adapter_name="a")
    model.enable_lora_hotswap(target_rank=4)  # before it is compiled: diffusers refuses that as well
    compiled = WAYS[way](model, backend="eager", fullgraph=True)
    check(compiled, wanted((1.0, changes)))
    slots = {path: layer.slot_down for path, layer in adapter_layers(model)}
    model.enable_lora_hotswap(target_rank=4)  # there already
    for options in ({"target_rank": RANK}, {"target_rank": 4, "targets": ["to_k"]}):
        with pytest.raises(ll.AdapterStateError, match="is compiled") as error:
            model.enable_lora_hotswap(**options)
        assert any(".to_q: room for rank 8" in p or ".to_k: room for rank 0" in p for p in error.value.problems)
    assert slots == {path: layer.slot_down for path, layer in adapter_layers(model)}
    with no_recompile:
        check(compiled, wanted((1.0, changes)))
    assert said(caplog) == []
    model.enable_lora_hotswap(target_rank=RANK, check_compiled="warn")
    assert len(said(caplog)) == 1
    model.enable_lora_hotswap(target_rank=RANK, targets=["to_k"], check_compiled="ignore")
    assert len(said(caplog)) == 1
    check(compiled, wanted((1.0, changes)))
    with pytest.raises(ValueError, match="check_compiles should be one of"):
        model.enable_lora_hotswap(check_compiled="never")


def test_a_pipeline_tells_a_component_that_torch_compile_wraps() -> None:
    torch._dynamo.reset()
    pipe: Any = ll.attach(pipeline("flux1"))
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ll.AdapterStateError, match="transformer is compiled"):
        pipe.enable_lora_hotswap(target_rank=RANK, targets={"transformer": ["to_q"], "text_encoder": ["q_proj"]})
    assert not [layer for model in pipe.lora_components.values() for layer in adapter_layers(model)]
    pipe.enable_lora_hotswap(target_rank=RANK, targets={"text_encoder": ["q_proj"]})


def test_a_component_that_is_wrapped_after_loading_keeps_its_adapters(tmp_path: Path) -> None:
    pipe: Any = ll.attach(pipeline("flux1"))
    (a, of_a), (b, of_b) = made_for(["to_q"], 4, 1), made_for(["proj_mlp"], 4, 2)
    pipe.load_lora_weights(a, "a")
    own = pipe.transformer
    with torch.no_grad():
        bare = own(**INPUTS)[0]
    pipe.set_adapters("a", 0.5)
    with torch.no_grad():
        half = own(**INPUTS)[0]
    torch._dynamo.reset()
    pipe.transformer = torch.compile(own, backend="eager")
    assert pipe.get_list_adapters() == {"transformer": ["a"]}
    check(pipe.transformer, half)
    pipe.set_adapters("a", 1.0)
    check(pipe.transformer, bare)
    pipe.load_lora_weights(b, "b")
    pipe.set_adapters(["a", "b"])
    assert {path for path, _ in adapter_layers(own)} == of_a.keys() | of_b.keys()
    pipe.save_lora_weights(tmp_path, adapter_name="b")
    assert ll.read_adapter(tmp_path).deltas["transformer"].keys() == of_b.keys()
    pipe.fuse_lora()
    pipe.unfuse_lora()
    ll.detach(pipe)
    assert not adapter_layers(own)
    assert not own._forward_pre_hooks
    assert not vars(pipe.transformer)["_forward_pre_hooks"]


@pytest.mark.parametrize("ranks", [(11, 11), (7, 13), (13, 7)], ids=str)
def test_a_pipeline_hotswaps_into_a_component_that_was_wrapped_after_loading(ranks: tuple[int, int]) -> None:
    """As diffusers' TestLoraHotSwappingForPipeline does, for its projections and convolutions at once."""
    first, second = (
        adapter_file(pipeline("sd15"), components=["unet"], rank=rank, seed=seed, scale=0.2).tensors
        for seed, rank in enumerate(ranks)
    )
    alone: list[Tensor] = []
    for tensors in (first, second):
        plain = ll.attach(pipeline("sd15"))
        plain.load_lora_weights(tensors)
        alone.append(render(plain))
    assert not torch.allclose(*alone, atol=1e-3, rtol=1e-3)
    torch._dynamo.reset()
    pipe: Any = ll.attach(pipeline("sd15"))
    pipe.enable_lora_hotswap(target_rank=max(ranks))
    pipe.load_lora_weights(first)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    torch.testing.assert_close(render(pipe), alone[0], atol=1e-3, rtol=1e-3)
    with no_recompile:
        pipe.load_lora_weights(second, hotswap=True, adapter_name="default_0")
        torch.testing.assert_close(render(pipe), alone[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("first", ["compile", "load"])
def test_blocks_that_are_wrapped_one_by_one_carry_adapters(first: str, tmp_path: Path) -> None:
    model = fresh()
    tensors, changes = made_for(["to_q", "proj_mlp"], 4, 1)
    if first == "load":
        model.load_lora_adapter(tensors, adapter_name="a")
    wrapped: list[tuple[Any, Any]] = []
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        blocks[0] = torch.compile(blocks[0], backend="eager")
        wrapped.append((blocks, blocks[0]))
    if first == "compile":
        model.load_lora_adapter(tensors, adapter_name="a")
    check(model, wanted((1.0, changes)))
    model.set_adapters("a", {"single_transformer_blocks.0": 0.0})
    double = {path: change for path, change in changes.items() if not path.startswith("single")}
    check(model, wanted((1.0, double)))
    model.save_lora_adapter(tmp_path, "a")
    assert ll.read_adapter(tmp_path).deltas["transformer"].keys() == changes.keys()
    model.unload_lora()
    check(model, wanted())
    assert all(blocks[0] is block for blocks, block in wrapped)


@pytest.mark.parametrize("check_compiled", ["error", "warn", "ignore"])
def test_a_swap_that_finds_no_room_in_a_compiled_model_does_as_it_was_told(
    check_compiled: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = fresh()
    model.enable_lora_hotswap(target_rank=8, check_compiled=check_compiled, targets=["to_q"])
    (a, of_a), (other, of_other), (high, of_high) = (
        made_for(["to_q"], 4, 1),
        made_for(["to_q", "to_k"], 4, 2),
        made_for(["to_q"], 12, 3),
    )
    model.load_lora_adapter(made_for(["to_v"], 12, 4)[0], adapter_name="a")
    model.load_lora_adapter(a, adapter_name="a", hotswap=True)  # as long as it is not compiled, all may come
    compiled = WAYS["model.compile"](model, backend="eager", fullgraph=True)
    check(compiled, wanted((1.0, of_a)))
    for tensors, changes in ((high, of_high), (other, of_other)):
        caplog.clear()
        if check_compiled == "error":
            with pytest.raises(ll.AdapterStateError, match="is compiled"), no_recompile:
                model.load_lora_adapter(tensors, adapter_name="a", hotswap=True)
            with no_recompile:
                check(compiled, wanted((1.0, of_a)))
        else:
            model.load_lora_adapter(tensors, adapter_name="a", hotswap=True)
            assert len(said(caplog)) == (check_compiled == "warn")
            check(compiled, wanted((1.0, changes)))


def test_a_switch_after_room_was_made_empties_the_slots_that_came_with_it() -> None:
    model = fresh()
    (one, q), (other, k) = made_for(["to_q"], RANK, 1), made_for(["to_k"], RANK, 2)
    model.load_lora_adapter(one, adapter_name="one")
    model.load_lora_adapter(other, adapter_name="other")
    model.set_adapters("one")
    model.enable_lora_hotswap(target_rank=RANK)
    model.set_adapters("other")
    model.set_adapters("one")
    check(model, wanted((1.0, q)))
    model.set_adapters("other")
    check(model, wanted((1.0, k)))


def test_reserved_room_changes_nothing_and_goes_with_unloading() -> None:
    model = fresh()
    before = {name: type(module) for name, module in model.named_modules()}
    model.enable_lora_hotswap(target_rank=RANK, targets=["to_q"])
    assert {layer.slot_down.shape[0] for _, layer in adapter_layers(model) if layer.slot_down is not None} == {RANK}
    assert {path.rpartition(".")[2] for path, _ in adapter_layers(model)} == {"to_q"}
    check(model, wanted())
    model.unload_lora()
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("way", WAYS)
def test_room_in_a_compiled_model_outlasts_unloading(way: str) -> None:
    model, pipe = fresh(), pipeline("flux1")
    before = {name: type(module) for name, module in model.named_modules()}
    pipe.transformer = model
    ll.attach(pipe).enable_lora_hotswap(target_rank=RANK, targets={"transformer": "all-linear"})
    (a, of_a), (b, of_b) = made_for(["to_q", "to_k"], 4, 1), made_for(["to_v", "proj_mlp"], 8, 2)
    pipe.transformer = WAYS[way](model, backend="eager", fullgraph=True)
    check(pipe.transformer, wanted())
    with no_recompile:
        for tensors, changes in ((a, of_a), (b, of_b)):
            pipe.load_lora_weights(tensors, adapter_name="a")
            check(pipe.transformer, wanted((1.0, changes)))
            pipe.unload_lora_weights()
            check(pipe.transformer, wanted())
        pipe.load_lora_weights(a, adapter_name="a")
        pipe.fuse_lora()
        pipe.unload_lora_weights(keep_fused=True)
        check(pipe.transformer, wanted((1.0, of_a)))
    model.unload()  # PEFT's name asks for the plain model
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("rank", [0, -8, 2.5, "8"])
def test_room_for_no_whole_rank_changes_nothing(rank: Any) -> None:
    model = fresh()
    with pytest.raises(ValueError, match="whole number"):
        model.enable_lora_hotswap(target_rank=rank, targets="all-linear")
    assert not adapter_layers(model)


@pytest.mark.parametrize("targets", [["no_such"], {"vae": ["to_q"]}, {"transformer": ["to_q"], "text_encoder": ["no"]}])
def test_targets_that_mean_nothing_change_nothing(targets: Any) -> None:
    pipe: Any = ll.attach(pipeline("flux1"))
    with pytest.raises(ll.AdapterMismatchError, match="means no module"):
        pipe.enable_lora_hotswap(target_rank=RANK, targets=targets)
    assert not [layer for model in pipe.lora_components.values() for layer in adapter_layers(model)]


def kron_file(names: Sequence[str], seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole LoKr factors for these kinds of attention module, and the change of each weight."""
    torch.manual_seed(seed)
    weights = {path: m.weight for path, m in flux().named_modules() if path.endswith(tuple(names))}
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for path, weight in weights.items():
        first = torch.randn(4, 4) * 0.3
        second = torch.randn(weight.shape[0] // 4, weight.shape[1] // 4) * 0.3
        tensors |= {f"transformer.{path}.lokr_w1": first, f"transformer.{path}.lokr_w2": second}
        changes[path] = torch.kron(first, second)
    return tensors, changes


@pytest.mark.parametrize("way", WAYS)
def test_switching_lokr_run_through_its_factors_recompiles_nothing(way: str) -> None:
    model = fresh()
    (a, of_a), (b, of_b) = kron_file(["attn.to_q", "attn.to_k"], 1), kron_file(["attn.to_q", "attn.to_k"], 2)
    model.load_lora_adapter(a, adapter_name="a")
    model.load_lora_adapter(b, adapter_name="b")
    model.set_adapters("a")
    layers = [layer for _, layer in adapter_layers(model)]
    assert all(layer.slot_first is not None and layer.slot_dense is None for layer in layers)
    compiled = WAYS[way](model, backend="eager", fullgraph=True)
    check(compiled, wanted((1.0, of_a)))
    with no_recompile:
        model.set_adapters("b")
        check(compiled, wanted((1.0, of_b)))
        model.set_adapters("a", -0.5)
        check(compiled, wanted((-0.5, of_a)))
        model.set_adapters("b", 0.0)
        check(compiled, wanted())
    assert (wanted((1.0, of_a)) - wanted((1.0, of_b))).abs().max() > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_a_second_lokr_in_a_layer_recompiles_once_and_no_further_one_does(way: str) -> None:
    model = fresh()
    model.enable_lora_hotswap(target_rank=RANK, targets="all-linear")
    made = {name: kron_file(["attn.to_q", "attn.to_k"], seed) for seed, name in enumerate("abcd")}
    changes = {name: change for name, (_, change) in made.items()}
    model.load_lora_adapter(made["a"][0], adapter_name="a")
    compiled = WAYS[way](model, backend="eager", fullgraph=True)
    check(compiled, wanted((1.0, changes["a"])))
    with no_recompile:
        model.disable_lora()
        check(compiled, wanted())
        model.enable_lora()
        check(compiled, wanted((1.0, changes["a"])))
        model.load_lora_adapter(made["b"][0], adapter_name="b")
        check(compiled, wanted((1.0, changes["b"])))
    model.set_adapters(["a", "b"], [0.5, -2.0])
    with pytest.raises(RecompileError, match="slot_first"), no_recompile:
        check(compiled, wanted())
    check(compiled, wanted((0.5, changes["a"]), (-2.0, changes["b"])))
    with no_recompile:
        for name in "cd":
            model.load_lora_adapter(made[name][0], adapter_name=name)
        for active in ("a", "abc", "abcd", "bd", "c"):
            model.set_adapters(list(active), [0.5] * len(active))
            check(compiled, wanted(*((0.5, changes[name]) for name in active)))
        model.disable_lora()
        check(compiled, wanted())
        model.delete_adapters(list("abcd"))
        check(compiled, wanted())
