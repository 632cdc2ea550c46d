"""scatter_tokens against loops."""

import math
import re

import pytest
import torch

from vmae_kernels import gather_tokens, scatter_tokens

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distinct(b, k, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(b)])


def oracle(y, indices, n, fill):
    d = y.shape[2]
    filler = fill.to(y.dtype).detach() if isinstance(fill, torch.Tensor) else torch.full((d,), fill, dtype=y.dtype)
    x = filler.expand(y.shape[0], n, d).clone()
    for b, row in enumerate(indices.tolist()):
        for i, index in enumerate(row):
            x[b, index] = y[b, i]
    return x


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [0.0, 0.1, -3, math.inf, "vector", "rows"])
def test_places_and_fills(dtype, index_dtype, fill):
    y = rand(3, 4, 5, dtype=dtype)
    indices = distinct(3, 4, 9).to(index_dtype)
    shapes = {"vector": (5,), "rows": (3, 9, 5)}
    fill = rand(*shapes[fill], seed=1, dtype=dtype) if fill in shapes else fill
    x = scatter_tokens(y, indices, 9, fill=fill)
    assert x.dtype == dtype
    assert torch.equal(x, oracle(y, indices, 9, fill))


def gradients(dtype, fill):
    """Three tokens of a dtype placed among eight: where, a gradient, and what it makes for tokens and fill."""
    y, fill, indices = rand(2, 3, 4, dtype=dtype).requires_grad_(), fill.requires_grad_(), distinct(2, 3, 8)
    x = scatter_tokens(y, indices, 8, fill=fill)
    assert x.dtype == dtype
    assert torch.equal(x, oracle(y.detach(), indices, 8, fill))
    grad = rand(2, 8, 4, seed=2, dtype=dtype)
    grad_y, grad_fill = torch.autograd.grad(x, (y, fill), grad)
    assert grad_y.dtype == dtype
    assert grad_fill.dtype == fill.dtype
    return indices, grad, grad_y, grad_fill


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill_dtype", DTYPES)
def test_fill_is_cast_and_its_gradient_cast_back(dtype, fill_dtype):
    indices, grad, grad_y, grad_fill = gradients(dtype, rand(4, seed=1, dtype=fill_dtype))
    wanted = torch.zeros(4, dtype=torch.float64)
    for b in range(2):
        for i in range(8):
            if i in indices[b].tolist():
                assert torch.equal(grad_y[b, indices[b].tolist().index(i)], grad[b, i])
            else:
                wanted += grad[b, i].double()
    torch.testing.assert_close(grad_fill.double(), wanted, rtol=torch.finfo(fill_dtype).eps, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill_dtype", DTYPES)
def test_tokens_among_others_get_the_gradients_of_their_places(dtype, fill_dtype):
    indices, grad, grad_y, grad_fill = gradients(dtype, rand(2, 8, 4, seed=1, dtype=fill_dtype))
    wanted = grad.clone()
    for b in range(2):
        for i, index in enumerate(indices[b].tolist()):
            assert torch.equal(grad_y[b, i], grad[b, index])
            wanted[b, index] = 0
    assert torch.equal(grad_fill, wanted.to(fill_dtype))


def test_a_table_expanded_over_the_batch():
    y, table = rand(3, 2, 4).requires_grad_(), rand(6, 4, seed=1).requires_grad_()
    indices = distinct(3, 2, 6)
    x = scatter_tokens(y, indices, 6, fill=table.expand(3, -1, -1))
    assert torch.equal(x, oracle(y.detach(), indices, 6, table))
    (grad,) = torch.autograd.grad(x.sum(), table)
    wanted = 3 - torch.bincount(indices.flatten(), minlength=6)
    assert torch.equal(grad, wanted.float()[:, None].expand(6, 4))


def test_gradient_of_fill_does_not_stall_in_bfloat16():
    y = torch.zeros(3, 1, 2, dtype=torch.bfloat16)
    fill = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    x = scatter_tokens(y, torch.zeros(3, 1, dtype=torch.int32), 801, fill=fill)
    (gradient,) = torch.autograd.grad(x, fill, torch.ones_like(x))
    assert gradient.tolist() == [2400.0, 2400.0]


def test_strides():
    y = rand(5, 3, 2, 4).permute(2, 1, 0, 3)[:, :, 1]
    indices = distinct(3, 2, 6).T
    fill = rand(8, seed=1)[::2]
    assert not y.is_contiguous()
    assert not indices.is_contiguous()
    assert torch.equal(scatter_tokens(y, indices, 6, fill=fill), oracle(y, indices, 6, fill))
    y = rand(1, 1, 4).expand(2, 3, 4)
    assert torch.equal(scatter_tokens(y, indices, 6), oracle(y, indices, 6, 0.0))
    for fill in (torch.tensor([2.0]).expand(4), rand(4, 6, 2, seed=1).permute(2, 1, 0), rand(1, 6, 1).expand(2, 6, 4)):
        assert torch.equal(scatter_tokens(y, indices, 6, fill=fill), oracle(y, indices, 6, fill))


def test_inverse_of_gather():
    x, indices = rand(2, 9, 3), distinct(2, 9, 9)
    assert torch.equal(scatter_tokens(gather_tokens(x, indices), indices, 9), x)


def test_inputs_unchanged():
    y, fill, indices = rand(2, 3, 4), rand(4, seed=1), distinct(2, 3, 6)
    kept = y.clone(), fill.clone(), indices.clone()
    scatter_tokens(y, indices, 6, fill=fill).zero_()
    assert all(torch.equal(a, b) for a, b in zip((y, fill, indices), kept, strict=True))


@pytest.mark.parametrize(("b", "k", "n", "d"), [(2, 0, 4, 3), (2, 0, 0, 3), (0, 2, 4, 3), (2, 4, 4, 3), (2, 2, 4, 0)])
def test_edges(b, k, n, d):
    y = rand(b, k, d).requires_grad_()
    indices = torch.arange(k).expand(b, k)
    for shape in ((d,), (b, n, d)):
        fill = torch.full(shape, 7.0, requires_grad=True)
        x = scatter_tokens(y, indices, n, fill=fill)
        assert torch.equal(x, oracle(y.detach(), indices, n, fill))
        grad_y, grad_fill = torch.autograd.grad(x.sum(), (y, fill))
        assert torch.equal(grad_y, torch.ones_like(y))
        wanted = torch.ones(b, n, d)
        wanted[:, :k] = 0
        assert torch.equal(grad_fill, wanted if fill.ndim == 3 else wanted.sum((0, 1)))


def test_gradcheck():
    y, fill = rand(2, 3, 2, dtype=torch.float64).requires_grad_(), rand(2, seed=1, dtype=torch.float64).requires_grad_()
    indices = distinct(2, 3, 5)
    assert torch.autograd.gradcheck(lambda y, fill: scatter_tokens(y, indices, 5, fill=fill), (y, fill))
    assert torch.autograd.gradcheck(lambda y: scatter_tokens(y, indices, 5, fill=1.5), (y,))
    assert torch.autograd.gradcheck(lambda fill: scatter_tokens(y.detach(), indices, 5, fill=fill), (fill,))
    assert torch.autograd.gradgradcheck(lambda y, fill: scatter_tokens(y, indices, 5, fill=fill).square(), (y, fill))
    among = rand(2, 5, 2, seed=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda y, fill: scatter_tokens(y, indices, 5, fill=fill), (y, among))
    assert torch.autograd.gradgradcheck(lambda y, fill: scatter_tokens(y, indices, 5, fill=fill).square(), (y, among))


@pytest.mark.large
def test_more_memory_than_is_kept():
    """From 32 MiB on it is new to the process, and may come in huge pages."""
    n, d = 9001, 1000
    y, indices, fill = rand(1, 5, d), torch.tensor([[0, 9000, 3, 4500, 77]]), rand(d, seed=1)
    x = scatter_tokens(y, indices, n, fill=fill)
    assert torch.equal(x, oracle(y, indices, n, fill))
    (grad,) = torch.autograd.grad(gather_tokens(x.requires_grad_(), indices), x, y)
    assert torch.equal(grad, oracle(y, indices, n, 0.0))


@pytest.mark.parametrize("b", [1, 8, 9])
@pytest.mark.parametrize("fill", [0.5, "vector", "rows"])
def test_few_rows_and_many(b, fill):
    y, indices = rand(b, 3, 4), distinct(b, 3, 7)
    fill = {"vector": rand(4, seed=1), "rows": rand(b, 7, 4, seed=1)}.get(fill, fill)
    assert torch.equal(scatter_tokens(y, indices, 7, fill=fill), oracle(y, indices, 7, fill))
    for row, bad in ((0, 7), (0, -1), (b - 1, 7), (b - 1, -1)):
        wrong = indices.clone()
        wrong[row, 1] = bad
        with pytest.raises(ValueError, match=rf"indices: expected values in \[0, 7\), got {bad}"):
            scatter_tokens(y, wrong, 7, fill=fill)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, 6, 2**31 - 1])
def test_out_of_range(bad, index_dtype):
    with pytest.raises(ValueError, match=rf"{bad}(?s:.*)6|6(?s:.*){bad}"):
        scatter_tokens(rand(2, 2, 3), torch.tensor([[0, 1], [3, bad]], dtype=index_dtype), 6)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_repeated_index(index_dtype):
    with pytest.raises(ValueError, match="distinct"):
        scatter_tokens(rand(2, 3, 3), torch.tensor([[0, 1, 2], [3, 1, 3]], dtype=index_dtype), 6)
    # The same index in two rows of the batch is no repetition.
    scatter_tokens(rand(2, 2, 3), torch.tensor([[0, 1], [0, 1]], dtype=index_dtype), 2)


def test_errors():
    y, indices = rand(2, 2, 3), torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(ValueError, match=r"n: .*at least 2.*got 1"):
        scatter_tokens(y, indices, 1)
    for n, name in ((True, "bool"), (4.0, "float")):
        with pytest.raises(TypeError, match=rf"n: .*integer.*got {name}"):
            scatter_tokens(y, indices, n)
    with pytest.raises(TypeError, match=r"y: .*floating point.*int64"):
        scatter_tokens(y.long(), indices, 6)
    with pytest.raises(TypeError, match=r"indices: .*int32, int64.*got float32"):
        scatter_tokens(y, indices.float(), 6)
    with pytest.raises(ValueError, match=r"y: .*\[B, K, D\].*got \[2, 3\]"):
        scatter_tokens(y[0], indices, 6)
    with pytest.raises(ValueError, match=r"indices: .*K = 2.*got \[2, 1\]"):
        scatter_tokens(y, indices[:, :1], 6)
    with pytest.raises(ValueError, match=r"indices: .*B = 2.*got \[1, 2\]"):
        scatter_tokens(y, indices[:1], 6)
    with pytest.raises(ValueError, match=r"fill: .*D = 3.*got \[2\]"):
        scatter_tokens(y, indices, 6, fill=torch.zeros(2))
    with pytest.raises(ValueError, match=r"fill: .*n = 6.*got \[2, 7, 3\]"):
        scatter_tokens(y, indices, 6, fill=torch.zeros(2, 7, 3))
    with pytest.raises(ValueError, match=r"fill: .*B = 2.*got \[1, 6, 3\]"):
        scatter_tokens(y, indices, 6, fill=torch.zeros(1, 6, 3))
    for shape in ([], [6, 3]):
        with pytest.raises(ValueError, match=r"fill: .*\[D\] or \[B, n, D\], got \[" + re.escape(str(shape)[1:])):
            scatter_tokens(y, indices, 6, fill=torch.zeros(shape))
    with pytest.raises(ValueError, match=r"fill: .*device of y, cpu, got meta"):
        scatter_tokens(y, indices, 6, fill=torch.zeros(3, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["dense", "transposed", "the same everywhere"])
def test_the_fills_gradient_is_the_sum_of_the_rows_it_filled(dtype, layout):
    """Of no other, whatever their gradients are, and without losing digits over many rows."""
    g = torch.Generator().manual_seed(0)
    b, n, k, d = 3, 700, 100, 5
    indices = torch.rand(b, n, generator=g).argsort(1)[:, :k]
    grad = torch.randn(b, n, d, generator=g).to(dtype) + 1
    if layout == "dense":
        grad.scatter_(1, indices[..., None].expand(-1, -1, d), torch.nan)
    elif layout == "transposed":
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        grad = grad[:1, :1, :1].expand(b, n, d)
    fill = torch.zeros(d, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
    x = scatter_tokens(torch.zeros(b, k, d, dtype=dtype), indices, n, fill=fill)
    (got,) = torch.autograd.grad(x, fill, grad)
    filled = torch.ones(b, n, dtype=torch.bool).scatter(1, indices, False)
    wanted = grad.double()[filled].sum(0)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-12 if dtype == torch.float64 else 2e-6, atol=0)
