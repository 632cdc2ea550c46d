"""Scores and what trains them: exact distances, nuisance that is only nuisance, probes that measure worth."""

import math

import pytest
import torch

from vmae import AdaptiveTokenizer, TokenizerConfig
from vmae.layers import Hold
from vmae.scorer import Scorer, nuisance, stability_loss, token_scores


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_feature_sees_its_own_tubelet_and_all_of_it():
    torch.manual_seed(0)
    scorer = Scorer(8)
    video = torch.rand(1, 3, 4, 48, 48, generator=generator())
    before = scorer(video)
    assert before.shape == (1, 8, 2, 3, 3)
    for frame, row, column in ((2, 16, 16), (3, 31, 31), (2, 16, 31), (3, 24, 20)):  # corners of tubelet (1, 1, 1)
        changed = video.clone()
        changed[0, 1, frame, row, column] += 1
        differs = (scorer(changed) != before).any(1)[0]
        assert differs[1, 1, 1]
        assert differs.sum() == 1


def test_features_are_those_of_two_convolutions():
    torch.manual_seed(0)
    scorer = Scorer(8)
    video = torch.rand(2, 3, 4, 32, 48, generator=generator())
    expected = scorer.second(torch.nn.functional.silu(scorer.first(video)))
    torch.testing.assert_close(scorer(video), expected)


def test_features_keep_their_precision_under_autocast():
    torch.manual_seed(0)
    scorer = Scorer(8)
    video = torch.rand(1, 3, 4, 32, 32, generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        features = scorer(video)
    assert features.dtype == torch.float32
    assert torch.equal(features, scorer(video))


def test_scores_between_two_views():
    now, before = torch.randn(2, 2, 3, 4, 2, 2, generator=generator())
    previous = torch.randn(2, 3, 1, 2, 2, generator=generator(1))
    scores = token_scores(now, before=before).view(2, 4, 2, 2)
    distance = (now[:, :, 1:] - before[:, :, :-1]).square().sum(1).sqrt()
    torch.testing.assert_close(scores, torch.cat((distance[:, :1], distance), 1))
    scores = token_scores(now, previous).view(2, 4, 2, 2)
    earlier = torch.cat((previous, now[:, :, :-1]), 2)
    torch.testing.assert_close(scores, (now - earlier).square().sum(1).sqrt())


def video(seed: int = 0, frames: int = 8, side: int = 64) -> torch.Tensor:
    return torch.rand(2, frames, side, side, 3, generator=generator(seed)).permute(0, 4, 1, 2, 3) * 2 - 1


def test_nuisance_is_a_pan_a_gain_a_frame_and_noise():
    clip = video()
    still = set()
    for seed in range(4):  # with and without a pan along the rows
        for view, times in zip(nuisance(clip, seed=seed), ((0.5, 1.5), (-1.5, -0.5)), strict=True):
            assert view.shape == clip.shape
            assert view.is_contiguous(memory_format=torch.channels_last_3d)
            found = []
            for frame in range(8):
                # The shift by which a frame of the view fits the clip's best; then what is left is gain and noise.
                fits = {}
                for dy in range(-6, 7):
                    for dx in range(-6, 7):
                        moved = clip[:, :, frame].roll((dy, dx), (2, 3)) + 1
                        seen_frame = view[:, :, frame] + 1
                        fits[dy, dx] = float(torch.corrcoef(torch.stack([moved.flatten(), seen_frame.flatten()]))[0, 1])
                (dy, dx), fit = max(fits.items(), key=lambda item: item[1])
                assert fit > 0.97
                found.append((dy, dx))
                moved = clip[:, :, frame].roll((dy, dx), (2, 3)) + 1
                gain = float((moved * (view[:, :, frame] + 1)).sum() / moved.square().sum())
                assert 0.65 < gain < 1.35
            assert found[::2] == [found[0]] * 4  # the pan is steady: each tubelet's frames are at the same two times
            assert found[1::2] == [found[1]] * 4
            for axis in (0, 1):
                first, second = found[0][axis], found[1][axis]
                assert abs(first) <= 4 * abs(times[0]) + 0.5
                assert abs((second - first) - first / times[0]) <= 1.01 * abs(1 / times[0])
            still.add(found[1][0] == 0)
    assert still == {True, False}


def test_nuisance_leaves_black_black_without_noise_and_repeats_by_seed():
    clip = video()
    a, b = nuisance(clip, seed=3), nuisance(clip, seed=3)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], nuisance(clip, seed=4)[0])
    for seed in range(5):
        for view in nuisance(torch.full((1, 3, 8, 64, 64), -1.0), seed=seed):
            assert (view.mean((0, 1, 3, 4)) + 1).abs().max() < 0.006  # four standard errors of the noise at its most
            assert view.std() <= 0.11


def test_noise_of_the_views_differs_wherever_scores_and_stability_look():
    still = torch.zeros(1, 3, 16, 64, 64)
    now, before = (view - view.mean((1, 3, 4), keepdim=True) for view in nuisance(still, seed=2))
    for steps in (0, 2, 4, 8):
        a, b = now[:, :, steps:].flatten(), before[:, :, : 16 - steps].flatten()
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.05


def test_stability_loss_ranks_another_tokens_nuisance_below_what_time_changes():
    now, before = torch.randn(2, 2, 3, 8, 2, 2, generator=generator())

    def change(b, i, steps):  # of token i = (t, y, x), now against `steps` latent frames before, around the end
        t, y, x = i
        return math.log(float((now[b, :, t, y, x] - before[b, :, (t - steps) % 8, y, x]).square().sum()) + 1e-6)

    tokens = [(t, y, x) for t in range(8) for y in range(2) for x in range(2)]
    pairs = [
        math.log1p(math.exp(change(b, i, 0) - change(b, j, steps)))
        for b in range(2) for steps in (2, 4) for i in tokens for j in tokens
    ]  # fmt: skip
    # Which token is compared with which is drawn: over seeds, any with any.
    values = [stability_loss(now, before, seed=seed).item() for seed in range(200)]
    assert sum(values) / 200 == pytest.approx(sum(pairs) / len(pairs), rel=0.01)
    assert max(values) > min(values)


def test_stability_compares_different_tokens():
    now, noise = torch.randn(2, 1, 3, 8, 2, 2, generator=generator())
    scale = torch.tensor([[1e-2, 1e-1], [1e1, 1e2]])  # the changes of each place have a size of their own
    now = now * scale
    values = [stability_loss(now, now + noise * scale, seed=seed).item() for seed in range(20)]
    assert sum(values) / 20 > 2.5  # compared with itself, no token would give much more than log 2


def test_stability_loss_in_the_limits():
    now = torch.randn(1, 4, 8, 2, 2, generator=generator())
    assert stability_loss(now, now, seed=0) < 1e-4  # nuisance changes nothing
    far = torch.randn(1, 4, 1, 2, 2, generator=generator(1)).expand(-1, -1, 8, -1, -1) * 100
    same = torch.randn(1, 4, 1, 2, 2, generator=generator(2)).expand(-1, -1, 8, -1, -1)
    assert stability_loss(same, same + far, seed=0).item() > 0.5  # time changes no more than nuisance does
    single = torch.randn(1, 4, 1, 2, 2, requires_grad=True)
    stability_loss(single, single, seed=0).backward()
    assert torch.equal(single.grad, torch.zeros_like(single))


@pytest.mark.parametrize("selection", ["perturbed", "straight_through"])
def test_probes_alone_pass_gradients_and_are_uniform(selection):
    torch.manual_seed(0)
    model = AdaptiveTokenizer(TokenizerConfig.tiny(width=8, selection=selection)).train()
    grid = (8, 14, 14)
    scores = torch.rand(4, 1568, generator=generator()).requires_grad_()
    weights = model.keep_weights(scores, grid, seed=3)
    probes = (weights > 0) & (weights < 1)
    assert not probes[:, :196].any()
    assert probes[:, 196:].float().mean().item() == pytest.approx(0.125, abs=0.02)
    values = weights[probes].detach().sort().values
    assert (values - torch.linspace(0, 1, len(values))).abs().max() < 0.06  # Kolmogorov and Smirnov's distance
    slope = torch.zeros_like(weights)
    slope[~probes] = torch.randn(int((~probes).sum()), generator=generator(1))
    (gradient,) = torch.autograd.grad(weights, scores, slope)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert not torch.equal(model.keep_weights(scores, grid, seed=4), weights)


def test_probes_measure_what_tokens_are_worth():
    """The mean over seeds of the gradient that straight-through passes is the change of the loss from 0 to 1."""
    torch.manual_seed(0)
    config = TokenizerConfig.tiny(width=8, selection="straight_through", probes=0.25)
    model = AdaptiveTokenizer(config).train()
    grid, n = (5, 2, 2), 20
    scores = torch.randn(1, n, generator=generator()).requires_grad_()
    worth = torch.randn(1, n, generator=generator(1))
    total = torch.zeros(n)
    runs = 1500
    for seed in range(runs):
        weights = model.keep_weights(scores, grid, seed=seed)
        (slope,) = torch.autograd.grad((worth * weights**3).sum(), scores)  # the loss moves by `worth` from 0 to 1
        total += slope[0] / runs
    # Through the standardised scores of the 16 tokens after the first latent frame.
    rest = scores[:, 4:].detach().requires_grad_()
    standard = (rest - rest.mean()) / (rest.std(correction=0) + 1e-6)
    (expected,) = torch.autograd.grad((worth[:, 4:] * standard).sum(), rest)
    assert torch.equal(total[:4], torch.zeros(4))
    assert torch.cosine_similarity(total[4:], expected[0], dim=0) > 0.98
    assert total[4:].norm().item() == pytest.approx(expected.norm().item(), rel=0.1)


def test_held_tokens_are_the_last_ones_kept():
    latents = torch.randn(2, 3, 6, 2, 2, generator=generator())
    weights = (torch.rand(2, 1, 6, 2, 2, generator=generator(1)) < 0.4).float()
    held = Hold()(latents, weights)
    for b in range(2):
        for y in range(2):
            for x in range(2):
                last = torch.zeros(3)
                for t in range(6):
                    if weights[b, 0, t, y, x] == 1:
                        last = latents[b, :, t, y, x]
                    torch.testing.assert_close(held[b, :, t, y, x], last)


def test_holding_goes_on_from_tile_to_tile():
    layer, latents = Hold(), torch.randn(1, 3, 6, 2, 2, generator=generator())
    weights = torch.rand(1, 1, 6, 2, 2, generator=generator(1))
    state: dict = {}
    parts = [layer(latents[:, :, a:b], weights[:, :, a:b], state) for a, b in ((0, 1), (1, 4), (4, 6))]
    assert torch.equal(torch.cat(parts, 2), layer(latents, weights))
