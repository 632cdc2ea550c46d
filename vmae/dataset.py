"""Many clips: the videos of a folder or list, in batches, without those that cannot be used."""

import copy
import csv
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vmae.video import Start, VideoError, check_sampling, load_clip

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})


def read_entries(source: str | Path) -> list[tuple[Path, int]]:
    """The videos of a source, each with its label (-1 where there is none).

    `source`: a folder (searched at any depth for VIDEO_SUFFIXES), a video file, a csv file whose header names a column
    `path` (and perhaps `label`), or a list with `path label` or `path` on each line. Paths in a list or csv file are
    relative to it.
    """
    source = Path(source)
    if source.is_dir():
        entries = [(p, -1) for p in sorted(source.rglob("*")) if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file()]
    elif source.suffix.lower() in VIDEO_SUFFIXES:
        entries = [(source, -1)]
    elif source.is_file():
        entries = _read_list(source)
    else:
        raise VideoError(f"{source}: expected a folder of videos, a video or a list of videos, found no such file")
    if not entries:
        raise VideoError(f"{source}: holds no videos")
    return entries


def _read_list(source: Path) -> list[tuple[Path, int]]:
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise VideoError(f"{source}: expected a text file that lists videos") from error
    header = next(csv.reader(lines[:1]), [])
    rows: list[tuple[int, str, str]] = []
    if "path" in header:
        for number, row in enumerate(csv.DictReader(lines), 2):
            rows.append((number, row["path"] or "", row.get("label") or "-1"))
    else:
        for number, line in enumerate(map(str.strip, lines), 1):
            words = line.rsplit(None, 1)
            if len(words) == 2 and _is_integer(words[1]):  # a last word that is no number belongs to the path
                rows.append((number, words[0], words[1]))
            elif "," in line and _is_integer(line.rpartition(",")[2].strip()):
                raise VideoError(f"{source}:{number}: expected `path label`, or a csv file whose header names `path`")
            elif line:
                rows.append((number, line, "-1"))
    for number, name, label in rows:
        if not name or not _is_integer(label):
            raise VideoError(f"{source}:{number}: expected a path and an integer label, got {name!r} and {label!r}")
    return [(source.parent / name, int(label)) for _, name, label in rows]


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


class ClipDataset(Dataset):
    """The clips of a folder or list of videos (see `read_entries`), sampled as by `load_clip`.

    `dataset[i]` is (clip uint8 [3, T, H, W], label), the same for the same seed in any process, and each time: `load`
    gives a random start that differs from epoch to epoch. A video that cannot be used raises `VideoError`; `batches`
    skips it instead.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        frames: int,
        size: int,
        fps: float | None = None,
        stride: int = 1,
        start: Start = "random",
        short: Literal["loop", "refuse"] = "loop",
        seed: int = 0,
    ):
        check_sampling(frames, size, fps, stride, start, short)
        self.entries = read_entries(source)
        self.seed = seed
        self.sampling: dict[str, Any] = {
            "frames": frames,
            "size": size,
            "fps": fps,
            "stride": stride,
            "start": start,
            "short": short,
        }

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.load(index, epoch=0)

    def load(self, index: int, epoch: int) -> tuple[Tensor, int]:
        """Entry `index`, with a random start that differs from epoch to epoch."""
        path, label = self.entries[index]
        seed = random.Random(f"{self.seed}/{epoch}/{index}").getrandbits(32)
        return load_clip(path, seed=seed, **self.sampling)[0], label

    def split(self, count: int, *, seed: int) -> tuple["ClipDataset", "ClipDataset"]:
        """The dataset without `count` of its entries, and these, drawn at random."""
        if not 0 <= count <= len(self):
            raise ValueError(f"count: expected 0 to {len(self)} entries, got {count}")
        drawn = set(random.Random(seed).sample(range(len(self)), count))
        rest, taken = copy.copy(self), copy.copy(self)
        rest.entries = [entry for i, entry in enumerate(self.entries) if i not in drawn]
        taken.entries = [entry for i, entry in enumerate(self.entries) if i in drawn]
        return rest, taken


class _Attempts(Dataset):
    """Clips by (epoch, index); an unusable video is returned as the text of its error."""

    def __init__(self, dataset: ClipDataset):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | str:
        epoch, index = key
        try:
            return self.dataset.load(index, epoch)
        except VideoError as error:
            return str(error)


class _Shuffled:
    """Endless (epoch, index) pairs, each epoch in an order of its own."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = 0
        while True:
            order = list(range(self.length))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            yield from ((epoch, i) for i in order)
            epoch += 1


def _guarded(loader: DataLoader) -> Iterator[Any]:
    """A loader's items; the end of a worker, which PyTorch reports as a RuntimeError, is an OSError."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError("a decoding process was killed, perhaps for memory or shared memory; try --workers 0") from error


def batches(
    dataset: ClipDataset, batch_size: int, *, workers: int = 0, seed: int = 0, skipped: list[str] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (clips uint8 [B, 3, T, H, W] in channels_last_3d, labels int64 [B]), the same for the same seed.

    A video that cannot be used is left out and the text of its error appended to `skipped`. If none can be used,
    `VideoError` says so.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    loader = DataLoader(
        _Attempts(dataset), batch_size=None, sampler=_Shuffled(len(dataset), seed), num_workers=workers,
        prefetch_factor=2 if workers else None,
    )  # fmt: skip
    batch: list[tuple[Tensor, int]] = []
    failures = 0
    for item in _guarded(loader):
        if isinstance(item, str):
            failures += 1
            if skipped is not None:
                skipped.append(item)
            if failures > 2 * (
                len(dataset) - 1
            ):  # the one usable video may be an epoch's first and the next one's last
                raise VideoError(f"none of the last {failures} videos could be used; the last one: {item}")
            continue
        failures = 0
        batch.append(item)
        if len(batch) == batch_size:
            clips, labels = zip(*batch, strict=True)
            # Stacked as frames, so that the batch keeps the decoder's channels-last layout.
            yield torch.stack([c.permute(1, 2, 3, 0) for c in clips]).permute(0, 4, 1, 2, 3), torch.tensor(labels)
            batch = []
