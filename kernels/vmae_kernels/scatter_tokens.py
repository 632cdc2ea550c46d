"""Rows placed into a longer token tensor, the rest filled: the inverse of a gather."""

import torch
from torch import Tensor

from . import reference
from ._checks import INTEGERS, count, dtype_in, same_device, sizes
from ._library import ops, register
from ._triton import jit, tl
from ._tuning import Configuration, launch
from .gather_tokens import inverted, place

# --- the kernel of fill's gradient; rows are placed by gather_tokens.py's --------------------------------------------


@jit
def _fill_backward_kernel(
    p_grad, p_inverse, p_sums, rows, n, d, stride_gb, stride_gn, stride_gd,
    WIDE: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums[i] = the sum of those of the rows from i * SPAN on, SPAN of them, that no index names."""
    parts = tl.cdiv(d, COLUMNS)
    first = (tl.program_id(0) // parts).to(tl.int64) * SPAN
    o_column = (tl.program_id(0) % parts) * COLUMNS + tl.arange(0, COLUMNS)
    b_sum = tl.zeros((ROWS, COLUMNS), WIDE)
    for start in range(0, SPAN, ROWS):
        o_row = first + start + tl.arange(0, ROWS)
        m_row = tl.load(p_inverse + o_row, mask=o_row < rows, other=0) < 0
        p_from = p_grad + (o_row // n * stride_gb + o_row % n * stride_gn)[:, None]
        mask = m_row[:, None] & (o_column < d)[None, :]
        b_sum += tl.load(p_from + (o_column.to(tl.int64) * stride_gd)[None, :], mask=mask, other=0.0).to(WIDE)
    p_to = p_sums + (tl.program_id(0) // parts).to(tl.int64) * d + o_column
    tl.store(p_to, tl.sum(b_sum, 0), mask=o_column < d)


SPAN = 512
FILL_BACKWARD = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4}
_LIMITS = {"ROWS": (1, 64), "COLUMNS": (32, 512), "num_warps": (1, 8)}


def _launch_fill_backward(grad: Tensor, indices: Tensor) -> Tensor:
    b, n, d = grad.shape
    wide = torch.promote_types(grad.dtype, torch.float32)
    sums = torch.empty(-(-b * n // SPAN), d, dtype=wide, device=grad.device)
    inverse = inverted(indices, n)
    if sums.numel():

        def run(options: Configuration) -> None:
            _fill_backward_kernel[(len(sums) * -(-d // options["COLUMNS"]),)](
                grad, inverse, sums, b * n, n, d, *grad.stride(),
                WIDE=tl.float64 if wide == torch.float64 else tl.float32, SPAN=SPAN, **options,
            )  # fmt: skip

        launch("scatter_tokens fill", grad, (f"D{d}", b * n), FILL_BACKWARD, _LIMITS, run)
    return sums.sum(0)


# --- the operation ---------------------------------------------------------------------------------------------------


def _launch(y: Tensor, indices: Tensor, n: int, fill: Tensor | None, value: float) -> Tensor:
    reference.check_range(indices, n)
    reference.check_distinct(indices, n)
    if fill is None and value:
        fill = y.new_full((y.shape[2],), value)
    return place(y, indices, n, None if fill is None else fill.to(y.dtype))


def _fake(y: Tensor, indices: Tensor, n: int, fill: Tensor | None, value: float) -> Tensor:
    return y.new_empty((y.shape[0], n, y.shape[2]))


def _setup_context(ctx, inputs, output) -> None:
    _, indices, ctx.n, fill, _ = inputs
    ctx.fill_dtype, ctx.shared = (None, False) if fill is None else (fill.dtype, fill.ndim == 1)
    ctx.save_for_backward(indices)


def _backward(ctx, grad: Tensor):
    (indices,) = ctx.saved_tensors
    grad_y = ops.gather_tokens(grad, indices, True)
    if ctx.fill_dtype is None or not ctx.needs_input_grad[3]:
        return grad_y, None, None, None, None
    if ctx.shared:
        grad_fill = ops.scatter_tokens_fill_backward(grad, indices)
    else:
        grad_fill = ops.scatter_tokens(torch.zeros_like(grad_y), indices, ctx.n, grad, 0.0)
    return grad_y, None, None, grad_fill.to(ctx.fill_dtype), None


def _fake_fill_backward(grad: Tensor, indices: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[2], dtype=torch.promote_types(grad.dtype, torch.float32))


def _setup_context_fill_backward(ctx, inputs, output) -> None:
    grad, indices = inputs
    ctx.n, ctx.dtype = grad.shape[1], grad.dtype
    ctx.save_for_backward(indices)


def _fill_backward_backward(ctx, grad: Tensor):
    (indices,) = ctx.saved_tensors
    zeros = grad.new_zeros(*indices.shape, len(grad))
    return ops.scatter_tokens(zeros, indices, ctx.n, grad, 0.0).to(ctx.dtype), None


register(
    "scatter_tokens_fill_backward(Tensor grad, Tensor indices) -> Tensor",
    reference.scatter_tokens_fill_backward,
    kernel=_launch_fill_backward,
    fake=_fake_fill_backward,
    backward=_fill_backward_backward,
    setup_context=_setup_context_fill_backward,
)
register(
    "scatter_tokens(Tensor y, Tensor indices, SymInt n, Tensor? fill, float value) -> Tensor",
    reference.scatter_tokens,
    kernel=_launch,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def scatter_tokens(y: Tensor, indices: Tensor, n: int, *, fill: float | Tensor = 0.0) -> Tensor:
    """Place K tokens per row among n: x[b, indices[b, i]] = y[b, i], and elsewhere x is `fill`.

    Args:
        y: [B, K, D], floating point.
        indices: [B, K], int32 or int64, in [0, n), distinct in each row.
        n: number of rows of the result, at least K.
        fill: a number, a [D] vector such as a mask token, or [B, n, D], the tokens among which to place them: those of
            a layer's input that it passes by, say (differentiable; cast to y's dtype, else not copied).

    Returns:
        [B, n, D] in y's dtype.

    Raises:
        TypeError: y is not floating point, or indices are not int32 or int64.
        ValueError: shapes do not match, n < K, or (on CPU) an index lies outside [0, n) or stands twice in a row.

    Under autocast: never casts.
    """
    b, k, d = sizes("y", y, "B K D")
    if not y.is_floating_point():
        raise TypeError(f"y: expected a floating point dtype, got {y.dtype}")
    sizes("indices", indices, "B K", B=b, K=k)
    dtype_in("indices", indices, INTEGERS)
    same_device("indices", indices, "y", y)
    count("n", n, k, why="K, the number of tokens to place")
    if isinstance(fill, Tensor):
        if fill.ndim not in (1, 3):
            raise ValueError(f"fill: expected a number or shape [D] or [B, n, D], got {list(fill.shape)}")
        known = {"D": d} if fill.ndim == 1 else {"B": b, "n": n, "D": d}
        sizes("fill", fill, " ".join(known), **known)
        same_device("fill", fill, "y", y)
        return ops.scatter_tokens(y, indices, n, fill, 0.0)
    return ops.scatter_tokens(y, indices, n, None, float(fill))
