"""decoder_tokens against loops."""

import pytest
import torch

from vmae_kernels import decoder_tokens

HALF = [torch.bfloat16, torch.float16]


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randint(n, *shape, seed=0):
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(seed))


def oracle(visible, visible_indices, selected_indices, mask_token, positions):
    """Sums in float64; the caller rounds."""
    rows = []
    for b in range(visible.shape[0]):
        table = positions if positions.ndim == 2 else positions[b]
        rows += [visible[b, i].double() + table[n].double() for i, n in enumerate(visible_indices[b].tolist())]
        rows += [mask_token.double() + table[n].double() for n in selected_indices[b].tolist()]
    return torch.stack(rows).reshape(visible.shape[0], -1, visible.shape[2])


def case(shared, dtype=torch.float32, other=None, b=2, v=3, k=4, n=7, d=5):
    other = other or dtype
    positions = rand(n, d, seed=2, dtype=other) if shared else rand(b, n, d, seed=2, dtype=other)
    visible, mask = rand(b, v, d, dtype=dtype), rand(d, seed=1, dtype=other)
    return visible, randint(n, b, v, seed=3), randint(n, b, k, seed=4), mask, positions


@pytest.mark.parametrize("index_dtypes", [(torch.int32, torch.int64), (torch.int64, torch.int32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("shared", [True, False])
def test_loop(dtype, shared, index_dtypes):
    visible, first, second, mask, positions = case(shared, dtype)
    z = decoder_tokens(visible, first.to(index_dtypes[0]), second.to(index_dtypes[1]), mask, positions)
    assert z.dtype == dtype
    # One addition, so the nearest value of the dtype.
    assert torch.equal(z, oracle(visible, first, second, mask, positions).to(dtype))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shared", [True, False])
def test_mixed_dtypes_round_once(dtype, shared):
    """bfloat16 tokens with float32 positions and mask token: the sum is rounded, not its terms."""
    args = case(shared, dtype, torch.float32, d=300)
    z = decoder_tokens(*args)
    wanted = oracle(*args)
    assert z.dtype == dtype
    # Rounding through float32 moves a value in 2^16 from one half type's neighbour to the other at most.
    assert (z != wanted.to(dtype)).float().mean() < 1e-3
    twice = torch.cat([args[3].to(dtype) + args[4].to(dtype).reshape(-1, 300)])
    assert not torch.isin(z[:, 3:], twice).all()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
def test_wide_tokens_with_narrow_positions(dtypes):
    args = case(True, *dtypes)
    z = decoder_tokens(*args)
    assert z.dtype == dtypes[0]
    torch.testing.assert_close(z.double(), oracle(*args), rtol=torch.finfo(dtypes[0]).eps, atol=0)


def test_strides():
    visible, first, second, mask, positions = case(False)
    visible = visible.transpose(1, 2).contiguous().transpose(1, 2)
    positions = positions.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    mask = torch.stack((mask, mask), dim=1)[:, 0]
    first, second = first.T.contiguous().T, second[:, :1].expand(2, 4)
    args = visible, first, second, mask, positions
    assert not any(x.is_contiguous() for x in args)
    assert torch.equal(decoder_tokens(*args), oracle(*args).float())
    args = visible[:1].expand(2, 3, 5), first, second, mask[:1].expand(5), positions[:1].expand(2, 7, 5)
    assert torch.equal(decoder_tokens(*args), oracle(*args).float())


@pytest.mark.parametrize(("v", "k"), [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("shared", [True, False])
def test_empty(v, k, shared):
    args = case(shared, v=v, k=k)
    tensors = [args[i].requires_grad_() for i in (0, 3, 4)]
    z = decoder_tokens(*args)
    assert z.shape == (2, v + k, 5)
    visible, mask, positions = torch.autograd.grad(z.sum(), tensors)
    assert torch.equal(visible, torch.ones_like(visible))
    assert torch.equal(mask, torch.full_like(mask, 2 * k))
    assert positions.sum() == 2 * 5 * (v + k)


@pytest.mark.parametrize("shared", [True, False])
def test_gradcheck(shared):
    visible, first, second, mask, positions = case(shared, torch.float64, n=4, d=2)
    tensors = tuple(x.requires_grad_() for x in (visible, mask, positions))
    assert torch.autograd.gradcheck(lambda v, m, p: decoder_tokens(v, first, second, m, p), tensors)
    # Each alone: what needs no gradient must not spoil the rest.
    for i in range(3):
        frozen = [x.detach() for x in tensors]

        def alone(x, i=i, frozen=frozen):
            v, m, p = (*frozen[:i], x, *frozen[i + 1 :])
            return decoder_tokens(v, first, second, m, p)

        assert torch.autograd.gradcheck(alone, (tensors[i],))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_of_random_weights(shared, dtypes):
    """gradcheck asks with ones and zeros, which any dtype holds."""
    visible, first, second, mask, positions = case(shared, *dtypes)
    tensors = [x.requires_grad_() for x in (visible, mask, positions)]
    grad = rand(2, 7, 5, seed=5, dtype=dtypes[0])
    got = torch.autograd.grad(decoder_tokens(visible, first, second, mask, positions), tensors, grad)
    wanted = torch.zeros(2, 7, 5, dtype=torch.float64)
    for b, row in enumerate(torch.cat((first, second), dim=1).tolist()):
        for i, n in enumerate(row):
            wanted[b, n] += grad[b, i].double()
    assert torch.equal(got[0], grad[:, :3])
    torch.testing.assert_close(got[1].double(), grad[:, 3:].double().sum((0, 1)), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(got[2].double(), wanted.sum(0) if shared else wanted, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_have_their_dtypes_and_do_not_stall(shared, other):
    b, k = (4, 600) if shared else (2, 2400)
    visible = torch.zeros(b, 1, 2, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.zeros(2, dtype=other, requires_grad=True)
    positions = torch.zeros((3, 2) if shared else (b, 3, 2), dtype=other, requires_grad=True)
    z = decoder_tokens(
        visible, torch.zeros(b, 1, dtype=torch.int32), torch.ones(b, k, dtype=torch.int32), mask, positions
    )
    grads = torch.autograd.grad(z, (visible, mask, positions), torch.ones_like(z))
    assert [g.dtype for g in grads] == [torch.bfloat16, other, other]
    # Rounding to bfloat16 is to the nearest; ones added up in bfloat16 would stop at 256.
    assert grads[1].tolist() == [float(torch.tensor(float(b * k)).to(other))] * 2
    assert grads[2][..., 1, :].flatten().tolist() == [2400.0] * (2 if shared else 2 * b)
    assert grads[2][..., 0, :].flatten().tolist() == [float(b)] * 2 if shared else [1.0] * 2 * b
    assert not grads[2][..., 2, :].any()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("bad", [-1, 7, 2**31 - 1])
def test_out_of_range(which, bad, shared):
    for index_dtype in (torch.int32, torch.int64):
        args = list(case(shared))
        args[which] = args[which].to(index_dtype)
        args[which][1, 1] = bad
        with pytest.raises(ValueError, match=rf"{bad}(?s:.*)7|7(?s:.*){bad}"):
            decoder_tokens(*args)


def test_errors():
    args = case(True)

    def call(**changes):
        names = ["visible", "visible_indices", "selected_indices", "mask_token", "positions"]
        decoder_tokens(**(dict(zip(names, args, strict=True)) | changes))

    for name, i in (("visible", 0), ("mask_token", 3), ("positions", 4)):
        with pytest.raises(TypeError, match=rf"{name}: .*floating point.*int64"):
            call(**{name: args[i].long()})
    for name, i in (("visible_indices", 1), ("selected_indices", 2)):
        with pytest.raises(TypeError, match=rf"{name}: .*int32, int64.*got int16"):
            call(**{name: args[i].short()})
        with pytest.raises(ValueError, match=rf"{name}: .*B = 2.*got \[1, "):
            call(**{name: args[i][:1]})
    with pytest.raises(ValueError, match=r"visible_indices: .*V = 3.*got \[2, 2\]"):
        call(visible_indices=args[1][:, :2])
    with pytest.raises(ValueError, match=r"visible: .*\[B, V, D\].*got \[3, 5\]"):
        call(visible=args[0][0])
    with pytest.raises(ValueError, match=r"mask_token: .*D = 5.*got \[4\]"):
        call(mask_token=args[3][:4])
    with pytest.raises(ValueError, match=r"mask_token: .*\[D\].*got \[1, 5\]"):
        call(mask_token=args[3][None])
    with pytest.raises(ValueError, match=r"positions: .*D = 5.*got \[7, 4\]"):
        call(positions=args[4][:, :4])
    with pytest.raises(ValueError, match=r"positions: .*B = 2.*got \[3, 7, 5\]"):
        call(positions=args[4].expand(3, 7, 5))
    with pytest.raises(ValueError, match=r"positions: .*got \[5\]"):
        call(positions=args[4][0])
    with pytest.raises(TypeError, match=r"positions: .*tensor.*got NoneType"):
        call(positions=None)
