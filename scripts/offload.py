"""Adapters under real offloading on a GPU: every call beside the same call on a model that stays on the GPU.

    python scripts/offload.py            # one CUDA device, about a minute, no network

Prints a table: way of offloading × what came first × worst relative difference over all steps, hooks unchanged or not.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import diffusers as released
import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

import lora_loaders as ll
from lora_loaders import activity, fusing
from lora_loaders.layers.layer import AdapterLayer
from lora_loaders.layout import adapter_layers

diffusers: Any = released  # its classes are only partly typed
WIDTH = 512
TOLERANCE = 0.02
"""Relative difference that bfloat16's rounding explains after a few layers; a stale or missing adapter is far above."""


def fresh(device: torch.device) -> Any:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=64, num_attention_heads=WIDTH // 64,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(16, 24, 24), guidance_embeds=False,
    )  # fmt: skip
    return ll.attach(model.to(device, torch.bfloat16).eval().requires_grad_(False))


def run(model: Any, device: torch.device) -> Tensor:
    torch.manual_seed(1)
    tensors = {"hidden_states": torch.randn(1, 64, 64), "encoder_hidden_states": torch.randn(1, 16, WIDTH)}
    moved = {name: tensor.to(device, torch.bfloat16) for name, tensor in tensors.items()}
    pooled = torch.randn(1, WIDTH).to(device, torch.bfloat16)
    ids = {"img_ids": torch.zeros(64, 3, device=device), "txt_ids": torch.zeros(16, 3, device=device)}
    step = torch.ones(1, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        return model(**moved, **ids, pooled_projections=pooled, timestep=step, return_dict=False)[0].float().cpu()


def file(model: nn.Module, seed: int, kind: str = "lora") -> dict[str, Tensor]:
    torch.manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and "blocks" in path and ".base_layer" not in path:
            key = f"transformer.{path}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4 * seed, module.in_features) * 0.05
            tensors[f"{key}.lora_B.weight"] = torch.randn(module.out_features, 4 * seed) * 0.05
            if kind == "dora":
                tensors[f"{key}.lora_magnitude_vector"] = torch.rand(module.out_features) + 0.5
    return tensors


def grouped(**options: Any) -> Callable[[nn.Module, torch.device, Path], None]:
    def switch_on(model: nn.Module, device: torch.device, folder: Path) -> None:
        disk: dict[str, Any] = {"offload_to_disk_path": str(folder)} if options.get("disk") else {}
        given = {name: value for name, value in options.items() if name != "disk"}
        apply_group_offloading(model, device, num_blocks_per_group=1, **given, **disk)

    return switch_on


MODES: dict[str, Callable[[nn.Module, torch.device, Path], Any]] = {
    "model": lambda model, device, folder: accelerate.cpu_offload_with_hook(model, device),
    "sequential": lambda model, device, folder: accelerate.cpu_offload(model, device),
    **{
        f"group, {kind[:-6]}{', streams' * stream}{', recorded' * record}{', disk' * disk}": grouped(
            offload_type=kind, use_stream=stream, record_stream=record, disk=disk
        )
        for kind in ("block_level", "leaf_level")
        for stream, record in ((False, False), (True, False), (True, True))
        for disk in (False, True)
    },
    "group, leaf, streams, pinned on the fly": grouped(
        offload_type="leaf_level", use_stream=True, low_cpu_mem_usage=True
    ),
}


def steps(files: dict[str, dict[str, Tensor]]) -> list[tuple[str, Callable[[Any], Any]]]:
    return [
        ("load b", lambda m: m.load_lora_adapter(files["b"], adapter_name="b")),
        ("both, weighted", lambda m: m.set_adapters(["a", "b"], [0.5, -1.0])),
        ("only a", lambda m: m.set_adapters("a")),
        ("swap a", lambda m: m.load_lora_adapter(files["c"], adapter_name="a", hotswap=True)),
        ("off", lambda m: m.disable_lora()),
        ("on", lambda m: m.enable_lora()),
        ("fuse a", lambda m: m.fuse_lora(adapter_names=["a"])),
        ("fuse b too", lambda m: m.fuse_lora(adapter_names=["b"], lora_scale=0.5)),
        ("unfuse b", lambda m: fusing.unfuse(m, ["b"])),
        ("unfuse", lambda m: m.unfuse_lora()),
        ("delete b", lambda m: m.delete_adapters("b")),
        ("load a DoRA", lambda m: m.load_lora_adapter(files["d"], adapter_name="d")),
        ("fuse it", lambda m: m.fuse_lora()),
        ("unfuse it", lambda m: m.unfuse_lora()),
        ("unload", lambda m: m.unload_lora()),
    ]


def hooks_of(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer) or ".lora_" in path:
            continue
        registry = vars(module).get("_diffusers_hook")
        # The first forward with streams takes its own tracing hooks away; the hook that offloads stays.
        own = {"group": registry.get_hook("group_offloading") if registry else None, "hf": vars(module).get("_hf_hook")}
        found[path.replace(".base_layer", "")] = {name: id(hook) for name, hook in own.items() if hook is not None}
    return {path: hooks for path, hooks in found.items() if hooks}


def check(mode: str, first: str, device: torch.device, folder: Path) -> tuple[float, str, bool]:
    """The worst difference and where it was, and whether all hooks are what they were."""
    plain, model = fresh(device), fresh(torch.device("cpu"))
    files = {name: file(plain, n + 1, "dora" if name == "d" else "lora") for n, name in enumerate("abcd")}
    untouched = run(plain, device)
    if first == "offload":
        MODES[mode](model, device, folder)
        run(model, device)
    for one in (plain, model):
        one.load_lora_adapter(files["a"], adapter_name="a")
    if first == "load":
        MODES[mode](model, device, folder)
        run(model, device)
    hooks = hooks_of(model)
    worst = (0.0, "")
    for name, step in steps(files):
        for one in (plain, model):
            step(one)
        wanted = run(plain, device)
        for _ in range(2):
            worst = max(worst, (float((run(model, device) - wanted).norm() / wanted.norm()), name))
    worst = max(worst, (float((run(model, device) - untouched).norm() / untouched.norm()), "after all"))
    return worst[0], worst[1], hooks_of(model) == hooks


def check_parking(device: torch.device) -> bool:
    """Whether parked adapters leave the GPU, come back, and give the output of before."""
    model = fresh(device)
    files = {name: file(model, seed) for seed, name in ((1, "a"), (2, "b"))}
    for name, tensors in files.items():
        model.load_lora_adapter(tensors, adapter_name=name)
    model.set_adapters("a")
    before = run(model, device)
    places: list[set[str]] = []
    for target in ("cpu", device):
        activity.move([model], ["a", "b"], target)
        places.append({p.device.type for _, layer in adapter_layers(model) for p in layer.parameters_of("a")})
        if not torch.equal(run(model, device), before):
            return False
    return places == [{"cpu"}, {device.type}]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(arguments).device)
    print("| offloading | first | worst difference | at | hooks as before |\n|---|---|---|---|---|")
    failures = 0
    for mode in MODES:
        for first in ("offload", "load"):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    worst, where, same = check(mode, first, device, Path(folder))
                    failures += worst > TOLERANCE or not same
                    print(f"| {mode} | {first} | {worst:.1e} | {where} | {'yes' if same else 'NO'} |", flush=True)
                except Exception as error:  # a row of the table is the report, and the exit code tells
                    failures += 1
                    print(f"| {mode} | {first} | {type(error).__name__}: {str(error)[:120]} | | |", flush=True)
    parked = check_parking(device)
    print(f"parked adapters leave the GPU and come back: {'yes' if parked else 'NO'}")
    return int(failures > 0 or not parked)


if __name__ == "__main__":
    raise SystemExit(main())
