"""Layer norm before a linear layer: PyTorch's, but under bfloat16 autocast on a CPU the extension's, where it was built
and the processor has what it takes: read in float32, it comes rounded to bfloat16, as the layer takes it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _csrc
from ._library import compiled, in_huge_pages, ops, register, register_composite
from .reference import bfloat16_on_cpu


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`torch.nn.functional.layer_norm` over the last dimension, and differentiable as it; but under autocast to
    bfloat16 on a CPU the norm of float32 is computed in float32 and comes in bfloat16.

    With the extension the results do not depend on the number of threads.

    Args:
        x: [..., C], floating point.
        weight, bias: [C].

    Returns:
        x's shape, in its dtype or autocast's.

    Raises:
        RuntimeError: as there, for shapes or dtypes that do not fit.
        ValueError: VMAE_KERNELS=csrc, and the extension cannot.
    """
    return ops.layer_norm(x, weight, bias, eps)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    known = all(t.is_cpu and t.dtype == torch.float32 for t in (x, weight, bias))
    fits = x.ndim > 0 and x.shape[-1:] == weight.shape == bias.shape and len(weight) > 0
    if known and fits and bfloat16_on_cpu(x):
        return ops.layer_norm_cpu(x, weight, bias, eps)[0]
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _compiled() -> bool:
    return compiled("layer_norm", _csrc.without_amx)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """And each row's mean and the reciprocal of its standard deviation, [..., 2]."""
    if not _compiled():
        y, mean, scale = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        return y.bfloat16(), torch.cat((mean, scale), -1)
    y, stats = _fake_forward(x, weight, bias, eps)
    in_huge_pages(y)
    _csrc.ops.layer_norm(*_rows(y, stats, x), weight.contiguous(), bias.contiguous(), eps)
    return y, stats


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias."""
    if not _compiled():
        mean, scale = (part.contiguous() for part in stats.split(1, -1))  # or PyTorch reads them wrongly
        return torch.ops.aten.native_layer_norm_backward(
            grad.float(), x, weight.shape, mean, scale, weight, weight, [True] * 3
        )
    dx, dweight, dbias = _fake_gradients(grad, x, weight, stats)
    in_huge_pages(dx)
    rows = _rows(dx, grad, x, stats)
    _csrc.ops.layer_norm_backward(rows[0], dweight, dbias, *rows[1:3], weight.contiguous(), rows[3])
    return dx, dweight, dbias


def _rows(*tensors: Tensor) -> list[Tensor]:
    return [x.contiguous().view(-1, x.shape[-1]) for x in tensors]


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.bfloat16), x.new_empty(*x.shape[:-1], 2)


def _fake_gradients(grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros are made for its gradient


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *ops.layer_norm_cpu_backward(grad, *ctx.saved_tensors), None


register_composite("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor", _layer_norm)
# What it is for float32 under autocast to bfloat16 on a CPU.
register(
    "layer_norm_cpu(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor stats)",
    _forward,
    fake=_fake_forward,
    backward=_backward,
    setup_context=_setup_context,
)
register(
    "layer_norm_cpu_backward(Tensor grad, Tensor x, Tensor weight, Tensor stats) -> (Tensor, Tensor, Tensor)",
    _gradients,
    fake=_fake_gradients,
)
