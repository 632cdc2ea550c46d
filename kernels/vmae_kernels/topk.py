"""Exact, deterministic top-k in index order, and the partition of a row by it."""

import torch
from torch import Tensor

from . import reference
from ._checks import FLOATS, count, dtype_in
from ._library import register


def _fake_topk(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], k), dtype=torch.int64)


def _fake_partition(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _fake_topk(scores, k), _fake_topk(scores, scores.shape[-1] - k)


register("topk(Tensor scores, SymInt k) -> Tensor", reference.topk, fake=_fake_topk)
register("topk_partition(Tensor scores, SymInt k) -> (Tensor, Tensor)", reference.topk_partition, fake=_fake_partition)


def check_scores(scores: Tensor, k: int) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores: expected a tensor [..., N], got {type(scores).__name__}")
    if scores.ndim == 0:
        raise ValueError("scores: expected shape [..., N], got a scalar")
    dtype_in("scores", scores, FLOATS)
    count("k", k, 0, scores.shape[-1], "N, the length of a row of scores")


def topk(scores: Tensor, k: int) -> Tensor:
    """The indices of the k largest scores of each row, in ascending index order.

    Unlike `torch.topk` the result is exact and the same on every run and device: ties go to the lowest index, NaN
    ranks highest, -0.0 equals 0.0.

    Args:
        scores: [..., N], float32, float16, bfloat16 or float64; any strides.
        k: 0 to N.

    Returns:
        int64 [..., k], ascending along the last dimension. Not differentiable; see `soft_topk`.

    Raises:
        TypeError: scores are not floating point, or k is no integer.
        ValueError: k lies outside 0 to N.

    Under autocast: never casts.
    """
    check_scores(scores, k)
    return torch.ops.vmae_kernels.topk(scores, k)


def topk_partition(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Split each row's indices into its k largest scores and the rest, both ascending, in one pass.

    Args and errors as `topk`.

    Returns:
        (selected int64 [..., k], rest int64 [..., N - k]).
    """
    check_scores(scores, k)
    return torch.ops.vmae_kernels.topk_partition(scores, k)
