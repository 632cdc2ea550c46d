"""Rows placed into a longer token tensor, the rest filled: the inverse of a gather."""

import torch
from torch import Tensor

from . import reference
from ._checks import INTEGERS, count, dtype_in, same_device, sizes
from ._library import ops, register
from .gather_tokens import place


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
    ctx.fill_dtype = None if fill is None else fill.dtype
    ctx.save_for_backward(indices)


def _backward(ctx, grad: Tensor):
    (indices,) = ctx.saved_tensors
    grad_y = ops.gather_tokens(grad, indices, True)
    grad_fill = None
    if ctx.fill_dtype is not None and ctx.needs_input_grad[3]:
        filled = torch.ones(grad.shape[:2], dtype=torch.bool, device=grad.device).scatter(1, indices.long(), False)
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_fill = torch.where(filled[..., None], grad, 0).sum((0, 1), dtype=wide).to(ctx.fill_dtype)
    return grad_y, None, None, grad_fill, None


register(
    "scatter_tokens(Tensor y, Tensor indices, SymInt n, Tensor? fill, float value) -> Tensor",
    reference.scatter_tokens,
    kernel=_launch,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def scatter_tokens(y: Tensor, indices: Tensor, n: int, *, fill: float | Tensor = 0.0) -> Tensor:
    """Place K tokens per row among n: x[b, indices[b, i]] = y[b, i], and every other row is `fill`.

    Args:
        y: [B, K, D], floating point.
        indices: [B, K], int32 or int64, in [0, n), distinct in each row.
        n: number of rows of the result, at least K.
        fill: a number, or a [D] vector such as a mask token (differentiable, cast to y's dtype).

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
        sizes("fill", fill, "D", D=d)
        same_device("fill", fill, "y", y)
        return ops.scatter_tokens(y, indices, n, fill, 0.0)
    return ops.scatter_tokens(y, indices, n, None, float(fill))
