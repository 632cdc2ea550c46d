"""The compiled convolution on a CPU with Intel AMX, in bfloat16, against the oracle in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_causal_conv3d import LAST, oracle, rand

from vmae_kernels import _csrc, causal_conv3d

pytestmark = pytest.mark.skipif(not _csrc.facts().get("amx"), reason="no Intel AMX, or the extension was not built")
EPS = torch.finfo(torch.bfloat16).eps


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "csrc")


def surrounded(x):
    """A channels-last bfloat16 copy with NaN all around, so that a stray read would show."""
    if x is None:
        return None
    memory = torch.full((x.numel() + 256,), torch.nan, dtype=torch.bfloat16)
    b, c, t, h, w = x.shape
    y = memory[128 : 128 + x.numel()].view(b, t, h, w, c).permute(0, 4, 1, 2, 3)
    return y.copy_(x)


def inputs_of(b, c, o, t, h, w, kernel, stride, cached, bias=True):
    """bfloat16 x, weight, bias and cache, and the stride."""
    x = surrounded(rand(b, c, t, h, w))
    weight = (rand(o, c, *kernel, seed=1) / (c * kernel[0] * kernel[1] * kernel[2]) ** 0.5).bfloat16()
    cache = surrounded(rand(b, c, kernel[0] - stride[0], h, w, seed=3)) if cached else None
    return x, weight, rand(o, seed=2).bfloat16() if bias else None, cache, stride


def evaluate(function, inputs, dtype):
    *tensors, stride = inputs
    tensors = [None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]
    y = function(*tensors[:3], stride, tensors[3])
    given = [x for x in tensors if x is not None and x.numel()]
    return [y.detach(), *torch.autograd.grad(y, given, rand(*y.shape, seed=7).bfloat16().to(dtype))]


def ours(x, weight, bias, stride, cache):
    return causal_conv3d(x, weight, bias, stride=stride, cache=cache)


def check(*sizes, **options):
    inputs = inputs_of(*sizes, **options)
    for mine, truth in zip(
        evaluate(ours, inputs, torch.bfloat16), evaluate(oracle, inputs, torch.float64), strict=True
    ):
        assert mine.dtype == torch.bfloat16
        # Rounded once: half an ulp of each, and the fp32 sums' own.
        torch.testing.assert_close(mine.double(), truth, rtol=EPS, atol=EPS / 16 * truth.abs().max().item() + 1e-12)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 128, 128, 4, 9, 30, (3, 3, 3), (1, 1, 1), True),
        (2, 64, 96, 5, 14, 14, (3, 3, 3), (1, 1, 1), False),
        (1, 3, 64, 4, 20, 33, (3, 7, 7), (1, 2, 2), False),
        (1, 130, 48, 4, 6, 18, (3, 3, 3), (2, 2, 2), True),
        (1, 256, 6, 4, 14, 14, (1, 1, 1), (1, 1, 1), False),
        (1, 6, 256, 4, 14, 14, (3, 3, 3), (1, 1, 1), True),
        (1, 64, 64, 40, 8, 8, (3, 1, 1), (1, 1, 1), False),
        (2, 32, 32, 3, 1, 40, (4, 1, 3), (3, 1, 1), True),
        (1, 32, 32, 2, 5, 1, (2, 2, 2), (2, 1, 1), False),
        (1, 1, 1, 4, 3, 3, (3, 3, 3), (1, 1, 1), True),
        (1, 32, 16, 3, 4, 4, (1, 1, 1), (1, 2, 3), False),
        (1, 160, 160, 9, 6, 7, (3, 3, 3), (1, 1, 1), True),  # a weight that several frames share
        (2, 160, 144, 14, 6, 8, (3, 3, 3), (2, 2, 2), False),
    ],
)
def test_against_the_oracle(sizes):
    check(*sizes)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape(data):
    stride = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    kernel = data.draw(st.integers(stride[0], 7)), data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    t = stride[0] * data.draw(st.integers(1, 4))
    h, w = (data.draw(st.integers(max(1, k - 2 * (k // 2)), top)) for k, top in zip(kernel[1:], (9, 40), strict=True))
    c, o = (data.draw(st.sampled_from([1, 2, 3, 8, 16, 31, 32, 33, 48, 64, 72])) for _ in "co")
    check(data.draw(st.integers(1, 2)), c, o, t, h, w, kernel, stride, data.draw(st.booleans()))


@pytest.mark.parametrize("st", [1, 2])
@pytest.mark.parametrize(("c", "o"), [(3, 40), (6, 40), (64, 40), (96, 40), (160, 160)])
def test_chunks_and_clips_alone_have_the_bits_of_the_whole(c, o, st):
    x, weight, bias, cache, stride = inputs_of(2, c, o, 12, 7, 19, (3, 3, 3), (st, 1, 1), True)
    whole = causal_conv3d(x, weight, bias, stride=stride, cache=cache)
    for chunks in ([st] * (12 // st), [2, 6, 4], [12]):
        parts, before = [], cache
        for chunk in x.split(chunks, dim=2):
            y, before = causal_conv3d(chunk, weight, bias, stride=stride, cache=before, return_cache=True)
            parts.append(y)
        assert torch.equal(torch.cat(parts, dim=2), whole)
    assert torch.equal(causal_conv3d(x[1:], weight, bias, stride=stride, cache=cache[1:]), whole[1:])


def test_the_same_bits_on_one_thread():
    inputs = inputs_of(1, 64, 80, 6, 20, 30, (3, 3, 3), (1, 1, 1), True)
    first, threads = evaluate(ours, inputs, torch.bfloat16), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = evaluate(ours, inputs, torch.bfloat16)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_no_zeros_stand_for_the_past():
    """Without a cache as with one of zeros; and what is not finite stays where it is."""
    x, weight, bias, *_ = inputs_of(1, 32, 32, 4, 6, 20, (3, 3, 3), (1, 1, 1), False)
    zeros = torch.zeros(1, 32, 2, 6, 20, dtype=torch.bfloat16)
    assert torch.equal(causal_conv3d(x, weight, bias, cache=zeros), causal_conv3d(x, weight, bias))
    broken = x.clone(memory_format=torch.preserve_format)
    broken[0, 5, 2, 3, 10] = torch.inf
    y = causal_conv3d(broken, weight, bias)
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[:, :, 2:, 2:5, 9:12] = True
    assert torch.equal(~y.isfinite(), reached)
    assert torch.equal(y[~reached], causal_conv3d(x, weight, bias)[~reached])


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_silu_and_memory_formats(layout):
    x, weight, bias, cache, stride = inputs_of(2, 32, 48, 4, 6, 20, (3, 3, 3), (1, 1, 1), True)
    wanted = F.silu(oracle(*(a.double() for a in (x, weight, bias)), stride, cache.double()))
    y = causal_conv3d(x.contiguous(memory_format=layout), weight, bias, cache=cache, activation="silu")
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y.double(), wanted, rtol=EPS, atol=EPS / 8)


def test_what_it_does_not_take(monkeypatch):
    x, weight, *_ = inputs_of(1, 32, 32, 4, 6, 20, (3, 3, 3), (1, 1, 1), False)
    with pytest.raises(ValueError, match=r"csrc: causal_conv3d expected bfloat16 on a CPU, got torch.float32"):
        causal_conv3d(x.float(), weight.float())
    with pytest.raises(ValueError, match="csrc: causal_conv3d expected kernels of at most 7"):
        causal_conv3d(x, rand(4, 32, 3, 8, 3).bfloat16())
    monkeypatch.setenv("VMAE_KERNELS", "auto")
    assert causal_conv3d(x.float(), weight.float()).dtype == torch.float32
    assert causal_conv3d(x, rand(4, 32, 3, 8, 3).bfloat16()).dtype == torch.bfloat16
    assert causal_conv3d(x[:0], weight).shape == (0, 32, 4, 6, 20)
