"""Adapters under every kind of offloading, switched on before or after they are loaded; hooks stay as they were."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import adapter_file, flux, pipeline, render
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders import attaching, fusing
from lora_loaders.errors import AdapterMismatchError, UnsupportedBaseError
from lora_loaders.gates import changing
from lora_loaders.layers.held import held
from lora_loaders.layers.layer import AdapterLayer

CPU = torch.device("cpu")
Offload = Callable[[nn.Module, Path], None]


def model_cpu(model: nn.Module, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="model offloading is accelerate's")
    accelerate.cpu_offload_with_hook(model, CPU)


def sequential(model: nn.Module, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="sequential offloading is accelerate's")
    accelerate.cpu_offload(model, CPU)


def sequential_with_buffers(model: nn.Module, folder: Path) -> None:
    """As diffusers does for a model with a parameter of its own beside its modules (Wan's image models, Lumina)."""
    accelerate = pytest.importorskip("accelerate", reason="sequential offloading is accelerate's")
    accelerate.cpu_offload(model, CPU, offload_buffers=True)


def grouped(offload_type: str, on_disk: bool = False) -> Offload:
    def switch_on(model: nn.Module, folder: Path) -> None:
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(
            model,
            onload_device=CPU,
            offload_device=CPU,
            offload_type=offload_type,
            num_blocks_per_group=1,
            offload_to_disk_path=str(folder) if on_disk else None,
        )

    return switch_on


MODES: dict[str, Offload] = {
    "model": model_cpu,
    "sequential": sequential,
    "sequential, buffers": sequential_with_buffers,
    "group, blocks": grouped("block_level"),
    "group, leaves": grouped("leaf_level"),
    "group, blocks, disk": grouped("block_level", on_disk=True),
    "group, leaves, disk": grouped("leaf_level", on_disk=True),
}


@pytest.fixture(params=MODES)
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[nn.Module], None]:
    return lambda model: MODES[request.param](model, tmp_path)


def fresh() -> Any:
    torch.manual_seed(0)
    return ll.attach(flux().requires_grad_(False))


def run(model: Any) -> Tensor:
    torch.manual_seed(1)
    tensors = {"hidden_states": torch.randn(1, 4, 16), "encoder_hidden_states": torch.randn(1, 3, 32)}
    rest = {"pooled_projections": torch.randn(1, 32), "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    with torch.no_grad():
        return model(**tensors, **rest, timestep=torch.ones(1), guidance=torch.ones(1), return_dict=False)[0]


def close(out: Tensor, wanted: Tensor, step: str = "") -> None:
    """Not to the bit: offloading moves weights, and at other addresses some processors' BLAS sums in another order."""
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5, msg=lambda m: f"{step}: {m}")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all linear layers, wherever they are kept."""
    with changing([model], reads_bases=True):
        return {
            path.replace(".base_layer", ""): held(module, "weight").clone()
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }


def file(seed: int, kind: str = "lora") -> dict[str, Tensor]:
    torch.manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for path, module in flux().named_modules():
        if isinstance(module, nn.Linear) and path.endswith(("attn.to_q", "attn.to_v", "proj_mlp", "proj_out")):
            key = f"transformer.{path}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(2 + seed, module.in_features) * 0.2
            tensors[f"{key}.lora_B.weight"] = torch.randn(module.out_features, 2 + seed) * 0.2
            if kind == "dora":
                tensors[f"{key}.lora_magnitude_vector"] = torch.rand(module.out_features) + 0.5
    return tensors


def hooks_of(model: nn.Module) -> dict[str, Any]:
    """Which hooks sit on which module of the model's own, by identity."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer) or ".lora_" in path:
            continue
        plain = path.replace(".base_layer", "")
        registry = vars(module).get("_diffusers_hook")
        own = {**(registry.hooks if registry is not None else {}), "accelerate": vars(module).get("_hf_hook")}
        kept = {name: id(hook) for name, hook in own.items() if hook is not None}
        if kept:
            found[plain] = kept
    return found


STEPS: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("load b", lambda m: m.load_lora_adapter(file(2), adapter_name="b")),
    ("both, weighted", lambda m: m.set_adapters(["a", "b"], [0.5, -1.0])),
    ("only a", lambda m: m.set_adapters("a")),
    ("swap a", lambda m: m.load_lora_adapter(file(3), adapter_name="a", hotswap=True)),
    ("off", lambda m: m.disable_lora()),
    ("on", lambda m: m.enable_lora()),
    ("fuse a", lambda m: m.fuse_lora(adapter_names=["a"])),
    ("fuse b too", lambda m: m.fuse_lora(adapter_names=["b"], lora_scale=0.5)),
    ("unfuse b", lambda m: fusing.unfuse(m, ["b"])),
    ("unfuse", lambda m: m.unfuse_lora()),
    ("delete b", lambda m: m.delete_adapters("b")),
    ("load a DoRA", lambda m: m.load_lora_adapter(file(4, "dora"), adapter_name="d")),
    ("fuse it", lambda m: m.fuse_lora()),
    ("unfuse it", lambda m: m.unfuse_lora()),
    ("unload", lambda m: m.unload_lora()),
)


@pytest.mark.parametrize("first", ["offload", "load"])
def test_every_call_does_under_offloading_what_it_does_without(
    first: str, offload: Callable[[nn.Module], None]
) -> None:
    plain, model = fresh(), fresh()
    untouched = run(plain)
    if first == "offload":
        offload(model)
        close(run(model), untouched)
    for one in (plain, model):
        one.load_lora_adapter(file(1), adapter_name="a")
    if first == "load":
        offload(model)
    hooks = hooks_of(model)
    assert hooks

    close(run(model), run(plain))
    for name, step in STEPS:
        for one in (plain, model):
            step(one)
        wanted = run(plain)
        for _ in range(2):  # what the first forward moved away must be the same in the next
            close(run(model), wanted, name)
    close(run(model), untouched)
    weights = weights_of(fresh())
    assert weights
    for path, weight in weights_of(model).items():
        assert torch.equal(weight, weights.pop(path)), path
    assert not weights
    left = hooks_of(model)
    assert {path: hooks[path] for path in left} == left
    assert not [
        path for path in hooks.keys() - left.keys() if "lora_" not in path and "attn" not in path and "proj" not in path
    ]


def test_a_failed_load_leaves_hooks_and_output_as_they_were(offload: Callable[[nn.Module], None]) -> None:
    model = fresh()
    model.load_lora_adapter(file(1), adapter_name="a")
    offload(model)
    before, hooks = run(model), hooks_of(model)
    wrong = file(2)
    last = sorted(wrong)[-1]
    wrong[last] = torch.zeros(7, wrong[last].shape[1])

    with pytest.raises(AdapterMismatchError):
        model.load_lora_adapter(wrong, adapter_name="b")

    assert hooks_of(model) == hooks
    close(run(model), before)


FAILURES: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "load": (attaching, "refresh", lambda m: m.load_lora_adapter(file(2), adapter_name="b")),
    "swap": (attaching, "refresh", lambda m: m.load_lora_adapter(file(2), adapter_name="a", hotswap=True)),
    "fuse": (fusing, "refresh", lambda m: m.fuse_lora()),
    "fuse, half way": (fusing, "_fuse_batch", lambda m: m.fuse_lora()),
}


@pytest.mark.parametrize("call", FAILURES)
def test_an_error_in_the_midst_of_a_call_leaves_hooks_and_output_as_they_were(
    call: str, offload: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh()
    model.load_lora_adapter(file(1), adapter_name="a")
    offload(model)
    before, hooks = run(model), hooks_of(model)
    owner, name, step = FAILURES[call]

    original = getattr(owner, name)

    def fail(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, name, original)  # undoing it goes the same way
        original(*args, **options)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model)

    assert hooks_of(model) == hooks
    assert not fusing.fused_adapters(model)
    close(run(model), before)
    step(model)  # and it can be done again


@pytest.mark.parametrize("first", ["offload", "load"])
def test_a_whole_pipeline_in_groups_does_what_it_does_without(first: str) -> None:
    plain, pipe = (ll.attach(pipeline("sd15")) for _ in range(2))
    made = adapter_file(plain)
    untouched = render(plain)

    def load() -> None:
        for one in (plain, pipe):
            one.load_lora_weights(made.tensors, adapter_name="a")

    if first == "load":
        load()
    pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level")
    if first == "offload":
        close(render(pipe), untouched)
        load()
    for step in (
        lambda one: one.set_adapters("a", {"unet": 0.5, "text_encoder": -1.0}),
        lambda one: one.fuse_lora(),
        lambda one: one.unfuse_lora(),
        lambda one: one.unload_lora_weights(),
    ):
        for one in (plain, pipe):
            step(one)
        close(render(pipe), render(plain))
    close(render(pipe), untouched)


def test_saving_under_offloading_writes_what_was_loaded(offload: Callable[[nn.Module], None], tmp_path: Path) -> None:
    model = fresh()
    model.load_lora_adapter(file(1), adapter_name="a")
    offload(model)
    run(model)

    model.save_lora_adapter(tmp_path / "saved", adapter_name="a")

    saved = ll.read_adapter(tmp_path / "saved" / "pytorch_lora_weights.safetensors", family="flux1")
    wanted = file(1)
    for _, path, delta in saved.modules():
        assert torch.equal(delta.tensors()["down"], wanted[f"transformer.{path}.lora_A.weight"])
    assert len(list(saved.modules())) == len(wanted) // 2


def test_accelerates_disk_offload_runs_adapters_and_refuses_to_fuse_into_its_files(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="the files are accelerate's")
    plain, model = fresh(), fresh()
    accelerate.disk_offload(model, str(tmp_path), CPU)
    for one in (plain, model):
        one.load_lora_adapter(file(1), adapter_name="a")
    torch.testing.assert_close(run(model), run(plain), rtol=1e-5, atol=1e-5)

    with pytest.raises(UnsupportedBaseError, match="in a file"):
        model.fuse_lora()

    torch.testing.assert_close(run(model), run(plain), rtol=1e-5, atol=1e-5)
