"""The causal convolution at the tokenizer's layer shapes, beside what else a user could write.

    python -m pytest benchmarks/bench_causal_conv3d.py --benchmark-json=conv.json            # seconds, as others report
    python benchmarks/bench_causal_conv3d.py [--frames 16 128] [--dtype bfloat16] [--out F]  # ratios, and memory

The second takes turns between all contestants in one process, so that what the machine does besides falls on all alike;
its times are medians. Memory is the peak while one call runs, less what stood before it. On CUDA what is read lies in
the cache as the call before left it; the inputs are far larger than that cache.
"""

import argparse
import ctypes
import datetime
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from measuring import DEVICE, PRECISION, in_turns, machine, resident, seconds
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vmae_kernels import _csrc, causal_conv3d

RESULTS = Path(__file__).parent / "results"
LAST = torch.channels_last_3d

# inputs, outputs, frames of a clip of 16, height and width, kernel, stride: of the base tokenizer at 224 x 224
LAYERS = {
    "3-64 at 224": (3, 64, 16, 224, (3, 3, 3), (1, 1, 1)),
    "64-64 at 224": (64, 64, 16, 224, (3, 3, 3), (1, 1, 1)),
    "64-64 at 224, halved": (64, 64, 16, 224, (3, 3, 3), (2, 2, 2)),
    "64-128 at 112": (64, 128, 8, 112, (3, 3, 3), (1, 1, 1)),
    "128-128 at 112": (128, 128, 8, 112, (3, 3, 3), (1, 1, 1)),
    "128-128 at 56": (128, 128, 8, 56, (3, 3, 3), (1, 1, 1)),
    "128-128 at 56, 16 frames": (128, 128, 16, 56, (3, 3, 3), (1, 1, 1)),
    "256-256 at 28": (256, 256, 8, 28, (3, 3, 3), (1, 1, 1)),
    "256-256 at 14": (256, 256, 8, 14, (3, 3, 3), (1, 1, 1)),
}


def ours(x: Tensor, weight: Tensor, stride) -> Tensor:
    return causal_conv3d(x, weight, stride=stride)


def contiguous_pad(x: Tensor, weight: Tensor, stride) -> Tensor:
    """As peers do it."""
    return padded(x, weight, stride)


def padded(x: Tensor, weight: Tensor, stride) -> Tensor:
    kt, kh, kw = weight.shape[2:]
    return F.conv3d(F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2, kt - stride[0], 0)), weight, stride=stride)


def folded(x: Tensor, weight: Tensor, stride) -> Tensor:
    """The best that a user could write: only time is padded by a copy."""
    kt, kh, kw = weight.shape[2:]
    before = torch.empty_like(x[:, :, : kt - stride[0]], memory_format=LAST).zero_()
    return F.conv3d(torch.cat((before, x), 2), weight, stride=stride, padding=(0, kh // 2, kw // 2))


def not_causal(x: Tensor, weight: Tensor, stride) -> Tensor:
    """The floor: the same convolution, with padding on both sides of time that needs no copy."""
    return F.conv3d(x, weight, stride=stride, padding=tuple(k // 2 for k in weight.shape[2:]))


CONTESTANTS: dict[str, Callable] = {
    "ours": ours,
    "pad contiguous": contiguous_pad,
    "pad": padded,
    "pad time alone": folded,
    "not causal": not_causal,
}


def inputs_of(layer: str, frames: int, dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    c, o, t, size, kernel, stride = LAYERS[layer]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, t * frames // 16, size, size, c, generator=generator).to(DEVICE, dtype).permute(0, 4, 1, 2, 3)
    weight = torch.randn(o, *kernel, c, generator=generator).div((27 * c) ** 0.5).to(DEVICE, dtype)
    weight = weight.permute(0, 4, 1, 2, 3)
    if name == "pad contiguous":
        x, weight = x.contiguous(), weight.contiguous()
    return x.requires_grad_(), weight.requires_grad_(), stride


def call(name: str, layer: str, frames: int, dtype: torch.dtype, backward: bool) -> Callable[[], None]:
    x, weight, stride = inputs_of(layer, frames, dtype, name)
    function = CONTESTANTS[name]
    with torch.no_grad():
        gradient = torch.ones_like(function(x, weight, stride)) if backward else None

    def run() -> None:
        with torch.set_grad_enabled(backward):
            y = function(x, weight, stride)
        if backward:
            torch.autograd.grad(y, (x, weight), gradient)

    return run


def tidy() -> None:
    """From here on the C library gives back at once what is freed, which costs time, so that resident is in use."""
    library = ctypes.CDLL(None)
    library.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    library.mallopt(-1, 65536)  # M_TRIM_THRESHOLD


def peak_mib(run: Callable[[], None]) -> float:
    """Peak while it runs, less what stood before."""
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) * 1024


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("frames", [16, pytest.param(128, marks=pytest.mark.later)])
@pytest.mark.parametrize(
    "layer", ["128-128 at 56", *(pytest.param(x, marks=pytest.mark.later) for x in LAYERS if x != "128-128 at 56")]
)
def test_layer(benchmark, report, limits, layer, frames, backward):
    if DEVICE == "cpu" and frames > 16:
        pytest.skip("minutes on a CPU")
    dtype = torch.bfloat16 if PRECISION == "bf16" else torch.float32
    runs = {name: call(name, layer, frames, dtype, backward) for name in CONTESTANTS}
    x, weight, stride = inputs_of(layer, frames, dtype, "ours")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y, wanted = ours(x, weight, stride), padded(x, weight, stride)
    flops = counter.get_total_flops() / 2 * (3 if backward else 1)
    off = float((y - wanted).abs().max() / wanted.abs().max())
    if not off <= (0.02 if dtype == torch.bfloat16 else 1e-5):
        raise AssertionError(f"ours gives another result than padding and convolving: {off:.2g}")
    times = in_turns(runs, rounds=5 if frames == 128 else 15)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    best = min((name for name in medians if name not in ("ours", "not causal")), key=medians.__getitem__)
    benchmark.group = f"causal_conv3d, {layer}, {frames} frames, {'both' if backward else 'forward'}"
    rate = flops / medians["ours"]
    report(
        times["ours"], checked=f"ours and pad agree within {off:.1e}", implementation=implementation(),
        operation=f"causal_conv3d {layer}", frames=frames, dtype=str(dtype)[6:], backward=backward, seconds_of=medians,
        best=best, speedup=medians[best] / medians["ours"], flops_per_s=rate,
        share_of_limit=rate / (limits.bf16 if PRECISION == "bf16" else limits.fp32),
    )  # fmt: skip


def implementation() -> str:
    facts = _csrc.facts()
    return "PyTorch" if "missing" in facts else "the extension"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/causal-conv3d-DEVICE-DATE.json")
    args = parser.parse_args()
    dtype, rows = getattr(torch, args.dtype), []
    for layer in args.layers:
        for frames in args.frames:
            for backward in (False, True):
                runs = {name: call(name, layer, frames, dtype, backward) for name in CONTESTANTS}
                times: dict[str, list[float]] = {name: [] for name in runs}
                for name in runs:
                    runs[name]()
                for _ in range(max(5, args.rounds * 16 // frames)):
                    for name, run in runs.items():
                        times[name].append(seconds(run))
                row = {"layer": layer, "frames": frames, "pass": "both" if backward else "forward"}
                row["ms"] = {name: round(1000 * sorted(each)[len(each) // 2], 3) for name, each in times.items()}
                rows.append(row)
                ms = row["ms"]
                print(f"{layer:26} {frames:4} {row['pass']:8}", "  ".join(f"{n} {ms[n]:.2f}" for n in ms), flush=True)
    tidy()
    for row in rows:
        wanted = (row["layer"], row["frames"], dtype, row["pass"] == "both")
        row["peak_mib"] = {name: round(peak_mib(call(name, *wanted)), 1) for name in CONTESTANTS}
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    results = {
        "what": "causal convolution, milliseconds (median) and peak memory, by contestant",
        "dtype": args.dtype,
        "implementation": implementation(),
        "extension": _csrc.facts(),
        "occupancy": _csrc.occupancy(),
        "VMAE_KERNELS": os.environ.get("VMAE_KERNELS", "auto"),
        "device": device,
        "machine": machine(),
        "rows": rows,
    }
    name = f"causal-conv3d-{device.lower().replace(' ', '-')}-{datetime.date.today()}.json"
    out = args.out or RESULTS / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
    print(out)


if __name__ == "__main__":
    main()
