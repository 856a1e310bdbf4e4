"""attach(pipe): the instance gains the methods and stays what it was in every other respect."""

import copy
import io
import pickle
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin
from tiny_models import FAMILIES, adapter_file, components_of, photograph, pipeline, render
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.layout import adapter_layers

METHODS = {
    *("load_lora_weights", "save_lora_weights", "lora_state_dict", "set_adapters", "get_active_adapters"),
    *("get_list_adapters", "delete_adapters", "enable_lora", "disable_lora", "fuse_lora", "unfuse_lora"),
    *("unload_lora_weights", "set_lora_device", "enable_lora_hotswap", "load_lora_into_text_encoder"),
    *("fused_loras", "num_fused_loras", "lora_scale"),
}
MODEL_METHODS = {
    *("load_lora_adapter", "save_lora_adapter", "add_adapter", "set_adapter", "set_adapters", "active_adapters"),
    *("disable_adapters", "enable_adapters", "fuse_lora", "unfuse_lora", "unload_lora", "disable_lora", "enable_lora"),
    *("delete_adapters", "enable_lora_hotswap"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_class_name_and_isinstance_stay(family: str) -> None:
    pipe = pipeline(family)
    classes = {id(one): type(one) for one in (pipe, *components_of(pipe).values())}
    assert ll.attach(pipe) is pipe
    for one in (pipe, *components_of(pipe).values()):
        before, after = classes[id(one)], type(one)
        assert isinstance(one, before)
        assert (after.__name__, after.__module__, after.__qualname__) == (
            before.__name__,
            before.__module__,
            before.__qualname__,
        )
        assert after.__doc__ == before.__doc__
    assert isinstance(pipe, ll.LoraPipelineMixin)
    assert all(hasattr(pipe, name) for name in METHODS)
    assert all(hasattr(model, name) for model in components_of(pipe).values() for name in MODEL_METHODS)


def test_every_public_lora_method_of_diffusers_is_ours() -> None:
    own = {name for mixin in (LoraBaseMixin, StableDiffusionXLLoraLoaderMixin) for name in vars(mixin)}
    public = {name for name in own if not name.startswith("_")}
    foreign = {name for name in public if not any(name in vars(cls) for cls in ll.LoraPipelineMixin.__mro__)}
    assert foreign == set()


def test_attach_twice_does_nothing_more() -> None:
    pipe = ll.attach(pipeline("sd15"))
    classes = [type(pipe), type(pipe.unet)]
    ll.attach(pipe)
    ll.attach(pipe.unet)
    assert classes == [type(pipe), type(pipe.unet)]
    ll.detach(pipe)
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert type(pipe.unet) is diffusers.UNet2DConditionModel


def test_two_instances_share_their_class() -> None:
    assert type(ll.attach(pipeline("sd15"))) is type(ll.attach(pipeline("sd15")))


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_undoes_everything(family: str) -> None:
    pipe = pipeline(family)
    before, plain = photograph(pipe), render(pipe)
    names = set(vars(pipe))
    ll.attach(pipe)
    pipe.enable_lora_hotswap(target_rank=16)
    pipe.load_lora_weights(adapter_file(pipe).tensors, "a")
    assert ll.detach(pipe) is pipe
    assert before.differences(photograph(pipe)) == []
    assert set(vars(pipe)) == names
    assert torch.equal(render(pipe), plain)
    assert type(pipe).__mro__[1] is not ll.LoraPipelineMixin
    made = adapter_file(pipe)
    ll.attach(pipe).load_lora_weights(made.tensors, "a")
    pipe.fuse_lora()
    with pytest.raises(ll.AdapterStateError):
        ll.detach(pipe)
    ll.detach(pipe, keep_fused=False)
    assert before.differences(photograph(pipe)) == []


def test_detaching_what_was_never_attached_does_nothing() -> None:
    pipe = pipeline("sd15")
    before = photograph(pipe)
    ll.detach(pipe)
    assert before.differences(photograph(pipe)) == []


@pytest.mark.parametrize("state", ["plain", "loaded", "fused"])
def test_models_pickle_and_copy(state: str) -> None:
    pipe = ll.attach(pipeline("sd15"))
    if state != "plain":
        pipe.load_lora_weights(adapter_file(pipe).tensors, "a")
        pipe.set_adapters("a", 0.5)
    if state == "fused":
        pipe.fuse_lora()
    arguments = (torch.ones(1, 4, 8, 8), 1, torch.ones(1, 3, 32))
    with torch.no_grad():
        wanted = pipe.unet(*arguments).sample
        buffer = io.BytesIO()
        torch.save(pipe.unet, buffer)
        buffer.seek(0)
        twins = [
            pickle.loads(pickle.dumps(pipe.unet)),
            copy.deepcopy(pipe.unet),
            torch.load(buffer, weights_only=False),
        ]
        for twin in twins:
            assert type(twin) is type(pipe.unet)
            assert torch.equal(twin(*arguments).sample, wanted)
            half = twin(*arguments, cross_attention_kwargs={"scale": 0.0}).sample
            assert (state == "loaded") == (not torch.equal(half, wanted))
            if state != "plain":
                twin.unfuse_lora()
                twin.delete_adapters("a")
                assert (
                    len(twin._forward_pre_hooks) == 2
                )  # the gate's and the scale's hooks, which an attached model always has
    assert torch.equal(pipe.unet(*arguments).sample, wanted)


def test_a_pickle_reads_without_the_package_being_asked_for_by_name() -> None:
    """The class made at run time has no importable name, so pickles name the plain class."""
    import pickletools

    names = [
        arg
        for op, arg, _ in pickletools.genops(pickle.dumps(ll.attach(nn.Linear(2, 2))))
        if op.name in ("SHORT_BINUNICODE", "BINUNICODE", "GLOBAL")
    ]
    assert "Linear" in names


@pytest.mark.parametrize("family", ["sd15", "flux1"])
def test_save_pretrained_writes_what_it_always_wrote(family: str, tmp_path: Any) -> None:
    pipe = pipeline(family)
    name = "unet" if family == "sd15" else "transformer"
    getattr(pipe, name).save_pretrained(tmp_path / "before")
    pipe.text_encoder.save_pretrained(tmp_path / "before_te")
    ll.attach(pipe)
    pipe.load_lora_weights(adapter_file(pipe).tensors, "a")
    keys = set(getattr(pipe, name).state_dict())
    getattr(pipe, name).save_pretrained(tmp_path / "after")
    pipe.text_encoder.save_pretrained(tmp_path / "after_te")
    for one in ("before", "before_te"):
        files = sorted(path.name for path in (tmp_path / one).iterdir())
        other = one.replace("before", "after")
        assert files == sorted(path.name for path in (tmp_path / other).iterdir())
        for file in files:
            assert (tmp_path / one / file).read_bytes() == (tmp_path / other / file).read_bytes(), file
    assert keys == set(getattr(pipe, name).state_dict())
    assert pipe.get_active_adapters() == ["a"]


def test_a_whole_pipeline_saves_and_loads_plain(tmp_path: Any) -> None:
    pipe = pipeline("sd15")
    pipe.tokenizer = pipe.text_encoder = None
    pipe.register_modules(tokenizer=None, text_encoder=None)
    ll.attach(pipe)
    pipe.load_lora_weights(adapter_file(pipe, components=["unet"]).tensors, "a")
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path, safety_checker=None, text_encoder=None, tokenizer=None
    )
    state = pipe.unet.state_dict()
    for key, tensor in again.unet.state_dict().items():
        module, _, leaf = key.rpartition(".")
        live = state.get(key, state.get(f"{module}.base_layer.{leaf}"))
        assert torch.equal(tensor, live), key
    assert type(again) is diffusers.StableDiffusionPipeline


def test_from_pipe_and_components_go_on_working() -> None:
    pipe = ll.attach(pipeline("sd15"))
    pipe.load_lora_weights(adapter_file(pipe).tensors, "a")
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet
    assert set(pipe.components) == set(pipeline("sd15").components)
    ll.attach(other)
    assert other.get_list_adapters() == pipe.get_list_adapters()


def test_a_class_of_ones_own_takes_the_mixin() -> None:
    class Mine(ll.FluxLoraLoaderMixin, diffusers.FluxPipeline):
        pass

    parts = pipeline("flux1").components
    mine: Any = Mine(**parts)
    mine.set_progress_bar_config(disable=True)
    report = mine.load_lora_weights(adapter_file(mine).tensors, "a")
    assert set(report.components) == {"transformer", "text_encoder", "text_encoder_2"}
    mine.unload_lora_weights()


def test_a_pickle_holds_each_tensor_once() -> None:
    pipe: Any = ll.attach(pipeline("sd15"))
    plain = len(pickle.dumps(pipe.unet))
    made = adapter_file(pipe, seed=1, components=["unet"])
    pipe.load_lora_weights(made.tensors, "a")
    own = sum(tensor.nbytes for tensor in made.tensors.values())
    layers = len(adapter_layers(pipe.unet))
    # The slot holds it again, in a rank that is a multiple of 8; names and templates take some kilobytes a layer.
    assert len(pickle.dumps(pipe.unet)) < plain + 4 * own + 8192 * layers


def test_a_scale_reaches_the_text_encoders_of_a_modular_pipeline() -> None:
    from diffusers.modular_pipelines import FluxAutoBlocks

    base = pipeline("flux1")
    pipe: Any = FluxAutoBlocks().init_pipeline()
    pipe.update_components(
        **{
            name: part
            for name, part in base.components.items()
            if part is not None
            and name
            in ("transformer", "text_encoder", "text_encoder_2", "vae", "scheduler", "tokenizer", "tokenizer_2")
        }
    )
    made = adapter_file(base)

    def call(**options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        size = {"height": 8, "width": 8, "num_inference_steps": 1, "max_sequence_length": 8}
        with torch.no_grad():
            return pipe(prompt="a cat", generator=generator, output_type="latent", output="images", **size, **options)

    without = call()
    ll.attach(pipe)
    pipe.load_lora_weights(made.tensors, adapter_name="a")
    whole = call()
    assert not torch.allclose(whole, without)
    torch.testing.assert_close(call(joint_attention_kwargs={"scale": 0.0}), without)
    assert torch.equal(call(), whole)
    ll.detach(pipe)
    assert torch.equal(call(), without)


def test_a_scale_warns_of_nothing_where_only_text_encoders_have_adapters(capfd: pytest.CaptureFixture[str]) -> None:
    pipe = ll.attach(pipeline("sd15"))
    pipe.load_lora_weights(adapter_file(pipeline("sd15"), components=["text_encoder"]).tensors, adapter_name="a")
    render(pipe, cross_attention_kwargs={"scale": 0.5})
    assert "ineffective" not in "".join(capfd.readouterr())


def test_detaching_a_pipeline_leaves_the_components_that_another_one_has() -> None:
    first = ll.attach(pipeline("sd15"))
    second = ll.attach(diffusers.StableDiffusionImg2ImgPipeline(**first.components, requires_safety_checker=False))
    plain = render(pipeline("sd15"))
    first.load_lora_weights(adapter_file(pipeline("sd15")).tensors, adapter_name="a")
    with_adapter = render(first)
    ll.detach(second)
    assert not hasattr(second, "lora_components")
    assert torch.equal(render(first), with_adapter)
    first.set_adapters("a", 0.0)
    first.unet.delete_adapters("a")
    ll.detach(first)
    assert type(first.unet) is diffusers.UNet2DConditionModel
    assert torch.equal(render(first), plain)


def test_detach_reaches_a_component_that_was_replaced() -> None:
    pipe = pipeline("sd15")
    plain = render(pipe)
    ll.attach(pipe).load_lora_weights(adapter_file(pipe).tensors, adapter_name="a")
    first, pipe.unet = pipe.unet, pipeline("sd15").unet
    ll.detach(pipe)
    assert type(first) is diffusers.UNet2DConditionModel
    pipe.unet = first
    assert torch.equal(render(pipe), plain)


@pytest.mark.parametrize("fused", [False, True])
def test_layers_without_a_table_are_unloaded(fused: bool) -> None:
    """diffusers' own unload, met after `unpatch_diffusers`, takes the table and the flag and knows no layer of ours."""
    pipe = ll.attach(pipeline("sd15"))
    before = photograph(pipe)
    picture = render(pipe)
    pipe.load_lora_weights(adapter_file(pipe).tensors, adapter_name="a")
    if fused:
        pipe.fuse_lora()
    for model in components_of(pipe).values():
        del model.peft_config
        model._hf_peft_config_loaded = None
    pipe.unload_lora_weights(keep_fused=False)
    assert [adapter_layers(model) for model in components_of(pipe).values()] == [[]] * len(components_of(pipe))
    assert before.differences(photograph(pipe)) == []
    assert torch.equal(render(pipe), picture)
