"""How much memory a device has, and how much of it is free."""

import os
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")


def memory_of(device: torch.device) -> tuple[int, int]:
    """Free and total bytes; what torch holds and does not use counts as free. Other devices than these tell nothing."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    if device.type == "cpu" and MEMINFO.is_file():
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
        return free, total
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 40
    return total, total
