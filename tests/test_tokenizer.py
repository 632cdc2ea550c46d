"""The tokenizer: one result for any chunking, causal in time, scores and weights as defined."""

import json
import math

import pytest
import torch

from vmae import AdaptiveTokenizer, TokenizerConfig
from vmae.scorer import nuisance, stability_loss, token_scores

FRAMES, SIDE = 22, 32


def make(**changes) -> AdaptiveTokenizer:
    torch.manual_seed(0)
    return AdaptiveTokenizer(TokenizerConfig.tiny(width=8, scorer_width=4, tile=8, **changes)).eval()


MODEL = make()


def video(batch: int = 1, frames: int = FRAMES, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (batch, frames, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    return pixels.permute(0, 4, 1, 2, 3)


def assert_same(a, b) -> None:
    assert a.grid == b.grid
    for name in ("latents", "codes", "scores"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("frames", [4, 8, 14, 16])
def test_a_prefix_gives_the_prefix(frames):
    clip = video()
    whole, prefix = MODEL.encode(clip), MODEL.encode(clip[:, :, :frames])
    n = prefix.codes.shape[1]
    assert n == frames // 2 * 4
    assert torch.equal(prefix.latents, whole.latents[:, :n])
    assert torch.equal(prefix.scores, whole.scores[:, :n])


@pytest.mark.parametrize("frame", [0, 3, 8, 15, 21])
def test_a_frame_changes_no_earlier_token(frame):
    clip = video()
    changed = clip.clone()
    changed[:, :, frame] = 255 - changed[:, :, frame]
    before, after = MODEL.encode(clip), MODEL.encode(changed)
    start = frame // 2 * 4
    assert torch.equal(before.latents[:, :start], after.latents[:, :start])
    # The first latent frame's scores are by definition the second's.
    assert torch.equal(
        before.scores[:, 4 if start == 4 else 0 : start], after.scores[:, 4 if start == 4 else 0 : start]
    )
    assert not torch.equal(before.latents[:, start:], after.latents[:, start:])


def test_decoding_is_causal_too():
    tokens = MODEL.encode(video(frames=16))
    latents = tokens.latents.clone()
    latents[:, 3 * 4 :] = -latents[:, 3 * 4 :]
    a, b = MODEL.decode(tokens), MODEL.decode(tokens._replace(latents=latents))
    assert a.shape == (1, 3, 16, SIDE, SIDE)
    assert 0 <= a.min() < a.max() <= 1
    assert torch.equal(a[:, :, :6], b[:, :, :6])
    assert not torch.equal(a[:, :, 6:], b[:, :, 6:])


def test_tiles_agree_with_the_network_run_whole():
    clip = video(2)
    tokens = MODEL.encode(clip)
    with torch.no_grad():
        x = clip.float() / 127.5 - 1
        z = MODEL.encoder(x).flatten(2).transpose(1, 2)
        scores = token_scores(MODEL.scorer(x))
    half = [(level - 1) * 1.001 / 2 for level in MODEL.config.levels]
    shift = [math.atanh(0.5 / h) for h in half]
    exact = torch.stack([torch.tanh(z[..., i] + shift[i]) * half[i] - 0.5 for i in range(6)], -1)
    # Rounding may fall either way where the bounded value is a half, so compare before it.
    assert ((tokens.latents * 4 - exact).abs() < 0.5 + 1e-3).all()
    torch.testing.assert_close(tokens.scores, scores, rtol=1e-4, atol=1e-4)


def test_codes_spell_the_latents():
    tokens = MODEL.encode(video())
    digits = [(tokens.codes // 8**i) % 8 for i in range(6)]
    assert torch.equal(torch.stack([(d - 4) / 4 for d in digits], -1), tokens.latents)


def test_scores_are_distances_from_the_frame_before():
    features = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    scores = token_scores(features).view(2, 4, 2, 2)
    for b in range(2):
        for t in range(4):
            for y in range(2):
                for x in range(2):
                    now = max(t, 1)  # the first latent frame takes the second one's
                    difference = features[b, :, now, y, x] - features[b, :, now - 1, y, x]
                    expected = math.sqrt(sum(float(d) ** 2 for d in difference))
                    assert float(scores[b, t, y, x]) == pytest.approx(expected, rel=1e-5)


def test_a_single_latent_frame_scores_zero():
    tokens = MODEL.encode(video(frames=2))
    assert torch.equal(tokens.scores, torch.zeros(1, 4))


def test_still_video_has_finite_gradients():
    model = make().train()
    still = torch.full((1, 3, 8, SIDE, SIDE), 100, dtype=torch.uint8)
    model(still, seed=0).loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("selection", ["perturbed", "straight_through"])
def test_weights_keep_the_budget_and_pass_gradients(selection):
    model = make(selection=selection)
    grid, n = (8, 14, 14), 1568
    scores = torch.rand(2, n, generator=torch.Generator().manual_seed(1)).requires_grad_()
    hard = model.keep_weights(scores, grid, seed=3)
    assert torch.equal(hard[:, :196], torch.ones(2, 196))
    rest = scores[:, 196:]
    kept = hard[:, 196:].bool()
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert int(hard.sum()) == 2 * 768  # the paper's 768 of 1,568
    for row in range(2):  # every kept score is at least every dropped one
        assert rest[row][kept[row]].min() >= rest[row][~kept[row]].max()
    assert int(model.keep_weights(scores, grid, seed=3, keep=0.25).sum()) == 2 * 392
    model.train()
    weights = model.keep_weights(scores, grid, seed=3)
    probes = (weights > 0) & (weights < 1)
    assert torch.equal(weights[~probes], hard[~probes])
    (weights * torch.randn(2, n, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert scores.grad is not None
    assert scores.grad[:, 196:].abs().sum() > 0


def test_training_step_reaches_every_parameter_and_lowers_the_loss():
    model = make(sigma=0.5).train()  # of twelve tokens few lie near the threshold: little noise would move none
    clip = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 4, 4), size=(8, SIDE, SIDE))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        loss = model(clip, seed=step).loss
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_unselected_tokens_do_not_reach_the_reconstruction():
    model = make(keep=0.5)
    clip = video(frames=8)
    output = model(clip, seed=0)
    tokens = model.encode(clip)
    assert int(output.weights.sum()) == 8
    decoded = model.decode(tokens, output.weights)
    torch.testing.assert_close(decoded * 2 - 1, output.reconstruction.clamp(-1, 1))
    dropped = torch.where(output.weights[..., None] > 0, tokens.latents, -tokens.latents)
    assert torch.equal(model.decode(tokens._replace(latents=dropped), output.weights), decoded)
    x = clip.float() / 127.5 - 1
    torch.testing.assert_close(output.pixels, ((output.reconstruction - x) ** 2).mean())
    assert output.loss == output.pixels


def test_all_tokens_can_be_kept():
    model = make().train()
    clip = video(frames=8)
    output = model(clip, seed=0, keep=1.0)
    assert torch.equal(output.weights, torch.ones(1, 16))
    output.loss.backward()
    assert all(p.grad is None for p in model.scorer.parameters())
    expected = model.decode(model.encode(clip)) * 2 - 1
    torch.testing.assert_close(output.reconstruction.detach().clamp(-1, 1), expected)


def test_the_loss_in_training_has_its_parts():
    for stability in (0.0, 2.0):
        model = make(stability=stability).train()
        output = model(video(frames=8), seed=0)
        now, before = (model.scorer(view) for view in nuisance(model.normalised(video(frames=8)), seed=0))
        expected = output.pixels + stability * stability_loss(now, before, seed=0)
        torch.testing.assert_close(output.loss, expected)


def test_saved_and_loaded_model_gives_the_same_tokens(tmp_path):
    MODEL.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["width"] == 8
    loaded = AdaptiveTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.config == MODEL.config
    assert_same(loaded.encode(video()), MODEL.encode(video()))


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (torch.zeros(1, 3, 7, 32, 32), ValueError, "even.*T = 7"),
        (torch.zeros(1, 3, 0, 32, 32), ValueError, "T = 0"),
        (torch.zeros(1, 3, 8, 30, 32), ValueError, r"multiples of 16.*\[30, 32\]"),
        (torch.zeros(1, 1, 8, 32, 32), ValueError, r"\[B, 3, T, H, W\].*\[1, 1, 8, 32, 32\]"),
        (torch.zeros(3, 8, 32, 32), ValueError, r"\[3, 8, 32, 32\]"),
        (torch.zeros(1, 3, 8, 32, 32, dtype=torch.int64), TypeError, "int64"),
        (torch.full((1, 3, 8, 32, 32), float("nan")), ValueError, r"in \[0, 1\], got nan"),
        (torch.full((1, 3, 8, 32, 32), 255.0), ValueError, r"in \[0, 1\], got 255"),
        ("dive.mp4", TypeError, "str"),
    ],
)
def test_wrong_videos_are_refused(bad, error, words):
    with pytest.raises(error, match=words):
        MODEL.encode(bad)


def test_a_stream_starts_anew_after_its_end():
    stream = MODEL.stream()
    for clip in (video(seed=1), video(seed=2)):
        parts = [stream.push(clip), stream.flush()]
        assert torch.equal(torch.cat([p.latents for p in parts], 1), MODEL.encode(clip).latents)
        assert torch.equal(torch.cat([p.scores for p in parts], 1), MODEL.encode(clip).scores)


def test_streams_refuse_what_does_not_fit():
    stream = MODEL.stream()
    with pytest.raises(ValueError, match="got none"):
        stream.flush()
    assert stream.push(video(frames=3)).grid == (0, 2, 2)
    with pytest.raises(ValueError, match="one shape and dtype"):
        stream.push(video(batch=2, frames=3))
    with pytest.raises(ValueError, match=r"even number.*3"):
        stream.flush()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"stem": 3}, "stem"), ({"tile": 7}, "tile"), ({"keep": 1.5}, "keep.*1.5"), ({"selection": "x"}, "selection.*'x'"),
     ({"width": 0}, "width.*0"), ({"levels": ()}, "levels"), ({"levels": (1, 8)}, "levels.*1, 8"),
     ({"sigma": -1.0}, "sigma.*-1"), ({"probes": 0.0}, r"probes.*0\.0"), ({"probes": 2.0}, "probes.*2"),
     ({"stability": float("nan")}, "stability.*nan")],
)  # fmt: skip
def test_wrong_configurations_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        TokenizerConfig.tiny(**changes)
