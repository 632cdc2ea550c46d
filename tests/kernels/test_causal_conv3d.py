"""causal_conv3d against explicit zero padding and a loop over taps in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vmae_kernels import causal_conv3d, reference, topk

LAST = torch.channels_last_3d


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(x, weight, bias=None, stride=(1, 1, 1), cache=None):
    """Differentiable; one product per tap of the kernel."""
    kt, kh, kw = weight.shape[2:]
    past = kt - stride[0]
    before = torch.zeros(*x.shape[:2], past, *x.shape[3:], dtype=x.dtype) if cache is None else cache
    padded = F.pad(torch.cat((before, x), dim=2), (kw // 2, kw // 2, kh // 2, kh // 2, 0, 0))
    frames, rows, columns = ((padded.shape[i + 2] - weight.shape[i + 2]) // stride[i] + 1 for i in range(3))
    y = 0
    for i, j, k in itertools.product(range(kt), range(kh), range(kw)):
        window = padded[:, :, i :: stride[0], j :: stride[1], k :: stride[2]][:, :, :frames, :rows, :columns]
        y = y + torch.einsum("bcthw,oc->bothw", window, weight[:, :, i, j, k])
    return y if bias is None else y + bias[:, None, None, None]


def case(kernel, bias=True, b=2, c=3, o=4, t=6, h=7, w=6, dtype=torch.float32):
    x, weight = rand(b, c, t, h, w, dtype=dtype), rand(o, c, *kernel, seed=1, dtype=dtype)
    return x, weight, rand(o, seed=2, dtype=dtype) if bias else None


def double(*tensors):
    return [None if x is None else x.double() for x in tensors]


KERNELS = [(1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 4, 4), (3, 1, 1), (1, 3, 3), (4, 2, 3), (2, 3, 4), (3, 4, 1)]
STRIDES = [(1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 1, 3), (3, 1, 1)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("bias", [True, False])
def test_explicit_padding(kernel, stride, bias):
    args = case(kernel, bias)
    if kernel[0] < stride[0]:
        with pytest.raises(ValueError, match=rf"at least the stride in time, {stride[0]}, got kt = {kernel[0]}"):
            causal_conv3d(*args, stride=stride)
        return
    y = causal_conv3d(*args, stride=stride)
    wanted = oracle(*double(*args), stride)
    sizes = [(n + 2 * (k // 2) - k) // s + 1 for n, k, s in zip((7, 6), kernel[1:], stride[1:], strict=True)]
    assert y.shape == wanted.shape == (2, 4, 6 // stride[0], *sizes)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=2e-5)


def test_oracle_against_a_loop():
    """The oracle itself, on one case, from the definition alone."""
    x, weight, bias = case((3, 2, 3), b=1, c=2, o=2, t=4, h=3, w=3, dtype=torch.float64)
    y = oracle(x, weight, bias, (2, 1, 2))
    for o, t, r, s in itertools.product(*(range(n) for n in y.shape[1:])):
        total = bias[o].item()
        for c, i, j, k in itertools.product(range(2), range(3), range(2), range(3)):
            frame, row, column = 2 * t - 1 + i, r - 1 + j, 2 * s - 1 + k
            if 0 <= frame < 4 and 0 <= row < 3 and 0 <= column < 3:
                total += (x[0, c, frame, row, column] * weight[o, c, i, j, k]).item()
        assert abs(total - y[0, o, t, r, s].item()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    args = case((3, 3, 3), dtype=dtype)
    y = causal_conv3d(*args)
    assert y.dtype == dtype
    wanted = oracle(*double(*args))
    tolerance = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize(("kt", "st"), [(3, 1), (2, 2), (4, 2), (4, 1), (1, 1)])
def test_no_frame_sees_the_future(kt, st, memory_format):
    x, weight, bias = case((kt, 3, 3), t=8)
    x = x.contiguous(memory_format=memory_format)
    y = causal_conv3d(x, weight, bias, stride=(st, 1, 1))
    for first in range(1, 8):
        later = x.clone()
        later[:, :, first:] = 100.0
        z = causal_conv3d(later, weight, bias, stride=(st, 1, 1))
        # Output t reads up to input t * st + st - 1, so these read nothing that changed.
        safe = first // st
        assert torch.equal(y[:, :, :safe], z[:, :, :safe])
        assert not torch.equal(y[:, :, safe : safe + 1], z[:, :, safe : safe + 1])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize(
    ("kt", "st", "chunks"),
    [(3, 1, [1, 2, 3, 2]), (3, 1, [8]), (4, 1, [1, 1, 1, 1, 4]), (4, 2, [2, 4, 2]), (2, 2, [2, 6]), (1, 1, [3, 5]),
     (3, 2, [2, 2, 4])],
)  # fmt: skip
def test_chunks_give_the_whole(kt, st, chunks, memory_format):
    x, weight, bias = case((kt, 3, 3), t=8)
    x, past, stride = x.contiguous(memory_format=memory_format), kt - st, (st, 2, 1)
    whole = causal_conv3d(x, weight, bias, stride=stride)
    parts, cache, seen = [], None, 0
    for chunk in x.split(chunks, dim=2):
        y, cache = causal_conv3d(chunk, weight, bias, stride=stride, cache=cache, return_cache=True)
        parts.append(y)
        seen += chunk.shape[2]
        history = torch.cat((torch.zeros(2, 3, 4, 7, 6), x[:, :, :seen]), dim=2)
        assert cache.shape == (2, 3, past, 7, 6)
        assert torch.equal(cache, history[:, :, history.shape[2] - past :])
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize(("kt", "st", "t"), [(3, 1, 6), (3, 1, 2), (3, 1, 1), (4, 2, 2), (2, 2, 4), (1, 1, 3)])
def test_cache_owns_its_memory(kt, st, t, memory_format):
    x, weight, _ = case((kt, 1, 1), t=t)
    x = x.contiguous(memory_format=memory_format)
    given = rand(2, 3, kt - st, 7, 6, seed=5).contiguous(memory_format=memory_format)
    for before in (None, given):
        _, cache = causal_conv3d(x, weight, stride=(st, 1, 1), cache=before, return_cache=True)
        assert cache.shape[2] == kt - st
        assert cache.untyped_storage().nbytes() == cache.numel() * 4
        kept = cache.clone()
        mine = cache.untyped_storage().data_ptr()
        if cache.numel():
            assert mine not in (x.untyped_storage().data_ptr(), given.untyped_storage().data_ptr())
        scratch = x.clone()
        x.fill_(7.0)
        given.fill_(8.0)
        assert torch.equal(cache, kept)
        x.copy_(scratch)
        given.copy_(rand(2, 3, kt - st, 7, 6, seed=5))


@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 1, 1), (2, 4, 3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_memory_format_is_kept_and_dense(memory_format, kernel, with_cache):
    x, weight, bias = case(kernel, t=4)
    x = x.contiguous(memory_format=memory_format)
    cache = rand(2, 3, kernel[0] - 1, 7, 6, seed=3).contiguous(memory_format=memory_format) if with_cache else None
    y = causal_conv3d(x, weight, bias, cache=cache)
    assert y.is_contiguous(memory_format=memory_format)
    assert y.untyped_storage().nbytes() == y.numel() * 4
    assert y.storage_offset() == 0
    torch.testing.assert_close(
        y, oracle(*double(x, weight, bias), cache=double(cache)[0]).float(), rtol=1e-5, atol=2e-5
    )


def test_strided_input_gives_a_dense_result():
    x, weight, bias = case((3, 3, 3), t=12, w=12)
    for view in (x[:, :, ::2, :, ::2], x[:1, :, :6, :, :6].expand(2, 3, 6, 7, 6)):
        y = causal_conv3d(view, weight, bias)
        assert y.is_contiguous() or y.is_contiguous(memory_format=LAST)
        torch.testing.assert_close(y, causal_conv3d(view.contiguous(), weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3, 3), (1, 1, 1)), ((4, 2, 3), (2, 2, 1)), ((2, 3, 3), (2, 1, 2))])
def test_gradients(kernel, stride, with_cache, memory_format):
    x, weight, bias = case(kernel, dtype=torch.float64)
    cache = rand(2, 3, kernel[0] - stride[0], 7, 6, seed=3, dtype=torch.float64) if with_cache else None
    tensors = [x.contiguous(memory_format=memory_format), weight, bias, *([cache] if with_cache else [])]
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    kept = tensors[3] if with_cache else None
    y = causal_conv3d(*tensors[:3], stride=stride, cache=kept)
    wanted = oracle(*tensors[:3], stride, kept)
    grad = rand(*y.shape, seed=4, dtype=torch.float64)
    # A cache of length 0 may be left out of the graph.
    got, truth = (torch.autograd.grad(out, tensors, grad, materialize_grads=True) for out in (y, wanted))
    for ours, theirs in zip(got, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize("t", [1, 2, 7])
@pytest.mark.parametrize(
    ("kernel", "st"), [((3, 3, 3), 1), ((2, 2, 3), 2), ((3, 3, 2), 2), ((1, 3, 3), 1), ((4, 1, 1), 1)]
)
def test_one_small_clip(kernel, st, t, with_cache, memory_format):
    """In float32 a CPU convolves it in two dimensions."""
    x, weight, bias = case(kernel, b=1, t=st * t)
    cache = rand(1, 3, kernel[0] - st, 7, 6, seed=3) if with_cache else None
    assert reference._as_images(x, x.shape, kernel)
    tensors = [x.contiguous(memory_format=memory_format), weight, bias, *([cache] if with_cache else [])]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    stride = (st, 2, 1)
    y = causal_conv3d(*tensors[:3], stride=stride, cache=tensors[3] if with_cache else None)
    wanted = oracle(*exact[:3], stride, exact[3] if with_cache else None)
    grad = rand(*y.shape, seed=4)
    got = torch.autograd.grad(y, tensors, grad, materialize_grads=True)
    truth = torch.autograd.grad(wanted, exact, grad.double(), materialize_grads=True)
    for ours, theirs in zip((y, *got), (wanted, *truth), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)
    for ours in (y, got[0]):
        assert ours.is_contiguous(memory_format=memory_format)
        assert ours.stride(0) >= ours[0].numel()  # else PyTorch's next operation does not see channels_last_3d


def test_small_clips_are_those_that_pytorch_convolves_itself():
    """By PyTorch's own choice: what is not convolved in two dimensions goes to oneDNN, or is a product of matrices."""
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for i in range(300):
        b, c, t, h, w = (int(2 ** (torch.rand(1, generator=generator) * n)) for n in (2, 8, 6, 9, 9))
        kernel = torch.randint(1, 6, (3,), generator=generator).tolist() if i % 10 else [1, 1, 1]
        if torch.get_num_threads() == 1 and max(kernel[1:]) == 1:
            continue  # one thread multiplies matrices itself
        if h + 2 * (kernel[1] // 2) < kernel[1] or w + 2 * (kernel[2] // 2) < kernel[2]:
            continue
        x, weight = torch.empty(1).expand(b, c, t, h, w), torch.empty(1).expand(2, c, *kernel)
        rest = ([1, 1, 1], [kernel[0] - 1, kernel[1] // 2, kernel[2] // 2], [1, 1, 1], False, [0, 0, 0], 1)
        backend = torch._C._select_conv_backend(x, weight, None, *rest)
        own = backend == torch._C._ConvBackend.Slow3d and max(kernel) > 1
        assert reference._as_images(x, x.shape, kernel) == own, (x.shape, kernel, backend)
        seen.add(own)
    assert seen == {False, True}


def test_gradients_through_the_returned_cache():
    """Chunks train as the whole clip does."""
    x, weight, bias = case((3, 3, 3), dtype=torch.float64)
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    grad = rand(2, 4, 6, 7, 6, seed=4, dtype=torch.float64)
    wanted = torch.autograd.grad(oracle(*tensors), tensors, grad)
    parts, cache = [], None
    for chunk in x.split([1, 2, 3], dim=2):
        y, cache = causal_conv3d(chunk, weight, bias, cache=cache, return_cache=True)
        parts.append(y)
    got = torch.autograd.grad(torch.cat(parts, dim=2), tensors, grad)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    x, weight, bias = case((3, 2, 1), b=1, c=2, o=2, t=4, h=3, w=2, dtype=torch.float64)
    cache = rand(1, 2, 1, 3, 2, seed=3, dtype=torch.float64)
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias, cache)]

    def run(x, weight, bias, cache):
        return causal_conv3d(x, weight, bias, stride=(2, 1, 1), cache=cache, return_cache=True)

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)


def test_gradcheck_of_gradients():
    x, weight, bias = case((3, 2, 1), b=1, c=2, o=2, t=4, h=3, w=2, dtype=torch.float64)
    cache = rand(1, 2, 1, 3, 2, seed=3, dtype=torch.float64)
    for tensors in ([x, weight], [x, weight, bias, cache]):
        tensors = [tensor.requires_grad_() for tensor in tensors]

        def run(x, weight, bias=None, cache=None):
            return causal_conv3d(x, weight, bias, stride=(2, 1, 1), cache=cache)

        assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize(("kt", "st", "t"), [(3, 1, 16), (3, 1, 19), (4, 2, 20), (7, 1, 48), (2, 2, 2), (3, 2, 34)])
def test_many_frames(kt, st, t, with_cache, memory_format, b):
    """Long enough that time is padded by the convolution, and not by a copy."""
    x, weight, bias = case((kt, 3, 2), b=b, t=t, h=3, w=4)
    cache = rand(b, 3, kt - st, 3, 4, seed=3) if with_cache else None
    stride = (st, 1, 2)
    tensors = [None if y is None else y.double().requires_grad_() for y in (x, weight, bias, cache)]
    wanted = oracle(*tensors[:3], stride, tensors[3])
    given = [y for y in tensors if y is not None]
    grad = rand(*wanted.shape, seed=4)
    truth = torch.autograd.grad(wanted, given, grad.double(), materialize_grads=True)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    mine = [x, *(y.detach().float().requires_grad_() for y in given[1:])]
    y = causal_conv3d(*mine[:3], stride=stride, cache=mine[3] if with_cache else None)
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=2e-5)
    for got, wanted in zip(torch.autograd.grad(y, mine, grad, materialize_grads=True), truth, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)


def test_flops_are_counted_as_pytorchs():
    x, weight, _ = case((3, 3, 3), dtype=torch.float32)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    counts = []
    for function in (causal_conv3d, lambda x, w: F.conv3d(F.pad(x, (0, 0, 0, 0, 2, 0)), w, padding=(0, 1, 1))):
        with FlopCounterMode(display=False) as counter:
            function(x, weight).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * (4 * 3 * 27) * (2 * 6 * 7 * 6)


def test_silu():
    x, weight, bias = case((3, 3, 3))
    wanted = F.silu(oracle(*double(x, weight, bias)))
    y = causal_conv3d(x, weight, bias, activation="silu")
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=2e-5)
    weight.requires_grad_()
    y = causal_conv3d(x, weight, bias, activation="silu")
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=2e-5)
    exact = weight.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(F.silu(oracle(x.double(), exact, bias.double())).sum(), exact)
    (got,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-3)
    torch._dynamo.reset()
    compiled = torch.compile(causal_conv3d, fullgraph=True, backend="aot_eager")
    for w in (weight, weight.detach()):  # with gradients, and in the kernel
        torch.testing.assert_close(compiled(x, w, bias, activation="silu"), y)
    with pytest.raises(ValueError, match="activation: expected 'silu' or None, got 'relu'"):
        causal_conv3d(x, weight, activation="relu")


def test_forced_extension(monkeypatch):
    """VMAE_KERNELS=csrc runs it or says why it cannot."""
    x, weight, _ = case((3, 3, 3))
    wanted = causal_conv3d(x, weight)
    monkeypatch.setenv("VMAE_KERNELS", "csrc")
    with pytest.raises(
        ValueError, match=r"VMAE_KERNELS=csrc: causal_conv3d expected (the compiled|bfloat16|a processor)"
    ):
        causal_conv3d(x, weight)
    assert torch.equal(topk(rand(2, 5), 2), rand(2, 5).topk(2).indices.sort().values)  # has none, and is not concerned
    monkeypatch.setenv("VMAE_KERNELS", "torch")
    assert torch.equal(causal_conv3d(x, weight), wanted)


def test_empty_batch_and_inputs_unchanged():
    x, weight, bias = case((3, 3, 3))
    assert causal_conv3d(x[:0], weight, bias).shape == (0, 4, 6, 7, 6)
    cache = rand(2, 3, 2, 7, 6, seed=3)
    kept = [tensor.clone() for tensor in (x, weight, bias, cache)]
    y, new = causal_conv3d(x, weight, bias, cache=cache, return_cache=True)
    y.zero_()
    new.zero_()
    assert all(torch.equal(a, b) for a, b in zip((x, weight, bias, cache), kept, strict=True))


def test_errors():
    x, weight, bias = case((3, 3, 3))
    with pytest.raises(ValueError, match=r"x: .*\[B, C, T, H, W\].*got \[3, 6, 7, 6\]"):
        causal_conv3d(x[0], weight)
    with pytest.raises(ValueError, match=r"weight: .*C = 3.*got \[4, 2, 3, 3, 3\]"):
        causal_conv3d(x, weight[:, :2])
    with pytest.raises(ValueError, match=r"weight: .*\[O, C, kt, kh, kw\].*got"):
        causal_conv3d(x, weight[0])
    with pytest.raises(ValueError, match=r"bias: .*O = 4.*got \[3\]"):
        causal_conv3d(x, weight, bias[:3])
    with pytest.raises(ValueError, match=r"multiple of the stride in time, 2, got T = 5"):
        causal_conv3d(x[:, :, :5], weight, stride=(2, 1, 1))
    with pytest.raises(ValueError, match=r"multiple of the stride in time, 1, got T = 0"):
        causal_conv3d(x[:, :, :0], weight)
    for stride in ((1, 1), (0, 1, 1), (1, -1, 1)):
        with pytest.raises(ValueError, match=r"stride: .*three positive"):
            causal_conv3d(x, weight, stride=stride)
    for frames, stride in ((1, 1), (3, 1), (2, 2)):
        with pytest.raises(ValueError, match=rf"cache: .*frames = {3 - stride}.*got \[2, 3, {frames}, 7, 6\]"):
            causal_conv3d(x, weight, stride=(stride, 1, 1), cache=torch.zeros(2, 3, frames, 7, 6))
    with pytest.raises(ValueError, match=r"cache: .*B = 2.*got \[1, "):
        causal_conv3d(x, weight, cache=torch.zeros(1, 3, 2, 7, 6))
    with pytest.raises(TypeError, match=r"cache: .*float32.*got torch.float64"):
        causal_conv3d(x, weight, cache=torch.zeros(2, 3, 2, 7, 6).double())
    with pytest.raises(TypeError, match=r"weight: .*float32.*got torch.float64"):
        causal_conv3d(x, weight.double())
    with pytest.raises(TypeError, match=r"bias: .*float32.*got torch.float16"):
        causal_conv3d(x, weight, bias.half())
    with pytest.raises(TypeError, match=r"x: .*float32.*got int64"):
        causal_conv3d(x.long(), weight.long())
    with pytest.raises(ValueError, match=r"kernel of 3 x 4.*got \[H, W\] = \[0, 6\]"):
        causal_conv3d(x[:, :, :, :0], rand(4, 3, 3, 3, 4))
