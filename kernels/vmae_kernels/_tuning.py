"""Launches, with the numbers of a kernel's rule or, with VMAE_AUTOTUNE=1, with faster ones that a search has found.

The rules are the functions `configuration` of the operations' files: by shape, and by architecture where it matters.
A search goes on from the rule's numbers: it doubles and halves one at a time, and keeps what takes less time, until
nothing does. It runs once for each kind of call (dtype, and sizes up to the next power of 2) and GPU, and its results
are kept in files: later processes do not search. Where a kernel sums, as attention does, other numbers round
differently.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._triton import on_device, power_of_2, triton

Configuration = dict[str, int]
Limits = dict[str, tuple[int, int]]
"""The smallest and the largest value of those numbers that may be others than the rule's."""

_FASTER = 0.97  # of the time, and less: what counts as faster rather than as noise
_found: dict[tuple, Configuration] = {}
_searching = threading.Lock()


def launch(
    kernel: str,
    like: Tensor,
    kind: tuple[int | str, ...],
    rule: Configuration,
    limits: Limits,
    run: Callable[[Configuration], Any],
) -> None:
    """Call `run`, which launches a kernel, on the device of `like`, whose dtype and `kind` name the kind of call."""
    with on_device(like):
        if os.environ.get("VMAE_AUTOTUNE", "0") == "1":
            sizes = (power_of_2(max(x, 1)) if isinstance(x, int) else x for x in kind)
            chosen = _chosen((kernel, like.dtype, *sizes), like, rule, limits, run)
            if chosen != rule:
                from triton.runtime.errors import OutOfResources

                with contextlib.suppress(OutOfResources):  # found for tensors that were aligned otherwise
                    run(chosen)
                    return
        run(rule)


def neighbours(configuration: Configuration, limits: Limits) -> Iterator[Configuration]:
    """Those with one number doubled or halved, within limits."""
    for name, (low, high) in limits.items():
        for value in (2 * configuration[name], configuration[name] // 2):
            if low <= value <= high:
                yield configuration | {name: value}


def search(rule: Configuration, limits: Limits, seconds: Callable[[Configuration], float]) -> Configuration:
    """From the rule's configuration to a neighbour that takes less time, while there is one."""
    best, shortest, tried = rule, seconds(rule), [rule]
    better = True
    while better:
        better = False
        for candidate in neighbours(best, limits):
            if candidate not in tried:
                tried.append(candidate)
                took = seconds(candidate)
                if took < _FASTER * shortest:
                    best, shortest, better = candidate, took, True
                    break
    return best


def _chosen(
    call: tuple, like: Tensor, rule: Configuration, limits: Limits, run: Callable[[Configuration], Any]
) -> Configuration:
    """What was found for calls of this kind, by a search now if there was none."""
    key = (like.device, *call)
    with _searching:
        if key not in _found:
            file = _folder(like) / ("-".join(map(str, call)).replace("torch.", "").replace(" ", "-") + ".json")
            kept = _read(file)
            if _fits(kept, rule, limits):
                _found[key] = kept
            elif like.is_cuda and torch.cuda.is_current_stream_capturing():
                return rule  # what is timed would be captured too
            else:
                _found[key] = search(rule, limits, lambda candidate: _duration(run, candidate, like.is_cuda))
                _keep(file, _found[key])
        return _found[key]


def _fits(kept: Any, rule: Configuration, limits: Limits) -> bool:
    """Whether what was read is something that a search could have found."""

    def fits(name: str) -> bool:
        if name not in limits or kept[name] == rule[name]:
            return kept[name] == rule[name]
        low, high = limits[name]
        return isinstance(kept[name], int) and low <= kept[name] <= high and power_of_2(kept[name]) == kept[name]

    return isinstance(kept, dict) and kept.keys() == rule.keys() and all(map(fits, rule))


def _duration(run: Callable[[Configuration], Any], configuration: Configuration, on_gpu: bool) -> float:
    """Of a launch: the median of many, or infinity if this GPU has not got what it takes."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        if on_gpu:
            return triton.testing.do_bench(lambda: run(configuration), warmup=5, rep=50, return_mode="median")
        start = time.perf_counter()
        run(configuration)
        return time.perf_counter() - start
    except (CompilationError, OutOfResources, PTXASError):
        return math.inf


def _folder(like: Tensor) -> Path:
    """Where results for the device of `like` and for these very sources are kept, a file for each kind of call."""
    folder = os.environ.get("VMAE_AUTOTUNE_DIR") or os.path.expanduser("~/.cache/vmae_kernels")
    device = torch.cuda.get_device_name(like.device) if like.is_cuda else "interpreter"
    name = f"{device}-triton-{triton.__version__}-{_sources()}"
    return Path(folder) / name.replace(" ", "-").replace("/", "-")


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _keep(file: Path, configuration: Configuration) -> None:
    """Whole or not at all: other processes may read it, or keep theirs."""
    try:
        if file.parts[0] == "~":
            raise OSError("there is no home directory; VMAE_AUTOTUNE_DIR names another")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            new = Path(folder) / file.name
            new.write_text(json.dumps(configuration) + "\n")
            new.replace(file)
    except OSError as error:
        warnings.warn(f"{file}: what VMAE_AUTOTUNE=1 has found cannot be kept: {error}", stacklevel=2)
