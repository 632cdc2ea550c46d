"""fsq against the scalar formulas of Mentzer et al. (2024), appendix A.1."""

import itertools
import math

import pytest
import torch

from vmae_kernels import fsq, reference

LEVELS = [[2], [3], [8, 5, 5, 5], [7, 2, 4], [16, 3], [8, 8, 8, 6, 5], [1000], [2, 2, 2, 2]]


def constants(level):
    half = (level - 1) * (1 + 1e-3) / 2
    offset = 0.5 if level % 2 == 0 else 0.0
    return half, offset, math.atanh(offset / half)


def bounded(z, level):
    half, offset, shift = constants(level)
    return math.tanh(z + shift) * half - offset


def oracle(row, levels):
    """(values, code) of one row of Python floats."""
    values, code, base = [], 0, 1
    for z, level in zip(row, levels, strict=True):
        number = 0 if math.isnan(z) else round(bounded(z, level))
        number = min(max(number, -(level // 2)), (level - 1) // 2)
        values.append(math.nan if math.isnan(z) else number / (level // 2))
        code += (number + level // 2) * base
        base *= level
    return values, code


def settled(row, levels):
    """Whether no value lies so near a rounding boundary that float32 may decide otherwise."""
    return all(abs((bounded(z, n) % 1) - 0.5) > 1e-6 * n + 1e-5 for z, n in zip(row, levels, strict=True))


def rand(levels, rows=400, seed=0, dtype=torch.float32):
    return (torch.randn(rows, len(levels), generator=torch.Generator().manual_seed(seed)) * 1.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_scalar_formula(levels, dtype):
    z = rand(levels, dtype=dtype)
    quantized, codes = fsq(z, levels)
    assert quantized.dtype == dtype
    assert codes.dtype == torch.int32
    assert quantized.shape == z.shape
    assert codes.shape == z.shape[:-1]
    compared = 0
    for row, got, code in zip(z.tolist(), quantized, codes.tolist(), strict=True):
        if settled(row, levels):
            values, wanted = oracle(row, levels)
            assert code == wanted
            exact = torch.tensor(values, dtype=torch.float64)
            torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)
            compared += 1
    assert compared > 300


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_zero_gives_zero(levels, dtype):
    quantized, codes = fsq(torch.zeros(3, len(levels), dtype=dtype), levels)
    assert not quantized.any()
    assert codes.tolist() == [oracle([0.0] * len(levels), levels)[1]] * 3


@pytest.mark.parametrize("levels", [[2], [3], [4, 3], [5, 2, 3], [8, 5, 5], [6, 7]], ids=str)
def test_every_code_is_reachable_once(levels):
    """The middle of each cell, by the inverse of the bound; the first level is the fastest."""
    wanted = []
    for digits in itertools.product(*(range(level) for level in reversed(levels))):
        row = []
        for digit, level in zip(reversed(digits), levels, strict=True):
            half, offset, shift = constants(level)
            inside = min(max((digit - level // 2 + offset) / half, -1 + 1e-4), 1 - 1e-4)
            row.append(math.atanh(inside) - shift)
        wanted.append(row)
    quantized, codes = fsq(torch.tensor(wanted), levels)
    assert codes.tolist() == list(range(math.prod(levels)))
    assert len({tuple(row) for row in quantized.tolist()}) == math.prod(levels)


@pytest.mark.parametrize("level", [2, 3, 8, 1001, 1002, 1003, 2001, 4096, 65536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes(level, dtype):
    """From 1001 levels on the paper's bound rounds past the last value: it must not."""
    z = torch.tensor([[-math.inf], [-1e30], [-50.0], [50.0], [1e30], [math.inf]], dtype=dtype, requires_grad=True)
    quantized, codes = fsq(z, [level])
    assert codes.tolist() == [0] * 3 + [level - 1] * 3
    top = (level - 1) // 2 / (level // 2)
    torch.testing.assert_close(quantized.detach().flatten(), torch.tensor([-1.0] * 3 + [top] * 3, dtype=dtype))
    (gradient,) = torch.autograd.grad(quantized.sum(), z)
    assert not gradient.any()


def test_largest_code():
    z = torch.tensor([[10.0] * 31, [-10.0] * 31])
    assert fsq(z, [2] * 31)[1].tolist() == [2**31 - 1, 0]
    assert fsq(z[:, :2], [2**16, 2**15])[1].tolist() == [2**31 - 1, 0]


@pytest.mark.parametrize("levels", [[8, 5], [2, 3], [4, 7]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan(levels, dtype):
    z = torch.tensor([[math.nan, 0.4], [0.4, math.nan], [math.nan, math.nan]], dtype=dtype)
    quantized, codes = fsq(z, levels)
    assert torch.equal(quantized.isnan(), z.isnan())
    assert codes.tolist() == [oracle(row, levels)[1] for row in z.tolist()]
    assert torch.equal(quantized[~z.isnan()], fsq(z.nan_to_num(), levels)[0][~z.isnan()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_gradient_is_that_of_the_bound_without_rounding(levels, dtype):
    z = rand(levels, dtype=dtype).requires_grad_()
    quantized, codes = fsq(z, levels)
    assert not codes.requires_grad
    grad = rand(levels, seed=1, dtype=dtype)
    (gradient,) = torch.autograd.grad(quantized, z, grad)
    assert gradient.dtype == dtype
    twin = z.detach().double().requires_grad_()
    half, offset, shift = (torch.tensor(x, dtype=torch.float64) for x in zip(*map(constants, levels), strict=True))
    width = torch.tensor([level // 2 for level in levels], dtype=torch.float64)
    (wanted,) = torch.autograd.grad((torch.tanh(twin + shift) * half - offset) / width, twin, grad.double())
    eps = torch.finfo(dtype).eps
    # 1 - tanh^2 cancels for large z, in float32 for half types.
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    smallest = torch.finfo(dtype).smallest_normal * eps
    torch.testing.assert_close(gradient.double(), wanted, rtol=2 * eps, atol=16 * wide + smallest)


def test_shapes_and_strides():
    z = rand([8, 5, 5], rows=24)
    wanted = fsq(z, [8, 5, 5])
    for shape in ((24, 3), (2, 3, 4, 3), (1, 24, 3)):
        quantized, codes = fsq(z.reshape(shape), [8, 5, 5])
        assert codes.shape == shape[:-1]
        assert torch.equal(quantized.reshape(24, 3), wanted[0])
        assert torch.equal(codes.reshape(24), wanted[1])
    quantized, codes = fsq(z[0], (8, 5, 5))
    assert codes.shape == ()
    assert torch.equal(quantized, wanted[0][0])
    strided = z.reshape(4, 6, 3).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    quantized, codes = fsq(strided, [8, 5, 5])
    assert torch.equal(quantized.reshape(24, 3), wanted[0])
    assert torch.equal(codes.reshape(24), wanted[1])
    assert torch.equal(fsq(z[:1].expand(4, 3), [8, 5, 5])[1], wanted[1][:1].expand(4))
    quantized, codes = fsq(torch.zeros(0, 5, 3, requires_grad=True), [8, 5, 5])
    assert codes.shape == (0, 5)
    quantized.sum().backward()


def test_strided_gradient():
    z = rand([8, 5, 5], rows=6).reshape(2, 3, 3).permute(2, 1, 0).requires_grad_()
    (wanted,) = torch.autograd.grad(fsq(z, [4, 3])[0].sum(), z)
    flat = z.detach().contiguous().requires_grad_()
    (gradient,) = torch.autograd.grad(fsq(flat, [4, 3])[0], flat, torch.ones(3, 3, 2))
    torch.testing.assert_close(gradient, wanted)


def test_errors():
    z = torch.zeros(4, 3)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=rf"z: .*float32.*got {str(dtype).removeprefix('torch.')}"):
            fsq(z.to(dtype), [8, 5, 5])
    with pytest.raises(TypeError, match=r"z: .*tensor.*got list"):
        fsq([0.0, 0.0], [8, 5])
    with pytest.raises(ValueError, match=r"L = 2 levels, got \[4, 3\]"):
        fsq(z, [8, 5])
    with pytest.raises(ValueError, match=r"got \[\]"):
        fsq(torch.tensor(0.0), [8])
    with pytest.raises(ValueError, match=r"L = 0 levels"):
        fsq(z[:, :0], [])
    for level in (1, 0, -3, 2**24 + 1):
        with pytest.raises(ValueError, match=rf"levels: expected 2 to 16777216.*got {level}"):
            fsq(z, [8, level, 5])
    for level, name in ((5.0, "float"), (True, "bool")):
        with pytest.raises(TypeError, match=rf"levels: .*integer.*got {name}"):
            fsq(z, [8, level, 5])
    with pytest.raises(ValueError, match=r"at most 2\^31.*got \[65536, 65536\]"):
        fsq(z[:, :2], [65536, 65536])


@pytest.mark.parametrize("levels", [[8] * 6, [7, 5, 5, 5, 5], [4, 1000, 3], [512, 512], [2] * 24, [255, 257]])
def test_codes_whatever_products_are_made_of(levels):
    """Of bfloat16 numbers, that is, on processors that have them; elsewhere the rule alone is seen to hold."""
    places, _, narrow = reference._fsq_places(tuple(levels))
    digits = [digit for level in levels for digit in range(-(level // 2), level - level // 2)]
    numbers = torch.tensor([*places, *digits]).double()
    assert narrow == (torch.equal(numbers.bfloat16().double(), numbers) and math.prod(levels) <= 2**24)
    before = torch.get_float32_matmul_precision()
    z = 3 * torch.randn(2, 2000, len(levels), generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("medium")
    try:
        quantized, codes = fsq(z, levels)
    finally:
        torch.set_float32_matmul_precision(before)
    wanted = torch.zeros(2, 2000, dtype=torch.int64)
    for i, level in enumerate(levels):
        wanted += math.prod(levels[:i]) * ((quantized[..., i].double() * (level // 2)).round().long() + level // 2)
    assert torch.equal(codes.long(), wanted)


def test_a_gradient_near_the_largest_number():
    z = torch.full((1, 1), 20.0, requires_grad=True)
    (grad,) = torch.autograd.grad(fsq(z, [3])[0], z, torch.full((1, 1), 3.4e38))
    assert grad.isfinite().all()
