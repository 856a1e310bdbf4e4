"""PEFT's LoHa, LoKr, OFT, BOFT and IA3: folders are read with what the configuration says, and written for PEFT."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import flux
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders import fusing
from lora_loaders.adapter import Adapter
from lora_loaders.attaching import apply
from lora_loaders.deltas import InputBoftDelta, LokrDelta, build
from lora_loaders.errors import ConversionError
from lora_loaders.planning import plan
from lora_loaders.writing import to_tensors

TARGETS = ["linear", "conv"]
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LoHaConfig", {"r": 4, "alpha": 2, "rank_pattern": {"conv": 3}, "alpha_pattern": {"linear": 7}}),
    ("LoHaConfig", {"r": 4, "alpha": 2, "use_effective_conv2d": True}),
    ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_factor": 4}),
    ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True}),
    ("LoKrConfig", {"r": 12, "alpha": 3, "decompose_factor": 4}),
    ("LoKrConfig", {"r": 1, "alpha": 3, "use_effective_conv2d": True}),
    ("OFTConfig", {"r": 0, "oft_block_size": 4}),
    ("OFTConfig", {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}),
    ("OFTConfig", {"r": 0, "oft_block_size": 4, "num_cayley_neumann_terms": 2}),
    ("OFTConfig", {"r": 0, "oft_block_size": 4, "num_cayley_neumann_terms": 7}),
    ("OFTConfig", {"r": 0, "oft_block_size": 4, "block_share": True}),
    ("OFTConfig", {"r": 0, "oft_block_size": 4, "coft": True, "eps": 0.05}),
    ("BOFTConfig", {"boft_block_size": 4}),
    ("IA3Config", {"feedforward_modules": []}),
    ("IA3Config", {"feedforward_modules": ["conv"]}),
    ("IA3Config", {"feedforward_modules": ["linear", "conv"]}),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 24)
        self.conv = nn.Conv2d(24, 24, 3)


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().requires_grad_(False)


def weights(model: Any) -> dict[str, Tensor]:
    bases = {name: getattr(getattr(model, name), "base_layer", getattr(model, name)) for name in TARGETS}
    return {f"{name}.{key}": t.detach().clone() for name, base in bases.items() for key, t in base.named_parameters()}


@pytest.mark.parity
@pytest.mark.parametrize(("config", "options"), OPTIONS, ids=str)
def test_a_folder_of_peft_is_fused_as_peft_merges_it_and_peft_reads_ours(
    config: str, options: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="reads and writes PEFT's own folders")
    wrapped = peft.get_peft_model(net(), getattr(peft, config)(target_modules=TARGETS, **options))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "base_layer" not in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.2
    wrapped.save_pretrained(tmp_path / "theirs")
    theirs = weights(wrapped.merge_and_unload())
    model, plain = net(), weights(net())
    done = plan(model, tmp_path / "theirs")
    assert len(done.matched) == 2
    assert not done.unmatched
    assert not done.ignored
    apply(done, "x")
    fusing.fuse(model)
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7)
    fusing.unfuse(model)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in weights(model).items())
    ll.write_adapter(done.adapter, tmp_path / "ours", "peft")
    again = peft.PeftModel.from_pretrained(net(), str(tmp_path / "ours")).double().merge_and_unload()
    for name, tensor in weights(again).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7)
    alone = ll.write_adapter(done.adapter, tmp_path / "alone.safetensors", "peft")  # without adapter_config.json
    model = net()
    apply(plan(model, alone), "x")
    fusing.fuse(model)
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7)


def test_one_file_of_peft_keeps_the_alpha_of_a_lokr(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name, first, a, b = "lora_unet_blocks_0_self_attn_q", torch.randn(4, 4), torch.randn(6, 2), torch.randn(2, 6)
    tensors = {f"{name}.lokr_w1": first, f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
    tensors[f"{name}.alpha"] = torch.tensor(1.0)
    path = ll.convert(tensors, tmp_path / "o.safetensors", format="peft", family="wan")
    ((_, _, delta),) = ll.read_adapter(path, family="wan").modules()
    torch.testing.assert_close(delta.delta_weight(), torch.kron(first, a @ b) / 2)


def written(delta: Any, format: str = "peft") -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, _, config = to_tensors(ll.Adapter({"transformer": {"it": delta}}), format)
    return tensors, config


def test_the_scaling_of_two_whole_factors_is_multiplied_in_for_other_formats() -> None:
    delta = build({"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(8, 6)}, None)
    assert isinstance(delta, LokrDelta)
    half = replace(delta, whole_scaling=0.5)
    torch.testing.assert_close(half.delta_weight(), 0.5 * delta.delta_weight())
    tensors, _ = written(half, "original")
    (key,) = [key for key in tensors if key.endswith("lokr_w2")]
    assert torch.equal(tensors[key], 0.5 * delta.tensors()["lokr_w2"])
    with pytest.raises(ConversionError, match="rounding"):
        written(replace(delta, whole_scaling=1 / 3), "original")
    _, config = written(half)
    assert (config["peft_type"], config["alpha"] / config["r"]) == ("LOKR", 0.5)


def test_what_peft_cannot_build_is_refused_with_the_reason() -> None:
    odd = build({"lokr_w1": torch.randn(4, 2), "lokr_w2": torch.randn(2, 8)}, None)
    with pytest.raises(ConversionError, match="decompose_factor"):
        written(odd)
    onetrainer = build({"oft_R": torch.randn(4, 6)}, None)
    with pytest.raises(ConversionError, match="OneTrainer"):
        written(onetrainer)
    mixed = {
        "a": build({"ia3_l": torch.ones(1, 4)}, None),
        "b": build({"boft_R": torch.zeros(1, 1, 4, 4), "boft_s": torch.ones(4, 1)}, None),
    }
    with pytest.raises(ConversionError, match="one algebra a file"):
        to_tensors(ll.Adapter({"transformer": mixed}), "peft")


def test_peft_settings_have_no_words_in_other_formats() -> None:
    rotation: Any = build({"oft_R": torch.randn(4, 6)}, None)
    assert written(rotation, "original")[0]
    with pytest.raises(ConversionError, match="PEFT's OFT"):
        written(replace(rotation, neumann_terms=None), "original")
    with pytest.raises(ConversionError, match="no words for gain"):
        written(build({"ia3_l": torch.ones(1, 4)}, None), "kohya")


def test_several_butterfly_stages_are_products_of_permuted_blocks() -> None:
    """PEFT builds more than one stage on a GPU alone; this is its product of matrices, written out."""
    torch.manual_seed(0)
    blocks, factors = torch.randn(3, 4, 4, 4, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    base = torch.randn(8, 16, dtype=torch.float64)
    turned, identity = base, torch.eye(4, dtype=torch.float64)
    for stage, order in enumerate(([0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 1, 3, 4, 6, 5, 7], [0, 2, 4, 6, 1, 3, 5, 7])):
        permutation = torch.eye(16, dtype=torch.float64)[[2 * half + step for half in order for step in (0, 1)]]
        skews = (blocks[stage] - blocks[stage].mT) / 2
        whole = torch.block_diag(*[(identity - q) @ torch.linalg.inv(identity + q) for q in skews])
        turned = turned @ (permutation @ whole @ permutation.T).T
    delta = build({"boft_R": blocks, "boft_s": factors}, None)
    assert isinstance(delta, InputBoftDelta)
    torch.testing.assert_close(delta.delta_weight(base), factors * turned - base)


def test_a_gain_of_outputs_takes_the_bias_along_unfused_and_fused() -> None:
    model = nn.ModuleDict({"it": nn.Linear(6, 4)}).double().requires_grad_(False)
    plain, gain = copy.deepcopy(model["it"]), torch.tensor([[2.0], [0.5], [-1.0], [1.0]], dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    wanted = plain(x) * (1 + 0.7 * (gain.flatten() - 1))
    apply(plan(model, {"it.ia3_l": gain}), "x")
    layer: Any = model["it"]
    layer.weights["x"] = 0.7
    fusing.refresh([layer])
    torch.testing.assert_close(layer(x), wanted)
    fusing.fuse(model)
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer.base_layer(x), wanted)


def test_a_bad_configuration_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"base_model.model.it.hada_w1_a": torch.ones(4, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA", "r": "many", "alpha": 1}), "utf-8")
    with pytest.raises(ll.MalformedAdapterError, match="many"):
        ll.read_adapter(tmp_path)


def adapter_of(slots: dict[str, Tensor], alpha: float | None = 2.0) -> Adapter:
    return Adapter({"transformer": {"layer": build(slots, alpha)}})


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * 0.3


def misread(case: str) -> dict[str, Tensor]:
    lora = {"down": randn(2, 16), "up": randn(24, 2)}
    loha = {f"hada_w{n}_{side}": randn(*((24, 2) if side == "a" else (2, 16))) for n in (1, 2) for side in "ab"}
    lokr = {"lokr_w1": randn(4, 4), "lokr_w2": randn(6, 4)}
    return {
        "dora over loha": {**loha, "magnitude": randn(24, 1)},
        "dora over lokr": {**lokr, "magnitude": randn(24, 1)},
        "lora and diff_b": {**lora, "bias": randn(24)},
        "loha and diff_b": {**loha, "bias": randn(24)},
        "tucker core": {"down": randn(2, 16, 1, 1), "mid": randn(2, 2, 3, 3), "up": randn(24, 2, 1, 1)},
        "dora and lora_bias": {**lora, "up_bias": randn(24), "magnitude": randn(24, 1)},
        "lokr of a conv1d": {"lokr_w1": randn(4, 4), "lokr_w2": randn(6, 4, 3)},
    }[case]


@pytest.mark.parametrize(
    "case",
    [
        "dora over loha",
        "dora over lokr",
        "lora and diff_b",
        "loha and diff_b",
        "tucker core",
        "dora and lora_bias",
        "lokr of a conv1d",
    ],
)
def test_what_peft_would_read_wrongly_is_refused_with_the_way_out(case: str) -> None:
    with pytest.raises(ConversionError, match="layer") as caught:
        to_tensors(adapter_of(misread(case)), "peft")
    # A LoRA would have the change of the bias too.
    assert ("--as lora --rank" in str(caught.value)) == ("diff_b" not in case)
    assert caught.value.mend.startswith("Write another format")


@pytest.mark.parametrize("case", ["lora and diff_b", "tucker core", "dora and lora_bias"])
def test_what_diffusers_would_leave_out_of_a_lora_is_refused_with_the_way_out(case: str) -> None:
    with pytest.raises(ConversionError, match=r"transformer\.layer") as caught:
        to_tensors(adapter_of(misread(case)), "diffusers")
    assert "kohya" in str(caught.value)


def test_files_that_diffusers_reads_in_part_are_read_whole() -> None:
    slots = misread("tucker core")
    names = {"down": "lora_A.weight", "mid": "lora_mid.weight", "up": "lora_B.weight"}
    tensors = {f"transformer.layer.{names[name]}": tensor for name, tensor in slots.items()}
    model = nn.ModuleDict({"layer": nn.Conv2d(16, 24, 3)})
    (binding,) = plan(model, {**tensors, "transformer.layer.diff_b": torch.ones(24)}).bindings
    wanted = torch.einsum("ab...,oa,bi->oi...", slots["mid"], slots["up"].flatten(1), slots["down"].flatten(1))
    torch.testing.assert_close(binding.delta.delta_weight(), wanted)
    assert torch.equal(binding.delta.tensors()["bias"], torch.ones(24))


def test_dora_of_an_embedding_has_a_magnitude_for_each_feature(tmp_path: Path) -> None:
    """PEFT sees the weight of an embedding transposed, so its norms run over the tokens."""
    model = nn.ModuleDict({"it": nn.Embedding(24, 16)}).double().requires_grad_(False)
    weight: Any = model["it"].weight
    magnitude, down, up = randn(16).abs() + 1, randn(2, 24), randn(16, 2)
    names = {"lora_embedding_A": down, "lora_embedding_B": up, "lora_magnitude_vector": magnitude}
    (binding,) = plan(model, {f"it.{name}": tensor for name, tensor in names.items()}).bindings
    direction = weight + (up @ down).T
    wanted = magnitude * direction / direction.norm(dim=0)
    torch.testing.assert_close(weight + binding.delta.delta_weight(weight), wanted)
    ll.write_adapter(Adapter({"transformer": {"it": binding.delta}}), tmp_path, "peft")
    (again,) = plan(model, tmp_path).bindings
    assert {n: t.tolist() for n, t in again.delta.slots().items()} == {
        n: t.tolist() for n, t in binding.delta.slots().items()
    }


def test_a_bias_for_an_embedding_is_refused() -> None:
    model = nn.ModuleDict({"it": nn.Embedding(24, 16)})
    refused = plan(model, {"it.diff": randn(24, 16), "it.diff_b": randn(24)})
    assert not refused.bindings
    assert "an embedding has none" in str(refused.problems)


@pytest.mark.parity
@pytest.mark.parametrize("options", [{}, {"use_cayley_neumann": False}, {"block_share": True}, {"coft": True}], ids=str)
def test_a_rotated_embedding_is_what_peft_makes_of_it(options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="reads and writes PEFT's own folders")
    torch.manual_seed(0)
    plain, ids = nn.ModuleDict({"tokens": nn.Embedding(10, 8)}).double(), torch.arange(10)
    theirs = peft.get_peft_model(
        copy.deepcopy(plain), peft.OFTConfig(r=0, oft_block_size=4, target_modules=["tokens"], **options)
    )
    for name, parameter in theirs.named_parameters():
        if "oft_embedding_R" in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.2
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = theirs.base_model.model["tokens"](ids)
    assert (wanted - plain["tokens"](ids)).abs().max() > 1e-5
    adapter = plan(plain, tmp_path / "theirs").adapter
    ll.write_adapter(adapter, tmp_path / "ours", "peft")
    for folder in ("theirs", "ours"):
        model: Any = copy.deepcopy(plain)
        apply(plan(model, tmp_path / folder), "x")
        torch.testing.assert_close(model["tokens"](ids), wanted, rtol=1e-6, atol=1e-7)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / folder)).double()
        torch.testing.assert_close(again.base_model.model["tokens"](ids), wanted, rtol=1e-6, atol=1e-7)


def test_a_rotated_embedding_is_turned_back_for_formats_that_turn_inputs() -> None:
    torch.manual_seed(0)
    weight, delta = randn(6, 8), build({"oft_embedding_R": randn(2, 6) * 0.1}, None)
    tensors, _ = written(delta, "lycoris")
    read = build({"oft_R": tensors["lycoris_it.oft_R"]}, None)
    assert torch.equal(read.delta_weight(weight), delta.delta_weight(weight))


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_dora_on_some_modules_only_is_refused_by_peft_and_diffusers(format: str) -> None:
    lora = {"down": randn(2, 16), "up": randn(24, 2)}
    deltas = {"one": build({**lora, "magnitude": randn(24, 1)}, 2.0), "other": build(lora, 2.0)}
    with pytest.raises(ConversionError, match=r"transformer\.other"):
        to_tensors(Adapter({"transformer": deltas}), format)


def test_diffusers_takes_dora_for_each_component_apart() -> None:
    lora = {"down": randn(2, 16), "up": randn(24, 2)}
    plain, dora = build(lora, 2.0), build({**lora, "magnitude": randn(24, 1)}, 2.0)
    to_tensors(Adapter({"transformer": {"one": plain}, "text_encoder": {"one": dora}}), "diffusers")
    with pytest.raises(ConversionError, match=r"text_encoder\.other"):
        to_tensors(Adapter({"transformer": {"one": plain}, "text_encoder": {"one": dora, "other": plain}}), "diffusers")


class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(16, 24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("LoKrConfig", {"r": 12, "alpha": 3, "decompose_factor": 4}),
        ("LoHaConfig", {"r": 2, "alpha": 3, "use_effective_conv2d": True}),
        ("LoraConfig", {"r": 2, "lora_alpha": 0}),
        ("LoHaConfig", {"r": 2, "alpha": 0}),
        ("LoKrConfig", {"r": 1, "alpha": 0, "decompose_factor": 4}),
    ],
    ids=str,
)
def test_a_conv1d_and_an_alpha_of_0_mean_what_peft_makes_of_them(
    config: str, options: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="reads and writes PEFT's own folders")
    torch.manual_seed(0)
    plain = Conv1d().double()
    wrapped = peft.get_peft_model(
        copy.deepcopy(plain), getattr(peft, config)(target_modules=["layer"], **options), autocast_adapter_dtype=False
    )
    for name, parameter in wrapped.named_parameters():
        if "base_layer" not in name:
            parameter.data = randn(*parameter.shape)
    wrapped.save_pretrained(tmp_path / "theirs")
    wanted = wrapped.merge_and_unload().layer.weight.detach() - plain.layer.weight.detach()
    (binding,) = plan(plain, tmp_path / "theirs").bindings
    torch.testing.assert_close(binding.delta.delta_weight(plain.layer.weight.detach()), wanted)
    adapter = Adapter({"transformer": {"layer": binding.delta}})
    ll.write_adapter(adapter, tmp_path / "ours", "peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "ours"), autocast_adapter_dtype=False)
    torch.testing.assert_close(again.merge_and_unload().layer.weight - plain.layer.weight, wanted)


@pytest.mark.parity
def test_diffusers_keeps_the_magnitudes_of_a_dora_with_alphas_in_the_header(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="diffusers loads through it")
    torch.manual_seed(0)
    path = "transformer_blocks.0.attn.to_q"
    theirs = flux()
    weight = theirs.get_submodule(path).weight.detach().double()
    slots = {"down": randn(2, 32), "up": randn(32, 2), "magnitude": randn(32, 1).abs() + 0.5}
    delta = build(slots, 4.0)
    adapter = Adapter({"transformer": {path: delta}}, family="flux1")
    written = ll.write_adapter(adapter.to(dtype=torch.float32), tmp_path / "a.safetensors", "diffusers")
    theirs.load_lora_adapter(str(tmp_path), weight_name=written.name, prefix="transformer")
    x = torch.randn(3, 32)
    with torch.no_grad():
        out = theirs.get_submodule(path)(x) - theirs.get_submodule(path).base_layer.bias
    wanted = x.double() @ (weight + delta.delta_weight(weight)).T
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


MALFORMED: list[dict[str, Any]] = [
    {"peft_type": "LOKR", "r": 0, "alpha": 4},
    {"peft_type": "LOKR", "r": 4, "alpha": "x"},
    {"peft_type": "LOKR", "r": 4, "alpha": float("nan")},
    {"peft_type": "LOKR", "r": 4, "alpha": 4, "rank_pattern": {"it": "x"}},
    {"peft_type": "LOKR", "r": 4, "alpha": 4, "rank_pattern": {"(it": 3}},
    {"peft_type": "LOKR", "r": 4, "alpha": 4, "alpha_pattern": [1]},
    {"peft_type": "LORA", "r": 4, "lora_alpha": float("inf")},
    {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_parameters": 5},
    {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_parameters": ["it.weight"], "target_modules": "(it"},
    {"peft_type": "OFT", "num_cayley_neumann_terms": "five"},
    {"peft_type": "OFT", "num_cayley_neumann_terms": 0},
    {"peft_type": "IA3", "feedforward_modules": "(it"},
    {"peft_type": "IA3", "feedforward_modules": 5},
]


def folder(path: Path, config: dict[str, Any]) -> Path:
    shapes = {
        "LOKR": {"lokr_w1": (4, 4), "lokr_w2": (5, 5)},
        "LORA": {"lora_A.weight": (4, 20), "lora_B.weight": (20, 4)},
        "OFT": {"oft_R": (4, 10)},
        "IA3": {"ia3_l": (20, 1)},
    }[config["peft_type"]]
    tensors = {
        f"base_model.model.transformer_blocks.0.attn.to_q.{k}": torch.randn(shape) for k, shape in shapes.items()
    }
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("config", MALFORMED, ids=str)
def test_a_configuration_that_means_nothing_is_malformed(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ll.MalformedAdapterError):
        ll.read_adapter(folder(tmp_path, config), family="flux1")


@pytest.mark.parametrize("said", [{}, {"alpha": None, "r": None}], ids=["absent", "null"])
def test_alpha_and_rank_that_a_configuration_leaves_out_are_those_of_peft(said: dict[str, Any], tmp_path: Path) -> None:
    config = {"peft_type": "LOKR", "alpha_pattern": {"to_q": 4}, **said}
    delta = ll.read_adapter(folder(tmp_path, config), family="flux1").deltas["transformer"][
        "transformer_blocks.0.attn.to_q"
    ]
    kept = delta.tensors()
    torch.testing.assert_close(delta.delta_weight(), torch.kron(kept["lokr_w1"], kept["lokr_w2"]) * (4 / 8))
