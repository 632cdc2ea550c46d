"""A transformer's MLP: two linear layers and a GELU between; see `vmae_kernels.linear`.

Where the extension multiplies, the GELU and its derivative are taken of sums that have just been made, and in the
backward the second layer's input comes with the derivative: what lies between the layers is not read again for it.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _csrc
from ._library import in_huge_pages, ops, register, register_composite
from .linear import compiled_for, keep_for_backward, linear, linear_backward, parameter_gradients, rows_of
from .reference import bfloat16_on_cpu


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """linear(gelu(linear(x, weight1, bias1)), weight2, bias2), and differentiable as it; for its backward it keeps x
    and what the GELU is taken of.

    Args:
        x: [..., inputs], floating point.
        weight1, weight2: [hidden, inputs] and [outputs, hidden].
        bias1, bias2: [hidden] and [outputs], in their weights' dtypes.

    Returns:
        [..., outputs] in x's dtype, or autocast's.

    Raises:
        As `linear`.
    """
    return ops.mlp(x, weight1, bias1, weight2, bias2)


def _mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    parameters = weight1, bias1, weight2, bias2
    known = all(p.is_cpu and p.dtype in (torch.float32, torch.bfloat16) for p in parameters)
    shapes = [weight1.shape[:1], (*bias2.shape, *bias1.shape)]
    fits = x.ndim > 0 and weight1.ndim == 2 and x.shape[-1] == weight1.shape[1]
    if not (known and fits and [bias1.shape, weight2.shape] == shapes) or not bfloat16_on_cpu(x):
        return linear(F.gelu(linear(x, weight1, bias1)), weight2, bias2)
    before, activated = ops.mlp_cpu_first(x, weight1, bias1)
    return ops.mlp_cpu_second(before, activated, weight2, bias2)


def _first(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What the GELU is taken of, and the GELU."""
    if not compiled_for(weight, bias):
        before = ops.linear_cpu(x, weight, bias)
        return before, F.gelu(before)
    before, activated = (in_huge_pages(y) for y in _fake_first(x, weight, bias))
    results = (y.view(-1, len(weight)) for y in (before, activated))
    _csrc.ops.linear(*results, rows_of(x), rows_of(weight), bias.contiguous())
    return before, activated


def _second(before: Tensor, activated: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.linear_cpu(activated, weight, bias)


def _gelu_gradient(grad: Tensor, weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `before`, and its GELU, which has not been kept."""
    before = before.contiguous()
    if not compiled_for(weight):
        return torch.ops.aten.gelu_backward(ops.linear_cpu_input_gradient(grad, weight), before), F.gelu(before)
    dbefore, activated = (in_huge_pages(y) for y in _fake_gelu_gradient(grad, weight, before))
    results = (y.view(-1, weight.shape[1]) for y in (dbefore, activated))
    _csrc.ops.linear_gelu_gradient(*results, rows_of(grad), rows_of(weight), before)
    return dbefore, activated


def _fake_first(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    before = x.new_empty(*x.shape[:-1], len(weight))
    return before, torch.empty_like(before)


def _fake_second(before: Tensor, activated: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return before.new_empty(*before.shape[:-1], len(weight))


def _fake_gelu_gradient(grad: Tensor, weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    return before.new_empty(before.shape), before.new_empty(before.shape)


def _keep_first(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    keep_for_backward(ctx, inputs, output[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros are made for its gradient


def _keep_second(ctx: Any, inputs: tuple, output: Tensor) -> None:
    before, _, weight, bias = inputs
    ctx.save_for_backward(before, weight)
    ctx.bias = bias.dtype


def _first_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return linear_backward(ctx, grad)


def _second_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    before, weight = ctx.saved_tensors
    dbefore, activated = ops.mlp_cpu_gelu_gradient(grad, weight, before)
    return dbefore, None, *parameter_gradients(grad, activated, weight, ctx.bias, ctx.needs_input_grad[2:])


register_composite("mlp(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2) -> Tensor", _mlp)
# What it is made of for bfloat16 on a CPU. `activated` goes from one to the other, and nothing keeps it.
register(
    "mlp_cpu_first(Tensor x, Tensor weight, Tensor bias) -> (Tensor before, Tensor activated)",
    _first,
    fake=_fake_first,
    backward=_first_backward,
    setup_context=_keep_first,
    autocast=1,
)
register(
    "mlp_cpu_second(Tensor before, Tensor activated, Tensor weight, Tensor bias) -> Tensor",
    _second,
    fake=_fake_second,
    backward=_second_backward,
    setup_context=_keep_second,
)
register(
    "mlp_cpu_gelu_gradient(Tensor grad, Tensor weight, Tensor before) -> (Tensor, Tensor)",
    _gelu_gradient,
    fake=_fake_gelu_gradient,
)


@register_flop_formula([ops.mlp_cpu_first, ops.mlp_cpu_gelu_gradient])
def _flops(x, weight, *_, **__) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


@register_flop_formula(ops.mlp_cpu_second)
def _second_flops(before, activated, weight, *_, **__) -> int:
    return 2 * math.prod(before[:-1]) * math.prod(weight)
