"""One pretraining step and its parts against frames: time, memory and arithmetic, by budget and model.

    python -m pytest benchmarks/bench_frames.py --benchmark-json=frames.json [-k "base and 128"] [--minutes 10]

Each point is a process of its own (vmae/bench.py): gradients and loss are first compared with another implementation's
in float32, then memory is that of one step, above what stood before it, and the time is the median of up to three.
"""

import pytest
from measuring import DEVICE, PRECISION

from vmae.bench import Case
from vmae.step import Step

LONG = [256, 512, 1024, 2048, 4096] if DEVICE == "cuda" else []
SHORT = [128, 64, 32, 16]
FRAMES = [*SHORT, *LONG]
FIRST = [("base", frames, budget) for budget in (0.15, 1.0) for frames in SHORT]
LATER = [
    *(("base", frames, budget) for frames in LONG for budget in (0.15, 1.0)),
    *(("small", frames, 0.15) for frames in FRAMES),
    *(("base", frames, 0.5) for frames in FRAMES),
    *(("large", frames, 0.15) for frames in (16, 32, 64, 128, *LONG)),
    *([] if LONG else [("base", 256, 0.15), ("base", 512, 0.15)]),
    *(("small", frames, budget) for budget in (1.0, 0.5) for frames in FRAMES),
    *(("large", frames, budget) for budget in (1.0, 0.5) for frames in (16, 32, 64, 128, *LONG)),
]
POINTS = [*FIRST, *(pytest.param(*point, marks=pytest.mark.later) for point in LATER)]


@pytest.mark.parametrize(("model", "frames", "budget"), POINTS)
def test_step(report_step, benchmark, model, frames, budget):
    benchmark.group = f"{model}, {budget:.0%}"
    report_step(Case(Step(model, frames, budget=budget, precision=PRECISION), device=DEVICE))


@pytest.mark.parametrize("frames", [128, *(pytest.param(n, marks=pytest.mark.later) for n in LONG)])
def test_checkpointing(report_step, benchmark, frames):
    benchmark.group = "base, 15%, checkpointing"
    report_step(Case(Step("base", frames, precision=PRECISION, checkpointing=True), device=DEVICE))
