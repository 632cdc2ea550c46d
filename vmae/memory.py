"""How much memory this process uses."""

import resource
import sys
from pathlib import Path

import torch


def memory_gib(device: torch.device) -> float:
    """GiB: the allocator's peak on CUDA, the resident size on a CPU (its peak where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
