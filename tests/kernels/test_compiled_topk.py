"""The compiled selection and random bits, and PyTorch's in their place: each against what is not our code."""

import math

import pytest
import torch
from hypothesis import given, settings
from test_philox import naive
from test_soft_topk import estimator, value_and_gradient
from test_topk import SPECIAL, check, score_rows

from vmae_kernels import _csrc, soft_topk, topk
from vmae_kernels.philox import normals_of_blocks

both_ways = pytest.mark.usefixtures("way")
needs_extension = pytest.mark.skipif(_csrc.missing() is not None, reason="the extension was not built")


@pytest.fixture(params=["torch", pytest.param("csrc", marks=needs_extension)], scope="module")
def way(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMAE_KERNELS", request.param)
        yield request.param


@both_ways
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(score_rows())
def test_stable_sort(case):
    check(*case)


@both_ways
@pytest.mark.parametrize("n", [1, 15, 16, 17, 63, 64, 1000, 4099])
def test_ties_nan_and_infinities_of_long_rows(n):
    g = torch.Generator().manual_seed(n)
    scores = torch.randn(3, n, generator=g).mul(3).round()
    scores[1, torch.randint(n, (n // 3,), generator=g)] = math.nan
    scores[2] = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (n,), generator=g)]
    for k in sorted({0, 1, n // 20, n // 3, n // 2, n - 1, n}):
        check(scores, k)


@both_ways
def test_rows_of_nan_do_not_make_up_for_rows_of_ties():
    """The first has none that is at least the second largest, the other one twice as many."""
    check(torch.tensor([[math.nan, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0]]), 2)


@needs_extension
def test_nothing_is_written_beside_the_results():
    scores = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    for k in (0, 1, 30, 100):
        memory = [torch.full((5 * width + 2,), -7) for width in (k, 100 - k)]
        selected, rest = (x[1:-1].view(5, width) for x, width in zip(memory, (k, 100 - k), strict=True))
        _csrc.ops.topk(selected, rest, scores, k)
        order = scores.argsort(1, descending=True)
        assert torch.equal(selected, order[:, :k].sort(1).values)
        assert torch.equal(rest, order[:, k:].sort(1).values)
        assert all(x[0] == x[-1] == -7 for x in memory)
    bits = torch.full((4 * 2 * 3 * 1030 + 2,), -7.0)
    _csrc.ops.random_bits(bits[1:-1].view(4, 2, 3, 1030), 1, 0, 0, 0)
    assert bits[0] == bits[-1] == -7
    assert bits[1:-1].min() >= 0


@needs_extension
@pytest.mark.parametrize("seed", [0, 0x0123456789ABCDEF, -1, -(2**63)])
@pytest.mark.parametrize(("stream", "block", "row", "rows", "n"), [(0, 0, 0, 2, 2100), (3, 2**31, 2**32 - 2, 2, 5)])
def test_random_bits(seed, stream, block, row, rows, n):
    bits = torch.full((4, 2, rows, n), math.nan)
    _csrc.ops.random_bits(bits, seed, stream, block, row)
    key = (seed % 2**32, (seed >> 32) % 2**32)
    wanted = [
        [[[word >> 8 for word in naive((e, row + r, block + b, stream), key)] for e in range(n)] for r in range(rows)]
        for b in range(2)
    ]
    assert bits.long().permute(1, 2, 3, 0).tolist() == wanted


@both_ways
@pytest.mark.parametrize("blocks", [range(1), range(2, 5)])
def test_normals(blocks):
    rows, n, row, seed = 2, 37, 3, -12345
    got = normals_of_blocks(rows, n, seed=seed, blocks=blocks, device=torch.device("cpu"), row=row)
    assert got.shape == (4 * len(blocks), rows, n)
    key = (seed % 2**32, (seed >> 32) % 2**32)
    for place in ((s, r, e) for s in range(4 * len(blocks)) for r in range(rows) for e in range(n)):
        sample, r, element = place
        u = [word >> 8 for word in naive((element, row + r, blocks[sample // 4], 0), key)]
        first = sample % 4 // 2 * 2
        angle = 2 * math.pi * u[first + 1] / 2**24
        wanted = math.sqrt(-2 * math.log((u[first] + 1) / 2**24)) * (math.sin, math.cos)[sample % 2 == 0](angle)
        assert abs(got[place].item() - wanted) < 1e-5


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_soft_topk(dtype):
    g = torch.Generator().manual_seed(1)
    scores, grad = torch.randn(3, 41, generator=g).to(dtype), torch.randn(3, 41, generator=g).to(dtype)
    got = value_and_gradient(scores, grad, 9, sigma=0.5, samples=11, seed=-8)
    eps = torch.finfo(dtype).eps
    for ours, wanted in zip(got, estimator(scores, 9, 0.5, 11, -8, grad), strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=max(2 * eps, 1e-5), atol=1e-5)


@needs_extension
def test_both_give_the_same_bits_on_any_number_of_threads(monkeypatch):
    g = torch.Generator().manual_seed(2)
    scores, grad = torch.randn(3, 3000, generator=g), torch.randn(3, 3000, generator=g)
    threads, results = torch.get_num_threads(), []
    try:
        for choice, count in (("torch", 1), ("csrc", 1), ("csrc", 2), ("csrc", 5)):
            monkeypatch.setenv("VMAE_KERNELS", choice)
            torch.set_num_threads(count)
            results.append((*value_and_gradient(scores, grad, 700, sigma=0.5, samples=9, seed=4), topk(scores, 100)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_forced_where_it_is_not(way, monkeypatch):
    monkeypatch.setattr(_csrc, "facts", lambda: {"missing": "the compiled extension"})
    scores, noisy = torch.tensor([[1.0, 3.0, 2.0]]), {"sigma": 1e-6, "samples": 3, "seed": 0}
    if way == "torch":
        assert topk(scores, 1).tolist() == [[1]]
        return
    with pytest.raises(ValueError, match="VMAE_KERNELS=csrc: topk expected the compiled extension"):
        topk(scores, 1)
    with pytest.raises(ValueError, match="VMAE_KERNELS=csrc: soft_topk expected the compiled extension"):
        soft_topk(scores, 1, **noisy)
    assert topk(scores.double(), 1).tolist() == [[1]]  # of which it has none
    monkeypatch.setenv("VMAE_KERNELS", "auto")
    assert topk(scores, 1).tolist() == [[1]]
    assert soft_topk(scores, 1, **noisy).tolist() == [[0.0, 1.0, 0.0]]


@needs_extension
def test_an_extension_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(_csrc, "OPERATIONS", (*_csrc.OPERATIONS, "later"))
    assert _csrc._problem.__wrapped__() == "the compiled extension of this version, found an older one without later"
