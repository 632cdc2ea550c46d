"""The compiled convolution on a GPU, at the tokenizer's sizes, against float64 on the same device."""

import pytest
import torch
import torch.nn.functional as F

from vmae_kernels import _csrc, causal_conv3d

DEVICE = "cuda"
LAST = torch.channels_last_3d
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not _csrc.facts().get("cuda"), reason="the extension was not built for CUDA"),
]

# name -> (B, C, O, T, H, W, kernel, stride, with a cache): layers of the tokenizer, and what they are not
SHAPES = {
    "first": (1, 3, 64, 16, 224, 224, (3, 3, 3), (1, 1, 1), False),
    "64": (1, 64, 64, 16, 112, 112, (3, 3, 3), (1, 1, 1), True),
    "128": (2, 128, 128, 16, 56, 56, (3, 3, 3), (1, 1, 1), True),
    "widening": (1, 128, 256, 8, 28, 28, (3, 3, 3), (1, 1, 1), False),
    "256": (1, 256, 256, 8, 28, 28, (3, 3, 3), (1, 1, 1), True),
    "down": (1, 64, 128, 16, 56, 56, (3, 3, 3), (1, 2, 2), False),
    "down in time": (1, 128, 128, 16, 28, 28, (4, 4, 4), (2, 2, 2), True),
    "skip": (1, 64, 128, 16, 56, 56, (1, 1, 1), (1, 1, 1), False),
    "latents": (1, 256, 6, 8, 14, 14, (1, 1, 1), (1, 1, 1), False),
    "from latents": (1, 6, 256, 8, 14, 14, (3, 3, 3), (1, 1, 1), True),
    "patches": (1, 3, 64, 8, 112, 112, (2, 4, 4), (2, 4, 4), False),
    "odd": (2, 40, 72, 5, 13, 9, (5, 7, 2), (1, 3, 1), True),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def inputs_of(name, dtype):
    b, c, o, t, h, w, kernel, stride, cached = SHAPES[name]
    x = rand(b, c, t, h, w, dtype=dtype).contiguous(memory_format=LAST)
    cache = rand(b, c, kernel[0] - stride[0], h, w, seed=1, dtype=dtype) if cached else None
    weight = rand(o, c, *kernel, seed=2).div(torch.tensor(kernel).prod().item() * c).to(dtype)
    return x, weight, rand(o, seed=3, dtype=dtype), cache, stride


def padded(x, weight, bias, cache, stride):
    """The definition, and what PyTorch makes of it in any precision."""
    _, _, kt, kh, kw = weight.shape
    past = kt - stride[0]
    before = x.new_zeros(*x.shape[:2], past, *x.shape[3:]) if cache is None else cache
    x = F.pad(torch.cat((before, x), dim=2), (kw // 2, kw // 2, kh // 2, kh // 2))
    return F.conv3d(x, weight, bias, stride)


def ours(x, weight, bias, cache, stride):
    return causal_conv3d(x, weight, bias, stride=stride, cache=cache)


def evaluate(function, inputs, dtype):
    """The result, and the gradients of a weighted sum of it."""
    *tensors, stride = inputs
    tensors = [None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]
    y = function(*tensors, stride)
    given = [x for x in tensors if x is not None]
    return [y.detach(), *torch.autograd.grad(y, given, rand(*y.shape, seed=7).to(dtype))]


def error(x, wanted):
    return ((x.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(SHAPES))
def test_against_float64(name, dtype, exact, monkeypatch):
    if not exact and dtype != torch.float32:
        pytest.skip("tf32 is a choice for float32 alone")
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee" if exact else "tf32")
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    inputs = inputs_of(name, dtype)
    got = evaluate(ours, inputs, dtype)
    wanted = evaluate(padded, inputs, torch.float64)
    rounding = 2.0**-11 if dtype == torch.float32 and not exact else torch.finfo(dtype).eps
    for mine, truth in zip(got, wanted, strict=True):
        assert mine.dtype == dtype
        # Inputs are exact, results rounded once, and fp32 sums of up to 10^6 terms add little to that.
        assert error(mine, truth) < 2 * rounding + 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(SHAPES))
def test_chunks_have_the_bits_of_the_whole(name, dtype, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    x, weight, bias, cache, stride = inputs_of(name, dtype)
    whole = causal_conv3d(x, weight, bias, stride=stride, cache=cache)
    for length in (stride[0], 4 * stride[0]):
        parts, before = [], cache
        for chunk in x.split(length, dim=2):
            y, before = causal_conv3d(chunk, weight, bias, stride=stride, cache=before, return_cache=True)
            parts.append(y)
        assert torch.equal(torch.cat(parts, dim=2), whole)
    for i in range(x.shape[0]):
        kept = None if cache is None else cache[i : i + 1]
        assert torch.equal(causal_conv3d(x[i : i + 1], weight, bias, stride=stride, cache=kept), whole[i : i + 1])


@pytest.mark.parametrize("name", list(SHAPES))
def test_the_same_bits_each_time_on_any_stream_in_any_memory(name, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    inputs = inputs_of(name, torch.bfloat16)
    first = evaluate(ours, inputs, torch.bfloat16)
    for stream in [torch.cuda.Stream() for _ in range(3)]:
        torch.full((1 << 28,), torch.nan, device=DEVICE)  # what comes next finds it in its memory
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            again = evaluate(ours, inputs, torch.bfloat16)
        torch.cuda.synchronize()
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["first", "128", "down in time"])
def test_silu_in_the_epilogue(name, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    x, weight, bias, cache, stride = inputs_of(name, torch.bfloat16)
    y = causal_conv3d(x, weight, bias, stride=stride, cache=cache, activation="silu")
    doubles = [None if a is None else a.double() for a in (x, weight, bias, cache)]
    assert error(y, F.silu(padded(*doubles, stride))) < 2 * torch.finfo(torch.bfloat16).eps


def test_nothing_else_is_read(monkeypatch):
    """NaN all around the tensors reaches no result."""
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    for name, (b, c, _, t, h, w, kernel, stride, cached) in SHAPES.items():
        x, weight, bias, cache, _ = inputs_of(name, torch.bfloat16)
        memory = torch.full((b * t * h * w * c + (1 << 20),), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        inside = memory[1 << 19 : (1 << 19) + x.numel()].view(b, t, h, w, c).permute(0, 4, 1, 2, 3)
        inside.copy_(x)
        kept = None
        if cached:
            past = kernel[0] - stride[0]
            memory = torch.full((cache.numel() + (1 << 20),), torch.nan, dtype=torch.bfloat16, device=DEVICE)
            kept = memory[1 << 19 : (1 << 19) + cache.numel()].view(b, past, h, w, c).permute(0, 4, 1, 2, 3)
            kept.copy_(cache)
        y = causal_conv3d(inside, weight, bias, stride=stride, cache=kept)
        assert torch.equal(y, causal_conv3d(x, weight, bias, stride=stride, cache=cache)), name


def test_captured_in_a_graph(monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    x, weight, bias, cache, stride = inputs_of("128", torch.bfloat16)
    ours(x, weight, bias, cache, stride)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ours(x, weight, bias, cache, stride)
    x.copy_(x.flip(2))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, ours(x, weight, bias, cache, stride))


def test_beyond_two_to_the_31_elements(monkeypatch):
    """The last frames of what is that large, and of the same alone with their past as the cache, are the same."""
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    x = rand(1, 64, 700, 224, 224, dtype=torch.bfloat16).contiguous(memory_format=LAST)
    weight = rand(64, 64, 3, 3, 3, seed=1).div(1728).bfloat16()
    assert x.numel() > 2**31
    y = causal_conv3d(x, weight)
    assert torch.equal(y[:, :, -2:], causal_conv3d(x[:, :, -2:], weight, cache=x[:, :, -4:-2]))
