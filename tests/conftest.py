"""Videos that the tests make for themselves."""

import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numbered_videos import KINDS, LENGTH, write_numbers

from vmae import AdaptiveTokenizer, TokenizerConfig, checkpoint

if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side take one thread each, and what they start does too
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # where a test asks for two, they do not spin on others' cores
else:
    torch.set_num_threads(2)


def write_video(path: Path, frames: int, width: int = 64, height: int = 48) -> Path:
    """A bright square that moves over a still gradient."""
    background = np.linspace(0, 120, width, dtype=np.uint8)[None, :, None].repeat(height, 0).repeat(3, 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(frames):
            picture = background.copy()
            left = 2 * t % (width - 16)
            picture[8:24, left : left + 16] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture(scope="session")
def moving_square(tmp_path_factory) -> Path:
    """A video of 40 frames."""
    return write_video(tmp_path_factory.mktemp("videos") / "square.mp4", 40)


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory) -> Path:
    """Two videos, and a file that is none."""
    folder = tmp_path_factory.mktemp("folder")
    write_video(folder / "a.mp4", 40)
    write_video(folder / "b.mp4", 24)
    (folder / "broken.mp4").write_bytes(b"this is no video")
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A tokenizer that has learned nothing."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    checkpoint.save(AdaptiveTokenizer(TokenizerConfig.tiny()), folder)
    return folder


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """A function from one of KINDS to a file of LENGTH numbered frames."""
    folder = tmp_path_factory.mktemp("videos")

    def video(kind: str) -> Path:
        path = folder / kind
        return path if path.exists() else write_numbers(path, range(LENGTH), **KINDS[kind])

    return video
