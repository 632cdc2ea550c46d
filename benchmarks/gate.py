"""Does a step ask for more memory or arithmetic than it did? Against benchmarks/baseline.json; times are not looked at.

    python benchmarks/gate.py                     # the step's own code, traced: the same on every machine, in seconds
    python benchmarks/gate.py --results FILE      # and what benchmarks/run.py measured
    python benchmarks/gate.py --update            # make what is so the baseline

Traced numbers may be 1 % worse than the baseline, measured ones 10 % worse than traced in the same run, on any device;
more ends with status 1. What got better is said, so that the baseline can follow.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from report import points_of

from vmae.planning import costs
from vmae.step import Step

BASELINE = Path(__file__).with_name("baseline.json")
STEPS = {
    "base, 15 %, bf16": Step("base"),
    "base, 15 %, fp32": Step("base", precision="fp32"),
    "base, 15 %, bf16, checkpointing": Step("base", checkpointing=True),
    "base, all, bf16": Step("base", budget=1.0),
    "large, 15 %, bf16": Step("large"),
}
TRACED, MEASURED = 0.01, 0.10  # how much worse is the same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="of benchmarks/run.py")
    parser.add_argument("--update", action="store_true", help="write the baseline")
    args = parser.parse_args()
    steps = {}
    try:
        before = {} if args.update else json.loads(BASELINE.read_text())
        if args.results:
            steps = measured(json.loads(args.results.read_text()))
    except OSError as error:
        sys.exit(f"gate.py: error: {error.filename}: {error.strerror}")
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"gate.py: error: {args.results or BASELINE}: expected results of benchmarks/run.py, got {error!r}")
    found = traced()
    if args.update:
        BASELINE.write_text(json.dumps(found, indent=2) + "\n")
        print(f"written to {BASELINE}")
        return
    worse, better = compared(found, before, TRACED)
    if args.results and not steps:
        sys.exit(f"gate.py: error: {args.results}: expected measured steps of vmae, found none")
    for name, (size, predicted) in steps.items():
        more, less = compared({name: size}, {name: predicted}, MEASURED)
        worse, better = worse + more, better + less
    for line in (*(f"better: {line}" for line in better), *(f"WORSE: {line}" for line in worse)):
        print(line)
    print(f"{len(found)} steps traced, {len(steps)} measured: {len(worse)} numbers worse")
    sys.exit(bool(worse))


def traced() -> dict[str, dict[str, float]]:
    """Of each step: bytes at the peak of 128 frames, bytes that a further frame takes, and FLOP."""
    found = {}
    for name, step in STEPS.items():
        short, long = costs(step), costs(Step(**{**asdict(step), "frames": 2 * step.frames}))
        found[name] = {
            "bytes": short.peak,
            "bytes_per_frame": (long.peak - short.peak) / step.frames,
            "flops": sum(short.flops().values()),
            "flops_per_frame": (sum(long.flops().values()) - sum(short.flops().values())) / step.frames,
        }
    return found


def measured(results: dict[str, Any]) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """Memory and FLOP of every step of ours that was measured, and what was predicted in the same run."""
    found = {}
    for point in points_of(results):
        facts = point.facts
        if facts["way"] == "vmae" and facts["bytes"]:
            size, predicted = (
                {name: each[name] for name in ("bytes", "flops")} for each in (facts, facts["predicted"])
            )
            found[f"{point.line}, {point.frames} frames"] = size, predicted
    return found


def compared(
    found: dict[str, dict[str, float]], before: dict[str, dict[str, float]], tolerance: float
) -> tuple[list[str], list[str]]:
    """What got worse and what got better, a line each. What the baseline does not know is neither."""
    worse, better = [], []
    for name in found.keys() & before.keys():
        for what, value in found[name].items():
            change = value / before[name][what] - 1
            line = f"{name}: {what} {before[name][what]:.4g} -> {value:.4g} ({change:+.1%})"
            if change > tolerance:
                worse.append(line)
            elif change < -tolerance:
                better.append(line)
    return sorted(worse), sorted(better)


if __name__ == "__main__":
    main()
