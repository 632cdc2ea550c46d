"""3D convolution that is causal in time, and that streams: chunks give the whole clip's result."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._checks import FLOATS, dtype_in, same_device, same_dtype, sizes
from ._library import ops, register_composite

register_composite(
    "causal_conv3d(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, Tensor? cache) -> Tensor",
    reference.causal_conv3d,
)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1, 1),
    cache: Tensor | None = None,
    return_cache: bool = False,
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

    Returns:
        y [B, O, T / st, H', W'] with H' = (H + 2 * (kh // 2) - kh) // sh + 1 and W' likewise, dense in x's memory
        format; with `return_cache` the pair (y, cache). A clip given in chunks yields what it yields whole, to the
        rounding of the convolution that PyTorch picks for each shape. Differentiable in x, weight, bias and cache.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes do not match, kt < st, or T is no positive multiple of st.

    Until the operation has kernels of its own, the frames before x are concatenated with it; space is not copied.

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
    y = ops.causal_conv3d(x, weight, bias, list(stride), cache)
    return (y, reference.past_frames(x, cache, kt - st)) if return_cache else y
