"""Motion and losses: what is drawn is what was computed."""

import pytest
from PIL import Image

from vmae import load_clip
from vmae.report import loss_plot, motion, read_losses


def test_motion_is_the_change_between_latent_frames(moving_square):
    video = load_clip(moving_square, frames=32, size=48)
    clip, change = video[0].double(), motion(video)
    assert change.shape == (16, 3, 3)
    for t in range(16):
        for y in range(3):
            for x in range(3):

                def tubelet(at, y=y, x=x):
                    return clip[:, 2 * at : 2 * at + 2, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16].mean(0)

                expected = (tubelet(t) - tubelet(t - 1)).abs().mean() if t else 0.0
                assert change[t, y, x] == pytest.approx(float(expected), abs=1e-3)


def test_losses_of_a_log_that_was_cut_short(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0, "loss": 2.5}\n{"step": 1, "loss": 1.5}\n{"step": 2, "lo')
    assert read_losses(log) == [2.5, 1.5]
    loss_plot({"one": log, "two": log}, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size[0] > 1000
