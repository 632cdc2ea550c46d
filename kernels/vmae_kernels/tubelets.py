"""Chosen tubelets of a video, normalised: the rest of the video is never touched."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._checks import FLOATS, INTEGERS, dtype_in, same_device, sizes
from ._library import ops, register
from ._triton import jit, power_of_2, tl
from ._tuning import Configuration, launch
from .gather_tokens import row_of_program

# --- the kernel ------------------------------------------------------------------------------------------------------


@jit
def _tubelets_kernel(
    p_video, p_indices, p_patches, k, grid_t, grid_h, grid_w,
    stride_vb, stride_vc, stride_vt, stride_vh, stride_vw, stride_ib, stride_ik,
    T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    PACKED: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """patches[b, i] = video's tubelet indices[b, i] * scale + shift, in the order t, h, w, c.

    PACKED: a pixel's channels and a row's pixels lie side by side, so that a tubelet's row is read as one.
    """
    b, o_row = row_of_program(k, ROWS)
    m_row = o_row < k
    index = tl.load(p_indices + b * stride_ib + o_row.to(tl.int64) * stride_ik, mask=m_row, other=0).to(tl.int64)
    index = tl.minimum(tl.maximum(index, 0), tl.cast(grid_t, tl.int64) * grid_h * grid_w - 1)
    t, h, w = index // (grid_h * grid_w), index // grid_w % grid_h, index % grid_w
    corner = t * T * stride_vt + h * H * stride_vh + w * W * stride_vw
    p_from = p_video + b * stride_vb + corner[:, None]
    p_to = p_patches + b * k * (T * H * W * C) + (o_row.to(tl.int64) * (T * H * W * C))[:, None]
    for start in tl.static_range(0, T * H * W * C, COLUMNS):
        o_column = start + tl.arange(0, COLUMNS)
        o_line = o_column // (W * C)  # frame and row
        if PACKED:
            offset = (o_column % (W * C)).to(tl.int64)
        else:
            offset = (o_column // C % W).to(tl.int64) * stride_vw + (o_column % C).to(tl.int64) * stride_vc
        offset += (o_line // H).to(tl.int64) * stride_vt + (o_line % H).to(tl.int64) * stride_vh
        b_scale = tl.full((COLUMNS,), SCALE[0], COMPUTE)
        b_shift = tl.full((COLUMNS,), SHIFT[0], COMPUTE)
        for c in tl.static_range(1, C):
            b_scale = tl.where(o_column % C == c, tl.full((COLUMNS,), SCALE[c], COMPUTE), b_scale)
            b_shift = tl.where(o_column % C == c, tl.full((COLUMNS,), SHIFT[c], COMPUTE), b_shift)
        mask = m_row[:, None] & (o_column < T * H * W * C)[None, :]
        x = tl.load(p_from + offset[None, :], mask=mask, other=0).to(COMPUTE)
        y = x * b_scale[None, :] + b_shift[None, :]
        tl.store(p_to + o_column[None, :], y.to(p_patches.dtype.element_ty), mask=mask)


def configuration(length: int) -> Configuration:
    """For tubelets of `length` values: 4 a program, and with 512 values of each at a time a thread reads 16 bytes of
    uint8 at once."""
    return {"ROWS": 4, "COLUMNS": min(power_of_2(length), 512), "num_warps": 4}


_LIMITS = {"ROWS": (1, 32), "COLUMNS": (64, 2048), "num_warps": (1, 8)}


def _launch(
    video: Tensor, indices: Tensor, size: Sequence[int], mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    b, channels, *whole = video.shape
    grid = [all_ // part for all_, part in zip(whole, size, strict=True)]
    reference.check_range(indices, math.prod(grid))
    patches = _fake(video, indices, size, mean, std, dtype)
    if patches.numel():
        scale, shift = reference.affine(mean, std, not video.is_floating_point())
        k, length = patches.shape[1:]
        packed = video.stride(1) == 1 and video.stride(4) == channels

        def run(options: Configuration) -> None:
            _tubelets_kernel[(b * -(-k // options["ROWS"]),)](
                video, indices, patches, k, *grid, *video.stride(), *indices.stride(), *size, channels, scale, shift,
                PACKED=packed, COMPUTE=tl.float64 if dtype == torch.float64 else tl.float32,
                enable_fp_fusion=False,  # as the reference rounds
                **options,
            )  # fmt: skip

        kind = (f"{dtype}", f"{length}", "packed" if packed else "apart", b * k)
        launch("tubelets", video, kind, configuration(length), _LIMITS, run)
    return patches


def _launch_backward(
    grad: Tensor, indices: Tensor, shape: Sequence[int], size: Sequence[int], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    video = torch.empty(*shape, dtype=dtype, device=grad.device)
    view = reference.tubelet_view(video, size)  # [B, T/t, H/h, W/w, t, h, w, C]
    scale, _ = reference.affine([0.0] * len(std), std, False)
    wide = grad.to(torch.float64 if dtype == torch.float64 else torch.float32)
    factor = reference.vector(scale, wide.dtype, grad.device).repeat(math.prod(size))
    summed = ops.gather_tokens_backward(wide * factor, indices, math.prod(view.shape[1:4]), False)
    view.copy_(summed.view(view.shape))
    return video


# --- the operation ---------------------------------------------------------------------------------------------------


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
    backward = ops.tubelets_backward
    return backward(grad, indices, list(ctx.shape), ctx.size, ctx.std, ctx.dtype), None, None, None, None, None


register(
    "tubelets(Tensor video, Tensor indices, SymInt[] size, float[] mean, float[] std, ScalarType dtype) -> Tensor",
    reference.tubelets,
    kernel=_launch,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
register(
    "tubelets_backward(Tensor grad, Tensor indices, SymInt[] shape, SymInt[] size, float[] std, ScalarType dtype) "
    "-> Tensor",
    reference.tubelets_backward,
    kernel=_launch_backward,
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
    return ops.tubelets(video, indices, list(size), list(mean), list(std), dtype)
