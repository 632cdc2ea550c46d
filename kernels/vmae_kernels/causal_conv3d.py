"""3D convolution that is causal in time, and that streams: chunks give the whole clip's result.

The kernels are those of csrc/, the repository's folder of CUDA and C++ sources, where they were built.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _csrc, reference
from ._checks import FLOATS, dtype_in, same_device, same_dtype, sizes
from ._library import compiled, ops, register

LAST = torch.channels_last_3d


# --- which implementation runs -------------------------------------------------------------------------------------


def _why_not(x: Tensor, weight: Tensor | Sequence[int], stride: Sequence[int]) -> str | None:
    """Why the extension cannot convolve x, or None."""
    facts = _csrc.facts()
    if "missing" in facts:
        return facts["missing"]
    kernel = weight.shape[2:] if isinstance(weight, Tensor) else weight
    if max(kernel) > 7 or max(stride) > 4:
        return f"kernels of at most 7 and strides of at most 4, got {tuple(kernel)} and {tuple(stride)}"
    if x.is_cpu:
        if not facts["amx"]:
            return "a processor with Intel AMX"
        if x.dtype != torch.bfloat16:
            return f"bfloat16 on a CPU, got {x.dtype}"
        return None if x.shape[0] else "at least one clip on a CPU, got none"
    if not facts["cuda"]:
        return "an extension built for CUDA (VMAE_BUILD=force)"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"bfloat16, float16 or float32 on CUDA, got {x.dtype}"
    if _capability(x.device) < (8, 0):
        return f"compute capability 8.0 or newer, got {'.'.join(map(str, _capability(x.device)))}"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _compiled(x: Tensor, weight: Tensor | Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the extension convolves x, rather than PyTorch: this is where it is decided.

    Raises:
        ValueError: VMAE_KERNELS=csrc, and it cannot.
    """
    return compiled("causal_conv3d", lambda: _why_not(x, weight, stride))


def _exact() -> bool:
    """Whether fp32 convolutions on CUDA shall not round to tf32; the setting is that of PyTorch's own."""
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv.fp32_precision != "tf32"


# --- the convolution and its two gradients, each differentiable through the others ---------------------------------


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor | None, stride: Sequence[int], silu: bool
) -> Tensor:
    if not _compiled(x, weight, stride):
        return reference.causal_conv3d(x, weight, bias, cache, stride, silu)
    sizes = reference.convolution_sizes(x, weight, stride)
    y = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=LAST)
    if cache is not None:
        cache = cache.contiguous(memory_format=LAST)
    inputs = x.contiguous(memory_format=LAST), cache, weight.contiguous(memory_format=LAST)
    _csrc.ops.convolve(y, *inputs, bias, stride, silu, _exact())
    return y.contiguous(memory_format=reference.memory_format(x))


def _input_gradient(
    dy: Tensor, weight: Tensor, stride: Sequence[int], size: Sequence[int], past: bool, channels_last: bool
) -> tuple[Tensor, Tensor]:
    layout = LAST if channels_last else torch.contiguous_format
    if not _compiled(dy, weight, stride):
        return reference.causal_conv3d_input_gradient(dy, weight, stride, size, past, layout)
    frames = weight.shape[2] - stride[0] if past else 0
    shape = dy.shape[0], weight.shape[1]
    dx, dcache = (
        torch.empty((*shape, n, *size[1:]), dtype=dy.dtype, device=dy.device, memory_format=LAST)
        for n in (size[0], frames)
    )
    if not dy.is_cpu:
        weight = weight.transpose(0, 1)  # as the kernel reads it: outputs are its depth
    inputs = dy.contiguous(memory_format=LAST), weight.contiguous(memory_format=LAST)
    _csrc.ops.input_gradient(dx, dcache if past else None, *inputs, stride, _exact())
    return dx.contiguous(memory_format=layout), dcache.contiguous(memory_format=layout)


def _weight_gradient(
    x: Tensor, cache: Tensor | None, dy: Tensor, kernel: Sequence[int], stride: Sequence[int]
) -> Tensor:
    if not _compiled(x, kernel, stride):
        return reference.causal_conv3d_weight_gradient(x, cache, dy, kernel, stride)
    shape = dy.shape[1], x.shape[1], *kernel
    dweight = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAST)
    if cache is not None:
        cache = cache.contiguous(memory_format=LAST)
    inputs = x.contiguous(memory_format=LAST), cache, dy.contiguous(memory_format=LAST)
    _csrc.ops.weight_gradient(dweight, *inputs, stride, _exact())
    return dweight.contiguous()


def _convolve_fake(x, weight, bias, cache, stride, silu):
    return x.new_empty(reference.convolution_sizes(x, weight, stride)).contiguous(
        memory_format=reference.memory_format(x)
    )


def _input_gradient_fake(dy, weight, stride, size, past, channels_last):
    layout = LAST if channels_last else torch.contiguous_format
    frames = weight.shape[2] - stride[0] if past else 0
    shape = dy.shape[0], weight.shape[1]
    return tuple(dy.new_empty((*shape, n, *size[1:])).contiguous(memory_format=layout) for n in (size[0], frames))


def _weight_gradient_fake(x, cache, dy, kernel, stride):
    return x.new_empty((dy.shape[1], x.shape[1], *kernel))


def _convolve_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, cache, ctx.stride, silu = inputs
    if silu and any(ctx.needs_input_grad):
        raise ValueError("silu: expected False where gradients are wanted")
    ctx.save_for_backward(x, weight, cache)


def _convolve_backward(ctx: Any, dy: Tensor):
    x, weight, cache = ctx.saved_tensors
    for_x, for_weight, for_bias, for_cache = ctx.needs_input_grad[:4]
    dx = dweight = dbias = dcache = None
    if for_x or for_cache:
        last = reference.memory_format(x) == LAST
        dx, dcache = ops.causal_conv3d_input_gradient(dy, weight, ctx.stride, x.shape[2:], for_cache, last)
    if for_weight:
        dweight = ops.causal_conv3d_weight_gradient(x, cache, dy, weight.shape[2:], ctx.stride)
    if for_bias:
        dbias = dy.sum((0, 2, 3, 4))
    return dx if for_x else None, dweight, dbias, dcache if for_cache else None, None, None


def _input_gradient_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    dy, weight, ctx.stride, _, ctx.past, _ = inputs
    ctx.save_for_backward(dy, weight)


def _input_gradient_backward(ctx: Any, ddx: Tensor, ddcache: Tensor):
    dy, weight = ctx.saved_tensors
    cache = ddcache if ctx.past else None
    ddy = ops.causal_conv3d(ddx, weight, None, cache, ctx.stride, False)
    dweight = ops.causal_conv3d_weight_gradient(ddx, cache, dy, weight.shape[2:], ctx.stride)
    return ddy, dweight, None, None, None, None


def _weight_gradient_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, cache, dy, _, ctx.stride = inputs
    ctx.save_for_backward(x, cache, dy)


def _weight_gradient_backward(ctx: Any, ddweight: Tensor):
    x, cache, dy = ctx.saved_tensors
    last = reference.memory_format(x) == LAST
    dx, dcache = ops.causal_conv3d_input_gradient(dy, ddweight, ctx.stride, x.shape[2:], cache is not None, last)
    ddy = ops.causal_conv3d(x, ddweight, None, cache, ctx.stride, False)
    return dx, None if cache is None else dcache, ddy, None, None


register(
    "causal_conv3d(Tensor x, Tensor weight, Tensor? bias, Tensor? cache, SymInt[] stride, bool silu) -> Tensor",
    _convolve,
    fake=_convolve_fake,
    setup_context=_convolve_setup,
    backward=_convolve_backward,
    autocast=4,
)
register(
    "causal_conv3d_input_gradient(Tensor dy, Tensor weight, SymInt[] stride, SymInt[] size, bool past, "
    "bool channels_last) -> (Tensor, Tensor)",
    _input_gradient,
    fake=_input_gradient_fake,
    setup_context=_input_gradient_setup,
    backward=_input_gradient_backward,
)
register(
    "causal_conv3d_weight_gradient(Tensor x, Tensor? cache, Tensor dy, SymInt[] kernel, SymInt[] stride) -> Tensor",
    _weight_gradient,
    fake=_weight_gradient_fake,
    setup_context=_weight_gradient_setup,
    backward=_weight_gradient_backward,
)


# For torch.utils.flop_counter: a product and a sum for each number of the weight and position of the result, borders
# included, as it counts PyTorch's convolutions.


@register_flop_formula(ops.causal_conv3d)
def _convolve_flops(x, weight, *_, out_shape, **__) -> int:
    return 2 * math.prod(weight) * out_shape[0] * math.prod(out_shape[2:])


@register_flop_formula(ops.causal_conv3d_input_gradient)
def _input_gradient_flops(dy, weight, *_, **__) -> int:
    return 2 * math.prod(weight) * dy[0] * math.prod(dy[2:])


@register_flop_formula(ops.causal_conv3d_weight_gradient)
def _weight_gradient_flops(x, cache, dy, *_, out_shape, **__) -> int:
    return 2 * math.prod(out_shape) * dy[0] * math.prod(dy[2:])


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1, 1),
    cache: Tensor | None = None,
    return_cache: bool = False,
    activation: Literal["silu"] | None = None,
):
    """3D convolution whose output frame t sees no input frame later than t * st + st - 1.

    Time is preceded by kt - st frames, of zeros or from `cache`, and followed by none; space is zero-padded by k // 2
    on both sides (an even kernel changes the size accordingly).

    Args:
        x: [B, C, T, H, W], floating point; T a positive multiple of st. channels_last_3d is the preferred format.
        weight: [O, C, kt, kh, kw], the dtype of x; kt at least st.
        bias: [O] or None.
        stride: (st, sh, sw).
        cache: [B, C, kt - st, H, W], the frames before x, as an earlier call returned them; None at a clip's start.
        return_cache: also return the cache for the next call, which owns its memory.
        activation: "silu" applies it to the result; in the convolution's kernel where no gradient is wanted.

    Returns:
        y [B, O, T / st, H', W'] with H' = (H + 2 * (kh // 2) - kh) // sh + 1 and W' likewise, dense in x's memory
        format; with `return_cache` the pair (y, cache). A clip given in chunks yields what it yields whole: the same
        bits from the compiled kernels, and to the rounding of what it picks for each shape from PyTorch. Differentiable
        in x, weight, bias and cache, any number of times.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes do not match, kt < st, or T is no positive multiple of st.

    The kernels of the compiled extension, where it was built, copy no input: on CUDA for bfloat16, float16 and float32
    (tf32 or not as `torch.backends.cudnn.conv.fp32_precision` says, as in PyTorch's own convolutions), and on CPUs with
    Intel AMX for bfloat16, where denormal numbers count as zeros. They work in channels_last_3d; other formats are
    copied into it and back. Elsewhere PyTorch convolves, and where it is faster the frames before x are concatenated
    with it; one small clip in float32 on a CPU is copied kt / st times, for a convolution in two dimensions. Space is
    not padded in a copy anywhere. VMAE_KERNELS=csrc insists on the extension, torch on PyTorch.

    Workspace: the weight's gradient on CUDA takes 264 tiles of 128 x 128 fp32 sums, 17 MiB, or the weight's size in
    fp32, whichever is more.

    Under autocast: casts as `torch.nn.functional.conv3d` does; the cache keeps x's dtype.

    Source: Yu et al., "Language model beats diffusion" (MAGVIT-v2, ICLR 2024), section 3.2, for the causal convolution.
    """
    b, c, t, h, w = sizes("x", x, "B C T H W")
    dtype_in("x", x, FLOATS)
    o, _, kt, kh, kw = sizes("weight", weight, "O C kt kh kw", C=c)
    if not isinstance(stride, Sequence) or len(stride) != 3 or min(stride) < 1:
        raise ValueError(f"stride: expected three positive integers (time, rows, columns), got {stride}")
    if min(o, c, kt, kh, kw) < 1:
        raise ValueError(f"weight: expected sizes of at least 1, got {list(weight.shape)}")
    st = stride[0]
    if kt < st:
        raise ValueError(f"weight: expected kt of at least the stride in time, {st}, got kt = {kt}")
    if t == 0 or t % st:
        raise ValueError(f"x: expected T to be a positive multiple of the stride in time, {st}, got T = {t}")
    if h + 2 * (kh // 2) < kh or w + 2 * (kw // 2) < kw:
        raise ValueError(f"x: expected rows and columns for a kernel of {kh} x {kw}, got [H, W] = {[h, w]}")
    autocast = torch.is_autocast_enabled(x.device.type)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            same_device(name, tensor, "x", x)
            if not autocast:
                same_dtype(name, tensor, "x", x)
    if bias is not None:
        sizes("bias", bias, "O", O=o)
    if cache is not None:
        sizes("cache", cache, "B C frames H W", B=b, C=c, frames=kt - st, H=h, W=w)
        same_dtype("cache", cache, "x", x)
        same_device("cache", cache, "x", x)
    if activation not in (None, "silu"):
        raise ValueError(f"activation: expected 'silu' or None, got {activation!r}")
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, bias, cache)
    )
    fused = activation is not None and not differentiable  # the gradient needs what the activation was given
    y = ops.causal_conv3d(x, weight, bias, cache, list(stride), fused)
    if activation and not fused:
        y = F.silu(y)
    return (y, reference.past_frames(x, cache, kt - st)) if return_cache else y
