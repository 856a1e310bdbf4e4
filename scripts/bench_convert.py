"""Times a conversion that only renames beside `cp` of the same file on the same disk, and measures its memory.

The two take turns, each from a new process that has imported the package, on a target that is not there yet; figures
are medians of elapsed time. That both wait for the imports matters: the host of a virtual machine takes back memory
that is free for some seconds, and what is copied soon after a file was removed is copied the faster. `cp` flushes
nothing to the disk, and neither does `convert` where it replaces nothing.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

BLOCK = 4 << 20
CHILD = """
import re, subprocess, sys, time
import lora_loaders as ll

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

imported, start = peak(), time.perf_counter()
if sys.argv[3] == "cp":
    subprocess.run(["cp", sys.argv[1], sys.argv[2]], check=True)
else:
    ll.convert(sys.argv[1], sys.argv[2], format="original", family="flux1")
print(time.perf_counter() - start, imported, peak())
"""


def large_file(path: Path, modules: Iterable[tuple[str, int, int]], size: int) -> int:
    """A file of random bytes in bfloat16 under kohya's names, of the rank that comes nearest to a size.

    Args:
        path: where to write it.
        modules: name, outputs and inputs of each module.
        size: wanted bytes.

    Returns:
        Its rank.
    """
    modules = list(modules)
    rank = max(1, size // (2 * sum(outputs + inputs for _, outputs, inputs in modules)))
    shapes: dict[str, tuple[int, ...]] = {}
    for key, outputs, inputs in modules:
        shapes |= {
            f"{key}.alpha": (),
            f"{key}.lora_down.weight": (rank, inputs),
            f"{key}.lora_up.weight": (outputs, rank),
        }
    header: dict[str, object] = {}
    start = 0
    for key, shape in sorted(shapes.items()):
        stop = start + 2 * (shape[0] * shape[1] if shape else 1)
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Every byte of a bfloat16 below 0x78 makes a finite number.
    block = bytes(byte % 0x78 for byte in os.urandom(BLOCK))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done in range(0, start, BLOCK):
            file.write(block[: start - done])
        os.fsync(file.fileno())
    return rank


def streaming_table(modules: Iterable[tuple[str, int, int]], gigabytes: float, repeats: int, folder: Path) -> str:
    """A Markdown table of `cp` beside `convert`, kohya's names to the original ones."""
    source, target = folder / "large.safetensors", folder / "target.safetensors"
    rank = large_file(source, modules, int(gigabytes * 2**30))
    runs: dict[str, list[list[float]]] = {"cp": [], "convert": []}
    for _ in range(repeats + 1):
        for program, found in runs.items():
            command = [sys.executable, "-c", CHILD, str(source), str(target), program]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append([float(word) for word in done.stdout.split()])
            target.unlink()
    copy, *_ = map(statistics.median, zip(*runs["cp"][1:], strict=True))
    convert, imported, peak = map(statistics.median, zip(*runs["convert"][1:], strict=True))
    size = source.stat().st_size / 2**30
    return "\n".join(
        [
            f"A file of {size:.2f} GiB (rank {rank}) renamed, kohya to original, medians of {repeats}:",
            "",
            "| | elapsed | of cp | peak memory | goal |",
            "|---|---:|---:|---:|---|",
            f"| cp | {copy:.2f} s | 1.00 | – | – |",
            f"| convert | {convert:.2f} s | {convert / copy:.2f} | {peak / 1e6:.0f} MB "
            f"({imported / 1e6:.0f} MB of it the imports) | ≤ 1.5, < 300 MB |",
        ]
    )
