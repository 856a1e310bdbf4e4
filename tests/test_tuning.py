"""New adapters: what a configuration means, what the factors start as, and a short training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import adapter_file, bits, changed_bits, flux, photograph, pipeline, render, unet
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders.layout import adapter_layers
from lora_loaders.tuning.adding import target_modules


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return ll.attach(unet())


def layers(model: Any) -> dict[str, Any]:
    return dict(adapter_layers(model))


def run(model: Any, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 32, generator=generator)
    return model(x, 1, context).sample


# What a configuration means


@pytest.mark.parametrize(("targets", "expected"), [
    (["to_q"], lambda path: path.endswith(".to_q")),
    (["attn1.to_q", "conv_in"], lambda path: path.endswith("attn1.to_q") or path == "conv_in"),
    ({"to_k", "to_v"}, lambda path: path.endswith((".to_k", ".to_v"))),
    (r".*mid_block.*\.to_(q|k)", lambda path: "mid_block" in path and path.endswith((".to_q", ".to_k"))),
    ("to_q", lambda path: False),
    (["o_q"], lambda path: False),
])  # fmt: skip
def test_targets_are_names_endings_or_whole_path_patterns(model: Any, targets: Any, expected: Any) -> None:
    paths = set(target_modules(model, ll.LoraConfig(target_modules=targets)))
    assert paths == {path for path, _ in model.named_modules() if expected(path)}


def test_all_linear_means_every_linear(model: Any) -> None:
    paths = set(target_modules(model, ll.LoraConfig(target_modules="all-linear")))
    assert paths == {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_excluded_modules_and_layers_are_left_out() -> None:
    model = flux(blocks=3)
    config = ll.LoraConfig(target_modules=["to_q"], exclude_modules=r"single_.*", layers_to_transform=[0, 2])
    assert set(target_modules(model, config)) == {f"transformer_blocks.{i}.attn.to_q" for i in (0, 2)}
    config = ll.LoraConfig(target_modules=["to_q"], layers_to_transform=1, layers_pattern="single_transformer_blocks")
    assert set(target_modules(model, config)) == {"single_transformer_blocks.1.attn.to_q"}


def test_patterns_give_modules_their_own_rank_and_alpha(model: Any) -> None:
    config = ll.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["to_q", "to_k"],
        rank_pattern={"attn1.to_q": 2, r"mid_block.*\.to_k": 6},
        alpha_pattern={"attn1.to_q": 1},
    )
    model.add_adapter(config)
    for path, layer in layers(model).items():
        delta = layer.delta("default")
        rank = 2 if path.endswith("attn1.to_q") else 6 if "mid_block" in path and path.endswith("to_k") else 4
        assert delta.rank == rank, path
        assert delta.alpha == (1 if path.endswith("attn1.to_q") else 8)


def test_rank_stabilised_scaling_divides_by_the_root(model: Any) -> None:
    model.add_adapter(ll.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q"]))
    assert {layer.delta("default").scaling for layer in layers(model).values()} == {3.0}


# Starting values


@pytest.mark.parametrize(
    "options", [{}, {"init_lora_weights": "gaussian"}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}]
)
def test_a_new_adapter_changes_nothing_yet(model: Any, options: dict[str, Any]) -> None:
    with torch.no_grad():
        plain = run(model)
        model.add_adapter(ll.LoraConfig(r=4, target_modules=["to_q", "conv1", "conv_in", "ff.net.2"], **options))
        torch.testing.assert_close(run(model), plain, rtol=1e-5, atol=1e-5)
        if "use_dora" not in options:
            assert torch.equal(run(model), plain)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_new_adapter_for_an_embedding_changes_nothing_yet(use_dora: bool) -> None:
    net: Any = ll.attach(nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 3)))
    x = torch.arange(10)
    plain = net(x)
    net.add_adapter(ll.LoraConfig(r=2, target_modules=["0", "1"], use_dora=use_dora))
    torch.testing.assert_close(net(x), plain, rtol=0, atol=1e-6 if use_dora else 0)
    if use_dora:
        assert net[0].lora_magnitude_vector["default"].weight.numel() == 6  # of the features, as PEFT has it
    assert net[0].lora_embedding_A["default"].shape == (2, 10)
    net(x).sum().backward()
    assert net[0].lora_embedding_A["default"].grad.abs().max() > 0


def test_the_starting_values_have_the_fields_distributions(model: Any) -> None:
    torch.manual_seed(0)
    wide: Any = ll.attach(nn.Sequential(nn.Linear(400, 300)))
    wide.add_adapter(ll.LoraConfig(r=32, target_modules=["0"]), "uniform")
    wide.add_adapter(ll.LoraConfig(r=32, target_modules=["0"], init_lora_weights="gaussian"), "normal")
    wide.add_adapter(ll.LoraConfig(r=32, target_modules=["0"], init_lora_weights=False), "random")
    uniform, normal = (wide[0].lora_A[name].weight for name in ("uniform", "normal"))
    assert uniform.abs().max() <= 1 / 400**0.5  # kaiming_uniform with a = sqrt(5): bound sqrt(1 / fan_in)
    assert uniform.std().item() == pytest.approx(1 / 400**0.5 / 3**0.5, rel=0.05)
    assert normal.std().item() == pytest.approx(1 / 32, rel=0.05)
    assert not wide[0].lora_B["uniform"].weight.any()
    assert wide[0].lora_B["random"].weight.any()


# What is refused


@pytest.mark.parametrize(("options", "error"), [
    ({"target_modules": ["nothing"]}, ll.AdapterMismatchError),
    ({"target_modules": None}, ValueError),
    ({"r": 0}, ValueError),
    ({"r": 4.5}, ValueError),
    ({"rank_pattern": {"to_q": 2.5}}, ValueError),
    ({"target_modules": "("}, ValueError),
    ({"exclude_modules": "("}, ValueError),
    ({"bias": "all"}, TypeError),
    ({"modules_to_save": ["conv_out"]}, TypeError),
    ({"init_lora_weights": "olora"}, TypeError),
    ({"use_dora": True, "lora_bias": True}, ValueError),
])  # fmt: skip
def test_a_refused_configuration_changes_nothing(options: dict[str, Any], error: type[Exception]) -> None:
    pipe = ll.attach(pipeline("sd15"))
    before = photograph(pipe)
    with pytest.raises(error):
        pipe.unet.add_adapter(ll.LoraConfig(**{"target_modules": ["to_q"], **options}))
    assert before.differences(photograph(pipe)) == []


def test_what_is_no_configuration_is_refused_by_its_type(model: Any) -> None:
    with pytest.raises(ValueError, match="adapter_config is a LoraConfig or a dictionary of its fields, not a str"):
        model.add_adapter("x")


def test_a_taken_name_is_refused(model: Any) -> None:
    model.add_adapter(ll.LoraConfig(target_modules=["to_q"]), "x")
    with pytest.raises(ll.AdapterStateError, match="Adapter with name x already exists"):
        model.add_adapter(ll.LoraConfig(target_modules=["to_k"]), "x")


@pytest.mark.parity
def test_a_dictionary_and_a_peft_configuration_are_accepted(model: Any) -> None:
    model.add_adapter({"r": 3, "lora_alpha": 6, "target_modules": ["to_q"]}, "dictionary")
    assert {layer.delta("dictionary").rank for layer in layers(model).values()} == {3}
    with pytest.raises(TypeError, match="nonsense"):
        model.add_adapter({"r": 3, "target_modules": ["to_q"], "nonsense": 1}, "other")
    peft = pytest.importorskip("peft", reason="PEFT's own configuration needs PEFT")
    model.add_adapter(peft.LoraConfig(r=5, lora_alpha=10, target_modules=["to_k"], lora_dropout=0.1), "peft")
    found = [layer for layer in layers(model).values() if "peft" in layer.templates]
    assert {(layer.delta("peft").rank, layer.delta("peft").scaling, layer.dropouts["peft"]) for layer in found} == {
        (5, 2.0, 0.1)
    }


# Training


def test_the_base_is_frozen_and_thawed_again(model: Any) -> None:
    model.conv_in.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.add_adapter(ll.LoraConfig(r=2, target_modules=["to_q"]), "one")
    model.add_adapter(ll.LoraConfig(r=2, target_modules=["to_k"]), "two")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".two." in name for name in trained)
    assert any("lora_B.two" in name for name in trained)
    model.delete_adapters("one")
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora" not in name)
    model.delete_adapters("two")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.05}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_lowers_the_loss_and_saves_what_it_learnt(
    model: Any, options: dict[str, Any], checkpointing: bool, tmp_path: Path
) -> None:
    if checkpointing:
        model.enable_gradient_checkpointing()
    before = bits(model)
    model.train()
    model.add_adapter(ll.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "conv1"], **options))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, 2e-2)
    goal = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(12):
        loss = (run(model) - goal).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert changed_bits(before, model) == []
    model.eval()
    with torch.no_grad():
        trained = run(model)
        state = {
            key.replace("base_layer.", "").replace(".default", ""): tensor
            for key, tensor in model.state_dict().items()
            if "lora_" in key
        }
        metadata = model.peft_config["default"].to_dict()
        metadata = {key: metadata[key] for key in ("r", "lora_alpha", "target_modules")}
        ll.StableDiffusionLoraLoaderMixin.save_lora_weights(
            tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=metadata
        )
        model.unload_lora()
        model.load_lora_adapter(tmp_path)
        torch.testing.assert_close(run(model), trained, rtol=1e-5, atol=1e-5)
        model.requires_grad_(False)


def test_what_is_being_trained_can_be_saved_from_the_pipeline(tmp_path: Path) -> None:
    pipe = ll.attach(pipeline("flux1"))
    pipe.transformer.add_adapter(
        ll.LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    )
    wanted = render(pipe)
    pipe.save_lora_weights(tmp_path)
    again = ll.attach(pipeline("flux1"))
    again.load_lora_weights(tmp_path)
    torch.testing.assert_close(render(again), wanted, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_resumes_where_it_was(model: Any) -> None:
    model.add_adapter(ll.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        wanted = run(model)
    torch.manual_seed(0)
    other: Any = ll.attach(unet())
    other.add_adapter(ll.LoraConfig(r=4, target_modules=["to_q"]))
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(run(other), wanted)


def test_a_frozen_adapter_beside_a_trained_one_contributes(model: Any) -> None:
    made = adapter_file(pipeline("sd15"), components=["unet"], scale=0.1)
    model.load_lora_adapter(made.tensors, adapter_name="frozen")
    with torch.no_grad():
        wanted = run(model)
    model.add_adapter(ll.LoraConfig(r=4, target_modules=["to_q"]), "new")
    model.set_adapters(["frozen", "new"])
    got = run(model)
    torch.testing.assert_close(got.detach(), wanted, rtol=1e-4, atol=1e-5)
    got.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".new." in name), name


def test_parameters_kept_in_float32_train_a_low_precision_model() -> None:
    torch.manual_seed(0)
    model: Any = ll.attach(unet().bfloat16())
    model.add_adapter(ll.LoraConfig(r=4, target_modules=["to_q"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # as diffusers' cast_training_params does
    x, context = torch.ones(1, 4, 8, 8).bfloat16(), torch.ones(1, 3, 32).bfloat16()
    loss = model(x, 1, context).sample.float().sum()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)
    model.requires_grad_(False)
    with torch.no_grad():
        assert model(x, 1, context).sample.dtype == torch.bfloat16


def test_a_configuration_is_written_and_read_as_peft_does(tmp_path: Path) -> None:
    own = ll.LoraConfig(r=4, lora_alpha=6, target_modules={"to_q", "to_k"}, rank_pattern={"to_k": 8}, use_dora=True)
    own.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))["target_modules"] == ["to_k", "to_q"]
    assert ll.LoraConfig.from_pretrained(tmp_path).to_dict() == own.to_dict()
    (tmp_path / "adapter_config.json").write_text("{", "utf-8")
    with pytest.raises(ll.MalformedAdapterError):
        ll.LoraConfig.from_pretrained(tmp_path)
    with pytest.raises(ll.AdapterFileError):
        ll.LoraConfig.from_pretrained(tmp_path / "elsewhere")


@pytest.mark.parity
def test_peft_reads_our_configuration_and_we_read_pefts(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT's own configuration needs PEFT")
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["to_q"], "alpha_pattern": {"to_q": 2}}
    ll.LoraConfig(**fields).save_pretrained(tmp_path / "ours")
    theirs = peft.LoraConfig.from_pretrained(tmp_path / "ours")
    assert (theirs.r, theirs.lora_alpha, theirs.alpha_pattern) == (4, 6, {"to_q": 2})
    peft.LoraConfig(**fields).save_pretrained(tmp_path / "theirs")
    assert ll.LoraConfig.from_pretrained(tmp_path / "theirs").to_dict() == ll.LoraConfig(**fields).to_dict()
