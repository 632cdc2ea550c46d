"""Motion, against a loop over tokens."""

import pytest

from vmae import load_clip
from vmae.motion import motion


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
