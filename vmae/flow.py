"""Motion by optical flow, a classical measure of importance; needs OpenCV, the extra `flow`."""

import importlib
import itertools
from typing import Any

import torch
from torch import Tensor

from vmae.tokens import TUBELET, check_video


def flow_available() -> bool:
    """Whether OpenCV is installed and can be used."""
    try:
        importlib.import_module("cv2")
    except ImportError:
        return False
    return True


def flow_scores(video: Tensor) -> Tensor:
    """Mean length of the optical flow in each tubelet, in pixels per frame.

    The flow from the frame before (DIS, medium preset; the first frame takes the second one's), as in the masking
    baseline of LVMAE (NeurIPS 2024).

    Args:
        video: uint8 [B, 3, T, H, W].

    Returns:
        float32 [B, N], on the CPU.

    Raises:
        ValueError: OpenCV is not installed.
    """
    grid = check_video(video)
    if video.dtype != torch.uint8:
        raise TypeError(f"video: expected dtype uint8, got {video.dtype}")
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError:
        raise ValueError("optical flow: expected OpenCV, run: pip install opencv-python-headless") from None
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    clips = []
    for clip in video.cpu().permute(0, 2, 3, 4, 1):
        grey = [cv2.cvtColor(frame.contiguous().numpy(), cv2.COLOR_RGB2GRAY) for frame in clip]
        lengths = [torch.from_numpy(flow.calc(a, b, None)).norm(dim=-1) for a, b in itertools.pairwise(grey)]
        clips.append(torch.stack([lengths[0], *lengths]))
    t, h, w = TUBELET
    motion = torch.stack(clips).unflatten(1, (grid[0], t)).unflatten(3, (grid[1], h)).unflatten(5, (grid[2], w))
    return motion.mean((2, 4, 6)).flatten(1)
