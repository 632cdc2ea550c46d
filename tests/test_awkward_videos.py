"""Files as they come from phones, cameras and old disks: each decodes as FFmpeg converts it, or is refused in one line.

The oracle is a graph of FFmpeg's own filters over the decoded frames: its turning, its scaling of pixels that are not
square, its conversion to RGB.
"""

import types
import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch
from av.filter import Graph
from numbered_videos import write_images, write_numbers

from vmae.video import Augmentation, VideoError, draw_view, load_clip

HEIGHT, WIDTH, FRAMES = 48, 80, 6


@pytest.fixture(autouse=True)
def pyav(monkeypatch):
    monkeypatch.setattr("vmae.video._torchcodec", lambda: None)


def scene(height: int = HEIGHT, width: int = WIDTH) -> list[np.ndarray]:
    """Smooth colours without any symmetry, that move."""
    y, x = np.mgrid[0:height, 0:width]
    y, x = y / height, x / width
    images = []
    for t in range(FRAMES):
        planes = 255 * x, 255 * y, 127 * (1 + np.sin(7 * x + 4 * y * y + 0.3 * t))
        images.append(np.stack(planes, -1).astype(np.uint8))
    return images


def write(
    path: Path,
    codec: str,
    pix_fmt: str,
    *,
    height: int = HEIGHT,
    width: int = WIDTH,
    turn: tuple[float, bool, bool] | None = None,
    aspect: Fraction | None = None,
    colours: dict[str, int] | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """`turn`: degrees counter-clockwise, mirrored left to right, mirrored upside down; as the file says."""
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=10, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        if turn is not None:
            stream.set_display_rotation(turn[0], hflip=turn[1], vflip=turn[2])
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for name, value in (colours or {}).items():
            setattr(stream.codec_context, name, value)
        for image in scene(height, width):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            for name, value in (colours or {}).items():
                if name in ("colorspace", "color_range"):
                    frame = frame.reformat(format=pix_fmt, **{f"dst_{name}": value})
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def by_ffmpeg(path: Path, *filters: str) -> np.ndarray:
    """All frames [T, H, W, 3] after filters, as FFmpeg's conversion gives them."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph, shown = None, []
        for frame in container.decode(stream):
            if graph is None:
                graph = Graph()
                source = graph.add_buffer(template=stream, time_base=stream.time_base)
                for each in (*filters, "format=rgb24"):
                    name, _, how = each.partition("=")
                    after = graph.add(name, how)
                    source.link_to(after)
                    source = after
                source.link_to(graph.add("buffersink"))
                graph.configure()
            graph.push(frame)
            shown.append(graph.pull().to_ndarray())
    return np.stack(shown)


def central(frames: np.ndarray) -> np.ndarray:
    side = min(frames.shape[1:3])
    top, left = (frames.shape[1] - side) // 2, (frames.shape[2] - side) // 2
    return frames[:, top : top + side, left : left + side]


def clip_of(path: Path, size: int) -> np.ndarray:
    return load_clip(path, frames=FRAMES, size=size)[0].permute(1, 2, 3, 0).numpy()


# --- what decodes ---------------------------------------------------------------------------------------------------

LOSSLESS = {"crf": "0"}
FILES: dict[str, tuple[str, str, str, dict]] = {  # name: file, codec, pixels, how
    "10 bit H.264": ("a.mp4", "libx264", "yuv420p10le", {}),
    "10 bit HEVC": ("a.mp4", "libx265", "yuv420p10le", {"options": {"x265-params": "log-level=none"}}),
    "HDR, PQ": (
        "a.mp4", "libx265", "yuv420p10le",
        {"colours": {"colorspace": 9, "color_primaries": 9, "color_trc": 16},
         "options": {"x265-params": "log-level=none:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"}},
    ),
    "HDR, HLG": (
        "a.mov", "libx265", "yuv420p10le",
        {"colours": {"colorspace": 9, "color_primaries": 9, "color_trc": 18},
         "options": {"x265-params": "log-level=none:colorprim=bt2020:transfer=arib-std-b67:colormatrix=bt2020nc"}},
    ),
    "BT.709": ("a.mp4", "libx264", "yuv420p", {"colours": {"colorspace": 1}}),
    "full range": ("a.mp4", "libx264", "yuvj420p", {}),
    "4:4:4": ("a.mp4", "libx264", "yuv444p", {}),
    "4:2:2, ProRes": ("a.mov", "prores_ks", "yuv422p10le", {}),
    "greyscale": ("a.mp4", "libx264", "gray", {}),
    "greyscale, 16 bit": ("a.mkv", "ffv1", "gray16le", {}),
    "alpha, QuickTime animation": ("a.mov", "qtrle", "argb", {}),
    "alpha, ProRes 4444": ("a.mov", "prores_ks", "yuva444p10le", {}),
    "alpha, VP9": ("a.webm", "libvpx-vp9", "yuva420p", {}),
    "palette, GIF": ("a.gif", "gif", "rgb8", {}),
    "interlaced H.264": ("a.mp4", "libx264", "yuv420p", {"options": {"flags": "+ildct+ilme", "x264-params": "tff=1"}}),
    "interlaced MPEG-2": ("a.mpg", "mpeg2video", "yuv420p", {"options": {"flags": "+ildct+ilme"}}),
    "odd sides": ("a.mkv", "ffv1", "yuv420p", {"height": 47, "width": 79}),
    "odd sides, 4:4:4": ("a.mp4", "libx264", "yuv444p", {"height": 47, "width": 79}),
    "no duration, raw H.264": ("a.h264", "libx264", "yuv420p", {}),
    "no duration, fragmented MP4": (
        "a.mp4", "libx264", "yuv420p", {"container": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}},
    ),
    "no duration, live Matroska": ("a.mkv", "libx264", "yuv420p", {"container": {"live": "1"}}),
    "index at the end": ("a.mp4", "libx264", "yuv420p", {}),
    "spaces and letters": ("mein vidéo 動画 (1).mp4", "libx264", "yuv420p", {}),
}  # fmt: skip


BOUNDS = {  # mean and largest distance, where PyAV's conversion is not the filters'; elsewhere 0.5 and 1
    "10 bit": (2, 12),  # PyAV interpolates colours linearly, the filters bicubically; and 10 bits are dithered to 8
    "HDR": (2, 16),
    "interlaced": (4, 70),  # the filters take the colours of each field by itself, PyAV those of the frame
    "odd sides": (0.5, 5),  # where the last colour has no neighbour
}


@pytest.mark.parametrize("name", FILES)
def test_decodes_as_ffmpeg_converts(tmp_path, name):
    file, codec, pix_fmt, how = FILES[name]
    path = write(tmp_path / file, codec, pix_fmt, **how)
    wanted = central(by_ffmpeg(path))
    assert len(wanted) == FRAMES
    clip = clip_of(path, wanted.shape[1])
    off = np.abs(clip.astype(int) - wanted)
    mean, most = next((bound for start, bound in BOUNDS.items() if name.startswith(start)), (0.5, 1))
    assert off.mean() <= mean, f"off by {off.mean():.2f} on average"
    assert off.max() <= most, f"off by {off.max()}"


TURNS = [(degrees, left_right, False) for degrees in (0, 90, 180, -90) for left_right in (False, True)]
TURNS += [(0, False, True), (90, False, True)]


@pytest.mark.parametrize(("height", "width"), [(48, 80), (80, 48), (48, 48)])
@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_turned_as_the_file_says(tmp_path, turn, height, width):
    """Phones store what the sensor sees, and how to hold it."""
    path = write(tmp_path / "a.mp4", "libx264", "yuv444p", height=height, width=width, turn=turn, options=LOSSLESS)
    mirrored = (["hflip"] if turn[1] else []) + (["vflip"] if turn[2] else [])
    turned = {0: [], 90: ["transpose=cclock"], 180: ["hflip", "vflip"], -90: ["transpose=clock"]}[int(turn[0])]
    # The stream's matrix mirrors after it turns.
    wanted = central(by_ffmpeg(path, *turned, *mirrored))
    np.testing.assert_allclose(clip_of(path, 48).astype(int), wanted, atol=1)


def test_a_random_crop_of_a_turned_video(tmp_path):
    """Crop, turn and mirror in the file's order: a part of the picture as it is shown."""
    path = write(tmp_path / "a.mp4", "libx264", "yuv444p", turn=(90, False, False), options=LOSSLESS)
    shown = by_ffmpeg(path, "transpose=cclock")
    for seed in range(8):
        how = {"frames": FRAMES, "size": 32, "augmentation": Augmentation(crop=0.2, flip=True), "seed": seed}
        view = draw_view(path, **how)
        clip = load_clip(path, **how)[0].permute(1, 2, 3, 0).numpy()
        top, left, h, w = view.crop
        part = shown[:, WIDTH - left - w : WIDTH - left, top : top + h]  # columns of the file, from the right, are rows
        part = torch.from_numpy(part[:, :, ::-1].copy() if view.flip else part).permute(0, 3, 1, 2)
        wanted = torch.nn.functional.interpolate(part, (32, 32), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
        assert np.abs(clip.astype(int) - wanted.numpy()).max() <= 2


@pytest.mark.parametrize("turn", [(0, False, True), (0, True, False), (180, False, False)], ids=str)
def test_turned_videos_are_not_torchcodecs(tmp_path, monkeypatch, turn):
    """It gives some as they are stored, and says nothing of it."""
    path = write(tmp_path / "a.mp4", "libx264", "yuv444p", turn=turn, options=LOSSLESS)
    wanted = clip_of(path, 48)

    def decoder(*_, **__):
        raise AssertionError("asked")

    monkeypatch.setattr("vmae.video._torchcodec", lambda: types.SimpleNamespace(VideoDecoder=decoder))
    np.testing.assert_array_equal(clip_of(path, 48), wanted)
    upright = write(tmp_path / "b.mp4", "libx264", "yuv444p", options=LOSSLESS)
    with pytest.raises(AssertionError, match="asked"):
        clip_of(upright, 48)


@pytest.mark.parametrize("aspect", [Fraction(1, 1), Fraction(4, 1), Fraction(1, 3)])
def test_random_crops_are_drawn_of_the_picture_as_shown(tmp_path, aspect):
    path = write(tmp_path / "a.mp4", "libx264", "yuv420p", height=48, width=64, aspect=aspect)
    for seed in range(100):
        how = {"frames": 2, "size": 16, "augmentation": Augmentation(crop=0.3), "seed": seed}
        top, left, h, w = draw_view(path, **how).crop
        assert 0 <= top <= 48 - h
        assert 0 <= left <= 64 - w
        slack = float(aspect) / h  # a column of the file
        assert 3 / 4 - slack - 0.1 <= w * float(aspect) / h <= 4 / 3 + slack + 0.1
    assert load_clip(path, **how).shape == (1, 3, 2, 16, 16)


@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(8, 9), Fraction(1, 1)])
@pytest.mark.parametrize(("height", "width"), [(48, 80), (96, 60)])
def test_pixels_that_are_not_square(tmp_path, aspect, height, width):
    path = write(tmp_path / "a.mp4", "libx264", "yuv444p", height=height, width=width, aspect=aspect, options=LOSSLESS)
    wide = round(width * aspect)
    wanted = central(by_ffmpeg(path, f"scale={wide}:{height}:flags=bicubic"))
    clip = clip_of(path, wanted.shape[1])
    inner = np.s_[:, 3:-3, 3:-3]  # resizers differ at edges
    off = np.abs(clip.astype(int) - wanted)[inner]
    assert off.mean() < 2.5  # half a pixel of the scene: where the crop is odd, its centre lies between two
    assert off.max() <= 10


def test_times_that_vary(tmp_path):
    """A phone's frames: late ones, and a gap."""
    milliseconds = [0, 33, 66, 140, 173, 600, 633, 700, 733, 766]
    path = write_numbers(tmp_path / "a.mp4", range(10), milliseconds=milliseconds)
    found = draw_view(path, frames=8, size=16, fps=10, start=0).frames
    assert list(found) == [max(i for i, at in enumerate(milliseconds) if at <= 100 * k) for k in range(8)]


def test_one_frame(tmp_path):
    path = write_images(tmp_path / "a.mp4", scene()[:1])
    clip = load_clip(path, frames=4, size=HEIGHT)
    assert (clip == clip[:, :, :1]).all()
    with pytest.raises(VideoError, match="too short: the clip needs 4 frames, the file has 1"):
        load_clip(path, frames=4, size=HEIGHT, short="refuse")


# --- what is refused ------------------------------------------------------------------------------------------------


class Refused(NamedTuple):
    make: Callable[[Path], Path | str]
    says: str


def tilted(folder: Path) -> Path:
    return write(folder / "a.mp4", "libx264", "yuv420p", turn=(45, False, False))


def sound(folder: Path) -> Path:
    path = folder / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))
    return path


def without_index(folder: Path) -> Path:
    path = write(folder / "a.mp4", "libx264", "yuv420p")
    path.write_bytes(path.read_bytes().replace(b"stco", b"stcx"))
    return path


def of_two_sizes(folder: Path) -> Path:
    path, other = (write(folder / f"{w}.h264", "libx264", "yuv420p", width=w) for w in (WIDTH, 64))
    path.write_bytes(path.read_bytes() + other.read_bytes())
    return path


REFUSED = {
    "turned by 45 degrees": Refused(tilted, "turned by an angle that is no multiple of 90 degrees"),
    "sound alone": Refused(sound, "has no video stream"),
    "broken index": Refused(without_index, "a.mp4: "),
    "changes its size": Refused(of_two_sizes, "expected one size, found pictures of 48 x 80 and of 48 x 64"),
    "a directory": Refused(lambda folder: folder, "expected a video file, found a directory"),
    "nothing": Refused(lambda folder: folder / "a.mp4", "expected a video file, found no such file"),
    "a URL": Refused(lambda folder: "https://example.org/a.mp4", "found a URL, which is not fetched: download it"),
    "a text": Refused(lambda folder: Path(__file__), "cannot be decoded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(tmp_path, name):
    path = REFUSED[name].make(tmp_path)
    with pytest.raises(VideoError) as refusal:
        load_clip(path, frames=2 * FRAMES, size=32)
    said = str(refusal.value)
    assert REFUSED[name].says in said
    assert "\n" not in said
    assert len(said) < 300
