"""Times lora_loaders beside diffusers + peft on a full-size Flux.1 of random weights, on one GPU.

    python scripts/bench_gpu.py --write benchmarks/<date>-<gpu>.md
    python scripts/bench_gpu.py --tiny        # the same at small width, on the CPU too: does it run?

Files lie in the page cache. A time ends when the device has finished.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench import (
    OURS,
    SMALL,
    TREE,
    Row,
    diffusers_file,
    flux,
    inputs_for,
    kohya_file,
    pipelines,
    quiet,
    report,
    switching_rows,
    table,
    timed,
)
from safetensors.torch import load_file

FULL = {
    "in_channels": 64,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
GOALS = {
    "set_adapters, one to four": "≤ 10 ms",
    "set_adapters, four to one": "≤ 10 ms",
    "fuse_lora": "≤ 150 ms",
    "step, one adapter": "≤ 1.11× bare",
    "step, four adapters": "≤ 1.12× bare",
}


def clock_for(device: str) -> Callable[[], float]:
    """Wall time, when the device has done all that it was given."""

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def loading_rows(pipes: dict, files: dict[str, Path], device: str, repeats: int) -> list[Row]:
    """Loads to ready, the first of the process apart, and beside each reading the same file with safetensors alone."""
    clock = clock_for(device)

    def read(file: Path) -> float:
        start = clock()
        tensors = load_file(file, device=device)
        seconds = clock() - start
        del tensors
        return seconds

    read(files["diffusers"])
    first: dict[str, float] = {}
    for side, pipe in pipes.items():
        start = clock()
        pipe.load_lora_weights(str(files["diffusers"]))
        first[side] = clock() - start
        pipe.unload_lora_weights()
    rows = [Row("load_lora_weights, the first of the process", first)]
    for spelling, file in files.items():
        # In turn with the loads, since a shared host is now fast and now slow.
        raw: list[float] = []
        row = timed(
            pipes,
            f"load_lora_weights, names of {spelling}",
            lambda pipe, file=file: pipe.load_lora_weights(str(file)),
            before=lambda pipe, file=file, raw=raw: raw.append(read(file)),
            after=lambda pipe: pipe.unload_lora_weights(),
            clock=clock,
            repeats=repeats,
            goal="≤ 2× load_file",
        )
        bare = statistics.median(raw[len(pipes) :])
        against = {side: seconds / bare for side, seconds in row.figures.items()}
        rows += [
            Row(f"safetensors' load_file to the device, that of {spelling}", dict.fromkeys(pipes, bare)),
            row,
            Row("… against load_file", against, "≤ 2×", unit="×"),
        ]
    return rows


def against_bare(rows: list[Row]) -> list[Row]:
    """The steps with adapters, each against the step without, after the row itself."""
    bare = next((row for row in rows if row.what == "step, no adapter"), None)
    answer: list[Row] = []
    for row in rows:
        answer.append(row)
        if bare is not None and row.what.startswith("step, ") and row is not bare:
            shares = {side: seconds / bare.figures[side] for side, seconds in row.figures.items()}
            answer.append(Row("… against the bare step", shares, row.goal.removesuffix(" bare"), unit="×"))
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small width, on whatever device there is")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = {**TREE, **(SMALL if arguments.tiny else FULL)}
    pipes = pipelines(lambda: flux(config, device, torch.bfloat16))
    model = pipes[OURS].transformer
    weights = sum(parameter.numel() for parameter in model.parameters())
    inputs = inputs_for(model, 8 if arguments.tiny else 64, 8 if arguments.tiny else 512)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.safetensors") for name in ("diffusers", "kohya")}
        modules = diffusers_file(model, files["diffusers"], torch.bfloat16)
        kohya_file(model, files["kohya"], torch.bfloat16)
        size = files["diffusers"].stat().st_size / 2**20
        if arguments.tiny:
            files.pop("kohya")  # diffusers' converter knows the full model's widths alone
        rows = loading_rows(pipes, files, device, arguments.repeats)
        switching = switching_rows(pipes, files["diffusers"], clock_for(device), arguments.repeats, inputs, GOALS)
    rows += against_bare(switching)
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    title = f"Flux.1, {weights / 1e9:.1f} billion weights in bfloat16; {modules} modules, rank 16, {size:.0f} MiB"
    about = f"{machine}, wall time, medians of {arguments.repeats}; {inputs['hidden_states'].shape[1]} image tokens"
    report(title, f"{about}, {inputs['encoder_hidden_states'].shape[1]} text tokens", table(rows), arguments.write)


if __name__ == "__main__":
    main()
