"""Adapters on raw parameters: what the owner reads is W + Σ weight · ΔW, and W comes back to the bit."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.adapter import Adapter
from lora_loaders.attaching import apply
from lora_loaders.deltas import build
from lora_loaders.errors import AdapterMismatchError, AdapterStateError
from lora_loaders.layers.parameter import ParameterLayer
from lora_loaders.layout import adapter_layers
from lora_loaders.planning import plan
from lora_loaders.plans import plan_adapter

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TABLE = "blocks.0.scale_shift_table"
HEAD = "scale_shift_table"
WIDTH = 24
# Wan computes its norms and modulations in float32 whatever the model is in.
ROUNDING = {"rtol": 1e-4, "atol": 1e-6}


def wan(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=8, freq_dim=8, ffn_dim=16, num_layers=2, cross_attn_norm=True, rope_max_seq_len=16,
    )  # fmt: skip
    return ll.attach(model.eval().to(dtype))


def lightx2v(seed: int = 1, scale: float = 0.1) -> dict[str, Tensor]:
    """A file of LightX2V's extractor: `.modulation` became `.diff_m`, `.weight` `.diff`, `.bias` `.diff_b`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "blocks.0.diff_m": (1, 6, WIDTH),
        "blocks.1.diff_m": (1, 6, WIDTH),
        "head.diff_m": (1, 2, WIDTH),
        "blocks.0.norm3.diff": (WIDTH,),
        "blocks.0.norm3.diff_b": (WIDTH,),
        "blocks.0.self_attn.norm_q.diff": (WIDTH,),
        "blocks.0.self_attn.q.diff_b": (WIDTH,),
    }
    return {f"diffusion_model.{k}": torch.randn(s, generator=generator) * scale for k, s in shapes.items()}


def run(model: Any) -> Tensor:
    torch.manual_seed(3)
    dtype = next(p.dtype for p in model.parameters())
    x, text = torch.randn(1, 4, 1, 4, 4).to(dtype), torch.randn(1, 3, 8).to(dtype)
    with torch.no_grad():
        return model(x, torch.tensor([5]), text, return_dict=False)[0]


def edited(model: Any, tensors: Mapping[str, Tensor], weight: float = 1.0) -> Any:
    """The model with the file added by hand, without any of our code."""
    names = {"diff": "weight", "diff_b": "bias", "diff_m": "scale_shift_table"}
    paths = {
        "norm3": "norm2", "self_attn": "attn1", "q": "to_q", "head": "",
    }  # fmt: skip
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        *path, slot = key.split(".")[1:]
        name = ".".join(filter(None, (*(paths.get(part, part) for part in path), names[slot])))
        with torch.no_grad():
            parameters[name] += weight * tensor
    return model


def photograph(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "diff" not in name}


def assert_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    names = {name.replace("base_layer.", ""): tensor for name, tensor in one.items()}
    assert names.keys() == other.keys()
    for name, tensor in names.items():
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def test_a_file_of_modulations_norms_and_biases_computes_as_the_edited_model() -> None:
    model, file = wan(), lightx2v()
    plain = wan()
    report = model.load_lora_adapter(file, adapter_name="x", prefix=None)
    assert report.unmatched == report.ignored == {}
    assert report.components == {"transformer": 6}
    torch.testing.assert_close(run(model), run(edited(plain, file)), **ROUNDING)
    model.set_adapters("x", 0.3)
    torch.testing.assert_close(run(model), run(edited(plain, file, 0.3)), **ROUNDING)


def test_the_owner_reads_one_rounding_of_the_sum() -> None:
    model = wan(torch.bfloat16)
    base = model.blocks[0].scale_shift_table.detach().double()
    files = [lightx2v(seed) for seed in (1, 2)]
    for name, file in zip("ab", files, strict=True):
        model.load_lora_adapter(file, adapter_name=name, prefix=None)
    model.set_adapters(["a", "b"], [0.5, -2.0])
    deltas = [file["diffusion_model.blocks.0.diff_m"].bfloat16().double() for file in files]
    wanted = (base + 0.5 * deltas[0] - 2.0 * deltas[1]).bfloat16()
    got = model.blocks[0].scale_shift_table.detach()
    assert (got != wanted).float().mean() < 0.01  # sums of four terms in float32 against float64
    torch.testing.assert_close(got, wanted, rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_back_restores_every_bit(dtype: torch.dtype) -> None:
    model = wan(dtype)
    with torch.no_grad():
        model.scale_shift_table.view(-1)[:3] = torch.tensor([0.0, -0.0, 1e-7], dtype=dtype)
    before = photograph(model)
    model.load_lora_adapter(lightx2v(1, 3.0), adapter_name="a", prefix=None)
    model.load_lora_adapter(lightx2v(2, 3.0), adapter_name="b", prefix=None)
    model.set_adapters(["a", "b"], [0.7, 0.2])
    assert not torch.equal(model.scale_shift_table, before["scale_shift_table"])
    model.disable_lora()
    assert_bits(photograph(model), before)
    model.enable_lora()
    model.fuse_lora(adapter_names=["a"])
    model.set_adapters(["b"], 1.5)
    fused = model.scale_shift_table.detach().clone()
    model.fuse_lora(lora_scale=0.4)
    model.unfuse_lora()
    model.set_adapters(["a", "b"], [0.7, 0.2])
    model.unload_lora()
    assert_bits(photograph(model), before)
    assert not torch.equal(fused, before["scale_shift_table"])


def test_a_fused_and_an_active_adapter_add_up() -> None:
    model, plain = wan(torch.float64), wan(torch.float64)
    one, other = lightx2v(1), lightx2v(2)
    model.load_lora_adapter(one, adapter_name="a", prefix=None)
    model.load_lora_adapter(other, adapter_name="b", prefix=None)
    model.set_adapters("a", 0.5)
    model.fuse_lora()
    model.set_adapters("b", 2.0)
    wanted = edited(edited(plain, one, 0.5), other, 2.0)
    torch.testing.assert_close(run(model), run(wanted), **ROUNDING)
    torch.testing.assert_close(model.scale_shift_table, wanted.scale_shift_table, rtol=1e-15, atol=1e-15)


def test_the_scale_of_a_call_multiplies_and_does_not_stay() -> None:
    model, plain, file = wan(torch.float64), wan(torch.float64), lightx2v()
    model.load_lora_adapter(file, adapter_name="x", prefix=None)
    x, text = torch.randn(1, 4, 1, 4, 4).double(), torch.randn(1, 3, 8).double()
    call = {"hidden_states": x, "timestep": torch.tensor([5]), "encoder_hidden_states": text, "return_dict": False}
    with torch.no_grad():
        scaled = model(**call, attention_kwargs={"scale": 0.25})[0]
        torch.testing.assert_close(scaled, edited(plain, file, 0.25)(**call)[0], **ROUNDING)
        torch.testing.assert_close(model(**call)[0], edited(plain, file)(**call)[0], **ROUNDING)


def test_a_state_dictionary_shows_the_base_and_loading_one_keeps_the_adapter() -> None:
    model = wan()
    before = photograph(model)
    model.load_lora_adapter(lightx2v(), adapter_name="x", prefix=None)
    written = model.scale_shift_table.detach().clone()
    state = model.state_dict()
    assert torch.equal(state[HEAD], before[HEAD])
    assert f"{TABLE}.diff.x" in state
    model.load_state_dict(state)
    assert torch.equal(model.scale_shift_table, written)
    moved = {**state, HEAD: state[HEAD] + 1}
    model.load_state_dict(moved)
    torch.testing.assert_close(model.scale_shift_table, written + 1)
    model.unload_lora()
    assert torch.equal(model.scale_shift_table, before[HEAD] + 1)


def test_a_cast_takes_the_base_and_the_sum_along() -> None:
    model = wan()
    before = photograph(model)[HEAD]
    model.load_lora_adapter(lightx2v(), adapter_name="x", prefix=None)
    model.to(torch.bfloat16)
    model.unload_lora()
    assert torch.equal(model.scale_shift_table, before.bfloat16())


def test_paths_weights_and_names_are_those_of_the_parameter() -> None:
    model, plain, file = wan(torch.float64), wan(torch.float64), lightx2v()
    model.load_lora_adapter(file, adapter_name="x", prefix=None)
    layers = dict(adapter_layers(model))
    assert isinstance(layers[TABLE], ParameterLayer)
    assert isinstance(model.blocks[0].scale_shift_table, nn.Parameter)
    assert [name for name, _ in model.named_parameters() if name.startswith(TABLE)] == [TABLE, f"{TABLE}.diff.x"]
    model.set_adapters("x", {"blocks": 0.5})
    blocks = {key: tensor for key, tensor in file.items() if "blocks" in key}
    head = {key: tensor for key, tensor in file.items() if "blocks" not in key}
    wanted = run(edited(edited(plain, blocks, 0.5), head, 1.0))
    torch.testing.assert_close(run(model), wanted, **ROUNDING)


def test_what_is_saved_is_the_file_again(tmp_path: Path) -> None:
    model, file = wan(), lightx2v()
    model.load_lora_adapter(file, adapter_name="x", prefix=None)
    adapter = ll.read_adapter(file)
    assert set(adapter.deltas["transformer"]) >= {TABLE, HEAD, "blocks.0.norm2"}
    path = model.save_lora_adapter(tmp_path, "x", format="original")
    saved = ll.read_adapter(path)
    assert set(saved.bound) == set(file)
    for component, place, delta in adapter.modules():
        for slot, tensor in delta.tensors().items():
            assert torch.equal(saved.deltas[component][place].tensors()[slot], tensor)
    ll.convert(path, tmp_path / "lycoris.safetensors", format="lycoris")
    again = ll.read_adapter(tmp_path / "lycoris.safetensors", family="wan").deltas["transformer"]
    assert torch.equal(again[HEAD].delta_weight(), file["diffusion_model.head.diff_m"])


def test_saving_the_model_writes_its_own_values(tmp_path: Path) -> None:
    model = wan()
    before = photograph(model)
    model.load_lora_adapter(lightx2v(), adapter_name="x", prefix=None)
    written = model.scale_shift_table.detach().clone()
    model.save_pretrained(tmp_path)
    saved = diffusers.WanTransformer3DModel.from_pretrained(tmp_path)
    assert_bits(photograph(saved), before)
    assert torch.equal(model.scale_shift_table, written)


def test_a_copy_is_independent() -> None:
    model = wan()
    model.load_lora_adapter(lightx2v(), adapter_name="x", prefix=None)
    written = model.scale_shift_table.detach().clone()
    twin = copy.deepcopy(model)
    twin.disable_lora()
    assert torch.equal(model.scale_shift_table, written)
    assert not torch.equal(twin.scale_shift_table, written)


def test_another_size_is_refused_and_nothing_changes() -> None:
    model = wan()
    before = photograph(model)
    file = {**lightx2v(), "diffusion_model.head.diff_m": torch.randn(1, 3, WIDTH)}
    with pytest.raises(AdapterMismatchError, match="shape"):
        model.load_lora_adapter(file, adapter_name="x", prefix=None)
    assert_bits(photograph(model), before)


class Owner(nn.Module):
    """Six rows of eight under any shape, which the module reads itself."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(*shape, dtype=torch.float64), requires_grad=False)


def planned(owner: Owner, slots: Mapping[str, Tensor]) -> Any:
    return plan_adapter({"m": owner}, Adapter({"m": {"table": build(slots, None)}}))


def rotation(triangle: Tensor) -> Tensor:
    """R = I + 2Q + 2Q² + 2Q³ + Q⁴ of one 2 x 2 block."""
    q = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64) * triangle
    return torch.eye(2).double() + 2 * (q + q @ q + q @ q @ q) + q @ q @ q @ q


@pytest.mark.parametrize("algebra", ["gain of outputs", "gain of inputs", "PEFT's gain", "oft", "input oft", "dora"])
def test_what_is_computed_from_the_parameter_follows_its_formula(algebra: str) -> None:
    torch.manual_seed(0)
    owner = Owner(6, 8)
    base, rows, columns, triangles = (torch.randn(*s).double() for s in ((6, 8), (6,), (8,), (4, 1)))
    owner.table.copy_(base)
    q = torch.randn(2, 3, 3).double()
    skew, eye = torch.block_diag(*(q - q.mT)), torch.eye(6).double()
    up, down, norms = torch.randn(6, 2).double(), torch.randn(2, 8).double(), torch.rand(6, 1).double() + 1
    moved = base + up @ down
    slots, wanted = {
        "gain of outputs": ({"weight": rows, "on_input": torch.tensor(0)}, base * (1 + rows[:, None])),
        "gain of inputs": ({"weight": columns, "on_input": torch.tensor(1)}, base * (1 + columns)),
        "PEFT's gain": ({"ia3_l": columns[None]}, base * columns),
        "oft": ({"oft_blocks": q}, torch.linalg.solve(eye + skew, eye - skew) @ base),  # Rᵀ of the Cayley transform
        "input oft": ({"oft_R": triangles}, base @ torch.block_diag(*map(rotation, triangles)).T),
        "dora": ({"up": up, "down": down, "magnitude": norms}, norms * moved / moved.norm(dim=1, keepdim=True)),
    }[algebra]
    apply(planned(owner, slots), "x")
    torch.testing.assert_close(owner.table, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 8), (1, 6, 8), (6, 1, 8)], ids=str)
def test_ones_in_its_shape_do_not_matter(shape: tuple[int, ...]) -> None:
    change, value = torch.randn(1, 6, 8).double(), torch.randn(6, 8).double()
    up, down = torch.randn(6, 2).double(), torch.randn(2, 8).double()
    for slots in ({"diff": change}, {"up": up, "down": down}, {"set_weight": value}):
        owner = Owner(*shape)
        base = owner.table.view(6, 8).clone()
        wanted = value if "set_weight" in slots else base + (change[0] if "diff" in slots else up @ down)
        apply(planned(owner, slots), "x")
        torch.testing.assert_close(owner.table, wanted.view(shape), rtol=1e-12, atol=1e-12)


REFUSED: Mapping[str, dict[str, Tensor]] = {
    "transposed": {"diff": torch.ones(8, 6)},
    "regrouped": {"up": torch.ones(4, 2), "down": torch.ones(2, 12)},
    "a replaced value, transposed": {"set_weight": torch.ones(8, 6)},
    "gains of other rows": {"weight": torch.ones(8), "on_input": torch.tensor(0)},
    "gains of other columns": {"ia3_l": torch.ones(1, 6)},
    "a rotation of other rows": {"oft_blocks": torch.ones(4, 2, 2)},
    "a rotation of other columns": {"oft_R": torch.ones(3, 1)},
}


@pytest.mark.parametrize("slots", REFUSED.values(), ids=REFUSED)
def test_as_many_numbers_in_another_arrangement_are_refused(slots: dict[str, Tensor]) -> None:
    (problem,) = planned(Owner(6, 8), slots).problems
    assert "(6, 8)" in problem


@pytest.mark.parametrize("on_input", [0, 1])
def test_gains_of_a_vector_are_those_of_a_column(on_input: int) -> None:
    owner = Owner(6)
    base, gains = owner.table.clone(), torch.randn(6).double()
    plan = planned(owner, {"weight": gains, "on_input": torch.tensor(on_input)})
    assert len(plan.problems) == on_input
    if not on_input:
        apply(plan, "x")
        torch.testing.assert_close(owner.table, base * (1 + gains), rtol=1e-12, atol=1e-12)


def test_a_failure_on_the_way_takes_the_value_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wan()
    before = photograph(model)
    adapter = ll.read_adapter(lightx2v())
    write = ParameterLayer.write
    calls: list[int] = []

    def fails_late(self: ParameterLayer) -> None:
        write(self)
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory")

    monkeypatch.setattr(ParameterLayer, "write", fails_late)
    with pytest.raises(RuntimeError, match="no memory"):
        apply(plan(model, adapter), "x")
    assert_bits(photograph(model), before)
    assert not adapter_layers(model)


def test_training_is_refused_because_no_gradient_could_reach_it() -> None:
    model = wan()
    with pytest.raises(AdapterStateError, match="cannot be trained") as error:
        apply(plan(model, ll.read_adapter(lightx2v())), "x", requires_grad=True)
    assert TABLE in str(error.value)
    assert not adapter_layers(model)


def test_a_parameter_of_another_shape_in_the_original_checkpoint_fits_by_its_elements() -> None:
    """Krea 2's `mod.lin` is flat in its own checkpoint and a table in diffusers."""
    model = nn.ModuleDict({"block": nn.Module()})
    model["block"].register_parameter("table", nn.Parameter(torch.zeros(6, 4)))
    diff = torch.randn(24)
    done = plan(model, {"block.table.diff": diff})
    assert done.matched == ("transformer.block.table",)
    apply(done, "x")
    assert torch.equal(model["block"].table, diff.view(6, 4))
    value = plan(model, {"block.table.set_weight": torch.ones(24)})
    apply(value, "y")
    assert torch.equal(model["block"].table, torch.ones(6, 4))
