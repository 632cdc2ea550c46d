"""The compiled attention on a CPU with Intel AMX, in bfloat16, against a naive softmax in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import HEADS_FIRST, TOKENS_FIRST, amx, check, inputs, naive, rand, run

from vmae_kernels import _csrc, attention, attention_varlen

pytestmark = amx


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", "csrc")


def surrounded(x):
    """A copy of [B, H, M, d], heads inside tokens, with NaN all around, so that a stray read would show."""
    b, h, m, d = x.shape
    memory = torch.full((x.numel() + 256,), torch.nan, dtype=torch.bfloat16)
    return memory[128 : 128 + x.numel()].view(b, m, h, d).transpose(1, 2).copy_(x.detach()).requires_grad_()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, top) for top in (2, 3, 150, 150))),
    d=st.sampled_from([16, 17, 31, 32, 33, 64, 72, 100, 127, 128]),
    scale=st.sampled_from([None, 1.0, 0.02, -0.3]),
    layout=st.sampled_from([HEADS_FIRST, TOKENS_FIRST]),
)
def test_any_shape(sizes, d, scale, layout):
    b, h, m, n = sizes
    tensors = inputs(b, h, m, n, d, torch.bfloat16, layout)
    if layout == TOKENS_FIRST:
        tensors = [surrounded(x) for x in tensors]
    scale = d**-0.5 if scale is None else scale
    grad = rand(b, h, m, d, seed=9, dtype=torch.bfloat16)
    got = run(lambda *x: attention(*x, scale=scale), tensors, grad)
    pytorch = run(lambda *x: F.scaled_dot_product_attention(*x, scale=scale), tensors, grad)
    truth = run(lambda *x: naive(*x, scale), [x.detach().double().requires_grad_() for x in tensors], grad.double())
    for ours, theirs, exact in zip(got, pytorch, truth, strict=True):
        error, allowed = ((x.double() - exact).norm() for x in (ours, theirs))
        # On a few rows one of the two can be lucky: of one query, the gradient's error varies by more than half.
        assert error <= (1.2 if min(m, n) > 60 else 3) * allowed + 1e-3 * exact.norm() + 1e-6 * grad.norm()


@pytest.mark.parametrize(("b", "h", "m", "n"), [(1, 1, 700, 900), (1, 2, 257, 513), (1, 13, 33, 321)])
def test_several_blocks_and_segments(b, h, m, n):
    check(attention, naive, inputs(b, h, m, n, 64, torch.bfloat16), rand(b, h, m, 64, seed=9, dtype=torch.bfloat16))


@pytest.mark.parametrize("heads", [1, 7])
def test_the_same_bits_on_any_number_of_threads(heads):
    tensors, grad = inputs(1, heads, 300, 600, 64, torch.bfloat16), rand(1, heads, 300, 64, seed=9).bfloat16()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            out = attention(*tensors)
            results.append([out, *torch.autograd.grad(out, tensors, grad)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_nothing_is_written_beside_the_results():
    b, h, m, n, d = 2, 3, 37, 41, 50
    q, k, v = (x.detach() for x in inputs(b, h, m, n, d, torch.bfloat16))
    memory = [torch.full((b, rows + 2, h + 2, d + 6), 7.0, dtype=torch.bfloat16) for rows in (m, m, n, n)]
    o, dq, dk, dv = results = [x[:, 1:-1, 1:-1, 3:-3].transpose(1, 2) for x in memory]
    lse = torch.empty(b, h, m)
    _csrc.ops.attention(o, lse, q, k, v, 0.1)
    _csrc.ops.attention_backward(dq, dk, dv, torch.ones_like(q), q, k, v, o, lse, 0.1)
    assert not any((x == 7).all(-1).any() for x in results)
    for x, inner in zip(memory, results, strict=True):
        inner.fill_(7.0)
        assert (x == 7).all()
    # And what the backward is given besides.
    torch.testing.assert_close(lse, (q.float() @ k.float().mT * 0.1).logsumexp(-1), rtol=1e-4, atol=2e-4)


def test_a_query_does_not_depend_on_the_others():
    q, k, v = (x.detach() for x in inputs(1, 2, 100, 300, 64, torch.bfloat16))
    assert torch.equal(attention(q[:, :, 40:73], k, v), attention(q, k, v)[:, :, 40:73])


def test_what_is_not_finite_shows_where_it_belongs():
    q, k, v = (x.detach() for x in inputs(1, 2, 40, 50, 32, torch.bfloat16))
    clean = attention(q, k, v)
    for tensor, row in ((q, 7), (k, 49), (v, 3)):
        kept = tensor[0, 1, row, 5].clone()
        tensor[0, 1, row, 5] = math.nan
        got = attention(q, k, v)
        tensor[0, 1, row, 5] = kept
        wrong = torch.zeros_like(got, dtype=torch.bool)
        wrong[0, 1, slice(row, row + 1) if tensor is q else slice(None), 5 if tensor is v else slice(None)] = True
        assert torch.equal(got.isnan(), wrong)
        assert torch.equal(got[~wrong], clean[~wrong])
    # A key that no query attends to, whose score is -inf, in the first block and in a later one.
    q[..., 0], k[..., 0] = 1.0, 0.0
    for far in (0, 49):
        k[0, :, far, 0] = -math.inf
        rest = [n for n in range(50) if n != far]
        torch.testing.assert_close(attention(q, k, v), attention(q, k[:, :, rest], v[:, :, rest]), rtol=0, atol=8e-3)
        k[0, :, far, 0] = 0.0


def test_large_scores():
    """Those of one key are far above the others', which come before and after it, in other blocks too."""
    q, k, v = (x.detach() for x in inputs(1, 2, 40, 900, 16, torch.bfloat16))
    best = [3, 500, 899]
    for n in best:
        k[:, :, n] *= 100
    tensors = [(x * 30).detach().requires_grad_() if x is not v else v.requires_grad_() for x in (q, k, v)]
    out = attention(*tensors, scale=1.0)
    grads = torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert all(x.isfinite().all() for x in (out, *grads))
    torch.testing.assert_close(out.double(), naive(*(x.double() for x in tensors), 1.0), rtol=8e-3, atol=8e-3)


def test_a_block_of_keys_that_do_not_count():
    """Scores of -inf alone, as many as there are keys in the first block and more."""
    q, k, v = (x.detach() for x in inputs(1, 2, 40, 700, 16, torch.bfloat16))
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, :600, 0] = -math.inf
    torch.testing.assert_close(attention(q, k, v), attention(q, k[:, :, 600:], v[:, :, 600:]), rtol=0, atol=8e-3)


def test_scores_far_below_zero():
    """A key that is none, of score 0, would weigh infinitely much beside them."""
    q, k, v = inputs(1, 2, 33, 33, 16, torch.bfloat16)
    tensors = [x.detach() for x in (q, k * 0.1, v)]
    tensors[0][..., 0], tensors[1][..., 0] = 30.0, -30.0
    tensors = [x.requires_grad_() for x in tensors]
    grad = rand(1, 2, 33, 16, seed=9, dtype=torch.bfloat16)
    got = run(lambda *x: attention(*x, scale=1.0), tensors, grad)
    truth = run(lambda *x: naive(*x, 1.0), [x.detach().double().requires_grad_() for x in tensors], grad.double())
    for ours, exact in zip(got, truth, strict=True):
        assert ours.isfinite().all()
        # But for what a gradient's roundings times 30 leave where their sum is 0.
        ours, exact = ours[..., 1:].double(), exact[..., 1:]
        torch.testing.assert_close(ours, exact, rtol=0.03, atol=0.03 * exact.abs().max().item())


def test_packed_sequences_take_it_too():
    q, k, v = (rand(60, 2, 32, seed=s, dtype=torch.bfloat16) for s in range(3))
    cu = torch.tensor([0, 17, 60], dtype=torch.int32)
    out = attention_varlen(q, k, v, cu, cu, 43, 43)
    for rows in (slice(0, 17), slice(17, 60)):
        alone = attention(*(x[None, rows].transpose(1, 2) for x in (q, k, v)))
        assert torch.equal(out[rows], alone[0].transpose(0, 1))


def test_forced_where_it_cannot_be(monkeypatch):
    q, k, v = (x.detach() for x in inputs(1, 2, 5, 6, 16, torch.bfloat16))
    monkeypatch.setattr(_csrc, "facts", lambda: {"amx": False})
    with pytest.raises(ValueError, match="VMAE_KERNELS=csrc: attention expected a processor with Intel AMX"):
        attention(q, k, v)
    monkeypatch.setattr(_csrc, "facts", lambda: {"missing": "the compiled extension"})
    with pytest.raises(ValueError, match="VMAE_KERNELS=csrc: attention expected the compiled extension"):
        attention(q, k, v)
    monkeypatch.setenv("VMAE_KERNELS", "auto")
    assert attention(q, k, v).isfinite().all()
