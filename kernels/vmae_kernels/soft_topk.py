"""Differentiable top-k: the expected indicator under Gaussian noise."""

import functools
import math

import torch
from torch import Tensor

from . import reference
from ._checks import count
from ._library import ops, register
from ._triton import jit, power_of_2, tl
from ._tuning import Configuration, launch
from .topk import bracket, check_scores, load_keys, mask, normal

# --- the kernels -----------------------------------------------------------------------------------------------------


@jit
def _indicator_kernel(
    p_scores, p_weight, p_out, n, k, samples, sigma, seed, row0, stride_row, stride, stride_wrow, stride_w,
    SUMS: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """One sample's top-k indicator of one row: added to out [rows, N], whole numbers, whose order does not matter.

    With SUMS, the sum of weight * indicator is stored in out [rows, samples + 1]; without NOISE, in the last column.
    """
    row = tl.program_id(0) // (samples if NOISE else 1)
    sample = tl.program_id(0) % samples if NOISE else samples
    wide_row = row.to(tl.int64)
    p_scores += wide_row * stride_row
    o_block = tl.arange(0, BLOCK)
    b_keys = load_keys(p_scores, o_block, n, stride, sigma, seed, row0 + row, sample, NOISE)
    low, high, missing = bracket(b_keys, p_scores, n, k, stride, sigma, seed, row0 + row, sample, BLOCK, ONE, NOISE)
    equal_before = 0
    if SUMS:
        b_sum = tl.zeros((BLOCK,), p_out.dtype.element_ty)
    for start in range(0, n, BLOCK):
        o_index = start + o_block
        if not ONE:
            b_keys = load_keys(p_scores, o_index, n, stride, sigma, seed, row0 + row, sample, NOISE)
        m_equal = (b_keys >= low) & (b_keys < high)
        b_equal = equal_before + tl.cumsum(m_equal.to(tl.int32), 0)
        m_chosen = (b_keys >= high) | (m_equal & (b_equal <= missing))
        equal_before += tl.sum(m_equal.to(tl.int32), 0)
        if SUMS:
            p_from = p_weight + wide_row * stride_wrow + o_index.to(tl.int64) * stride_w
            b_weight = tl.load(p_from, mask=o_index < n, other=0.0).to(b_sum.dtype)
            b_sum += tl.where(m_chosen, b_weight, 0.0)
        else:
            tl.atomic_add(p_out + wide_row * n + o_index, 1, mask=m_chosen, sem="relaxed")
    if SUMS:
        tl.store(p_out + wide_row * (samples + 1) + sample, tl.sum(b_sum, 0))


@jit
def _gradient_kernel(p_factors, p_out, n, samples, seed, row0, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """out [rows, N] = the sum over samples of factors [rows, samples] * the sample's noise, in their order."""
    blocks = tl.cdiv(n, BLOCK)
    row = tl.program_id(0) // blocks
    o_index = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    p_factors += row.to(tl.int64) * samples
    b_out = tl.zeros((BLOCK,), WIDE)
    for sample in range(samples):
        b_out += tl.load(p_factors + sample) * normal(seed, row0 + row, o_index, sample).to(WIDE)
    p_to = p_out + row.to(tl.int64) * n + o_index
    tl.store(p_to, b_out.to(p_out.dtype.element_ty), mask=o_index < n)


def configuration(n: int) -> Configuration:
    """As for `topk`, with 8 numbers a thread, for the noise takes registers: of rows of more than 4,096 it is made anew
    in each round."""
    block = min(max(power_of_2(n), 128), 4096)
    return {"BLOCK": block, "ONE": n <= block, "num_warps": max(block // 256, 1)}


_LIMITS = {"num_warps": (1, 16)}
_GRADIENT, _GRADIENT_LIMITS = {"BLOCK": 1024, "num_warps": 4}, {"BLOCK": (256, 4096), "num_warps": (1, 8)}


def _launch(scores: Tensor, k: int, sigma: float, samples: int, seed: int, row: int) -> Tensor:
    rows = reference.rows_of(scores)
    n = rows.shape[1]
    counts = torch.empty(rows.shape, dtype=torch.int32, device=scores.device)
    if rows.numel():

        def run(options: Configuration) -> None:
            counts.zero_()
            _indicator_kernel[(len(rows) * samples,)](
                rows, rows, counts, n, k, samples, sigma, seed, row, *rows.stride(), 0, 0, SUMS=False, NOISE=True,
                enable_fp_fusion=False, **options,
            )  # fmt: skip

        launch("soft_topk", scores, (n, len(rows) * samples), configuration(n), _LIMITS, run)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return (counts.to(wide) / samples).to(scores.dtype).reshape(scores.shape)


def _launch_backward(grad: Tensor, scores: Tensor, k: int, sigma: float, samples: int, seed: int, row: int) -> Tensor:
    rows, weight = reference.rows_of(scores), reference.rows_of(grad)
    wide = torch.promote_types(scores.dtype, torch.float32)
    n = rows.shape[1]
    out = torch.empty(rows.shape, dtype=scores.dtype, device=scores.device)
    if rows.numel():
        sums = torch.empty(len(rows), samples + 1, dtype=wide, device=scores.device)

        def run_sums(options: Configuration) -> None:
            for noise in (True, False):
                _indicator_kernel[(len(rows) * (samples if noise else 1),)](
                    rows, weight, sums, n, k, samples, sigma, seed, row, *rows.stride(), *weight.stride(), SUMS=True,
                    NOISE=noise, enable_fp_fusion=False, **options,
                )  # fmt: skip

        def run(options: Configuration) -> None:
            _gradient_kernel[(len(rows) * -(-n // options["BLOCK"]),)](
                factors, out, n, samples, seed, row,
                WIDE=tl.float64 if wide == torch.float64 else tl.float32, enable_fp_fusion=False, **options,
            )  # fmt: skip

        launch("soft_topk sums", scores, (n, len(rows) * samples), configuration(n), _LIMITS, run_sums)
        factors = (sums[:, :-1] - sums[:, -1:]) / (samples * sigma)
        launch("soft_topk gradient", scores, (n, len(rows), samples), _GRADIENT, _GRADIENT_LIMITS, run)
    return out.reshape(scores.shape)


# --- the operation ---------------------------------------------------------------------------------------------------


def _fake(scores: Tensor, k: int, sigma: float, samples: int, seed: int, row: int) -> Tensor:
    return scores.new_empty(scores.shape)


def _fake_backward(grad: Tensor, scores: Tensor, k: int, sigma: float, samples: int, seed: int, row: int) -> Tensor:
    return scores.new_empty(scores.shape)


def _setup_context(ctx, inputs, output) -> None:
    scores, *ctx.settings = inputs
    ctx.save_for_backward(scores)


def _backward(ctx, grad: Tensor):
    (scores,) = ctx.saved_tensors
    return ops.soft_topk_backward(grad, scores, *ctx.settings), None, None, None, None, None


_SETTINGS = "Tensor scores, SymInt k, float sigma, SymInt samples, SymInt seed, SymInt row"
register(
    f"soft_topk({_SETTINGS}) -> Tensor",
    functools.partial(reference.soft_topk, mask=mask),
    kernel=_launch,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
register(
    f"soft_topk_backward(Tensor grad, {_SETTINGS}) -> Tensor",
    functools.partial(reference.soft_topk_backward, mask=mask),
    kernel=_launch_backward,
    fake=_fake_backward,
)


def soft_topk(scores: Tensor, k: int, *, sigma: float, samples: int, seed: int, row: int = 0) -> Tensor:
    """How often each score is among the k largest of its row when Gaussian noise is added: a soft top-k indicator.

    The gradient is the perturbed-optimizer estimator with a control variate (the unperturbed indicator's product is
    subtracted). Noise comes from Philox counters keyed by `seed` and is made again in the backward, so memory is O(N)
    whatever the number of samples, and the random bits are the same on every device.

    Args:
        scores: [..., N], float32, float16, bfloat16 or float64.
        k: 0 to N.
        sigma: standard deviation of the noise, in the scores' own units; above 0.
        samples: number of noise samples; at least 1.
        seed: any integer, taken modulo 2^64. Rows of one call have independent noise.
        row: the first row's place in the whole that these rows are a part of: parts have the whole's noise.

    Returns:
        [..., N] in the scores' dtype, each in [0, 1], rows summing to k.

    Raises:
        TypeError: scores are not floating point, or k, samples, seed or row is no integer.
        ValueError: k outside 0 to N, sigma not above 0, samples below 1, row below 0.

    Under autocast: never casts.

    Source: Berthet et al., "Learning with differentiable perturbed optimizers" (NeurIPS 2020), section 3; Cordonnier et
    al., "Differentiable patch selection for image recognition" (CVPR 2021), section 3.
    """
    check_scores(scores, k)
    count("samples", samples, 1)
    count("row", row, 0)
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed: expected an integer, got {type(seed).__name__}")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma: expected a finite number above 0, got {sigma}")
    # An operation's integers are 64 bits wide and signed.
    seed = (seed + 2**63) % 2**64 - 2**63
    return ops.soft_topk(scores, k, sigma, samples, seed, row)
