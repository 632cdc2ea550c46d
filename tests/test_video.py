"""Which frames a clip is made of, and what becomes of files that cannot be used."""

import functools
import itertools
import os
import random
import types
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numbered_videos import (
    CLIP,
    GOP,
    KINDS,
    LENGTH,
    SIZE,
    check_refusal,
    chosen,
    draw,
    numbers_of,
    refusal,
    write_images,
    write_numbers,
)

from vmae.dataset import ClipDataset, read_entries
from vmae.video import Augmentation, VideoError, draw_view, load_clip


@pytest.fixture(autouse=True)
def pyav(monkeypatch):
    """Decode with PyAV, which reports damage; torchcodec, where it is installed, conceals some."""
    monkeypatch.setattr("vmae.video._torchcodec", lambda: None)


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


def kept(path: Path, frames: int, **how) -> list[int]:
    return numbers_of(load_clip(path, frames=frames, size=CLIP, short="keep", **how))


@pytest.mark.parametrize("kind", ["h264.mp4", "mpeg4-b.avi", "ffv1.mkv"])
def test_short_video_is_kept(tmp_path, kind):
    path = write_numbers(tmp_path / f"a{Path(kind).suffix}", range(7), **KINDS[kind])
    assert kept(path, 8) == kept(path, 12) == kept(path, 4096) == [0, 1, 2, 3, 4, 5]
    assert kept(path, 7, start=1) == [1, 2, 3, 4, 5, 6]
    assert kept(path, 7) == [0, 1, 2, 3, 4, 5, 6]  # not short
    assert kept(path, 1, start=6) == [6]
    assert kept(path, 12, start=3) == [3, 4, 5, 6]
    assert kept(path, 12, start=4) == [4, 5]
    assert kept(path, 3, start=4) == [4, 5, 6]  # not short
    assert kept(path, 12, start=5) == [5, 6]
    assert kept(path, 12, stride=2) == [0, 2, 4, 6]
    assert kept(path, 12, stride=3, start=0) == [0, 3]
    assert kept(path, 12, stride=6) == [0, 6]
    for how in ({"start": 6}, {"stride": 7}, {"stride": 2, "start": 5}):
        message = refusal(path, frames=12, short="keep", **how)
        assert "too short" in message
        assert "7" in message.replace(str(path), "")


def test_a_single_frame_cannot_be_kept(tmp_path):
    path = write_numbers(tmp_path / "a.mp4", [9])
    assert "needs 2 frames, the file has 1" in refusal(path, frames=12, short="keep")
    assert kept(path, 1) == [9]


def test_short_video_is_kept_by_timestamps(tmp_path):
    path = write_numbers(tmp_path / "a.mp4", range(7), rate=10)
    assert kept(path, 12, fps=10) == [0, 1, 2, 3, 4, 5]
    assert kept(path, 12, fps=10, start=3) == [3, 4, 5, 6]
    assert kept(path, 20, fps=20) == [i // 2 for i in range(14)]
    assert kept(path, 12, fps=5, start=0) == [0, 2]
    assert kept(path, 12, fps=3, start=0) == [0, 3]
    assert "too short" in refusal(path, frames=12, fps=2, short="keep")


@pytest.mark.parametrize("how", [{}, {"stride": 2}, {"fps": 7.0}, {"fps": 25.0}, {"fps": 1.5}], ids=str)
@pytest.mark.parametrize("start", ["center", "random", 0, 5])
@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_what_is_kept_is_the_longest_even_clip_that_is_not_refused(videos, how, start, jitter):
    path, asked = videos("h264.mp4"), 2 * LENGTH
    for seed in range(4):
        draw = functools.partial(
            draw_view, path, size=CLIP, start=start, augmentation=Augmentation(jitter=jitter), seed=seed, **how
        )
        view = draw(frames=asked, short="keep")
        count = len(view.frames)
        if count < asked:
            assert count % 2 == 0
            assert draw(frames=count, short="refuse") == view
            with pytest.raises(VideoError, match="too short"):
                draw(frames=count + 2, short="refuse")
        else:
            assert draw(frames=asked, short="refuse") == view
        assert list(view.frames) == sorted(view.frames)  # nothing is looped


@pytest.mark.parametrize("short", ["loop", "refuse", "keep"])
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


# These codecs have no checksum, and most bits mean something: nobody can tell for sure that a picture is wrong. Now and
# then a damaged one even looks like its neighbour (6 of 5,200 in mkv); with these files and this seed none does.
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


# --- torchcodec -------------------------------------------------------------------------------------------------------


class FakeDecoder:
    """What torchcodec gives, of a file that PyAV reads."""

    shift = 0

    def __init__(self, path: str, *, dimension_order: str):
        assert dimension_order == "NHWC"
        with av.open(path) as container:
            frames = sorted(container.decode(video=0), key=lambda frame: frame.pts)
        self.frames = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in frames]

    def get_frames_at(self, indices):
        chosen = [self.frames[i + (self.shift if i else 0)] for i in indices]
        times, data = zip(*chosen, strict=True)
        return types.SimpleNamespace(pts_seconds=torch.tensor(times).double(), data=torch.from_numpy(np.stack(data)))


@pytest.mark.parametrize("kind", ["h264.mp4", "h264.mkv", "vp9.webm", "mjpeg.avi"])
def test_torchcodec_gives_the_same_clips(kind, videos, monkeypatch):
    how = {"frames": 6, "size": CLIP, "stride": 2, "start": 3}
    expected = load_clip(videos(kind), **how)
    monkeypatch.setattr("vmae.video._torchcodec", lambda: types.SimpleNamespace(VideoDecoder=FakeDecoder))
    assert torch.equal(load_clip(videos(kind), **how), expected)


def test_frames_that_torchcodec_finds_elsewhere_are_not_taken(videos, monkeypatch):
    expected = load_clip(videos("h264.mp4"), frames=6, size=CLIP, start=0)
    decoder = type("Shifted", (FakeDecoder,), {"shift": 1})
    monkeypatch.setattr("vmae.video._torchcodec", lambda: types.SimpleNamespace(VideoDecoder=decoder))
    assert torch.equal(load_clip(videos("h264.mp4"), frames=6, size=CLIP, start=0), expected)


def test_pictures_that_torchcodec_turns_are_not_taken(videos, monkeypatch):
    class Turned(FakeDecoder):
        def get_frames_at(self, indices):
            found = super().get_frames_at(indices)
            found.data = found.data[:, :, 2:].rot90(1, (1, 2))  # or their square would look the same
            return found

    expected = load_clip(videos("h264.mp4"), frames=6, size=CLIP)
    monkeypatch.setattr("vmae.video._torchcodec", lambda: types.SimpleNamespace(VideoDecoder=Turned))
    assert torch.equal(load_clip(videos("h264.mp4"), frames=6, size=CLIP), expected)


def test_real_torchcodec_gives_the_same_frames(videos, monkeypatch):
    monkeypatch.undo()
    decoders = pytest.importorskip("torchcodec.decoders")
    path = videos("h264.mp4")
    assert numbers_of(load_clip(path, frames=8, size=CLIP, start=5)[0]) == list(range(5, 13))
    assert decoders.VideoDecoder(str(path)).metadata.num_frames == LENGTH
