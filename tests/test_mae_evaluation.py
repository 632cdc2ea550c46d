"""What is said of a model that has learned: by hand, from the same files."""

import json

import numpy as np
import pytest
import torch

from vmae import AdaptiveTokenizer, TokenizerConfig, VideoMAE, VideoMAEConfig, checkpoint, load_clip, tube_mask
from vmae.flow import flow_available, flow_scores
from vmae.mae import everest_scores
from vmae.mae_evaluation import evaluated_mae, mae_table, nearest_visible
from vmae.masking import STRATEGIES, select
from vmae.motion import motion
from vmae.optimisation import Optimisation
from vmae.pretraining import PretrainRun
from vmae.training import Clips


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    checkpoint.save(AdaptiveTokenizer(TokenizerConfig.tiny()), folder / "tokenizer")
    for target in ("latent", "pixels"):
        checkpoint.save(VideoMAE(VideoMAEConfig.tiny(frames=8, size=64, target=target)), folder / target)
    return folder


def run_on(data, val, models, **changes) -> PretrainRun:
    options = Optimisation(precision="fp32")
    clips = Clips(frames=8, size=64, workers=0)
    settings = {"val": val, "tokenizer": models / "tokenizer", "clips": clips, "optimisation": options, **changes}
    return PretrainRun(data, **settings)


@pytest.mark.parametrize("grid", [(2, 3, 5), (4, 4, 4), (1, 7, 2)])
@pytest.mark.parametrize("mask_ratio", [0.5, 0.9])
def test_nearest_visible_token(grid, mask_ratio):
    mask = tube_mask(grid, 3, mask_ratio=mask_ratio, seed=4)
    near = nearest_visible(mask, grid)
    places = [np.array(np.unravel_index(i, grid)) for i in range(int(np.prod(grid)))]
    for row, visible in zip(near.tolist(), mask.visible.tolist(), strict=True):
        for token, found in enumerate(row):
            distances = [int(((places[token] - places[v]) ** 2).sum()) for v in visible]
            assert found == visible[distances.index(min(distances))]


@pytest.mark.parametrize("target", ["latent", "pixels"])
def test_every_figure_by_hand(target, video_folder, moving_square, models, tmp_path):
    (tmp_path / "val.txt").write_text(
        f"{video_folder / 'a.mp4'} 0\n{video_folder / 'broken.mp4'} 0\n{moving_square} 1\n"
    )
    result = evaluated_mae(models / target, run_on(video_folder, tmp_path / "val.txt", models))
    assert (result.clips, result.frames, result.size, result.target) == (2, 8, 64, target)
    assert len(result.skipped) == 2  # among those to train on as well
    model = checkpoint.load(VideoMAE, models / target)
    tokenizer = checkpoint.load(AdaptiveTokenizer, models / "tokenizer")
    grid, every = (4, 4, 4), torch.arange(64)[None]

    def read(path):
        clip = load_clip(path, frames=8, size=64)
        tokens = tokenizer.encode(clip)
        return clip, tokens, model.target(clip, tokens, every)[0]

    with torch.no_grad():
        train = torch.stack([read(video_folder / name)[2] for name in ("a.mp4", "b.mp4")]).mean(0)
        rows = {name: [] for name in STRATEGIES}
        truths = {name: [] for name in STRATEGIES}
        for number, path in ((1, video_folder / "a.mp4"), (2, moving_square)):
            clip, tokens, wanted = read(path)
            mask = tube_mask(grid, 1, mask_ratio=0.9, seed=number)
            near = nearest_visible(mask, grid)[0]
            moved = torch.from_numpy(motion(clip)).flatten()
            scores = {"adaptive": tokens.scores, "everest": everest_scores(clip, model.patch_embed)}
            if flow_available():
                scores["flow"] = flow_scores(clip)
            adaptive = None
            for place, name in enumerate(result.strategies):
                chosen = select(name, mask.hidden, grid, budget=0.15, random=0.05 if name in scores else 0.0,
                                seed=(place << 32) + number, scores=scores.get(name))  # fmt: skip
                adaptive = set(chosen[0].tolist()) if adaptive is None else adaptive
                i = chosen[0]
                guesses = (model.predict(clip, mask.visible, chosen)[0], train[i], wanted[near[i]])
                errors = [float(((guess - wanted[i]) ** 2).mean()) for guess in guesses]
                share = float(moved[i].sum() / moved[mask.hidden[0]].sum())
                rows[name].append([*errors, share, len(adaptive & set(i.tolist())) / len(i)])
                truths[name].append(wanted[i])
    for name, row in result.strategies.items():
        loss, position, nearest, share, overlap = np.mean(rows[name], axis=0)
        constant = float(torch.cat(truths[name]).var(0, correction=0).mean())
        assert row.tokens == (56 if name == "none" else 10)  # 15 % of 64 is 9.6
        found = (row.loss, row.constant, row.position, row.nearest, row.motion, row.overlap)
        assert found == pytest.approx((loss, constant, position, nearest, share, overlap), rel=1e-4), name
    assert result.strategies["adaptive"].overlap == 1
    assert set(result.strategies) == {name for name in STRATEGIES if name != "flow" or flow_available()}


def test_the_table_has_every_figure(video_folder, models):
    result = evaluated_mae(models / "latent", run_on(video_folder, video_folder, models))
    table = mae_table(result)
    for name, row in result.strategies.items():
        line = next(line for line in table.splitlines() if line.startswith(f"{name} "))
        assert f"{row.loss:.4f}" in line
        assert f"{row.nearest:.4f}" in line
    assert all(f"skipped: {reason}" in table for reason in result.skipped)
    assert "broken.mp4" in table
    json.dumps(table)


def test_what_cannot_be_evaluated(video_folder, models, tmp_path):
    with pytest.raises(ValueError, match="val: expected videos to evaluate on, got none"):
        evaluated_mae(models / "latent", run_on(video_folder, None, models))
    with pytest.raises(ValueError, match="tokenizer: expected a tokenizer's folder"):
        evaluated_mae(models / "latent", run_on(video_folder, video_folder, models, tokenizer=None))
    with pytest.raises(ValueError, match="is no readable VideoMAE"):
        evaluated_mae(models / "tokenizer", run_on(video_folder, video_folder, models))
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"none of its videos could be used; the last one: .*bad\.mp4"):
        evaluated_mae(models / "latent", run_on(video_folder, tmp_path, models))
    with pytest.raises(ValueError, match=r"none of its videos could be used; the last one: .*bad\.mp4"):
        evaluated_mae(models / "latent", run_on(tmp_path, video_folder, models))
    for levels in ((8, 8), (64,)):
        checkpoint.save(AdaptiveTokenizer(TokenizerConfig.tiny(levels=levels)), tmp_path / "other")
        with pytest.raises(ValueError, match=rf"tokenizer: expected latents of 6 numbers, .* got one of {len(levels)}"):
            evaluated_mae(models / "latent", run_on(video_folder, video_folder, models, tokenizer=tmp_path / "other"))
