"""Layer norm under bfloat16 autocast on a CPU, PyTorch's and the extension's, against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import amx
from test_linear import AT_THE_END, BF16, FP32, in_a_process, rand, same_on_any_number_of_threads, turned, ways

from vmae_kernels.layer_norm import layer_norm

EPS = 1e-6


def operands(rows, channels, offset=0.0):
    x = 3 * rand(rows, channels) + offset * rand(rows, 1, seed=1)
    return [x, rand(channels, seed=2), rand(channels, seed=3)], rand(rows, channels, seed=4, dtype=BF16)


def run(given, grad):
    given = [x.detach().requires_grad_() for x in given]
    with torch.autocast("cpu", BF16):
        y = layer_norm(*given, EPS)
    return y.detach(), *torch.autograd.grad(y, given, grad)


def check(given, grad):
    """With bounds for each number, of the sums' sizes."""
    y, *gradients = run(given, grad)
    exact = [x.double().requires_grad_() for x in given]
    truth = F.layer_norm(exact[0], exact[1].shape, *exact[1:], EPS)
    wanted = torch.autograd.grad(truth, exact, grad.double())
    x, weight, bias = (t.detach() for t in exact)
    scale = (x.var(1, unbiased=False, keepdim=True) + EPS).rsqrt()
    normal, g = (x - x.mean(1, keepdim=True)) * scale, grad.double().abs()
    # What float32 has of x and of its mean is multiplied by `scale`.
    off = 2.0**-21 * (scale * x.abs().amax(1, keepdim=True) + 1)
    reaching = g * weight.abs()
    sizes = scale * (reaching + reaching.mean(1, keepdim=True)) * (1 + normal.square().amax(1, keepdim=True))
    bounds = [
        2.0**-8 * truth.abs() + off * weight.abs() + 2.0**-22 * bias.abs(),
        (2.0**-20 + 4 * off) * sizes,
        (g * (off + 2.0**-19 * normal.abs())).sum(0),
        2.0**-19 * g.sum(0),
    ]
    for found, right, bound in zip((y, *gradients), (truth, *wanted), bounds, strict=True):
        assert ((found.double() - right).abs() <= bound + 1e-30).all()
    assert [t.dtype for t in (y, *gradients)] == [BF16, FP32, FP32, FP32]


@ways
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 200), channels=st.integers(2, 150), offset=st.sampled_from([0.0, 10.0, 1000.0]))
def test_any_shape(way, rows, channels, offset):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMAE_KERNELS", way)
        check(*operands(rows, channels, offset))


@ways
def test_more_rows_than_parts(way, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", way)
    check(*operands(64 * 256 + 1000, 20))


@ways
def test_rows_that_do_not_vary(way, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", way)
    (x, weight, bias), grad = operands(6, 40)
    x[:] = torch.tensor([0.0, 1.0, -3.0, 1e4, 1e-20, 7.0])[:, None]
    y, dx, *_ = run([x, weight, bias], grad)
    assert torch.equal(y, bias.to(BF16).expand(6, 40))
    assert dx.isfinite().all()


@amx
def test_the_same_bits_on_any_number_of_threads(monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    given, grad = operands(1000, 100)
    same_on_any_number_of_threads(lambda: run(given, grad))


@ways
def test_any_strides(way, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", way)
    (x, weight, bias), grad = operands(70, 40)
    wanted = run([x, weight, bias], grad)

    found = run([turned(x), weight.repeat(2, 1).t().flatten()[::2], bias[None].expand(3, -1)[1]], turned(grad))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    split = run([x.view(2, 5, 7, 40), weight, bias], grad.view(2, 5, 7, 40))
    assert all(torch.equal(a.view(b.shape), b) for a, b in zip(split, wanted, strict=True))


NOTHING_BEHIND = f"""
{AT_THE_END}
from vmae_kernels.layer_norm import layer_norm

for rows, channels in ((3, 64), (3, 33), (5, 47), (2, 16)):
    results = []
    for place in (at_the_end, lambda x: x):
        torch.manual_seed(0)
        shapes = (rows, channels), (channels,), (channels,), (rows, channels)
        *given, grad = (torch.randn(shape) for shape in shapes)
        given = [place(t.requires_grad_()) for t in given]
        with torch.autocast("cpu", torch.bfloat16):
            y = layer_norm(*given, 1e-6)
        results.append((y, *torch.autograd.grad(y, given, place(grad.bfloat16()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
"""


@amx
def test_nothing_behind_an_operand_is_read():
    in_a_process(NOTHING_BEHIND)


@ways
def test_only_some_gradients_and_none(way, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", way)
    given, grad = operands(20, 30)
    every = run(given, grad)[1:]
    for i in range(3):
        chosen = [x.detach().requires_grad_(i == j) for j, x in enumerate(given)]
        with torch.autocast("cpu", BF16):
            y = layer_norm(*chosen, EPS)
        assert torch.equal(*torch.autograd.grad(y, chosen[i], grad), every[i])
    y, dx, dweight, dbias = run([given[0][:0], *given[1:]], grad[:0])
    assert y.shape == dx.shape == (0, 30)
    assert not dweight.any()
    assert not dbias.any()
    with torch.autocast("cpu", BF16):
        assert layer_norm(given[0][:, :0], given[1][:0], given[2][:0], EPS).shape == (20, 0)


@ways
def test_what_is_not_finite_stays_in_its_row(way, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", way)
    given, grad = operands(50, 45)
    clean = run(given, grad)
    given[0][3, 44], given[0][17, 0] = torch.nan, torch.inf
    rest = [i for i in range(50) if i not in (3, 17)]
    for found, wanted in zip(run(given, grad)[:2], clean[:2], strict=True):
        assert found[[3, 17]].isnan().all()
        assert torch.equal(found[rest], wanted[rest])


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float64])
def test_elsewhere_it_is_pytorchs(dtype):
    x, weight, bias = rand(6, 5, dtype=dtype), rand(5, seed=1, dtype=dtype), rand(5, seed=2, dtype=dtype)
    assert torch.equal(layer_norm(x, weight, bias, EPS), F.layer_norm(x, (5,), weight, bias, EPS))
    if dtype != FP32:
        with torch.autocast("cpu", BF16):
            assert layer_norm(x, weight, bias, EPS).dtype == F.layer_norm(x, (5,), weight, bias, EPS).dtype


@pytest.mark.parametrize("wrong", [(rand(2, 5), rand(4), rand(4)), (rand(2, 5), rand(5), rand(4))])
def test_what_does_not_fit_is_refused(wrong):
    with torch.autocast("cpu", BF16), pytest.raises(RuntimeError):
        layer_norm(*wrong, EPS)


@ways
def test_compiled_equals_eager(way, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", way)
    given, grad = operands(12, 10)

    def function(*x):
        with torch.autocast("cpu", BF16):
            return layer_norm(*x, EPS).relu()

    results = []
    for f in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        inputs = [x.detach().requires_grad_() for x in given]
        y = f(*inputs)
        results.append((y, *torch.autograd.grad(y, inputs, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
