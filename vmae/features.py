"""Features of a video, by a pretrained encoder, in a file."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vmae import checkpoint
from vmae.mae import VideoMAE
from vmae.optimisation import autocast, device_of
from vmae.tokens import TUBELET, check_clip
from vmae.video import load_clip


def encode_video(
    video: Path,
    model: VideoMAE,
    out: Path,
    *,
    frames: int | None = None,
    size: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    **sampling: Any,
) -> torch.Size:
    """Write the features [N, D] float32 of a video's clip to a safetensors file; returns their shape.

    `frames` and `size` are the model's own unless given; `sampling` goes to `load_clip`. The file's metadata holds the
    token grid ("64 14 14": latent frames, rows, columns), the video's name and how it was sampled.
    """
    frames = model.config.frames if frames is None else frames
    size = model.config.size if size is None else size
    check_clip(frames, size)
    checkpoint.check_writable(out)
    clip = load_clip(video, frames=frames, size=size, **sampling)
    place = device_of(device)
    with torch.inference_mode(), autocast(place, precision):
        features = model.to(place).encode(clip.to(place))[0].float().cpu().contiguous()
    grid = tuple(side // step for side, step in zip((frames, size, size), TUBELET, strict=True))
    metadata = {
        "grid": " ".join(map(str, grid)),
        "video": Path(video).name,
        "frames": str(frames),
        "size": str(size),
        **{name: str(value) for name, value in sampling.items()},
    }
    with checkpoint.replacing(out) as temporary:
        save_file({"features": features}, temporary, metadata=metadata)
    return features.shape
