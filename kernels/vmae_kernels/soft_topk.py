"""Differentiable top-k: the expected indicator under Gaussian noise."""

import math

import torch
from torch import Tensor

from . import reference
from ._checks import count
from ._library import register
from .topk import check_scores


def _fake(scores: Tensor, k: int, sigma: float, samples: int, seed: int, row: int) -> Tensor:
    return scores.new_empty(scores.shape)


def _fake_backward(grad: Tensor, scores: Tensor, k: int, sigma: float, samples: int, seed: int, row: int) -> Tensor:
    return scores.new_empty(scores.shape)


def _setup_context(ctx, inputs, output) -> None:
    scores, *ctx.settings = inputs
    ctx.save_for_backward(scores)


def _backward(ctx, grad: Tensor):
    (scores,) = ctx.saved_tensors
    return torch.ops.vmae_kernels.soft_topk_backward(grad, scores, *ctx.settings), None, None, None, None, None


_SETTINGS = "Tensor scores, SymInt k, float sigma, SymInt samples, SymInt seed, SymInt row"
register(
    f"soft_topk({_SETTINGS}) -> Tensor",
    reference.soft_topk,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
register(f"soft_topk_backward(Tensor grad, {_SETTINGS}) -> Tensor", reference.soft_topk_backward, fake=_fake_backward)


def soft_topk(scores: Tensor, k: int, *, sigma: float, samples: int, seed: int, row: int = 0) -> Tensor:
    """How often each score is among the k largest of its row when Gaussian noise is added: a soft top-k indicator.

    The gradient is the perturbed-optimizer estimator with a control variate (the unperturbed indicator's product is
    subtracted). Noise comes from Philox counters keyed by `seed` and is made again in the backward, so memory is O(N)
    whatever the number of samples, and the random bits are the same on every device.

    Args:
        scores: [..., N], float32, float16, bfloat16 or float64.
        k: 0 to N.
        sigma: standard deviation of the noise, in the scores' own units; above 0.
        samples: number of noise samples; at least 1.
        seed: any integer, taken modulo 2^64. Rows of one call have independent noise.
        row: the first row's place in the whole that these rows are a part of: parts have the whole's noise.

    Returns:
        [..., N] in the scores' dtype, each in [0, 1], rows summing to k.

    Raises:
        TypeError: scores are not floating point, or k, samples, seed or row is no integer.
        ValueError: k outside 0 to N, sigma not above 0, samples below 1, row below 0.

    Under autocast: never casts.

    Source: Berthet et al., "Learning with differentiable perturbed optimizers" (NeurIPS 2020), section 3; Cordonnier et
    al., "Differentiable patch selection for image recognition" (CVPR 2021), section 3.
    """
    check_scores(scores, k)
    count("samples", samples, 1)
    count("row", row, 0)
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed: expected an integer, got {type(seed).__name__}")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma: expected a finite number above 0, got {sigma}")
    # An operation's integers are 64 bits wide and signed.
    seed = (seed + 2**63) % 2**64 - 2**63
    return torch.ops.vmae_kernels.soft_topk(scores, k, sigma, samples, seed, row)
