"""The Triton kernels on the CPU: the tests of this folder once more, in processes where Triton interprets them.

The interpreter sees neither races nor small reads out of bounds, and says nothing of speed; test_resources.py compiles.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_registration import calls, evaluate

from vmae import AdaptiveTokenizer, TokenizerConfig, VideoMAE, VideoMAEConfig
from vmae.prediction import predicted
from vmae.tokens import Tokens
from vmae_kernels import _triton, _tuning, attention, decoder_tokens, gather_tokens, reference, scatter_tokens, tubelets

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Two processes, of about the same length.
PARTS = (
    ["test_attention.py", "test_soft_topk.py", "test_interpreter.py", "test_shapes.py"],
    ["test_topk.py", "test_gather_tokens.py", "test_scatter_tokens.py", "test_decoder_tokens.py", "test_tubelets.py",
     "test_fsq.py", "test_registration.py"],
)  # fmt: skip

outside = pytest.mark.skipif(INTERPRETED, reason="runs the interpreter")
inside = pytest.mark.skipif(not INTERPRETED, reason="runs where Triton interprets kernels")


@outside
def test_the_tests_of_every_operation_pass_with_its_kernel():
    pytest.importorskip("triton")
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "VMAE_KERNELS": "triton", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "interpreting", "-m", "not large and not long",
               "-W", "ignore::RuntimeWarning"]  # fmt: skip
    processes = [
        subprocess.Popen([*command, *(HERE / name for name in part)], env=environment, text=True, cwd=HERE.parents[1],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for part in PARTS
    ]  # fmt: skip
    for process in processes:
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said[-4000:]


@inside
@pytest.mark.parametrize("name", [name for name in calls() if not name.startswith("causal_conv3d")])
def test_a_kernel_runs(name, monkeypatch):
    """With VMAE_KERNELS=triton, that is, and forward and backward; with torch none does."""
    from triton.runtime.interpreter import GridExecutor

    launched = []
    original = GridExecutor.__call__
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *a, **k: (launched.append(self.fn), original(self, *a, **k))
    )
    results = {}
    for choice in ("torch", "triton"):
        monkeypatch.setenv("VMAE_KERNELS", choice)
        results[choice] = evaluate(*calls()[name])
        assert bool(launched) == (choice == "triton")
    for ours, theirs in zip(results["triton"], results["torch"], strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@inside
@pytest.mark.parametrize("name", [name for name in calls() if not name.startswith("causal_conv3d")])
def test_other_configurations_give_the_same(name, monkeypatch, tmp_path):
    """Those that a search looks at first: the rule's, with one number doubled or halved."""
    monkeypatch.setenv("VMAE_KERNELS", "torch")
    wanted = evaluate(*calls()[name])
    monkeypatch.setenv("VMAE_KERNELS", "triton")
    monkeypatch.setenv("VMAE_AUTOTUNE", "1")
    tried = []
    for i in range(8):  # two for each of up to four numbers

        def other(rule, limits, seconds, i=i):
            candidates = list(_tuning.neighbours(rule, limits))
            tried.append(candidates[i % len(candidates)])
            return tried[-1]

        monkeypatch.setattr(_tuning, "search", other)
        monkeypatch.setattr(_tuning, "_found", {})
        monkeypatch.setenv("VMAE_AUTOTUNE_DIR", str(tmp_path / f"{i}"))
        for ours, theirs in zip(evaluate(*calls()[name]), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(tried) >= 8


@inside
@pytest.mark.parametrize("strategy", ["adaptive", "everest"])
def test_the_model_learns_the_same(strategy, monkeypatch):
    torch.manual_seed(0)
    model = VideoMAE(
        VideoMAEConfig.tiny(frames=8, size=32, mask_ratio=0.5, depth=1, decoder_depth=1, strategy=strategy)
    )
    clip = torch.randint(0, 256, (2, 3, 8, 32, 32), dtype=torch.uint8)
    tokens = Tokens(torch.randn(2, 16, 6), torch.zeros(2, 16, dtype=torch.int32), torch.rand(2, 16), (4, 2, 2))
    _learns_the_same(model, lambda: model(clip, tokens, seed=3), monkeypatch)


@inside
@pytest.mark.parametrize("selection", ["perturbed", "straight_through"])
def test_the_tokenizer_learns_the_same(selection, monkeypatch):
    torch.manual_seed(0)
    model = AdaptiveTokenizer(dataclasses.replace(TokenizerConfig.tiny(), selection=selection)).train()
    clip = torch.randint(0, 256, (2, 3, 6, 32, 32), dtype=torch.uint8)
    _learns_the_same(model, lambda: model(clip, seed=3).loss, monkeypatch)


@inside
@pytest.mark.parametrize("target", ["latent", "pixels"])
def test_predictions_look_the_same(target, monkeypatch):
    torch.manual_seed(0)
    config = VideoMAEConfig.tiny(frames=4, size=32, mask_ratio=0.5, budget=0.5, depth=1, decoder_depth=1, target=target)
    model, tokenizer = VideoMAE(config).eval(), AdaptiveTokenizer(TokenizerConfig.tiny()).eval()
    clip = torch.randint(0, 256, (1, 3, 4, 32, 32), dtype=torch.uint8)
    videos = []
    for choice in ("torch", "triton"):
        monkeypatch.setenv("VMAE_KERNELS", choice)
        with torch.no_grad():
            videos.append(predicted(clip, model, tokenizer).video.int())
    assert (videos[0] - videos[1]).abs().max() <= 1


def _learns_the_same(model, loss_of, monkeypatch):
    results = []
    for choice in ("torch", "triton"):
        monkeypatch.setenv("VMAE_KERNELS", choice)
        loss = loss_of()
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@inside
def test_an_index_that_lies_outside_touches_nothing_foreign(monkeypatch):
    """As on a GPU, where nothing is read back to be checked."""
    for check in ("check_range", "check_distinct"):
        monkeypatch.setattr(reference, check, lambda *args, **options: None)
    around = torch.full((3, 6, 5), torch.nan)
    around[1] = torch.arange(30.0).view(6, 5)
    x, indices = around[1:2], torch.tensor([[2, -7, 6, 10**6]])
    y = gather_tokens(x, indices)
    assert torch.equal(y, x[:, [2, 0, 5, 5]])
    assert torch.equal(scatter_tokens(y, indices, 6, fill=-1.0)[0, 2], x[0, 2])
    assert (scatter_tokens(y, indices, 6, fill=-1.0)[0, [0, 1, 3, 4, 5]] == -1).all()
    assert decoder_tokens(y, indices, indices, torch.zeros(5), x[0]).isfinite().all()
    video = torch.full((3, 1, 4, 4, 4), torch.nan)
    video[1] = 1
    assert (tubelets(video[1:2], indices, size=(2, 2, 2), mean=[0.0], std=[1.0]) == 1).all()
    q, k = torch.ones(1, 1, 3, 16), torch.full((3, 1, 6, 16), torch.nan)
    k[1] = 1
    assert (attention(q, k[1:2], k[1:2], kv_indices=indices) == 1).all()


@outside
def test_importing_asks_no_driver():
    """Nor does a CPU's use: a machine without a GPU imports and runs all operations."""
    pytest.importorskip("triton")
    code = """
import sys, torch, vmae_kernels
vmae_kernels.topk(torch.randn(2, 9), 3)
from triton.runtime.driver import driver
print(driver._active is None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "True\n"


@inside
def test_interpretation_is_what_is_tested():
    assert _triton.INTERPRETED
    assert _triton.why_not(torch.zeros(1)) is None
