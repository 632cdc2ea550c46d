"""Every operation in a few lines of plain PyTorch: the definition, the CPU path and the oracle of the tests.

The functions here take arguments that the public functions have already checked. Shapes: B batch, N tokens, K chosen
tokens, D width, L levels. None of them synchronises with the host on CUDA, but for `attention_varlen`, which reads its
sequence lengths.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight, conv3d_input, conv3d_weight

from ._library import in_huge_pages, ops
from .philox import normals_of_blocks

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _LOW_PRECISION else dtype


def vector(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.tensor(values), on CUDA by fills: a copy from the host could not be captured in a graph."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    x = torch.empty(len(values), dtype=dtype, device=device)
    for i, value in enumerate(values):
        x[i].fill_(value)
    return x


# --- top-k ---------------------------------------------------------------------------------------------------------


def ordered_keys(scores: Tensor) -> Tensor:
    """Integers in the order of `scores`: NaN above infinity, -0.0 equal to 0.0."""
    x = scores.to(_compute_dtype(scores.dtype)) + 0.0  # -0.0 + 0.0 is 0.0
    integer = torch.int64 if x.dtype == torch.float64 else torch.int32
    bits = x.view(integer)
    largest = torch.iinfo(integer).max
    return torch.where(x.isnan(), largest, torch.where(bits < 0, bits ^ largest, bits))


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Boolean mask of the k largest along the last dimension; ties go to the lowest index."""
    n = scores.shape[-1]
    if k == 0 or k == n:
        return torch.full(scores.shape, k > 0, dtype=torch.bool, device=scores.device)
    if scores.is_cpu:
        threshold = scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        mask = (scores < threshold).logical_not_()  # k of each row at least, all where there is NaN
        if int(mask.count_nonzero()) == mask.numel() // n * k:  # else there are ties at the threshold
            return mask
    keys = ordered_keys(scores)
    # Not kthvalue: on CUDA it is refused where deterministic algorithms are asked for.
    threshold = keys.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = keys > threshold, keys == threshold
    missing = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))


def topk_partition(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n = scores.shape[-1]
    mask = topk_mask(scores, k)
    if mask.is_cpu:
        return _places(mask, k), _places(~mask, n - k)
    index = torch.arange(n, device=scores.device).expand(scores.shape)
    rank = mask.cumsum(-1)
    place = torch.where(mask, rank - 1, k + index - rank)  # selected first, then the rest, both ascending
    order = torch.empty(scores.shape, dtype=torch.int64, device=scores.device).scatter_(-1, place, index)
    return order[..., :k].clone(), order[..., k:].clone()


def topk(scores: Tensor, k: int) -> Tensor:
    return _places(topk_mask(scores, k), k) if scores.is_cpu else topk_partition(scores, k)[0]


def _places(mask: Tensor, k: int) -> Tensor:
    """Where the k of each row are; on CUDA the host would wait for it."""
    return mask.nonzero()[:, -1].clone(memory_format=torch.contiguous_format).view(*mask.shape[:-1], k)


_NUMBERS = 1 << 16  # of noise at a time, where rows are short


def _perturbed(scores: Tensor, sigma: float, samples: int, seed: int, row: int):
    """Noise [S, rows, N] and noisy scores, S samples at a time: memory O(N)."""
    blocks, together = -(-samples // 4), max(_NUMBERS // max(4 * scores.numel(), 1), 1)
    for first in range(0, blocks, together):
        some = range(first, min(first + together, blocks))
        noise = normals_of_blocks(*scores.shape, seed=seed, blocks=some, row=row, device=scores.device)
        noise = noise[: samples - 4 * first].to(scores.dtype)
        yield noise, scores + sigma * noise


def rows_of(x: Tensor) -> Tensor:
    """[..., N] -> [rows, N]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _rows(x: Tensor) -> Tensor:
    return rows_of(x).to(_compute_dtype(x.dtype))


def soft_topk(
    scores: Tensor, k: int, sigma: float, samples: int, seed: int, row: int, mask: Callable = topk_mask
) -> Tensor:
    rows = _rows(scores)
    total = torch.zeros_like(rows)
    for _, noisy in _perturbed(rows, sigma, samples, seed, row):
        total += mask(noisy, k).sum(0)
    return (total / samples).to(scores.dtype).reshape(scores.shape)


def soft_topk_backward(
    grad: Tensor, scores: Tensor, k: int, sigma: float, samples: int, seed: int, row: int, mask: Callable = topk_mask
) -> Tensor:
    rows, weight = _rows(scores), _rows(grad)
    # The control variate: the product at zero noise has mean zero once multiplied by z, and most of the variance.
    unperturbed = (weight * mask(rows, k)).sum(-1, keepdim=True)
    total = torch.zeros_like(rows)
    for z, noisy in _perturbed(rows, sigma, samples, seed, row):
        factors = (weight * mask(noisy, k)).sum(-1, keepdim=True) - unperturbed
        for factor, one in zip(factors, z, strict=True):  # in their order, however many came together
            total.addcmul_(factor, one)
    return (total / (samples * sigma)).to(scores.dtype).reshape(scores.shape)


# --- tokens --------------------------------------------------------------------------------------------------------


def _looked_at(indices: Tensor) -> bool:
    """Whether values may be read back: on a CPU, and with VMAE_CHECK=1 on any device, which then waits for it."""
    return indices.is_cpu or os.environ.get("VMAE_CHECK", "0") == "1"


def check_range(indices: Tensor, n: int) -> None:
    """Raise `ValueError` for an index outside [0, n), where values may be read back."""
    if _looked_at(indices) and indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= n:
            raise ValueError(f"indices: expected values in [0, {n}), got {low if low < 0 else high}")


def check_distinct(indices: Tensor, n: int, *, always: bool = True) -> None:
    """Raise `ValueError` for an index [B, K] in [0, n) that stands twice in a row, where values may be read back.

    `always`: on a CPU, even without VMAE_CHECK=1.
    """
    if _looked_at(indices) and (always or os.environ.get("VMAE_CHECK", "0") == "1"):
        there = torch.zeros(indices.shape[0], n, dtype=torch.bool, device=indices.device)
        try:
            there.scatter_(1, indices.long() if indices.is_cpu else in_range(indices, n), True)
        except RuntimeError:  # that an index lies outside is found on the way
            check_range(indices, n)
            raise
        if int(there.count_nonzero()) != indices.numel():
            raise ValueError("indices: expected distinct values in each row, got a value twice")


def in_range(indices: Tensor, n: int) -> Tensor:
    """int64 indices that lie in [0, n): clamped where a check would make the host wait."""
    check_range(indices, n)
    return indices.to(torch.int64) if indices.is_cpu else indices.to(torch.int64).clamp(0, max(n - 1, 0))


_FEW = 8  # rows: a call for each of them takes less than a flat index, which has to be checked, too


def _flat(indices: Tensor, n: int) -> Tensor:
    """Indices [B, K] into the rows of [B, N, D], as indices [B * K] into the rows of [B * N, D]."""
    offsets = torch.arange(0, indices.shape[0] * max(n, 1), max(n, 1), device=indices.device)
    return (indices + offsets[:, None]).flatten()


def gather_tokens(x: Tensor, indices: Tensor, unique: bool) -> Tensor:
    b, n, d = x.shape
    if unique:
        check_distinct(indices, n, always=False)
    if (x.is_cpu and b <= _FEW) or x.stride(0) != n * x.stride(1):  # flattening would copy all of x, to read a part
        y = x.new_empty(b, indices.shape[1], d)
        try:
            for row, index, to in zip(x, indices if x.is_cpu else in_range(indices, n), y, strict=True):
                torch.index_select(row, 0, index, out=to)
        except (IndexError, RuntimeError):
            check_range(indices, n)
            raise
        return y
    return x.flatten(0, 1).index_select(0, _flat(in_range(indices, n), n)).view(b, indices.shape[1], d)


def gather_tokens_backward(grad: Tensor, indices: Tensor, n: int, unique: bool) -> Tensor:
    b, _, d = grad.shape
    if unique:
        check_distinct(indices, n, always=False)
        return _placed(grad, indices, in_huge_pages(grad.new_empty(b, n, d)).zero_())
    total = in_huge_pages(grad.new_empty(b, n, d, dtype=_compute_dtype(grad.dtype))).zero_()
    flat, rows = _flat(in_range(indices, n), n), grad.flatten(0, 1).to(total.dtype)
    if grad.is_cpu:
        total.view(b * n, d).index_add_(0, flat, rows)
    else:  # index_add_ on CUDA adds in any order; this sorts first
        total.view(b * n, d).index_put_((flat,), rows, accumulate=True)
    return total.to(grad.dtype)


def _placed(rows: Tensor, indices: Tensor, x: Tensor) -> Tensor:
    """x [B, N, D] with rows [B, K, D] at distinct indices [B, K], which on a CPU have been checked."""
    b, n, d = x.shape
    if x.is_cpu and b <= _FEW:
        for to, index, some in zip(x, indices.long(), rows, strict=True):
            to.index_copy_(0, index, some)
        return x
    indices = indices if x.is_cpu else in_range(indices, n)
    x.view(b * n, d).index_copy_(0, _flat(indices, n), rows.flatten(0, 1))
    return x


def scatter_tokens(y: Tensor, indices: Tensor, n: int, fill: Tensor | None, value: float) -> Tensor:
    b, _, d = y.shape
    check_distinct(indices, n)
    x = in_huge_pages(y.new_empty(b, n, d))
    return _placed(y, indices, x.fill_(value) if fill is None else x.copy_(fill))


def scatter_tokens_fill_backward(grad: Tensor, indices: Tensor) -> Tensor:
    """The sum [D] of those rows of grad [B, n, D] that no index names."""
    b, n, d = grad.shape
    wide = _compute_dtype(grad.dtype)
    filled = torch.ones(b, n, dtype=torch.bool, device=grad.device).scatter_(1, in_range(indices, n), False)
    if not grad.is_cpu:
        return torch.where(filled[..., None], grad, 0).sum((0, 1), dtype=wide)
    total = torch.zeros(d, dtype=wide)
    for some, mask in zip(grad, filled, strict=True):
        for rows in mask.nonzero()[:, 0].split(1024):  # a block at a time stays in the cache
            total += some.index_select(0, rows).to(wide).sum(0)
    return total


def decoder_tokens(
    visible: Tensor, visible_indices: Tensor, selected_indices: Tensor, mask_token: Tensor, positions: Tensor
) -> Tensor:
    b, v, d = visible.shape
    indices = torch.cat((visible_indices.to(torch.int64), selected_indices.to(torch.int64)), dim=1)
    if positions.ndim == 2:
        placed = positions.index_select(0, in_range(indices, positions.shape[0]).flatten())
    else:
        placed = gather_tokens(positions, indices, False)
    # Sums are formed in the widest of the dtypes and rounded once.
    wide = torch.promote_types(torch.promote_types(visible.dtype, mask_token.dtype), positions.dtype)
    placed = placed.view(b, indices.shape[1], d).to(wide)
    placed[:, :v].add_(visible)
    placed[:, v:].add_(mask_token)
    return placed.to(visible.dtype)


def tubelet_view(video: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, T, H, W] as a view [B, T/t, H/h, W/w, t, h, w, C], whatever the memory layout."""
    t, h, w = size
    split = video.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))  # B C T/t t H/h h W/w w
    return split.permute(0, 2, 4, 6, 3, 5, 7, 1)


def _tubelet_place(indices: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gt, gh, gw = grid
    indices = in_range(indices, gt * gh * gw)
    batch = torch.arange(indices.shape[0], device=indices.device)[:, None]
    return batch, indices // (gh * gw), indices // gw % gh, indices % gw


def affine(mean: Sequence[float], std: Sequence[float], integer: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift per channel, so that the normalised value is x * scale + shift."""
    unit = 255.0 if integer else 1.0
    return tuple(1 / (unit * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))


def tubelets(
    video: Tensor, indices: Tensor, size: Sequence[int], mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    view = tubelet_view(video, size)
    chosen = view[_tubelet_place(indices, view.shape[1:4])]  # [B, K, t, h, w, C]
    compute = _compute_dtype(dtype)
    numbers = affine(mean, std, not video.is_floating_point())
    scale, shift = (vector(values, compute, video.device) for values in numbers)
    y = chosen.to(compute).flatten(-2)  # [B, K, t, h, w * C]: long rows keep the in-place passes fast
    y.mul_(scale.repeat(size[2])).add_(shift.repeat(size[2]))
    return y.flatten(2).to(dtype)


def tubelets_backward(
    grad: Tensor, indices: Tensor, shape: Sequence[int], size: Sequence[int], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    video = torch.zeros(*shape, dtype=_compute_dtype(dtype), device=grad.device)
    view = tubelet_view(video, size)
    scale = vector(affine([0.0] * len(std), std, False)[0], video.dtype, grad.device)
    patches = grad.unflatten(2, (*size, -1)).to(video.dtype) * scale
    view.index_put_(_tubelet_place(indices, view.shape[1:4]), patches, accumulate=True)
    return video.to(dtype)


# --- attention -----------------------------------------------------------------------------------------------------

_QUERY_BLOCK = 1024


def _kv_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` [B, S] of x [B, H, N, d], of a head side by side: so PyTorch attends to them faster."""
    b, h, _, d = x.shape
    gather = ops.gather_tokens
    if b > 1 and x.stride(1) < x.stride(2):  # flattening would copy all of x
        return gather(x.transpose(1, 2).flatten(2), indices, True).unflatten(2, (h, d)).transpose(1, 2).contiguous()
    return gather(x.flatten(0, 1), indices.repeat_interleave(h, dim=0), True).unflatten(0, (b, h))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, kv_indices: Tensor | None) -> Tensor:
    if kv_indices is not None:
        k, v = _kv_rows(k, kv_indices), _kv_rows(v, kv_indices)
    if q.numel() and bfloat16_on_cpu(q, k, v):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return ops.attention_cpu(q, k, v, scale)[0]
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def bfloat16_on_cpu(*tensors: Tensor) -> bool:
    """Whether attention over these is computed in bfloat16, on a CPU."""
    if any(x.device.type != "cpu" or x.dtype == torch.float64 for x in tensors):
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return tensors[0].dtype == torch.bfloat16


def whole_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """With numbers of the last dimension side by side: PyTorch's operation on a CPU reads others wrongly."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def attention_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = whole_rows(q, k, v)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return o, lse.contiguous()


_SMALL = 1 << 18  # scores per head: below, the calls cost more than they save
_SCORES, _HEADS = 1 << 21, 16  # per head, and heads, at a time: two such buffers hold 8 MiB a head


def attention_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """PyTorch's own backward multiplies many small blocks; this one, of bfloat16, multiplies few large ones.

    A product of bfloat16 matrices comes out rounded to bfloat16. So the log-sum-exp and the row sums are subtracted
    inside the products, as columns of their own, and only the differences are rounded. exp(score - lse) is shifted by
    half the logarithm of the number of keys, to where the rounding of its exponent costs least whether a query
    attends to all keys alike or to a single one.
    """
    b, h, m, d = q.shape
    n = k.shape[2]
    if q.dtype != torch.bfloat16 or m * n < _SMALL or not scale:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = backward(*whole_rows(grad, q, k, v, o), lse, 0.0, False, scale=scale)
        return tuple(_tokens_first(x) for x in grads)
    shift = math.log(n) / 2
    # exp(shift) is a factor of the weights, and is taken out of what they are multiplied by.
    delta = math.exp(-shift) * (grad.float() * o.float()).sum(-1)
    grad = _widened(grad * math.exp(-shift), _parts(-delta))
    q = _widened(q, _parts((shift - lse) / scale))
    k, v = (_widened(x, x.new_ones(()).expand(b, h, n, 3)) for x in (k, v))
    dq, dk, dv = q.new_empty(b * h, m, d), lse.new_zeros(b * h, n, d), lse.new_zeros(b * h, n, d)
    heads, rows = min(torch.get_num_threads(), _HEADS), -(-m // -(-m * n // _SCORES))
    buffers = q.new_empty(2, heads * n * rows)
    for head in (slice(i, i + heads) for i in range(0, b * h, heads)):
        for row in (slice(i, i + rows) for i in range(0, m, rows)):
            some_q, some_grad = q[head, row], grad[head, row]
            shape = (len(some_q), n, some_q.shape[1])
            weights, slopes = (x[: math.prod(shape)].view(shape) for x in buffers)
            torch.baddbmm(weights, k[head], some_q.transpose(1, 2), beta=0, alpha=scale, out=weights).exp_()
            torch.bmm(v[head], some_grad.transpose(1, 2), out=slopes).mul_(weights)
            dv[head] += weights @ some_grad[..., :d]
            dk[head] += slopes @ some_q[..., :d]
            dq[head, row] = slopes.transpose(1, 2) @ k[head, :, :d]
    return tuple(_tokens_first(x.to(q.dtype).view(b, h, -1, d)) for x in (dq.mul_(scale), dk.mul_(scale), dv))


def _tokens_first(x: Tensor) -> Tensor:
    """[B, H, M, d] in memory as [B, M, H, d]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _parts(x: Tensor) -> Tensor:
    """float32 [...] as bfloat16 numbers [..., 3] that add up to it."""
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return torch.stack(parts, -1)


def _widened(x: Tensor, columns: Tensor) -> Tensor:
    """[B, H, M, d] and [B, H, M, 3] -> [B * H, M, D]: side by side, and zeros up to a multiple of 32."""
    b, h, m, d = x.shape
    return torch.cat((x, columns, x.new_zeros(()).expand(b, h, m, -(d + 3) % 32)), -1).flatten(0, 1)


def check_offsets(total_q: int, total_k: int, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    """Raise `ValueError` for packed sequences that cannot be, where values may be read back."""
    if not _looked_at(cu_q):
        return
    for name, cu, total, longest in (("q", cu_q, total_q, max_q), ("k", cu_k, total_k, max_k)):
        starts = cu.tolist()
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        if starts[0] != 0 or starts[-1] != total or min(lengths, default=0) < 0:
            raise ValueError(f"cu_seqlens_{name}: expected offsets ascending from 0 to {total}, got {starts}")
        if max(lengths, default=0) > longest:
            raise ValueError(f"max_{name}: expected at least the longest sequence, {max(lengths)}, got {longest}")


def _sequences(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int):
    """(query rows, key rows) of every sequence that has both, where there are heads."""
    check_offsets(len(q), len(k), cu_q, cu_k, max_q, max_k)
    starts_q, starts_k = (itertools.pairwise(cu.tolist()) for cu in (cu_q, cu_k))
    for (first, end), (first_key, end_key) in zip(starts_q, starts_k, strict=True):
        if end > first and end_key > first_key and q.shape[1]:
            yield slice(first, end), slice(first_key, end_key)


def _unwritten(x: Tensor, rows: Iterable[slice], dtype: torch.dtype) -> Tensor:
    """In the shape of x, zeros unless `rows`, which do not overlap, are all of it."""
    whole = sum(some.stop - some.start for some in rows) == len(x)
    return (torch.empty if whole else torch.zeros)(x.shape, dtype=dtype, device=x.device)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]  # [M, H, d] -> [1, H, M, d]


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    """And the log-sum-exp [H, total_q], which is there on a CPU alone."""
    sequences = [*_sequences(q, k, cu_q, cu_k, max_q, max_k)]
    o = _unwritten(q, (rows for rows, _ in sequences), q.dtype)
    lse = torch.zeros(q.shape[1], len(q), dtype=_compute_dtype(q.dtype), device=q.device)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    for rows, keys in sequences:
        parts = (_heads_first(q[rows]), _heads_first(k[keys]), _heads_first(v[keys]))
        if q.is_cpu:
            some, lse[None, :, rows] = ops.attention_cpu(*parts, scale)
        else:
            some = F.scaled_dot_product_attention(*parts, scale=scale)
        o[rows] = some[0].transpose(0, 1)
    return o, lse


def attention_varlen_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
) -> tuple[Tensor, ...]:
    wide = _compute_dtype(q.dtype)
    sequences = [*_sequences(q, k, cu_q, cu_k, max_q, max_k)]
    at_once = q.is_cpu and q.dtype != torch.float64  # else gradients of k and v are sums
    places = [[rows for rows, _ in sequences], *2 * [[keys for _, keys in sequences if at_once]]]
    grads = tuple(_unwritten(x, written, wide) for x, written in zip((q, k, v), places, strict=True))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    for rows, keys in sequences:
        if at_once:
            g, a, b, c, d = (_heads_first(x) for x in (grad[rows], q[rows], k[keys], v[keys], o[rows]))
            some = ops.attention_cpu_backward(g, a, b, c, d, lse[None, :, rows], scale)
            for total, part, place in zip(grads, some, (rows, keys, keys), strict=True):
                total[place] = part[0].transpose(0, 1)
            continue
        kt, vt = (x[keys].transpose(0, 1).to(wide) for x in (k, v))  # [H, N, d]
        for first in range(rows.start, rows.stop, _QUERY_BLOCK):  # the scores are made again, a block at a time
            block = slice(first, min(first + _QUERY_BLOCK, rows.stop))
            qt, gt = (x[block].transpose(0, 1).to(wide) for x in (q, grad))  # [H, M, d]
            p = (qt @ kt.mT * scale).softmax(-1)
            dp = gt @ vt.mT
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
            grads[0][block] = (ds @ kt).transpose(0, 1)
            grads[1][keys] += (ds.mT @ qt).transpose(0, 1)
            grads[2][keys] += (p.mT @ gt).transpose(0, 1)
    return tuple(x.to(q.dtype) for x in grads)


# --- convolution ---------------------------------------------------------------------------------------------------


def memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last_3d if channels_last else torch.contiguous_format


def past_frames(x: Tensor, cache: Tensor | None, frames: int) -> Tensor:
    """The last `frames` frames of cache and x, as memory of its own; before the clip there are zeros."""
    b, c, t, h, w = x.shape
    past = torch.zeros((b, c, frames, h, w), dtype=x.dtype, device=x.device).contiguous(memory_format=memory_format(x))
    taken = min(t, frames)
    past[:, :, frames - taken :] = x[:, :, t - taken :]
    if cache is not None:
        past[:, :, : frames - taken] = cache[:, :, cache.shape[2] - (frames - taken) :]
    return past


def convolution_sizes(x: Tensor, weight: Tensor, stride: Sequence[int]) -> list[int]:
    """Of the result: [B, O, Z, P, Q]."""
    space = ((n + 2 * (k // 2) - k) // s + 1 for n, k, s in zip(x.shape[3:], weight.shape[3:], stride[1:], strict=True))
    return [x.shape[0], weight.shape[0], x.shape[2] // stride[0], *space]


def _with_past(x: Tensor, cache: Tensor | None, past: int) -> Tensor:
    if cache is None:
        shape = (*x.shape[:2], past, *x.shape[3:])
        cache = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x)).zero_()
    return torch.cat((cache, x), dim=2)


def _as_images(x: Tensor, size: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether to convolve a clip of this size in two dimensions: results as a batch, the kernel's frames as channels.

    PyTorch gives 3D convolutions of one clip to oneDNN only above 20480 (channels x frames x rows) or with kernels
    above 3 (`ConvParams::use_mkldnn`); its own are up to ten times slower. In two dimensions oneDNN takes them.
    """
    b, c, t, h, _ = size
    slow = b == 1 and c * t * h <= 20480 and min(kernel[1:]) <= 3 and max(kernel) > 1
    return slow and x.is_cpu and x.dtype == torch.float32


def _flat_format(layout: torch.memory_format) -> torch.memory_format:
    return torch.channels_last if layout == torch.channels_last_3d else torch.contiguous_format


def _frames_first(x: Tensor, layout: torch.memory_format) -> Tensor:
    return x[0].transpose(0, 1).contiguous(memory_format=_flat_format(layout))  # [1, C, T, H, W] -> [T, C, H, W]


def _windows(whole: Tensor, frames: int, stride: int) -> Tensor:
    """[1, C, T, H, W] -> [T', frames * C, H, W]: what each result sees."""
    windows = whole[0].unfold(1, frames, stride)  # [C, T', H, W, frames]
    if memory_format(whole) == torch.channels_last_3d:
        return windows.permute(1, 2, 3, 4, 0).flatten(3).permute(0, 3, 1, 2)
    return windows.permute(1, 4, 0, 2, 3).flatten(1, 2)


def _flat_weight(weight: Tensor, layout: torch.memory_format) -> Tensor:
    return weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=_flat_format(layout))  # [O, kt * C, kh, kw]


def causal_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor | None, stride: Sequence[int], silu: bool
) -> Tensor:
    layout, results, past = memory_format(x), x.shape[2] // stride[0], weight.shape[2] - stride[0]
    padding = (0, weight.shape[3] // 2, weight.shape[4] // 2)
    if _as_images(x, x.shape, weight.shape[2:]):
        windows = _windows(_with_past(x, cache, past), weight.shape[2], stride[0])
        y = F.conv2d(windows, _flat_weight(weight, layout), bias, tuple(stride[1:]), padding[1:])
        y = y.permute(0, 2, 3, 1)[None].permute(0, 4, 1, 2, 3)  # the batch's stride is then that of the format
    elif cache is None and results >= 8 * (past // stride[0]):
        # PyTorch pads both ends of time. The outputs after the last are dropped, which from some frames on takes less
        # time and memory than a padded copy of the input.
        y = F.conv3d(x, weight, bias, tuple(stride), (past, *padding[1:]))[:, :, :results]
    else:
        y = F.conv3d(_with_past(x, cache, past), weight, bias, tuple(stride), padding)
    y = y.contiguous(memory_format=layout)
    return F.silu(y, inplace=True) if silu else y


def causal_conv3d_input_gradient(
    dy: Tensor, weight: Tensor, stride: Sequence[int], size: Sequence[int], past: bool, layout: torch.memory_format
) -> tuple[Tensor, Tensor]:
    before = weight.shape[2] - stride[0]
    shape = (dy.shape[0], weight.shape[1], before + size[0], *size[1:])
    padding = (0, weight.shape[3] // 2, weight.shape[4] // 2)
    if _as_images(dy, (*shape[:2], *size), weight.shape[2:]):
        kt, results = weight.shape[2], dy.shape[2]
        flat, flat_weight = (results, kt * shape[1], *size[1:]), _flat_weight(weight, layout)
        windows = conv2d_input(flat, flat_weight, _frames_first(dy, layout), tuple(stride[1:]), padding[1:])
        full = torch.empty(shape, dtype=dy.dtype, memory_format=layout).zero_()
        for i, frame in enumerate(windows.unflatten(1, (kt, shape[1])).unbind(1)):
            full[0, :, i : i + stride[0] * results : stride[0]] += frame.transpose(0, 1)
    else:
        full = conv3d_input(shape, weight, dy, tuple(stride), padding)
    cut = before if past else 0
    return full[:, :, before:].contiguous(memory_format=layout), full[:, :, :cut].clone(memory_format=layout)


def causal_conv3d_weight_gradient(
    x: Tensor, cache: Tensor | None, dy: Tensor, kernel: Sequence[int], stride: Sequence[int]
) -> Tensor:
    whole = _with_past(x, cache, kernel[0] - stride[0])
    shape, padding = (dy.shape[1], x.shape[1], *kernel), (0, kernel[1] // 2, kernel[2] // 2)
    if _as_images(x, x.shape, kernel):
        flat = (shape[0], kernel[0] * shape[1], *kernel[1:])
        windows, frames = _windows(whole, kernel[0], stride[0]), _frames_first(dy, memory_format(x))
        dweight = conv2d_weight(windows, flat, frames, tuple(stride[1:]), padding[1:])
        return dweight.unflatten(1, (kernel[0], shape[1])).transpose(1, 2).contiguous()
    avx2 = x.is_cpu and x.dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if avx2 and min(x.shape[1], dy.shape[1]) >= 32:
        # There this gradient alone is up to twice as fast in the default format, both copies included; with fewer
        # channels up to four times slower.
        whole, dy = whole.contiguous(), dy.contiguous()
    return conv3d_weight(whole, shape, dy, tuple(stride), padding).contiguous()


# --- finite scalar quantization ------------------------------------------------------------------------------------


@functools.cache
def fsq_numbers(levels: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
    """Half range, offset, shift and half width per level."""
    half = tuple((level - 1) * (1 + 1e-3) / 2 for level in levels)
    offset = tuple(0.0 if level % 2 else 0.5 for level in levels)
    shift = tuple(math.atanh(o / h) for o, h in zip(offset, half, strict=True))
    return half, offset, shift, tuple(float(level // 2) for level in levels)


@functools.cache
def _fsq_places(levels: tuple[int, ...]) -> tuple[tuple[int, ...], int, bool]:
    """The weights of a code's digits, the code of all halves, and whether float32 products of digits and weights add up
    exactly even where they are made of bfloat16 numbers, as `torch.set_float32_matmul_precision` allows."""
    places = tuple(math.prod(levels[:i]) for i in range(len(levels)))
    lowest = sum(place * (level // 2) for place, level in zip(places, levels, strict=True))
    narrow = all(place // (place & -place) < 2**8 for place in places) and max(levels) <= 2**9
    return places, lowest, narrow and math.prod(levels) <= 2**24


def _fsq_constants(levels: Sequence[int], z: Tensor) -> Iterator[Any]:
    """`fsq_numbers`: a vector each, or a number where all levels are the same, which is several times faster on a CPU
    (and on CUDA would be divided by as by its rounded inverse)."""
    for values in fsq_numbers(tuple(levels)):
        yield values[0] if z.is_cpu and len(set(levels)) == 1 else vector(values, _compute_dtype(z.dtype), z.device)


def fsq(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    half, offset, shift, width = _fsq_constants(levels, z)
    rounded = (z.to(_compute_dtype(z.dtype)) + shift).tanh_().mul_(half).sub_(offset).round_()
    if max(levels) > 1000:  # the slack in the half range alone reaches the next value
        highest = vector([(level - 1) // 2 for level in levels], rounded.dtype, z.device)
        rounded = torch.minimum(torch.maximum(rounded, rounded.new_zeros(()) - width), highest)
    # A product with a vector, which is exact, takes half the time of a sum over the short last dimension.
    places, lowest, narrow = _fsq_places(tuple(levels))
    wide = rounded.dtype if z.is_cpu and narrow else torch.float64
    radix = vector(places, wide, z.device)
    if z.is_cpu:
        codes = rounded.to(wide) @ radix
        if math.isnan(codes.sum()):
            codes = rounded.nan_to_num(0.0).to(wide) @ radix
    else:
        codes = (rounded.nan_to_num(0.0).to(wide) * radix).sum(-1)
    return rounded.div_(width).to(z.dtype), codes.add_(lowest).to(torch.int32)


def fsq_backward(grad: Tensor, z: Tensor, levels: Sequence[int]) -> Tensor:
    half, _, shift, width = _fsq_constants(levels, z)
    tanh = (z.to(_compute_dtype(z.dtype)) + shift).tanh_()
    slope = torch.ops.aten.tanh_backward.grad_input(grad.to(tanh.dtype), tanh, grad_input=tanh)
    return slope.mul_(half / width).to(z.dtype)
