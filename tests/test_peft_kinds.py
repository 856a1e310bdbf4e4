"""PEFT's kinds of adapters and of LoRA: each is read as PEFT means it, or refused by its name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.peft_kinds import READ, UNREAD, VARIANTS
from lora_loaders.planning import plan

PLAIN_FIELDS = {
    # The scaling and the other algebras, which are read.
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
    # What is changed, which the keys say.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
    *("modules_to_save", "bias", "trainable_token_indices", "fan_in_fan_out", "ensure_weight_tying"),
    # Training and its start; of the starts, those that change the base weight are refused.
    *("lora_dropout", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("velora_config", "monteclora_config", "qalora_group_size"),
    # Where and how it runs.
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("megatron_config", "megatron_core", "runtime_config"),
}

FACTORS = {"lora_A.weight": torch.ones(4, 16), "lora_B.weight": torch.ones(24, 4)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.it = nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.it(x)


def net() -> Any:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def peers() -> Any:
    return pytest.importorskip("peft", reason="writes the folders and says what they mean")


def folder_of(config: Any, folder: Path, **how: Any) -> Any:
    """A trained adapter as PEFT saves it, and the model that it wraps."""
    wrapped = peers().get_peft_model(net(), config)
    if how:
        wrapped.peft_config["default"].init_lora_weights = True
        wrapped.save_pretrained(folder / "start")
        wrapped.peft_config["default"].init_lora_weights = config.init_lora_weights
        how = {"path_initial_model_for_weight_conversion": str(folder / "start")}
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter += torch.randn(parameter.shape) * 0.3
    wrapped.save_pretrained(folder / "end", **how)
    return wrapped.eval()


@pytest.mark.parity
def test_every_kind_and_option_of_peft_is_read_or_refused_by_name() -> None:
    peft = peers()
    kinds = {kind.value for kind in peft.PeftType}
    assert not set(READ) & set(UNREAD)
    assert kinds | {"BONE"} == set(READ) | set(UNREAD)  # which older versions have
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} == PLAIN_FIELDS | set(VARIANTS)
    variants = {f.name for f in dataclasses.fields(peft.LoraConfig) if f.metadata.get("is_lora_variant")}
    assert variants - set(VARIANTS) == {"use_dora", "velora_config", "monteclora_config"}


@pytest.mark.parametrize("kind", [*UNREAD, "LATER"])
def test_a_kind_that_is_not_read_is_refused_though_its_keys_are_a_loras(kind: str, tmp_path: Path) -> None:
    keys = {
        "base_model.model.it.lora_A.weight": torch.ones(4, 16),
        "base_model.model.it.lora_B.weight": torch.ones(24, 4),
    }
    save_file(keys, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 4}), "utf-8")
    model = ll.attach(net())
    before = list(model.named_modules())
    with pytest.raises(ll.UnknownFormatError, match=f"peft_type is {kind}: ") as caught:
        model.load_lora_adapter(tmp_path, prefix=None)
    assert (bool(caught.value.mend), caught.value.state) == (True, "Nothing was loaded or changed.")
    assert list(model.named_modules()) == before
    header = {"lora_adapter_metadata": json.dumps({"transformer.peft_type": kind, "transformer.r": 4})}
    save_file(
        {f"transformer.it.{name}": tensor for name, tensor in FACTORS.items()}, tmp_path / "one.safetensors", header
    )
    with pytest.raises(ll.UnknownFormatError, match=f"transformer: peft_type is {kind}: "):
        ll.read_adapter(tmp_path / "one.safetensors", family="flux1")


def test_another_kind_that_is_read_has_no_keys_of_a_lora(tmp_path: Path) -> None:
    keys = {
        "base_model.model.it.lora_A.weight": torch.ones(4, 16),
        "base_model.model.it.lora_B.weight": torch.ones(24, 4),
    }
    save_file(keys, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA", "r": 4}), "utf-8")
    with pytest.raises(ll.MalformedAdapterError, match="says LOHA, the keys are those of a LoRA"):
        plan(net(), tmp_path)


REFUSED: dict[str, dict[str, Any]] = {
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "arrow_config": {"arrow_config": {"top_k": 1}},
    "kasa_config": {"kasa_config": {}},
    "layer_replication": {"layer_replication": [[0, 1]]},
    "use_bdlora": {"use_bdlora": {"target_modules_bd_a": ["it"], "nblocks": 2}},
    "use_qalora": {"use_qalora": True},
    "init_lora_weights is pissa": {"init_lora_weights": "pissa"},
    "init_lora_weights is pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights is olora": {"init_lora_weights": "olora"},
    "init_lora_weights is corda": {"init_lora_weights": "corda"},
    "init_lora_weights is lora_ga": {"init_lora_weights": "lora_ga"},
    "init_lora_weights is loftq": {"init_lora_weights": "loftq"},
}
UNWRITTEN = ("arrow_config", "layer_replication", "init_lora_weights is corda", "init_lora_weights is loftq")
"""What PEFT makes of several adapters, of language models, or of data alone: the configuration is written by hand."""


@pytest.mark.parity
@pytest.mark.parametrize("case", REFUSED)
def test_a_lora_whose_factors_mean_something_else_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    peft, options = peers(), {"r": 4, "lora_alpha": 2, "target_modules": ["it"]}
    made = REFUSED[case] if case not in UNWRITTEN else {}
    if "kasa_config" in made:
        made = {"kasa_config": peft.KasaConfig()}
    wrapped = folder_of(peft.LoraConfig(**options, **made), tmp_path)
    path = tmp_path / "end" / "adapter_config.json"
    if case in UNWRITTEN:
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | REFUSED[case]), "utf-8")
    with pytest.raises(ll.UnknownFormatError, match=case) as caught:
        plan(net(), tmp_path / "end")
    assert "lora-loaders extract" in caught.value.mend
    if case.startswith("init_lora_weights is pissa"):
        # So it is: the file's product is not what the adapter has done to the weight.
        tensors = load_file(tmp_path / "end" / "adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.it.lora_{side}.weight"] for side in "AB")
        change = wrapped.merge_and_unload().it.weight - net().it.weight
        assert (change - b @ a / 2).abs().max() > 0.1


@pytest.mark.parity
@pytest.mark.parametrize(
    "options",
    [
        *({"init_lora_weights": start} for start in (False, "gaussian", "orthogonal", "mica")),
        {"init_lora_weights": "pissa", "use_rslora": True},
        *({"init_lora_weights": start} for start in ("pissa", "pissa_niter_4", "olora")),
        {"velora_config": {"num_groups": 4}},
        {"monteclora_config": {"num_samples": 2, "buffer_size": 2}},
    ],
    ids=str,
)
def test_a_lora_of_another_start_or_training_computes_what_it_computes_in_peft(
    options: dict[str, Any], tmp_path: Path
) -> None:
    config = peers().LoraConfig(r=4, lora_alpha=2, target_modules=["it"], **options)
    is_mutating = str(options.get("init_lora_weights")).startswith(("pissa", "olora"))
    theirs = folder_of(config, tmp_path, **({"convert": True} if is_mutating else {}))
    x, model = torch.randn(5, 16), ll.attach(net())
    model.load_lora_adapter(tmp_path / "end", adapter_name="a", prefix=None, strict=True)
    wanted = theirs(x).detach()
    assert (wanted - net()(x)).abs().max() > 1e-2
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("key", "kind"), [("lora_E", "ADALORA"), ("lora_diag", "kasa_config")])
@pytest.mark.parametrize("adapter", ["", ".default"])
def test_a_tensor_between_the_factors_tells_the_kind_without_a_configuration(key: str, kind: str, adapter: str) -> None:
    tensors = {f"it.lora_A{adapter}.weight": torch.ones(4, 16), f"it.lora_B{adapter}.weight": torch.ones(24, 4)}
    with pytest.raises(ll.UnknownFormatError, match=kind):
        plan(net(), {**tensors, f"it.{key}{adapter}": torch.ones(4)})
