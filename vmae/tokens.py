"""The token grid of a video: what a tubelet is, what tokens are, and which videos have whole ones."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vmae.masking import Grid

TUBELET = (2, 16, 16)  # frames, rows and columns of a token


class Tokens(NamedTuple):
    """A clip's tokens, N = T * H * W of the grid, time first.

    latents: [B, N, L], quantized, in [-1, 1]; codes: int32 [B, N]; scores: float32 [B, N]; grid: (T, H, W).
    """

    latents: Tensor
    codes: Tensor
    scores: Tensor
    grid: Grid


def joined(parts: Sequence[Tokens]) -> Tokens:
    """The tokens of consecutive pieces of a video as one."""
    latents, codes, scores, grids = zip(*parts, strict=True)
    grid = (sum(grid[0] for grid in grids), *grids[0][1:])
    return Tokens(torch.cat(latents, 1), torch.cat(codes, 1), torch.cat(scores, 1), grid)


def check_video(video: Tensor, *, chunk: bool = False) -> Grid:
    """The token grid of a video [B, 3, T, H, W]; a chunk may have any number of frames."""
    if not isinstance(video, Tensor):
        raise TypeError(f"video: expected a tensor [B, 3, T, H, W], got {type(video).__name__}")
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"video: expected shape [B, 3, T, H, W], got {list(video.shape)}")
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise TypeError(f"video: expected dtype uint8 or floating point in [0, 1], got {video.dtype}")
    t, h, w = video.shape[2:]
    if not chunk and (t % TUBELET[0] or t == 0):
        raise ValueError(f"video: expected an even number of frames, got T = {t}")
    if h % TUBELET[1] or w % TUBELET[2] or not h or not w:
        raise ValueError(f"video: expected rows and columns in multiples of {TUBELET[1]}, got [H, W] = {[h, w]}")
    # Elsewhere than on a CPU a look at the values waits for the device: there only streams, which run once, take it.
    looks = (video.is_cpu or chunk) and not torch.compiler.is_compiling()
    if looks and video.is_floating_point() and video.numel():
        low, high = (float(bound) for bound in video.detach().aminmax())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails too; the slack is for resized videos
            raise ValueError(f"video: expected floating point values in [0, 1], got {low:g} to {high:g}")
    return t // TUBELET[0], h // TUBELET[1], w // TUBELET[2]


def check_clip(frames: int, size: int) -> None:
    """Raise `ValueError` unless clips of this size are made of whole tubelets."""
    for name, value, step in (("frames", frames, TUBELET[0]), ("size", size, TUBELET[1])):
        if value < 1 or value % step:
            raise ValueError(f"{name}: expected a positive multiple of {step}, got {value}")
