"""soft_topk against the estimator written out from the same noise, exact integrals and finite differences."""

import math

import numpy as np
import pytest
import torch

from vmae_kernels import soft_topk, topk
from vmae_kernels.philox import normals

CPU = torch.device("cpu")
LARGE = pytest.mark.large


def indicator(row: np.ndarray, k: int) -> np.ndarray:
    chosen = np.zeros(len(row))
    chosen[np.argsort(-row, kind="stable")[:k]] = 1
    return chosen


def estimator(scores, k, sigma, samples, seed, grad):
    """Berthet et al.: mean of y_s, and mean of <grad, y_s - y_0> z_s / sigma, with y_0 the unperturbed indicator."""
    shape, n = scores.shape, scores.shape[-1]
    width = np.float64 if scores.dtype == torch.float64 else np.float32
    rows = scores.double().numpy().reshape(-1, n).astype(width)
    grad = grad.double().numpy().reshape(-1, n)
    noise = [normals(len(rows), n, seed=seed, block=b, device=CPU).numpy() for b in range((samples + 3) // 4)]
    noise = np.concatenate(noise)[:samples].astype(width)
    value, gradient = np.zeros(rows.shape), np.zeros(rows.shape)
    for r, row in enumerate(rows):
        still = indicator(row, k)
        for z in noise[:, r]:
            chosen = indicator(row + width(sigma) * z, k)
            value[r] += chosen / samples
            gradient[r] += (grad[r] @ (chosen - still)) * z / (sigma * samples)
    return torch.from_numpy(value).reshape(shape), torch.from_numpy(gradient).reshape(shape)


def value_and_gradient(scores, grad, *args, **kwargs):
    scores = scores.clone().requires_grad_()
    value = soft_topk(scores, *args, **kwargs)
    (gradient,) = torch.autograd.grad(value, scores, grad)
    return value.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("samples", "sigma"), [(1, 0.5), (3, 0.05), (4, 1.0), (6, 0.3), pytest.param(64, 2.0, marks=LARGE)]
)
def test_explicit_estimator(dtype, samples, sigma):
    g = torch.Generator().manual_seed(samples)
    scores = torch.randn(2, 1, 17, generator=g).to(dtype)
    grad = torch.randn(2, 1, 17, generator=g).to(dtype)
    args = {"sigma": sigma, "samples": samples, "seed": 11}
    value, gradient = value_and_gradient(scores, grad, 5, **args)
    wanted, wanted_gradient = estimator(scores, 5, sigma, samples, 11, grad)
    eps = torch.finfo(dtype).eps
    assert value.dtype == gradient.dtype == dtype
    torch.testing.assert_close(value.double(), wanted, rtol=eps, atol=min(eps, 1e-6))
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=max(2 * eps, 1e-5), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [0, 1, 20, 39, 40])
def test_a_distribution_over_tokens(dtype, k):
    scores = torch.randn(2, 40, generator=torch.Generator().manual_seed(k)).to(dtype)
    value, gradient = value_and_gradient(scores, torch.randn(2, 40).to(dtype), k, sigma=0.7, samples=5, seed=5)
    assert value.dtype == dtype
    assert value.min() >= 0
    assert value.max() <= 1
    slack = 1e-5 if dtype == torch.float32 else 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(value.double().sum(-1), torch.full((2,), float(k)).double(), rtol=0, atol=slack)
    if k in (0, 40):
        assert torch.equal(value, torch.full_like(scores, k // 40))
        assert not gradient.any()


def test_control_variate_kills_the_variance_of_a_settled_row():
    """No sample changes the choice, so the estimate of the zero gradient must be zero, not merely small on average."""
    scores = torch.arange(12.0)[None]
    grad = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    value, gradient = value_and_gradient(scores, grad, 4, sigma=1e-3, samples=8, seed=1)
    assert torch.equal(value, (scores >= 8).float())
    assert not gradient.any()


def test_ties_go_to_the_lowest_index_before_and_after_noise():
    scores = torch.zeros(1, 9)
    value, gradient = value_and_gradient(scores, torch.arange(9.0)[None], 3, sigma=1.0, samples=6, seed=2)
    wanted, wanted_gradient = estimator(scores, 3, 1.0, 6, 2, torch.arange(9.0)[None])
    torch.testing.assert_close(value.double(), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-5, atol=1e-5)
    # Noise far below the rounding of the scores leaves the ties to the index.
    value = soft_topk(torch.full((1, 9), 1e6), 3, sigma=1e-6, samples=4, seed=2)
    assert value.tolist() == [[1.0] * 3 + [0.0] * 6]


def exact(scores: torch.Tensor, k: int, sigma: float) -> torch.Tensor:
    """E[indicator] of three scores by quadrature: the chance of being the first, or of not being the last."""
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64) * sigma
    density = (-(((x - scores[:, None]) / sigma) ** 2) / 2).exp() / (sigma * math.sqrt(2 * math.pi))
    below = torch.special.ndtr((x - scores[:, None]) / sigma)
    chances = []
    for i in range(3):
        others = [below[j] if k == 1 else 1 - below[j] for j in range(3) if j != i]
        chance = torch.trapezoid(density[i] * others[0] * others[1], x)
        chances.append(chance if k == 1 else 1 - chance)
    return torch.stack(chances)


@LARGE
@pytest.mark.parametrize("k", [1, 2])
def test_unbiased(k):
    """Rows of one call have independent noise, so many equal rows are many samples."""
    rows, samples, sigma = 20_000, 4, 1.5
    scores = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64)
    truth = exact(scores, k, sigma)
    (wanted,) = torch.autograd.grad(truth @ weights, scores)
    many = scores.detach().float().expand(rows, 3).clone().requires_grad_()
    value = soft_topk(many, k, sigma=sigma, samples=samples, seed=99)
    (gradient,) = torch.autograd.grad(value, many, weights.float().expand(rows, 3))
    for each, mean in ((value.detach(), truth.detach()), (gradient, wanted)):
        error = each.double().std(0) / math.sqrt(rows)
        assert ((each.double().mean(0) - mean).abs() < 4.5 * error).all()
        # An estimate too coarse to tell would pass anything.
        assert error.max() < 0.015


@LARGE
def test_gradient_against_finite_differences():
    rows, sigma, step = 20_000, 1.0, 0.2
    scores = torch.tensor([0.2, -0.5, 0.9, 0.0])
    weights = torch.tensor([1.0, -1.0, 0.5, 2.0])

    def estimate(point):
        return soft_topk(point.expand(rows, 4), 2, sigma=sigma, samples=4, seed=4).double().mean(0) @ weights.double()

    many = scores.expand(rows, 4).clone().requires_grad_()
    value = soft_topk(many, 2, sigma=sigma, samples=4, seed=5)
    (gradient,) = torch.autograd.grad(value, many, weights.expand(rows, 4))
    for i in range(4):
        shift = torch.zeros(4)
        shift[i] = step
        difference = (estimate(scores + shift) - estimate(scores - shift)) / (2 * step)
        # Standard errors near 0.006 on both sides and a truncation error of order step^2 / 6.
        assert abs(gradient[:, i].double().mean() - difference) < 0.03
    assert gradient.double().mean(0).abs().max() > 0.2


@LARGE
def test_seed():
    scores = torch.randn(2, 30, generator=torch.Generator().manual_seed(3))

    def run(seed):
        return value_and_gradient(scores, scores, 7, sigma=1.0, samples=5, seed=seed)

    for seed in (0, -1, 2**63 - 1, 2**63, 2**64 - 1, 123 << 70):
        first = run(seed)
        for same in (seed, seed + 2**64, seed - 2**64):
            assert all(torch.equal(a, b) for a, b in zip(first, run(same), strict=True))
        # Both words of the key matter.
        for other in (seed + 1, seed + 2**32, seed + 2**63):
            assert not any(torch.equal(a, b) for a, b in zip(first, run(other), strict=True))


def test_rows_have_independent_noise_whatever_the_batch_shape():
    scores = torch.randn(30, generator=torch.Generator().manual_seed(4)).expand(6, 30)
    flat = soft_topk(scores, 7, sigma=1.0, samples=4, seed=0)
    assert len({tuple(row) for row in flat.tolist()}) == 6
    assert torch.equal(soft_topk(scores.reshape(2, 3, 30), 7, sigma=1.0, samples=4, seed=0).reshape(6, 30), flat)
    assert torch.equal(soft_topk(scores[0], 7, sigma=1.0, samples=4, seed=0), flat[0])


def test_parts_have_the_noise_of_the_whole():
    g = torch.Generator().manual_seed(4)
    scores, grad = torch.randn(6, 30, generator=g), torch.randn(6, 30, generator=g)
    args = {"sigma": 1.0, "samples": 6, "seed": 3}
    whole = value_and_gradient(scores, grad, 7, **args)
    parts = [value_and_gradient(scores[a:b], grad[a:b], 7, **args, row=a) for a, b in ((0, 1), (1, 4), (4, 6))]
    for found, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(found), expected)


def test_strides():
    base = torch.randn(12, 5, generator=torch.Generator().manual_seed(5))
    args = {"sigma": 0.5, "samples": 5, "seed": 1}
    a = value_and_gradient(base.T, base.T, 4, **args)
    b = value_and_gradient(base.T.contiguous(), base.T.contiguous(), 4, **args)
    assert torch.equal(a[0], b[0])
    torch.testing.assert_close(a[1], b[1])  # strides may order a sum differently


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 4)])
def test_empty_shapes(shape):
    args = {"sigma": 0.5, "samples": 5, "seed": 1}
    value, gradient = value_and_gradient(torch.zeros(shape), torch.zeros(shape), 0, **args)
    assert value.shape == gradient.shape == shape


def peak_bytes(run) -> int:
    """The most bytes alive at once among what `run` allocates on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.experimental_event_tree()
    sizes, pending = [], list(events)
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    alive = peak = 0
    for _, size in sorted(sizes, key=lambda pair: pair[0]):
        alive += size
        peak = max(peak, alive)
    return peak


@LARGE
def test_memory_does_not_grow_with_samples():
    n = 4096
    scores = torch.randn(1, n, generator=torch.Generator().manual_seed(6), requires_grad=True)
    saved = []

    def run(samples):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            value = soft_topk(scores, 400, sigma=0.5, samples=samples, seed=0)
        torch.autograd.grad(value, scores, scores.detach())

    few, many = (peak_bytes(lambda samples=samples: run(samples)) for samples in (32, 512))  # 16 come together
    assert few >= 4 * n
    assert many < 1.25 * few
    assert sum(saved) <= 2 * 2 * n


@LARGE
def test_bfloat16_keeps_small_weights():
    """A weight counts samples: adding 1 / samples up in bfloat16 would stall."""
    scores = torch.zeros(1, 2, dtype=torch.bfloat16)
    value = soft_topk(scores, 1, sigma=1.0, samples=2000, seed=0)
    assert (value.float() - 0.5).abs().max() < 0.06


def test_limits_agree_with_topk():
    scores = torch.randn(3, 20, generator=torch.Generator().manual_seed(7))
    value = soft_topk(scores, 6, sigma=1e-6, samples=4, seed=0)
    assert torch.equal(value.nonzero()[:, 1].reshape(3, 6), topk(scores, 6))


def test_errors():
    good = {"sigma": 1.0, "samples": 4, "seed": 0}
    x = torch.zeros(2, 5)
    for k in (-1, 6):
        with pytest.raises(ValueError, match=rf"0 to 5.*got {k}"):
            soft_topk(x, k, **good)
    for sigma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"sigma.*above 0.*got {sigma}"):
            soft_topk(x, 1, **(good | {"sigma": sigma}))
    with pytest.raises(ValueError, match=r"samples.*at least 1.*got 0"):
        soft_topk(x, 1, **(good | {"samples": 0}))
    with pytest.raises(ValueError, match=r"row.*at least 0.*got -1"):
        soft_topk(x, 1, **good, row=-1)
    for name in ("samples", "seed", "row"):
        with pytest.raises(TypeError, match=rf"{name}.*integer.*got float"):
            soft_topk(x, 1, **(good | {name: 1.0}))
    with pytest.raises(TypeError, match=r"k: .*integer.*got float"):
        soft_topk(x, 1.0, **good)
    with pytest.raises(TypeError, match=r"float32.*got int64"):
        soft_topk(x.long(), 1, **good)
    with pytest.raises(ValueError, match="scalar"):
        soft_topk(torch.tensor(1.0), 1, **good)
