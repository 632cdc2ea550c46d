"""Chosen tubelets of a video, normalised: the rest of the video is never touched."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._checks import FLOATS, INTEGERS, dtype_in, same_device, sizes
from ._library import register


def _fake(video: Tensor, indices: Tensor, size: Sequence[int], mean, std, dtype: torch.dtype) -> Tensor:
    return video.new_empty((video.shape[0], indices.shape[1], math.prod(size) * video.shape[1]), dtype=dtype)


def _fake_backward(grad: Tensor, indices: Tensor, shape: Sequence[int], size, std, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(tuple(shape), dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    video, indices, ctx.size, _, ctx.std, _ = inputs
    ctx.shape, ctx.dtype = video.shape, video.dtype
    ctx.save_for_backward(indices)


def _backward(ctx, grad: Tensor):
    (indices,) = ctx.saved_tensors
    backward = torch.ops.vmae_kernels.tubelets_backward
    return backward(grad, indices, list(ctx.shape), ctx.size, ctx.std, ctx.dtype), None, None, None, None, None


register(
    "tubelets(Tensor video, Tensor indices, SymInt[] size, float[] mean, float[] std, ScalarType dtype) -> Tensor",
    reference.tubelets,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
register(
    "tubelets_backward(Tensor grad, Tensor indices, SymInt[] shape, SymInt[] size, float[] std, ScalarType dtype) "
    "-> Tensor",
    reference.tubelets_backward,
    fake=_fake_backward,
)


def tubelets(
    video: Tensor,
    indices: Tensor,
    *,
    size: Sequence[int] = (2, 16, 16),
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The chosen tubelets of a video as normalised vectors, in one pass over what is chosen.

    Tubelet i stands at (i // (H/h * W/w), i // (W/w) mod H/h, i mod W/w) of the grid [T/t, H/h, W/w]. Its values are
    ordered t, h, w, c, as VideoMAE's targets are.

    Args:
        video: [B, C, T, H, W], uint8 or floating point, in any memory layout.
        indices: [B, K], int32 or int64, in [0, T/t * H/h * W/w).
        size: (t, h, w), the tubelet's frames, rows and columns; they divide T, H and W.
        mean, std: C numbers each. uint8 gives (x / 255 - mean) / std, floating point (x - mean) / std.
        dtype: of the result; floating point.

    Returns:
        [B, K, t * h * w * C] in `dtype`; computed in float32 for half types. Differentiable in a floating-point video.

    Raises:
        TypeError: video is neither uint8 nor floating point, or indices or dtype is of a wrong kind.
        ValueError: shapes do not match, a side is no multiple of the tubelet's, a std is 0, or (on CPU) an index lies
            outside the grid.

    Under autocast: never casts.

    Source: Tong et al., "VideoMAE" (NeurIPS 2022), section 3.
    """
    b, c, t, h, w = sizes("video", video, "B C T H W")
    dtype_in("video", video, (torch.uint8, *FLOATS))
    sizes("indices", indices, "B K", B=b)
    dtype_in("indices", indices, INTEGERS)
    same_device("indices", indices, "video", video)
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"size: expected three positive integers (frames, rows, columns), got {tuple(size)}")
    if t % size[0] or h % size[1] or w % size[2]:
        raise ValueError(f"video: expected [T, H, W] in multiples of the tubelet {tuple(size)}, got {[t, h, w]}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != c:
            raise ValueError(f"{name}: expected C = {c} numbers, got {len(values)}")
    if not all(0 < s < math.inf for s in std):
        raise ValueError(f"std: expected numbers above 0, got {tuple(std)}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected a floating point dtype, got {dtype}")
    return torch.ops.vmae_kernels.tubelets(video, indices, list(size), list(mean), list(std), dtype)
