"""Videos made for the tests: every frame carries its own number in its pixels, so a clip says what it was made of.

The number n of a frame (0 to 255) is drawn as 4 x 4 blocks, dark or bright: eight bits and their complements. A frame
that is black, grey, damaged or a mixture of two has bits that do not match their complements, and cannot be read.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vmae import VideoError, load_clip

DARK, BRIGHT = 60, 190
SIZE = 64  # of the coded square, in the file
CLIP = 32  # of the coded square, in the clip


def draw(number: int, noise: np.random.Generator, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """RGB image [height, width, 3] with the number in its central square, and noise that compresses badly."""
    bits = [number >> at & 1 for at in range(8)]
    blocks = np.array(bits + [1 - bit for bit in bits]).reshape(4, 4)
    side = min(height, width)
    assert side % 4 == 0
    image = np.full((height, width), (DARK + BRIGHT) // 2)
    top, left = (height - side) // 2, (width - side) // 2
    image[top : top + side, left : left + side] = (
        np.where(blocks, BRIGHT, DARK).repeat(side // 4, 0).repeat(side // 4, 1)
    )
    image = image + noise.integers(-20, 21, image.shape)
    return image.astype(np.uint8)[..., None].repeat(3, 2)


def numbers_of(clip: torch.Tensor, *, damage: bool = False) -> list[int | None]:
    """The numbers of a clip's frames [3, T, H, W] or [1, 3, T, H, W]; None for a damaged one if `damage` is allowed."""
    frames = clip.reshape(clip.shape[-4:]).float().mean(0)
    size = frames.shape[-1]
    inner = [slice(round((i + 0.25) * size / 4), round((i + 0.75) * size / 4)) for i in range(4)]
    found = []
    for at, frame in enumerate(frames):
        means = [frame[rows, columns].mean().item() for rows in inner for columns in inner]
        readable = all(min(abs(mean - DARK), abs(mean - BRIGHT)) < 35 for mean in means)
        bits = [int(mean > (DARK + BRIGHT) / 2) for mean in means]
        readable &= all(bit != complement for bit, complement in zip(bits[:8], bits[8:], strict=True))
        assert max(means) > DARK + 10, f"frame {at} of the clip is black"
        if damage and not readable:
            found.append(None)
            continue
        assert readable, f"frame {at} of the clip is damaged: block means {[round(mean) for mean in means]}"
        found.append(sum(bit << place for place, bit in enumerate(bits[:8])))
    return found


def write_images(
    path: Path,
    images: list[np.ndarray],
    *,
    codec: str = "libx264",
    rate: Fraction | int = 10,
    pix_fmt: str = "yuv420p",
    milliseconds: list[int] | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """A video file of RGB images, at a constant rate or shown at the given times."""
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.options = options or {}
        if milliseconds is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for at, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[at], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


# The same bytes each time, so that the same damage has the same effect: x264's assembly code, several threads and
# random identifiers would each make a difference.
X264 = "no-asm=1:threads=1"
GOP = {"g": "12", "keyint_min": "12", "sc_threshold": "0", "bf": "2", "preset": "medium", "x264-params": X264}
EXACT = {"fflags": "bitexact"}
KINDS: dict[str, dict] = {
    "h264.mp4": {"codec": "libx264", "options": GOP},
    "h264-open-gop.mp4": {
        "codec": "libx264",
        "options": GOP | {"x264-params": X264 + ":open-gop=1:b-adapt=0:bframes=3"},
    },
    "h264.mkv": {"codec": "libx264", "options": GOP, "container": EXACT},
    "h264.mov": {"codec": "libx264", "options": GOP},
    "h264.avi": {"codec": "libx264", "options": GOP},
    "h264-fast.mp4": {"codec": "libx264", "options": GOP, "container": {"movflags": "faststart"}},
    "h264-fragments.mp4": {"codec": "libx264", "options": GOP, "container": {"movflags": "frag_keyframe+empty_moov"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "qscale": "4"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "qscale": "4"}},
    "mpeg4-b.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "qscale": "4"}},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "ffv1.mkv": {
        "codec": "ffv1",
        "pix_fmt": "bgr0",
        "options": {"level": "3", "slicecrc": "1"},
        "container": EXACT,
    },
    "ffv1.avi": {"codec": "ffv1", "pix_fmt": "bgr0", "options": {"level": "3", "slicecrc": "1"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25, "options": {"g": "12", "bf": "2", "b": "4M"}},
    "vp9.webm": {
        "codec": "libvpx-vp9",
        "options": {"g": "12", "cpu-used": "8", "deadline": "realtime", "threads": "1"},
        "container": EXACT,
    },
}
LENGTH = 60


def write_numbers(path: Path, numbers, *, height: int = SIZE, width: int = SIZE, **how) -> Path:
    noise = np.random.default_rng(0)
    return write_images(path, [draw(number, noise, height, width) for number in numbers], **how)


def chosen(path: Path, frames: int, **how) -> list[int]:
    clip = load_clip(path, frames=frames, size=CLIP, **how)
    assert clip.shape == (1, 3, frames, CLIP, CLIP)
    return numbers_of(clip)


def refusal(path: Path, **how) -> str:
    """The text of the VideoError, shown to be one line that names the file."""
    with pytest.raises(VideoError) as caught:
        load_clip(path, **({"frames": 4, "size": CLIP} | how))
    return check_refusal(caught.value, path)


def check_refusal(error: VideoError, path: Path) -> str:
    message = str(error)
    assert str(path) in message
    assert len(message.splitlines()) == 1, message
    assert len(message) > len(str(path)) + 5, f"does not say what is wrong: {message}"
    return message
