"""Rows of a token tensor by index."""

import torch
from torch import Tensor

from . import reference
from ._checks import INTEGERS, dtype_in, same_device, sizes
from ._library import register


def _fake(x: Tensor, indices: Tensor, unique: bool) -> Tensor:
    return x.new_empty((x.shape[0], indices.shape[1], x.shape[2]))


def _fake_backward(grad: Tensor, indices: Tensor, n: int, unique: bool) -> Tensor:
    return grad.new_empty((grad.shape[0], n, grad.shape[2]))


def _setup_context(ctx, inputs, output) -> None:
    x, indices, ctx.unique = inputs
    ctx.n = x.shape[1]
    ctx.save_for_backward(indices)


def _backward(ctx, grad: Tensor):
    (indices,) = ctx.saved_tensors
    return torch.ops.vmae_kernels.gather_tokens_backward(grad, indices, ctx.n, ctx.unique), None, None


def _setup_context_backward(ctx, inputs, output) -> None:
    _, indices, _, ctx.unique = inputs
    ctx.save_for_backward(indices)


def _backward_backward(ctx, grad: Tensor):
    (indices,) = ctx.saved_tensors
    return torch.ops.vmae_kernels.gather_tokens(grad, indices, ctx.unique), None, None, None


register(
    "gather_tokens(Tensor x, Tensor indices, bool unique) -> Tensor",
    reference.gather_tokens,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
register(
    "gather_tokens_backward(Tensor grad, Tensor indices, SymInt n, bool unique) -> Tensor",
    reference.gather_tokens_backward,
    fake=_fake_backward,
    backward=_backward_backward,
    setup_context=_setup_context_backward,
)


def gather_tokens(x: Tensor, indices: Tensor, *, unique: bool = False) -> Tensor:
    """Choose K of N tokens per row: y[b, i] = x[b, indices[b, i]].

    Args:
        x: [B, N, D], any dtype and strides (not copied, but for the rows chosen).
        indices: [B, K], int32 or int64, in [0, N).
        unique: a promise that each row's indices are distinct; the backward is then a plain copy.

    Returns:
        [B, K, D] in x's dtype. The gradient is deterministic and adds up duplicates (in float32 for half types).

    Raises:
        TypeError: indices are not int32 or int64.
        ValueError: shapes do not match, or (on CPU) an index lies outside [0, N); on CUDA such an index never reads
            outside x, and what it yields is not specified.

    Under autocast: never casts.
    """
    b, _, _ = sizes("x", x, "B N D")
    sizes("indices", indices, "B K", B=b)
    dtype_in("indices", indices, INTEGERS)
    same_device("indices", indices, "x", x)
    return torch.ops.vmae_kernels.gather_tokens(x, indices, unique)
