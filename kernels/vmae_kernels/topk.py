"""Exact, deterministic top-k in index order, and the partition of a row by it."""

import torch
from torch import Tensor

from . import _csrc, reference
from ._checks import FLOATS, count, dtype_in
from ._library import compiled, ops, register
from ._triton import jit, power_of_2, tl
from ._tuning import Configuration, Limits, launch

# --- the kernel ----------------------------------------------------------------------------------------------------


@jit
def ordered_keys(x):
    """Unsigned integers in the order of floating-point x, from 1 for -infinity: NaN above infinity, -0.0 equal to 0.0.
    No arithmetic on x, which could flush what is subnormal."""
    if x.dtype == tl.float64:
        b, sign, infinity = x.to(tl.uint64, bitcast=True), 1 << 63, 0x7FF << 52
    elif x.dtype == tl.float32:
        b, sign, infinity = x.to(tl.uint32, bitcast=True), 1 << 31, 0xFF << 23
    else:
        b = x.to(tl.uint16, bitcast=True).to(tl.uint32)
        sign, infinity = 1 << 15, (0x1F << 10 if x.dtype == tl.float16 else 0xFF << 7)
    # Of a negative NaN the difference wraps around, above all others.
    keys = tl.where(b < sign, b + (infinity + 1), (sign + infinity + 1) - b).to(b.dtype)
    return tl.minimum(keys, tl.full((), 2 * infinity + 2, b.dtype))


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
    """Keys of a row's scores i; with NOISE, of scores + sigma * the normals of a sample. Beyond n 0, below all keys."""
    x = tl.load(p_scores + i.to(tl.int64) * stride, mask=i < n, other=0.0)
    if NOISE:
        if x.dtype != tl.float64:
            x = x.to(tl.float32)
        x += normal(seed, row, i, sample).to(x.dtype) * sigma
    b_keys = ordered_keys(x)
    return tl.where(i < n, b_keys, tl.zeros_like(b_keys))


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
        low = tl.min(b_keys - 1, 0) + 1  # where there is no key that is the largest number
        high = tl.max(b_keys, 0) + 1
    else:
        b_low = ~tl.zeros_like(b_keys)
        b_high = tl.zeros_like(b_keys)
        for start in range(0, n, BLOCK):
            b_keys = load_keys(p_scores, start + o_block, n, stride, sigma, seed, row, sample, NOISE)
            b_low, b_high = tl.minimum(b_low, b_keys - 1), tl.maximum(b_high, b_keys)
        low, high = tl.min(b_low, 0) + 1, tl.max(b_high, 0) + 1
    from_low, from_high = n, 0  # so many keys lie from there on: k or more, and fewer than k
    halve = 0
    while (high - low > 1) & (from_low != k):
        span = high - low
        share = (from_low - k + 0.5) / (from_low - from_high)
        step = tl.where(halve != 0, span // 2, (span.to(tl.float32) * share).to(span.dtype))
        middle = low + tl.maximum(tl.minimum(step, span - 1), 1)
        if ONE:
            from_middle = tl.sum((b_keys >= middle).to(tl.int32), 0)
        else:
            b_counts = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, n, BLOCK):
                b_keys = load_keys(p_scores, start + o_block, n, stride, sigma, seed, row, sample, NOISE)
                b_counts += (b_keys >= middle).to(tl.int32)
            from_middle = tl.sum(b_counts, 0)
        enough = from_middle >= k
        low, from_low = tl.where(enough, middle, low), tl.where(enough, from_middle, from_low)
        high, from_high = tl.where(enough, high, middle), tl.where(enough, from_high, from_middle)
        halve = 1 - halve
    return low, high, k - from_high


@jit
def _counts(b_keys, low, high):
    """Two numbers in one, for one scan: 2^16 where a key is `high` or more, 1 where it is `low` or more but below."""
    return tl.where(b_keys >= high, 1 << 16, (b_keys >= low).to(tl.int32))


@jit
def _partition_kernel(
    p_scores, p_selected, p_rest, n, k, stride_row, stride,
    BLOCK: tl.constexpr, ONE: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Each of a row's PARTS programs finds the row's bracket, and writes what lies in its part."""
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    p_scores += row * stride_row
    p_selected += row * k
    p_rest += row * (n - k)
    o_block = tl.arange(0, BLOCK)
    b_keys = load_keys(p_scores, o_block, n, stride, 0.0, 0, 0, 0, False)
    low, high, missing = bracket(b_keys, p_scores, n, k, stride, 0.0, 0, 0, 0, BLOCK, ONE, False)
    above_before, equal_before = 0, 0
    first, last = 0, n
    if PARTS > 1:
        span = tl.cdiv(tl.cdiv(n, PARTS), TILE) * TILE
        first = (tl.program_id(0) % PARTS) * span
        last = tl.minimum(first + span, n)
        before = tl.sum(tl.where(o_block < first, _counts(b_keys, low, high), 0), 0)
        above_before, equal_before = before >> 16, before & 0xFFFF
    for start in range(first, last, TILE):  # read again, for want of registers
        o_index = start + tl.arange(0, TILE)
        b_tile = load_keys(p_scores, o_index, n, stride, 0.0, 0, 0, 0, False)
        b_both = _counts(b_tile, low, high)
        b_ranks = tl.cumsum(b_both, 0)
        b_equal = equal_before + (b_ranks & 0xFFFF)
        b_chosen = above_before + (b_ranks >> 16) + tl.minimum(b_equal, missing)  # of those up to here
        m_chosen = (b_tile >= high) | ((b_tile >= low) & (b_equal <= missing))
        tl.store(p_selected + b_chosen - 1, o_index.to(tl.int64), mask=m_chosen)
        if REST:
            tl.store(p_rest + o_index - b_chosen, o_index.to(tl.int64), mask=(o_index < n) & ~m_chosen)
        both = tl.sum(b_both, 0)
        above_before += both >> 16
        equal_before += both & 0xFFFF


_LARGEST = 16384  # keys that one program holds: 32 a thread
_LIMITS: Limits = {"TILE": (128, 8192), "PARTS": (1, 8), "num_warps": (1, 16)}
_PROGRAMS = 128  # about a large GPU's multiprocessors


def configuration(n: int, rows: int) -> Configuration:
    """Rows that fit are held in registers, 32 keys a thread; of longer ones each round reads blocks anew.

    A row that takes several tiles is written by as many programs, up to 8, where there are few rows: writing takes more
    instructions than finding what to write.
    """
    block = min(max(power_of_2(n), 128), _LARGEST)
    warps = min(max(block // 1024, 1), 16)
    tile = min(block, 128 * warps)
    parts = min(block // tile, 8) if n <= block else 1
    while parts > 1 and rows * parts > _PROGRAMS:
        parts //= 2
    return {"BLOCK": block, "ONE": n <= block, "TILE": tile, "PARTS": parts, "num_warps": warps}


def limits(rule: Configuration) -> Limits:
    """Parts count what lies before them among the keys that they hold: of a row that does not fit, that is not all."""
    return _LIMITS if rule["ONE"] else _LIMITS | {"PARTS": (1, 1)}


def _launch(scores: Tensor, k: int, *, rest: bool) -> tuple[Tensor, Tensor]:
    n = scores.shape[-1]
    rows = reference.rows_of(scores)
    selected = _fake_topk(scores, k)
    others = _fake_topk(scores, n - k) if rest else selected  # nothing is written there
    if rows.numel():

        def run(options: Configuration) -> None:
            grid = (len(rows) * options["PARTS"],)
            _partition_kernel[grid](rows, selected, others, n, k, *rows.stride(), REST=rest, **options)

        rule = configuration(n, len(rows))
        launch("topk", scores, (n, len(rows)), rule, limits(rule), run)
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
