"""attention and attention_varlen against a naive softmax in float64.

In a lower precision the error may be at most twice that of the same naive computation done in that precision.
"""

import math
import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vmae_kernels import _csrc, attention, attention_varlen, reference

HEADS_FIRST, TOKENS_FIRST = "heads first", "tokens first"


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive(q, k, v, scale=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ k.transpose(-1, -2) * scale
    weights = (scores - scores.max(-1, keepdim=True).values).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def inputs(b, h, m, n, d, dtype=torch.float32, layout=HEADS_FIRST):
    tensors = []
    for i, length in enumerate((m, n, n)):
        x = rand(b, length, h, d, seed=i, dtype=dtype).transpose(1, 2)
        tensors.append((x.contiguous() if layout == HEADS_FIRST else x).requires_grad_())
    return tensors


def run(function, tensors, grad):
    out = function(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def check(function, reference, tensors, grad):
    """Output and gradients of `function` against `reference` in float64 and in the tensors' own dtype."""
    got = run(function, tensors, grad)
    twins = [x.detach().clone().requires_grad_() for x in tensors]
    low = run(reference, twins, grad)
    truth = run(reference, [x.detach().double().requires_grad_() for x in tensors], grad.double())
    # Where the naive computation happens to be exact (one key) twice its error is none: allow a few float32 roundings.
    floor = 8 * torch.finfo(torch.float32).eps * max([1.0, *(x.abs().max().item() for x in truth if x.numel())])
    for ours, theirs, exact in zip(got, low, truth, strict=True):
        assert ours.dtype == tensors[0].dtype
        assert ours.shape == exact.shape
        error, allowed = (
            (x.double() - exact).abs().max() if exact.numel() else torch.zeros(()) for x in (ours, theirs)
        )
        assert error <= 2 * allowed + floor
    return got


@pytest.mark.parametrize("layout", [HEADS_FIRST, TOKENS_FIRST])
@pytest.mark.parametrize("d", [16, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype, d, layout):
    tensors = inputs(2, 3, 37, 53, d, dtype, layout)
    check(attention, naive, tensors, rand(2, 3, 37, d, seed=9, dtype=dtype))


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 300), (300, 1), (0, 5), (64, 64), (129, 257)])
def test_lengths(m, n):
    check(attention, naive, inputs(1, 2, m, n, 16), rand(1, 2, m, 16, seed=9))


@pytest.mark.parametrize("scale", [0.05, 1.0, -0.3, 0.0])
def test_scale(scale):
    def scaled(q, k, v):
        return attention(q, k, v, scale=scale)

    check(scaled, lambda q, k, v: naive(q, k, v, scale), inputs(2, 2, 9, 11, 32), rand(2, 2, 9, 32, seed=9))


def test_large_scores_do_not_overflow():
    q, k, v = inputs(1, 1, 5, 7, 16)
    with torch.no_grad():
        out = attention(q * 1000, k * 1000, v)
    assert out.isfinite().all()
    torch.testing.assert_close(
        out.double(), naive(q.double() * 1000, k.double() * 1000, v.double()), rtol=1e-4, atol=1e-4
    )


def test_mixed_layouts():
    q, k, v = inputs(2, 3, 10, 12, 16)
    loose = [k.detach().transpose(1, 2).contiguous().transpose(1, 2), v.detach().permute(3, 0, 1, 2).contiguous()]
    with torch.no_grad():
        torch.testing.assert_close(attention(q, loose[0], loose[1].permute(1, 2, 3, 0)), attention(q, k, v))
        one = k[:1].expand(2, 3, 12, 16)
        torch.testing.assert_close(attention(q, one, one), attention(q, one.contiguous(), one.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("indexed", [False, True])
def test_rows_whose_numbers_lie_apart(dtype, indexed):
    """Of queries, keys and values, and of the gradient, as that of a sum is."""
    shapes = ((2, 3, 16, 5), (2, 3, 16, 9), (2, 16, 9, 3))
    q, k, v = (rand(*shape, seed=s, dtype=dtype) for s, shape in enumerate(shapes))
    tensors = [x.requires_grad_() for x in (q.transpose(2, 3), k.transpose(2, 3), v.permute(0, 3, 2, 1))]
    assert all(x.stride(-1) != 1 for x in tensors)
    indices = torch.tensor([[6, 0, 3, 2], [1, 8, 7, 5]])
    check(
        lambda q, k, v: attention(q, k, v, kv_indices=indices if indexed else None),
        lambda q, k, v: naive(q, *((named(k, indices), named(v, indices)) if indexed else (k, v))),
        tensors,
        torch.ones((), dtype=dtype).expand(2, 3, 5, 16),
    )


def named(x, indices):
    return torch.stack([x[b][:, row] for b, row in enumerate(indices.tolist())])


@pytest.mark.parametrize("layout", [HEADS_FIRST, TOKENS_FIRST])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_indices(dtype, index_dtype, layout):
    indices = torch.tensor([[6, 0, 3, 2], [1, 8, 7, 5]], dtype=index_dtype)
    tensors = inputs(2, 3, 5, 9, 16, dtype, layout)
    _, _, grad_k, grad_v = check(
        lambda q, k, v: attention(q, k, v, kv_indices=indices),
        lambda q, k, v: naive(q, named(k, indices), named(v, indices)),
        tensors,
        rand(2, 3, 5, 16, seed=9, dtype=dtype),
    )
    for b, row in enumerate(indices.tolist()):
        rest = [n for n in range(9) if n not in row]
        assert not grad_k[b][:, rest].any()
        assert not grad_v[b][:, rest].any()
        assert (grad_v[b][:, row] != 0).any(-1).all()


def test_rows_not_named_are_not_read():
    q, k, v = (x.detach() for x in inputs(1, 2, 5, 6, 16))
    k[:, :, 2], v[:, :, 2] = math.nan, math.inf
    tensors = [x.requires_grad_() for x in (q, k, v)]
    out, *grads = run(lambda *x: attention(*x, kv_indices=torch.tensor([[0, 5, 1]])), tensors, torch.ones(1, 2, 5, 16))
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("kv", [None, [[2, 0], [1, 3]]])
def test_gradcheck(kv):
    tensors = [x.detach().double().requires_grad_() for x in inputs(2, 1, 3, 4, 16)]
    indices = None if kv is None else torch.tensor(kv)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, scale=0.3, kv_indices=indices), tensors, fast_mode=True)


KERNELS = os.environ.get("TRITON_INTERPRET") == "1" or "VMAE_MACHINE" in os.environ  # Triton's, on CPU tensors
amx = pytest.mark.skipif(not _csrc.facts().get("amx"), reason="no Intel AMX, or the extension was not built")


@pytest.fixture(params=["kernel"] if KERNELS else ["torch", pytest.param("csrc", marks=amx)])
def implementation(request, monkeypatch):
    """Each of those for bfloat16 on a CPU; PyTorch's takes the way of many tokens for few, in several parts."""
    if not KERNELS:
        monkeypatch.setenv("VMAE_KERNELS", request.param)
    monkeypatch.setattr(reference, "_SMALL", 0)
    monkeypatch.setattr(reference, "_SCORES", 5_000)


@pytest.mark.large
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", [HEADS_FIRST, TOKENS_FIRST])
@pytest.mark.parametrize(("m", "n", "d"), [(150, 170, 64), (129, 1, 16), (1, 300, 128), (70, 71, 80), (8, 800, 96)])
def test_many_bfloat16_tokens_on_a_cpu(implementation, m, n, d, layout, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        grad = rand(2, 5, m, d, seed=9, dtype=torch.bfloat16)
        check(attention, naive, inputs(2, 5, m, n, d, torch.bfloat16, layout), grad)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("scale", [3.0, 0.3, -0.3, 0.0])
def test_many_bfloat16_tokens_at_any_scale(implementation, scale):
    """From queries that attend to one key to such that attend to all alike."""
    check(
        lambda q, k, v: attention(q, k, v, scale=scale),
        lambda q, k, v: naive(q, k, v, scale),
        inputs(1, 2, 140, 200, 64, torch.bfloat16),
        rand(1, 2, 140, 64, seed=9, dtype=torch.bfloat16),
    )


@pytest.mark.large
def test_many_bfloat16_tokens_are_nearly_as_exact_as_in_pytorch():
    """On average within twice the error of PyTorch's own."""
    q, k, v = inputs(1, 2, 700, 900, 64, torch.bfloat16)
    grad = rand(1, 2, 700, 64, seed=9, dtype=torch.bfloat16)
    truth = run(naive, [x.detach().double().requires_grad_() for x in (q, k, v)], grad.double())
    ours, theirs = (
        [(x.double() - exact).norm() / exact.norm() for x, exact in zip(run(f, (q, k, v), grad), truth, strict=True)]
        for f in (attention, torch.nn.functional.scaled_dot_product_attention)
    )
    assert all(mine <= 2 * other for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_own_precision(implementation, dtype):
    tensors = inputs(1, 2, 40, 50, 32)
    grad = rand(1, 2, 40, 32, seed=9, dtype=dtype)
    with torch.autocast("cpu", dtype):
        out = attention(*tensors)
    grads = torch.autograd.grad(out, tensors, grad)
    assert out.dtype == dtype
    lower = [x.detach().to(dtype).requires_grad_() for x in tensors]
    expected = run(attention, lower, grad)
    assert torch.equal(out, expected[0])
    assert all(torch.equal(a, b.float()) for a, b in zip(grads, expected[1:], strict=True))


def test_nothing_attends(implementation):
    q, k, v = inputs(1, 2, 0, 30, 16, torch.bfloat16)
    out, *grads = run(attention, (q, k, v), torch.zeros(1, 2, 0, 16, dtype=torch.bfloat16))
    assert out.shape == (1, 2, 0, 16)
    assert not any(x.any() for x in grads)


def test_a_number_that_is_none_shows_in_the_gradient(implementation):
    q, k, v = inputs(1, 2, 20, 30, 16, torch.bfloat16)
    grad = rand(1, 2, 20, 16, seed=9, dtype=torch.bfloat16)
    grad[0, 1, 3, 5] = math.nan
    _, grad_q, grad_k, grad_v = run(attention, (q, k, v), grad)
    assert grad_q.isnan().any(-1).nonzero().tolist() == [[0, 1, 3]]
    for gradient in (grad_k, grad_v):
        assert not gradient[:, 0].isnan().any()
        assert gradient[:, 1].isnan().any()


@pytest.mark.large
def test_deterministic():
    tensors, grad = inputs(2, 4, 130, 150, 64), rand(2, 4, 130, 64, seed=9)
    first, again = run(attention, tensors, grad), run(attention, tensors, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_flops_are_counted():
    """Two products forward, five backward, as flop_counter counts PyTorch's; packed ones by their bounds."""
    q, k, v = (rand(2, 3, m, 32, seed=m, dtype=torch.bfloat16).requires_grad_() for m in (40, 24, 24))
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * (2 * 3 * 40 * 24 * 32)
    packed = (rand(40, 3, 32, seed=s).requires_grad_() for s in range(3))
    starts = torch.tensor([0, 10, 40], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        attention_varlen(*packed, starts, starts, 30, 30).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * (3 * 40 * 30 * 32)


def test_errors():
    q, k, v = (x.detach() for x in inputs(2, 3, 5, 7, 16))
    with pytest.raises(ValueError, match=r"q: .*\[B, H, M, d\].*got \[3, 5, 16\]"):
        attention(q[0], k, v)
    for bad in (k[:1], k[:, :1], k[..., :15]):
        with pytest.raises(ValueError, match=r"k: .*\[B, H, N, d\] with .*got \["):
            attention(q, bad, v)
    for bad in (v[:1], v[:, :1], v[:, :, :6], v[..., :15]):
        with pytest.raises(ValueError, match=r"v: .*\[B, H, N, d\] with .*got \["):
            attention(q, k, bad)
    for d in (8, 15, 129):
        with pytest.raises(ValueError, match=rf"16 to 128.*got {d}"):
            attention(*inputs(1, 1, 2, 2, d))
    with pytest.raises(ValueError, match=r"keys.*at least 1.*got 0"):
        attention(q, k[:, :, :0], v[:, :, :0])
    with pytest.raises(TypeError, match=r"k: .*float32.*got torch.float64"):
        attention(q, k.double(), v)
    with pytest.raises(TypeError, match=r"v: .*float32.*got torch.float16"):
        attention(q, k, v.half())
    with pytest.raises(TypeError, match=r"q: .*float32.*got int64"):
        attention(q.long(), k.long(), v.long())


def test_kv_indices_errors():
    q, k, v = (x.detach() for x in inputs(2, 3, 5, 7, 16))
    for bad in (-1, 7, 2**31 - 1):
        for index_dtype in (torch.int32, torch.int64):
            with pytest.raises(ValueError, match=rf"{bad}(?s:.*)7|7(?s:.*){bad}"):
                attention(q, k, v, kv_indices=torch.tensor([[0, 1], [2, bad]], dtype=index_dtype))
    with pytest.raises(ValueError, match=r"keys.*at least 1.*got 0"):
        attention(q, k, v, kv_indices=torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"kv_indices: .*int32, int64.*got float32"):
        attention(q, k, v, kv_indices=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"kv_indices: .*B = 2.*got \[1, 2\]"):
        attention(q, k, v, kv_indices=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"kv_indices: .*\[B, S\].*got \[2\]"):
        attention(q, k, v, kv_indices=torch.zeros(2, dtype=torch.int64))


def packed(lengths_q, lengths_k, h, d, dtype=torch.float32):
    tensors = [
        rand(sum(lengths), h, d, seed=i, dtype=dtype).requires_grad_()
        for i, lengths in enumerate((lengths_q, lengths_k, lengths_k))
    ]
    return tensors, *(
        torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
        for lengths in (lengths_q, lengths_k)
    )


def naive_varlen(lengths_q, lengths_k, scale=None):
    def function(q, k, v):
        parts = []
        split = (x.split(list(lengths)) for x, lengths in ((q, lengths_q), (k, lengths_k), (v, lengths_k)))
        for qs, ks, vs in zip(*split, strict=True):
            heads = [x.transpose(0, 1) for x in (qs, ks, vs)]
            # The sums keep empty sequences in the graph.
            nothing = qs * 0 + ks.sum() * 0 + vs.sum() * 0
            parts.append(naive(*heads, scale).transpose(0, 1) if len(qs) and len(ks) else nothing)
        return torch.cat(parts) if parts else q * 0 + k.sum() * 0 + v.sum() * 0

    return function


LENGTHS = [
    ([5], [5]),
    ([3, 40, 1], [7, 1, 33]),
    ([4, 0, 3], [2, 5, 6]),
    ([4, 2, 3], [2, 0, 6]),
    ([0, 0, 2, 0], [0, 3, 2, 0]),
    ([0, 0], [0, 0]),
    ([2, 3], [0, 0]),
    ([], []),
]


@pytest.mark.parametrize(("lengths_q", "lengths_k"), LENGTHS)
@pytest.mark.parametrize("slack", [0, 5])
def test_varlen(lengths_q, lengths_k, slack):
    tensors, cu_q, cu_k = packed(lengths_q, lengths_k, 2, 16)
    longest = max(lengths_q, default=0) + slack, max(lengths_k, default=0) + slack

    def function(q, k, v):
        return attention_varlen(q, k, v, cu_q, cu_k, *longest)

    out, *grads = check(function, naive_varlen(lengths_q, lengths_k), tensors, rand(sum(lengths_q), 2, 16, seed=9))
    for b, (m, n) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        if n == 0:
            assert not out[cu_q[b] : cu_q[b + 1]].any()
            assert not grads[0][cu_q[b] : cu_q[b + 1]].any()
        if m == 0:
            assert not grads[1][cu_k[b] : cu_k[b + 1]].any()
            assert not grads[2][cu_k[b] : cu_k[b + 1]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [16, 80, 128])
def test_varlen_precision(dtype, d):
    lengths = [20, 33, 1], [31, 17, 2]
    tensors, cu_q, cu_k = packed(*lengths, 3, d, dtype)
    grad = rand(54, 3, d, seed=9, dtype=dtype)
    for scale in (None, 0.2):
        check(
            lambda q, k, v, scale=scale: attention_varlen(q, k, v, cu_q, cu_k, 33, 31, scale=scale),
            naive_varlen(*lengths, scale),
            tensors,
            grad,
        )


def test_varlen_strides_and_determinism():
    _, cu_q, cu_k = packed([3, 4], [5, 6], 2, 16)
    q = rand(2, 7, 16).transpose(0, 1).requires_grad_()
    k, v = (rand(11, 16, 4, seed=s).transpose(1, 2)[:, ::2].detach().requires_grad_() for s in (1, 2))
    grad = rand(1, 2, 16, seed=9).expand(7, 2, 16)

    def function(q, k, v):
        return attention_varlen(q, k, v, cu_q, cu_k, 4, 6)

    first = check(function, naive_varlen([3, 4], [5, 6]), [q, k, v], grad)
    assert all(torch.equal(a, b) for a, b in zip(first, run(function, [q, k, v], grad), strict=True))


def test_varlen_gradcheck():
    tensors, cu_q, cu_k = packed([2, 0, 1, 2], [3, 2, 0, 1], 1, 16)
    tensors = [x.detach().double().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: attention_varlen(*x, cu_q, cu_k, 2, 3), tensors, fast_mode=True)


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("offsets", [[1, 3, 7], [0, 3, 6], [0, 3, 8], [0, 8, 7], [0, -1, 7], [0, 3, 2**31 - 1]])
def test_bad_offsets(offsets, which):
    (q, k, v), cu, _ = packed([3, 4], [3, 4], 2, 16)
    bad = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"cu_seqlens_{which}"):
        attention_varlen(q, k, v, *((bad, cu) if which == "q" else (cu, bad)), 8, 8)


def test_bad_bounds():
    (q, k, v), cu, _ = packed([3, 4], [3, 4], 2, 16)
    for bounds, name in (((3, 4), "max_q"), ((4, 3), "max_k")):
        with pytest.raises(ValueError, match=rf"{name}(?s:.*)3"):
            attention_varlen(q, k, v, cu, cu, *bounds)
    with pytest.raises(ValueError, match=r"max_q: .*at least 0.*got -1"):
        attention_varlen(q, k, v, cu, cu, -1, 4)
    with pytest.raises(TypeError, match=r"max_k: .*integer.*got float"):
        attention_varlen(q, k, v, cu, cu, 4, 4.0)


def test_varlen_errors():
    (q, k, v), cu, _ = packed([3, 4], [3, 4], 2, 16)
    for dtype in (torch.int64, torch.float32):
        with pytest.raises(TypeError, match=r"cu_seqlens_q: .*int32.*got"):
            attention_varlen(q, k, v, cu.to(dtype), cu, 4, 4)
    with pytest.raises(ValueError, match=r"cu_seqlens_k: .*starts = 3.*got \[2\]"):
        attention_varlen(q, k, v, cu, cu[:2], 4, 4)
    with pytest.raises(ValueError, match=r"cu_seqlens_q: .*got \[1, 3\]"):
        attention_varlen(q, k, v, cu[None], cu, 4, 4)
    with pytest.raises(ValueError, match=r"at least 1.*got 0"):
        attention_varlen(q, k, v, cu[:0], cu[:0], 4, 4)
    with pytest.raises(ValueError, match=r"q: .*\[total_q, H, d\].*got \[7, 16\]"):
        attention_varlen(q[:, 0], k, v, cu, cu, 4, 4)
    with pytest.raises(ValueError, match=r"k: .*H = 2.*got \[7, 1, 16\]"):
        attention_varlen(q, k[:, :1], v, cu, cu, 4, 4)
    with pytest.raises(ValueError, match=r"v: .*total_k = 7.*got \[6, 2, 16\]"):
        attention_varlen(q, k, v[:6], cu, cu, 4, 4)
    with pytest.raises(ValueError, match=r"16 to 128.*got 8"):
        attention_varlen(q[..., :8], k[..., :8], v[..., :8], cu, cu, 4, 4)
    with pytest.raises(TypeError, match=r"v: .*float32.*got torch.bfloat16"):
        attention_varlen(q, k, v.bfloat16(), cu, cu, 4, 4)


def test_scores_far_below_zero():
    """Every one of them: a weight's exponent minus the log-sum-exp stays in range, also beyond the last key."""
    tensors = [x.detach() * 0.1 + sign * 20 for x, sign in zip(inputs(1, 2, 70, 75, 16), (1, -1, 0), strict=True)]
    tensors, grad = [x.requires_grad_() for x in tensors], rand(1, 2, 70, 16, seed=9)
    truth = run(naive, [x.detach().double().requires_grad_() for x in tensors], grad.double())
    # Scores and log-sum-exp are near -2,300 in powers of 2, which float32 holds to 3e-4: so exact are the weights, and
    # the gradients are sums of them times 20 / 4. One that keeps the weights, as the naive computation, is more exact.
    for got, exact in zip(run(attention, tensors, grad), truth, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=5 * 3e-4)


def test_keys_that_are_infinitely_far():
    """The first ones, for longer than any block."""
    q, k, v = (x.detach() for x in inputs(1, 1, 5, 300, 16))
    q, k[:, :, :290] = torch.full_like(q, 1e30), torch.full_like(k[:, :, :290], -1e30)
    k[:, :, 290:] = 0
    torch.testing.assert_close(attention(q, k, v), v[:, :, 290:].mean(2, keepdim=True).expand(1, 1, 5, 16))
