"""From a video file to an updated model: decoding, the frozen tokenizer, and the step, at several lengths.

    python -m pytest benchmarks/bench_pipeline.py --benchmark-json=pipeline.json [--minutes 10]

Each point is a process of its own, which first checks that a stream of chunks gives bitwise the whole clip's tokens,
and, at 4 frames, the step's gradient.
The video is Big Buck Bunny of the `demo` extra; without it, or without PyAV, the clip is noise and nothing is decoded.
"""

import importlib.util
import itertools
import json
import statistics
import sys
from typing import Any

import pytest
import torch
from measuring import DEVICE, PRECISION
from torch import Tensor

from vmae import AdaptiveTokenizer, TokenizerConfig, VideoMAE
from vmae.bench import Case, check, memory_of, printed_by, timed
from vmae.optimisation import autocast
from vmae.step import Mark, Step, inputs, optimizer_of, run

LONG = [256, 512, 1024] if DEVICE == "cuda" else []


@pytest.mark.parametrize("tokenizer", ["tiny", pytest.param("base", marks=pytest.mark.later)])
@pytest.mark.parametrize("frames", [128, 16, *(pytest.param(n, marks=pytest.mark.later) for n in (64, 32, *LONG))])
def test_from_file_to_model(elsewhere, report, benchmark, frames, tokenizer):
    if tokenizer == "base" and DEVICE == "cpu" and frames > 16:
        pytest.skip("minutes on a CPU: it takes 12 TFLOP at 128 frames")
    benchmark.group = f"pipeline, {tokenizer} tokenizer, base model"
    about = {"frames": frames, "tokenizer": tokenizer, "model": "base", "precision": PRECISION}
    command = [sys.executable, __file__, str(frames), tokenizer]
    found = elsewhere(lambda timeout: printed_by(command, "pipeline", timeout), about)
    report(found.pop("seconds"), **about, **found)


def measure(frames: int, preset: str) -> dict[str, Any]:
    step = Step("base", frames, precision=PRECISION)
    memory = memory_of(DEVICE)
    off = check(Case(step, device=DEVICE))
    torch.manual_seed(0)
    tokenizer = AdaptiveTokenizer(getattr(TokenizerConfig, preset)()).to(DEVICE).eval()
    model = VideoMAE(step.config()).to(DEVICE).train()
    optimizer, load = optimizer_of(model), source(step)

    @torch.no_grad()
    def encode(clip: Tensor) -> Any:
        with autocast(torch.device(DEVICE), PRECISION):
            return tokenizer.encode(clip)

    def pipeline(mark: Mark) -> Tensor:
        mark("decoding")
        clip = load().to(DEVICE)
        mark("tokenizer")
        return run(model, optimizer, clip, encode(clip), PRECISION, mark)

    clip = load().to(DEVICE)
    bounds = [0, frames // 3 + 1, frames]
    stream = tokenizer.stream()
    with torch.no_grad(), autocast(torch.device(DEVICE), PRECISION):
        pieces = [stream.push(clip[:, :, a:b]) for a, b in itertools.pairwise(bounds)] + [stream.flush()]
    if not torch.equal(torch.cat([piece.codes for piece in pieces], 1), encode(clip).codes):
        raise AssertionError("a stream's tokens are not the whole clip's")
    pipeline(lambda part: None)
    idle = memory.now()
    memory.forget_peak()
    pipeline(lambda part: None)
    peak = memory.peak()
    memory.done()
    times = [timed(pipeline, DEVICE) for _ in range(3)]
    return {
        "seconds": [sum(parts.values()) for parts in times],
        "parts": {part: statistics.median(parts[part] for parts in times) for part in times[0]},
        "bytes": None if idle is None or peak is None else peak - idle,
        "checked": f"a stream's tokens are bitwise the whole clip's; the gradient at 4 frames is within {off:.1e}",
    }


def source(step: Step) -> Any:
    """What gives a clip: decoding a video, or noise."""
    if importlib.util.find_spec("av"):
        from vmae.demo import demo_clips
        from vmae.video import load_clip

        try:
            file = demo_clips()["bigbuckbunny"]
        except ValueError:
            pass
        else:
            return lambda: load_clip(file, frames=step.frames, size=step.size)
    clip, _ = inputs(step)
    return lambda: clip


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), sys.argv[2])))
