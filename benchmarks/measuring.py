"""What the benchmarks share: times, memory of this process, and the machine they ran on."""

import functools
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from vmae.optimisation import precision_of
from vmae_kernels import _csrc

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISION = precision_of("auto", torch.device(DEVICE))


@functools.cache
def flushed() -> torch.Tensor:
    return torch.empty(2**30 if DEVICE == "cuda" else 2**26, dtype=torch.int8, device=DEVICE)


def seconds(run: Callable[[], object]) -> float:
    """Of one call, behind a long write: nothing that it reads is in a cache, and on CUDA its start does not count."""
    flushed().zero_()
    if DEVICE == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1000
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def in_turns(runs: Mapping[str, Callable[[], object]], limit: float = 0.8, rounds: int = 30) -> dict[str, list[float]]:
    """Seconds of each call of each: in turns, so that what else happens falls on all; 3 to 30 rounds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin, count = time.perf_counter(), 0
    while count < 3 or (count < rounds and time.perf_counter() - begin < limit):
        for name, run in runs.items():
            times[name].append(seconds(run))
        count += 1
    return times


def resident(field: str) -> float:
    """GiB of this process's memory, now (VmRSS) or at its peak (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**20


@functools.cache
def machine() -> dict:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # without git
        commit = ""
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "einops", "transformers", "vmae"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()  # PyTorch has no public question for it
    return {
        "cpu": re.sub(r"\((R|TM)\)| Processor", "", cpu[0] if cpu else platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability() + (" with AMX" if amx else ""),
        "extension": _csrc.missing() or "built",
        "versions": versions,
        "commit": commit or "unknown",
    }
