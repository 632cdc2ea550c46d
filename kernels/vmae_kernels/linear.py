"""Linear layers: PyTorch's, but on a CPU in bfloat16 the extension's, where it was built and the processor has AMX.

There a layer's weight stays in float32: it is rounded where it is multiplied, without a copy, and its gradient is never
rounded.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _csrc
from ._library import compiled, in_huge_pages, ops, register, register_composite
from .reference import bfloat16_on_cpu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, as `torch.nn.functional.linear`, and differentiable as it.

    On a CPU in bfloat16, which is that of x or autocast's, weight and bias may be float32. With the extension the
    weight counts as rounded to bfloat16, sums are of float32 and rounded once, those of float32 parameters' gradients
    never; the result does not depend on the number of threads, and denormal numbers count as zeros.

    Args:
        x: [..., inputs], floating point.
        weight: [outputs, inputs].
        bias: [outputs], in weight's dtype.

    Returns:
        [..., outputs] in x's dtype, or autocast's.

    Raises:
        RuntimeError: as there, for shapes or dtypes that do not fit.
        ValueError: VMAE_KERNELS=csrc, and the extension cannot.
    """
    return ops.linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    known = all(p is None or (p.is_cpu and p.dtype in (torch.float32, torch.bfloat16)) for p in (weight, bias))
    fits = x.ndim > 0 and weight.ndim == 2 and x.shape[-1] == weight.shape[1]
    if not (known and fits and (bias is None or bias.shape == weight.shape[:1])) or not bfloat16_on_cpu(x):
        return F.linear(x, weight, bias)  # which says what is wrong, if something is
    return ops.linear_cpu(x, weight, bias)


def compiled_for(weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the extension multiplies, rather than PyTorch: this is where it is decided.

    Raises:
        ValueError: VMAE_KERNELS=csrc, and it cannot.
    """
    if not weight.numel() or (bias is not None and bias.dtype != weight.dtype):
        return False
    return compiled("linear", _csrc.without_amx)


def rows_of(x: Tensor) -> Tensor:
    """[..., C] as [rows, C], the numbers of a row side by side."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not compiled_for(weight, bias):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    y = in_huge_pages(_fake_forward(x, weight, bias))
    whole = None if bias is None else bias.contiguous()
    _csrc.ops.linear(y.view(-1, len(weight)), None, rows_of(x), rows_of(weight), whole)
    return y


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    if not compiled_for(weight):
        return grad @ weight.to(grad.dtype)
    dx = in_huge_pages(_fake_input_gradient(grad, weight))
    _csrc.ops.linear_input_gradient(dx.view(-1, weight.shape[1]), rows_of(grad), rows_of(weight))
    return dx


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """In float32; without a bias, its is empty."""
    grad, x = rows_of(grad), rows_of(x)
    if not compiled_for(weight):
        return (grad.t() @ x).float(), grad.sum(0, dtype=torch.float32) if bias else x.new_empty(0).float()
    dweight, dbias = _fake_weight_gradient(grad, x, weight, bias)
    _csrc.ops.linear_weight_gradient(dweight, dbias if bias else None, grad, x)
    return dweight, dbias


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _fake_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    outputs, inputs = weight.shape
    dweight = weight.new_empty(outputs, inputs, dtype=torch.float32)
    return dweight, weight.new_empty(outputs if bias else 0, dtype=torch.float32)


def keep_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] or ctx.needs_input_grad[2] else None, weight)
    ctx.bias = None if bias is None else bias.dtype


def linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx = ops.linear_cpu_input_gradient(grad, weight) if ctx.needs_input_grad[0] else None
    return dx, *parameter_gradients(grad, x, weight, ctx.bias, ctx.needs_input_grad[1:])


def parameter_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: torch.dtype | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of weight and bias, which is of this dtype, those that are wanted."""
    if not any(wanted):
        return None, None
    dweight, dbias = ops.linear_cpu_weight_gradient(grad, x, weight, wanted[1])
    return dweight.to(weight.dtype) if wanted[0] else None, dbias.to(bias) if wanted[1] else None


register_composite("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear)
# What it is made of for bfloat16 on a CPU.
register(
    "linear_cpu(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _forward,
    fake=_fake_forward,
    backward=linear_backward,
    setup_context=keep_for_backward,
    autocast=1,
)
register("linear_cpu_input_gradient(Tensor grad, Tensor weight) -> Tensor", _input_gradient, fake=_fake_input_gradient)
register(
    "linear_cpu_weight_gradient(Tensor grad, Tensor x, Tensor weight, bool bias) -> (Tensor, Tensor)",
    _weight_gradient,
    fake=_fake_weight_gradient,
)


@register_flop_formula([ops.linear_cpu, ops.linear_cpu_input_gradient])
def _forward_flops(x, weight, *_, **__) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


@register_flop_formula(ops.linear_cpu_weight_gradient)
def _weight_gradient_flops(grad, x, weight, *_, **__) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)
