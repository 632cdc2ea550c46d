"""Features of a video, by a pretrained encoder: of one clip in a file, or of a video of any length in a folder."""

import itertools
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from vmae import checkpoint
from vmae.cache import state_hash
from vmae.mae import VideoMAE
from vmae.memory import memory_gib
from vmae.optimisation import autocast, device_of, precision_of
from vmae.tokens import TUBELET, check_clip, check_video
from vmae.video import VideoError, frame_numbers, load_clip, pictures

PLAN, SHARD = "features.json", "features-{:06d}.safetensors"
Per = Literal["token", "frame"]


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
    checkpoint.check_writable(out, "features", _holds_features)
    clip = load_clip(video, frames=frames, size=size, **sampling)
    place = device_of(device)
    features = _encoded(model.to(place), clip.to(place), precision).contiguous()
    metadata = {
        "grid": " ".join(map(str, check_video(clip))),
        "video": Path(video).name,
        "frames": str(clip.shape[2]),
        "size": str(size),
        **{name: str(value) for name, value in sampling.items()},
    }
    with checkpoint.replacing(out) as temporary:
        save_file({"features": features}, temporary, metadata=metadata)
    return features.shape


def _holds_features(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return "grid" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _encoded(model: VideoMAE, clip: Tensor, precision: str) -> Tensor:
    with torch.inference_mode(), autocast(clip.device, precision):
        return model.encode(clip)[0].float().cpu()


# --- videos of any length -------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """A clip of a long video, in latent frames: where it starts, and which of its features count, `first` to `last`."""

    start: int
    first: int
    last: int
    """The first that does not."""


def windows(total: int, length: int, overlap: int) -> list[Window]:
    """Cover `total` latent frames by clips of `length`, each frame's features from the clip where it is most central.

    Neighbours share `overlap` latent frames; the last clip shares more, if it has to, so that it is whole. A video
    shorter than a clip is one.
    """
    length = min(length, total)
    starts = list(range(0, total - length + 1, max(length - overlap, 1)))
    if starts[-1] + length < total:
        starts.append(total - length)
    # Half-way between two centres; of a tie the later clip takes it.
    cuts = [0, *((a + b + length) // 2 for a, b in itertools.pairwise(starts)), total]
    return [Window(start, first, last) for start, (first, last) in zip(starts, itertools.pairwise(cuts), strict=True)]


def encode_long(
    video: Path,
    model: VideoMAE,
    out: Path,
    *,
    frames: int | None = None,
    size: int | None = None,
    overlap: int | None = None,
    per: Per = "token",
    stride: int = 1,
    fps: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> torch.Size:
    """Write the features of a whole video, of any length, to a folder; memory does not grow with the video.

    The video is cut into clips of `frames` that share `overlap` frames with their neighbours, each encoded by itself; a
    token's features are those of the clip where it is most central. What is done is kept: started again with the same
    settings, it goes on. `read_features` reads the folder.

    Args:
        video: the video file.
        model: the encoder.
        out: folder for `features.json` (settings, grid and clips) and one safetensors file for each clip.
        frames: of a clip; the model's own if not given. A video shorter than that is one clip.
        size: rows and columns; the model's own if not given.
        overlap: frames that neighbouring clips share; a quarter of a clip if not given.
        per: "token" keeps all features [N, D]; "frame" keeps their mean in each latent frame [T, D].
        stride: take every n-th frame.
        fps: sample by time at this rate instead.
        device: where to compute.
        precision: of the computation; the files hold float32.
        overwrite: replace features made with other settings.
        progress: show a bar.

    Returns:
        The shape of all features. Of an odd number of frames the last one is left out.

    Raises:
        ValueError: a setting is out of range, `out` holds other features, or they will not fit on the disk.
        VideoError: the video cannot be decoded; what comes before the damage is kept.
    """
    frames = model.config.frames if frames is None else frames
    size = model.config.size if size is None else size
    check_clip(frames, size)
    overlap = frames // 4 // TUBELET[0] * TUBELET[0] if overlap is None else overlap
    if overlap % TUBELET[0] or not 0 <= overlap < frames:
        raise ValueError(f"overlap: expected a multiple of {TUBELET[0]} from 0 to below {frames}, got {overlap}")
    numbers = frame_numbers(video, stride=stride, fps=fps)
    total = len(numbers) // TUBELET[0]
    if not total:
        raise VideoError(f"{video}: too short: features need {TUBELET[0]} frames, the file gives {len(numbers)}")
    clips = windows(total, frames // TUBELET[0], overlap // TUBELET[0])
    grid = (total, size // TUBELET[1], size // TUBELET[2])
    rows = math.prod(grid[1:]) if per == "token" else 1
    shape = torch.Size((total * rows, model.config.width))
    place = device_of(device)
    plan = {
        "video": Path(video).name,
        "bytes": Path(video).stat().st_size,
        "model": state_hash(model.state_dict()),
        **{"frames": frames, "size": size, "overlap": overlap, "stride": stride, "fps": fps, "per": per},
        "precision": precision_of(precision, place),
        "grid": list(grid),
        "shape": list(shape),
        "frame_numbers": {"first": numbers[0], "last": numbers[total * TUBELET[0] - 1]},
        "clips": [clip._asdict() for clip in clips],
    }
    done = _prepare(out, plan, 4 * math.prod(shape), overwrite)
    model = model.to(place).eval()
    first = TUBELET[0] * clips[done].start if done < len(clips) else 0
    held: list[np.ndarray] = []
    found = pictures(video, numbers[first : total * TUBELET[0]], size)
    with tqdm(total=len(clips), desc="encoding", unit="clip", initial=done, disable=not progress, mininterval=1) as bar:
        for number, clip in enumerate(clips[done:], done):
            begin = TUBELET[0] * clip.start
            held = held[begin - first :]
            first = begin
            held += itertools.islice(found, min(frames, TUBELET[0] * total) - len(held))
            pixels = torch.from_numpy(np.stack(held)).permute(3, 0, 1, 2)[None].to(place)
            features = _encoded(model, pixels, precision).unflatten(0, (-1, math.prod(grid[1:])))
            features = features[clip.first - clip.start : clip.last - clip.start]
            features = features.flatten(0, 1) if per == "token" else features.mean(1)
            with checkpoint.replacing(out / SHARD.format(number)) as temporary:
                save_file({"features": features.contiguous()}, temporary)
            bar.update()
            bar.set_postfix_str(f"{memory_gib(place):.2f} GiB")
    return shape


def _prepare(out: Path, plan: dict[str, Any], size: int, overwrite: bool) -> int:
    """Make `out` ready for features of these settings; returns how many clips' are there already."""
    for path in out.glob(f".{PLAN.split('.')[0]}*.part"):  # of a run that was killed
        path.unlink()
    there = (out / PLAN).exists()
    if not there and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: expected a new folder, or one with features of vmae, found something else")
    held: dict[str, Any] = {}
    if there:
        try:
            held = _plan(out)
        except ValueError:
            if not overwrite:
                raise
    if there and held != plan and not overwrite:
        differ = ", ".join(name for name in {**plan, **held} if plan.get(name) != held.get(name))
        raise ValueError(f"{out}: holds features of another video, model or setting ({differ}); use --overwrite")
    shards = sorted(out.glob(SHARD.replace("{:06d}", "*"))) if there else []
    done = 0
    while held == plan and done < len(plan["clips"]) and (out / SHARD.format(done)).exists():
        done += 1
    rest = size * (len(plan["clips"]) - done) // len(plan["clips"])
    above = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(above).free
    if held != plan:
        free += sum(path.stat().st_size for path in shards)
    if rest > free:
        raise ValueError(
            f"{out}: the features need {rest / 1e9:.3g} GB, {free / 1e9:.3g} GB are free: --per frame keeps one for "
            "each latent frame, --fps or --stride take fewer frames"
        )
    if held != plan:
        for path in shards:  # the plan goes last: by it the folder is known
            path.unlink()
        checkpoint.write_text(out / PLAN, json.dumps(plan, indent=1) + "\n")
    return done


def _plan(folder: Path) -> dict[str, Any]:
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        if missing := {"grid", "shape", "clips"} - set(plan):
            raise ValueError(f"{PLAN} lacks {', '.join(sorted(missing))}")
        return plan
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder}: expected features of `vmae encode --stream`: {error}") from None


def read_features(folder: str | Path, first: int = 0, last: int | None = None) -> Tensor:
    """Features that `encode_long` wrote, of latent frames `first` to `last` (not with it): [N, D] float32, time first.

    Raises:
        ValueError: the folder holds none, not yet all of these, or damaged ones.
    """
    folder = Path(folder)
    plan = _plan(folder)
    total, rows = plan["grid"][0], plan["shape"][0] // plan["grid"][0]
    last = total if last is None else last
    if not 0 <= first <= last <= total:
        raise ValueError(f"first, last: expected latent frames from 0 to {total}, got {first} to {last}")
    return torch.cat([torch.empty(0, plan["shape"][1]), *_pieces(folder, plan["clips"], rows, first, last)])


def _pieces(folder: Path, clips: Sequence[dict[str, int]], rows: int, first: int, last: int) -> Iterator[Tensor]:
    for number, clip in enumerate(clips):
        begin, end = max(first, clip["first"]), min(last, clip["last"])
        if begin < end:
            path = folder / SHARD.format(number)
            try:
                with safe_open(path, "pt") as file:
                    yield file.get_slice("features")[(begin - clip["first"]) * rows : (end - clip["first"]) * rows]
            except (OSError, SafetensorError) as error:
                missing = not path.exists()
                reason = "not there yet: start the encoding again, it goes on" if missing else f"damaged: {error}"
                raise ValueError(f"{path}: {reason}") from None
