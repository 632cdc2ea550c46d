"""Linear layers in bfloat16 on a CPU, PyTorch's and the extension's, against products in float64."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import amx
from torch.utils.flop_counter import FlopCounterMode

from vmae_kernels.linear import linear

BF16, FP32 = torch.bfloat16, torch.float32
ways = pytest.mark.parametrize("way", ["torch", pytest.param("csrc", marks=amx)])


def rand(*shape, seed=0, dtype=FP32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(rows, inputs, outputs, dtype=FP32):
    x, grad = rand(rows, inputs, dtype=BF16), rand(rows, outputs, seed=1, dtype=BF16)
    return [x, rand(outputs, inputs, seed=2, dtype=dtype), rand(outputs, seed=3, dtype=dtype)], grad


def run(given, grad):
    """The result, and the gradients of those that want one."""
    given = [x.detach().requires_grad_() for x in given]
    y = linear(*given)
    return y.detach(), *torch.autograd.grad(y, given, grad)


def same_on_any_number_of_threads(function):
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(function())
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def amid(x):
    """A view amid NaN, so that a stray read would show."""
    room = torch.full([n + 6 for n in x.shape], torch.nan, dtype=x.dtype)
    return room[tuple(slice(3, 3 + n) for n in x.shape)].copy_(x)


def turned(x):
    """The numbers of a row do not lie side by side."""
    return x.t().contiguous().t()


def check(given, grad, way):
    """Against what rounded operands give, with a bound for each number; the extension rounds no bias and no gradient
    of weights."""
    found, bias = run(given, grad), given[2].to(BF16 if way == "torch" else given[2].dtype).double()
    x, weight = (t.to(BF16).double() for t in given[:2])
    g, eps, sums = grad.double(), 2.0**-8, 2.0**-18
    exact = [x @ weight.t() + bias, g @ weight, g.t() @ x, g.sum(0)]
    sizes = [x.abs() @ weight.abs().t() + bias.abs(), g.abs() @ weight.abs(), g.abs().t() @ x.abs(), g.abs().sum(0)]
    rounding = [eps, eps, *(eps if p.dtype == BF16 or way == "torch" else 0 for p in given[1:])]
    for ours, truth, size, off in zip(found, exact, sizes, rounding, strict=True):
        assert ((ours.double() - truth).abs() <= off * truth.abs() + sums * size + 1e-30).all()
    assert [y.dtype for y in found] == [BF16, BF16, given[1].dtype, given[2].dtype]


@ways
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, 150) for _ in range(3))),
    dtype=st.sampled_from([FP32, BF16]),
)
def test_any_shape(way, sizes, dtype):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMAE_KERNELS", way)
        check(*operands(*sizes, dtype), way)


@amx
@pytest.mark.parametrize(
    "sizes",
    [
        (2500, 33, 65),  # tokens in more than one part
        (40, 2100, 1500),  # panels in more than one group
        (5000, 6, 1),
        (64, 64, 64),
    ],
)
def test_blocks_and_groups(sizes, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    check(*operands(*sizes), "csrc")


@amx
def test_the_same_bits_on_any_number_of_threads(monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    given, grad = operands(300, 1600, 700)
    same_on_any_number_of_threads(lambda: run(given, grad))


@amx
def test_any_strides(monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    given, grad = operands(2 * 35, 40, 37)

    def same(some, others):
        return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))

    wanted = run(given, grad)
    for change in (amid, turned):
        views = [change(given[0]), change(given[1]), amid(given[2])]
        assert same(run(views, change(grad)), wanted)
    split = run([given[0].view(2, 5, 7, 40), *given[1:]], grad.view(2, 5, 7, 37))
    assert split[0].shape == (2, 5, 7, 37)
    assert same([a.view(b.shape) for a, b in zip(split, wanted, strict=True)], wanted)
    assert same([linear(given[0][0], *given[1:])], [wanted[0][0]])
    assert same(run(given, grad[:1].expand_as(grad)), run(given, grad[:1].repeat(70, 1)))


AT_THE_END = """
import ctypes, math, mmap, torch

kept = []

def at_the_end(x):
    \"\"\"A copy behind which there is memory that no one may read.\"\"\"
    size = math.ceil(x.nbytes / mmap.PAGESIZE) * mmap.PAGESIZE
    kept.append(mmap.mmap(-1, size + mmap.PAGESIZE))
    begin = ctypes.addressof(ctypes.c_char.from_buffer(kept[-1]))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin + size), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(kept[-1], dtype=x.dtype, count=x.numel(), offset=size - x.nbytes)
    return copy.view(x.shape).copy_(x).requires_grad_(x.requires_grad)
"""
NOTHING_BEHIND = f"""
{AT_THE_END}
from vmae_kernels.linear import linear

for rows, inputs, outputs in ((33, 64, 64), (40, 33, 33), (5, 47, 18)):
    results = []
    for place in (at_the_end, lambda x: x):
        torch.manual_seed(0)
        shapes = (rows, inputs), (outputs, inputs), (outputs,), (rows, outputs)
        x, weight, bias, grad = (torch.randn(shape) for shape in shapes)
        given = [place(t.requires_grad_()) for t in (x.bfloat16(), weight, bias)]
        results.append(torch.autograd.grad(linear(*given), given, place(grad.bfloat16())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
"""


def in_a_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@amx
def test_nothing_behind_an_operand_is_read():
    in_a_process(NOTHING_BEHIND)


@ways
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1)])
def test_only_some_gradients(way, wanted, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", way)
    given, grad = operands(20, 30, 40)
    every = run(given, grad)[1:]
    for i in wanted:
        given[i].requires_grad_()
    found = torch.autograd.grad(linear(*given), [given[i] for i in wanted], grad)
    assert all(torch.equal(a, every[i]) for a, i in zip(found, wanted, strict=True))


@ways
def test_nothing_and_no_bias(way, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", way)
    (x, weight, bias), grad = operands(20, 30, 40)
    assert torch.equal(linear(x, weight), linear(x, weight, torch.zeros(40)))
    weight.requires_grad_()
    y = linear(x[:0], weight, bias)
    assert y.shape == (0, 40)
    y.backward(grad[:0])
    assert torch.equal(weight.grad, torch.zeros(40, 30))
    assert linear(x, weight[:0], bias[:0]).shape == (20, 0)
    assert torch.equal(linear(x[:, :0], weight[:, :0], bias), bias.to(BF16).expand(20, 40))


@ways
def test_what_is_not_finite_stays_in_its_row(way, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", way)
    (x, weight, bias), _ = operands(50, 45, 40)
    clean = linear(x, weight, bias)
    x[3, 44], x[17, 0] = torch.nan, torch.inf
    y = linear(x, weight, bias)
    assert y[3].isnan().all()
    assert y[17].isinf().all()
    rest = [i for i in range(50) if i not in (3, 17)]
    assert torch.equal(y[rest], clean[rest])


@ways
def test_under_autocast(way, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", way)
    (x, weight, bias), grad = operands(60, 50, 40)
    wanted = run([x, weight, bias], grad)
    wide = x.float().requires_grad_()
    with torch.autocast("cpu", BF16):
        y = linear(wide, weight.requires_grad_(), bias)
    assert torch.equal(y, wanted[0])
    dx, dweight = torch.autograd.grad(y, [wide, weight], grad)
    assert torch.equal(dx, wanted[1].float())
    assert torch.equal(dweight, wanted[2])


@pytest.mark.parametrize("dtype", [FP32, torch.float64, torch.float16])
def test_elsewhere_it_is_pytorchs(dtype):
    x, weight, bias = rand(6, 5, dtype=dtype), rand(4, 5, seed=1, dtype=dtype), rand(4, seed=2, dtype=dtype)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (rand(2, 5).bfloat16(), rand(4, 6), None),
        (rand(2, 5).bfloat16(), rand(4, 5), rand(3)),
        (rand(2, 5).bfloat16(), rand(4, 5).double(), None),
        (rand(2, 5), rand(4, 5).bfloat16(), None),
        (torch.tensor(1.0, dtype=BF16), rand(4, 5), None),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, bias):
    with pytest.raises(RuntimeError):
        linear(x, weight, bias)


def test_its_arithmetic_is_counted():
    given, grad = operands(12, 10, 8)
    given = [x.requires_grad_() for x in given]
    with FlopCounterMode(display=False) as counter:
        linear(*given).backward(grad)
    assert counter.get_total_flops() == 3 * 2 * 12 * 10 * 8


@ways
def test_compiled_equals_eager(way, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", way)
    given, grad = operands(12, 10, 8)
    compiled = torch.compile(lambda *x: linear(*x).relu(), fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, lambda *x: linear(*x).relu()):
        inputs = [x.detach().requires_grad_() for x in given]
        y = function(*inputs)
        results.append((y, *torch.autograd.grad(y, inputs, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
