"""PEFT's LoRA of raw parameters (`target_parameters`): its folders are read, and what is written PEFT reads."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.adapter import Adapter
from lora_loaders.deltas import build
from lora_loaders.errors import ConversionError, MalformedAdapterError
from lora_loaders.peft_parameters import spelled_as_module
from lora_loaders.saving import capture
from lora_loaders.scaling import Scalings
from lora_loaders.writing import to_tensors

EXPERTS, ROWS, COLUMNS = 3, 8, 6


class Owner(nn.Module):
    """A block with tables and a plain projection; `up` and `down` are of experts, in an order that is no alphabet's."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(EXPERTS, ROWS, COLUMNS))
        self.table = nn.Parameter(torch.randn(1, ROWS, COLUMNS))
        self.down = nn.Parameter(torch.randn(EXPERTS, ROWS, COLUMNS))
        self.square = nn.Parameter(torch.randn(EXPERTS, ROWS, ROWS))
        self.flat = nn.Parameter(torch.randn(ROWS, COLUMNS))
        self.also = nn.Parameter(torch.randn(ROWS, COLUMNS))
        self.project = nn.Linear(COLUMNS, COLUMNS)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("ni,eoi->no", self.project(x), self.up + self.down)
        return torch.einsum("no,eoi->ni", y @ self.square.sum(0), self.table) @ (self.flat + self.also).mT


class Net(nn.Module):
    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.block = Owner(is_transposed)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def net(is_transposed: bool = False) -> Any:
    torch.manual_seed(0)
    return Net(is_transposed).double().requires_grad_(False)


def peft_folder(folder: Path, model: nn.Module, names: list[str], **options: Any) -> Any:
    """A folder that PEFT writes, and the model it wraps."""
    peft = pytest.importorskip("peft", reason="reads and writes PEFT's own folders")
    options = {"r": 2, "lora_alpha": 3, "target_modules": [], **options}
    config = peft.LoraConfig(target_parameters=names, **options)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    wrapped.save_pretrained(folder)
    return wrapped


def loaded(folder: Path, is_transposed: bool = False) -> Any:
    model = ll.attach(net(is_transposed))
    model.load_lora_adapter(folder, adapter_name="a", prefix=None)
    return model


CASES: list[tuple[list[str], dict[str, Any]]] = [
    (["flat"], {"use_rslora": True}),
    (["block.up"], {}),
    (["block.up"], {"rank_pattern": {"block.up": 4}, "alpha_pattern": {"block.up": 5}}),
    (["block.flat"], {"target_modules": ["project"]}),
    (["flat"], {"target_modules": ["block.project"]}),
    # Not the model's order, nor the alphabet's.
    (["block.down", "block.square", "block.flat", "block.up"], {"target_modules": ["project"]}),
    (["block.square", "block.up"], {"rank_pattern": {"block.up": 4}, "alpha_pattern": {"block.square": 5}}),
]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("names", "options", "is_transposed"),
    # Of one expert, transposed, PEFT itself has a ΔW of the wrong shape.
    [(["block.table"], {}, False), *((*case, flag) for case in CASES for flag in (False, True))],
    ids=str,
)
def test_a_folder_of_peft_changes_what_peft_changes_and_peft_reads_ours(
    names: list[str], options: dict[str, Any], is_transposed: bool, tmp_path: Path
) -> None:
    theirs = peft_folder(tmp_path / "theirs", net(is_transposed), names, **options)
    x = torch.randn(4, COLUMNS, dtype=torch.float64)
    wanted, model = theirs(x).detach(), loaded(tmp_path / "theirs", is_transposed)
    assert (wanted - net(is_transposed)(x)).abs().max() > 1e-2
    torch.testing.assert_close(model(x), wanted)
    adapter = capture({"transformer": model}, "a", None)
    ll.write_adapter(adapter, tmp_path / "ours", "peft")
    alone = ll.write_adapter(adapter, tmp_path / "alone.safetensors", "peft")  # without adapter_config.json
    torch.testing.assert_close(loaded(alone, is_transposed)(x), wanted)
    model.fuse_lora()
    torch.testing.assert_close(model(x), wanted)
    again = type(theirs).from_pretrained(net(is_transposed), str(tmp_path / "ours")).double()
    torch.testing.assert_close(again(x).detach(), wanted)


@pytest.mark.parity
def test_what_is_made_of_a_parameters_change_is_written_as_one(tmp_path: Path) -> None:
    theirs = peft_folder(tmp_path / "theirs", net(False), ["flat"])
    x = torch.randn(4, COLUMNS, dtype=torch.float64)
    adapter = capture({"transformer": loaded(tmp_path / "theirs", False)}, "a", None)
    in_full = ll.to_full(adapter).adapter
    made = ll.resize(adapter, rank=1), ll.merge([adapter, adapter], [0.5, 0.5]), ll.resize(in_full, rank=1)
    for number, done in enumerate(made):
        folder = ll.write_adapter(done.adapter, tmp_path / str(number), "peft").parent
        again = type(theirs).from_pretrained(net(False), str(folder)).double()
        ours = loaded(folder, False)(x)
        assert (ours - net(False)(x)).abs().max() > 1e-2
        torch.testing.assert_close(again(x).detach(), ours)


@pytest.mark.parity
def test_owners_within_owners_are_refused_as_peft_fails_at_them(tmp_path: Path) -> None:
    model: Any = nn.ModuleDict({"outer": nn.ModuleDict({"inner": nn.Module()})})
    names = ["outer.table", "outer.inner.table"]
    for owner in (model["outer"], model["outer"]["inner"]):
        owner.register_parameter("table", nn.Parameter(torch.randn(ROWS, COLUMNS)))
    with pytest.raises(AttributeError, match="no attribute `inner`"):
        peft_folder(tmp_path, model, names)
    with pytest.raises(ConversionError, match=r"inside outer, whose own are changed too"):
        to_tensors(of_parameters(*names), "peft")


@pytest.mark.parity
def test_a_saved_model_has_pefts_keys_for_several_parameters(tmp_path: Path) -> None:
    theirs = peft_folder(tmp_path / "theirs", net(), ["down", "square", "block.flat", "up"])
    loaded(tmp_path / "theirs").save_lora_adapter(
        tmp_path / "ours", "a", weight_name="adapter_model.safetensors", format="peft"
    )
    keys, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert keys.keys() == ours.keys()
    assert all(torch.equal(ours[key], keys[key]) for key in keys)
    again = type(theirs).from_pretrained(net(), str(tmp_path / "ours")).double()
    x = torch.randn(4, COLUMNS, dtype=torch.float64)
    torch.testing.assert_close(again(x).detach(), theirs(x).detach())


@pytest.mark.parity
def test_what_is_made_of_several_parameters_changes_is_written_in_the_models_order(tmp_path: Path) -> None:
    theirs = peft_folder(tmp_path / "theirs", net(), ["block.also", "block.flat"])
    x = torch.randn(4, COLUMNS, dtype=torch.float64)
    adapter = ll.plan(net(), tmp_path / "theirs").adapter
    for number, done in enumerate((ll.resize(adapter, rank=1), ll.merge([adapter, adapter], [0.5, 0.5]))):
        folder = ll.write_adapter(done.adapter, tmp_path / str(number), "peft").parent
        ours = loaded(folder)(x)
        assert (ours - net()(x)).abs().max() > 1e-2
        torch.testing.assert_close(type(theirs).from_pretrained(net(), str(folder)).double()(x).detach(), ours)


@pytest.mark.parity
@pytest.mark.parametrize("is_transposed", [False, True])
def test_several_parameters_of_a_module_are_told_by_the_models_order(is_transposed: bool, tmp_path: Path) -> None:
    names = ["down", "square", "block.flat", "up"]
    theirs = peft_folder(tmp_path, net(is_transposed), names)
    x = torch.randn(4, COLUMNS, dtype=torch.float64)
    torch.testing.assert_close(loaded(tmp_path, is_transposed)(x), theirs(x).detach())
    with pytest.raises(ConversionError, match="only in the model's order"):
        ll.read_adapter(tmp_path)


def test_a_module_that_is_adapted_itself_is_no_owner() -> None:
    config = {"target_parameters": ["table"], "target_modules": ["project"]}
    keys = ["base_model.model.block.lora_A.weight", "base_model.model.block.project.lora_A.weight"]
    assert [spelled_as_module(key, {"": config}, None) for key in keys] == [
        "base_model.model.block.table.lora_A.weight",
        "base_model.model.block.project.lora_A.weight",
    ]


def test_a_rank_that_makes_no_whole_number_of_experts_is_malformed() -> None:
    scalings = Scalings({"": {"target_parameters": ["it.table"], "lora_alpha": 1, "r": 4}})
    delta = build({"down": torch.zeros(6, 5), "up": torch.zeros(7, 6)}, None)
    with pytest.raises(MalformedAdapterError, match="no multiple of the rank 4"):
        scalings.apply(delta, "transformer", "it.table", given=False)


def of_parameters(*paths: str, slots: dict[str, Tensor] | None = None) -> Adapter:
    slots = slots or {"down": torch.ones(2, 5), "up": torch.ones(6, 2)}
    return Adapter({"transformer": {path: replace(build(slots, None), of_parameter=True) for path in paths}})


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (of_parameters("table"), "no parameter of the model itself"),
        (of_parameters("block.one", "block.other"), "order alone"),
        (of_parameters("block.one", slots={"diff": torch.ones(2, 3)}), "LoRA alone"),
        (of_parameters("block.one", slots={"down": torch.ones(2, 5, 4), "up": torch.ones(6, 2, 1)}), "pair for each"),
    ],
    ids=["top", "two", "full", "experts"],
)
def test_what_peft_cannot_say_of_parameters_is_refused(adapter: Adapter, reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        to_tensors(adapter, "peft")
    assert to_tensors(adapter, "lycoris")[0]  # names a parameter as it does a module


def test_the_tables_say_which_names_are_parameters() -> None:
    key = "lora_unet_blocks_0_modulation"
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 5120), f"{key}.lora_up.weight": torch.ones(6, 2)}
    ((_, path, delta),) = ll.read_adapter(tensors, family="wan").modules()
    assert (path, delta.of_parameter) == ("blocks.0.scale_shift_table", True)
    written, _, config = to_tensors(ll.read_adapter(tensors, family="wan"), "peft")
    assert sorted(written) == [f"base_model.model.blocks.0.lora_{side}.weight" for side in "AB"]
    assert (config["target_parameters"], config["target_modules"]) == (["blocks.0.scale_shift_table"], [])
