"""The Triton kernels on a GPU, at the sizes of 128 and 1,024 frames, against the references on the same device.

The other tests of this folder hold the references against oracles.
"""

import os

import pytest
import torch

from vmae_kernels import (
    attention,
    attention_varlen,
    decoder_tokens,
    fsq,
    gather_tokens,
    scatter_tokens,
    soft_topk,
    topk_partition,
    tubelets,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") == "1", reason="Triton interprets"),
]

PLACES = 196  # of a latent frame at 224 x 224
TOKENS = {4: 2 * PLACES, 128: 64 * PLACES, 1024: 512 * PLACES}


def rand(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def chosen(b, n, k, seed=0):
    """k distinct places of n in each row, in no order."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.rand(b, n, generator=generator, device="cuda").argsort(1)[:, :k]


def calls(frames, dtype):
    """name -> (function of tensors, those of them that have gradients)."""
    n = TOKENS[frames]
    k, v = round(0.15 * n), n // 10
    few, many = chosen(2, n, v), chosen(2, n, k, seed=1)
    short = round(0.02 * n)  # of queries: the reference holds all scores of a row
    pixels = torch.randint(0, 256, (1, frames, 224, 224, 3), generator=torch.Generator("cuda").manual_seed(0),
                           device="cuda", dtype=torch.uint8)  # fmt: skip
    video = pixels.permute(0, 4, 1, 2, 3)
    starts = torch.tensor([0, 100, 100, 1500], device="cuda", dtype=torch.int32)
    norm = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    packed = [rand(1500, 6, 64, seed=s, dtype=dtype) for s in range(3)]
    heads = [rand(1, 6, m, 64, seed=s, dtype=dtype) for s, m in enumerate((short, n, n))]
    return {
        "topk_partition": (lambda s: topk_partition(s, k), [rand(8, n, dtype=dtype)]),
        "soft_topk": (lambda s: soft_topk(s, 700, sigma=0.5, samples=16, seed=3), [rand(4, 1372, dtype=dtype)]),
        "gather_tokens": (lambda x: gather_tokens(x, few, unique=True), [rand(2, n, 768, dtype=dtype)]),
        "gather_duplicates": (lambda x: gather_tokens(x, many % 1000), [rand(2, n, 768, dtype=dtype)]),
        "scatter_tokens": (lambda y, f: scatter_tokens(y, few, n, fill=f), [rand(2, v, 384, dtype=dtype), rand(384)]),
        "scatter_among": (
            lambda y, f: scatter_tokens(y, few, n, fill=f),
            [rand(2, v, 384, dtype=dtype), rand(2, n, 384, dtype=dtype)],
        ),
        "decoder_tokens": (
            lambda x, m, p: decoder_tokens(x, few, many, m, p),
            [rand(2, v, 384, dtype=dtype), rand(384), rand(n, 384)],
        ),
        "tubelets": (lambda: tubelets(video, few[:1], **norm, dtype=dtype), []),
        "fsq": (lambda z: fsq(z, [8] * 6), [rand(2, n, 6, dtype=dtype)]),
        "attention": (lambda *x: attention(*x), heads),
        "attention_kv_indices": (lambda *x: attention(*x, kv_indices=few[:1]), heads),
        "attention_varlen": (lambda *x: attention_varlen(*x, starts, starts, 1400, 1400), packed),
    }


NAMES = ("topk_partition", "soft_topk", "gather_tokens", "gather_duplicates", "scatter_tokens", "scatter_among",
         "decoder_tokens", "tubelets", "fsq", "attention", "attention_kv_indices", "attention_varlen")  # fmt: skip


def evaluate(function, inputs):
    """Results, and the gradients of a weighted sum of them."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    smooth = [y for y in results if y.requires_grad]
    grads = (
        torch.autograd.grad(smooth, inputs, [rand(*y.shape, seed=7, dtype=y.dtype) for y in smooth]) if smooth else ()
    )
    return [*(y.detach() for y in results), *grads]


def error(x, wanted):
    return (x.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)


def kernel(name, frames, dtype, monkeypatch, choice="triton"):
    monkeypatch.setenv("VMAE_KERNELS", choice)
    return evaluate(*calls(frames, dtype)[name])


@pytest.mark.parametrize("frames", list(TOKENS), ids=lambda frames: f"{frames:04}frames")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_as_the_reference(name, dtype, frames, monkeypatch):
    if frames == 1024 and dtype == torch.float32 and name.startswith("attention"):
        pytest.skip("without matrix instructions: minutes")
    ours, theirs = (kernel(name, frames, dtype, monkeypatch, choice) for choice in ("triton", "torch"))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        if not mine.is_floating_point():
            # Near-ties of noisy scores, and latents on the edge between two codes, may fall to either side.
            assert (mine != other).float().mean() <= (1e-3 if name == "fsq" else 0)
            continue
        assert error(mine, other) < 4 * torch.finfo(dtype).eps ** (0.75 if name == "fsq" else 1) + 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_each_time_on_any_stream_in_any_memory(name, monkeypatch):
    first = kernel(name, 128, torch.bfloat16, monkeypatch)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for stream in streams:
        torch.full((1 << 28,), torch.nan, device="cuda")  # what comes next finds it in its memory
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            again = kernel(name, 128, torch.bfloat16, monkeypatch)
        torch.cuda.synchronize()
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_captured_in_a_graph(name, monkeypatch):
    """Nothing waits for the host: what is captured gives new results for new inputs."""
    monkeypatch.setenv("VMAE_KERNELS", "triton")
    function, inputs = calls(128, torch.bfloat16)[name]
    with torch.no_grad():
        function(*inputs)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function(*inputs)
        for x in inputs:
            x.copy_(x.flip(-1))
        graph.replay()
        torch.cuda.synchronize()
        wanted = function(*inputs)
    results, wanted = (x if isinstance(x, tuple) else (x,) for x in (results, wanted))
    for a, b in zip(results, wanted, strict=True):
        assert torch.equal(a, b)


def test_gathered_beyond_two_to_the_31_elements(monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "triton")
    n, d = 2_900_000, 768
    x = torch.zeros(1, n, d, dtype=torch.bfloat16, device="cuda")
    x[0, -3:] = torch.tensor([1.0, 2.0, 3.0], device="cuda")[:, None].bfloat16()
    y = gather_tokens(x, torch.tensor([[n - 1, 0, n - 3, n - 2]], device="cuda"))
    assert y[0, :, 0].tolist() == y[0, :, -1].tolist() == [3.0, 0.0, 1.0, 2.0]
    placed = scatter_tokens(y, torch.tensor([[n - 1, 0, n - 3, n - 2]], device="cuda"), n)
    assert torch.equal(placed, x)


def test_the_rest_beyond_two_to_the_31_elements(monkeypatch):
    """The last rows of what is that large, and of the same alone, are the same."""
    monkeypatch.setenv("VMAE_KERNELS", "triton")
    scores = rand(200_000, 12_544, dtype=torch.bfloat16)
    for a, b in zip(topk_partition(scores, 1255), topk_partition(scores[-2:], 1255), strict=True):
        assert torch.equal(a[-2:], b)
    del scores, a, b
    z = rand(400_000_000, 6, dtype=torch.bfloat16)
    for a, b in zip(fsq(z, [8] * 6), fsq(z[-5:], [8] * 6), strict=True):
        assert torch.equal(a[-5:], b)
    del z, a, b
    video = torch.randint(0, 256, (1, 4096, 448, 448, 3), device="cuda", dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    last = torch.tensor([[28 * 28 - 1, 5]], device="cuda")
    norm = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    far = tubelets(video, last + 2047 * 28 * 28, **norm)
    assert torch.equal(far, tubelets(video[:, :, -2:], last, **norm))
    del video
    tokens, order = rand(8, 400_000, 768, dtype=torch.bfloat16), chosen(8, 400_000, 400_000)
    z = decoder_tokens(tokens, order, order[:, :8], rand(768), rand(400_000, 768))
    assert torch.equal(z[7:], decoder_tokens(tokens[7:], order[7:], order[7:, :8], rand(768), rand(400_000, 768)))
    del tokens, z
    q, k = rand(1, 12, 16, 64, dtype=torch.bfloat16), rand(1, 12, 3_000_000, 64, dtype=torch.bfloat16)
    rows = torch.arange(2_999_900, 3_000_000, device="cuda")[None]
    assert torch.equal(attention(q, k, k, kv_indices=rows), attention(q, *(k[:, :, -100:].contiguous(),) * 2))


def test_what_a_search_finds_does_the_same(monkeypatch, tmp_path):
    """VMAE_AUTOTUNE=1 times launches on these tensors; their results are those of the last launch alone."""
    monkeypatch.setenv("VMAE_AUTOTUNE_DIR", str(tmp_path))
    for name in NAMES:
        monkeypatch.setenv("VMAE_AUTOTUNE", "0")
        wanted = kernel(name, 4, torch.bfloat16, monkeypatch)
        monkeypatch.setenv("VMAE_AUTOTUNE", "1")
        for ours, theirs in zip(kernel(name, 4, torch.bfloat16, monkeypatch), wanted, strict=True):
            assert error(ours, theirs) < 4 * torch.finfo(torch.bfloat16).eps
    assert len([path for path in tmp_path.rglob("*.json") if path.is_file()]) > len(NAMES)


def test_attention_of_float64_is_pytorchs(monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "triton")
    q, k = rand(1, 2, 40, 32).double(), rand(1, 2, 50, 32).double()
    wanted = (q @ k.mT / 32**0.5).softmax(-1) @ k
    torch.testing.assert_close(attention(q, k, k), wanted)


def test_a_broken_promise_is_found_on_request(monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "triton")
    monkeypatch.setenv("VMAE_CHECK", "1")
    x = rand(1, 5, 8)
    with pytest.raises(ValueError, match=r"indices: expected values in \[0, 5\), got 7"):
        gather_tokens(x, torch.tensor([[0, 7]], device="cuda"))
    with pytest.raises(ValueError, match="indices: expected distinct values"):
        gather_tokens(x, torch.tensor([[2, 2]], device="cuda"), unique=True)
