"""Finite scalar quantization: bound, round and index in one operation."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._checks import FLOATS, count, dtype_in
from ._library import ops, register
from ._triton import jit, power_of_2, tl
from ._tuning import Configuration, launch

# --- the kernels -----------------------------------------------------------------------------------------------------


@jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))  # never overflows
    return tl.where(x < 0, (e - 1) / (1 + e), (1 - e) / (1 + e))


@jit
def _of_level(values: tl.constexpr, o_level, like):
    """values[o_level]: a number for each place of o_level."""
    b_value = tl.full(o_level.shape, values[0], like.dtype)
    for i in tl.static_range(1, len(values)):
        b_value = tl.where(o_level == i, tl.full(o_level.shape, values[i], like.dtype), b_value)
    return b_value


@jit
def _fsq_kernel(
    p_z, p_quantized, p_codes, rows,
    HALF: tl.constexpr, OFFSET: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr, HIGHEST: tl.constexpr,
    RADIX: tl.constexpr, L: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_level = tl.arange(0, COLUMNS)
    place = o_row[:, None] * L + o_level[None, :]
    mask = (o_row < rows)[:, None] & (o_level < L)[None, :]
    z = tl.load(p_z + place, mask=mask, other=0.0).to(WIDE)
    half, offset, shift = (_of_level(HALF, o_level, z), _of_level(OFFSET, o_level, z), _of_level(SHIFT, o_level, z))
    width, highest = _of_level(WIDTH, o_level, z), _of_level(HIGHEST, o_level, z)
    bounded = _tanh(z + shift[None, :]) * half[None, :] - offset[None, :]
    # Halves go to even: above this number there is no room for a fraction.
    whole: tl.constexpr = 6755399441055744.0 if tl.float64 == WIDE else 12582912.0
    rounded = (bounded + whole) - whole
    rounded = tl.where(rounded < -width[None, :], -width[None, :], rounded)  # keeps NaN
    rounded = tl.where(rounded > highest[None, :], highest[None, :], rounded)
    tl.store(p_quantized + place, (rounded / width[None, :]).to(p_quantized.dtype.element_ty), mask=mask)
    digits = (tl.where(rounded == rounded, rounded, 0.0) + width[None, :]).to(tl.int32)
    radix = _of_level(RADIX, o_level, digits)
    tl.store(p_codes + o_row, tl.sum(tl.where(mask, digits * radix[None, :], 0), 1), mask=o_row < rows)


@jit
def _fsq_backward_kernel(
    p_grad, p_z, p_out, n,
    SHIFT: tl.constexpr, SLOPE: tl.constexpr, L: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(p_z + place, mask=place < n, other=0.0).to(WIDE)
    o_level = place % L
    tanh = _tanh(z + _of_level(SHIFT, o_level, z))
    grad = tl.load(p_grad + place, mask=place < n, other=0.0).to(WIDE)
    out = grad * ((1 - tanh * tanh) * _of_level(SLOPE, o_level, z))
    tl.store(p_out + place, out.to(p_out.dtype.element_ty), mask=place < n)


def _wide(z: Tensor) -> object:
    return tl.float64 if z.dtype == torch.float64 else tl.float32


def configuration(levels: int) -> Configuration:
    """8 numbers a thread."""
    columns = power_of_2(levels)
    return {"BLOCK": max(1024 // columns, 1), "COLUMNS": columns, "num_warps": 4}


_LIMITS = {"BLOCK": (16, 2048), "num_warps": (1, 8)}
_BACKWARD = {"BLOCK": 1024, "num_warps": 4}


def _launch(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    z = z.contiguous()
    quantized, codes = _fake(z, levels)
    if z.numel():
        half, offset, shift, width = reference.fsq_numbers(tuple(levels))
        highest = tuple(float((level - 1) // 2) for level in levels)
        radix = tuple(math.prod(levels[:i]) for i in range(len(levels)))

        def run(options: Configuration) -> None:
            _fsq_kernel[(-(-codes.numel() // options["BLOCK"]),)](
                z, quantized, codes, codes.numel(), half, offset, shift, width, highest, radix, len(levels), _wide(z),
                enable_fp_fusion=False, **options,
            )  # fmt: skip

        launch("fsq", z, (f"L{len(levels)}", codes.numel()), configuration(len(levels)), _LIMITS, run)
    return quantized, codes


def _launch_backward(grad: Tensor, z: Tensor, levels: Sequence[int]) -> Tensor:
    grad, z = grad.contiguous(), z.contiguous()
    out = _fake_backward(grad, z, levels)
    if z.numel():
        half, _, shift, width = reference.fsq_numbers(tuple(levels))
        slope = tuple(h / w for h, w in zip(half, width, strict=True))

        def run(options: Configuration) -> None:
            _fsq_backward_kernel[(-(-z.numel() // options["BLOCK"]),)](
                grad, z, out, z.numel(), shift, slope, len(levels), _wide(z), enable_fp_fusion=False, **options
            )

        launch("fsq backward", z, (f"L{len(levels)}", z.numel()), _BACKWARD, _LIMITS, run)
    return out


# --- the operation ---------------------------------------------------------------------------------------------------


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
    return ops.fsq_backward(grad, z, ctx.levels), None


register(
    "fsq(Tensor z, int[] levels) -> (Tensor, Tensor)",
    reference.fsq,
    kernel=_launch,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
register(
    "fsq_backward(Tensor grad, Tensor z, int[] levels) -> Tensor",
    reference.fsq_backward,
    kernel=_launch_backward,
    fake=_fake_backward,
)


def fsq(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Round each of L numbers to one of levels[i] values after a tanh, and number the combination.

    A level count l that is odd gives the values -1 to 1 in steps of 2 / (l - 1), an even one -1 to 1 - 2 / l in steps
    of 2 / l; z = 0 always gives 0. The gradient passes straight through the rounding, and through the tanh.

    Args:
        z: [..., L], floating point; computed in float32 for half types.
        levels: L integers, each from 2 to 2^24, whose product is at most 2^31.

    Returns:
        quantized [..., L] in z's dtype, in [-1, 1], and codes int32 [...] in [0, product of levels): a number in mixed
        radix, the first level fastest. NaN in z stays NaN in quantized and counts as value 0 in the code.

    Raises:
        TypeError: z is not floating point.
        ValueError: z's last size is not the number of levels, a level lies outside 2 to 2^24, or the codes do not fit.

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
        count("levels", level, 2, 2**24, "the whole numbers of float32")
    if math.prod(levels) > 2**31:
        raise ValueError(f"levels: expected a product of at most 2^31, got {levels}")
    return ops.fsq(z, levels)
