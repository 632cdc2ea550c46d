"""The tiles, taps and borders of csrc's convolution, run on the host, against the oracle: what needs no GPU of it."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_causal_conv3d import LAST, oracle, rand

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulation") / "emulation.so"
    source = Path(__file__).with_name("emulation.cpp")
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *options, source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def last(x):
    """A channels-last tensor with NaN before and after it, so that a stray read would show in the result too."""
    if x is None or x.numel() == 0:
        return None
    memory = torch.full((x.numel() + 64,), float("nan"))
    y = memory[32 : 32 + x.numel()].view(x.permute(0, 2, 3, 4, 1).shape).permute(0, 4, 1, 2, 3)
    y.copy_(x)
    return y


def pointer(x):
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def unwritten(*shape):
    """A result, and how often each of its elements was stored."""
    y = torch.full(shape, float("nan")).to(memory_format=LAST)
    return y, torch.zeros(shape, dtype=torch.int32).to(memory_format=LAST)


class Case:
    def __init__(self, b, c, o, t, h, w, kernel, stride, *, cached=False, bias=True, seed=0):
        self.numbers = (ctypes.c_int64 * 12)(b, c, o, t, h, w, *kernel, *stride)
        self.stride, self.past = stride, kernel[0] - stride[0]
        self.x = rand(b, c, t, h, w, seed=seed)
        self.cache = rand(b, c, self.past, h, w, seed=seed + 1) if cached else None
        self.weight = rand(o, c, *kernel, seed=seed + 2)
        self.bias = rand(o, seed=seed + 3) if bias else None

    def oracle(self):
        """The result, a gradient of it, and the gradients of x, cache and weight, in float64."""
        tensors = [None if x is None else x.double() for x in (self.x, self.weight, self.bias, self.cache)]
        x, weight, bias, cache = tensors
        x.requires_grad_()
        weight.requires_grad_()
        if cache is not None:
            cache.requires_grad_()
        y = oracle(x, weight, bias, self.stride, cache)
        dy = rand(*y.shape, seed=9)
        wanted = [x, weight] + ([cache] if cache is not None and cache.numel() else [])
        dx, dweight, *dcache = torch.autograd.grad(y, wanted, dy.double())
        return y.detach(), dy, dx, dweight, dcache[0] if dcache else None


def close(got, wanted):
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def check(emulation, case, table, aligned):
    wanted, dy, wanted_dx, wanted_dweight, wanted_dcache = case.oracle()
    x, cache, weight, gradient = last(case.x), last(case.cache), last(case.weight), last(dy)
    y, stores = unwritten(*wanted.shape)
    how = case.numbers, table, aligned
    assert not emulation.emulate_convolve(
        *how, *map(pointer, (x, cache, weight, case.bias)), 0, pointer(y), pointer(stores)
    )
    assert (stores == 1).all()
    close(y, wanted)

    dx, stores = unwritten(*x.shape)
    dcache, past_stores = (None, None) if wanted_dcache is None else unwritten(*cache.shape)
    transposed = last(case.weight.transpose(0, 1))
    results = map(pointer, (gradient, transposed, dx, dcache, stores, past_stores))
    assert not emulation.emulate_input_gradient(*how, *results)
    assert (stores == 1).all()
    close(dx, wanted_dx)
    if dcache is not None:
        assert (past_stores == 1).all()
        close(dcache, wanted_dcache)

    for slices in {1, 3, emulation.emulated_slices(case.numbers, table)}:
        o, c, *kernel = case.weight.shape
        partial = torch.full((slices, o, *kernel, c), float("nan"))
        stores = torch.zeros(partial.shape, dtype=torch.int32)
        results = map(pointer, (x, cache, gradient, partial, stores))
        assert not emulation.emulate_weight_gradient(*how, slices, *results)
        assert (stores == 1).all()
        close(partial.double().sum(0).permute(0, 4, 1, 2, 3), wanted_dweight)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("table", [0, 2, 4])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 8, 8, 2, 5, 4, (3, 3, 3), (1, 1, 1)),
        Case(2, 16, 72, 4, 5, 7, (3, 3, 3), (1, 1, 1), cached=True),  # rows and columns beyond a tile's
        Case(1, 40, 136, 2, 3, 3, (3, 3, 3), (1, 1, 1), cached=True),  # a tile's depth across taps
        Case(2, 8, 16, 4, 9, 8, (3, 3, 3), (2, 2, 2), cached=True),
        Case(1, 3, 6, 3, 6, 5, (3, 3, 3), (1, 1, 1), cached=True),
        Case(1, 3, 8, 4, 33, 17, (2, 16, 16), (2, 4, 4)),
        Case(1, 16, 8, 3, 4, 4, (1, 1, 1), (1, 2, 3)),  # inputs that no tap meets
        Case(3, 8, 8, 4, 1, 1, (4, 7, 7), (2, 1, 1), cached=True),
        Case(1, 8, 200, 1, 2, 130, (1, 1, 3), (1, 1, 1), bias=False),
        Case(1, 16, 24, 40, 12, 12, (3, 1, 1), (1, 1, 1)),  # more than one slice
    ],
)
def test_cases(emulation, case, table, aligned):
    check(emulation, case, table, aligned)


@st.composite
def cases(draw):
    stride = draw(st.tuples(*[st.integers(1, 4)] * 3))
    kernel = draw(st.integers(stride[0], 7)), draw(st.integers(1, 7)), draw(st.integers(1, 7))
    t = stride[0] * draw(st.integers(1, 3))
    h, w = (draw(st.integers(max(1, k - 2 * (k // 2)), 9)) for k in kernel[1:])
    c, o = (draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 24, 40])) for _ in "co")
    return Case(draw(st.integers(1, 2)), c, o, t, h, w, kernel, stride, cached=draw(st.booleans()))


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([0, 2, 4]), st.booleans())
def test_any_shape(emulation, case, table, aligned):
    check(emulation, case, table, aligned)


def test_silu(emulation):
    case = Case(1, 8, 8, 2, 3, 3, (3, 3, 3), (1, 1, 1))
    wanted = case.oracle()[0]
    y, stores = unwritten(*wanted.shape)
    x, weight = last(case.x), last(case.weight)
    inputs = map(pointer, (x, None, weight, case.bias))
    assert not emulation.emulate_convolve(case.numbers, 2, 1, *inputs, 1, pointer(y), pointer(stores))
    close(y, torch.nn.functional.silu(wanted))


def test_addresses_beyond_32_bits(emulation):
    """Offsets alone: a video of 2^33 elements, none of which is read."""
    case = Case(1, 8, 8, 1, 2, 2, (1, 1, 1), (1, 1, 1))
    far = (ctypes.c_int64 * 12)(3, 64, 64, 4096, 128, 128, 3, 3, 3, 1, 1, 1)
    assert emulation.emulated_slices(case.numbers, 2) == 1
    emulation.emulated_place.restype = ctypes.c_int64
    row = 3 * 4096 * 128 * 128 - 1  # the last position, whose last tap is itself
    assert emulation.emulated_place(far, ctypes.c_int64(row), 2, 1, 1) == row * 64
    assert emulation.emulated_place(far, ctypes.c_int64(row), 2, 2, 1) == -1
