"""topk and topk_partition against a stable sort of Python floats, bit for bit."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vmae_kernels import topk, topk_partition
from vmae_kernels._tuning import neighbours
from vmae_kernels.topk import configuration, limits

SAME_WIDTH = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
DTYPES = list(SAME_WIDTH)
SPECIAL = [
    math.nan,
    math.inf,
    -math.inf,
    0.0,
    -0.0,
    1.0,
    -1.0,
    1.0000001,
    1e-40,
    -1e-40,
    6e-8,
    -6e-8,
    5e-324,
    6e4,
    -6e4,
]


def oracle(row: list[float], k: int) -> tuple[list[int], list[int]]:
    """Python's sort is stable and holds -0.0 == 0.0, so ties keep the lowest index first."""
    order = sorted(range(len(row)), key=lambda i: (0, 0.0) if math.isnan(row[i]) else (1, -row[i]))
    return sorted(order[:k]), sorted(order[k:])


def check(scores: torch.Tensor, k: int) -> None:
    before = scores.clone()
    n = scores.shape[-1]
    chosen = topk(scores, k)
    selected, rest = topk_partition(scores, k)
    rows = scores.double().reshape(math.prod(scores.shape[:-1]), n).tolist()
    wanted = [oracle(row, k) for row in rows]
    for got, which, width in ((chosen, 0, k), (selected, 0, k), (rest, 1, n - k)):
        assert got.dtype == torch.int64
        assert got.shape == (*scores.shape[:-1], width)
        assert got.reshape(len(rows), width).tolist() == [pair[which] for pair in wanted]
    width = SAME_WIDTH[scores.dtype]
    assert torch.equal(scores.contiguous().view(width), before.contiguous().view(width))


@st.composite
def score_rows(draw):
    dtype = draw(st.sampled_from(DTYPES))
    bits = torch.iinfo(SAME_WIDTH[dtype]).bits
    # Raw bit patterns reach NaNs of both signs and any payload, and subnormals.
    anything = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).map(
        lambda b: torch.tensor(b, dtype=SAME_WIDTH[dtype]).view(dtype)
    )
    special = st.sampled_from(SPECIAL).map(lambda value: torch.tensor(value, dtype=torch.float64).to(dtype))
    # A small pool makes heavy ties.
    pool = draw(st.lists(anything | special, min_size=1, max_size=6))
    n, rows = draw(st.integers(0, 24)), draw(st.integers(1, 3))
    places = draw(st.lists(st.integers(0, len(pool) - 1), min_size=rows * n, max_size=rows * n))
    table = torch.stack(pool)
    return table[torch.tensor(places, dtype=torch.int64)].reshape(rows, n), draw(st.integers(0, n))


# A tenth of a second each where Triton interprets.
EXAMPLES = 60 if os.environ.get("TRITON_INTERPRET", "0") == "1" or "VMAE_MACHINE" in os.environ else 250


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(score_rows())
def test_stable_sort(case):
    check(*case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_k_of_special_values(dtype):
    row = torch.tensor(SPECIAL * 2, dtype=torch.float64).to(dtype)
    for k in range(len(row) + 1):
        check(row, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_many_nan_as_ties(dtype):
    """So that counting what is at least the k-th score would give k, of which some are wrong."""
    for few in (1, 2, 3):
        row = torch.tensor([2.0] * few + [5.0] + [math.nan] * few + [2.0, 1.0] + [2.0] * few, dtype=dtype)
        for k in range(len(row) + 1):
            check(row, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_nan_ranks_highest_too(dtype):
    width = SAME_WIDTH[dtype]
    negative = torch.tensor(-1, dtype=width).view(dtype)
    positive = torch.tensor(math.nan, dtype=dtype)
    infinite = torch.tensor(math.inf, dtype=dtype)
    check(torch.stack((infinite, negative, infinite, positive, negative)), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1568, 4099])
def test_long_rows_with_ties(dtype, n):
    g = torch.Generator().manual_seed(n)
    scores = (torch.randn(2, n, generator=g) * 8).round().to(dtype)
    for k in (1, n // 10, n - 1):
        check(scores, k)


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 3, 7), (2, 0, 3, 7), (2, 1, 2, 7), (3, 0), (0,), (1,), (4, 1)])
def test_shapes(shape):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(2).round()
    for k in sorted({0, shape[-1] // 2, shape[-1]}):
        check(scores, k)


def test_non_contiguous_rows():
    base = torch.randn(9, 6, 4, generator=torch.Generator().manual_seed(1)).round()
    for scores in (base.permute(2, 1, 0), base[::2, :, 1:3].transpose(1, 2), base[:, 0, :1].T.expand(3, 9)):
        assert not scores.is_contiguous()
        check(scores, 4)
    check(torch.zeros(1).expand(11), 5)


def test_no_gradient_and_repeatable():
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(2), requires_grad=True)
    first, again = topk_partition(scores, 20), topk_partition(scores, 20)
    assert not first[0].requires_grad
    assert not first[1].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("function", [topk, topk_partition])
def test_errors(function):
    with pytest.raises(ValueError, match=r"0 to 5.*got 6"):
        function(torch.zeros(2, 5), 6)
    with pytest.raises(ValueError, match=r"0 to 5.*got -1"):
        function(torch.zeros(2, 5), -1)
    with pytest.raises(ValueError, match=r"\[\.\.\., N\].*scalar"):
        function(torch.tensor(1.0), 1)
    for dtype in (torch.int64, torch.int32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=rf"float32.*got {str(dtype).removeprefix('torch.')}"):
            function(torch.zeros(2, 5, dtype=dtype), 1)
    with pytest.raises(TypeError, match=r"integer.*got float"):
        function(torch.zeros(2, 5), 1.0)
    with pytest.raises(TypeError, match=r"integer.*got bool"):
        function(torch.zeros(2, 5), True)
    with pytest.raises(TypeError, match=r"tensor.*got list"):
        function([1.0, 2.0], 1)


@pytest.mark.parametrize("n", [1, 128, 129, 1568, 12544, 16384, 16385, 10**6])
@pytest.mark.parametrize("rows", [1, 8, 17, 1000])
def test_only_rows_that_fit_are_shared_by_programs(n, rows):
    """The others' keys are not all there to be counted, whatever a search tries."""
    rule = configuration(n, rows)
    assert rule["PARTS"] == 1 or rows * rule["PARTS"] <= 128
    tried = [rule, *neighbours(rule, limits(rule))]
    assert any(other["PARTS"] > 1 for other in tried) == (n <= 16384)
