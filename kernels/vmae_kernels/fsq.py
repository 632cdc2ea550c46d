"""Finite scalar quantization: bound, round and index in one operation."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._checks import FLOATS, count, dtype_in
from ._library import register


def _fake(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape[:-1], dtype=torch.int32)


def _fake_backward(grad: Tensor, z: Tensor, levels: Sequence[int]) -> Tensor:
    return z.new_empty(z.shape)


def _setup_context(ctx, inputs, output) -> None:
    z, ctx.levels = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(z)


def _backward(ctx, grad: Tensor, _):
    (z,) = ctx.saved_tensors
    return torch.ops.vmae_kernels.fsq_backward(grad, z, ctx.levels), None


register(
    "fsq(Tensor z, int[] levels) -> (Tensor, Tensor)",
    reference.fsq,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
register("fsq_backward(Tensor grad, Tensor z, int[] levels) -> Tensor", reference.fsq_backward, fake=_fake_backward)


def fsq(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Round each of L numbers to one of levels[i] values after a tanh, and number the combination.

    A level count l that is odd gives the values -1 to 1 in steps of 2 / (l - 1), an even one -1 to 1 - 2 / l in steps
    of 2 / l; z = 0 always gives 0. The gradient passes straight through the rounding, and through the tanh.

    Args:
        z: [..., L], floating point; computed in float32 for half types.
        levels: L integers, each at least 2, whose product is at most 2^31.

    Returns:
        quantized [..., L] in z's dtype, in [-1, 1], and codes int32 [...] in [0, product of levels): a number in mixed
        radix, the first level fastest. NaN in z stays NaN in quantized and counts as value 0 in the code.

    Raises:
        TypeError: z is not floating point.
        ValueError: z's last size is not the number of levels, a level is below 2, or the codes do not fit.

    Under autocast: never casts.

    Source: Mentzer et al., "Finite scalar quantization: VQ-VAE made simple" (ICLR 2024), appendix A.1.
    """
    if not isinstance(z, Tensor):
        raise TypeError(f"z: expected a tensor [..., L], got {type(z).__name__}")
    dtype_in("z", z, FLOATS)
    levels = list(levels)
    if z.ndim == 0 or z.shape[-1] != len(levels) or not levels:
        raise ValueError(f"z: expected shape [..., L] with L = {len(levels)} levels, got {list(z.shape)}")
    for level in levels:
        count("levels", level, 2)
    if math.prod(levels) > 2**31:
        raise ValueError(f"levels: expected a product of at most 2^31, got {levels}")
    return torch.ops.vmae_kernels.fsq(z, levels)
