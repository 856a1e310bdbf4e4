"""Resizing and extraction, measured: time, error against the optimum, peak memory.

    scripts/bench_combining.py resize --sd-scripts ~/sd-scripts      # beside kohya's networks/resize_lora.py
    scripts/bench_combining.py extract --folder /tmp/pair            # a synthetic full-size SDXL pair, 2 x 4.8 GiB

The checkout of sd-scripts is named by its path and is not run where it is not there.
"""

import argparse
import importlib
import math
import resource
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import lora_loaders as ll
from lora_loaders.checkpoints import open_checkpoint
from lora_loaders.files import write_safetensors
from lora_loaders.lazy import FileTensor, form_of

SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def sdxl() -> torch.nn.Module:
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL)


def resize(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, ours, theirs = (Path(folder) / f"{name}.safetensors" for name in ("source", "ours", "theirs"))
        save_file(lora_file(arguments.rank, arguments.modules), source)
        start = time.perf_counter()
        done = ll.resize(source, rank=arguments.new_rank)
        ll.write_adapter(done.adapter, ours, "kohya")
        own = time.perf_counter() - start
        ranks = f"rank {arguments.rank} to {arguments.new_rank}"
        print(f"{arguments.modules} modules of SDXL, {ranks}, {torch.get_num_threads()} threads")
        error = worst(source, ours, arguments.new_rank)
        print(f"lora_loaders: {own:.2f} s; worst error against the optimum {error:.6f}")
        if arguments.sd_scripts is None or not (arguments.sd_scripts / "networks").is_dir():
            print("sd-scripts: no checkout given (--sd-scripts PATH)")
            return
        start = time.perf_counter()
        kohya_resize(arguments.sd_scripts, source, theirs, arguments.new_rank)
        other = time.perf_counter() - start
        error = worst(source, theirs, arguments.new_rank)
        print(f"sd-scripts:   {other:.2f} s; worst error against the optimum {error:.6f}; {other / own:.0f} x the time")


def lora_file(rank: int, modules: int) -> dict[str, torch.Tensor]:
    """Every so many'th of the linear modules, with singular values that fall off as a trained LoRA's do."""
    torch.manual_seed(0)
    linears = [(n, m) for n, m in sdxl().named_modules() if isinstance(m, torch.nn.Linear) and "attn" in n]
    fall = torch.logspace(0, -1.5, rank)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in linears[:: max(1, len(linears) // modules)][:modules]:
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, module.in_features).half()
        tensors[f"{key}.lora_up.weight"] = (torch.randn(module.out_features, rank) * fall * 0.02).half()
        tensors[f"{key}.alpha"] = torch.tensor(rank / 2)
    return tensors


def worst(before: Path, after: Path, rank: int) -> float:
    """The largest error of a module over the best possible one, from singular values in float64; each eighth module."""
    old, new = ll.read_adapter(before), ll.read_adapter(after)
    ratios: list[float] = []
    for component, path, delta in list(old.modules())[::8]:
        change = delta.delta_weight().double()
        best = torch.linalg.svdvals(change)[rank:].norm()
        ratios.append(float((new.deltas[component][path].delta_weight() - change).norm() / best))
    return max(ratios)


def kohya_resize(checkout: Path, source: Path, target: Path, rank: int) -> None:
    """Their function on the file, without the training library that the script imports and does not need for this."""
    library = types.ModuleType("library")
    parts = {name: types.ModuleType(f"library.{name}") for name in ("train_util", "model_util", "utils")}
    parts["utils"].setup_logging = lambda *_, **__: None  # type: ignore[attr-defined]
    sys.modules |= {"library": library, **{f"library.{name}": module for name, module in parts.items()}}
    for name, module in parts.items():
        setattr(library, name, module)
    sys.path.insert(0, str(checkout / "networks"))
    script = importlib.import_module("resize_lora")
    tensors = {key: tensor.float() for key, tensor in load_file(source).items()}
    made, _, _ = script.resize_lora_model(tensors, rank, rank, torch.float16, None, None, None, False)
    save_file(made, target)


def extract(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    base, tuned = folder / "base.safetensors", folder / "tuned.safetensors"
    if not tuned.is_file():
        write_pair(base, tuned)
    size = sum(delta.tensors()["diff"].numel() for _, _, delta in open_checkpoint(base).weights.modules())
    start = time.perf_counter()
    done = ll.extract(tuned, base, algebra=arguments.algebra, rank=arguments.new_rank, energy=arguments.energy)
    middle = time.perf_counter()
    target = ll.write_adapter(done.adapter, folder / f"{arguments.algebra}.safetensors", "kohya")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    ranks = [fit.rank for fit in done.fits.values() if fit.rank]
    print(f"{size / 1e9:.2f} B weights, {2 * base.stat().st_size / 2**30:.1f} GiB, {torch.get_num_threads()} threads")
    print(f"{len(done.fits)} modules to {arguments.algebra}, ranks {min(ranks, default=0)} to {max(ranks, default=0)}")
    written = f"{time.perf_counter() - middle:.1f} s to write {target.stat().st_size / 2**20:.0f} MiB"
    print(f"{middle - start:.0f} s, and {written}")
    print(f"peak resident memory {peak:.2f} GiB; relative error of ΔW {done.error:.4f}")


def write_pair(base: Path, tuned: Path) -> None:
    """Random weights in float16, and the same with a change of rank 32 and noise, as fine-tuning leaves; streamed."""
    shapes = {key: tensor.shape for key, tensor in sdxl().state_dict().items()}
    for path in (base, tuned):
        tensors = {
            key: FileTensor.computed(form_of(shape, torch.float16), partial(weight, number, shape, path == tuned))
            for number, (key, shape) in enumerate(shapes.items())
        }
        write_safetensors(tensors, path, {"format": "pt"})


def weight(number: int, shape: torch.Size, is_tuned: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    values = torch.randn(shape, generator=generator) * 0.02
    if is_tuned and len(shape) > 1:
        rows, columns = shape[0], math.prod(shape[1:])
        up, down = torch.randn(rows, 32, generator=generator), torch.randn(32, columns, generator=generator)
        values += (up @ down * 2e-4 + torch.randn(rows, columns, generator=generator) * 3e-4).view(shape)
    return values.half()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("resize")
    command.add_argument("--sd-scripts", type=Path)
    command.add_argument("--rank", type=int, default=64)
    command.add_argument("--new-rank", type=int, default=16)
    command.add_argument("--modules", type=int, default=40)
    command.set_defaults(run=resize)
    command = commands.add_parser("extract")
    command.add_argument("--folder", type=Path, required=True)
    command.add_argument("--algebra", default="lora")
    command.add_argument("--new-rank", type=int, default=None)
    command.add_argument("--energy", type=float, default=None)
    command.set_defaults(run=extract)
    given = parser.parse_args()
    given.run(given)
