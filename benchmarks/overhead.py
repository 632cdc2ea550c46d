"""What a call costs the host, beside the bare launches of its kernels.

    python benchmarks/overhead.py

On a CUDA device: microseconds of the host for the call of each operation, forward alone; for the launches in it, made
again with the same arguments; and of the device for those launches. Without one launches are left out, and what stands
there is the wrapper alone: checks, PyTorch's dispatch, reading indices back, and the
allocation of results on the CPU.
"""

import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import machine
from torch import Tensor

import vmae_kernels as ours
from vmae_kernels import _triton

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, V, K = 12544, 1280, 1882  # tokens at 128 frames, visible ones, and those that the decoder reconstructs


def calls() -> dict[str, Callable[[], object]]:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE).bfloat16()

    def chosen(k: int) -> Tensor:
        return torch.rand(1, N, generator=generator, device=DEVICE).argsort(1)[:, :k]

    scores, x, y, visible = rand(1, N), rand(1, N, 768), rand(1, K, 384), rand(1, V, 384)
    mask, positions, seen, picked = rand(384), rand(N, 384), chosen(V), chosen(K)
    video = torch.zeros(1, 128, 224, 224, 3, dtype=torch.uint8, device=DEVICE).permute(0, 4, 1, 2, 3)
    q, packed, z = rand(1, 6, V + K, 64), rand(V + K, 6, 64), rand(1, N, 6)
    starts = torch.tensor([0, V, V + K], dtype=torch.int32, device=DEVICE)
    half = (0.5, 0.5, 0.5)
    return {
        "topk": lambda: ours.topk(scores, 1255),
        "topk_partition": lambda: ours.topk_partition(scores, 1255),
        "soft_topk": lambda: ours.soft_topk(scores, 1255, sigma=0.5, samples=16, seed=0),
        "gather_tokens": lambda: ours.gather_tokens(x, seen, unique=True),
        "scatter_tokens": lambda: ours.scatter_tokens(y, picked, N, fill=mask),
        "decoder_tokens": lambda: ours.decoder_tokens(visible, seen, picked, mask, positions),
        "tubelets": lambda: ours.tubelets(video, seen, mean=half, std=half),
        "fsq": lambda: ours.fsq(z, [8] * 6),
        "attention": lambda: ours.attention(q, q, q),
        "attention, kv_indices": lambda: ours.attention(q, q, q, kv_indices=seen % (V + K)),
        "attention_varlen": lambda: ours.attention_varlen(packed, packed, packed, starts, starts, K, K),
    }


def host(function: Callable[[], object]) -> float:
    """Microseconds until the call is back, whatever the device then does: the median of many."""
    for _ in range(50):
        function()
    taken = []
    for _ in range(500):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return round(1e6 * statistics.median(taken), 1)


def main() -> None:
    if _triton.triton is None:
        sys.exit("overhead: error: expected Triton, which is not installed")
    from triton.runtime.jit import JITFunction
    from triton.testing import do_bench_cudagraph

    os.environ["VMAE_KERNELS"] = "triton"
    launch, launches = JITFunction.run, []

    def recorded(self: JITFunction, *args: object, **options: object) -> None:
        launches.append(lambda: launch(self, *args, **options))
        launches[-1]()

    if DEVICE == "cpu":  # launchers run, and what they launch is left out
        _triton.INTERPRETED = True
        JITFunction.run = lambda self, *args, **options: None
    table: dict[str, dict[str, float]] = {}
    print(f"{'operation':<24}{'call':>10}{'launches':>10}{'device':>10}   microseconds")
    for name, call in calls().items():
        table[name] = {"call": host(call)}
        if DEVICE == "cuda":
            launches.clear()
            JITFunction.run = recorded
            call()
            JITFunction.run = launch

            def bare(repeat: tuple = tuple(launches)) -> None:
                for one in repeat:
                    one()

            table[name] |= {"launches": host(bare), "device": round(1e3 * do_bench_cudagraph(bare), 1)}
        shown = "".join(f"{table[name].get(what, float('nan')):>10.1f}" for what in ("call", "launches", "device"))
        print(f"{name:<24}{shown}", flush=True)
    out = RESULTS / f"overhead-{DEVICE}-{datetime.date.today()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"what": "microseconds", "command": "python benchmarks/overhead.py", "machine": machine(),
                               "operations": table}, indent=2) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
