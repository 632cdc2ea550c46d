"""Generated scenes whose motion is known exactly, to measure what importance scores mean."""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from vmae.tokens import TUBELET, check_clip

Kind = Literal["still", "pan", "noise"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Scene(NamedTuple):
    """A video uint8 [1, 3, T, H, W], and which of its tokens move: bool [1, N], False in the first latent frame."""

    video: Tensor
    moves: Tensor


def scene(kind: Kind, *, seed: int, frames: int = 16, size: int = 128) -> Scene:
    """One textured object that crosses a textured background.

    The background is `still`, or it moves as a whole (`pan`), or it is still under sensor noise and flicker (`noise`).
    A token moves when its pixels differ from those a latent frame earlier in the same scene without the nuisance, that
    is, without pan, noise and flicker. Textures have the amplitude spectrum of natural images, 1 / frequency.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    check_clip(frames, size)
    generator = torch.Generator().manual_seed(seed)
    background, texture = (_texture(size, generator) for _ in range(2))
    velocity, pan = (_velocity(generator) for _ in range(2))
    mask = _ellipse(size, frames, velocity, generator)
    video, clean = [], []
    for t in range(frames):
        moved = texture.roll((velocity[0] * t, velocity[1] * t), (0, 1))
        shift = (pan[0] * t, pan[1] * t) if kind == "pan" else (0, 0)
        inside = mask.roll((velocity[0] * t, velocity[1] * t), (0, 1))[..., None]
        clean.append(torch.where(inside, moved, background))
        video.append(torch.where(inside, moved, background.roll(shift, (0, 1))))
    pixels = torch.stack(video)
    if kind == "noise":
        gain = 1 + 0.05 * torch.randn(frames, 1, 1, 1, generator=generator)
        pixels = pixels * gain + 0.03 * torch.randn(pixels.shape, generator=generator)
    return Scene(_quantized(pixels), _moves(_quantized(torch.stack(clean))))


def _quantized(pixels: Tensor) -> Tensor:
    """[T, H, W, 3] in [0, 1] -> uint8 [1, 3, T, H, W]."""
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(3, 0, 1, 2)[None]


def _moves(video: Tensor) -> Tensor:
    t, h, w = TUBELET
    tubelets = video.unfold(2, t, t).unfold(3, h, h).unfold(4, w, w)  # B C T H W t h w
    differs = (tubelets[:, :, 1:] != tubelets[:, :, :-1]).any(-1).any(-1).any(-1).any(1)
    return torch.cat((torch.zeros_like(differs[:, :1]), differs), dim=1).flatten(1)


def _texture(size: int, generator: torch.Generator) -> Tensor:
    """[size, size, 3] around a random colour, mostly of brightness; periodic, so that a shift is a roll."""
    frequency = torch.fft.fftfreq(size)
    radius = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt()
    radius[0, 0] = math.inf  # no mean
    spectrum = torch.fft.fft2(torch.randn(4, size, size, generator=generator)) / radius
    texture = torch.fft.ifft2(spectrum).real
    texture = texture / texture.std((1, 2), keepdim=True)
    colour = 0.3 + 0.4 * torch.rand(3, generator=generator)
    return (0.15 * texture[:1] + 0.03 * texture[1:] + colour[:, None, None]).clamp(0, 1).permute(1, 2, 0)


def _velocity(generator: torch.Generator) -> tuple[int, int]:
    """Rows and columns per frame, each from -3 to 3, not both 0."""
    while True:
        rows, columns = torch.randint(-3, 4, (2,), generator=generator).tolist()
        if rows or columns:
            return rows, columns


def _ellipse(size: int, frames: int, velocity: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Bool [size, size], the object's place in the first frame, such that its centre stays in the picture."""
    radii = size * (0.08 + 0.12 * torch.rand(2, generator=generator))
    start = []
    for v in velocity:
        path = v * (frames - 1)
        low, high = max(0, -path), min(size, size - path)
        start.append((low + (high - low) * float(torch.rand((), generator=generator))) if low < high else size / 2)
    grid = torch.arange(size) + 0.5
    # The distance around the edge, since the mask is rolled like the texture: what leaves comes in on the other side.
    rows, columns = ((grid - s + size / 2) % size - size / 2 for s in start)
    return (rows[:, None] / radii[0]) ** 2 + (columns[None] / radii[1]) ** 2 <= 1


def average_precision(scores: Tensor, relevant: Tensor) -> float:
    """Area under the precision-recall curve, tied scores taken together; `scores` and bool `relevant` of one shape."""
    scores, relevant = scores.flatten().double(), relevant.flatten()
    if not relevant.any():
        raise ValueError("relevant: expected at least one relevant item, got none")
    order = scores.argsort(descending=True)
    hits = relevant[order].double().cumsum(0)
    ranked = scores[order]
    last = torch.cat((ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)))  # of each group of ties
    hits, taken = hits[last], (torch.arange(len(ranked)) + 1.0)[last]
    gained = torch.diff(hits, prepend=torch.zeros(1, dtype=hits.dtype))
    return float((gained * hits / taken).sum() / relevant.sum())
