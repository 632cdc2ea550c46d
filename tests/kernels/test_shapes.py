"""Operations on tensors of drawn shapes, strides and values, against their definitions one element at a time.

What each file of this folder tests in particular is not drawn again: here it is sizes from 0 on, and layouts.
"""

import math
import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vmae_kernels import (
    attention,
    attention_varlen,
    decoder_tokens,
    fsq,
    gather_tokens,
    scatter_tokens,
    soft_topk,
    tubelets,
)
from vmae_kernels.philox import normals

FEW = os.environ.get("TRITON_INTERPRET", "0") == "1" or "VMAE_MACHINE" in os.environ  # where each takes long
drawn = settings(max_examples=25 if FEW else 100, deadline=None, derandomize=True, database=None)
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 6e4, 3e38]


@st.composite
def laid_out(draw, shape, dtype=torch.float32, special=False):
    """Random numbers in a tensor of this shape, whose dimensions may lie in any order, apart, and behind an offset."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 2, 3])) for _ in shape]
    offset = draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    storage = torch.full((math.prod(size * step for size, step in zip(shape, steps, strict=True)) + offset,), math.nan)
    whole = storage[offset:].view([shape[i] * steps[i] for i in order])
    x = whole.permute([order.index(i) for i in range(len(shape))])
    for dimension, step in enumerate(steps):
        x = x.narrow(dimension, 0, x.shape[dimension])[(slice(None),) * dimension + (slice(None, None, step),)]
    values = torch.randn(shape, generator=generator)
    if special and values.numel():
        places = torch.randint(values.numel(), (3,), generator=generator)
        values.view(-1)[places] = torch.tensor(draw(st.lists(st.sampled_from(SPECIAL), min_size=3, max_size=3)))
    x.copy_(values)
    return x if dtype == torch.float32 else _converted(x, dtype)


def _converted(x, dtype):
    """In the same layout, gaps and all."""
    end = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    flat = torch.as_strided(x, (end,), (1,)).to(dtype)
    return torch.as_strided(flat, x.shape, x.stride(), 0)


@st.composite
def some_indices(draw, b, n, k, distinct=True):
    """[b, k] in [0, n), of either type, perhaps a part of a wider tensor."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    if distinct:
        rows = torch.rand(b, n, generator=generator).argsort(1)[:, :k]
    else:
        rows = torch.randint(max(n, 1), (b, k), generator=generator)
    rows = rows.to(draw(st.sampled_from([torch.int32, torch.int64])))
    if draw(st.booleans()):
        rows = torch.stack((rows, rows + 1), -1)[..., 0]
    return rows


def identical(x, wanted):
    """NaN is NaN, and zeros keep their signs."""
    assert x.dtype == wanted.dtype
    assert x.shape == wanted.shape
    assert torch.equal(x.isnan(), wanted.isnan())
    x, wanted = x.nan_to_num(7.0), wanted.nan_to_num(7.0)
    assert torch.equal(x, wanted)
    assert torch.equal(x.signbit(), wanted.signbit())


FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


@drawn
@given(st.data())
def test_gather_and_scatter(data):
    b, n, d = (data.draw(st.integers(low, high)) for low, high in ((0, 3), (1, 40), (0, 70)))
    k, dtype = data.draw(st.integers(0, n)), data.draw(FLOATS)
    x = data.draw(laid_out((b, n, d), dtype, special=True)).requires_grad_()
    rows = data.draw(some_indices(b, n, k))
    y = gather_tokens(x, rows, unique=True)
    wanted = torch.stack([x.detach()[i][rows[i].long()] for i in range(b)]) if b else x.detach()[:, :k]
    identical(y.detach(), wanted)
    grad = data.draw(laid_out((b, k, d), dtype, special=True))
    placed = torch.zeros(b, n, d, dtype=dtype)
    for i in range(b):
        placed[i, rows[i].long()] = grad[i]
    identical(torch.autograd.grad(y, x, grad)[0], placed)
    fill = data.draw(st.sampled_from([(d,), (b, n, d)]).flatmap(lambda shape: laid_out(shape, dtype)))
    whole = fill.expand(b, n, d).clone()
    for i in range(b):
        whole[i, rows[i].long()] = grad[i]
    identical(scatter_tokens(grad, rows, n, fill=fill), whole)


@drawn
@given(st.data())
def test_gather_with_duplicates(data):
    b, n, k, d = (data.draw(st.integers(low, high)) for low, high in ((0, 3), (1, 9), (0, 40), (0, 70)))
    dtype = data.draw(FLOATS)
    x = data.draw(laid_out((b, n, d), dtype)).requires_grad_()
    rows = data.draw(some_indices(b, n, k, distinct=False))
    y = gather_tokens(x, rows)
    grad = data.draw(laid_out((b, k, d), dtype))
    wanted = torch.zeros(b, n, d, dtype=torch.float64)
    for i in range(b):
        for j in range(k):
            wanted[i, rows[i, j]] += grad[i, j].double()
    got = torch.autograd.grad(y, x, grad)[0]
    torch.testing.assert_close(got, wanted.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@drawn
@given(st.data())
def test_decoder_tokens(data):
    b, v, k, n, d = (data.draw(st.integers(low, high)) for low, high in ((0, 3), (0, 9), (0, 9), (1, 20), (0, 70)))
    dtype, shared = data.draw(FLOATS), data.draw(st.booleans())
    visible, mask = data.draw(laid_out((b, v, d), dtype)), data.draw(laid_out((d,), data.draw(FLOATS)))
    positions = data.draw(laid_out((n, d) if shared else (b, n, d), data.draw(FLOATS)))
    seen, picked = (data.draw(some_indices(b, n, size, distinct=False)) for size in (v, k))
    z = decoder_tokens(visible, seen, picked, mask, positions)
    assert z.shape == (b, v + k, d)
    wide = torch.promote_types(torch.promote_types(dtype, mask.dtype), positions.dtype)
    for i in range(b):
        table = positions if shared else positions[i]
        wanted = torch.cat((visible[i].to(wide) + table[seen[i].long()], mask.to(wide) + table[picked[i].long()]))
        identical(z[i], wanted.to(dtype))


@drawn
@given(st.data())
def test_tubelets(data):
    b, c = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 4))
    size = [data.draw(st.integers(1, 3)) for _ in range(3)]
    grid = [data.draw(st.integers(1, 3)) for _ in range(3)]
    shape = (b, c, *(part * number for part, number in zip(size, grid, strict=True)))
    video = data.draw(laid_out(shape))
    if data.draw(st.booleans()):
        video = _converted(video.mul(40).add(128).clamp(0, 255), torch.uint8)
    rows = data.draw(some_indices(b, math.prod(grid), data.draw(st.integers(0, 6)), distinct=False))
    mean, std = [0.1 * i for i in range(c)], [0.5 + 0.1 * i for i in range(c)]
    patches = tubelets(video, rows, size=size, mean=mean, std=std)
    unit = 255.0 if video.dtype == torch.uint8 else 1.0
    for i in range(b):
        for j, index in enumerate(rows[i].tolist()):
            t, h, w = index // (grid[1] * grid[2]), index // grid[2] % grid[1], index % grid[2]
            part = video[i, :, t * size[0] :, h * size[1] :, w * size[2] :][:, : size[0], : size[1], : size[2]].double()
            wanted = (part / unit - torch.tensor(mean).double().view(-1, 1, 1, 1)) / torch.tensor(std).double().view(
                -1, 1, 1, 1
            )
            torch.testing.assert_close(
                patches[i, j].double(), wanted.permute(1, 2, 3, 0).flatten(), rtol=1e-5, atol=1e-5
            )


def softmax_attention(q, k, v):
    """[..., M, d] in float64; 0 where there are no keys."""
    q, k, v = (x.double() for x in (q, k, v))
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v if k.shape[-2] else torch.zeros_like(q)


@drawn
@given(st.data())
def test_attention(data):
    b, h, m, n = (data.draw(st.integers(low, high)) for low, high in ((0, 2), (1, 3), (0, 40), (1, 40)))
    d, dtype = (
        data.draw(st.sampled_from([16, 17, 24, 48, 80, 128])),
        data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )
    q, k, v = (data.draw(laid_out((b, h, length, d), dtype)) for length in (m, n, n))
    rows = data.draw(st.none() | some_indices(b, n, data.draw(st.integers(1, n))))
    o = attention(q, k, v, kv_indices=rows)
    assert o.shape == q.shape
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for i in range(b):
        chosen = slice(None) if rows is None else rows[i].long()
        wanted = softmax_attention(q[i], k[i][:, chosen], v[i][:, chosen])
        torch.testing.assert_close(o[i].double(), wanted, rtol=tolerance, atol=tolerance)


@drawn
@given(st.data())
def test_attention_varlen(data):
    sequences, h = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 3))
    lengths = [[data.draw(st.integers(0, 40)) for _ in range(sequences)] for _ in range(2)]
    cu_q, cu_k = (torch.tensor([0, *x], dtype=torch.int32).cumsum(0, dtype=torch.int32) for x in lengths)
    q, k, v = (data.draw(laid_out((sum(lengths[i]), h, 32))) for i in (0, 1, 1))
    bounds = [max(x, default=0) + data.draw(st.integers(0, 3)) for x in lengths]
    o = attention_varlen(q, k, v, cu_q, cu_k, *bounds)
    assert o.shape == q.shape
    for i in range(sequences):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        wanted = softmax_attention(*(x.transpose(0, 1) for x in (q[rows], k[keys], v[keys]))).transpose(0, 1)
        torch.testing.assert_close(o[rows].double(), wanted, rtol=1e-5, atol=1e-5)


@drawn
@given(st.data())
def test_fsq(data):
    levels = data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=6))
    shape = (*data.draw(st.lists(st.integers(0, 6), max_size=3)), len(levels))
    z = data.draw(laid_out(shape, special=True))
    quantized, codes = fsq(z, levels)
    digits = torch.zeros(shape[:-1], dtype=torch.int64)
    for i, level in reversed(list(enumerate(levels))):
        width = level // 2
        place = quantized[..., i].double() * width
        assert torch.equal(place.isnan(), z[..., i].isnan())
        place = place.nan_to_num(0.0)
        assert ((place - place.round()).abs() < 1e-4).all()
        place = place.round()
        assert ((place >= -width) & (place <= (level - 1) // 2)).all()
        # No value is nearer: tanh's image of z lies within half a step of it.
        half = (level - 1) * 1.001 / 2
        offset = 0.0 if level % 2 else 0.5
        bounded = torch.tanh(z[..., i].double() + math.atanh(offset / half)) * half - offset
        assert ((bounded - place).abs().nan_to_num(0.0) <= 0.5 + 1e-4).all()
        digits = digits * level + (place + width).long()
    assert torch.equal(codes.long(), digits)


@drawn
@given(st.data())
def test_soft_topk(data):
    rows, n = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 30))
    k, samples = data.draw(st.integers(0, n)), data.draw(st.integers(1, 9))
    scores = data.draw(laid_out((rows, n))).requires_grad_()
    seed = data.draw(st.integers(-5, 2**70))
    weights = soft_topk(scores, k, sigma=0.5, samples=samples, seed=seed)
    counts = weights.detach() * samples
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-5)
    blocks = [normals(rows, n, seed=seed, block=i, device=torch.device("cpu")) for i in range(-(-samples // 4))]
    order = (scores.detach() + 0.5 * torch.cat(blocks)[:samples]).argsort(dim=-1, descending=True, stable=True)
    wanted = torch.zeros(samples, rows, n).scatter(2, order[..., :k], 1.0).sum(0)
    torch.testing.assert_close(counts, wanted, rtol=0, atol=1e-5)
    assert ((counts >= 0) & (counts <= samples + 1e-5)).all()
    torch.testing.assert_close(weights.detach().sum(-1), torch.full((rows,), float(k)))
    (grad,) = torch.autograd.grad(weights, scores, data.draw(laid_out((rows, n))))
    assert grad.isfinite().all()
    if k in (0, n):  # the same whatever the noise
        assert not grad.any()
