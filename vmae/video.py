"""Clips from video files: frames sampled in time, resized and cropped."""

import functools
import importlib
import itertools
import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import get_worker_info

from vmae.tokens import TUBELET

Start = Literal["center", "random"] | int
Short = Literal["loop", "refuse", "keep"]
TORCHCODEC_CODECS = frozenset({"av1", "h264", "hevc", "vp8", "vp9"})  # for others PyAV sees more damage


class VideoError(ValueError):
    """A video that cannot be used: one line that names the file and what is wrong with it."""


@dataclass(frozen=True)
class _Index:
    """What a file's packets say: the presentation time of every frame, in seconds from the first, and in ticks."""

    times: list[float]
    ticks: list[int] | None  # None where the container stores no usable timestamps
    duration: float
    slack: float  # by how much a time may be rounded
    height: int  # in the file's own pixels, before it is turned as it says
    width: int
    aspect: float  # width of such a pixel, by its height
    codec: str


@dataclass(frozen=True)
class View:
    """All that decides a clip's pixels, given its file."""

    frames: tuple[int, ...]
    """Numbers in the file, in presentation order."""
    times: tuple[float, ...]
    """Seconds from the first frame of the file."""
    crop: tuple[int, int, int, int]
    """Top, left, height and width, in the file's own pixels, before they are turned as it says."""
    size: int
    flip: bool


@dataclass(frozen=True)
class Augmentation:
    """What is drawn at random for each view of a video, beside where it starts."""

    crop: float = 1.0
    """Least share of the picture's area that a random crop takes, 3:4 to 4:3; 1 takes the square at the centre."""
    flip: bool = False
    """Mirror every other clip, left to right."""
    jitter: float = 0.0
    """Play clips up to this share faster or slower: 0.25 draws a speed from 0.8 to 1.25."""

    def check(self) -> None:
        """Raise `ValueError` for a setting out of range."""
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop: expected a number above 0, up to 1, got {self.crop}")
        if not 0 <= self.jitter < 4:
            raise ValueError(f"jitter: expected a number from 0 to below 4, got {self.jitter}")


PLAIN = Augmentation()


def load_clip(
    path: str | Path,
    *,
    frames: int,
    size: int,
    fps: float | None = None,
    stride: int = 1,
    start: Start = "center",
    short: Short = "loop",
    augmentation: Augmentation = PLAIN,
    seed: int | None = None,
) -> Tensor:
    """Decode a clip, with its short side resized to `size` and the long side cropped at the centre.

    Pictures are turned and mirrored as the file says, and pixels that are not square are made so. Colours are FFmpeg's
    conversion to 8 bits: alpha is dropped, HDR is not tone-mapped, interlaced fields stay woven.

    Args:
        path: a video file that FFmpeg reads.
        frames: T, the number of frames wanted.
        size: H = W, in pixels.
        fps: sample at this rate by the frames' timestamps, right for variable frame rates too; None samples by count.
        stride: take every `stride`-th frame; 1 if `fps` is given.
        start: "center", "random", or the number of the file's frame at which the clip starts.
        short: what to do with a file that has fewer frames than asked: begin again at its start, refuse it, or keep
            what there is, an even number of frames and two at least.
        augmentation: random crop, mirroring and speed; none by default.
        seed: of a random start and of the augmentation; None draws a new one each time.

    Returns:
        uint8 [1, 3, T, H, W]: a channels-last view of the decoded frames; with `short="keep"` T may be less than asked.

    Raises:
        VideoError: the file is missing, empty, no video, truncated, damaged or (but for `short="loop"`) too short.
        ValueError: an argument is out of range.
    """
    view = draw_view(
        path, frames=frames, size=size, fps=fps, stride=stride, start=start, short=short, augmentation=augmentation,
        seed=seed,
    )  # fmt: skip
    return load_view(path, view)


def draw_view(
    path: str | Path,
    *,
    frames: int,
    size: int,
    fps: float | None = None,
    stride: int = 1,
    start: Start = "center",
    short: Short = "loop",
    augmentation: Augmentation = PLAIN,
    seed: int | None = None,
) -> View:
    """The view of a video that `load_clip` decodes; the same arguments and errors. Nothing is decoded."""
    check_sampling(frames, size, fps, stride, start, short)
    augmentation.check()
    path = Path(path)
    with _naming(path):
        index = _read_index(path)
    draw = random.Random(seed)
    # Not drawn where it is off, so that what is off changes nothing else.
    speed = (1 + augmentation.jitter) ** draw.uniform(-1, 1) if augmentation.jitter else 1.0
    wanted = _wanted_frames(path, index, frames, fps, stride, start, short, speed, draw)
    crop = _central_square(index.height, index.width, index.aspect)
    if augmentation.crop < 1:
        crop = _random_crop(index.height, index.width, index.aspect, augmentation.crop, draw)
    flip = augmentation.flip and draw.random() < 0.5
    return View(tuple(wanted), tuple(index.times[i] for i in wanted), crop, size, flip)


def load_view(path: str | Path, view: View) -> Tensor:
    """Decode a view of a video: uint8 [1, 3, T, H, W], a channels-last view. Errors as of `load_clip`."""
    # FFmpeg is loaded when a file is opened, so that importing vmae needs no video library.
    import av

    path = Path(path)
    with _naming(path):
        index = _read_index(path)
        if max(view.frames) >= len(index.times):
            raise VideoError(f"{path}: has {len(index.times)} frames, frame {max(view.frames)} is wanted")
        top, left, height, width = view.crop
        if top + height > index.height or left + width > index.width:
            raise VideoError(f"{path}: has pictures of {index.height} x {index.width}, of which {view.crop} is wanted")
        if (found := _decode_torchcodec(path, index, view)) is not None:
            return _as_clip(found)
        try:
            clip, missing = _decode(path, index, view, seek=True)
        except av.FFmpegError:  # frames after the seek point may refer to frames before it
            missing = len(view.frames)
        if missing:  # once more, from the file's first frame
            clip, missing = _decode(path, index, view, seek=False)
    if missing:
        raise VideoError(
            f"{path}: truncated or damaged: {missing} of the {len(set(view.frames))} frames wanted cannot be decoded"
        )
    return _as_clip(clip)


def _as_clip(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn FFmpeg's errors into ones that name the file, and refuse what is no file at all."""
    import av

    try:
        if not path.is_file():
            found = "a directory" if path.is_dir() else "no such file"
            found = "a URL, which is not fetched: download it first" if re.match(r"[a-z0-9]+:/", str(path)) else found
            raise VideoError(f"{path}: expected a video file, found {found}")
        if path.stat().st_size == 0:
            raise VideoError(f"{path}: the file is empty")
        yield
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: cannot be decoded ({error.strerror or type(error).__name__})") from error


def frame_count(path: str | Path) -> int:
    """How many frames a video file holds, by its packets."""
    return len(_read_index(Path(path)).times)


def frame_numbers(path: str | Path, *, stride: int = 1, fps: float | None = None) -> list[int]:
    """Numbers of a whole video's frames: every `stride`-th, or those shown `fps` times a second. Errors: as above."""
    check_sampling(1, 1, fps, stride, 0, "refuse")
    path = Path(path)
    with _naming(path):
        index = _read_index(path)
    length = -(-len(index.times) // stride) if fps is None else max(math.floor(index.duration * fps + 1e-6), 1)
    return _wanted_frames(path, index, length, fps, stride, 0, "loop", 1.0, random.Random(0))


def pictures(path: str | Path, numbers: Sequence[int], size: int) -> Iterator[np.ndarray]:
    """Decode frames one after the other, in memory that does not grow with the video: what `load_clip` shows of each.

    Args:
        path: a video file.
        numbers: of the frames wanted, ascending; one may stand there several times.
        size: rows and columns, in pixels.

    Yields:
        uint8 [size, size, 3].

    Raises:
        VideoError: as of `load_clip`, when the damage is reached.
    """
    import av

    path = Path(path)
    with _naming(path):
        index = _read_index(path)
        picture = _converter(
            path, index, View((), (), _central_square(index.height, index.width, index.aspect), size, False)
        )
        if index.ticks is None:  # frames are told by counting: all of them have to be there
            for _ in _frames(path, index, 0):
                pass
        at = 0
        for begin in dict.fromkeys((numbers[0], 0)):
            with _log_counts(path, index.codec == "ffv1") as look, closing(_frames(path, index, begin)) as found:
                try:
                    for number, frame in found:
                        if number > numbers[at]:
                            break
                        if number == numbers[at]:
                            look()
                            shown = picture(frame)
                            while at < len(numbers) and numbers[at] == number:
                                yield shown
                                at += 1
                        if at == len(numbers):
                            return
                except av.FFmpegError:
                    if at or not begin:
                        raise
            if at:  # else once more from the file's first frame: those after a seek may refer to some before it
                break
        raise VideoError(f"{path}: truncated or damaged: frame {numbers[at]} cannot be decoded")


def check_sampling(frames: int, size: int, fps: float | None, stride: int, start: Start, short: str) -> None:
    for name, value in (("frames", frames), ("size", size), ("stride", stride)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps: expected a number above 0, got {fps}")
    if fps is not None and stride != 1:
        raise ValueError(f"stride: expected 1 where fps is given, got {stride}")
    is_number = isinstance(start, int) and not isinstance(start, bool)
    if start not in ("center", "random") and not (is_number and int(start) >= 0):
        raise ValueError(f"start: expected 'center', 'random' or a frame number from 0, got {start!r}")
    if short not in get_args(Short):
        raise ValueError(f"short: expected 'loop', 'refuse' or 'keep', got {short!r}")


def _open(path: Path) -> tuple[Any, Any]:
    import av

    container = av.open(f"file:{path}")  # a file, whatever protocol its name may spell
    if not container.streams.video:
        container.close()
        raise VideoError(f"{path}: has no video stream")
    stream = container.streams.video[0]
    # An error is wanted, not a picture that the decoder made up from its neighbours.
    stream.codec_context.options = {"err_detect": "explode"}
    stream.thread_type = "AUTO"
    if get_worker_info() is not None or stream.codec_context.name == "ffv1":
        # The loader's workers are the parallelism; and what threads report to FFmpeg's log would be lost.
        stream.codec_context.thread_count = 1
    return container, stream


@contextmanager
def _log_counts(path: Path, counts: bool) -> Iterator[Callable[[], None]]:
    """Take an error in FFmpeg's log for one: lost blocks of Matroska and wrong checksums of FFV1 show nowhere else.

    Raises `VideoError` at the end, or when what it gives is called.
    """
    if not counts:
        yield lambda: None
        return
    import av.logging

    level, skip = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture(local=True) as lines:

            def look() -> None:
                if lines:
                    raise VideoError(f"{path}: damaged: {' '.join(lines[0][2].split())}")

            yield look
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip)
    look()


def _read_index(path: Path) -> _Index:
    """What the file's packets say; a view is drawn and decoded from one reading of them."""
    status = path.stat()
    return _packets(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _packets(path: Path, size: int, changed: int) -> _Index:
    if (promised_bytes := _promised_bytes(path)) > size:
        raise VideoError(f"{path}: truncated: its header promises {promised_bytes} bytes, {size} are there")
    container, stream = _open(path)
    with container, _log_counts(path, "matroska" in container.format.name):
        # Of hours of video, too: what is in them is not kept.
        packets = [(p.pts, p.duration, p.is_corrupt) for p in container.demux(stream) if p.size and not p.is_discard]
        promised, rate, tick = stream.frames, stream.average_rate, stream.time_base
        timed = container.format.name != "avi"  # stores none; FFmpeg's are in decoding order
        aspect = float(stream.sample_aspect_ratio or 1)
        picture = stream.codec_context.height, stream.codec_context.width, aspect, stream.codec_context.name
    if not packets:
        raise VideoError(f"{path}: has no video frames")
    if len(packets) < promised:
        raise VideoError(f"{path}: truncated: its header promises {promised} frames, {len(packets)} are there")
    if any(corrupt for _, _, corrupt in packets):
        raise VideoError(f"{path}: truncated or damaged: a frame is cut short")
    ticks = sorted(pts for pts, _, _ in packets if pts is not None)
    if timed and len(set(ticks)) == len(packets) and tick:
        times = [float((t - ticks[0]) * tick) for t in ticks]
        last = next((float(duration * tick) for pts, duration, _ in packets if pts == ticks[-1] and duration), 0.0)
        last = last or (times[-1] / (len(times) - 1) if len(times) > 1 else 1.0)
        # Matroska rounds times to milliseconds.
        return _Index(times, ticks, times[-1] + last, min(float(tick), 1e-3) + 1e-6, *picture)
    step = 1 / float(rate or 25)
    return _Index([i * step for i in range(len(packets))], None, len(packets) * step, 1e-6, *picture)


def _promised_bytes(path: Path) -> int:
    """How long a Matroska or MP4 file says that it is; 0 if it does not say.

    FFmpeg takes a shorter one for a shorter video (RFC 8794, section 4, and ISO/IEC 14496-12, section 4.2).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        file.seek(0)
        if head.startswith(b"\x1aE\xdf\xa3"):
            file.seek(4)
            file.seek(max(_ebml_number(file), 0), 1)
            if file.read(4) != b"\x18S\x80g":  # the segment
                return 0
            length = _ebml_number(file)
            return file.tell() + length if length >= 0 else 0
        end = 0
        while head[4:8] == b"ftyp" and end < size:  # box after box, the first of which is the file's type
            file.seek(end)
            box = file.read(16)
            length = int.from_bytes(box[:4], "big")
            if length == 1:  # the real one follows, in 64 bits
                length = int.from_bytes(box[8:16], "big")
            if length < 8 or not box[4:8].isalnum():  # to the file's end, or no box
                break
            end += length
        return end


def _ebml_number(file: BinaryIO) -> int:
    """A number of Matroska's variable length, its length marked by the leading zeros; -1 if it is unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return -1
    more = 8 - first[0].bit_length()
    bits = 7 * (more + 1)
    value = int.from_bytes(first + file.read(more), "big") & ((1 << bits) - 1)
    return -1 if value == (1 << bits) - 1 else value


def _wanted_frames(
    path: Path,
    index: _Index,
    frames: int,
    fps: float | None,
    stride: int,
    start: Start,
    short: str,
    speed: float,
    draw: random.Random,
) -> list[int]:
    """The file's frame numbers that make up the clip, in presentation order."""
    total = len(index.times)
    if isinstance(start, int) and start >= total:
        raise VideoError(f"{path}: has {total} frames, the clip was to start at frame {start}")
    # One rule for both ways to sample, in frames or in seconds.
    if fps is None:
        unit, length, step = "frames", float(total), stride * speed
    else:
        unit, length, step = "seconds", index.duration, speed / fps
    begin = 0.0
    if isinstance(start, int):
        begin = start if fps is None else index.times[start]

    def span(count: int) -> float:
        return (count - 1) * stride * speed + 1.0 if fps is None else count * speed / fps

    def fits(count: int) -> bool:
        return begin + span(count) <= length + 1e-6

    if short == "keep" and not fits(frames):
        frames = max(filter(fits, range(TUBELET[0], frames, TUBELET[0])), default=TUBELET[0])
    if short != "loop" and not fits(frames):
        raise VideoError(f"{path}: too short: the clip needs {begin + span(frames):g} {unit}, the file has {length:g}")
    room = max(length - span(frames), 0.0)
    if start == "center":
        begin = room / 2
    elif start == "random":
        begin = draw.random() * (room + 1 if fps is None else room)
    if fps is None:
        return [int(int(begin) + i * step) % total for i in range(frames)]
    # A frame is shown until the next one begins; the slack absorbs the rounding of timestamps.
    moments = ((begin + i * step) % index.duration for i in range(frames))
    return [max(bisect_right(index.times, moment + index.slack) - 1, 0) for moment in moments]


def _central_square(height: int, width: int, aspect: float) -> tuple[int, int, int, int]:
    """Of a picture whose pixels are `aspect` times as wide as high: top, left, height and width, in pixels."""
    h, w = min(height, max(round(width * aspect), 1)), min(width, max(round(height / aspect), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def _random_crop(
    height: int, width: int, aspect: float, least: float, draw: random.Random
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a part, 3:4 to 4:3, of this share of a picture's area, or what that allows."""
    stored, width = width, max(round(width * aspect), 1)  # as it is shown
    most = min(1.0, 4 / 3 * height / width, 4 / 3 * width / height)
    area = height * width * min(draw.uniform(least, 1), most)
    narrowest, widest = max(3 / 4, area / height**2), min(4 / 3, width**2 / area)
    shape = narrowest * (widest / narrowest) ** draw.random()
    h, w = max(round(math.sqrt(area / shape)), 1), max(round(math.sqrt(area * shape)), 1)
    top, left = draw.randint(0, height - h), draw.randint(0, width - w)
    w = min(max(round(w / aspect), 1), stored)
    return top, min(round(left / aspect), stored - w), h, w


def _decode(path: Path, index: _Index, view: View, *, seek: bool) -> tuple[np.ndarray, int]:
    """The view's frames [T, size, size, 3] uint8, and how many of them were not found."""
    places: dict[int, list[int]] = {}
    for place, number in enumerate(view.frames):
        places.setdefault(number, []).append(place)
    clip = np.empty((len(view.frames), view.size, view.size, 3), dtype=np.uint8)
    picture = _converter(path, index, view)
    logged = _log_counts(path, index.codec == "ffv1")
    with logged, closing(_frames(path, index, min(places) if seek else 0)) as found:
        for number, frame in found:
            if number in places:
                clip[places.pop(number)] = picture(frame)
            if index.ticks and not places:
                break
    return clip, len(places)


def _frames(path: Path, index: _Index, begin: int) -> Generator[tuple[int, Any]]:
    """All frames that can be decoded, with their numbers; where the file allows from the key frame before `begin`."""
    number_of = {tick: i for i, tick in enumerate(index.ticks)} if index.ticks else None
    container, stream = _open(path)
    decoded = 0
    with container:
        if begin > 0 and index.ticks:
            container.seek(index.ticks[begin], stream=stream)
        for frame in container.decode(stream):
            if not frame.is_corrupt:
                yield number_of.get(frame.pts, -1) if number_of else decoded, frame
            decoded += 1
    if number_of is None and decoded != len(index.times):  # which ones are missing, nobody knows
        raise VideoError(f"{path}: truncated or damaged: {decoded} of {len(index.times)} frames can be decoded")


def _converter(path: Path, index: _Index, view: View) -> Callable[[Any], np.ndarray]:
    """What turns a decoded frame into the part of it that a view shows, [size, size, 3]."""
    from av.video.reformatter import VideoReformatter

    rgb = VideoReformatter()  # one for all frames: to set it up takes longer than to convert a frame

    def picture(frame: Any) -> np.ndarray:
        if (frame.height, frame.width) != (index.height, index.width):
            raise VideoError(
                f"{path}: expected one size, found pictures of {index.height} x {index.width} and of "
                f"{frame.height} x {frame.width}"
            )
        return _picture(rgb.reformat(frame, format="rgb24").to_ndarray(), view, _turn(path, frame))

    return picture


def _decode_torchcodec(path: Path, index: _Index, view: View) -> np.ndarray | None:
    """The view's frames by torchcodec; None where it is not installed, or does not find them where the packets say."""
    codec = _torchcodec()
    if codec is None or index.ticks is None or index.codec not in TORCHCODEC_CODECS:
        return None
    status = path.stat()
    if _is_turned(path, status.st_size, status.st_mtime_ns):  # it would turn some of those, but mirrors none
        return None
    wanted = sorted(set(view.frames))
    try:
        found = codec.VideoDecoder(str(path), dimension_order="NHWC").get_frames_at(wanted)
    except (RuntimeError, ValueError, IndexError):  # PyAV names what is wrong, or gets by with it
        return None
    times = found.pts_seconds - (found.pts_seconds[0] - index.times[wanted[0]])
    if found.data.shape[1:3] != (index.height, index.width):
        return None
    if len(times) != len(wanted) or not torch.allclose(times, torch.tensor([index.times[i] for i in wanted]).to(times)):
        return None
    pictures = [_picture(frame.numpy(), view, _UPRIGHT) for frame in found.data]
    place = {number: i for i, number in enumerate(wanted)}
    return np.ascontiguousarray(np.stack([pictures[place[number]] for number in view.frames]))


@functools.lru_cache(maxsize=8)
def _is_turned(path: Path, size: int, changed: int) -> bool:
    """By the first frame, for PyAV tells of a stream's matrix nowhere else; if that is damaged, as if it were."""
    import av

    container, stream = _open(path)
    with container:
        try:
            return any(_turn(path, frame) != _UPRIGHT for frame in itertools.islice(container.decode(stream), 1))
        except av.FFmpegError:
            return True


@functools.cache
def _torchcodec() -> Any:
    try:
        return importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError):  # or it is there without FFmpeg's libraries
        return None


class _Turn(NamedTuple):
    """How a picture is to be shown: rows and columns change places, then it is mirrored."""

    transposed: bool
    left_right: bool
    up_down: bool


_UPRIGHT = _Turn(False, False, False)


def _turn(path: Path, frame: Any) -> _Turn:
    """What the file says of a frame, by the matrix that takes (x, y) to (a x + c y, b x + d y)."""
    from av.sidedata.sidedata import Type

    if (matrix := frame.side_data.get(Type.DISPLAYMATRIX)) is None:
        return _UPRIGHT
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if a and d and not (b or c):
        return _Turn(False, a < 0, d < 0)
    if b and c and not (a or d):
        return _Turn(True, c < 0, b < 0)
    raise VideoError(f"{path}: is turned by an angle that is no multiple of 90 degrees")


def _picture(frame: np.ndarray, view: View, turn: _Turn) -> np.ndarray:
    """The part of a frame [H, W, 3] that a view shows, [size, size, 3]."""
    top, left, height, width = view.crop
    part = frame[top : top + height, left : left + width]
    if turn.transposed:
        part = part.transpose(1, 0, 2)
    part = part[:: -1 if turn.up_down else 1, :: -1 if turn.left_right != view.flip else 1]
    if part.shape[:2] == (view.size, view.size):
        return part
    # Faster than FFmpeg's, and the same kernel whatever the frame's size: it is widened where pixels get fewer.
    pixels = torch.from_numpy(np.ascontiguousarray(part)).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, (view.size, view.size), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
