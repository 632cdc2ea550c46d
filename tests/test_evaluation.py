"""Measures of quality against brute force, and scenes against their definition."""

import contextlib
import math

import pytest
import torch

from vmae import AdaptiveTokenizer, ClipDataset, TokenizerConfig, VideoError
from vmae.evaluation import (
    code_counts,
    entropy_bits,
    evaluate,
    frame_difference,
    mean_colour,
    psnr,
    reconstruction,
    score_precision,
    ssim,
    table,
)
from vmae.scenes import KINDS, average_precision, scene


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make(**changes) -> AdaptiveTokenizer:
    torch.manual_seed(0)
    return AdaptiveTokenizer(TokenizerConfig.tiny(width=8, scorer_width=4, tile=8, **changes)).eval()


def test_psnr_of_known_errors():
    a = random(2, 3, 4, 16, 16) * 0.5
    values = psnr(a, torch.stack((a[0] + 0.1, a[1] + 0.01)))
    torch.testing.assert_close(values, torch.tensor([20.0, 40.0]), rtol=1e-3, atol=1e-3)
    assert psnr(a, a).tolist() == [100, 100]  # an exact clip must not make every mean infinite


def test_ssim_against_brute_force():
    a = random(1, 2, 2, 14, 13).double()
    b = (a + 0.2 * random(1, 2, 2, 14, 13, seed=1)).double()
    weights = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)]
    total = sum(map(sum, weights))
    values = []
    for c in range(2):
        for t in range(2):
            for y in range(4):
                for x in range(3):
                    windows = []
                    for picture in (a, b):
                        windows.append([picture[0, c, t, y + i, x + j].item() for i in range(11) for j in range(11)])
                    w = [weights[i][j] / total for i in range(11) for j in range(11)]
                    mean = [sum(p * q for p, q in zip(w, v, strict=True)) for v in windows]
                    var = [
                        sum(p * (q - m) ** 2 for p, q in zip(w, v, strict=True))
                        for v, m in zip(windows, mean, strict=True)
                    ]
                    cov = sum(p * (q - mean[0]) * (r - mean[1]) for p, q, r in zip(w, *windows, strict=True))
                    top = (2 * mean[0] * mean[1] + 1e-4) * (2 * cov + 9e-4)
                    values.append(top / ((mean[0] ** 2 + mean[1] ** 2 + 1e-4) * (var[0] + var[1] + 9e-4)))
    assert ssim(a, b).item() == pytest.approx(sum(values) / len(values), rel=1e-6)
    assert ssim(a, a).item() == pytest.approx(1.0)


def test_mean_colour_of_each_tubelet():
    video = random(1, 3, 4, 32, 48)
    filled = mean_colour(video)
    for t in (0, 2):
        for y in (0, 16):
            for x in (0, 16, 32):
                part = (slice(None), slice(None), slice(t, t + 2), slice(y, y + 16), slice(x, x + 16))
                expected = video[part].mean((2, 3, 4), keepdim=True).expand_as(video[part])
                torch.testing.assert_close(filled[part], expected)


def test_entropy_of_the_codes():
    levels = (8, 3, 5)
    codes = torch.arange(8 * 3 * 5).repeat(2)
    assert entropy_bits(code_counts(codes, levels)) == pytest.approx([3, math.log2(3), math.log2(5)])
    assert entropy_bits(code_counts(torch.full((7,), 17), levels)) == [0, 0, 0]
    digits = torch.tensor([[0, 2, 4], [0, 2, 1], [7, 2, 1], [3, 0, 1]])
    codes = digits[:, 0] + 8 * digits[:, 1] + 24 * digits[:, 2]
    weighted = code_counts(codes, levels, torch.tensor([1.0, 0.5, 0, 0]))
    assert weighted[2].tolist() == [0, 0.5, 0, 0, 1, 0, 0, 0]
    counts = code_counts(codes, levels)
    assert counts[0].tolist() == [2, 0, 0, 1, 0, 0, 0, 1]
    assert counts[1].tolist() == [1, 0, 3, 0, 0, 0, 0, 0]
    assert counts[2].tolist() == [0, 3, 0, 0, 1, 0, 0, 0]
    assert entropy_bits(counts)[0] == pytest.approx(1.5)
    assert entropy_bits(counts)[1] == pytest.approx(-(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)))


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_against_every_threshold(seed):
    scores = (random(60, seed=seed) * 12).round()  # many ties
    relevant = random(60, seed=seed + 100) < 0.3
    area, recalled = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        hits = int((taken & relevant).sum())
        recall = hits / int(relevant.sum())
        area += (recall - recalled) * hits / int(taken.sum())
        recalled = recall
    assert average_precision(scores, relevant) == pytest.approx(area)


def test_average_precision_in_the_limits():
    relevant = torch.tensor([True, False, False, True])
    assert average_precision(torch.tensor([3.0, 1, 2, 4]), relevant) == 1
    assert average_precision(torch.zeros(4), relevant) == 0.5
    with pytest.raises(ValueError, match="at least one relevant"):
        average_precision(torch.zeros(4), torch.zeros(4, dtype=torch.bool))


@pytest.mark.parametrize("seed", range(4))
def test_scenes_move_where_their_still_version_changes(seed):
    still, pan, noise = (scene(kind, seed=seed, frames=8, size=64) for kind in KINDS)
    assert torch.equal(still.moves, pan.moves)
    assert torch.equal(still.moves, noise.moves)
    assert still.video.shape == (1, 3, 8, 64, 64)
    assert still.video.dtype == torch.uint8
    moves = still.moves.view(4, 4, 4)
    assert not moves[0].any()
    assert 0.02 < moves[1:].float().mean() < 0.9
    for t in range(1, 4):
        for y in range(4):
            for x in range(4):
                place = (slice(None), slice(None), slice(16 * y, 16 * y + 16), slice(16 * x, 16 * x + 16))
                now = still.video[0][:, 2 * t : 2 * t + 2][:, :, *place[2:]]
                before = still.video[0][:, 2 * t - 2 : 2 * t][:, :, *place[2:]]
                assert bool(moves[t, y, x]) == (not torch.equal(now, before))
    # Only the nuisance differs: noise is everywhere, and a pan moves what is still otherwise.
    assert (noise.video != still.video).float().mean() > 0.5
    difference = frame_difference(pan.video).view(4, 4, 4)[1:]
    assert (difference > 0).float().mean() > 0.9


def test_scenes_repeat_by_seed_and_refuse_what_they_do_not_know():
    assert torch.equal(scene("noise", seed=5).video, scene("noise", seed=5).video)
    assert not torch.equal(scene("noise", seed=5).video, scene("noise", seed=6).video)
    with pytest.raises(ValueError, match="still, pan, noise, got 'zoom'"):
        scene("zoom", seed=0)
    with pytest.raises(ValueError, match="size"):
        scene("still", seed=0, size=100)


def test_frame_difference_against_brute_force():
    video = (random(1, 3, 6, 32, 32) * 255).to(torch.uint8)
    scores = frame_difference(video).view(3, 2, 2)
    x = video[0].float()
    for t in range(3):
        now = max(t, 1)
        for row in range(2):
            for column in range(2):
                part = (slice(None), slice(None), slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16))
                change = (x[:, 2 * now : 2 * now + 2][part] - x[:, 2 * now - 2 : 2 * now][part]).abs().mean()
                assert scores[t, row, column].item() == pytest.approx(change.item(), rel=1e-5)


def test_reconstructions_keep_as_many_tokens_as_training():
    model = make(keep=0.6)
    clip = (random(1, 8, 32, 32, 3) * 255).to(torch.uint8).permute(0, 4, 1, 2, 3)
    tokens = model.encode(clip)
    kept = model.keep_weights(tokens.scores, tokens.grid, seed=0)
    assert int(kept.sum()) == 10  # of 16
    decoded = model.decode(tokens, kept)
    assert torch.equal(reconstruction(model, tokens, "adaptive"), decoded)
    assert torch.equal(reconstruction(model, tokens, "all"), model.decode(tokens))
    drawn = reconstruction(model, tokens, "random", seed=1)
    assert not torch.equal(drawn, decoded)
    assert not torch.equal(drawn, reconstruction(model, tokens, "random", seed=2))


def test_evaluation_of_a_list_with_broken_files(video_folder):
    model = make()
    dataset = ClipDataset(video_folder, frames=8, size=32, start="center")
    result = evaluate(model, dataset, autocast=contextlib.nullcontext, scenes=2, progress=False)
    assert (result.clips, result.frames, result.size) == (2, 8, 32)
    assert len(result.skipped) == 1
    assert "broken.mp4" in result.skipped[0]
    expected = {"all": [], "mean": []}
    for index in (0, 1):  # a.mp4, b.mp4; then broken.mp4
        clip = dataset[index][0][None]
        truth = clip.float() / 255
        expected["all"].append(psnr(model.decode(model.encode(clip)), truth).item())
        expected["mean"].append(psnr(mean_colour(truth), truth).item())
    for name, values in expected.items():
        assert result.psnr[name] == pytest.approx(sum(values) / 2, rel=1e-5)
    assert len(result.entropy) == 6
    assert {"trained", "frame difference"} <= set(result.precision)
    assert result.precision["frame difference"]["still"] == 1
    text = table(result)
    assert "2 clips of 8 frames at 32 x 32" in text
    assert "broken.mp4" in text
    assert f"{result.psnr['all']:.2f}" in text
    assert f"{result.precision['trained']['pan']:.3f}" in text


def test_evaluation_without_a_usable_video(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"no video")
    dataset = ClipDataset(tmp_path, frames=8, size=32)
    with pytest.raises(VideoError, match=r"none of the 1 videos could be used.*x\.mp4"):
        evaluate(make(), dataset, autocast=contextlib.nullcontext, progress=False)


def test_scores_of_two_tokenizers_side_by_side():
    model = make()
    result = score_precision(model, make(), scenes=2)
    assert result["trained"] == result["untrained"]
    assert result["trained"]["still"] == 1
    assert set(result["trained"]) == set(KINDS)


def test_optical_flow_finds_what_moves():
    pytest.importorskip("cv2")
    from vmae.flow import flow_scores

    values = []
    for seed in range(3):
        video, moves = scene("still", seed=seed)
        values.append(average_precision(flow_scores(video)[:, 64:], moves[:, 64:]))
    assert sum(values) / 3 > 0.8
    shifted = torch.stack([scene("still", seed=1).video[0, :, 0].roll(2 * t, 2) for t in range(4)], 1)[None]
    scores = flow_scores(shifted).view(2, 8, 8)[:, 2:6, 2:6]
    assert scores.mean().item() == pytest.approx(2.0, abs=0.3)  # pixels per frame
    with pytest.raises(TypeError, match=r"uint8, got torch\.float32"):
        flow_scores(shifted.float() / 255)


def test_missing_opencv_is_named(monkeypatch):
    from vmae import flow

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(flow.importlib, "import_module", absent)
    assert not flow.flow_available()
    assert "optical flow (DIS)" not in score_precision(make(), scenes=1)
    with pytest.raises(ValueError, match="pip install opencv-python-headless"):
        flow.flow_scores(scene("still", seed=0, frames=4, size=32).video)
