"""tubelets against a loop over the cells of the grid."""

import pytest
import torch

from vmae_kernels import tubelets

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = (2, 3, 4)
GRID = (3, 2, 3)


def video_of(dtype, b=2, c=3, size=SIZE, grid=GRID, seed=0):
    g = torch.Generator().manual_seed(seed)
    t, h, w = (s * n for s, n in zip(size, grid, strict=True))
    if dtype == torch.uint8:
        return torch.randint(256, (b, c, t, h, w), dtype=dtype, generator=g)
    return torch.randn(b, c, t, h, w, generator=g).to(dtype)


def oracle(video, indices, size, mean, std):
    """float64, in the order t, h, w, c of VideoMAE's targets."""
    _, c, t, h, w = video.shape
    rows, columns = h // size[1], w // size[2]
    values = video.double() / 255 if video.dtype == torch.uint8 else video.double()
    result = []
    for b, row in enumerate(indices.tolist()):
        for index in row:
            at, ay, ax = index // (rows * columns), index // columns % rows, index % columns
            assert at < t // size[0]
            for dt in range(size[0]):
                for dy in range(size[1]):
                    for dx in range(size[2]):
                        for channel in range(c):
                            where = (at * size[0] + dt, ay * size[1] + dy, ax * size[2] + dx)
                            result.append((values[b, channel][where] - mean[channel]) / std[channel])
    return torch.stack(result).reshape(*indices.shape, -1) if result else torch.zeros(*indices.shape, 0)


INDICES = torch.tensor([[0, 17, 5, 11], [16, 3, 3, 8]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_loop(source, dtype):
    video = video_of(source)
    patches = tubelets(video, INDICES, size=SIZE, mean=MEAN, std=STD, dtype=dtype)
    assert patches.dtype == dtype
    assert patches.shape == (2, 4, 72)
    # float64 through and through where video (or uint8, exact) and result are; float32 otherwise.
    double = dtype == torch.float64 and source in (torch.uint8, torch.float64)
    tolerance = 1e-12 if double else max(torch.finfo(dtype).eps, 1e-6)
    wanted = oracle(video, INDICES, SIZE, MEAN, STD)
    torch.testing.assert_close(patches.double(), wanted, rtol=tolerance, atol=min(2 * tolerance, 4e-6))


def test_default_size_and_dtype():
    video = video_of(torch.uint8, b=1, size=(2, 16, 16), grid=(2, 2, 1))
    indices = torch.tensor([[3, 0]], dtype=torch.int32)
    patches = tubelets(video, indices, mean=MEAN, std=STD)
    assert patches.dtype == torch.float32
    assert patches.shape == (1, 2, 1536)
    torch.testing.assert_close(patches.double(), oracle(video, indices, (2, 16, 16), MEAN, STD), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_memory_layouts_agree_bitwise(dtype):
    video = video_of(dtype)

    def run(x):
        return tubelets(x, INDICES, size=SIZE, mean=MEAN, std=STD)

    wanted = run(video)
    frames_last = video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    decoded = video.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.zeros(2, 3, 6, 6, 30, dtype=dtype)
    wide[..., 3:27:2] = video
    for x in (frames_last, decoded, video.contiguous(memory_format=torch.channels_last_3d), wide[..., 3:27:2]):
        assert not x.is_contiguous()
        assert torch.equal(run(x), wanted)
    assert torch.equal(run(video[:1].expand(2, -1, -1, -1, -1))[1], run(video[[0, 0]])[1])


@pytest.mark.parametrize("c", [1, 2, 4])
@pytest.mark.parametrize(("size", "grid"), [((1, 1, 1), (2, 3, 2)), ((3, 2, 1), (1, 2, 4)), ((1, 4, 2), (4, 1, 1))])
def test_channels_and_sizes(c, size, grid):
    mean, std = [0.1 * (i + 1) for i in range(c)], [0.5 + i for i in range(c)]
    video = video_of(torch.uint8, c=c, size=size, grid=grid)
    n = grid[0] * grid[1] * grid[2]
    indices = torch.stack((torch.arange(n), torch.arange(n).flip(0)))
    patches = tubelets(video, indices, size=size, mean=mean, std=std)
    torch.testing.assert_close(patches.double(), oracle(video, indices, size, mean, std), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_index_dtypes_and_strides(index_dtype):
    video = video_of(torch.uint8)
    wanted = tubelets(video, INDICES, size=SIZE, mean=MEAN, std=STD)
    strided = INDICES.to(index_dtype).T.contiguous().T
    assert torch.equal(tubelets(video, strided, size=SIZE, mean=MEAN, std=STD), wanted)


def test_gradcheck():
    """Index 3 stands twice: its gradients add up."""
    video = video_of(torch.float64, c=2, size=(1, 2, 1), grid=(2, 2, 2)).requires_grad_()
    indices = torch.tensor([[0, 7], [3, 3]])

    def run(x):
        return tubelets(x, indices, size=(1, 2, 1), mean=(0.1, 0.2), std=(0.5, 2.0), dtype=torch.float64)

    assert torch.autograd.gradcheck(run, (video,))


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradient(source):
    video = video_of(source).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    patches = tubelets(video, INDICES, size=SIZE, mean=MEAN, std=STD)
    grad = torch.randn(patches.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(patches, video, grad)
    assert gradient.dtype == source
    assert gradient.shape == video.shape
    twin = video.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(oracle(twin, INDICES, SIZE, MEAN, STD), twin, grad.double())
    torch.testing.assert_close(gradient.double(), wanted, rtol=max(torch.finfo(source).eps, 1e-6), atol=1e-5)
    untouched = wanted == 0
    assert untouched.any()
    assert not gradient[untouched].any()


def test_uint8_needs_no_gradient():
    assert not tubelets(video_of(torch.uint8), INDICES, size=SIZE, mean=MEAN, std=STD).requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_empty(dtype):
    video = video_of(dtype)
    patches = tubelets(video, INDICES[:, :0], size=SIZE, mean=MEAN, std=STD)
    assert patches.shape == (2, 0, 72)
    patches = tubelets(video[:0], INDICES[:0], size=SIZE, mean=MEAN, std=STD)
    assert patches.shape == (0, 4, 72)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, 18, 2**31 - 1])
def test_out_of_range(bad, index_dtype):
    indices = INDICES.to(index_dtype).clone()
    indices[1, 2] = bad
    with pytest.raises(ValueError, match=rf"{bad}(?s:.*)18|18(?s:.*){bad}"):
        tubelets(video_of(torch.uint8), indices, size=SIZE, mean=MEAN, std=STD)


def test_errors():
    video = video_of(torch.uint8)

    def call(**changes):
        good = {"video": video, "indices": INDICES, "size": SIZE, "mean": MEAN, "std": STD}
        tubelets(**(good | changes))

    with pytest.raises(TypeError, match=r"video: .*uint8.*got int64"):
        call(video=video.long())
    with pytest.raises(ValueError, match=r"video: .*\[B, C, T, H, W\].*got \[3, 6, 6, 12\]"):
        call(video=video[0])
    with pytest.raises(TypeError, match=r"indices: .*int32, int64.*got float32"):
        call(indices=INDICES.float())
    with pytest.raises(ValueError, match=r"indices: .*B = 2.*got \[1, 4\]"):
        call(indices=INDICES[:1])
    for size in ((4, 3, 4), (2, 4, 4), (2, 3, 5)):
        with pytest.raises(ValueError, match=rf"multiples.*\({size[0]}, {size[1]}, {size[2]}\).*\[6, 6, 12\]"):
            call(size=size)
    for size in ((2, 3), (0, 3, 4), (2, 3, -4)):
        with pytest.raises(ValueError, match=r"size: .*three positive"):
            call(size=size)
    for name in ("mean", "std"):
        with pytest.raises(ValueError, match=rf"{name}: .*C = 3.*got 2"):
            call(**{name: (0.5, 0.5)})
    with pytest.raises(ValueError, match=r"std: .*above 0.*\(1.0, 0.0, 1.0\)"):
        call(std=(1.0, 0.0, 1.0))
    with pytest.raises(TypeError, match=r"dtype: .*floating point.*int32"):
        call(dtype=torch.int32)
