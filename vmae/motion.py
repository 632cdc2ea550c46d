"""Where something moves in a clip."""

import numpy as np
from torch import Tensor

from vmae.tokens import TUBELET


def motion(clip: Tensor) -> np.ndarray:
    """[T', H', W']: how much each token's brightness differs from the token a latent frame earlier; 0 in the first."""
    gray = clip[0].float().mean(0).numpy()
    t, h, w = (n // s for n, s in zip(gray.shape, TUBELET, strict=True))
    tubelets = gray.reshape(t, TUBELET[0], h, TUBELET[1], w, TUBELET[2])
    change = np.zeros((t, h, w), dtype=np.float32)
    change[1:] = np.abs(np.diff(tubelets, axis=0)).mean(axis=(1, 3, 5))
    return change
