"""Exact, deterministic top-k in index order, and the partition of a row by it."""

import torch
from torch import Tensor

from . import _csrc, reference
from ._checks import FLOATS, count, dtype_in
from ._library import compiled, ops, register
from ._triton import jit, power_of_2, tl
from ._tuning import Configuration, launch

# --- the kernel ----------------------------------------------------------------------------------------------------


@jit
def ordered_keys(x):
    """Unsigned integers in the order of floating-point x: NaN above infinity, -0.0 equal to 0.0. No arithmetic, which
    could flush what is subnormal."""
    if x.dtype == tl.float64:
        b, sign, infinity = x.to(tl.uint64, bitcast=True), 1 << 63, 0x7FF << 52
    elif x.dtype == tl.float32:
        b, sign, infinity = x.to(tl.uint32, bitcast=True), 1 << 31, 0xFF << 23
    else:
        b = x.to(tl.uint16, bitcast=True).to(tl.uint32)
        sign, infinity = 1 << 15, (0x1F << 10 if x.dtype == tl.float16 else 0xFF << 7)
    magnitude = b & (sign - 1)
    keys = tl.where((b & sign) == 0, magnitude + sign, sign - magnitude)
    return tl.where(magnitude > infinity, infinity + sign + 1, keys).to(b.dtype)


@jit
def normal(seed, row, i, sample):
    """Standard normals float32, as `philox.normals` makes them: of elements i of a row, for one sample."""
    block = tl.zeros_like(i) + sample // 4
    words = tl.philox(seed, i.to(tl.uint32), (tl.zeros_like(i) + row).to(tl.uint32), block.to(tl.uint32),
                      tl.zeros_like(i).to(tl.uint32))  # fmt: skip
    second = sample % 4 >= 2
    u = ((tl.where(second, words[2], words[0]) >> 8).to(tl.float32) + 1) * 5.960464477539063e-08  # 2^-24
    angle = (tl.where(second, words[3], words[1]) >> 8).to(tl.float32) * 3.7450702829238413e-07  # 2 pi 2^-24
    return tl.sqrt(-2 * tl.log(u)) * tl.where(sample % 2 == 0, tl.cos(angle), tl.sin(angle))


@jit
def load_keys(p_scores, i, n, stride, sigma, seed, row, sample, NOISE: tl.constexpr):
    """Keys of a row's scores i; with NOISE, of scores + sigma * the normals of a sample."""
    x = tl.load(p_scores + i.to(tl.int64) * stride, mask=i < n, other=0.0)
    if NOISE:
        if x.dtype != tl.float64:
            x = x.to(tl.float32)
        x += normal(seed, row, i, sample).to(x.dtype) * sigma
    return ordered_keys(x)


@jit
def bracket(b_keys, p_scores, n, k, stride, sigma, seed, row, sample,
            BLOCK: tl.constexpr, ONE: tl.constexpr, NOISE: tl.constexpr):  # fmt: skip
    """(low, high, missing) such that a row's k largest are the keys from `high` on and the first `missing` of those
    from `low` to below `high`.

    Each round counts the keys from some value on, which goes by interpolation and by halves in turn: 9 to 17 rounds on
    average for scores from smooth distributions, about 40 for ten different values, and at most twice as many as a key
    has bits. With ONE the row's keys are `b_keys` [BLOCK], else they are read in blocks, as by `load_keys`.
    """
    o_block = tl.arange(0, BLOCK)
    if ONE:
        low = tl.min(tl.where(o_block < n, b_keys, ~tl.zeros_like(b_keys)), 0)
        high = tl.max(tl.where(o_block < n, b_keys, tl.zeros_like(b_keys)), 0) + 1
    else:
        b_low = ~tl.zeros_like(b_keys)
        b_high = tl.zeros_like(b_keys)
        for start in range(0, n, BLOCK):
            b_keys = load_keys(p_scores, start + o_block, n, stride, sigma, seed, row, sample, NOISE)
            b_low = tl.where(start + o_block < n, tl.minimum(b_low, b_keys), b_low)
            b_high = tl.where(start + o_block < n, tl.maximum(b_high, b_keys), b_high)
        low, high = tl.min(b_low, 0), tl.max(b_high, 0) + 1
    from_low, from_high = n, 0  # so many keys lie from there on: k or more, and fewer than k
    halve = 0
    while (high - low > 1) & (from_low != k):
        span = high - low
        share = (from_low - k + 0.5) / (from_low - from_high)
        step = tl.where(halve != 0, span // 2, (span.to(tl.float32) * share).to(span.dtype))
        middle = low + tl.maximum(tl.minimum(step, span - 1), 1)
        if ONE:
            from_middle = tl.sum(((b_keys >= middle) & (o_block < n)).to(tl.int32), 0)
        else:
            b_counts = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, n, BLOCK):
                b_keys = load_keys(p_scores, start + o_block, n, stride, sigma, seed, row, sample, NOISE)
                b_counts += ((b_keys >= middle) & (start + o_block < n)).to(tl.int32)
            from_middle = tl.sum(b_counts, 0)
        enough = from_middle >= k
        low, from_low = tl.where(enough, middle, low), tl.where(enough, from_middle, from_low)
        high, from_high = tl.where(enough, high, middle), tl.where(enough, from_high, from_middle)
        halve = 1 - halve
    return low, high, k - from_high


@jit
def _partition_kernel(
    p_scores, p_selected, p_rest, n, k, stride_row, stride,
    BLOCK: tl.constexpr, ONE: tl.constexpr, TILE: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p_scores += row * stride_row
    p_selected += row * k
    p_rest += row * (n - k)
    b_keys = load_keys(p_scores, tl.arange(0, BLOCK), n, stride, 0.0, 0, 0, 0, False)
    low, high, missing = bracket(b_keys, p_scores, n, k, stride, 0.0, 0, 0, 0, BLOCK, ONE, False)
    above_before, equal_before = 0, 0
    for start in range(0, n, TILE):  # read again, for want of registers
        o_index = start + tl.arange(0, TILE)
        m_row = o_index < n
        b_tile = load_keys(p_scores, o_index, n, stride, 0.0, 0, 0, 0, False)
        m_above = (b_tile >= high) & m_row
        m_equal = (b_tile >= low) & (b_tile < high) & m_row
        b_both = (m_above.to(tl.int32) << 16) + m_equal.to(tl.int32)  # two counts in one scan
        b_ranks = tl.cumsum(b_both, 0)
        b_equal = equal_before + (b_ranks & 0xFFFF)
        b_chosen = above_before + (b_ranks >> 16) + tl.minimum(b_equal, missing)  # of those up to here
        m_chosen = m_above | (m_equal & (b_equal <= missing))
        tl.store(p_selected + b_chosen - 1, o_index.to(tl.int64), mask=m_chosen)
        if REST:
            tl.store(p_rest + o_index - b_chosen, o_index.to(tl.int64), mask=m_row & ~m_chosen)
        both = tl.sum(b_both, 0)
        above_before += both >> 16
        equal_before += both & 0xFFFF


_LARGEST = 16384  # keys that one program holds: 32 a thread
_LIMITS = {"TILE": (128, 8192), "num_warps": (1, 16)}


def configuration(n: int) -> Configuration:
    """Rows that fit are held in registers, 32 keys a thread; of longer ones each round reads blocks anew."""
    block = min(max(power_of_2(n), 128), _LARGEST)
    warps = min(max(block // 1024, 1), 16)
    return {"BLOCK": block, "ONE": n <= block, "TILE": min(block, 256 * warps), "num_warps": warps}


def _launch(scores: Tensor, k: int, *, rest: bool) -> tuple[Tensor, Tensor]:
    n = scores.shape[-1]
    rows = reference.rows_of(scores)
    selected = _fake_topk(scores, k)
    others = _fake_topk(scores, n - k) if rest else selected  # nothing is written there
    if rows.numel():

        def run(options: Configuration) -> None:
            _partition_kernel[(len(rows),)](rows, selected, others, n, k, *rows.stride(), REST=rest, **options)

        launch("topk", scores, (n, len(rows)), configuration(n), _LIMITS, run)
    return selected, others


def _launch_topk(scores: Tensor, k: int) -> Tensor:
    return _launch(scores, k, rest=False)[0]


def _launch_partition(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _launch(scores, k, rest=True)


# --- the compiled one ------------------------------------------------------------------------------------------------


def _compiled(scores: Tensor) -> bool:
    return (
        scores.is_cpu and scores.dtype == torch.float32 and scores.shape[-1] < 2**31 and compiled("topk", _csrc.missing)
    )


def _topk(scores: Tensor, k: int) -> Tensor:
    if not _compiled(scores):
        return reference.topk(scores, k)
    selected = _fake_topk(scores, k)
    _csrc.ops.topk(selected, None, reference.rows_of(scores).contiguous(), k)
    return selected


def _partition(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if not _compiled(scores):
        return reference.topk_partition(scores, k)
    selected, rest = _fake_partition(scores, k)
    _csrc.ops.topk(selected, rest, reference.rows_of(scores).contiguous(), k)
    return selected, rest


def mask(scores: Tensor, k: int) -> Tensor:
    """Boolean mask of the k largest along the last dimension, not for CUDA's kernels."""
    if not _compiled(scores):
        return reference.topk_mask(scores, k)
    chosen = torch.empty(scores.shape, dtype=torch.bool)
    _csrc.ops.topk_mask(chosen, reference.rows_of(scores).contiguous(), k)
    return chosen


# --- the operation -------------------------------------------------------------------------------------------------


def _fake_topk(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], k), dtype=torch.int64)


def _fake_partition(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _fake_topk(scores, k), _fake_topk(scores, scores.shape[-1] - k)


register("topk(Tensor scores, SymInt k) -> Tensor", _topk, kernel=_launch_topk, fake=_fake_topk)
register(
    "topk_partition(Tensor scores, SymInt k) -> (Tensor, Tensor)",
    _partition,
    kernel=_launch_partition,
    fake=_fake_partition,
)


def check_scores(scores: Tensor, k: int) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores: expected a tensor [..., N], got {type(scores).__name__}")
    if scores.ndim == 0:
        raise ValueError("scores: expected shape [..., N], got a scalar")
    dtype_in("scores", scores, FLOATS)
    count("k", k, 0, scores.shape[-1], "N, the length of a row of scores")


def topk(scores: Tensor, k: int) -> Tensor:
    """The indices of the k largest scores of each row, in ascending index order.

    Unlike `torch.topk` the result is exact and the same on every run and device: ties go to the lowest index, NaN
    ranks highest, -0.0 equals 0.0.

    Args:
        scores: [..., N], float32, float16, bfloat16 or float64; any strides.
        k: 0 to N.

    Returns:
        int64 [..., k], ascending along the last dimension. Not differentiable; see `soft_topk`.

    Raises:
        TypeError: scores are not floating point, or k is no integer.
        ValueError: k lies outside 0 to N.

    Under autocast: never casts.
    """
    check_scores(scores, k)
    return ops.topk(scores, k)


def topk_partition(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Split each row's indices into its k largest scores and the rest, both ascending, in one pass.

    Args and errors as `topk`.

    Returns:
        (selected int64 [..., k], rest int64 [..., N - k]).
    """
    check_scores(scores, k)
    return ops.topk_partition(scores, k)
