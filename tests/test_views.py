"""Views of videos: what is drawn for a clip, and that its pixels are what the view says."""

import dataclasses
import itertools
import math
import os
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numbered_videos import CLIP, KINDS, LENGTH, SIZE, check_refusal, numbers_of, write_images, write_numbers
from PIL import Image

from vmae.dataset import ClipDataset, batches
from vmae.video import PLAIN, Augmentation, VideoError, View, draw_view, load_clip, load_view

ALL = Augmentation(crop=0.3, flip=True, jitter=0.25)
LONG = 250
GAPS = [40, 40, 440, 21, 21, 900, 40, 40, 40, 40, 341, 340, 20, 20, 660, 40, 40, 320, 400]
VARIABLE = [0, *itertools.accumulate(GAPS)]  # milliseconds


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    """250 frames at 10 per second."""
    options = {"g": "25", "qscale": "6"}
    path = tmp_path_factory.mktemp("views") / "long.mp4"
    return write_numbers(path, range(LONG), codec="mpeg4", options=options)


@pytest.fixture(scope="module")
def variable(tmp_path_factory) -> Path:
    """20 frames with gaps of 20 to 900 ms."""
    path = tmp_path_factory.mktemp("views") / "variable.mkv"
    return write_numbers(path, range(len(VARIABLE)), milliseconds=VARIABLE)


def picture(height: int, width: int, phase: float = 0.0) -> np.ndarray:
    """Smooth, and no two parts alike: red grows with x, green with y, blue is a wave; four corners of their own."""
    y, x = np.mgrid[0:height, 0:width]
    wave = 128 + 90 * np.sin(2 * math.pi * (x / width - y / height) + phase)
    image = np.stack((20 + 215 * x / max(width - 1, 1), 20 + 215 * y / max(height - 1, 1), wave), -1)
    return image.round().astype(np.uint8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A function from a shape to a lossless file of two smooth pictures."""
    folder = tmp_path_factory.mktemp("pictures")

    def write(height: int, width: int) -> Path:
        path = folder / f"{height}x{width}.mkv"
        images = [picture(height, width, phase) for phase in (0.0, 1.0)]
        return path if path.exists() else write_images(path, images, codec="ffv1", pix_fmt="bgr0")

    return write


def drawn(path: Path, seeds: int, **how) -> list[View]:
    return [draw_view(path, **({"frames": 2, "size": CLIP} | how), seed=seed) for seed in range(seeds)]


def whole(frames, size: int = CLIP, **changes) -> View:
    """A view of frames of SIZE x SIZE pixels."""
    settings = {"crop": (0, 0, SIZE, SIZE), "size": size, "flip": False} | changes
    return View(tuple(frames), tuple(0.0 for _ in frames), **settings)


def central(height: int, width: int) -> tuple[int, int, int, int]:
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


# --- a view decides the clip --------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", [PLAIN, Augmentation(crop=0.4), Augmentation(flip=True), ALL])
@pytest.mark.parametrize("how", [{}, {"stride": 3}, {"fps": 4}, {"start": "random"}, {"start": 50, "frames": 20}])
def test_load_clip_decodes_the_view_that_is_drawn(videos, augmentation, how):
    path = videos("h264.mp4")
    for seed in (0, 1, 5):
        arguments = {"frames": 5, "size": 24, "augmentation": augmentation, "seed": seed} | how
        view = draw_view(path, **arguments)
        clip = load_clip(path, **arguments)
        assert clip.shape == (1, 3, arguments["frames"], 24, 24)
        assert clip.dtype == torch.uint8
        assert clip.is_contiguous(memory_format=torch.channels_last_3d)
        assert torch.equal(clip, load_view(path, view))
        assert torch.equal(clip, load_view(str(path), view))


@pytest.mark.parametrize("start", ["center", "random", 7])
def test_plain_augmentation_is_none(videos, start):
    path = videos("h264.mp4")
    for seed in range(4):
        how = {"frames": 4, "size": CLIP, "stride": 2, "start": start, "seed": seed}
        expected = draw_view(path, **how)
        assert expected.crop == (0, 0, SIZE, SIZE)
        assert expected.flip is False
        assert expected.size == CLIP
        assert draw_view(path, **how, augmentation=PLAIN) == expected
        assert draw_view(path, **how, augmentation=Augmentation(crop=1, flip=False, jitter=0)) == expected
        assert torch.equal(load_clip(path, **how, augmentation=PLAIN), load_clip(path, **how))


@pytest.mark.parametrize("kind", ["h264.mp4", "h264-open-gop.mp4", "mpeg4-b.avi", "ffv1.mkv", "vp9.webm", "mpeg2.mpg"])
def test_frames_and_times_are_those_decoded(videos, kind):
    path, rate = videos(kind), KINDS[kind].get("rate", 10)
    for view in drawn(path, 4, frames=6, stride=7, start="random", augmentation=Augmentation(flip=False, jitter=0.5)):
        assert numbers_of(load_view(path, view)) == list(view.frames)
        assert view.times == pytest.approx([number / rate for number in view.frames], abs=1.1e-3)


def test_times_are_the_files_where_the_rate_varies(variable):
    for how in ({"stride": 3}, {"fps": 3}, {"frames": 30}):
        for view in drawn(
            variable, 4, **({"frames": 6, "start": "random", "augmentation": Augmentation(jitter=1)} | how)
        ):
            assert numbers_of(load_view(variable, view)) == list(view.frames)
            assert view.times == pytest.approx([VARIABLE[number] / 1000 for number in view.frames], abs=1.1e-3)


@pytest.mark.parametrize("kind", ["h264.mp4", "mpeg4-b.avi"])
def test_frames_may_repeat_and_go_back(videos, kind):
    frames = (30, 59, 3, 3, 0, 30)
    assert numbers_of(load_view(videos(kind), whole(frames))) == list(frames)


# --- the box ------------------------------------------------------------------------------------------------------

SHAPES = [(64, 64), (54, 96), (96, 54), (63, 65), (37, 51), (40, 200), (200, 40)]


def sides(path: Path) -> tuple[int, int]:
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        return frame.height, frame.width


def largest_share(height: int, width: int) -> float:
    """Of the picture's area, that a box of 3:4 to 4:3 can take."""
    return min(1.0, 4 / 3 * height / width, 4 / 3 * width / height)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("least", [0.02, 0.3, 0.5, 0.9, 0.999])
def test_box_lies_inside_the_picture(pictures, shape, least):
    height, width = shape
    for view in drawn(pictures(*shape), 60, augmentation=Augmentation(crop=least)):
        top, left, h, w = view.crop
        assert all(isinstance(number, int) for number in view.crop)
        assert 0 <= top < top + h <= height
        assert 0 <= left < left + w <= width


@pytest.mark.parametrize("kind", ["h264.mp4", "mpeg4.avi", "vp9.webm"])
def test_box_counts_the_pixels_that_are_shown(tmp_path, kind):
    """Codecs code whole blocks: of 50 rows, 64."""
    path = write_images(tmp_path / f"a{Path(kind).suffix}", [picture(50, 70)] * 2, **KINDS[kind])
    assert sides(path) == (50, 70)
    boxes = [view.crop for view in drawn(path, 300, augmentation=Augmentation(crop=0.5))]
    assert max(top + h for top, _, h, _ in boxes) == 50
    assert max(left + w for _, left, _, w in boxes) == 70


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("least", [0.02, 0.5, 0.9])
def test_box_takes_its_share_of_the_area(pictures, shape, least):
    """At least `crop`, or all that 3:4 to 4:3 leaves of the picture; each side is rounded to the nearest pixel."""
    height, width = shape
    wanted = min(least, largest_share(*shape)) * height * width
    boxes = [view.crop for view in drawn(pictures(*shape), 200, augmentation=Augmentation(crop=least))]
    small = [box for box in boxes if (box[2] + 0.5) * (box[3] + 0.5) < wanted]
    assert not small, f"{len(small)} of {len(boxes)} boxes are below {wanted:.0f} pixels, as {small[0]}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("least", [0.02, 0.5, 0.9])
def test_box_is_3_to_4_up_to_4_to_3(pictures, shape, least):
    """Each side is rounded to the nearest pixel."""
    boxes = [view.crop for view in drawn(pictures(*shape), 200, augmentation=Augmentation(crop=least))]
    wrong = [b for b in boxes if (b[3] - 0.5) / (b[2] + 0.5) > 4 / 3 or (b[3] + 0.5) / (b[2] - 0.5) < 3 / 4]
    assert not wrong, f"{len(wrong)} of {len(boxes)} boxes are not 3:4 to 4:3, as {wrong[0]}"


@pytest.mark.parametrize("shape", [(64, 64), (72, 96), (96, 72)])
def test_all_of_the_range_is_drawn(pictures, shape):
    height, width = shape
    boxes = [view.crop for view in drawn(pictures(*shape), 600, augmentation=Augmentation(crop=0.2))]
    shares = [h * w / height / width for _, _, h, w in boxes]
    aspects = [w / h for _, _, h, w in boxes]
    assert min(shares) < 0.24
    assert max(shares) > 0.9
    assert all(any(low <= share < low + 0.1 for share in shares) for low in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8))
    assert min(aspects) < 0.78
    assert max(aspects) > 1.28
    assert 0.2 < sum(aspect > 1 for aspect in aspects) / len(aspects) < 0.8
    for first, side, full in ((0, 2, height), (1, 3, width)):
        free = [(box[first], full - box[side]) for box in boxes if full - box[side] >= 8]
        assert any(place == 0 for place, _ in free)
        assert any(place == room for place, room in free)
        counts = np.histogram([place / room for place, room in free], bins=4, range=(0, 1))[0]
        assert counts.min() > 0.15 * counts.sum()


def test_boxes_differ_between_seeds(pictures):
    boxes = [view.crop for view in drawn(pictures(64, 64), 50, augmentation=Augmentation(crop=0.2))]
    assert len(set(boxes)) > 45


# --- pixels -------------------------------------------------------------------------------------------------------


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def cropped(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """The box, cut out first and then resized."""
    top, left, h, w = box
    part = Image.fromarray(np.ascontiguousarray(image[top : top + h, left : left + w]))
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC)).astype(float)


def assert_near(found: torch.Tensor, expected: np.ndarray, slack: float) -> None:
    """A clip's frame [3, H, W] and an image [H, W, 3]; `slack` is for what codec and filters round."""
    off = np.abs(found.permute(1, 2, 0).numpy().astype(float) - expected)
    assert off.max() <= slack, f"off by {off.max():.0f}"


@pytest.mark.parametrize("size", [16, 40, 112])
@pytest.mark.parametrize("shape", [(96, 96), (90, 160), (160, 90), (61, 83), (33, 20), (24, 120)])
def test_cropped_pixels_are_those_of_the_box(pictures, shape, size):
    path, noise = pictures(*shape), np.random.default_rng(size)
    images = decoded(path)
    assert np.array_equal(images[0], picture(*shape))
    height, width = shape
    for _ in range(6):
        h = int(noise.integers(8, height + 1))
        w = min(width, max(8, round(h * noise.uniform(0.75, 4 / 3))))
        box = int(noise.integers(0, height - h + 1)), int(noise.integers(0, width - w + 1)), h, w
        clip = load_view(path, whole((0, 1), size, crop=box))[0]
        for at in range(2):
            assert_near(clip[:, at], cropped(images[at], box, size), slack=2)


@pytest.mark.parametrize("size", [16, 40, 112])
def test_detail_is_resized_as_by_pil(tmp_path, size):
    """Noise: where pixels get fewer, each is a mean of many; where they get more, curves pass through them."""
    image = np.random.default_rng(1).integers(0, 256, (90, 122, 3), dtype=np.uint8)
    path = write_images(tmp_path / "noise.mkv", [image], codec="ffv1", pix_fmt="bgr0")
    for box in ((0, 0, 90, 122), (3, 50, 80, 61), (70, 5, 20, 24)):
        clip = load_view(path, whole((0,), size, crop=box))[0, :, 0]
        off = np.abs(clip.permute(1, 2, 0).numpy() - cropped(image, box, size))
        assert off.mean() < 1  # what overshoots is cut off after rows or after columns


@pytest.mark.parametrize("shape", [(64, 64), (90, 160), (61, 83), (83, 61)])
def test_a_box_as_large_as_the_clip_is_cut_out(tmp_path, shape):
    """Nothing is resized: pixel by pixel, at every place."""
    images = list(np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8))
    path = write_images(tmp_path / "noise.mkv", images, codec="ffv1", pix_fmt="bgr0")
    height, width = shape
    for size in (1, 16, 49):
        for top, left in [(0, 0), (height - size, width - size), (0, width - size), (height - size, 0), (5, 11)]:
            clip = load_view(path, whole((1, 0), size, crop=(top, left, size, size)))[0].permute(1, 2, 3, 0).numpy()
            assert np.array_equal(clip, np.stack(images[::-1])[:, top : top + size, left : left + size])


@pytest.mark.parametrize("flip", [False, True])
def test_drawn_views_of_a_coded_video_show_their_box(tmp_path, flip):
    path = write_images(tmp_path / "a.mp4", [picture(90, 122)] * 3, options={"qp": "12"})
    image = decoded(path)[1]
    for view in drawn(path, 6, frames=1, start=1, augmentation=Augmentation(crop=0.1)):
        clip = load_view(path, dataclasses.replace(view, flip=flip))[0, :, 0]
        assert_near(clip.flip(-1) if flip else clip, cropped(image, view.crop, CLIP), slack=4)


def test_the_whole_picture_as_a_box(pictures):
    """Stretched to a square, from corner to corner."""
    path = pictures(90, 160)
    clip = load_view(path, whole((0,), 40, crop=(0, 0, 90, 160)))[0, :, 0]
    assert_near(clip, cropped(picture(90, 160), (0, 0, 90, 160), 40), slack=2)
    corners = [clip[:2, y, x].tolist() for y in (0, -1) for x in (0, -1)]
    assert np.abs(np.array(corners) - [[20, 20], [235, 20], [20, 235], [235, 235]]).max() < 8


@pytest.mark.parametrize("size", [16, 33, 64, 100])
@pytest.mark.parametrize("shape", [(64, 64), (50, 50), (64, 96), (96, 64), (61, 83), (61, 84), (84, 61)])
def test_without_a_crop_the_view_is_the_central_square(pictures, shape, size):
    path = pictures(*shape)
    view = draw_view(path, frames=2, size=size)
    top, left, h, w = view.crop
    assert h == w == min(shape)
    assert abs(2 * top + h - shape[0]) <= 1
    assert abs(2 * left + w - shape[1]) <= 1
    clip = load_clip(path, frames=2, size=size)
    assert torch.equal(clip, load_view(path, whole((0, 1), size, crop=view.crop)))
    for at in range(2):
        assert_near(clip[0, :, at], cropped(decoded(path)[at], view.crop, size), slack=2)


def test_a_box_shows_the_number_drawn_in_it(tmp_path):
    path = write_numbers(tmp_path / "a.mp4", range(8), height=64, width=128)
    for size in (24, 64, 80):
        assert numbers_of(load_view(path, whole(range(8), size, crop=central(64, 128)))) == list(range(8))


# --- mirroring ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [(0, 0, SIZE, SIZE), (3, 10, 40, 45), (20, 1, 27, 27), (5, 5, 9, 12)])
@pytest.mark.parametrize("kind", ["h264.mp4", "mjpeg.avi"])
def test_flip_mirrors_left_and_right(videos, crop, kind):
    view = whole((4, 9, 2), 27, crop=crop)
    straight, mirrored = (load_view(videos(kind), dataclasses.replace(view, flip=flip)) for flip in (False, True))
    assert torch.equal(mirrored, straight.flip(-1))
    assert not torch.equal(mirrored, straight)
    assert mirrored.is_contiguous(memory_format=torch.channels_last_3d)


def test_every_other_clip_is_mirrored(videos):
    flips = [view.flip for view in drawn(videos("h264.mp4"), 2000, augmentation=Augmentation(flip=True))]
    assert all(isinstance(flip, bool) for flip in flips)
    assert abs(sum(flips) - 1000) < 112  # five standard deviations
    changes = sum(a != b for a, b in itertools.pairwise(flips))
    assert abs(changes - 1000) < 112


def test_mirroring_does_not_hang_on_box_or_start(videos):
    views = drawn(videos("h264.mp4"), 800, start="random", augmentation=Augmentation(crop=0.3, flip=True))
    for high in (
        [view.frames[0] >= LENGTH // 2 for view in views],
        [view.crop[2] * view.crop[3] > 0.65 * 64 * 64 for view in views],
    ):
        flips = [view.flip for view, is_high in zip(views, high, strict=True) if is_high]
        assert len(flips) > 150
        assert 0.35 < sum(flips) / len(flips) < 0.65


# --- speed --------------------------------------------------------------------------------------------------------


def unwrapped(frames, total: int) -> list[int]:
    """A clip's frame numbers, counted on where it begins again at the file's start."""
    found, turns = [frames[0]], 0
    for before, after in itertools.pairwise(frames):
        turns += after < before
        found.append(after + turns * total)
    return found


def speeds(frames: list[int], stride: int) -> tuple[float, float]:
    """The range of speeds s for which every frame is floor(i * stride * s) after the first one."""
    steps = [(number - frames[0], i * stride) for i, number in enumerate(frames) if i]
    return max(n / step for n, step in steps), min((n + 1) / step for n, step in steps)


@pytest.mark.parametrize("jitter", [0.25, 0.1, 1.0])
def test_speeds_are_in_range_and_all_of_it_is_drawn(long, jitter):
    stride = 10 if jitter == 1 else 20
    how = {"frames": 10, "stride": stride, "start": 0, "augmentation": Augmentation(jitter=jitter)}
    found = [speeds(list(view.frames), stride) for view in drawn(long, 300, **how)]
    assert all(low < high for low, high in found), "not floor(i * stride * speed)"
    assert all(low <= 1 + jitter and high > 1 / (1 + jitter) for low, high in found)
    middles = [math.log((low + high) / 2, 1 + jitter) for low, high in found]
    counts = np.histogram(np.clip(middles, -1, 1), bins=4, range=(-1, 1))[0]
    assert counts.min() > 45  # of 75
    assert min(middles) < -0.9
    assert max(middles) > 0.9


def shown_range(times: list[float], end: float, frames, fps: float) -> tuple[float, float]:
    """The range of speeds at which each frame is the one shown i * speed / fps after the first."""
    begin, ends = times[frames[0]], [*times[1:], end]
    rows = [(times[n] - begin, ends[n] - begin, i / fps) for i, n in enumerate(frames) if i]
    return max(low / step for low, _, step in rows), min(high / step for _, high, step in rows)


def test_speed_counts_seconds_where_fps_is_given(variable):
    times = [time / 1000 for time in VARIABLE]
    how = {"frames": 9, "fps": 4, "start": 2, "augmentation": Augmentation(jitter=0.5)}
    found = [(view, shown_range(times, times[-1] + 0.4, view.frames, 4)) for view in drawn(variable, 200, **how)]
    assert all(low <= high + 1e-2 for _, (low, high) in found), "not one speed for all frames"
    assert all(low <= 1.5 + 1e-2 and high >= 1 / 1.5 - 1e-2 for _, (low, high) in found)
    assert len({view.frames for view, _ in found}) > 10
    assert min(high for _, (_, high) in found) < 0.75
    assert max(low for _, (low, _) in found) > 1.3


def test_speed_by_timestamps_at_a_constant_rate(long):
    how = {"frames": 40, "fps": 2.5, "start": 10, "augmentation": Augmentation(jitter=0.25)}
    for view in drawn(long, 60, **how):
        low, high = speeds(list(view.frames), 4)
        assert low < high + 1e-4
        assert low <= 1.25
        assert high > 0.8


@pytest.mark.parametrize("start", ["center", "random"])
@pytest.mark.parametrize("fps", [None, 10])
def test_a_clip_that_fits_stays_within_the_file(videos, start, fps):
    """60 frames: 13 of stride 4 span 49, up to 60.0 at a speed of 59 / 48."""
    stride = 4 if fps is None else 1
    rate = None if fps is None else fps / 4
    how = {"frames": 13, "stride": stride, "fps": rate, "start": start, "augmentation": Augmentation(jitter=0.22)}
    firsts, lasts = set(), set()
    for view in drawn(videos("h264.mp4"), 300, **how):
        assert list(view.frames) == sorted(view.frames)
        assert 0 <= view.frames[0] <= view.frames[-1] < LENGTH
        firsts.add(view.frames[0])
        lasts.add(view.frames[-1])
        if start == "center":
            assert abs(view.frames[0] - (LENGTH - 1 - view.frames[-1])) <= (2 if fps is None else 5)
    if start == "random":
        assert min(firsts) == 0
        assert max(lasts) >= LENGTH - 2 - (0 if fps is None else 4)  # by time, each frame is shown for a stride
        assert len(firsts) > 10


@pytest.mark.parametrize("start", ["center", "random", 0])
def test_a_clip_that_does_not_fit_loops(videos, start):
    how = {"frames": 21, "stride": 4, "start": start, "augmentation": Augmentation(jitter=0.2)}
    for view in drawn(videos("h264.mp4"), 60, **how):
        assert set(view.frames) <= set(range(LENGTH))
        assert view.frames[0] == 0
        low, high = speeds(unwrapped(view.frames, LENGTH), 4)
        assert low < high
        assert low <= 1.2
        assert high > 1 / 1.2


def test_a_looped_view_shows_the_frames_it_names(videos):
    view = draw_view(videos("h264.mp4"), frames=9, size=CLIP, stride=17, start=30, augmentation=ALL, seed=3)
    view = dataclasses.replace(view, crop=(0, 0, SIZE, SIZE), flip=False)
    assert sorted(view.frames) != list(view.frames)
    assert numbers_of(load_view(videos("h264.mp4"), view)) == list(view.frames)


@pytest.mark.parametrize("fps", [None, 2.5])
def test_refusing_counts_the_span_at_the_drawn_speed(videos, fps):
    """From frame 5 on, 13 of stride 4 reach frame 5 + 48 * speed; by time, the last one too is shown for a stride."""
    path = videos("h264.mp4")
    how = {"frames": 13, "size": CLIP, "stride": 4 if fps is None else 1, "fps": fps, "start": 5}
    draw_view(path, **how, short="refuse")
    refused = 0
    for seed in range(150):
        arguments = how | {"augmentation": Augmentation(jitter=0.25), "seed": seed}
        view = draw_view(path, **arguments)
        frames = unwrapped(view.frames, LENGTH)
        low, high = speeds(frames, 4)
        needed = (frames[-1] + 1, 5 + 48 * high + 1) if fps is None else (5 + 52 * low - 1e-3, 5 + 52 * high + 1e-3)
        if needed[0] > LENGTH:
            with pytest.raises(VideoError, match="too short") as caught:
                draw_view(path, **arguments, short="refuse")
            check_refusal(caught.value, path)
            refused += 1
        elif needed[1] <= LENGTH:
            assert draw_view(path, **arguments, short="refuse") == view
    assert 20 < refused < 90


# --- what is off --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [{"crop": 0.3}, {"flip": True}, {"crop": 0.3, "flip": True}])
@pytest.mark.parametrize("fps", [None, 5])
def test_without_jitter_the_frames_are_those_without_augmentation(videos, on, fps):
    how = {"frames": 4, "fps": fps, "start": "random"}
    plain = drawn(videos("h264.mp4"), 30, **how)
    augmented = drawn(videos("h264.mp4"), 30, **how, augmentation=Augmentation(**on))
    assert [view.frames for view in plain] == [view.frames for view in augmented]
    assert len({view.frames for view in plain}) > 10
    assert all(view.crop == (0, 0, SIZE, SIZE) for view in augmented) == ("crop" not in on)


@pytest.mark.parametrize(
    ("on", "start", "least", "most"),
    [
        ({}, "center", 0, 0),
        ({}, 7, 0, 0),
        ({}, "random", 1, 1),
        ({"flip": True}, "center", 1, 1),
        ({"jitter": 0.25}, "center", 1, 1),
        ({"crop": 0.5}, "center", 4, math.inf),  # share, aspect and two places, perhaps more than once
        ({"flip": True, "jitter": 0.25}, "random", 3, 3),
    ],
)
def test_what_is_off_draws_no_numbers(videos, monkeypatch, on, start, least, most):
    calls = []

    class Counting(random.Random):
        def random(self) -> float:
            calls.append(self)
            return super().random()

    monkeypatch.setattr(random, "Random", Counting)
    for seed in range(5):
        calls.clear()
        draw_view(videos("h264.mp4"), frames=4, size=CLIP, start=start, seed=seed, augmentation=Augmentation(**on))
        assert least <= len(calls) <= most


def test_flip_and_crop_are_off_unless_asked(videos):
    for view in drawn(videos("h264.mp4"), 30, augmentation=Augmentation(jitter=0.5)):
        assert view.crop == (0, 0, SIZE, SIZE)
        assert view.flip is False


# --- seeds --------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from vmae.dataset import ClipDataset
from vmae.video import Augmentation, draw_view, load_view
path = sys.argv[1]
augmentation = Augmentation(crop=0.3, flip=True, jitter=0.25)
how = {"frames": 5, "size": 32, "stride": 3, "start": "random", "augmentation": augmentation}
dataset = ClipDataset(path, **how, views=3, seed=9)
print([draw_view(path, **how, seed=seed) for seed in range(8)])
print([dataset.view(0, epoch) for epoch in range(5)])
print(load_view(path, draw_view(path, **how, seed=1)).sum((0, 1, 3, 4)).tolist())
"""


def test_the_same_seed_gives_the_same_view_in_another_process(videos):
    path = videos("h264.mp4")
    how = {"frames": 5, "size": 32, "stride": 3, "start": "random", "augmentation": ALL}
    dataset = ClipDataset(path, **how, views=3, seed=9)
    expected = [
        str([draw_view(path, **how, seed=seed) for seed in range(8)]),
        str([dataset.view(0, epoch) for epoch in range(5)]),
        str(load_clip(path, **how, seed=1).sum((0, 1, 3, 4)).tolist()),
    ]
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert output.splitlines() == expected


def test_seeds_differ_and_none_draws_anew(videos):
    path = videos("h264.mp4")
    how = {"start": "random", "augmentation": ALL}
    assert len(set(drawn(path, 30, **how))) == 30
    assert drawn(path, 5, **how) == drawn(path, 5, **how)
    assert len({draw_view(path, frames=2, size=CLIP, **how) for _ in range(10)}) > 5


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("crop", value) for value in (0, 1.5, -0.2, float("nan"), float("inf"))),
        *(("jitter", value) for value in (-0.1, float("nan"), float("inf"), -float("inf"))),
    ],
)
def test_settings_out_of_range(videos, name, value):
    augmentation = Augmentation(**{name: value})
    how = {"frames": 2, "size": CLIP, "augmentation": augmentation}
    for call in (
        augmentation.check,
        lambda: load_clip(videos("h264.mp4"), **how),
        lambda: draw_view(videos("h264.mp4"), **how),
        lambda: ClipDataset(videos("h264.mp4"), **how),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected .*{value}") as caught:
            call()
        assert not isinstance(caught.value, VideoError)


@pytest.mark.parametrize("settings", [{"crop": 1}, {"crop": 1e-3}, {"jitter": 0}, {"jitter": 3.9}, {"flip": True}])
def test_settings_in_range(videos, settings):
    load_clip(videos("h264.mp4"), frames=2, size=CLIP, augmentation=Augmentation(**settings), seed=0)


@pytest.mark.parametrize("kind", ["h264.mp4", "mpeg4-b.avi"])
@pytest.mark.parametrize("frames", [(LENGTH,), (0, 3, 1000), (2, LENGTH, 3)])
def test_a_frame_beyond_the_file_is_refused(videos, kind, frames):
    with pytest.raises(VideoError) as caught:
        load_view(videos(kind), whole(frames))
    message = check_refusal(caught.value, videos(kind)).replace(str(videos(kind)), "")
    assert str(LENGTH) in message
    assert str(max(frames)) in message
    assert numbers_of(load_view(videos(kind), whole((LENGTH - 1,)))) == [LENGTH - 1]


@pytest.mark.parametrize("kind", ["h264.mp4", "mpeg4-b.avi"])
def test_a_negative_frame_is_refused(videos, kind):
    with pytest.raises(VideoError) as caught:
        load_view(videos(kind), whole((3, -1)))
    check_refusal(caught.value, videos(kind))


@pytest.mark.parametrize("box", [(40, 40, 20, 20), (20, 20, 40, 40), (0, 0, 64, 64)])
def test_a_box_beyond_the_picture_is_refused(tmp_path, box):
    """The file has changed since the view was drawn."""
    path = write_images(tmp_path / "a.mp4", [picture(64, 64)] * 2)
    load_view(path, whole((0,), crop=box))
    write_images(path, [picture(32, 32)] * 2)
    with pytest.raises(VideoError) as caught:
        load_view(path, whole((0,), crop=box))
    check_refusal(caught.value, path)


def test_a_view_of_a_missing_file_is_refused(tmp_path):
    path = tmp_path / "no such.mp4"
    for call in (lambda: draw_view(path, frames=2, size=CLIP), lambda: load_view(path, whole((0,)))):
        with pytest.raises(VideoError) as caught:
            call()
        check_refusal(caught.value, path)


# --- files that change --------------------------------------------------------------------------------------------


def test_a_file_that_changes_is_read_anew(tmp_path):
    path = write_numbers(tmp_path / "a.mp4", range(10))
    before = draw_view(path, frames=10, size=CLIP)
    assert numbers_of(load_view(path, before)) == list(range(10))
    write_numbers(path, range(100, 120), rate=5)
    after = draw_view(path, frames=20, size=CLIP, short="refuse")
    assert after.frames == tuple(range(20))
    assert after.times == pytest.approx([i / 5 for i in range(20)], abs=1e-3)
    assert numbers_of(load_view(path, after)) == list(range(100, 120))
    assert numbers_of(load_view(path, before)) == list(range(100, 110))
    write_numbers(path, range(4))
    with pytest.raises(VideoError, match="frame 19 is wanted"):
        load_view(path, after)


def test_a_file_of_the_same_size_with_another_time_is_read_anew(tmp_path):
    path = tmp_path / "a.mkv"
    found = []
    for at, gap in enumerate((100, 95)):
        images = [np.full((16, 16, 3), 9 * i, np.uint8) for i in range(4)]
        milliseconds = [gap * i for i in range(4)]
        write_images(path, images, codec="rawvideo", milliseconds=milliseconds, container={"fflags": "bitexact"})
        os.utime(path, ns=(10**18 + at, 10**18 + at))  # the smallest step
        found.append((path.stat().st_size, draw_view(path, frames=4, size=CLIP).times))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx([0, 0.1, 0.2, 0.3], abs=2e-3)
    assert found[1][1] == pytest.approx([0, 0.095, 0.19, 0.285], abs=2e-3)


def test_a_file_of_another_size_with_the_same_time_is_read_anew(tmp_path):
    path = tmp_path / "a.mp4"
    for count in (6, 9):
        write_numbers(path, range(count))
        os.utime(path, ns=(10**18, 10**18))
        assert len(draw_view(path, frames=count, size=CLIP, short="refuse").frames) == count
    with pytest.raises(VideoError, match="too short"):
        draw_view(path, frames=10, size=CLIP, short="refuse")


# --- datasets -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    for name, first in (("a.mp4", 0), ("b.mkv", 60), ("c.avi", 120)):
        codec = {"codec": "mpeg4"} if name == "c.avi" else {}
        write_numbers(folder / name, range(first, first + 40), **codec)
    return folder


SAMPLING = {"frames": 3, "size": CLIP, "stride": 4}


def test_a_dataset_loads_its_views(folder):
    dataset = ClipDataset(folder, **SAMPLING, augmentation=ALL, seed=3)
    for index, (path, _) in enumerate(dataset.entries):
        for epoch in range(3):
            view = dataset.view(index, epoch)
            clip, label = dataset.load(index, epoch)
            assert label == -1
            assert torch.equal(clip, load_view(path, view)[0])
        assert torch.equal(dataset[index][0], dataset.load(index, 0)[0])


def test_views_of_a_dataset_differ_by_epoch_video_and_seed(folder):
    """Every random part does: box, mirroring, frames."""
    a, b = (ClipDataset(folder, **SAMPLING, augmentation=ALL, seed=seed) for seed in (3, 4))
    views = [dataset.view(index, epoch) for dataset in (a, b) for index in range(3) for epoch in range(12)]
    assert len({view.crop for view in views}) > 65
    assert len({view.frames for view in views}) > 40
    assert len({(view.crop, view.frames, view.flip) for view in views}) == 72
    flips = [view.flip for view in views]
    assert 18 < sum(flips) < 54
    plain = ClipDataset(folder, **SAMPLING, seed=3)
    assert all(plain.view(0, epoch).crop == (0, 0, SIZE, SIZE) for epoch in range(4))


def test_views_of_a_dataset_come_again_in_turn(folder):
    dataset, endless = (ClipDataset(folder, **SAMPLING, augmentation=ALL, views=views) for views in (2, 0))
    for index in range(3):
        first, second = dataset.view(index, 0), dataset.view(index, 1)
        assert first != second
        assert [dataset.view(index, epoch) for epoch in range(2, 6)] == [first, second, first, second]
        assert torch.equal(dataset.load(index, 0)[0], dataset.load(index, 4)[0])
        assert [endless.view(index, epoch) for epoch in (0, 1)] == [first, second]
        assert endless.view(index, 2) not in (first, second)
    single = ClipDataset(folder, **SAMPLING, augmentation=ALL, views=1)
    assert len({single.view(0, epoch) for epoch in range(5)}) == 1


def test_batches_say_the_view_of_each_clip(folder):
    seen = []

    def extras(path, view, clip):
        seen.append((path, view, clip.clone()))
        return (torch.tensor(view.times),)

    dataset = ClipDataset(folder, **SAMPLING, augmentation=ALL, views=2)
    taken = list(itertools.islice(batches(dataset, 3, extras=extras), 4))
    for at, (path, view, clip) in enumerate(seen[:12]):
        assert torch.equal(clip, load_view(path, view)[0])
        assert torch.equal(taken[at // 3].clips[at % 3], clip)
        assert taken[at // 3].extras[0][at % 3].tolist() == pytest.approx(view.times)
    views = [(path, view) for path, view, _ in seen[:12]]
    assert set(views[:6]) == set(views[6:12])
    assert len(set(views[:6])) == 6


def test_exact_times_of_an_ntsc_rate(tmp_path):
    rate = Fraction(30000, 1001)
    path = write_numbers(tmp_path / "a.mp4", range(12), rate=rate)
    view = draw_view(path, frames=12, size=CLIP)
    assert view.times == pytest.approx([float(i / rate) for i in range(12)], abs=1e-6)
