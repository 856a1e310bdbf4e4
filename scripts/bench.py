"""Times lora_loaders beside diffusers + peft on Flux.1's module tree at small width, on the CPU.

Both sides get the same calls on equal models in one run, call by call in turn; figures are medians, in milliseconds of
processor time on one thread, so other work on the machine counts as little as can be. Without peft its column is empty.
"""

import argparse
import gc
import importlib.metadata
import platform
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_convert import streaming_table
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.utils import is_peft_available
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_loaders as ll

OURS, PEER = "lora_loaders", "diffusers + peft"
RANK = 16
SIZE = 0.01
"""Root mean square of ΔW against that of W: what trained adapters have."""
NAMES = ("a", "b", "c", "d")
FULL_WIDTH = 3072
TREE = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
SMALL = {
    "in_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
BFL = {
    "double_blocks": {
        "img_attn_qkv": (1, 3),
        "txt_attn_qkv": (1, 3),
        "img_attn_proj": (1, 1),
        "txt_attn_proj": (1, 1),
        "img_mlp_0": (1, 4),
        "txt_mlp_0": (1, 4),
        "img_mlp_2": (4, 1),
        "txt_mlp_2": (4, 1),
        "img_mod_lin": (1, 6),
        "txt_mod_lin": (1, 6),
    },
    "single_blocks": {"linear1": (1, 7), "linear2": (5, 1), "modulation_lin": (1, 3)},
}
"""Names in kohya's files, with inputs and outputs in multiples of the model's width."""

Clock = Callable[[], float]
Models = Mapping[str, FluxPipeline]


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds (or a bare figure) by side, and what is asked of it."""

    what: str
    figures: Mapping[str, float]
    goal: str = ""
    unit: str = "ms"


# Models, inputs and files


def flux(config: Mapping[str, Any], device: str, dtype: torch.dtype) -> FluxTransformer2DModel:
    """A Flux.1 of random weights, made where it will run."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return FluxTransformer2DModel(**config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def pipelines(make: Callable[[], FluxTransformer2DModel]) -> dict[str, FluxPipeline]:
    """One pipeline a side, over equal models."""
    sides = [OURS, *([PEER] if is_peft_available() else [])]
    pipes = {side: FluxPipeline(None, None, None, None, None, None, make()) for side in sides}  # type: ignore[arg-type]
    ll.attach(pipes[OURS])
    return pipes


def inputs_for(model: FluxTransformer2DModel, image_side: int, text_tokens: int) -> dict[str, Tensor]:
    """One denoiser call's arguments."""
    config: Any = model.config
    dtype, device = model.dtype, model.device
    tokens = image_side**2
    positions = torch.zeros(tokens, 3)
    positions[:, 1] = torch.arange(tokens) // image_side
    positions[:, 2] = torch.arange(tokens) % image_side
    return {
        "hidden_states": torch.randn(1, tokens, config.in_channels).to(device, dtype),
        "encoder_hidden_states": torch.randn(1, text_tokens, config.joint_attention_dim).to(device, dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim).to(device, dtype),
        "timestep": torch.tensor([0.5], device=device, dtype=dtype),
        "img_ids": positions.to(device, dtype),
        "txt_ids": torch.zeros(text_tokens, 3, device=device, dtype=dtype),
        "guidance": torch.tensor([3.5], device=device, dtype=torch.float32),
    }


def factors(outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random down and up whose product is `SIZE` of a freshly made weight's size, which is 1 / sqrt(3 · inputs)."""
    down = torch.randn(RANK, inputs, device=device) / inputs**0.5
    up = torch.randn(outputs, RANK, device=device) * (SIZE / (3 * RANK) ** 0.5)
    return down, up


def diffusers_file(model: nn.Module, path: Path, dtype: torch.dtype) -> int:
    """A file with diffusers' names for every Linear of the blocks; returns their number."""
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "transformer_blocks" in name:
            down, up = factors(module.out_features, module.in_features, module.weight.device)
            tensors[f"transformer.{name}.lora_A.weight"] = down.to(dtype)
            tensors[f"transformer.{name}.lora_B.weight"] = up.to(dtype)
    save_file(tensors, path)
    return len(tensors) // 2


def kohya_modules(width: int, config: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Name in kohya's files, outputs and inputs of every module of the blocks."""
    counts = {"double_blocks": config["num_layers"], "single_blocks": config["num_single_layers"]}
    for blocks, modules in BFL.items():
        for index in range(counts[blocks]):
            for name, (inputs, outputs) in modules.items():
                yield f"lora_unet_{blocks}_{index}_{name}", outputs * width, inputs * width


def kohya_file(model: FluxTransformer2DModel, path: Path, dtype: torch.dtype) -> int:
    """A file with kohya's names for the same modules, which are fewer there; returns their number."""
    config: Any = model.config
    tensors: dict[str, Tensor] = {}
    for key, outputs, inputs in kohya_modules(config.num_attention_heads * config.attention_head_dim, config):
        down, up = factors(outputs, inputs, model.device)
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down.to(dtype), up.to(dtype)
        tensors[f"{key}.alpha"] = torch.tensor(float(RANK), dtype=dtype)
    save_file(tensors, path)
    return len(tensors) // 3


# Timing


def timed(
    pipes: Models,
    what: str,
    action: Callable[[FluxPipeline], object],
    *,
    clock: Clock,
    repeats: int,
    before: Callable[[FluxPipeline], object] = lambda pipe: None,
    after: Callable[[FluxPipeline], object] = lambda pipe: None,
    warmup: int = 1,
    goal: str = "",
) -> Row:
    """Median time of an action on each side, one after the other in every round."""
    samples: dict[str, list[float]] = {side: [] for side in pipes}
    for round_ in range(warmup + repeats):
        for side, pipe in pipes.items():
            before(pipe)
            gc.collect()
            start = clock()
            action(pipe)
            elapsed = clock() - start
            after(pipe)
            if round_ >= warmup:
                samples[side].append(elapsed)
    return Row(what, {side: statistics.median(times) for side, times in samples.items()}, goal)


def step(pipe: FluxPipeline, inputs: Mapping[str, Tensor]) -> Tensor:
    """One denoiser call."""
    with torch.no_grad():
        return pipe.transformer(**inputs, return_dict=False)[0]


def weights_of(pipe: FluxPipeline) -> dict[str, Tensor]:
    """The base weights under their plain names."""
    state = pipe.transformer.state_dict()
    return {key.replace("base_layer.", ""): tensor for key, tensor in state.items() if "lora_" not in key}


def changed_share(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Share of the weights' elements whose bits differ."""
    bits = {2: torch.int16, 4: torch.int32}
    differing = 0
    for key, tensor in before.items():
        kind = bits[tensor.element_size()]
        differing += int((tensor.view(kind) != after[key].view(kind)).sum())
    return differing / sum(tensor.numel() for tensor in before.values())


def record_share(pipe: FluxPipeline) -> float:
    """Bytes kept for unfusing, against the bytes of the fused weights."""
    from lora_loaders.attaching import adapter_layers

    fused = [layer for _, layer in adapter_layers(pipe.transformer) if layer.fused is not None]
    weights = sum(layer.weight.numel() * layer.weight.element_size() for layer in fused)
    return sum(layer.fused.memory() for layer in fused) / weights


def load_four(pipe: FluxPipeline, file: Path) -> None:
    """Load one file under four names."""
    for name in NAMES:
        pipe.load_lora_weights(str(file), adapter_name=name)


def switching_rows(
    pipes: Models, file: Path, clock: Clock, repeats: int, inputs: Mapping[str, Tensor], goals: Mapping[str, str]
) -> list[Row]:
    """Everything that happens after loading: steps, switching, deleting, fusing; four adapters are loaded."""

    def measure(what: str, action: Callable[[FluxPipeline], object], **options: Any) -> Row:
        return timed(pipes, what, action, clock=clock, repeats=repeats, goal=goals.get(what, ""), **options)

    def activate(*names: str) -> Callable[[FluxPipeline], object]:
        return lambda pipe: pipe.set_adapters(list(names), [1.0 / len(names)] * len(names))

    rows = [measure("step, no adapter", lambda pipe: step(pipe, inputs), warmup=2)]
    for pipe in pipes.values():
        load_four(pipe, file)
        activate("a")(pipe)
    rows.append(measure("step, one adapter", lambda pipe: step(pipe, inputs), warmup=2))
    for pipe in pipes.values():
        activate(*NAMES)(pipe)
    rows.append(measure("step, four adapters", lambda pipe: step(pipe, inputs), warmup=2))
    rows.append(measure("set_adapters, one to four", activate(*NAMES), before=activate("a")))
    rows.append(measure("set_adapters, four to one", activate("a"), before=activate(*NAMES)))
    rows.append(
        measure(
            "delete_adapters, one of five",
            lambda pipe: pipe.delete_adapters("e"),
            before=lambda pipe: pipe.load_lora_weights(str(file), adapter_name="e"),
        )
    )
    for pipe in pipes.values():
        activate("a")(pipe)
    rows += fusing_rows(pipes, measure)
    return rows


def fusing_rows(pipes: Models, measure: Callable[..., Row]) -> list[Row]:
    """Fuse and unfuse the one active adapter, and what that leaves behind."""
    changed: dict[str, float] = {}
    kept: dict[str, float] = {}
    for side, pipe in pipes.items():
        before = {key: tensor.clone() for key, tensor in weights_of(pipe).items()}
        pipe.fuse_lora()
        kept[side] = record_share(pipe) if side == OURS else 0.0
        pipe.unfuse_lora()
        changed[side] = changed_share(before, weights_of(pipe))
    return [
        measure("fuse_lora", lambda pipe: pipe.fuse_lora(), after=lambda pipe: pipe.unfuse_lora()),
        measure("unfuse_lora", lambda pipe: pipe.unfuse_lora(), before=lambda pipe: pipe.fuse_lora()),
        Row("weights changed after unfuse_lora", changed, "0 %", unit="%"),
        Row("memory kept for unfusing, of the weights", kept, unit="%"),
    ]


# Printing


def table(rows: Sequence[Row], sides: Sequence[str] = (OURS, PEER)) -> str:
    """The rows as a Markdown table."""
    lines = [f"| what | {' | '.join(sides)} | ratio | goal |", f"|---|{'---:|' * len(sides)}---:|---|"]
    for row in rows:
        cells = [_cell(row.figures.get(side), row.unit) for side in sides]
        own, other = row.figures.get(OURS), row.figures.get(PEER)
        ratio = f"{other / own:.1f}×" if own and other and row.unit == "ms" else "–"
        lines.append(f"| {row.what} | {' | '.join(cells)} | {ratio} | {row.goal or '–'} |")
    return "\n".join(lines)


def _cell(figure: float | None, unit: str) -> str:
    if figure is None:
        return "–"
    if unit == "ms":
        return f"{figure * 1000:.1f} ms"
    return f"{figure * 100:.2f} %" if unit == "%" else f"{figure:.3f}{unit}"


def versions() -> str:
    """What ran where, on one line."""
    names = ("torch", "diffusers", "peft", "safetensors")
    found: list[str] = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return f"lora_loaders {ll.__version__}, {', '.join(found)}, Python {platform.python_version()}"


def report(title: str, machine: str, body: str, path: Path | None) -> None:
    """Print the result, and write it to a file if one is named."""
    program = "scripts/bench" if sys.argv[0].endswith("bench.py") else f"python {sys.argv[0]}"
    command = f"{program} {shlex.join(sys.argv[1:])}".rstrip()
    text = f"# {title}\n\n{time.strftime('%Y-%m-%d')}; {machine}; {versions()}\n\n    {command}\n\n{body}\n"
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def quiet() -> None:
    """Keep warnings out of the table."""
    warnings.filterwarnings("ignore")
    diffusers_logging.set_verbosity_error()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--gigabytes", type=float, default=2.0, help="size of the file that is renamed; 0 leaves it out"
    )
    parser.add_argument("--folder", type=Path, help="the disk to rename it on; the temporary folder's by default")
    parser.add_argument("--write", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    clock = time.process_time
    pipes = pipelines(lambda: flux({**TREE, **SMALL}, "cpu", torch.float32))
    model = pipes[OURS].transformer
    with tempfile.TemporaryDirectory() as folder:
        plain, kohya = Path(folder, "diffusers.safetensors"), Path(folder, "kohya.safetensors")
        modules = diffusers_file(model, plain, torch.float32)
        kohya_file(model, kohya, torch.float32)

        def loading(file: Path, what: str, sides: Models) -> Row:
            return timed(
                sides,
                what,
                lambda pipe: pipe.load_lora_weights(str(file)),
                after=lambda pipe: pipe.unload_lora_weights(),
                clock=clock,
                repeats=arguments.repeats,
                goal="≥ 10×" if PEER in sides else "",
            )

        rows = [
            loading(plain, "load_lora_weights, diffusers' names", pipes),
            # diffusers' converter has the full model's widths written into it and refuses smaller ones.
            loading(kohya, "load_lora_weights, kohya's names", {OURS: pipes[OURS]}),
            *switching_rows(pipes, plain, clock, arguments.repeats, inputs_for(model, 4, 8), {}),
        ]
    title = f"Flux.1's module tree at small width: {modules} modules, rank {RANK}"
    machine = f"{platform.machine()} CPU, one thread, processor time, medians of {arguments.repeats}"
    body = table(rows)
    if arguments.gigabytes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            modules = kohya_modules(FULL_WIDTH, TREE)
            body += "\n\n" + streaming_table(modules, arguments.gigabytes, arguments.repeats, Path(folder))
    report(title, machine, body, arguments.write)


if __name__ == "__main__":
    main()
