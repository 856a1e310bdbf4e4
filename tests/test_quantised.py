"""Quantised bases: adapters run beside them, are fused into them in their own scheme, and every byte comes back."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import flux
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders import fusing
from lora_loaders.errors import AdapterStateError, UnsupportedBaseError
from lora_loaders.integrations.peft_helpers import make_layers_known
from lora_loaders.layers.base_weight import Places, adapter_dtype, bits_of, read_weight, restore, rewrite
from lora_loaders.layers.layer import AdapterLayer

pytestmark = pytest.mark.parity

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
BFLOAT16 = 2.0**-8
"""Relative rounding of bfloat16, in which all of these models compute."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/quantised.py, which prints what is asserted here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        return import_module("quantised")


@pytest.fixture(scope="module")
def folder(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    script.plain_model(width=64).save_pretrained(path)
    return path


BACKENDS = (
    *("bitsandbytes 8-bit", "bitsandbytes nf4", "bitsandbytes nf4, nested", "bitsandbytes fp4"),
    *("torchao int8 weight-only", "torchao int8 dynamic", "torchao int4, unpacked", "torchao float8 weight-only"),
    *("quanto int8", "quanto float8", "quanto int4", "quanto int2"),
    *("GGUF Q8_0", "GGUF Q5_1", "GGUF Q5_0", "GGUF Q4_1", "GGUF Q4_0", "GGUF BF16", "float8 layerwise casting"),
)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.filterwarnings("ignore")  # of these packages about themselves
def test_every_backend_runs_adapters_beside_its_weight_and_gets_its_bytes_back(
    name: str, script: ModuleType, folder: Path
) -> None:
    backend = next(backend for backend in script.BACKENDS if backend.name == name)
    if missing := backend.missing(CPU):
        pytest.skip(missing)

    row = script.check(backend, folder, CPU)

    assert row.layers == 20
    assert row.forward_error <= row.base_error + 2 * BFLOAT16
    assert row.fuse == "yes"
    assert row.bytes_equal
    assert row.kept <= 1.01


def cast(model: Any) -> Any:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return model


def load(model: Any) -> Any:
    model.load_lora_adapter(file_for(model))
    return model


def adapted(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def file_for(model: nn.Module, seed: int = 0, scale: float = 0.2) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if path.endswith(("attn.to_q", "attn.to_k", "proj_mlp")):
            assert isinstance(module, nn.Linear)
            tensors[f"transformer.{path}.lora_A.weight"] = torch.randn(4, module.in_features) * scale
            tensors[f"transformer.{path}.lora_B.weight"] = torch.randn(module.out_features, 4) * scale
    return tensors


def bytes_of(model: nn.Module) -> dict[str, Tensor]:
    plain = {n.replace("base_layer.", ""): p for n, p in model.named_parameters() if ".lora_" not in n}
    return {name: bits_of(parameter.detach()).clone() for name, parameter in plain.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("first", ["cast", "load"])
def test_adapters_stay_in_the_compute_dtype_whichever_of_cast_and_load_comes_first(first: str) -> None:
    model: Any = ll.attach(flux())
    file = file_for(model)
    for step in (
        (cast, lambda m: m.load_lora_adapter(file))
        if first == "cast"
        else (
            lambda m: m.load_lora_adapter(file),
            cast,
        )
    ):
        step(model)

    for layer in adapted(model):
        assert layer.base_layer.weight.dtype is torch.float8_e4m3fn
        assert adapter_dtype(layer.base_layer) is torch.float32
        assert {parameter.dtype for parameter in layer.parameters_of("default_0")} == {torch.float32}
        x = torch.randn(3, layer.base_layer.in_features)
        name = next(path for path, module in model.named_modules() if module is layer)
        change = file[f"transformer.{name}.lora_B.weight"] @ file[f"transformer.{name}.lora_A.weight"]
        weight = layer.base_layer.weight.float() + change
        torch.testing.assert_close(layer(x), x @ weight.t() + layer.base_layer.bias.float(), rtol=1e-5, atol=1e-5)


def test_a_weight_that_was_fused_in_float8_and_is_plain_since_is_not_unfused_wrong() -> None:
    model: Any = cast(ll.attach(flux()))
    load(model)
    fusing.fuse(model)
    for layer in adapted(model):
        layer.base_layer.weight.data = layer.base_layer.weight.data.float()
    before = bytes_of(model)
    with pytest.raises(AdapterStateError, match=r"stored quantised when it was fused, and is plain torch\.float32 now"):
        fusing.unfuse(model)
    assert fusing.fused_adapters(model) == {"default_0"}
    assert same(bytes_of(model), before)


def test_a_weight_that_is_cast_to_float8_after_fusing_is_not_taken_for_unfused() -> None:
    model: Any = ll.attach(flux())
    load(model)
    fusing.fuse(model)
    cast(model)
    before = bytes_of(model)
    with pytest.raises(AdapterStateError, match="changed, cast or trained since"):
        fusing.unfuse(model)
    assert fusing.fused_adapters(model) == {"default_0"}
    assert same(bytes_of(model), before)


def test_layers_that_peft_takes_for_its_own_are_cast_as_others() -> None:
    """diffusers' casting hook writes an attribute of PEFT's layers, to which ours are added for PEFT's helpers."""
    pytest.importorskip("peft.tuners.tuners_utils")
    make_layers_known()
    outputs: list[Tensor] = []
    for steps in ((load, cast), (cast, load)):
        torch.manual_seed(0)
        model: Any = ll.attach(flux())
        for step in steps:
            step(model)
        layer = adapted(model)[0]
        outputs.append(layer(torch.ones(3, layer.base_layer.in_features)))
    assert torch.equal(*outputs)


def test_fused_float8_is_the_nearest_float8_of_weight_plus_change_and_the_loss_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model: Any = cast(ll.attach(flux().requires_grad_(False)))
    file = file_for(model)
    model.load_lora_adapter(file)
    before = {id(layer): layer.base_layer.weight.float() for layer in adapted(model)}

    report = model.fuse_lora()

    lost = change = 0.0
    for path, layer in [(p, m) for p, m in model.named_modules() if isinstance(m, AdapterLayer)]:
        added = file[f"transformer.{path}.lora_B.weight"] @ file[f"transformer.{path}.lora_A.weight"]
        right = (before[id(layer)].double() + added.double()).float().to(torch.float8_e4m3fn)
        mismatched = layer.base_layer.weight.float() != right.float()
        assert mismatched.float().mean() < 0.001  # a tie that float32's own rounding tips
        lost += float((layer.base_layer.weight.float() - before[id(layer)] - added).square().sum())
        change += float(added.square().sum())
    assert report.quantised == len(adapted(model)) > 0
    assert report.lost == pytest.approx((lost / change) ** 0.5, rel=1e-4)
    assert f"lost {100 * report.lost:.0f} %" in caplog.text


def test_any_order_of_fusing_two_adapters_into_a_quantised_base_comes_back_to_the_byte() -> None:
    model: Any = cast(ll.attach(flux()))
    plain = bytes_of(model)
    files = {name: file_for(model, seed=n) for n, name in enumerate("ab")}
    for name, file in files.items():
        model.load_lora_adapter(file, adapter_name=name)

    model.fuse_lora(adapter_names=["a"])
    with_a = bytes_of(model)
    model.fuse_lora(adapter_names=["b"], lora_scale=0.5)
    assert not same(bytes_of(model), with_a)
    fusing.unfuse(model, ["b"])
    assert same(bytes_of(model), with_a)
    model.delete_adapters("a")
    assert same(bytes_of(model), plain)


def test_dora_on_a_quantised_base_uses_its_dequantised_weight() -> None:
    model: Any = cast(ll.attach(flux()))
    path = "transformer_blocks.0.attn.to_q"
    base = model.get_submodule(path)
    weight = base.weight.float()
    torch.manual_seed(0)
    down, up, magnitude = torch.randn(2, 32), torch.randn(32, 2), torch.rand(32) + 0.5
    model.load_lora_adapter({
        f"transformer.{path}.lora_A.weight": down,
        f"transformer.{path}.lora_B.weight": up,
        f"transformer.{path}.lora_magnitude_vector": magnitude,
    })  # fmt: skip
    direction = weight + up @ down
    right = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)

    x = torch.randn(5, 32)

    torch.testing.assert_close(model.get_submodule(path)(x), x @ right.t() + base.bias.float(), rtol=1e-4, atol=1e-4)


def test_a_record_of_few_places_is_smaller_and_refuses_a_weight_that_was_changed_since() -> None:
    base: Any = nn.Linear(64, 64)
    base.weight.data = base.weight.data.to(torch.float8_e4m3fn)
    plain = bits_of(base.weight.detach()).clone()
    changed = read_weight(base).clone()
    changed[3, 5] += 0.5

    record = rewrite(base, changed)

    assert isinstance(record.parts["weight"], Places)
    assert record.memory() == 4 + 1
    assert (bits_of(base.weight.detach()) != plain).sum() == 1
    base.weight.data[0, 0] = 0.25
    with pytest.raises(AdapterStateError, match="was changed, cast or quantised again"):
        restore(base, record)
    base.weight.data.view(torch.int8)[0, 0] = plain[0]
    restore(base, record)
    assert torch.equal(bits_of(base.weight.detach()), plain)


class Sealed(nn.Parameter):
    """A weight in a way of storing that nothing here knows."""


def test_a_base_that_nobody_can_read_carries_adapters_and_says_so_when_it_is_fused() -> None:
    model: Any = ll.attach(flux())
    linear = model.transformer_blocks[0].attn.to_k
    sealed = torch.Tensor._make_subclass(Sealed, linear.weight.detach())  # pyright: ignore[reportAttributeAccessIssue]
    linear._parameters["weight"] = sealed
    model.load_lora_adapter(file_for(model))
    plain = bytes_of(model)
    layer = model.transformer_blocks[0].attn.to_k
    x = torch.randn(2, 32)

    assert not torch.equal(layer(x), linear(x))
    with pytest.raises(UnsupportedBaseError, match="unfused") as raised:
        model.fuse_lora()
    assert "Sealed" in str(raised.value)
    assert same(bytes_of(model), plain)
    assert not fusing.fused_adapters(model)


def test_nan_is_never_stored_in_a_quantised_weight() -> None:
    model: Any = cast(ll.attach(flux()))
    file = file_for(model)
    file[sorted(file)[-1]][0, 0] = float("nan")
    model.load_lora_adapter(file)
    plain = bytes_of(model)

    with pytest.raises(AdapterStateError, match="NaN"):
        model.fuse_lora()

    assert same(bytes_of(model), plain)


@pytest.mark.filterwarnings("ignore")
def test_a_gguf_kind_that_the_package_cannot_write_is_refused_and_nothing_is_changed(script: ModuleType) -> None:
    gguf = pytest.importorskip("gguf", reason="the check is about gguf's own kinds")
    utils = import_module("diffusers.quantizers.gguf.utils")
    kind = gguf.GGMLQuantizationType.IQ4_NL
    layer: Any = utils.GGUFLinear(32, 32, bias=False, compute_dtype=torch.float32)
    layer.weight = utils.GGUFParameter(torch.randint(0, 60, (32, 18), dtype=torch.uint8), quant_type=kind)
    before = layer.weight.as_tensor().clone()

    with pytest.raises(UnsupportedBaseError, match="IQ4_NL"):
        rewrite(layer, read_weight(layer))

    assert torch.equal(layer.weight.as_tensor(), before)


def test_every_backend_of_the_script_is_tested_here_or_needs_a_gpu(script: ModuleType) -> None:
    assert {backend.name for backend in script.BACKENDS if not backend.cuda_only} == set(BACKENDS)


class Packed(Tensor):
    """Stored by columns and only multiplied with, as kernels' own layouts are: it has no `dequantize`."""

    columns: Tensor

    @staticmethod
    def __new__(cls, columns: Tensor) -> "Packed":
        self = Tensor._make_wrapper_subclass(cls, columns.shape[::-1], dtype=columns.dtype)
        self.columns = columns
        return self

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["columns"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> "Packed":
        return Packed(inner["columns"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return args[0] @ args[1].columns
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].columns)
        raise NotImplementedError(f"{func} of a packed weight")


def test_a_weight_that_can_only_be_multiplied_with_is_read_by_multiplying() -> None:
    layer: Any = nn.Linear(4, 3, bias=False)
    weight = torch.randn(3, 4)
    layer.weight = nn.Parameter(Packed(weight.t().contiguous()), requires_grad=False)

    assert torch.equal(read_weight(layer), weight)

    with pytest.raises(UnsupportedBaseError, match="Packed"):
        rewrite(layer, weight)
