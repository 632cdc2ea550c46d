"""Time and memory of one pretraining step at 128 frames: vmae beside Hugging Face's VideoMAE, ViT-B, one clip.

    python benchmarks/pretraining_step.py            # needs the `peers` and `demo` extras; Linux
    python benchmarks/pretraining_step.py --frames 32

Every measurement is a process of its own, and they take turns, so that none finds a warmer machine. A step is
forward and backward on the same real clip; the tokens are given. Memory is the peak resident size during the steps
less what was resident before the first, with model and inputs in place. The results file names machine, versions and
commit.
"""

import argparse
import datetime
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import machine, resident

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="processes per contestant")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per process, after one that is not timed")
    default = ["vmae-bf16", "vmae-bf16-checkpointing", "vmae-bf16-compiled", "huggingface-fp32", "huggingface-bf16"]
    parser.add_argument("--contestants", nargs="+", default=default, choices=list(STEPS))
    parser.add_argument(
        "--out", type=Path, help="results file (default: benchmarks/results/pretraining-step-DATE.json)"
    )
    parser.add_argument("--measure", choices=list(STEPS), help=argparse.SUPPRESS)  # in a child process
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.frames, args.steps)))
        return
    runs: dict[str, list[dict]] = {name: [] for name in args.contestants}
    for turn in range(args.rounds):
        for name in args.contestants:
            settings = ["--measure", name, "--frames", str(args.frames), "--steps", str(args.steps)]
            child = subprocess.run([sys.executable, __file__, *settings], stdout=subprocess.PIPE, check=True, text=True)
            runs[name].append(json.loads(child.stdout.splitlines()[-1]))
            print(f"round {turn + 1}: {name}: {runs[name][-1]['seconds']} s, {runs[name][-1]['gib']:.2f} GiB")
    results = {
        "what": f"one pretraining step, forward and backward, ViT-B, one {args.frames}-frame 224 x 224 clip, batch 1",
        "command": " ".join(["python", "benchmarks/pretraining_step.py", *sys.argv[1:]]),
        "machine": machine(),
        "contestants": {name: summary(measured) for name, measured in runs.items()},
    }
    first, *others = args.contestants
    for other in others:
        ratio = results["contestants"][other]["median_s"] / results["contestants"][first]["median_s"]
        results[f"{first}_speedup_over_{other}"] = round(ratio, 2)
    out = args.out or RESULTS / f"pretraining-step-{datetime.date.today()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps({k: v for k, v in results.items() if k != "machine"}, indent=2))
    print(f"written to {out}")


def summary(runs: list[dict]) -> dict:
    seconds = sorted(s for run in runs for s in run["seconds"])
    return {
        "median_s": round(statistics.median(seconds), 3),
        "min_s": seconds[0],
        "max_s": seconds[-1],
        "peak_above_idle_gib": round(max(run["gib"] for run in runs), 3),
        "loss": runs[0]["loss"],
        "profile": runs[0]["profile"],
    }


def measure(name: str, frames: int, steps: int) -> dict:
    from torch.profiler import profile

    step = STEPS[name](frames)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the present size
    idle = resident("VmRSS")
    loss = step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(round(time.perf_counter() - start, 3))
    gib = resident("VmHWM") - idle
    with profile() as profiled:
        step()
    averages = sorted(profiled.key_averages(), key=lambda a: -a.self_cpu_time_total)
    total = sum(a.self_cpu_time_total for a in averages)
    shares = {a.key: round(100 * a.self_cpu_time_total / total, 1) for a in averages[:8]}
    return {"seconds": seconds, "gib": gib, "loss": loss, "profile": shares}


def clip(frames: int) -> torch.Tensor:
    from vmae import load_clip
    from vmae.demo import demo_clips

    return load_clip(demo_clips()["bigbuckbunny"], frames=frames, size=224)


def vmae_step(
    frames: int, dtype: torch.dtype, *, checkpointing: bool = False, compiled: bool = False
) -> Callable[[], float]:
    from vmae import AdaptiveTokenizer, TokenizerConfig, VideoMAE, VideoMAEConfig

    torch.manual_seed(0)
    video = clip(frames)
    tokens = AdaptiveTokenizer(TokenizerConfig.tiny()).encode(video)
    model = VideoMAE(VideoMAEConfig.base(frames=frames)).train()
    model.checkpointing = checkpointing
    if compiled:
        for block in (*model.blocks, *model.decoder_blocks):
            block.compile()

    def step() -> float:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(video, tokens, seed=1)
        loss.backward()
        model.zero_grad()
        return loss.item()

    return step


def huggingface_step(frames: int, dtype: torch.dtype) -> Callable[[], float]:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    from vmae import tube_mask

    torch.manual_seed(0)
    video = (clip(frames).transpose(1, 2).float() / 255 - 0.45) / 0.225
    model = VideoMAEForPreTraining(VideoMAEConfig(num_frames=frames))
    grid = (frames // 2, 14, 14)
    hidden = torch.ones(1, frames // 2 * 196, dtype=torch.bool)
    hidden.scatter_(1, tube_mask(grid, 1, mask_ratio=0.9, seed=1).visible, False)

    def step() -> float:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(video, bool_masked_pos=hidden).loss
        loss.backward()
        model.zero_grad()
        return loss.item()

    return step


STEPS: dict[str, Callable[[int], Callable[[], float]]] = {
    "vmae-bf16": lambda frames: vmae_step(frames, torch.bfloat16),
    "vmae-bf16-checkpointing": lambda frames: vmae_step(frames, torch.bfloat16, checkpointing=True),
    "vmae-bf16-compiled": lambda frames: vmae_step(frames, torch.bfloat16, compiled=True),
    "vmae-fp32": lambda frames: vmae_step(frames, torch.float32),
    "huggingface-fp32": lambda frames: huggingface_step(frames, torch.float32),
    "huggingface-bf16": lambda frames: huggingface_step(frames, torch.bfloat16),
}


if __name__ == "__main__":
    main()
