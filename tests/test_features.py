"""Features of long videos: which clip a token's come from, what a stop leaves behind, and what memory they take."""

import itertools
import json
import shutil
import subprocess
import sys

import pytest
import torch
from numbered_videos import numbers_of, write_numbers
from safetensors import safe_open
from safetensors.torch import load_file

from vmae import VideoMAE, VideoMAEConfig, checkpoint, features
from vmae.features import PLAN, SHARD, encode_long, encode_video, read_features, windows
from vmae.video import VideoError, frame_numbers, load_clip, pictures

TINY = {"width": 32, "depth": 2, "heads": 2, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 1}
HOW = {"precision": "fp32", "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def model() -> VideoMAE:
    torch.manual_seed(0)
    return VideoMAE(VideoMAEConfig(frames=16, size=32, **TINY)).eval()


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_numbers(tmp_path_factory.mktemp("video") / "long.mp4", range(101), rate=25)


def test_a_clip_that_is_kept_short(model, tmp_path):
    path = write_numbers(tmp_path / "short.mp4", range(7))
    shape = encode_video(path, model, tmp_path / "out", precision="fp32", device="cpu", short="keep")
    with safe_open(tmp_path / "out", "pt") as file:
        about, found = file.metadata(), file.get_tensor("features")
    assert (about["grid"], about["frames"], about["short"]) == ("3 2 2", "6", "keep")
    with torch.inference_mode():
        torch.testing.assert_close(found, model.encode(load_clip(path, frames=6, size=32))[0])
    assert found.shape == shape == (12, 32)


# --- which clip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "overlap"), [(1, 0), (2, 0), (2, 1), (5, 0), (5, 2), (5, 4), (8, 1), (8, 4), (8, 7)]
)
@pytest.mark.parametrize("total", [1, 2, 5, 7, 8, 9, 15, 16, 17, 40, 41, 43])
def test_every_token_from_the_clip_where_it_is_most_central(length, overlap, total):
    clips = windows(total, length, overlap)
    whole = min(length, total)
    starts = [clip.start for clip in clips]
    assert starts[0] == 0
    assert starts[-1] == total - whole
    assert all(0 < b - a <= max(whole - overlap, 1) for a, b in itertools.pairwise(starts))
    centre = [start + (whole - 1) / 2 for start in starts]
    owner = [n for n, clip in enumerate(clips) for _ in range(clip.first, clip.last)]
    assert len(owner) == total
    for t, n in enumerate(owner):
        assert starts[n] <= t < starts[n] + whole
        assert abs(t - centre[n]) == min(abs(t - c) for c in centre)


def expected(model, video, *, overlap, frames=16, total=50, stride=1) -> torch.Tensor:
    """Brute force: every clip of the video by itself, then token by token."""
    rows = []
    for clip in windows(total, frames // 2, overlap // 2):
        pixels = load_clip(video, frames=min(frames, 2 * total), size=32, start=2 * clip.start * stride, stride=stride)
        with torch.inference_mode():
            rows.append(model.encode(pixels)[0].unflatten(0, (-1, 4))[clip.first - clip.start : clip.last - clip.start])
    return torch.cat(rows)


@pytest.mark.parametrize("overlap", [0, 4, 10, None])
def test_features_are_those_of_the_clips(model, video, tmp_path, overlap):
    shape = encode_long(video, model, tmp_path / "out", overlap=overlap, **HOW)
    wanted = expected(model, video, overlap=4 if overlap is None else overlap)
    assert shape == (50 * 4, 32)  # the last of 101 frames is left out
    torch.testing.assert_close(read_features(tmp_path / "out"), wanted.flatten(0, 1))
    torch.testing.assert_close(read_features(tmp_path / "out", 7, 33), wanted[7:33].flatten(0, 1))
    encode_long(video, model, tmp_path / "means", overlap=overlap, per="frame", **HOW)
    torch.testing.assert_close(read_features(tmp_path / "means"), wanted.mean(1))
    torch.testing.assert_close(read_features(tmp_path / "means", 49), wanted[49:].mean(1))
    assert read_features(tmp_path / "means", 5, 5).shape == (0, 32)


def test_frames_by_stride_and_rate(model, video, tmp_path):
    encode_long(video, model, tmp_path / "stride", overlap=4, stride=3, **HOW)
    wanted = expected(model, video, overlap=4, stride=3, total=17)
    torch.testing.assert_close(read_features(tmp_path / "stride"), wanted.flatten(0, 1))
    assert frame_numbers(video, fps=5) == list(range(0, 100, 5))
    assert frame_numbers(video, fps=50)[:6] == [0, 0, 1, 1, 2, 2]
    encode_long(video, model, tmp_path / "rate", overlap=4, fps=5, **HOW)
    wanted = expected(model, video, overlap=4, stride=5, total=10)
    torch.testing.assert_close(read_features(tmp_path / "rate"), wanted.flatten(0, 1))


def test_a_video_shorter_than_a_clip(model, tmp_path):
    video = write_numbers(tmp_path / "short.mp4", range(7))
    encode_long(video, model, tmp_path / "out", **HOW)
    wanted = expected(model, video, overlap=4, total=3)
    torch.testing.assert_close(read_features(tmp_path / "out"), wanted.flatten(0, 1))
    with pytest.raises(VideoError, match="too short: features need 2 frames, the file gives 1"):
        encode_long(write_numbers(tmp_path / "one.mp4", [0]), model, tmp_path / "one", **HOW)
    assert not (tmp_path / "one").exists()


# --- frames one after the other -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
@pytest.mark.parametrize("numbers", [[0, 1, 2], [5, 5, 9, 30, 59], [59], list(range(41, 60))], ids=str)
def test_pictures_are_those_of_clips(tmp_path, name, numbers):
    video = write_numbers(tmp_path / name, range(60), options={"g": "17", "bf": "2"})
    whole = load_clip(video, frames=60, size=24, start=0)[0].permute(1, 2, 3, 0)
    found = torch.stack([torch.from_numpy(picture) for picture in pictures(video, numbers, 24)])
    assert torch.equal(found, whole[numbers])


def test_frames_that_refer_to_some_before_the_key_frame(tmp_path):
    options = {"g": "10", "bf": "3", "x264-params": "open-gop=1:keyint=10:min-keyint=10:scenecut=0"}
    video = write_numbers(tmp_path / "open.mp4", range(60), options=options)
    whole = load_clip(video, frames=60, size=24, start=0)[0].permute(1, 2, 3, 0)
    for begin in range(1, 60):
        assert torch.equal(torch.from_numpy(next(pictures(video, [begin], 24))), whole[begin]), begin


def test_nothing_that_ffmpegs_log_calls_damaged_is_given(tmp_path):
    """Wrong checksums of FFV1 show there alone, and its pictures look whole to the decoder."""
    whole = write_numbers(tmp_path / "whole.mkv", range(30), codec="ffv1", pix_fmt="bgr0", options={"slicecrc": "1"})
    content, path, refused = whole.read_bytes(), tmp_path / "a.mkv", 0
    for place in range(20, 95, 5):
        broken = bytearray(content)
        at = len(content) * place // 100
        broken[at : at + 64] = bytes(64)
        path.write_bytes(broken)
        given = []
        try:
            given.extend(pictures(path, range(30), 24))
        except VideoError:
            refused += 1
        if given:
            shown = torch.stack([torch.from_numpy(picture) for picture in given]).permute(3, 0, 1, 2)
            assert numbers_of(shown) == list(range(len(given)))
    assert refused > 10


# --- stops, mistakes, damage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["long.mp4", "long.avi"])
def test_goes_on_where_it_was_stopped(model, tmp_path, monkeypatch, name):
    video = write_numbers(tmp_path / name, range(100), options={"g": "13"})
    encode_long(video, model, tmp_path / "whole", overlap=4, **HOW)
    encoded, calls = features._encoded, []

    def stopped(*given):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encoded(*given)

    monkeypatch.setattr(features, "_encoded", stopped)
    with pytest.raises(KeyboardInterrupt):
        encode_long(video, model, tmp_path / "out", overlap=4, **HOW)
    with pytest.raises(ValueError, match=r"000003.safetensors: not there yet: start the encoding again, it goes on"):
        read_features(tmp_path / "out")
    assert len(read_features(tmp_path / "out", 0, 18)) == 4 * 18
    (tmp_path / "out" / ".features-000003.safetensors.x.part").write_bytes(b"cut")
    calls[:] = [1] * 10
    encode_long(video, model, tmp_path / "out", overlap=4, **HOW)
    assert len(calls) == 10 + 8 - 3
    torch.testing.assert_close(read_features(tmp_path / "out"), read_features(tmp_path / "whole"), rtol=0, atol=0)
    assert not list((tmp_path / "out").glob(".*"))
    encode_long(video, model, tmp_path / "out", overlap=4, **HOW)
    assert len(calls) == 10 + 8 - 3


def test_other_settings_are_not_mixed(model, video, tmp_path):
    out = tmp_path / "out"
    encode_long(video, model, out, overlap=4, **HOW)
    torch.manual_seed(1)
    other = VideoMAE(VideoMAEConfig(frames=16, size=32, **TINY)).eval()
    for changes, names in (({"overlap": 2}, "overlap, clips"), ({"stride": 2, "overlap": 4}, "stride")):
        with pytest.raises(ValueError, match=rf"holds features of another video, model or setting \({names}"):
            encode_long(video, model, out, **changes, **HOW)
    with pytest.raises(ValueError, match=r"setting \(model\); use --overwrite"):
        encode_long(video, other, out, overlap=4, **HOW)
    encode_long(video, other, out, overlap=8, overwrite=True, **HOW)
    torch.testing.assert_close(read_features(out), expected(other, video, overlap=8).flatten(0, 1))
    shards = {path.name for path in out.iterdir()} - {PLAN}
    assert shards == {SHARD.format(n) for n in range(len(windows(50, 8, 4)))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlap": 3}, "overlap: expected a multiple of 2 from 0 to below 16, got 3"),
        ({"overlap": 16}, "overlap: expected a multiple of 2 from 0 to below 16, got 16"),
        ({"overlap": -2}, "got -2"),
        ({"frames": 7}, "frames: expected a positive multiple of 2, got 7"),
        ({"size": 40}, "size: expected a positive multiple of 16, got 40"),
        ({"stride": 0}, "stride: expected at least 1, got 0"),
        ({"stride": 101}, "too short"),
        ({"fps": 0.0}, "fps: expected a number above 0, got 0.0"),
    ],
    ids=str,
)
def test_settings_out_of_range(model, video, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        encode_long(video, model, tmp_path / "out", **changes, **HOW)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else(model, video, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"dear")
    with pytest.raises(ValueError, match="expected a new folder, or one with features of vmae, found something else"):
        encode_long(video, model, tmp_path, **HOW)
    with pytest.raises(ValueError, match="found something else"):
        encode_long(video, model, tmp_path / "photo.jpg", **HOW)
    with pytest.raises(ValueError, match="expected features of `vmae encode --stream`"):
        read_features(tmp_path)


def test_a_disk_that_is_too_small(model, video, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(ValueError, match=r"the features need 2.56e-05 GB, 1e-06 GB are free: --per frame keeps one"):
        encode_long(video, model, tmp_path / "out", **HOW)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_costs_nothing(model, video, tmp_path, monkeypatch):
    """What is to be replaced stays where what replaces it will not fit; its own place counts as free."""
    out = tmp_path / "out"
    encode_long(video, model, out, per="frame", **HOW)
    before = read_features(out)
    free = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(ValueError, match="the features need"):
        encode_long(video, model, out, overwrite=True, **HOW)
    assert torch.equal(read_features(out), before)
    encode_long(video, model, out, per="frame", stride=2, overwrite=True, **HOW)
    assert len(read_features(out)) == 25


@pytest.mark.parametrize("text", ["{", "[]", '{"grid": [1, 2, 2]}'])
def test_a_damaged_plan(model, video, tmp_path, text):
    encode_long(video, model, tmp_path / "out", **HOW)
    (tmp_path / "out" / PLAN).write_text(text)
    for call in (lambda: read_features(tmp_path / "out"), lambda: encode_long(video, model, tmp_path / "out", **HOW)):
        with pytest.raises(ValueError, match="expected features of `vmae encode --stream`"):
            call()
    encode_long(video, model, tmp_path / "out", overwrite=True, **HOW)
    assert len(read_features(tmp_path / "out")) == 200


def test_frames_that_are_counted_all_have_to_be_there(tmp_path, monkeypatch):
    """AVI stores no times: if one frame cannot be decoded, all after it would be taken for their neighbours."""
    path = write_numbers(tmp_path / "a.avi", range(30), codec="mpeg4", options={"g": "1"})
    real = features.pictures.__globals__["_open"]

    def without_one(path):
        container, stream = real(path)

        class Container:
            def __enter__(self):
                return container.__enter__()

            def __exit__(self, *given):
                return container.__exit__(*given)

            def decode(self, stream):
                return (frame for i, frame in enumerate(container.decode(stream)) if i != 5)

            def __getattr__(self, name):
                return getattr(container, name)

        return Container(), stream

    assert len(list(pictures(path, range(0, 30, 2), 24))) == 15
    monkeypatch.setitem(features.pictures.__globals__, "_open", without_one)
    with pytest.raises(VideoError, match="29 of 30 frames can be decoded"):
        next(pictures(path, range(0, 20, 2), 24))


def test_a_damaged_video_keeps_what_came_before(model, video, tmp_path):
    damaged = tmp_path / "damaged.mp4"
    raw = bytearray(video.read_bytes())
    at = raw.index(b"mdat") + (len(raw) - raw.index(b"mdat")) * 2 // 3
    raw[at : at + 4000] = bytes(4000)
    damaged.write_bytes(raw)
    with pytest.raises(VideoError, match=r"damaged.mp4: "):
        encode_long(damaged, model, tmp_path / "out", overlap=4, **HOW)
    kept = len(list((tmp_path / "out").glob("features-*.safetensors")))
    assert 1 <= kept < 8
    wanted = expected(model, video, overlap=4)[:10]
    torch.testing.assert_close(read_features(tmp_path / "out", 0, 6), wanted[:6].flatten(0, 1))


def test_damaged_features_are_named(model, video, tmp_path):
    encode_long(video, model, tmp_path / "out", **HOW)
    (tmp_path / "out" / SHARD.format(1)).write_bytes(b"no features")
    with pytest.raises(ValueError, match=r"features-000001.safetensors: damaged"):
        read_features(tmp_path / "out")
    with pytest.raises(ValueError, match="expected latent frames from 0 to 50, got 3 to 51"):
        read_features(tmp_path / "out", 3, 51)


def test_command(model, video, tmp_path):
    checkpoint.save(model, tmp_path / "model")
    command = [sys.executable, "-m", "vmae", "encode", str(video), "--model", str(tmp_path / "model")]
    command += ["--precision", "fp32"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "f", "--stream", "--per", "frame"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "features [50, 32] in" in done.stdout
    assert json.loads((tmp_path / "f" / PLAN).read_text())["per"] == "frame"
    assert load_file(tmp_path / "f" / SHARD.format(0))["features"].shape[1] == 32
    done = subprocess.run([*command, "--out", str(tmp_path / "g"), "--per", "frame"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "overlap, per, overwrite: expected with --stream alone" in done.stderr


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from vmae import VideoMAE, VideoMAEConfig
from vmae.features import encode_long
torch.set_num_threads(1)
tiny = dict(width=32, depth=1, heads=1, decoder_width=16, decoder_depth=1, decoder_heads=1)
model = VideoMAE(VideoMAEConfig(frames=16, size=32, **tiny)).eval()
short, long, out = map(Path, sys.argv[1:])
peaks = []
for number, video in enumerate((short, long)):
    encode_long(video, model, out / str(number), device="cpu", precision="fp32", progress=False)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0])
"""


def test_memory_does_not_grow_with_the_video(tmp_path):
    """Frames of 192 KiB: forty times as many, 190 MiB more of them, take less than 8 MiB more."""
    paths = [
        write_numbers(tmp_path / f"{n}.mp4", [i % 100 for i in range(n)], height=256, width=256, options={"crf": "40"})
        for n in (25, 1000)
    ]
    command = [sys.executable, "-c", MEMORY, *map(str, paths), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8192, f"{done.stdout} KiB"
