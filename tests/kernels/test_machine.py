"""The Triton kernels as compiled for a GPU, on the CPU: in processes where `ptx_machine` runs what Triton makes.

What the interpreter cannot see is seen here: code that does not compile for some sizes, layouts, copies and matrix
instructions, accesses one byte outside, races. Not seen: what the assembler makes of PTX, and speed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_registration import calls, evaluate

from vmae_kernels import (
    attention,
    attention_varlen,
    decoder_tokens,
    fsq,
    gather_tokens,
    scatter_tokens,
    topk,
    tubelets,
)  # fmt: skip

HERE = Path(__file__).parent
INSIDE = "VMAE_MACHINE" in os.environ
FILES = ("test_topk.py", "test_soft_topk.py", "test_gather_tokens.py", "test_scatter_tokens.py",
         "test_decoder_tokens.py", "test_tubelets.py", "test_fsq.py", "test_attention.py", "test_registration.py",
         "test_shapes.py")  # fmt: skip

outside = pytest.mark.skipif(INSIDE, reason="runs the machine")
inside = pytest.mark.skipif(not INSIDE, reason="runs where the machine stands for a GPU")


def run(architecture, files, timeout):
    pytest.importorskip("triton")
    environment = os.environ | {
        "VMAE_MACHINE": str(architecture), "VMAE_KERNELS": "triton", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "machine",
        "-m",
        "not large and not long and not machine",
        "-W",
        "ignore",
    ]
    done = subprocess.run([*command, *(HERE / name for name in files)], env=environment, text=True, cwd=HERE.parents[1],
                          timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "[100%]" in done.stdout


@outside
@pytest.mark.parametrize("architecture", [90, *(pytest.param(x, marks=pytest.mark.machine) for x in (80, 100, 120))])
def test_every_kernel(architecture):
    run(architecture, ["test_machine.py"], 900)


@outside
@pytest.mark.machine
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_tests_of_every_operation_pass_with_its_compiled_kernel(architecture, file):
    run(architecture, [file], 3600)


@inside
@pytest.mark.parametrize("name", [name for name in calls() if not name.startswith("causal_conv3d")])
def test_as_the_reference(name, monkeypatch):
    import machine

    results = {}
    for choice in ("torch", "triton"):
        monkeypatch.setenv("VMAE_KERNELS", choice)
        machine.launches.clear()
        results[choice] = evaluate(*calls()[name])
        assert bool(machine.launches) == (choice == "triton")
    for ours, theirs in zip(results["triton"], results["torch"], strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def heads(m, n, d, dtype, h=1):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, h, x, d, generator=generator).to(dtype).requires_grad_() for x in (m, n, n)]


def exact(q, k, v):
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def check_attention(run, plain, inputs, grad):
    """Errors at most twice those of the same sums in plain low precision, with gradients."""
    o = run(*inputs)
    ours = o, *torch.autograd.grad(o, inputs, grad)
    results = []
    for dtype in (torch.float64, inputs[0].dtype):
        copies = [x.detach().to(dtype).requires_grad_() for x in inputs]
        o = plain(*copies)
        results.append((o, *torch.autograd.grad(o, copies, grad.to(dtype))))
    for mine, truth, low in zip(ours, *results, strict=True):
        assert (mine - truth).norm() <= 2 * (low - truth).norm() + 1e-6 * truth.norm()


# Whole blocks and parts of one, in each kind of head.
@inside
@pytest.mark.parametrize(("m", "n", "d"), [(130, 70, 64), (40, 90, 128), (33, 65, 80), (20, 64, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matrix_instructions(dtype, m, n, d):
    import machine

    machine.launches.clear()
    inputs = heads(m, n, d, dtype)
    check_attention(attention, exact, inputs, torch.randn(1, 1, m, d).to(dtype))
    products = {90: r"\bwgmma\.mma_async", 100: r"\btcgen05\.mma"}.get(machine.ARCHITECTURE, r"\bmma\.sync")
    multiplied = [launch for launch in machine.launches if re.search(products, launch.ptx)]
    assert len(multiplied) == 3  # forward, keys, queries


@inside
def test_indexed_and_packed():
    inputs = heads(35, 80, 32, torch.bfloat16, h=2)
    rows = torch.randperm(80, generator=torch.Generator().manual_seed(1))[None, :37]
    grad = torch.randn(1, 2, 35, 32).bfloat16()
    check_attention(
        lambda q, k, v: attention(q, k, v, kv_indices=rows),
        lambda q, k, v: exact(q, k[:, :, rows[0]], v[:, :, rows[0]]), inputs, grad,
    )  # fmt: skip
    packed = [torch.randn(70, 2, 32).bfloat16().requires_grad_() for _ in range(3)]
    starts = torch.tensor([0, 33, 33, 70], dtype=torch.int32)

    def one_by_one(q, k, v):
        parts = [[x[a:b].transpose(0, 1)[None] for x in (q, k, v)] for a, b in ((0, 33), (33, 70))]
        return torch.cat([exact(*part)[0].transpose(0, 1) for part in parts])

    check_attention(
        lambda q, k, v: attention_varlen(q, k, v, starts, starts, 37, 37),
        one_by_one,
        packed,
        torch.randn_like(packed[0]),
    )


# What a kernel has to move: inputs that count, results, and indices of 8 bytes.
B, N, V, K, D = 2, 392, 40, 60, 384
ROW = 2 * D
NORM = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "dtype": torch.bfloat16}


def rows_of(n, k, seed=0):
    return torch.rand(B, n, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :k].sort(1).values


def gathered():
    x, few = torch.randn(B, N, D).bfloat16(), rows_of(N, V)
    return lambda: gather_tokens(x, few, unique=True)


def gathered_backward():
    x = torch.randn(B, N, D).bfloat16().requires_grad_()
    y = gather_tokens(x, rows_of(N, V), unique=True)
    grad = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, x, grad)


def scattered():
    y, few = torch.randn(B, V, D).bfloat16(), rows_of(N, V)
    return lambda: scatter_tokens(y, few, N)


def scattered_among():
    y, few, others = torch.randn(B, V, D).bfloat16(), rows_of(N, V), torch.randn(B, N, D).bfloat16()
    return lambda: scatter_tokens(y, few, N, fill=others)


def decoder():
    visible, token, positions = torch.randn(B, V, D).bfloat16(), torch.randn(D), torch.randn(N, D)
    few, some = rows_of(N, V), rows_of(N, K, 1)
    return lambda: decoder_tokens(visible, few, some, token, positions)


def cut():
    video = torch.randint(0, 256, (B, 8, 112, 112, 3), dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    few = rows_of(4 * 7 * 7, V)
    return lambda: tubelets(video, few, **NORM)


def quantized():
    z = torch.randn(B, N, 6)
    return lambda: fsq(z, [8] * 6)


# Bytes, how many times that may come through a multiprocessor's cache, and the least share in accesses of 16 bytes.
MOVES = {
    gathered: (B * V * (2 * ROW + 8), 1.01, 0.9),
    # With 4 bytes for each place, the number of its row, which is written before and read.
    gathered_backward: (B * ((V + N) * ROW + 8 * V + 4 * (V + N)), 1.01, 0.9),
    scattered: (B * ((V + N) * ROW + 8 * V + 4 * (V + N)), 1.01, 0.9),
    scattered_among: (B * (2 * N * ROW + 8 * V + 4 * (V + N)), 1.01, 0.9),
    decoder: (B * ((V + V + K) * ROW + (V + K) * (4 * D + 8)), 1.03, 0.9),
    # A tubelet's row of 48 bytes lies in two or three sectors of 32.
    cut: (B * V * (1536 * (1 + 2) + 8), 1.12, 0.9),
    quantized: (B * N * (6 * 4 * 2 + 4), 1.01, 0.0),  # six numbers of 4 bytes a row
}


@inside
@pytest.mark.parametrize("prepare", list(MOVES), ids=lambda prepare: prepare.__name__)
def test_every_byte_is_moved_once(prepare):
    import machine
    from ptx_machine import Traffic

    (needed, most, wide), call = MOVES[prepare], prepare()
    machine.MACHINE.traffic = traffic = Traffic()
    call()
    assert needed <= 32 * traffic.sectors <= most * needed
    assert traffic.widths[16] >= wide * (traffic.loaded + traffic.stored)


def far(x, dim=0):
    """x, whose third slice along a dimension lies 2^31 elements behind the first, though the step needs but 31 bits;
    what lies between is never touched."""
    apart = 2**30 + 16
    stride = [*x.stride()]
    stride[dim] = apart
    torch.utils.deterministic.fill_uninitialized_memory = False
    memory = torch.empty((x.shape[dim] - 1) * apart + x.numel(), dtype=x.dtype)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return memory.as_strided(x.shape, stride).copy_(x)


@inside
def test_beyond_2_31_elements():
    scores = torch.randn(3, 100).half()
    assert torch.equal(topk(far(scores), 7), topk(scores, 7))
    x, rows = torch.randint(0, 256, (1, 3, 32), dtype=torch.uint8), torch.tensor([[2, 0]])
    assert torch.equal(gather_tokens(far(x, 1), rows), x[:, [2, 0]])
    y, rows = torch.randn(3, 2, 32).half(), rows.expand(3, -1)
    assert torch.equal(scatter_tokens(far(y), rows, 3)[:, [2, 0]], y)
    others = torch.randn(3, 3, 32).half()
    assert torch.equal(scatter_tokens(y, rows, 3, fill=far(others))[:, 1], others[:, 1])
    positions, token = torch.randn(3, 32).half(), torch.zeros(32).half()
    placed = decoder_tokens(far(y), rows, 2 - rows, token, far(positions))
    assert torch.equal(placed, decoder_tokens(y, rows, 2 - rows, token, positions))
    video = torch.randint(0, 256, (3, 3, 4, 16, 16), dtype=torch.uint8)
    places, norm = torch.tensor([[1, 0]] * 3), {"mean": [0.0] * 3, "std": [1.0] * 3}
    for dim in (0, 1, 2):
        assert torch.equal(tubelets(far(video, dim), places, **norm), tubelets(video, places, **norm))
    q, k, v = (torch.randn(1, 3, n, 16).half() for n in (5, 20, 20))
    assert torch.equal(attention(q, far(k, 1), far(v, 1)), attention(q, k, v))
    q, k, v = (torch.randn(1, 1, 3, 16).half() for _ in range(3))
    assert torch.equal(attention(far(q, 2), far(k, 2), far(v, 2)), attention(q, k, v))
    starts = torch.tensor([0, 3], dtype=torch.int32)
    packed = [torch.randn(3, 2, 16).half() for _ in range(3)]
    distant = [far(x) for x in packed]
    assert torch.equal(
        attention_varlen(*distant, starts, starts, 3, 3), attention_varlen(*packed, starts, starts, 3, 3)
    )


@inside
def test_a_kernel_without_one_of_its_waits_is_noticed():
    """Each barrier, each wait for copies or products, and each fence, taken out of attention's kernels by itself."""
    import machine
    from ptx_program import Fault, waits

    machine.launches.clear()
    q, k, v = heads(70, 150, 64, torch.bfloat16)
    torch.autograd.grad(attention(q, k, v), (q, k, v), torch.randn(1, 1, 70, 64).bfloat16())
    noticed: dict[str, list] = {"wait": [], "fence": []}
    for launch in [launch for launch in machine.launches if "delta" not in launch.kernel]:
        for what, without in waits(launch.ptx):
            try:
                launch.run(without)
            except Fault:
                noticed[what].append(launch.kernel)
            else:
                noticed[what].append(None)
    # The others stand before the first stage and behind the loop, and guard nothing at these sizes; for 10.0 Triton
    # writes three barriers where one would do.
    missed = noticed["wait"].count(None) / len(noticed["wait"])
    assert len(noticed["wait"]) > 20
    assert missed < (0.4 if machine.ARCHITECTURE == 100 else 0.2)
    if machine.ARCHITECTURE in (90, 100):  # each kernel needs a fence; others follow it before anything is written
        assert len({*noticed["fence"]} - {None}) == 3
