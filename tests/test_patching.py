"""patch_diffusers(): diffusers' own classes do it, without peft, and unpatching leaves no trace."""

import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import FluxLoraLoaderMixin, lora_base, lora_pipeline
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline, ModularPipelineBlocks
from tiny_models import (
    DENOISERS,
    Made,
    adapter_file,
    add_changes,
    bits,
    changed_bits,
    components_of,
    patching,
    pipeline,
    render,
)
from torch import nn

import lora_loaders as ll
from lora_loaders.integrations.patching import MODEL, PIPELINE
from lora_loaders.layout import shared_of

pytestmark = pytest.mark.parity


def below(cls: type) -> set[type]:
    return {cls}.union(*(below(child) for child in cls.__subclasses__()))


def owners() -> list[Any]:
    """Classes and modules that patching may touch, all loaded."""
    assert diffusers.PixArtSigmaPipeline is not None
    bases = (lora_base.LoraBaseMixin, PeftAdapterMixin, diffusers.DiffusionPipeline, diffusers.ModelMixin)
    classes = set().union(*(below(base) for base in (*bases, ModularPipeline, ModularPipelineBlocks)))
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "diffusers"]
    return [*classes, *modules]


def attributes(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if name not in ("__doc__", "_abc_impl")}


def test_unpatching_gives_every_attribute_of_every_class_and_module_back() -> None:
    before = {id(owner): (owner, attributes(owner)) for owner in owners()}
    ll.patch_diffusers()
    ll.patch_diffusers()  # does nothing more
    assert any(attributes(owner) != own for owner, own in before.values())
    ll.unpatch_diffusers()
    changed = [
        f"{owner}: {name}"
        for owner, own in before.values()
        for name in own.keys() | attributes(owner).keys()
        if own.get(name) is not attributes(owner).get(name)
    ]
    assert changed == []
    ll.unpatch_diffusers()  # nothing is left to undo


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux1", "qwen-image"])
def test_a_patched_pipeline_does_what_the_changes_do(family: str) -> None:
    pipe, plain = pipeline(family), pipeline(family)
    made: Made = adapter_file(pipe)
    without = render(plain)
    classes = [type(one) for one in (pipe, *components_of(pipe).values())]
    report = pipe.load_lora_weights(made.tensors, adapter_name="a")
    assert report.adapter_name == "a"
    assert [type(one) for one in (pipe, *components_of(pipe).values())] == classes
    add_changes(plain, made)
    expected = render(plain)
    torch.testing.assert_close(render(pipe), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(without, expected, rtol=1e-3, atol=1e-4)
    before = {name: bits(model) for name, model in components_of(pipe).items()}
    pipe.fuse_lora()
    torch.testing.assert_close(render(pipe), expected, rtol=1e-3, atol=1e-4)
    pipe.unfuse_lora()
    assert [changed_bits(before[name], model) for name, model in components_of(pipe).items()] == [[]] * len(before)
    pipe.unload_lora_weights()
    torch.testing.assert_close(render(pipe), without, rtol=0, atol=0)


@pytest.mark.usefixtures("patched")
def test_diffusers_own_questions_have_their_answers() -> None:
    pipe = pipeline("flux1")
    assert isinstance(pipe, FluxLoraLoaderMixin)
    assert type(pipe) is diffusers.FluxPipeline
    assert isinstance(pipe.transformer, PeftAdapterMixin)
    assert diffusers.utils.USE_PEFT_BACKEND


@pytest.mark.usefixtures("patched")
def test_a_scale_holds_for_one_call_and_zero_is_zero() -> None:
    pipe = pipeline("sdxl")
    without = render(pipe)
    pipe.load_lora_weights(adapter_file(pipe).tensors, adapter_name="a")
    pipe.set_adapters("a", 0.5)
    half = render(pipe)
    torch.testing.assert_close(render(pipe, cross_attention_kwargs={"scale": 0.0}), without)
    assert torch.equal(render(pipe), half)
    pipe.set_adapters("a", 0.25)
    quarter = render(pipe)
    pipe.set_adapters("a", 0.5)
    torch.testing.assert_close(render(pipe, cross_attention_kwargs={"scale": 0.5}), quarter, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("patched")
def test_an_error_while_a_prompt_is_encoded_leaves_nothing_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("sd15")
    pipe.load_lora_weights(adapter_file(pipe).tensors, adapter_name="a")
    before = render(pipe)
    held: list[float] = []

    def fail(*args: Any, **options: Any) -> Any:
        shared = shared_of(pipe.text_encoder)
        assert shared is not None
        held.append(shared.scale)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.tokenizer), "__call__", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            render(pipe, cross_attention_kwargs={"scale": 0.25})
    assert held == [0.25]
    assert torch.equal(render(pipe), before)


@pytest.mark.usefixtures("patched")
def test_functions_that_modules_hold_by_name_scale_our_layers() -> None:
    from diffusers.pipelines.flux import pipeline_flux

    pipe = pipeline("flux1")
    pipe.load_lora_weights(adapter_file(pipe).tensors, adapter_name="a")
    pipe.set_adapters("a", 0.5)
    with torch.no_grad():
        plain, half = nn.Module(), pipe.text_encoder(torch.tensor([[1, 2]]))[0]
        pipeline_flux.scale_lora_layers(pipe.text_encoder, 0.0)
        pipe.disable_lora()
        none = pipe.text_encoder(torch.tensor([[1, 2]]))[0]
        pipe.enable_lora()
        torch.testing.assert_close(pipe.text_encoder(torch.tensor([[1, 2]]))[0], none)
        pipeline_flux.unscale_lora_layers(pipe.text_encoder, 0.0)
        assert torch.equal(pipe.text_encoder(torch.tensor([[1, 2]]))[0], half)
    pipeline_flux.scale_lora_layers(plain, 0.5)  # a model without adapters needs no peft


@pytest.mark.usefixtures("patched")
def test_pipelines_and_models_without_any_support_get_it_and_later_classes_too() -> None:
    without: Any = diffusers.PixArtSigmaPipeline
    assert not issubclass(without, lora_base.LoraBaseMixin)
    assert inspect.unwrap(without.load_lora_weights) is inspect.unwrap(diffusers.FluxPipeline.load_lora_weights)

    class LaterModel(diffusers.ModelMixin, ConfigMixin):
        config_name = "config.json"

        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.Linear(4, 4)

    class LaterPipeline(diffusers.DiffusionPipeline):
        def __init__(self, transformer: LaterModel) -> None:
            super().__init__()
            self.register_modules(transformer=transformer)

    pipe: Any = LaterPipeline(LaterModel())
    down, up = torch.randn(2, 4), torch.randn(4, 2)
    pipe.load_lora_weights({"transformer.to_q.lora_A.weight": down, "transformer.to_q.lora_B.weight": up})
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    pipe.unload_lora_weights(keep_fused=True)


@pytest.mark.usefixtures("patched")
def test_a_method_that_a_user_defines_goes_first() -> None:
    class Mine(FluxLoraLoaderMixin):
        def load_lora_weights(self, *args: Any, **options: Any) -> str:  # type: ignore[override]
            return "mine"

    class Pipeline(diffusers.DiffusionPipeline, Mine):
        pass

    assert Pipeline.load_lora_weights is Mine.load_lora_weights


@pytest.mark.usefixtures("patched")
def test_text_encoders_take_our_configuration_and_leave_others_to_transformers() -> None:
    encoder = pipeline("sd15").text_encoder
    encoder.add_adapter(ll.LoraConfig(r=2, target_modules=["q_proj"]), "mine")
    assert encoder.active_adapters() == ["mine"]
    assert all("q_proj.lora_" in key for key in encoder.get_adapter_state_dict("mine"))
    encoder.delete_adapter("mine")
    with pytest.raises((ImportError, TypeError, ValueError)):  # what transformers says without, and with peft
        encoder.add_adapter(object(), "theirs")


@pytest.mark.usefixtures("patched")
def test_what_diffusers_warns_of_is_a_warning_on_its_logger(caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline("flux1")
    for name in ("diffusers.loaders.peft", "diffusers.loaders.lora_base"):
        caplog.set_level(logging.WARNING, name)  # other tests quieten diffusers
        logging.getLogger(name).addHandler(caplog.handler)
    report = pipe.load_lora_weights({"lora_foo": torch.tensor(2.0)}, adapter_name="a", torch_dtype=torch.float16)
    assert (report.components, pipe.get_list_adapters()) == ({}, {})
    assert "No LoRA keys associated to FluxTransformer2DModel" in caplog.text
    with pytest.raises(ll.UnknownFormatError):
        pipe.load_lora_weights({"lora_foo": torch.tensor(2.0)}, strict=True)
    pipe.load_lora_weights(adapter_file(pipe).tensors, adapter_name="a")
    pipe.set_adapters("a", {"foo": 0.5, "transformer": 0.5})
    assert "not part of the pipeline: ['foo']" in caplog.text


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("level", ["pipeline", "model"])
def test_unknown_names_are_a_warning_and_the_others_are_deleted(level: str, caplog: pytest.LogCaptureFixture) -> None:
    """diffusers with peft deletes and moves what there is, and says nothing of the rest."""
    pipe = pipeline("sd15")
    logger = "diffusers.loaders.lora_base" if level == "pipeline" else "diffusers.loaders.peft"
    caplog.set_level(logging.WARNING, logger)
    logging.getLogger(logger).addHandler(caplog.handler)
    one = pipe if level == "pipeline" else pipe.unet

    def warned(call: Callable[[], None]) -> bool:
        caplog.clear()
        call()
        return any(record.name == logger and "adapter: nope" in record.getMessage() for record in caplog.records)

    assert warned(lambda: one.delete_adapters("nope"))
    for name in ("a", "b"):
        pipe.load_lora_weights(adapter_file(pipe, components=["unet"]).tensors, adapter_name=name)
    assert warned(lambda: one.delete_adapters("nope"))
    assert pipe.get_list_adapters() == {"unet": ["a", "b"]}
    assert level == "model" or warned(lambda: pipe.set_lora_device(["nope", "a"], "cpu"))
    assert warned(lambda: one.delete_adapters(["nope", "a"]))
    assert pipe.get_list_adapters() == {"unet": ["b"]}
    assert not warned(lambda: one.set_adapters("b"))
    for owner in (ll.attach(pipe), pipe.unet):
        with pytest.raises(ll.AdapterStateError, match="not in the list of present adapters"):
            owner.delete_adapters(["nope", "b"])
    assert pipe.get_list_adapters() == {"unet": ["b"]}


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("level", ["pipeline", "model"])
def test_what_is_fused_stays_in_the_weights_when_it_is_unloaded_and_saved(
    level: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, plain = pipeline("flux1"), pipeline("flux1")
    made: Made = adapter_file(pipe, components=["transformer"])
    pipe.load_lora_weights(made.tensors, adapter_name="a")
    add_changes(plain, made)
    expected = render(plain)
    logger = "diffusers.loaders.lora_base" if level == "pipeline" else "diffusers.loaders.peft"
    caplog.set_level(logging.WARNING, logger)
    logging.getLogger(logger).addHandler(caplog.handler)
    if level == "pipeline":
        pipe.fuse_lora(lora_scale=1.0)
        pipe.unload_lora_weights()
    else:
        pipe.transformer.fuse_lora()
        pipe.transformer.unload_lora()
    said = {record.name for record in caplog.records if "a is fused into the weights and stays" in record.getMessage()}
    assert said == {logger}
    assert (pipe.fused_loras, pipe.get_list_adapters()) == (set(), {})
    fused = render(pipe)
    torch.testing.assert_close(fused, expected, rtol=1e-3, atol=1e-4)
    pipe.unfuse_lora()  # as in diffusers, there is nothing left to take out
    assert torch.equal(render(pipe), fused)
    pipe.save_pretrained(tmp_path)
    saved = type(pipe.transformer).from_pretrained(tmp_path / "transformer").state_dict()
    assert all(torch.equal(saved[key], value) for key, value in pipe.transformer.state_dict().items())
    pipe.load_lora_weights(made.tensors, adapter_name="a")
    pipe.fuse_lora()
    with pytest.raises(ll.AdapterStateError, match="is fused"):
        ll.attach(pipe).unload_lora_weights()


@pytest.mark.usefixtures("patched")
def test_saving_a_whole_pipeline_writes_plain_keys_and_says_what_it_leaves_out(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = pipeline("flux1").transformer
    keys = set(model.state_dict())
    model.add_adapter(ll.LoraConfig(r=2, target_modules=["to_q"]), "a")
    model.save_pretrained(tmp_path)
    assert set(type(model).from_pretrained(tmp_path).state_dict()) == keys
    assert "without its adapters a" in caplog.text


def test_the_mixins_that_are_patched_are_diffusers_own() -> None:
    with patching():
        loads = vars(lora_pipeline.WanLoraLoaderMixin)["load_lora_weights"]
        assert inspect.unwrap(loads) is ll.LoraPipelineMixin.load_lora_weights
        assert lora_pipeline.WanLoraLoaderMixin.transformer_name == "transformer"
    assert vars(lora_pipeline.WanLoraLoaderMixin)["load_lora_weights"].__module__ == lora_pipeline.__name__


@pytest.mark.parametrize("methods", [PIPELINE, MODEL])
def test_no_function_that_is_put_on_another_class_asks_for_its_own(methods: dict[str, Any]) -> None:
    """`super()` and `__class__` are variables of the class body, and wrong anywhere else."""
    functions: dict[str, Any] = {}
    for name, value in methods.items():
        found = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        functions[name] = getattr(found, "_function", found)  # of `class_or_instance`
    bound = [
        name
        for name, found in functions.items()
        if inspect.isfunction(found) and "__class__" in found.__code__.co_freevars
    ]
    assert functions
    assert bound == []


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("family", ["sd15", "flux1"])
@pytest.mark.parametrize("loads_first", [True, False])
def test_joined_projections_of_a_patched_model_heed_adapters(family: str, loads_first: bool) -> None:
    pipe, plain = pipeline(family), pipeline(family)
    denoiser = getattr(pipe, DENOISERS[family])
    made = adapter_file(pipe, components=[DENOISERS[family]])
    without = render(plain)
    add_changes(plain, made)
    if not loads_first:
        denoiser.fuse_qkv_projections()
    pipe.load_lora_weights(made.tensors, adapter_name="a")
    if loads_first:
        denoiser.fuse_qkv_projections()
    torch.testing.assert_close(render(pipe), render(plain), rtol=1e-3, atol=1e-4)
    denoiser.unfuse_qkv_projections()
    pipe.unload_lora_weights()
    torch.testing.assert_close(render(pipe), without)


@pytest.mark.usefixtures("patched")
def test_a_model_has_no_method_that_diffusers_does_not_give_it() -> None:
    assert not hasattr(diffusers.AutoencoderTiny, "fuse_qkv_projections")
    assert not hasattr(ll.attach(diffusers.AutoencoderTiny()), "fuse_qkv_projections")
    joined = pipeline("flux1").transformer
    joined.fuse_qkv_projections()  # without any adapter
    assert hasattr(joined.transformer_blocks[0].attn, "to_qkv")
