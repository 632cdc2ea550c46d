"""Many clips: the videos of a folder or list, in batches, without those that cannot be used."""

import contextlib
import copy
import csv
import functools
import itertools
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vmae.video import PLAIN, Augmentation, Short, Start, VideoError, View, check_sampling, draw_view, load_view

MOST_SUBSTITUTES = 1000  # for one video that cannot be used
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
        header = [name.strip() for name in next(csv.reader(lines[:1]), [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise VideoError(f"{source}: expected a text file that lists videos") from error
    rows: list[tuple[int, str, str]] = []
    if "path" in header:
        for number, row in enumerate(csv.DictReader(lines[1:], header, skipinitialspace=True), 2):
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
        if not name or not _is_integer(label) or abs(int(label)) >= 2**31:
            raise VideoError(f"{source}:{number}: expected a path and an integer label, got {name!r} and {label!r}")
    return [(source.parent / name, int(label)) for _, name, label in rows]


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


class ClipDataset(Dataset):
    """The clips of a folder or list of videos (see `read_entries`), sampled as by `load_clip`.

    `dataset[i]` is (clip uint8 [3, T, H, W], label), the same for the same seed in any process, and each time: `load`
    gives a view that differs from epoch to epoch, where something is random; with `views`, there are so many of each
    video, and they come again in turn. A video that cannot be used raises `VideoError`; `batches` takes another one
    instead. With `short="keep"` clips differ in length: `batches` refuses them, `VideoMAE.encode` takes a list of them.
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
        short: Short = "loop",
        augmentation: Augmentation = PLAIN,
        views: int = 0,
        seed: int = 0,
    ):
        check_sampling(frames, size, fps, stride, start, short)
        augmentation.check()
        if views < 0:
            raise ValueError(f"views: expected at least 0, got {views}")
        self.source, self.entries = source, read_entries(source)
        self.views, self.seed = views, seed
        self.sampling: dict[str, Any] = {
            "frames": frames,
            "size": size,
            "fps": fps,
            "stride": stride,
            "start": start,
            "short": short,
            "augmentation": augmentation,
        }

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.load(index, epoch=0)

    def load(self, index: int, epoch: int) -> tuple[Tensor, int]:
        """Entry `index` in the view of an epoch."""
        path, label = self.entries[index]
        return load_view(path, self.view(index, epoch))[0], label

    def view(self, index: int, epoch: int) -> View:
        """What `load` decodes."""
        number = epoch % self.views if self.views else epoch
        seed = random.Random(f"{self.seed}/{number}/{index}").getrandbits(32)
        return draw_view(self.entries[index][0], seed=seed, **self.sampling)

    def split(self, count: int, *, seed: int) -> tuple["ClipDataset", "ClipDataset"]:
        """The dataset without `count` of its entries, and these, drawn at random."""
        if not 0 <= count <= len(self):
            raise ValueError(f"count: expected 0 to {len(self)} entries, got {count}")
        drawn = set(random.Random(seed).sample(range(len(self)), count))
        rest, taken = copy.copy(self), copy.copy(self)
        rest.entries = [entry for i, entry in enumerate(self.entries) if i not in drawn]
        taken.entries = [entry for i, entry in enumerate(self.entries) if i in drawn]
        return rest, taken


def check_usable(dataset: ClipDataset) -> None:
    """Raise `VideoError` if none of the videos can be used."""
    for index in range(len(dataset)):
        try:
            dataset[index]
            return
        except VideoError as error:
            last = error
    raise VideoError(f"{dataset.source}: none of {len(dataset)} videos could be used; the last one: {last}")


class Batch(NamedTuple):
    """Clips uint8 [B, 3, T, H, W] in channels_last_3d, labels int64 [B], and what came with them."""

    clips: Tensor
    labels: Tensor
    extras: tuple[Tensor, ...]
    """Of `Extras`, stacked."""
    own: Tensor
    """bool [B]: false for a clip that stands in the place of a video that cannot be used."""
    skipped: list[str]
    """Why videos were left out on the way to this batch, one line each."""
    seconds: float
    """That reading and decoding took, in whichever process."""

    def to(self, device: torch.device) -> "Batch":
        """With the clips, which are what is large, on a device."""
        return self._replace(clips=self.clips.to(device, non_blocking=True))


Extras = Callable[[Path, View, Tensor], tuple[Tensor, ...]]
"""From a video's path, view and clip uint8 [3, T, H, W]: more tensors about it. Called where it is decoded."""


_Item = tuple[Tensor, int, tuple[Tensor, ...], list[str], float]  # as of Batch, for one clip


class _Slots(Dataset):
    """Clips by their place in the endless sequence that a run trains on; each depends on its place alone.

    Epoch follows epoch, each in an order of its own. In the place of a video that cannot be used stands another one.
    """

    def __init__(self, dataset: ClipDataset, seed: int, extras: Extras | None):
        self.dataset, self.seed, self.extras = dataset, seed, extras
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def __getstate__(self) -> dict[str, Any]:  # for processes that are not forked
        return {"dataset": self.dataset, "seed": self.seed, "extras": self.extras}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.dataset)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order

    def __getitem__(self, slot: int) -> _Item | Exception:
        # An error is returned: what a worker raises arrives with its traceback for a message.
        begin = time.perf_counter()
        dataset, skipped = self.dataset, list[str]()
        epoch = slot // len(dataset)
        for index in self._candidates(slot):
            path, label = dataset.entries[index]
            try:
                view = dataset.view(index, epoch)
                clip = load_view(path, view)[0]
                extras = self.extras(path, view, clip) if self.extras else ()
                return clip, label, extras, skipped, time.perf_counter() - begin
            except VideoError as error:
                skipped.append(str(error))
            except (ValueError, OSError) as error:  # a damaged cache
                return error
        return VideoError(f"{dataset.source}: none of {len(skipped)} videos could be used; the last one: {skipped[-1]}")

    def _candidates(self, slot: int) -> Iterator[int]:
        """The entry whose turn it is, then others in an order of the slot's own."""
        epoch, place = divmod(slot, len(self.dataset))
        index = self.order(epoch)[place]
        yield index
        others = [i for i in range(len(self.dataset)) if i != index]
        random.Random(f"{self.seed}/{slot}/substitute").shuffle(others)
        yield from others[:MOST_SUBSTITUTES]


class _Parts:
    """The slots of one process: of every batch from `start` on, clips `row` to `row + size - 1`."""

    def __init__(self, batch_size: int, start: int, row: int, size: int):
        self.batch_size, self.start, self.row, self.size = batch_size, start, row, size

    def __iter__(self) -> Iterator[list[int]]:
        for number in itertools.count(self.start):
            first = number * self.batch_size + self.row
            yield list(range(first, first + self.size))


def _collate(items: list[_Item | Exception]) -> Batch | Exception:
    for item in items:
        if isinstance(item, Exception):
            return item
    clips, labels, extras, skipped, seconds = zip(*items, strict=True)
    own = torch.tensor([not reasons for reasons in skipped])
    return Batch(
        # Stacked as frames, so that the batch keeps the decoder's channels-last layout.
        torch.stack([clip.permute(1, 2, 3, 0) for clip in clips]).permute(0, 4, 1, 2, 3),
        torch.tensor(labels),
        tuple(torch.stack(values) for values in zip(*extras, strict=True)),
        own,
        [reason for reasons in skipped for reason in reasons],
        sum(seconds),
    )


# Signals that a terminal or scheduler sends to all of a job's processes, and that are for the run alone.
_OF_THE_RUN = {signal.SIGINT, signal.SIGTERM} if hasattr(signal, "sigtimedwait") else {signal.SIGINT}


def decoded(dataset: Dataset, *, workers: int, **order: Any) -> Iterator[Any]:
    """What a `DataLoader` of so many decoding processes gives; `order`: its other arguments.

    Ctrl-C does not reach the processes, and the end of one, which PyTorch reports as a RuntimeError, is an OSError;
    what one of them raises is raised here.
    """
    loader = DataLoader(
        dataset, num_workers=workers, prefetch_factor=2 if workers else None, worker_init_fn=start_worker, **order
    )
    try:
        with _without_signals() if workers else contextlib.nullcontext():
            items = iter(loader)
        yield from items
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not (workers and tells_of_a_killed_worker(error)):
            raise
        raise OSError(KILLED) from error


KILLED = "a decoding process was killed, perhaps for memory or shared memory; try --workers 0"


def tells_of_a_killed_worker(error: Exception) -> bool:
    """Rather than of what a decoding process raised, which PyTorch raises anew."""
    text = str(error)
    return "DataLoader worker (pid" in text if isinstance(error, RuntimeError) else not text.startswith("Caught ")


@contextlib.contextmanager
def _without_signals() -> Iterator[None]:
    """For the birth of processes, which are the terminal's until `start_worker` has run."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RUN)  # may be interrupted, and has blocked them then
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(_: int) -> None:
    """What a decoding process does first."""
    torch.set_num_threads(1)  # the workers are the parallelism
    signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RUN)
    os.setsid()
    if signal.SIGTERM in _OF_THE_RUN:
        threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(run: Any) -> None:
    """End this process when its run ends or says so. PyTorch's own watch misses a run that is killed as this begins."""
    while run.is_alive():
        told = signal.sigtimedwait({signal.SIGTERM}, 2)
        if told is not None and told.si_pid == run.pid:
            break
    os._exit(0)


def batches(
    dataset: ClipDataset,
    batch_size: int,
    *,
    workers: int = 0,
    seed: int = 0,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
    extras: Extras | None = None,
) -> Iterator[Batch]:
    """Endless batches, the same for the same seed, whatever the number of workers.

    A video that cannot be used is named in the batch's `skipped`, and another one drawn by the same seed takes its
    place. If none can be used, `VideoError` says so.

    Args:
        dataset: the clips.
        batch_size: B.
        workers: processes that decode.
        seed: of the order.
        start: number of the first batch.
        part: (i, n): the i-th of n equal parts of every batch, for the i-th of n processes.
        extras: called for each clip where it is decoded; what it returns is stacked.
    """
    number, count = part
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if batch_size % count:
        raise ValueError(f"batch_size: expected a multiple of the {count} processes, got {batch_size}")
    if dataset.sampling["short"] == "keep":
        raise ValueError("short: expected loop or refuse, as the clips of a batch have one length, got keep")
    size = batch_size // count
    parts = _Parts(batch_size, start, number * size, size)
    slots = _Slots(dataset, seed, extras)
    return _batches(decoded(slots, workers=workers, batch_sampler=parts, collate_fn=_collate))


def _batches(items: Iterator[Batch | Exception]) -> Iterator[Batch]:
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item
