"""Clips from videos made here: every frame carries its own number in its pixels, so a clip says what it was made of.

The number n of a frame (0 to 255) is drawn as 4 x 4 blocks, dark or bright: eight bits and their complements. A frame
that is black, grey, damaged or a mixture of two has bits that do not match their complements, and cannot be read.
"""

import functools
import itertools
import os
import random
import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vmae.video import ClipDataset, VideoError, batches, load_clip, read_entries

DARK, BRIGHT = 60, 190
SIZE = 64  # of the coded square, in the file
CLIP = 32  # of the coded square, in the clip


# --- making and reading videos ------------------------------------------------------------------------------------


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


GOP = {"g": "12", "keyint_min": "12", "sc_threshold": "0", "bf": "2", "preset": "medium"}
KINDS: dict[str, dict] = {
    "h264.mp4": {"codec": "libx264", "options": GOP},
    "h264-open-gop.mp4": {"codec": "libx264", "options": GOP | {"x264-params": "open-gop=1:b-adapt=0:bframes=3"}},
    "h264.mkv": {"codec": "libx264", "options": GOP},
    "h264.mov": {"codec": "libx264", "options": GOP},
    "h264.avi": {"codec": "libx264", "options": GOP},
    "h264-fast.mp4": {"codec": "libx264", "options": GOP, "container": {"movflags": "faststart"}},
    "h264-fragments.mp4": {"codec": "libx264", "options": GOP, "container": {"movflags": "frag_keyframe+empty_moov"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "qscale": "4"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "qscale": "4"}},
    "mpeg4-b.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "qscale": "4"}},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "ffv1.mkv": {"codec": "ffv1", "pix_fmt": "bgr0", "options": {"level": "3", "slicecrc": "1"}},
    "ffv1.avi": {"codec": "ffv1", "pix_fmt": "bgr0", "options": {"level": "3", "slicecrc": "1"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25, "options": {"g": "12", "bf": "2", "b": "4M"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "cpu-used": "8", "deadline": "realtime"}},
}
LENGTH = 60


def write_numbers(path: Path, numbers, *, height: int = SIZE, width: int = SIZE, **how) -> Path:
    noise = np.random.default_rng(0)
    return write_images(path, [draw(number, noise, height, width) for number in numbers], **how)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A function from one of KINDS to a file of LENGTH numbered frames."""
    folder = tmp_path_factory.mktemp("videos")

    def video(kind: str) -> Path:
        path = folder / kind
        return path if path.exists() else write_numbers(path, range(LENGTH), **KINDS[kind])

    return video


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


# --- what a clip is -----------------------------------------------------------------------------------------------


def test_clip_is_a_channels_last_view(videos):
    clip = load_clip(videos("h264.mp4"), frames=6, size=40)
    assert clip.shape == (1, 3, 6, 40, 40)
    assert clip.dtype == torch.uint8
    assert clip.device.type == "cpu"
    assert clip.is_contiguous(memory_format=torch.channels_last_3d)
    assert clip.permute(0, 2, 3, 4, 1).is_contiguous()


def test_path_may_be_a_string(videos):
    path = videos("h264.mp4")
    assert torch.equal(load_clip(str(path), frames=3, size=CLIP), load_clip(path, frames=3, size=CLIP))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 100), (100, 64), (63, 65), (65, 63), (33, 64), (7, 5)])
def test_lossless_pixels_are_the_central_square(tmp_path, height, width):
    """With the short side as long as `size` nothing is resized, and the clip is a cut out of the frame."""
    images = list(np.random.default_rng(1).integers(0, 256, (3, height, width, 3), dtype=np.uint8))
    path = write_images(tmp_path / "noise.mkv", images, codec="ffv1", pix_fmt="bgr0")
    size = min(height, width)
    clip = load_clip(path, frames=3, size=size)[0].permute(1, 2, 3, 0).numpy()
    cuts = [
        np.stack(images)[:, top : top + size, left : left + size]
        for top in {(height - size) // 2, (height - size + 1) // 2}
        for left in {(width - size) // 2, (width - size + 1) // 2}
    ]
    assert any(np.array_equal(clip, cut) for cut in cuts)


def ramp(height: int, width: int) -> np.ndarray:
    """Red grows with x, green with y, blue is constant."""
    image = np.empty((height, width, 3))
    image[..., 0] = np.linspace(10, 240, width)
    image[..., 1] = np.linspace(240, 10, height)[:, None]
    image[..., 2] = 77
    return image.round().astype(np.uint8)


@pytest.mark.parametrize("size", [16, 31, 48, 112])
@pytest.mark.parametrize(("height", "width"), [(60, 60), (60, 110), (110, 60), (61, 83), (97, 49)])
def test_short_side_is_resized_and_the_long_one_cropped_at_the_centre(tmp_path, height, width, size):
    path = write_images(tmp_path / "ramp.mkv", [ramp(height, width)] * 2, codec="ffv1", pix_fmt="bgr0")
    clip = load_clip(path, frames=2, size=size)[0, :, 1].float()
    side = min(height, width)
    place = (torch.arange(size) + 0.5) * side / size - 0.5  # in pixels of the source, before the crop's offset
    step = max(1.0, side / size)  # one pixel of the source or of the clip, whichever is more
    inner = slice(max(2, size // side * 2), -max(2, size // side * 2))  # a resize filter bends the edges
    for channel, axis, first, last in ((0, width, 10, 240), (1, height, 240, 10)):
        slope = (last - first) / (axis - 1)
        expected = first + slope * (place + (axis - side) / 2)
        profile = clip[channel].mean(0 if channel == 0 else 1)
        off = (profile - expected)[inner].abs().max().item()
        assert off <= abs(slope) * step + 1.5
    assert (clip[2] - 77).abs().max() <= 2


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 128), (128, 64), (64, 90)])
@pytest.mark.parametrize("size", [32, 50, 64, 80])
def test_landscape_and_portrait_show_the_central_square(tmp_path, height, width, size):
    path = write_numbers(tmp_path / "a.mp4", range(5), height=height, width=width)
    clip = load_clip(path, frames=5, size=size)
    assert clip.shape == (1, 3, 5, size, size)
    assert numbers_of(clip) == [0, 1, 2, 3, 4]


def test_channels_are_red_green_blue(tmp_path):
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    images = [np.full((32, 32, 3), colour, np.uint8) for colour in colours]
    for name, how in {
        "a.mp4": {"options": {"qp": "10"}},
        "a.mkv": {"codec": "ffv1", "pix_fmt": "bgr0"},
    }.items():
        clip = load_clip(write_images(tmp_path / name, images, **how), frames=3, size=32)
        means = clip[0].float().mean((2, 3)).T
        assert (means - torch.tensor(colours)).abs().max() < 12


# --- which frames, by count ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_in_order(videos, kind):
    assert chosen(videos(kind), LENGTH) == list(range(LENGTH))


@pytest.mark.parametrize("kind", KINDS)
def test_seeking_finds_the_frame(videos, kind):
    path = videos(kind)
    for start in range(0, LENGTH - 3, 5):
        assert chosen(path, 4, start=start) == list(range(start, start + 4))
    assert chosen(path, 1, start=LENGTH - 1) == [LENGTH - 1]


@pytest.mark.parametrize("kind", ["h264.mp4", "h264-open-gop.mp4", "h264.avi", "mpeg4-b.avi"])
def test_seeking_to_every_frame(videos, kind):
    path = videos(kind)
    assert [chosen(path, 1, start=start)[0] for start in range(LENGTH)] == list(range(LENGTH))


@pytest.mark.parametrize("stride", [2, 3, 13, 29])
@pytest.mark.parametrize("kind", ["h264.mp4", "h264.avi", "mpeg4.mp4"])
def test_stride_counts_frames(videos, kind, stride):
    frames = min(5, (LENGTH - 1) // stride + 1)
    for start in {0, LENGTH - 1 - (frames - 1) * stride}:
        expected = [start + i * stride for i in range(frames)]
        assert chosen(videos(kind), frames, stride=stride, start=start) == expected


@pytest.mark.parametrize(("frames", "stride"), [(1, 1), (2, 1), (7, 1), (8, 4), (5, 13), (LENGTH, 1), (LENGTH - 1, 1)])
def test_centre(videos, frames, stride):
    found = chosen(videos("h264.mp4"), frames, stride=stride, start="center")
    assert found == [found[0] + i * stride for i in range(frames)]
    before, after = found[0], LENGTH - 1 - found[-1]
    assert abs(before - after) <= 1


def test_centre_is_the_default(videos):
    path = videos("h264.mp4")
    assert chosen(path, 5) == chosen(path, 5, start="center") == chosen(path, 5, start="center", seed=3)


def test_random_start(tmp_path):
    path = write_numbers(tmp_path / "a.mkv", range(12))
    starts = set()
    for seed in range(80):
        found = chosen(path, 4, stride=2, start="random", seed=seed)
        assert found == [found[0] + 2 * i for i in range(4)]
        starts.add(found[0])
    assert starts == set(range(6))  # 0, ..., 5 leave room for a span of 7 frames


def test_random_start_is_seeded(videos):
    path = videos("h264.mp4")

    def starts(seeds):
        return [chosen(path, 2, start="random", seed=seed)[0] for seed in seeds]

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global generator is what must not matter
    torch.manual_seed(1)
    first = starts(range(6))
    state = random.getstate()
    assert starts(range(6)) == first
    assert random.getstate() == state
    assert len(set(starts([None] * 12))) > 1


# --- short videos -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["h264.mp4", "mpeg4-b.avi", "ffv1.mkv"])
def test_short_video_loops(tmp_path, kind):
    path = write_numbers(tmp_path / f"a{Path(kind).suffix}", range(5), **KINDS[kind])
    assert chosen(path, 12) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert chosen(path, 12, start="random", seed=1) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert chosen(path, 4, start=3, short="loop") == [3, 4, 0, 1]
    assert chosen(path, 6, stride=2, start=0) in ([0, 2, 4, 1, 3, 0], [0, 2, 4, 0, 2, 4])


def test_a_single_frame_loops(tmp_path):
    path = write_numbers(tmp_path / "a.mp4", [9])
    assert chosen(path, 3) == [9, 9, 9]
    assert chosen(path, 3, stride=4) == [9, 9, 9]
    assert chosen(path, 3, fps=10) == [9, 9, 9]
    assert chosen(path, 1, short="refuse") == [9]


def test_short_video_is_refused(tmp_path):
    path = write_numbers(tmp_path / "a.mp4", range(5))
    assert chosen(path, 5, short="refuse") == [0, 1, 2, 3, 4]
    assert chosen(path, 3, stride=2, short="refuse") == [0, 2, 4]
    assert chosen(path, 2, start=3, short="refuse") == [3, 4]
    for how in (
        {"frames": 6},
        {"frames": 6, "start": "random"},
        {"frames": 3, "stride": 3},
        {"frames": 3, "start": 3},
    ):
        message = refusal(path, short="refuse", **how)
        assert "5" in message.replace(str(path), "")


def test_short_video_by_timestamps(tmp_path):
    path = write_numbers(tmp_path / "a.mp4", range(10), rate=10)
    assert chosen(path, 12, fps=10) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert chosen(path, 7, fps=5) == [0, 2, 4, 6, 8, 0, 2]
    assert chosen(path, 10, fps=10, short="refuse") == list(range(10))
    assert chosen(path, 5, fps=5, short="refuse") == [0, 2, 4, 6, 8]
    assert chosen(path, 19, fps=20, short="refuse") == [i // 2 for i in range(19)]
    for how in ({"frames": 11, "fps": 10}, {"frames": 6, "fps": 5}, {"frames": 22, "fps": 20}):
        refusal(path, short="refuse", **how)
    refusal(path, short="refuse", frames=4, fps=10, start=7)


@pytest.mark.parametrize("short", ["loop", "refuse"])
@pytest.mark.parametrize("fps", [None, 10])
def test_start_after_the_end(tmp_path, short, fps):
    path = write_numbers(tmp_path / "a.mp4", range(5))
    for start in (5, 6, 1000):
        message = refusal(path, frames=1, start=start, short=short, fps=fps)
        assert str(start) in message.replace(str(path), "")
    assert chosen(path, 1, start=4, short=short, fps=fps) == [4]


# --- which frames, by time ----------------------------------------------------------------------------------------


def shown(times: list[Fraction], fps: Fraction, frames: int, start: int) -> list[int]:
    """The last frame whose time is not after each instant, by exact fractions."""
    instants = [times[start] + i / fps for i in range(frames)]
    return [max(at for at, time in enumerate(times) if time <= instant) for instant in instants]


RATED = [
    ("h264.mp4", 10),
    ("h264-open-gop.mp4", 10),
    ("h264.mkv", 10),
    ("h264.mov", 10),
    ("h264.avi", 10),
    ("h264-fragments.mp4", 10),
    ("mpeg4.mp4", 10),
    ("mpeg4.avi", 10),
    ("mpeg4-b.avi", 10),
    ("mjpeg.avi", 10),
    ("ffv1.mkv", 10),
    ("mpeg2.mpg", 25),
    ("vp9.webm", 10),
]


@pytest.mark.parametrize(("kind", "rate"), RATED)
@pytest.mark.parametrize("share", [Fraction(1, 5), Fraction(1, 2), Fraction(1), Fraction(2), Fraction(5, 2)])
def test_rate_up_and_down(videos, kind, rate, share):
    fps = rate * share
    times = [Fraction(i, rate) for i in range(LENGTH)]
    for start in (0, 7, 23):
        frames = min(12, int((LENGTH - 1 - start) * share))
        expected = shown(times, fps, frames, start)
        assert chosen(videos(kind), frames, fps=float(fps), start=start) == expected


def test_the_files_own_rate_takes_every_frame(videos):
    """From every start: 0.7 s + 0.1 s is a little less than 0.8 s in floating point."""
    for start in range(0, LENGTH - 12, 3):
        found = chosen(videos("h264.mp4"), 12, fps=10, start=start)
        assert found == list(range(start, start + 12))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.mov"])
@pytest.mark.parametrize(
    "rate", [Fraction(30), Fraction(24), Fraction(60), Fraction(30000, 1001), Fraction(24000, 1001)]
)
def test_rates_that_are_no_round_number_of_milliseconds(tmp_path, name, rate):
    """Matroska rounds 1 / 30 s to 33 ms; the file's own rate still shows each frame once."""
    path = write_numbers(tmp_path / name, range(50), rate=rate)
    for start in (0, 1, 2, 11):
        assert chosen(path, 39, fps=float(rate), start=start) == list(range(start, start + 39))
        assert chosen(path, 19, fps=float(rate / 2), start=start) == list(range(start, start + 38, 2))


# Gaps of 20 to 900 ms, among them a long one and several short ones; no instant below is within 1 ms of a frame.
GAPS = [40, 40, 440, 21, 21, 900, 40, 40, 40, 40, 341, 340, 20, 20, 660, 40, 40, 320, 400]
VARIABLE = [0, *itertools.accumulate(GAPS)]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "ffv1"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("offset", [0, 1234])
def test_variable_frame_rate(tmp_path, codec, name, offset):
    if codec == "ffv1" and name == "a.mp4":
        pytest.skip("mp4 holds no ffv1")
    pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
    options = {"g": "6", "bf": "2"} if codec == "libx264" else {"g": "6"}
    path = write_numbers(
        tmp_path / name,
        range(len(VARIABLE)),
        codec=codec,
        pix_fmt=pix_fmt,
        options=options,
        milliseconds=[offset + time for time in VARIABLE],
    )
    times = [Fraction(time, 1000) for time in VARIABLE]
    assert chosen(path, len(VARIABLE)) == list(range(len(VARIABLE)))
    assert chosen(path, 5, stride=4, start=2) == [2, 6, 10, 14, 18]
    for fps in (Fraction(3), Fraction(7), Fraction(19), Fraction(13, 10)):
        for start in (0, 3, 5, 12):
            frames = int((times[-1] - times[start]) * fps)
            instants = [times[start] + i / fps for i in range(1, frames)]
            assert all(abs(instant - time) > Fraction(1, 1000) for instant in instants for time in times)
            found = chosen(path, frames, fps=float(fps), start=start)
            assert found == shown(times, fps, frames, start)


def test_variable_frame_rate_centre_and_random(tmp_path):
    path = write_numbers(tmp_path / "a.mkv", range(len(VARIABLE)), milliseconds=VARIABLE)
    times = [Fraction(time, 1000) for time in VARIABLE]
    found = chosen(path, 8, fps=4, start="center")  # 1.75 of 3.8 s
    assert found == sorted(found)
    assert abs((times[found[0]] + times[found[-1]]) / 2 - times[-1] / 2) < Fraction(9, 10)
    firsts = set()
    for seed in range(30):
        found = chosen(path, 8, fps=4, start="random", seed=seed)
        assert found == sorted(found)
        assert found == chosen(path, 8, fps=4, start="random", seed=seed)
        firsts.add(found[0])
    assert len(firsts) > 3


@pytest.mark.parametrize(("fps", "frames"), [(10, 8), (5, 8), (2, 12), (20, 30), (3, 7)])
def test_centre_by_time(videos, fps, frames):
    found = chosen(videos("h264.mp4"), frames, fps=fps, start="center")
    assert all(b - a in {10 // fps, -(-10 // fps)} for a, b in itertools.pairwise(found))
    before, after = found[0], LENGTH - 1 - found[-1]
    assert abs(before - after) <= max(1, -(-10 // fps))


@pytest.mark.parametrize("fps", [10, 5, 20])
def test_random_by_time_stays_within_the_file(videos, fps):
    starts = set()
    for seed in range(25):
        found = chosen(videos("mpeg4.avi"), 10, fps=fps, start="random", seed=seed, short="refuse")
        assert all(b - a in {10 // fps, -(-10 // fps)} for a, b in itertools.pairwise(found))
        starts.add(found[0])
    assert len(starts) > 8


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frames", 0),
        ("frames", -3),
        ("size", 0),
        ("size", -8),
        ("stride", 0),
        ("stride", -2),
        ("fps", 0),
        ("fps", -5.0),
        ("fps", float("nan")),
        ("fps", float("inf")),
        ("start", -1),
        ("start", "middle"),
        ("short", "pad"),
    ],
)
def test_arguments_out_of_range(videos, tmp_path, name, value):
    arguments = {"frames": 4, "size": CLIP} | {name: value}
    for call in (
        lambda: load_clip(videos("h264.mp4"), **arguments),
        lambda: ClipDataset(videos("h264.mp4"), **arguments),
    ):
        with pytest.raises(ValueError, match=name) as caught:
            call()
        assert not isinstance(caught.value, VideoError)
        assert str(value) in str(caught.value)
        assert "expected" in str(caught.value)


def test_stride_does_not_go_with_fps(videos):
    with pytest.raises(ValueError, match="stride"):
        load_clip(videos("h264.mp4"), frames=4, size=CLIP, fps=5, stride=2)


# --- files that cannot be used ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["take:2.mp4", "pipe:0.mp4", "50%d.mp4", "a b&c#d?.mp4", "動画 é.mp4", "-i.mp4"])
def test_odd_names(tmp_path, monkeypatch, name):
    """FFmpeg reads "take:2.mp4" as a protocol unless told otherwise."""
    write_numbers(tmp_path / "a.mp4", range(4)).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert chosen(Path(name), 4) == [0, 1, 2, 3]
    assert read_entries(".") == [(Path(name), -1)]


def test_missing_file(tmp_path):
    refusal(tmp_path / "no such.mp4")
    refusal(tmp_path / "no such folder" / "a.mp4")


def test_folder_in_place_of_a_file(tmp_path):
    folder = tmp_path / "folder.mp4"
    folder.mkdir()
    refusal(folder)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".webm", ".mpg"])
@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\0" * 5000, b"This is no video.\n" * 100, bytes(range(256)) * 40, b"<html></html>"]
)
def test_file_that_is_no_video(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    refusal(path)


def test_audio_alone(tmp_path):
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    refusal(path)
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as output:
        add_sound(output, output.add_stream("aac", rate=8000))
    refusal(path)


def add_sound(output, stream) -> None:
    for at in range(40):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, at * 1024
        output.mux(stream.encode(frame))
    output.mux(stream.encode())


def test_sound_beside_the_video_does_not_matter(tmp_path):
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0)
    with av.open(str(path), "w") as output:
        sound = output.add_stream("aac", rate=8000, layout="mono")
        stream = output.add_stream("libx264", rate=10, options=GOP)
        stream.height = stream.width = SIZE
        stream.pix_fmt = "yuv420p"
        add_sound(output, sound)
        for number in range(30):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(draw(number, noise), format="rgb24")))
        output.mux(stream.encode())
    assert chosen(path, 30) == list(range(30))
    assert chosen(path, 4, start=20) == [20, 21, 22, 23]
    assert chosen(path, 6, start=10, fps=5) == [10, 12, 14, 16, 18, 20]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_without_permission(tmp_path):
    path = write_numbers(tmp_path / "a.mp4", range(5))
    path.chmod(0)
    refusal(path)


SAMPLINGS = [
    {"frames": LENGTH},
    {"frames": LENGTH + 20},
    {"frames": 4, "start": 0},
    {"frames": 4, "start": "center"},
    {"frames": 4, "start": LENGTH // 2},
    {"frames": 4, "start": LENGTH - 4},
    {"frames": 2, "start": LENGTH - 1},
    {"frames": 6, "stride": 10, "start": 0},
    {"frames": 4, "start": "random", "seed": 2},
]
ENDLESS = {"mpeg2.mpg"}  # a program stream does not say how long it is: cut, it is a shorter video
CUT_KINDS = [kind for kind in KINDS if kind != "h264.mov" and kind not in ENDLESS]


@functools.cache
def clip_of_the_whole(path: Path, **how) -> torch.Tensor:
    return load_clip(path, size=CLIP, **how)


def right_or_refused(path: Path, whole: Path, **how) -> bool:
    """A damaged file is refused, or the clip is the one of the undamaged file, pixel by pixel."""
    expected = clip_of_the_whole(whole, **how)
    try:
        clip = load_clip(path, size=CLIP, **how)
    except VideoError as error:
        check_refusal(error, path)
        return False
    assert numbers_of(clip) == numbers_of(expected), f"{how}: silently other frames"
    assert torch.equal(clip, expected), f"{how}: silently other pixels"
    return True


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
@pytest.mark.parametrize("kind", CUT_KINDS)
def test_truncated_file(videos, tmp_path, kind, share):
    whole = videos(kind)
    content = whole.read_bytes()
    path = tmp_path / kind
    path.write_bytes(content[: int(share * len(content))])
    assert not right_or_refused(path, whole, frames=LENGTH) or share == 0.98  # the frames may all be there
    for how in SAMPLINGS[1:]:
        right_or_refused(path, whole, **how)
    if kind in {"h264.mp4", "mpeg4.mp4"}:  # the index at the end is gone
        refusal(path)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
@pytest.mark.parametrize("kind", sorted(ENDLESS))
def test_truncated_stream_is_a_shorter_video(videos, tmp_path, kind, share):
    """It may loop earlier, but what it shows of a frame is what the whole file shows of that frame."""
    whole = videos(kind)
    content = whole.read_bytes()
    path = tmp_path / kind
    path.write_bytes(content[: int(share * len(content))])
    for start in (0, 10, LENGTH - 4):
        right_or_refused(path, whole, frames=4, start=start, short="refuse")
    right_or_refused(path, whole, frames=LENGTH, short="refuse")
    expected = load_clip(whole, frames=LENGTH, size=CLIP)[0]
    try:
        clip = load_clip(path, frames=LENGTH, size=CLIP)[0]
    except VideoError as error:
        check_refusal(error, path)
    else:
        found = numbers_of(clip)
        length = max(found) + 1
        assert found == [i % length for i in range(LENGTH)]
        assert torch.equal(clip, expected[:, found])


@pytest.mark.parametrize("kind", ["h264-fast.mp4", "h264.mkv", "h264.avi"])
def test_truncated_at_many_places(videos, tmp_path, kind):
    whole = videos(kind)
    content = whole.read_bytes()
    path = tmp_path / kind
    for cut in sorted(random.Random(5).sample(range(len(content)), 25)):
        path.write_bytes(content[:cut])
        right_or_refused(path, whole, frames=LENGTH)
        right_or_refused(path, whole, frames=4, start=LENGTH - 10)


@pytest.mark.parametrize("kind", ["h264-fast.mp4", "h264.mp4", "h264.mkv", "h264.avi", "ffv1.mkv", "mpeg4.avi"])
@pytest.mark.parametrize("fill", ["zeros", "noise"])
def test_bytes_corrupted_in_the_middle(videos, tmp_path, kind, fill):
    """A long stretch in which whole frames are lost: no clip across it can be right."""
    whole = videos(kind)
    content = bytearray(whole.read_bytes())
    start, length = len(content) * 2 // 5, len(content) // 5
    content[start : start + length] = bytes(length) if fill == "zeros" else random.Random(1).randbytes(length)
    path = tmp_path / kind
    path.write_bytes(content)
    refusal(path, frames=LENGTH)
    for how in SAMPLINGS[1:]:
        right_or_refused(path, whole, **how)


# These codecs have no checksum, and most bits mean something: nobody can tell for sure that a picture is wrong.
UNCHECKED = {"h264-fast.mp4", "h264.mkv", "h264.avi", "vp9.webm", "mpeg4.avi"}


@pytest.mark.parametrize("kind", sorted(UNCHECKED | {"ffv1.mkv", "mpeg2.mpg"}))
def test_small_corruptions(videos, tmp_path, kind):
    """Some bytes here and there: refused, or every frame is there, in order, none black or in another's place."""
    whole = videos(kind)
    content = whole.read_bytes()
    path = tmp_path / kind
    draws = random.Random(7)
    wrong = []
    for _ in range(25):
        broken = bytearray(content)
        length = draws.choice([1, 4, 64, 700])
        start = draws.randrange(len(content) // 10, len(content) - length)
        broken[start : start + length] = draws.choice([bytes(length), draws.randbytes(length)])
        path.write_bytes(broken)
        for how, expected in (
            ({"frames": LENGTH}, list(range(LENGTH))),
            ({"frames": 4, "start": 41}, [41, 42, 43, 44]),
        ):
            try:
                clip = load_clip(path, size=CLIP, **how)
            except VideoError as error:
                check_refusal(error, path)
                continue
            found = numbers_of(clip, damage=True)
            if kind in UNCHECKED:
                ok = all(number in {None, right} for number, right in zip(found, expected, strict=True))
            else:
                ok = found == expected
            if not ok:
                wrong.append(f"{length} bytes from {start}, {how}: {found}")
    assert not wrong, "\n".join(wrong[:3])


# --- lists of videos ----------------------------------------------------------------------------------------------


def names(entries) -> list[tuple[str, int]]:
    return [(path.name, label) for path, label in entries]


def test_folder_at_any_depth(tmp_path):
    for name in ("b.mp4", "a.avi", "deep/er/c.mkv", "deep/D.MP4", "with space/e f.webm"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("notes.txt", "deep/labels.csv", "mp4", "g.mp4.part"):
        (tmp_path / name).write_bytes(b"x")
    entries = read_entries(tmp_path)
    assert {path for path, _ in entries} == {
        tmp_path / name for name in ("b.mp4", "a.avi", "deep/er/c.mkv", "deep/D.MP4", "with space/e f.webm")
    }
    assert len(entries) == 5
    assert all(label == -1 for _, label in entries)
    assert entries == sorted(entries)
    assert read_entries(str(tmp_path)) == entries


def test_a_folder_named_like_a_video_is_none(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    (tmp_path / "a.mp4" / "b.mp4").write_bytes(b"x")
    assert read_entries(tmp_path) == [(tmp_path / "a.mp4" / "b.mp4", -1)]


def test_a_single_video(tmp_path):
    path = write_numbers(tmp_path / "a.mp4", range(5))
    assert read_entries(path) == [(path, -1)]


@pytest.mark.parametrize("name", ["train.txt", "train.csv", "list"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_videomae_list(tmp_path, name, newline):
    lines = [
        "clips/a.mp4 3",
        "clips/my holiday 2.mp4 0",
        f"{tmp_path / 'elsewhere' / 'b.mkv'} 12",
        "",
        "c.avi -1",
        "../d.mp4 7",
    ]
    (tmp_path / "lists").mkdir()
    source = tmp_path / "lists" / name
    source.write_bytes(newline.join(lines).encode())
    expected = [
        (tmp_path / "lists/clips/a.mp4", 3),
        (tmp_path / "lists/clips/my holiday 2.mp4", 0),
        (tmp_path / "elsewhere/b.mkv", 12),
        (tmp_path / "lists/c.avi", -1),
        (tmp_path / "lists/../d.mp4", 7),
    ]
    entries = read_entries(source)
    assert [(path.resolve(), label) for path, label in entries] == [(path.resolve(), label) for path, label in expected]


def test_list_without_labels(tmp_path):
    source = tmp_path / "list.txt"
    source.write_text("a.mp4\nmy holiday.mp4\n")
    assert read_entries(source) == [(tmp_path / "a.mp4", -1), (tmp_path / "my holiday.mp4", -1)]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["path,label", "a.mp4,3", "my clip 4.mp4,0"], [("a.mp4", 3), ("my clip 4.mp4", 0)]),
        (["label,path", "3,a.mp4", "0,b.mp4"], [("a.mp4", 3), ("b.mp4", 0)]),
        (["path", "a.mp4", "b c.mp4"], [("a.mp4", -1), ("b c.mp4", -1)]),
        (["path,label", '"a, b.mp4",3'], [("a, b.mp4", 3)]),
        (["id,path,split,label", "1,a.mp4,train,3"], [("a.mp4", 3)]),
    ],
)
def test_csv_with_a_header(tmp_path, lines, expected, newline):
    source = tmp_path / "train.csv"
    source.write_bytes(newline.join([*lines, ""]).encode())
    entries = read_entries(source)
    assert names(entries) == expected
    assert all(path.parent == tmp_path for path, _ in entries)


def test_names_in_other_scripts(tmp_path):
    source = tmp_path / "train.csv"
    source.write_bytes("vidéo/動画.mp4 2\n".encode())
    assert read_entries(source) == [(tmp_path / "vidéo/動画.mp4", 2)]


@pytest.mark.parametrize(
    "what", ["missing", "missing.csv", "folder", "empty.txt", "blank.csv", "header.csv", "binary.txt"]
)
def test_source_without_videos(tmp_path, what):
    source = tmp_path / what
    if what == "folder":
        source.mkdir()
        (source / "notes.txt").write_text("x")
    elif not what.startswith("missing"):
        content = {
            "empty.txt": b"",
            "blank.csv": b"\n \n",
            "header.csv": b"path,label\n",
            "binary.txt": b"\xff\xfe\0\x80",
        }
        source.write_bytes(content[what])
    with pytest.raises(VideoError) as caught:
        ClipDataset(source, frames=2, size=CLIP)
    check_refusal(caught.value, source)


@pytest.mark.parametrize("lines", [["path,label", "a.mp4,cat"], ["path,label", "a.mp4,"], ["path,label", ",3"]])
def test_csv_line_that_cannot_be_read(tmp_path, lines):
    source = tmp_path / "train.csv"
    source.write_text("\n".join(lines))
    try:
        entries = read_entries(source)
    except VideoError as error:
        check_refusal(error, source)
    else:
        assert entries == [(tmp_path / "a.mp4", -1)]
        assert lines[1].endswith(",")


# --- the dataset --------------------------------------------------------------------------------------------------

ENTRIES = 6
STEPS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos 0, ..., 5; video v has the frames 16 v, ..., 16 v + 15; and a list of them."""
    folder = tmp_path_factory.mktemp("data set")
    for video in range(ENTRIES):
        write_numbers(folder / f"video {video}.mkv", range(STEPS * video, STEPS * (video + 1)), options=GOP)
    lines = [f"video {video}.mkv {video}" for video in range(ENTRIES)]
    (folder / "train.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def spoilt(folder, tmp_path):
    """The list, with a missing, an empty, a cut and an unreadable file among the six."""
    cut = (folder / "video 0.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.avi").write_text("no video")
    lines = (folder / "train.csv").read_text().splitlines()
    lines = [f"{folder / line}" for line in lines]
    for at, name in ((0, "missing.mp4"), (3, "empty.mp4"), (5, "cut.mkv"), (9, "text.avi")):
        lines.insert(at, f"{name} 99")
    (tmp_path / "spoilt.csv").write_text("\n".join(lines))
    return tmp_path / "spoilt.csv"


BROKEN = ("missing.mp4", "empty.mp4", "cut.mkv", "text.avi")


def check_clip(clip: torch.Tensor, label: int, frames: int) -> int:
    """Consecutive frames of the video that the label names; returns the place of the first."""
    found = [number - STEPS * label for number in numbers_of(clip)]
    assert found == list(range(found[0], found[0] + frames))
    assert 0 <= found[0] <= STEPS - frames
    return found[0]


def test_item(folder):
    dataset = ClipDataset(folder / "train.csv", frames=4, size=CLIP)
    assert len(dataset) == ENTRIES
    for index in range(ENTRIES):
        clip, label = dataset[index]
        assert clip.shape == (3, 4, CLIP, CLIP)
        assert clip.dtype == torch.uint8
        assert label == index
        check_clip(clip, label, 4)


def test_item_of_a_folder_has_no_label(folder):
    dataset = ClipDataset(folder, frames=4, size=CLIP, start=3)
    clip, label = dataset[2]
    assert label == -1
    assert numbers_of(clip) == [35, 36, 37, 38]


def test_sampling_is_that_of_load_clip(folder):
    how = {"frames": 5, "size": 40, "fps": 5.0, "start": 2}
    clip, _ = ClipDataset(folder / "train.csv", **how)[1]
    assert torch.equal(clip, load_clip(folder / "video 1.mkv", **how)[0])
    with pytest.raises(VideoError, match=r"video 0\.mkv"):
        ClipDataset(folder / "train.csv", frames=17, size=CLIP, short="refuse")[0]


def test_items_are_seeded(folder):
    def starts(seed):
        dataset = ClipDataset(folder / "train.csv", frames=2, size=CLIP, seed=seed)
        return [check_clip(*dataset[index], 2) for index in range(ENTRIES)]

    torch.manual_seed(1)
    random.seed(1)
    first = starts(0)
    assert starts(0) == first
    others = [starts(seed) for seed in range(1, 4)]
    assert all(other != first for other in others)
    assert len(set(first)) > 1  # the videos do not all start at the same frame


def test_epochs_start_elsewhere(folder):
    dataset = ClipDataset(folder / "train.csv", frames=2, size=CLIP)
    starts = [[check_clip(*dataset.load(index, epoch), 2) for index in range(ENTRIES)] for epoch in range(4)]
    assert len(set(map(tuple, starts))) == 4
    assert starts[2] == [check_clip(*dataset.load(index, 2), 2) for index in range(ENTRIES)]


def test_the_same_in_another_process(folder):
    dataset = ClipDataset(folder / "train.csv", frames=2, size=CLIP, seed=5)
    here = [int(dataset[index][0].long().sum()) for index in range(ENTRIES)]
    code = (
        "import sys; from vmae.video import ClipDataset; "
        f"d = ClipDataset(sys.argv[1], frames=2, size={CLIP}, seed=5); "
        f"print([int(d[i][0].long().sum()) for i in range({ENTRIES})])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", code, str(folder / "train.csv")]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    assert there.strip() == str(here)


def test_unusable_item_raises(spoilt):
    dataset = ClipDataset(spoilt, frames=4, size=CLIP)
    with pytest.raises(VideoError) as caught:
        dataset[0]
    check_refusal(caught.value, spoilt.parent / "missing.mp4")


# --- batches ------------------------------------------------------------------------------------------------------


def take(count: int, *args, **kwargs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(itertools.islice(batches(*args, **kwargs), count))


def test_batch_is_channels_last(folder):
    [(clips, labels)] = take(1, ClipDataset(folder / "train.csv", frames=4, size=CLIP), 3)
    assert clips.shape == (3, 3, 4, CLIP, CLIP)
    assert clips.dtype == torch.uint8
    assert clips.is_contiguous(memory_format=torch.channels_last_3d)
    assert labels.shape == (3,)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 15])
def test_every_epoch_has_every_video_once(folder, size):
    dataset = ClipDataset(folder / "train.csv", frames=2, size=CLIP)
    labels, starts = [], []
    for clips, batch in take(-(-3 * ENTRIES // size), dataset, size):
        labels += batch.tolist()
        starts += [check_clip(clip, label, 2) for clip, label in zip(clips, batch.tolist(), strict=True)]
    epochs = [labels[at : at + ENTRIES] for at in range(0, 3 * ENTRIES, ENTRIES)]
    assert all(sorted(epoch) == list(range(ENTRIES)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1  # each epoch in an order of its own
    by_video = [{start for start, label in zip(starts, labels, strict=True) if label == video} for video in range(6)]
    assert any(len(found) > 1 for found in by_video)  # other starts in other epochs


def same(first, second) -> bool:
    return all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, second, strict=True))


def test_batches_are_seeded(folder):
    dataset = ClipDataset(folder / "train.csv", frames=2, size=CLIP)
    torch.manual_seed(1)
    first = take(6, dataset, 3, seed=4)
    torch.manual_seed(2)
    assert same(first, take(6, dataset, 3, seed=4))
    others = [take(6, dataset, 3, seed=seed) for seed in (5, 6)]
    assert not any(same(first, other) for other in others)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_batches(folder, spoilt, workers):
    for source, count in ((folder / "train.csv", 7), (spoilt, 5)):
        dataset = ClipDataset(source, frames=2, size=CLIP)
        lone: list[str] = []
        several: list[str] = []
        expected = take(count, dataset, 4, seed=4, skipped=lone)
        assert same(expected, take(count, dataset, 4, seed=4, workers=workers, skipped=several))
        assert several == lone


def test_unusable_videos_are_skipped_and_counted(spoilt):
    dataset = ClipDataset(spoilt, frames=4, size=CLIP)
    assert len(dataset) == ENTRIES + len(BROKEN)
    skipped: list[str] = []
    labels = []
    for clips, batch in take(3 * ENTRIES // 3, dataset, 3, skipped=skipped):
        labels += batch.tolist()
        for clip, label in zip(clips, batch.tolist(), strict=True):
            check_clip(clip, label, 4)
    for at in range(0, 3 * ENTRIES, ENTRIES):
        assert sorted(labels[at : at + ENTRIES]) == list(range(ENTRIES))
    counts = [sum(str(spoilt.parent / name) in text for text in skipped) for name in BROKEN]
    assert sum(counts) == len(skipped)
    assert all(2 <= count <= 3 for count in counts)  # those after the last usable video may not have been tried
    assert all(len(text.splitlines()) == 1 for text in skipped)


def test_skipping_needs_no_list(spoilt):
    [(_, labels), _] = take(2, ClipDataset(spoilt, frames=4, size=CLIP), 3)
    assert set(labels.tolist()) <= set(range(ENTRIES))


@pytest.mark.parametrize("workers", [0, 2])
def test_one_usable_video_is_enough(folder, tmp_path, workers):
    lines = [f"{folder / 'video 2.mkv'} 2", *(f"missing {i}.mp4 99" for i in range(5))]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    dataset = ClipDataset(tmp_path / "list.txt", frames=2, size=CLIP)
    for seed in range(1 if workers else 6):
        for _, labels in take(8, dataset, 2, seed=seed, workers=workers):
            assert labels.tolist() == [2, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_usable_video(tmp_path, workers):
    (tmp_path / "list.txt").write_text("missing 0.mp4 1\nmissing 1.mp4 2\nmissing 2.mp4 3\n")
    dataset = ClipDataset(tmp_path / "list.txt", frames=2, size=CLIP)
    skipped: list[str] = []
    with pytest.raises(VideoError) as caught:
        take(1, dataset, 2, workers=workers, skipped=skipped)
    assert len(str(caught.value).splitlines()) == 1
    assert {text for text in skipped for i in range(3) if f"missing {i}.mp4" in text} == set(skipped)
    assert len(set(skipped)) == 3


@pytest.mark.parametrize("start", ["center", 5])
def test_fixed_starts_in_batches(folder, start):
    dataset = ClipDataset(folder / "train.csv", frames=4, size=CLIP, start=start)
    firsts = {
        check_clip(clip, int(label), 4) for batch in take(4, dataset, 3) for clip, label in zip(*batch, strict=True)
    }
    assert firsts == ({5} if start == 5 else {6})
