"""The page and the plot: what they show is what was computed."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from vmae import AdaptiveTokenizer, TokenizerConfig, Tokens, load_clip
from vmae.report import Masking, Section, loss_plot, motion, page, read_losses, selections


@pytest.fixture(scope="module")
def section(moving_square) -> Section:
    torch.manual_seed(0)
    clip = load_clip(moving_square, frames=32, size=48)
    return Section("<square>", "A note & more.", clip, AdaptiveTokenizer(TokenizerConfig.tiny()).encode(clip))


def test_motion_is_the_change_between_latent_frames(section):
    clip = section.clip[0].double()
    change = motion(section.clip)
    assert change.shape == (16, 3, 3)
    for t in range(16):
        for y in range(3):
            for x in range(3):

                def tubelet(at, y=y, x=x):
                    return clip[:, 2 * at : 2 * at + 2, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16].mean(0)

                expected = (tubelet(t) - tubelet(t - 1)).abs().mean() if t else 0.0
                assert change[t, y, x] == pytest.approx(float(expected), abs=1e-3)


def test_adaptive_selection_follows_what_moves(moving_square):
    torch.manual_seed(0)
    clip = load_clip(moving_square, frames=32, size=96)
    tokens = AdaptiveTokenizer(TokenizerConfig.tiny()).encode(clip)
    _, chosen = selections(tokens, Masking(mask_ratio=0.5, budget=0.2, random=0.05))
    moved = motion(clip).flatten()
    share = {strategy: moved[picked.numpy()].sum() for strategy, picked in chosen.items()}
    assert {len(chosen[s]) for s in ("adaptive", "random", "uniform")} == {115}
    assert share["adaptive"] > 1.5 * share["random"]
    assert share["adaptive"] > 1.5 * share["uniform"]


def test_page_pictures_show_the_masks(section, tmp_path):
    page([section], Masking(mask_ratio=0.5, budget=0.2), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "&lt;square&gt;" in text
    assert "<square>" not in text
    assert "A note &amp; more." in text
    cells = re.findall(r'base64,([^"]+)" alt="([^"]+)"', text)
    pictures = {alt: np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, alt in cells}
    mask, chosen = selections(section.tokens, Masking(mask_ratio=0.5, budget=0.2))
    frame = section.clip[0, :, 0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(pictures["frame 0"].astype(int) - frame).mean() < 4
    for strategy in ("adaptive", "random", "uniform", "none"):
        drawn = pictures[f"{strategy}, latent frame 0"].astype(int)
        selected, visible = set(chosen[strategy].tolist()), set(mask.visible[0].tolist())
        for place in range(9):
            y, x = place // 3 * 16, place % 3 * 16
            got = drawn[y + 4 : y + 12, x + 4 : x + 12].mean((0, 1))
            original = frame[y + 4 : y + 12, x + 4 : x + 12].mean((0, 1))
            blue = 0.35 * original + 0.65 * np.array([64, 128, 255])
            expected = original if place in selected else blue if place in visible else 0.18 * original
            assert np.abs(got - expected).max() < 12, (strategy, place)


def test_page_of_one_latent_frame(tmp_path):
    tokens = Tokens(torch.zeros(1, 4, 6), torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 4), (1, 2, 2))
    clip = torch.zeros(1, 3, 2, 32, 32, dtype=torch.uint8)
    page([Section("still", "", clip, tokens)], Masking(mask_ratio=0.5, budget=0.5, random=0.0), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<img") == 6
    assert "nan" not in text.lower().replace("nano", "")


def test_losses_of_a_log_that_was_cut_short(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0, "loss": 2.5}\n{"step": 1, "loss": 1.5}\n{"step": 2, "lo')
    assert read_losses(log) == [2.5, 1.5]
    loss_plot({"one": log, "two": log}, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size[0] > 1000
