"""The same step by others: Hugging Face's VideoMAE, VideoMAEv2's dual masking, and plain PyTorch.

    python -m pytest benchmarks/bench_peers.py --benchmark-json=peers.json [--minutes 10]

All see the same clip, take the same optimizer, and are measured as bench_frames.py says; FLOP are counted for each, so
that none wins by doing less unnoticed. Hugging Face's needs the `peers` extra.
"""

import importlib.util

import pytest
from measuring import DEVICE, PRECISION

from vmae.bench import Case
from vmae.step import Step

LONG = [256, 512, 1024] if DEVICE == "cuda" else []
LATER = [pytest.param(frames, marks=pytest.mark.later) for frames in LONG]
PRECISIONS = sorted({"fp32", PRECISION}, reverse=True)  # its default first


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("frames", [128, 64, 32, 16, *LATER])
def test_huggingface(report_step, benchmark, frames, precision):
    if not importlib.util.find_spec("transformers"):
        pytest.skip("needs transformers, the `peers` extra")
    benchmark.group = f"Hugging Face's VideoMAE, {precision}"
    report_step(Case(Step("base", frames, budget=1.0, precision=precision), "huggingface", DEVICE))


@pytest.mark.parametrize("frames", [128, 64, 32, 16, *LATER])
def test_dual_masking(report_step, benchmark, frames):
    benchmark.group = "dual masking (50 %) with SDPA"
    report_step(Case(Step("base", frames, budget=0.5, precision=PRECISION), "dual-masking", DEVICE))


@pytest.mark.parametrize("way", ["plain", pytest.param("references", marks=pytest.mark.later)])
@pytest.mark.parametrize("frames", [128, *LATER])
def test_same_step(report_step, benchmark, frames, way):
    benchmark.group = {"plain": "vmae's step in plain PyTorch", "references": "vmae with VMAE_KERNELS=torch"}[way]
    report_step(Case(Step("base", frames, precision=PRECISION), way, DEVICE))
