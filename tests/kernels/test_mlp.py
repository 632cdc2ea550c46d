"""The MLP in bfloat16 on a CPU, PyTorch's and the extension's, against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import amx
from test_linear import AT_THE_END, BF16, FP32, amid, in_a_process, rand, same_on_any_number_of_threads, turned, ways
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vmae_kernels.mlp import mlp


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operands(rows, inputs, hidden, outputs, dtype=FP32):
    shapes = (hidden, inputs), (hidden,), (outputs, hidden), (outputs,)
    weights = [rand(*shape, seed=i, dtype=dtype) / shape[-1] ** 0.5 for i, shape in enumerate(shapes)]
    return [rand(rows, inputs, seed=4, dtype=BF16), *weights], rand(rows, outputs, seed=5, dtype=BF16)


def run(given, grad, function=mlp):
    given = [x.detach().requires_grad_() for x in given]
    y = function(*given)
    return y.detach(), *torch.autograd.grad(y, given, grad)


def plain(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def check(given, grad, way):
    """Against what rounded operands give in float64, with a bound for each number: how far roundings of what lies
    between the layers reach."""
    found = run(given, grad)
    x, w1, b1, w2, b2 = (t.to(BF16).double() if t.ndim > 1 or way == "torch" else t.double() for t in given)
    g, eps = grad.double(), 2.0**-8
    exact = run([x, w1, b1, w2, b2], g, plain)
    before = x @ w1.t() + b1
    slack = eps * (before.abs() + 2.0**-8 * (x.abs() @ w1.abs().t() + b1.abs()))  # of `before`
    d = (g @ w2).abs() + eps * (g.abs() @ w2.abs())
    off_activated = 2.2 * slack + 1e-30  # GELU's slope is 1.13 at most, and it is rounded itself
    off_before = 0.8 * slack * d + 2.2 * eps * d  # the slope's slope is 0.8 at most
    bounds = [
        off_activated @ w2.abs().t(),
        off_before @ w1.abs(),
        off_before.t() @ x.abs(),
        off_before.sum(0),
        g.abs().t() @ off_activated,
        eps * g.sum(0).abs() + 1e-5 * g.abs().sum(0),
    ]
    for ours, truth, bound in zip(found, exact, bounds, strict=True):
        assert ((ours.double() - truth).abs() <= bound + eps * truth.abs() + 1e-30).all()
    assert [t.dtype for t in found] == [BF16, BF16, *(p.dtype for p in given[1:])]


@ways
@settings(max_examples=30, deadline=None)
@given(sizes=st.tuples(*(st.integers(1, 100) for _ in range(4))), dtype=st.sampled_from([FP32, BF16]))
def test_any_shape(way, sizes, dtype):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMAE_KERNELS", way)
        check(*operands(*sizes, dtype), way)


@amx
@pytest.mark.parametrize("sizes", [(2500, 33, 65, 40), (40, 900, 1800, 300), (64, 64, 64, 64)])
def test_blocks_and_groups(sizes, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    check(*operands(*sizes), "csrc")


@amx
def test_gelu_of_every_number(monkeypatch):
    """Of bfloat16: rounded as the exact one is, but for 2e-4 of it, and so is its derivative."""
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(BF16)[:, None]
    x = every[every.isfinite() & (every.abs() >= 2.0**-126)][:, None]
    one, zero = torch.ones(1, 1), torch.zeros(1)
    y, dx, *_ = run([x, one, zero, one, zero], torch.ones_like(x))
    x = x.double()
    below, slope = torch.special.erfc(-x / 2**0.5) / 2, x * (-x * x / 2).exp() / (2 * torch.pi) ** 0.5
    for found, exact, size in ((y, x * below, (x * below).abs()), (dx, below + slope, below + slope.abs())):
        half = torch.exp2(exact.abs().log2().floor() - 8)
        fine = (found.double() - exact).abs() <= half + 2e-4 * size
        assert fine[size > 1e-36].all()
        assert (found[size <= 1e-36].abs() <= 1e-36).all()
    infinite = torch.tensor([[torch.inf], [-torch.inf], [torch.nan]], dtype=BF16)
    assert torch.equal(mlp(infinite, one, zero, one, zero).isfinite(), torch.zeros(3, 1, dtype=torch.bool))
    assert mlp(infinite[:1], one, zero, one, zero) == torch.inf


@amx
def test_the_same_bits_on_any_number_of_threads(monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    given, grad = operands(300, 100, 1600, 70)
    same_on_any_number_of_threads(lambda: run(given, grad))


@amx
def test_any_strides(monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    given, grad = operands(2 * 35, 40, 50, 37)
    wanted = run(given, grad)

    for change in (amid, turned):
        results = run([amid(x) if x.ndim == 1 else change(x) for x in given], change(grad))
        assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))
    split = run([given[0].view(2, 5, 7, 40), *given[1:]], grad.view(2, 5, 7, 37))
    assert split[0].shape == (2, 5, 7, 37)
    assert all(torch.equal(a.view(b.shape), b) for a, b in zip(split, wanted, strict=True))


NOTHING_BEHIND = f"""
{AT_THE_END}
from vmae_kernels.mlp import mlp

for rows, inputs, hidden, outputs in ((33, 64, 64, 64), (40, 33, 50, 33), (5, 47, 18, 9)):
    results = []
    for place in (at_the_end, lambda x: x):
        torch.manual_seed(0)
        shapes = (rows, inputs), (hidden, inputs), (hidden,), (outputs, hidden), (outputs,)
        x, *weights = (torch.randn(shape) for shape in shapes)
        given = [place(t.requires_grad_()) for t in (x.bfloat16(), *weights)]
        grad, before = (place(torch.randn(rows, n).bfloat16()) for n in (outputs, hidden))
        results.append(torch.autograd.grad(mlp(*given), given, grad))
        results[-1] += torch.ops.vmae_kernels.mlp_cpu_gelu_gradient(grad, given[3].detach(), before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
"""


@amx
def test_nothing_behind_an_operand_is_read():
    in_a_process(NOTHING_BEHIND)


@ways
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 3), (1, 4), (0, 1, 2)])
def test_only_some_gradients(way, wanted, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", way)
    given, grad = operands(20, 30, 50, 40)
    every = run(given, grad)[1:]
    for i in wanted:
        given[i].requires_grad_()
    found = torch.autograd.grad(mlp(*given), [given[i] for i in wanted], grad)
    assert all(torch.equal(a, every[i]) for a, i in zip(found, wanted, strict=True))


@ways
def test_no_zeros_are_made_for_what_has_no_gradient(way, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", way)
    given, grad = operands(20, 30, 50, 40)
    y = mlp(*(x.requires_grad_() for x in given))
    with Operations() as seen:
        y.backward(grad)
    assert seen.names
    assert not [name for name in seen.names if "zero" in name or "fill" in name]


@ways
def test_nothing(way, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", way)
    given, grad = operands(20, 30, 50, 40)
    y, dx, *gradients = run([given[0][:0], *given[1:]], grad[:0])
    assert y.shape == (0, 40)
    assert dx.shape == (0, 30)
    assert all(torch.equal(a, torch.zeros_like(b)) for a, b in zip(gradients, given[1:], strict=True))


@amx
def test_what_is_not_finite_stays_in_its_row(monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    (x, *weights), _ = operands(50, 45, 60, 40)
    clean = mlp(x, *weights)
    x[3, 44], x[17, 0] = torch.nan, torch.inf
    y = mlp(x, *weights)
    assert y[3].isnan().all()
    assert not y[17].isfinite().any()
    rest = [i for i in range(50) if i not in (3, 17)]
    assert torch.equal(y[rest], clean[rest])


@ways
def test_under_autocast(way, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", way)
    (x, *weights), grad = operands(60, 50, 70, 40)
    wanted = run([x, *weights], grad)
    wide = [x.float().requires_grad_(), *(w.requires_grad_() for w in weights)]
    with torch.autocast("cpu", BF16):
        y = mlp(*wide)
    found = y.detach(), *torch.autograd.grad(y, wide, grad)
    assert [t.dtype for t in found] == [BF16, *[FP32] * 5]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [FP32, torch.float64, torch.float16])
def test_elsewhere_it_is_pytorchs(dtype):
    shapes = (6, 5), (8, 5), (8,), (4, 8), (4,)
    given = [rand(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    assert torch.equal(mlp(*given), plain(*given))


@pytest.mark.parametrize("i", range(5))
def test_what_does_not_fit_is_refused(i):
    given, _ = operands(6, 5, 8, 4)
    for wrong in (given[i][..., :-1], given[i].double(), torch.tensor(1.0, dtype=given[i].dtype)):
        with pytest.raises(RuntimeError):
            mlp(*given[:i], wrong, *given[i + 1 :])


def test_its_arithmetic_is_counted():
    given, grad = operands(12, 10, 20, 8)
    given = [x.requires_grad_() for x in given]
    with FlopCounterMode(display=False) as counter:
        mlp(*given).backward(grad)
    assert counter.get_total_flops() == 3 * 2 * 12 * (10 + 8) * 20


@ways
def test_compiled_equals_eager(way, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", way)
    given, grad = operands(12, 10, 20, 8)

    def function(*x):
        return mlp(*x).relu()

    results = [run(given, grad, f) for f in (torch.compile(function, fullgraph=True, backend="aot_eager"), function)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
