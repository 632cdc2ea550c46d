"""gather_tokens against loops."""

import pytest
import torch

from vmae_kernels import _csrc, gather_tokens

WAYS = ["torch", pytest.param("csrc", marks=pytest.mark.skipif(_csrc.missing() is not None, reason="not built"))]


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(x, indices):
    rows = [[x[b, i] for i in row] for b, row in enumerate(indices.tolist())]
    return torch.stack([torch.stack(row) for row in rows])


def oracle_gradient(grad, indices, n):
    total = torch.zeros(grad.shape[0], n, grad.shape[2], dtype=torch.float64)
    for b, row in enumerate(indices.tolist()):
        for i, index in enumerate(row):
            total[b, index] += grad[b, i].double()
    return total


INDICES = [[0, 5, 5, 2, 5, 6, 0], [6, 6, 6, 6, 6, 6, 6], [3, 1, 4, 1, 5, 0, 2]]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_duplicates(dtype, index_dtype):
    x = rand(3, 7, 5, dtype=dtype).requires_grad_()
    indices = torch.tensor(INDICES, dtype=index_dtype)
    y = gather_tokens(x, indices)
    assert y.dtype == dtype
    assert torch.equal(y, oracle(x.detach(), indices))
    grad = rand(3, 7, 5, seed=1, dtype=dtype)
    (gradient,) = torch.autograd.grad(y, x, grad)
    assert gradient.dtype == dtype
    # Added up in float32 at least, and rounded once.
    wide = torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(
        gradient.double(),
        oracle_gradient(grad, indices, 7),
        rtol=torch.finfo(dtype).eps,
        atol=8 * torch.finfo(wide).eps,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_duplicates_do_not_stall(dtype):
    """Ones added one by one in bfloat16 stop at 256, in float16 at 2048."""
    count = 2400
    x = torch.zeros(1, 3, 2, dtype=dtype, requires_grad=True)
    y = gather_tokens(x, torch.ones(1, count, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert gradient[0].tolist() == [[0, 0], [count, count], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_any_dtype(dtype):
    x = (rand(2, 6, 3) * 9).abs().to(dtype)
    indices = torch.tensor([[5, 0, 1], [2, 2, 4]])
    y = gather_tokens(x, indices)
    assert y.dtype == dtype
    assert torch.equal(y, oracle(x, indices))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_unique(index_dtype):
    x = rand(2, 9, 4).requires_grad_()
    indices = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(s))[:5] for s in (0, 1)])
    grad = rand(2, 5, 4, seed=1)
    results = []
    for unique in (True, False):
        y = gather_tokens(x, indices.to(index_dtype), unique=unique)
        results.append((y, *torch.autograd.grad(y, x, grad)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][1].double(), oracle_gradient(grad, indices, 9))


def test_strides():
    base = rand(4, 9, 2, 3)
    indices = torch.tensor([[8, 0, 0], [1, 2, 3]])
    for x in (base.permute(2, 1, 3, 0)[:, :, 1], base[0].transpose(0, 1), base[:1, :, 0].expand(2, 9, 3)):
        assert not x.is_contiguous()
        assert torch.equal(gather_tokens(x, indices), oracle(x, indices))
        assert torch.equal(gather_tokens(x, indices.T.contiguous().T), oracle(x, indices))
        expanded = torch.tensor([[4], [5]]).expand(2, 3)
        assert torch.equal(gather_tokens(x, expanded), oracle(x, expanded))
    # A gradient that comes expanded, as from a sum.
    x = rand(2, 9, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(gather_tokens(x, indices).sum(), x)
    assert torch.equal(gradient.double(), oracle_gradient(torch.ones(2, 3, 3), indices, 9))


def test_result_owns_its_memory():
    x = rand(1, 4, 2)
    y = gather_tokens(x, torch.arange(4)[None])
    y.zero_()
    assert x.all()


def test_expanded_input_sums_its_gradient():
    x = rand(1, 5, 3, dtype=torch.float64).requires_grad_()
    indices = torch.tensor([[0, 1], [1, 1]])
    y = gather_tokens(x.expand(2, 5, 3), indices)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert gradient[0, :, 0].tolist() == [1, 3, 0, 0, 0]


@pytest.mark.parametrize(("b", "n", "k", "d"), [(2, 4, 0, 3), (2, 0, 0, 3), (0, 4, 2, 3), (2, 4, 2, 0), (1, 1, 1, 1)])
def test_empty(b, n, k, d):
    x = torch.ones(b, n, d, requires_grad=True)
    y = gather_tokens(x, torch.zeros(b, k, dtype=torch.int64))
    assert y.shape == (b, k, d)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.shape == (b, n, d)
    assert gradient.sum() == b * k * d


@pytest.mark.parametrize("unique", [False, True])
def test_gradcheck(unique):
    x = rand(2, 5, 3, dtype=torch.float64).requires_grad_()
    indices = torch.tensor([[4, 0, 2], [1, 3, 0]] if unique else [[4, 0, 4], [1, 1, 1]])
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, indices, unique=unique), x)
    assert torch.autograd.gradgradcheck(lambda x: gather_tokens(x, indices, unique=unique), x)


def test_deterministic_gradient():
    x = rand(2, 50, 8).requires_grad_()
    indices = torch.randint(50, (2, 400), generator=torch.Generator().manual_seed(0))
    grad = rand(2, 400, 8, seed=1)
    first = torch.autograd.grad(gather_tokens(x, indices), x, grad)[0]
    for _ in range(3):
        assert torch.equal(torch.autograd.grad(gather_tokens(x, indices), x, grad)[0], first)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("unique", [False, True])
def test_out_of_range(bad, index_dtype, unique):
    indices = torch.tensor([[0, 1], [3, bad]], dtype=index_dtype)
    with pytest.raises(ValueError, match=rf"{bad}(?s:.*)4|4(?s:.*){bad}"):
        gather_tokens(rand(2, 4, 3), indices, unique=unique)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("b", [1, 3, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_each_way_of_a_cpu(way, index_dtype, b, dtype, monkeypatch):
    """Few rows and many, side by side or not, by PyTorch or compiled; each finds an index that lies outside."""
    monkeypatch.setenv("VMAE_KERNELS", way)
    indices = torch.randint(9, (6, b), generator=torch.Generator().manual_seed(b)).to(index_dtype).T
    whole = rand(b + 1, 9, 8, seed=1).to(dtype)
    for x in (whole[1:], whole[1:].conj(), whole[1:, :, 2:7], whole[:-1].transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(gather_tokens(x, indices), oracle(x, indices))
    for x in (whole[1:], whole[1:].mT.contiguous().mT):
        for row, bad in ((0, 9), (0, -1), (b - 1, 9), (b - 1, -1)):  # in a flat index some are others' rows
            wrong = indices.clone()
            wrong[row, 3] = bad
            with pytest.raises(ValueError, match=rf"indices: expected values in \[0, 9\), got {bad}"):
                gather_tokens(x, wrong)


@pytest.mark.parametrize("b", [1, 3, 30])
@pytest.mark.parametrize("unique", [False, True])
def test_gradients_of_few_rows_and_many(b, unique):
    g = torch.Generator().manual_seed(b)
    indices = torch.rand(b, 9, generator=g).argsort(1)[:, :6] if unique else torch.randint(9, (b, 6), generator=g)
    x, grad = rand(b, 9, 4).requires_grad_(), rand(b, 6, 4, seed=1)
    (got,) = torch.autograd.grad(gather_tokens(x, indices, unique=unique), x, grad)
    torch.testing.assert_close(got.double(), oracle_gradient(grad, indices, 9), rtol=1e-6, atol=1e-6)


def test_no_rows_to_choose_from():
    with pytest.raises(ValueError, match="0"):
        gather_tokens(torch.zeros(1, 0, 3), torch.zeros(1, 1, dtype=torch.int64))


def test_errors():
    x, indices = rand(2, 4, 3), torch.zeros(2, 2, dtype=torch.int64)
    for dtype in (torch.float32, torch.int16, torch.uint8, torch.bool):
        with pytest.raises(TypeError, match=rf"indices.*int32, int64.*got {str(dtype).removeprefix('torch.')}"):
            gather_tokens(x, indices.to(dtype))
    with pytest.raises(ValueError, match=r"x: .*\[B, N, D\].*got \[4, 3\]"):
        gather_tokens(x[0], indices)
    with pytest.raises(ValueError, match=r"indices: .*\[B, K\].*got \[2\]"):
        gather_tokens(x, indices[0])
    with pytest.raises(ValueError, match=r"indices: .*B = 2.*got \[1, 2\]"):
        gather_tokens(x, indices[:1])
    with pytest.raises(TypeError, match=r"indices: .*tensor.*got list"):
        gather_tokens(x, [[0], [1]])
    with pytest.raises(TypeError, match=r"x: .*tensor.*got list"):
        gather_tokens([[[0.0]]], indices)
    with pytest.raises(ValueError, match=r"indices: .*device of x, cpu, got meta"):
        gather_tokens(x, indices.to("meta"))


@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_a_broken_promise_is_found_on_request(operation, monkeypatch):
    """VMAE_CHECK=1 looks for duplicates under `unique`, which are not looked for otherwise."""
    x, indices = rand(2, 5, 3).requires_grad_(), torch.tensor([[0, 3], [2, 2]])
    y = gather_tokens(x, indices, unique=True)
    monkeypatch.setenv("VMAE_CHECK", "1")
    with pytest.raises(ValueError, match="indices: expected distinct values in each row, got a value twice"):
        y.sum().backward() if operation == "backward" else gather_tokens(x, indices, unique=True)
    gather_tokens(x, indices).sum().backward()
