"""A family from outside the package: one table, and no other line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lora_loaders as ll
from lora_loaders.families import Family, Names, Shape
from lora_loaders.inspecting import inspect_contents, open_contents

YOURS = Family(
    name="yours",
    components={
        "transformer": Names(
            """
img_in -> embed
[layers.{i} -> blocks.{i}]
  att.qkv -> attn.to_q | attn.to_k | attn.to_v ; att.out -> attn.to_out.0
  mod -> norm.linear ~
"""
        )
    },
    model_classes=("YoursTransformer",),
    shapes=(Shape("transformer", "embed", (8, 4)),),
)
FAMILIES = (*ll.FAMILIES, YOURS)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 8)])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = Attention(), nn.ModuleDict({"linear": nn.Linear(8, 16)})


class YoursTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(4, 8), nn.ModuleList([Block()])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    sizes = {"img_in": (8, 4), "layers_0_att_qkv": (24, 8), "layers_0_att_out": (8, 8), "layers_0_mod": (16, 8)}
    torch.manual_seed(0)
    tensors = {f"lora_unet_{name}.lora_down.weight": torch.randn(2, columns) for name, (_, columns) in sizes.items()}
    tensors |= {f"lora_unet_{name}.lora_up.weight": torch.randn(rows, 2) for name, (rows, _) in sizes.items()}
    safetensors.torch.save_file(tensors, tmp_path / "kohya.safetensors")
    return tmp_path / "kohya.safetensors"


def test_its_files_are_told_and_read(file: Path) -> None:
    adapter = ll.read_adapter(file, families=FAMILIES)
    tensors = safetensors.torch.load_file(file)
    assert (adapter.family, adapter.components, adapter.unresolved) == ("yours", {"transformer": 6}, ())
    up, down = (tensors[f"lora_unet_layers_0_mod.lora_{end}.weight"] for end in ("up", "down"))
    found = adapter.deltas["transformer"]["blocks.0.norm.linear"].delta_weight()
    torch.testing.assert_close(found, torch.cat([up[8:], up[:8]]) @ down)


def test_its_files_are_converted_and_come_back(file: Path) -> None:
    folder = file.parent
    for source, target in (("kohya", "original"), ("original", "diffusers"), ("diffusers", "back")):
        form = "kohya" if target == "back" else target
        ll.convert(folder / f"{source}.safetensors", folder / f"{target}.safetensors", format=form, families=FAMILIES)
    before, after = (safetensors.torch.load_file(folder / f"{name}.safetensors") for name in ("kohya", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_its_files_are_shrunk_merged_checked_and_converted_by_the_folder(file: Path) -> None:
    adapter = ll.read_adapter(file, families=FAMILIES)
    twice = ll.merge([file, file], families=FAMILIES).adapter
    for component, path, delta in ll.resize(file, rank=2, families=FAMILIES).adapter.modules():
        own = adapter.deltas[component][path].delta_weight()
        torch.testing.assert_close(delta.delta_weight(), own)
        torch.testing.assert_close(twice.deltas[component][path].delta_weight(), 2 * own)
    (names,) = [check for check in ll.verify(file, families=FAMILIES).checks if check.name == "names"]
    assert (names.passed, names.found) == (True, "kohya, yours")
    facts = inspect_contents(*open_contents(file), families=FAMILIES)
    assert (facts.family, facts.other_families) == ("yours", ())
    (outcome,) = ll.convert_folder(file.parent, file.parent / "out", format="original", families=FAMILIES)
    assert (outcome.status, outcome.read_as) == ("converted", "kohya, yours")


def test_a_tie_is_said_where_the_other_family_has_other_names(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = Names("first_in -> embed ; first_out -> out")
    tied = (*ll.FAMILIES, replace(YOURS, components={"transformer": names}, name="theirs"), YOURS)
    folder = file.parent / "in"
    adapter = ll.read_adapter(file, families=FAMILIES)
    few = replace(adapter, deltas={"transformer": {"embed": adapter.deltas["transformer"]["embed"]}})
    ll.write_adapter(few, folder / "a.safetensors", "diffusers", families=FAMILIES)
    read = ll.read_adapter(folder, families=tied)
    assert {read.family, *read.ties} == {"yours", "theirs"}
    assert ll.read_adapter(folder, family=YOURS, families=tied).ties == ()
    for format, warned in (("diffusers", False), ("original", True)):
        caplog.clear()
        (outcome,) = ll.convert_folder(folder, file.parent / format, format=format, families=tied)
        assert {str(outcome.read_as).split(", ")[1], *outcome.also_fits} == {"yours", "theirs"}
        assert any("under other names" in record.message for record in caplog.records) == warned


def test_its_adapter_loads_into_a_live_model(file: Path) -> None:
    model = YoursTransformer()
    plan = ll.plan(model, ll.read_adapter(file, families=FAMILIES))
    assert len(plan.matched) == 6
    assert repr(plan) == f"<AttachPlan kohya, yours ({file}; transformer: 6 modules)>"
    assert not plan.problems
    assert not plan.unmatched


class YoursPipeline:
    """A pipeline of which nothing is known but that it has a transformer."""

    def __init__(self) -> None:
        self.transformer = YoursTransformer()


def changes(file: Path) -> dict[str, torch.Tensor]:
    """What fusing must add to each weight, from the file's tensors by hand."""
    tensors = safetensors.torch.load_file(file)
    names = ("img_in", "layers_0_att_qkv", "layers_0_att_out", "layers_0_mod")
    embed, qkv, out, mod = (
        tensors[f"lora_unet_{name}.lora_up.weight"] @ tensors[f"lora_unet_{name}.lora_down.weight"] for name in names
    )
    attention = dict(zip(("to_q", "to_k", "to_v"), qkv.split(8), strict=True))
    return {
        "embed": embed,
        **{f"blocks.0.attn.{name}": part for name, part in attention.items()},
        "blocks.0.attn.to_out.0": out,
        "blocks.0.norm.linear": torch.cat([mod[8:], mod[:8]]),
    }


@pytest.mark.parametrize("target", [YoursPipeline, YoursTransformer])
def test_its_file_loads_into_what_is_attached_to(target: type, file: Path) -> None:
    live = ll.attach(target())
    model = live.transformer if target is YoursPipeline else live
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    method = live.load_lora_weights if target is YoursPipeline else live.load_lora_adapter
    report = method(file, families=FAMILIES)
    assert (report.family, report.components, report.unmatched) == ("yours", {"transformer": 6}, {})
    live.fuse_lora()
    expected = changes(file)
    assert len(expected) == 6
    for path, change in expected.items():
        layer = model.get_submodule(path)
        torch.testing.assert_close(layer.weight.detach(), before[f"{path}.weight"] + change, msg=path)
    assert ll.plan(target(), file, families=FAMILIES).unmatched == {}


@pytest.fixture
def tuned(file: Path) -> tuple[YoursTransformer, YoursTransformer]:
    """A model, and the same with the file's change fused in."""
    torch.manual_seed(1)
    base, tuned = YoursTransformer(), YoursTransformer()
    tuned.load_state_dict(base.state_dict())
    live = ll.attach(tuned)
    live.load_lora_adapter(file, families=FAMILIES)
    live.fuse_lora()
    return base, tuned


def as_published(model: YoursTransformer) -> dict[str, torch.Tensor]:
    """The model's weights under the names of its own checkpoint."""
    state = {key.replace(".base_layer", ""): tensor.detach().clone() for key, tensor in model.state_dict().items()}
    block = "blocks.0."
    published = {f"layers.0.att.out.{end}": state[f"{block}attn.to_out.0.{end}"] for end in ("weight", "bias")}
    for end in ("weight", "bias"):
        published[f"img_in.{end}"] = state[f"embed.{end}"]
        published[f"layers.0.att.qkv.{end}"] = torch.cat([state[f"{block}attn.to_{part}.{end}"] for part in "qkv"])
        published[f"layers.0.mod.{end}"] = state[f"{block}norm.linear.{end}"].roll(8, 0)
    return published


@pytest.mark.parametrize("form", ["live", "file", "folder"])
def test_its_difference_is_extracted_from_models_files_and_folders(
    form: str, file: Path, tuned: tuple[YoursTransformer, YoursTransformer]
) -> None:
    sides: list[nn.Module | Path] = list(tuned)
    if form != "live":
        for name, model in zip(("base", "tuned"), tuned, strict=True):
            folder = file.parent / name
            folder.mkdir()
            weights = as_published(model)
            if form == "folder":  # as diffusers saves a model: its own names, and its class in a file beside them
                weights = {key.replace(".base_layer", ""): t.detach() for key, t in model.state_dict().items()}
                (folder / "config.json").write_text(json.dumps({"_class_name": "YoursTransformer"}))
            safetensors.torch.save_file(
                {k: t for k, t in weights.items() if "lora_" not in k}, folder / "m.safetensors"
            )
        sides = [file.parent / name / ("m.safetensors" if form == "file" else "") for name in ("base", "tuned")]
    done = ll.extract(sides[1], sides[0], rank=2, dtype=torch.float32, families=FAMILIES)
    assert done.adapter.family == "yours"
    expected = changes(file)
    found = done.adapter.deltas["transformer"]
    assert found.keys() == expected.keys()
    for path, change in expected.items():
        torch.testing.assert_close(found[path].delta_weight(), change, rtol=1e-4, atol=1e-5)


def test_its_base_weights_are_read_for_changes_that_depend_on_them(
    file: Path, tuned: tuple[YoursTransformer, YoursTransformer]
) -> None:
    """IA3's gain of the outputs: ΔW = diag(w - 1) W, and a published file's modulation has its halves swapped."""
    base, _ = tuned
    safetensors.torch.save_file(as_published(base), file.parent / "base.safetensors")
    gain = torch.arange(16.0).unsqueeze(1)
    keys = {"lora_unet_layers_0_mod.weight": gain, "lora_unet_layers_0_mod.on_input": torch.tensor(False)}
    adapter = ll.read_adapter(keys, family=YOURS, families=FAMILIES)
    done = ll.to_full(adapter, model=file.parent / "base.safetensors", families=FAMILIES)
    weight = base.get_submodule("blocks.0.norm.linear").get_parameter("weight").detach()
    full = done.adapter.deltas["transformer"]["blocks.0.norm.linear"].delta_weight()
    torch.testing.assert_close(full, gain.roll(8, 0) * weight)
    merged = ll.merge([adapter], model=file.parent / "base.safetensors", families=FAMILIES, rank=8).adapter
    torch.testing.assert_close(merged.deltas["transformer"]["blocks.0.norm.linear"].delta_weight(), full)


def test_without_the_table_its_names_are_nobodys(file: Path) -> None:
    with pytest.raises(ll.UnknownFamilyError, match="no family knows its"):
        ll.read_adapter(file)
