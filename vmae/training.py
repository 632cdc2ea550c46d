"""The training loop: it logs, saves, leaves out what is not finite, stops cleanly and goes on where it stopped."""

import contextlib
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vmae import checkpoint, distributed, resume
from vmae.checkpoint import LOG, RUN
from vmae.dataset import Batch, ClipDataset, Extras, batches
from vmae.loader import Loader
from vmae.memory import memory_gib
from vmae.optimisation import Optimisation, adamw, autocast, device_of, learning_rate, set_learning_rate
from vmae.tokens import check_clip
from vmae.video import PLAIN, Augmentation, Start, VideoError
from vmae.watching import REPORT, SAMPLE, SAMPLES, times, write_report, write_sample

PATIENCE = 5  # steps without a number, in a row
SAMPLE_FRAMES = 16  # of a sample
HINT = "{} holds the last checkpoint, if there was one"


class TrainingError(ValueError):
    """A run that cannot go on: one line that says at which step and why."""


@dataclass(frozen=True)
class Clips:
    """How clips are taken from the videos."""

    frames: int = 128
    """Frames per clip."""
    size: int = 224
    """Rows and columns, in pixels."""
    stride: int = 1
    """Take every n-th frame."""
    fps: float | None = None
    """Sample by time at this rate instead."""
    short: Literal["loop", "refuse"] = "loop"
    """What to do with a video shorter than a clip: begin again at its start, or skip it."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    workers: int = 1
    """Processes that decode."""

    def check(self) -> None:
        """Raise `ValueError` for a setting out of range: not at construction, which the command line reports badly."""
        check_clip(self.frames, self.size)
        if self.short not in ("loop", "refuse"):
            raise ValueError(
                f"short: expected loop or refuse, as the clips of a batch have one length, got {self.short}"
            )
        self.augmentation.check()
        if self.workers < 0:
            raise ValueError(f"workers: expected at least 0, got {self.workers}")


class Run(Protocol):
    """What the settings of every kind of run have."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def data(self) -> Path: ...
    @property
    def out(self) -> Path: ...
    @property
    def clips(self) -> Clips: ...
    @property
    def optimisation(self) -> Optimisation: ...
    @property
    def overwrite(self) -> bool: ...
    @property
    def resume(self) -> bool: ...


def check_run(run: Run) -> None:
    """Raise `ValueError` for what can be seen to be wrong before any work."""
    run.clips.check()
    run.optimisation.check()
    checkpoint.check_writable(run.out / RUN)
    if run.out.resolve() == run.data.resolve():
        raise ValueError(f"out: expected another folder than the videos', got {run.out} for both")
    if run.overwrite and run.resume:
        raise ValueError("resume: expected without --overwrite, which replaces the run that would go on")
    if run.optimisation.batch_size % (processes := distributed.world().size):
        raise ValueError(
            f"batch_size: expected a multiple of the {processes} processes, got {run.optimisation.batch_size}"
        )
    if run.resume or distributed.world().rank > 0:
        return
    if not run.overwrite and any((run.out / name).exists() for name in (LOG, checkpoint.WEIGHTS)):
        raise ValueError(
            f"{run.out}: already holds a run; choose another --out, or give --resume to go on with it or --overwrite "
            "to replace it"
        )


class Task:
    """What a run trains. The loop calls, in each step, `loss` for every forward pass, then `updated`.

    Of several processes each has a task of its own, with a part of every batch; `save` and the rest are called in all.
    """

    kind = ""
    """What the report says that is trained."""
    unused = False
    """Whether some steps leave parameters without a gradient."""

    def __init__(self, model: Any):
        self.model = model
        self.parallel = model
        """What to call in the model's place while training."""

    def loss(self, batch: Batch, *, step: int, seed: int, row: int) -> Tensor:
        """The scalar to minimise for a batch, or for the part of it that begins at clip `row`, on the run's device."""
        raise NotImplementedError

    def updated(self, step: int) -> dict[str, Any]:
        """After the optimizer's step: what else is to be done, and figures for the log."""
        return {}

    def save(self, out: Path) -> dict[str, Any]:
        """Write what is worth keeping so far; returns figures for the log."""
        checkpoint.save(self.model, out)
        return {}

    def sample(self) -> list[Tensor]:
        """Clips uint8 [3, T, H, W] that show what was learned, one below the other; the first process alone asks."""
        return []

    def stopped(self, out: Path) -> None:
        """Write what is worth keeping at once: the run is being stopped."""
        checkpoint.save(self.model, out)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What else than the model and its optimizer a run needs to go on: tensors, and facts that json can hold."""
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take up what `state` gave."""


def clips_of(run: Run, start: Start = "random", data: Path | None = None, views: int = 0) -> ClipDataset:
    """The clips that a run's settings name, of its own data or of others'."""
    clips = run.clips
    return ClipDataset(
        data or run.data, frames=clips.frames, size=clips.size, stride=clips.stride, fps=clips.fps, short=clips.short,
        start=start, augmentation=clips.augmentation if start == "random" else PLAIN, views=views,
        seed=run.optimisation.seed,
    )  # fmt: skip


def sample_clip(run: Run) -> Tensor | None:
    """The clip uint8 [1, 3, T, H, W] that samples are made of: the middle of the first video that can be used."""
    dataset = clips_of(run, start="center")
    for index in range(min(len(dataset), 10)):
        with contextlib.suppress(VideoError):
            return dataset[index][0][None]
    return None


def fit(task: Task, dataset: ClipDataset, run: Run, extras: Extras | None = None) -> Path:
    """Train on the clips of a dataset; writes configuration, log and checkpoints to `run.out`, and returns it.

    A step whose loss or gradient is not finite changes nothing; `PATIENCE` of them in a row end the run. What a step
    draws depends on the settings and on its number alone, so a run that goes on does as if it had never stopped.
    """
    options, out = run.optimisation, run.out
    device = device_of(options.device)
    rank, processes = distributed.world()
    model = task.model.to(device).train()
    task.parallel = distributed.parallel(model, options.parallel, device, unused=task.unused)
    optimizer = adamw(model, options)
    position = resume.restore(task, optimizer, run) if run.resume else resume.Position()
    first, size, skipped, failures = position
    if first == options.steps:
        distributed.say(f"{out}: all {first} steps are done")
        return out
    clips = batches(
        dataset, options.batch_size, workers=run.clips.workers, seed=options.seed, start=first * options.accumulate,
        part=(rank, processes), extras=extras,
    )  # fmt: skip
    # Its first batch is there before anything is written, so that videos that cannot be used show.
    loader = Loader(clips, device, workers=run.clips.workers)
    log = _Log(out / LOG, size)  # from here on the folder is this process's
    if rank == 0:
        _clear(out, first)
        about = {"kind": task.kind, "command": shlex.join(sys.orig_argv), **resume.settings(run, dataset)}
        checkpoint.write_text(out / RUN, json.dumps(about, indent=2) + "\n")

    try:
        with log, _progress(options.steps, first, out.name) as bar, _Signals() as signals:
            for step in range(first, options.steps):
                begin = time.perf_counter()
                set_learning_rate(optimizer, step, options)
                loss = _backward(task, loader, step, options, device)
                norm = float(distributed.whole(nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)))
                loss, skips, stop = distributed.mean((loss, len(loader.skipped), signals.received), device)
                finite = math.isfinite(loss) and math.isfinite(norm)
                failures = 0 if finite else failures + 1
                if failures == PATIENCE:
                    raise TrainingError(
                        f"step {step}: the training diverged: expected a finite loss and gradient, got {loss} and "
                        f"{norm}, {PATIENCE} times in a row; {HINT.format(out)}; try a lower --lr"
                    )
                if finite:
                    optimizer.step()
                optimizer.zero_grad()
                line: dict[str, Any] = {
                    "step": step,
                    "loss": loss if finite else None,
                    "lr": learning_rate(step, options),
                    "grad_norm": norm if finite else None,
                }
                line |= task.updated(step) if finite else {}
                seconds = time.perf_counter() - begin
                rate = options.batch_size * options.accumulate / seconds
                for reason in loader.told():
                    bar.write(f"skipped: {reason}", file=sys.stderr)
                if not finite:
                    bar.write(f"step {step}: loss {loss}, gradient {norm}: left out", file=sys.stderr)
                skipped += round(skips * processes)
                line |= {"clips_per_s": round(rate, 3), "waiting": round(loader.waited / seconds, 3)}
                line |= {"decoded_frames_per_s": round(loader.speed, 1), "memory_gib": round(memory_gib(device), 3)}
                line |= {"skipped": skipped}
                due = (step + 1) % options.save_every == 0 or step + 1 == options.steps
                if due:
                    line |= task.save(out)
                elif stop:
                    task.stopped(out)
                size = log.write(line, lasting=bool(due or stop))
                if due or stop:
                    position = resume.Position(step + 1, size, skipped, failures)
                    resume.save(task, optimizer, out, position)
                if due and rank == 0:
                    _sample(task, out, step + 1)
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:.2f} clips/s, {line['memory_gib']:.2f} GiB", refresh=False)
                bar.update()
                loader.next_step(seconds)
                if stop:
                    raise KeyboardInterrupt(f"stopped after {step + 1} steps; the model is in {out}; --resume goes on")
    finally:  # however it ends
        if rank == 0:
            _report(out)
    distributed.say(loader.report(run.clips.size))
    if skipped:
        distributed.say(f"skipped {times(skipped)} a video that could not be used")
    return out


def _sample(task: Task, out: Path, step: int) -> None:
    """Write a picture of what was learned. That there is none, for want of memory say, ends no run."""
    try:
        if rows := task.sample():
            write_sample(out, step, rows)
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        print(f"no sample after step {step}: {' '.join(str(error).split())[:200]}", file=sys.stderr)


def _report(out: Path) -> None:
    try:
        write_report(out)
    except (OSError, ValueError) as error:  # what ended the run is to be seen, not this
        print(f"no report: {error}", file=sys.stderr)


class _Log:
    """A file of json lines, which goes on after its first `size` bytes. Only the first of several processes writes.

    While it is open, another process that would train in the same folder is refused.
    """

    def __init__(self, path: Path, size: int):
        self.file = None
        if distributed.world().rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a+b")  # noqa: SIM115
            _lock(self.file, path.parent)
            self.file.seek(0)
            kept = self.file.read(size)
            if len(kept) < size:
                distributed.say(f"{path}: holds less than at the checkpoint; what is missing stays so")
                size = kept.rfind(b"\n") + 1
            self.file.truncate(size)

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    def write(self, line: dict[str, Any], *, lasting: bool) -> int:
        """Returns the file's size; `lasting` waits for the disk, before a checkpoint that counts on the line."""
        if not self.file:
            return 0
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        if lasting:
            os.fsync(self.file.fileno())
        return self.file.tell()


def _lock(file: BinaryIO, folder: Path) -> None:
    """Until the process ends, however it does, or closes this or any other handle of the file."""
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{folder}: another process is training there; choose another --out") from None
    except (ImportError, OSError):  # a system or a file system without locks
        pass


class _Signals:
    """Ctrl-C and SIGTERM wait for the end of a step; a second one does not."""

    def __init__(self):
        self.received = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        with contextlib.suppress(ValueError):  # not in the main thread: whoever has it sees to signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, *_: object) -> None:
        self.received += 1
        if self.received > 1:
            raise KeyboardInterrupt("stopped at once; --resume goes on from the last checkpoint")
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)


def _backward(task: Task, loader: Loader, step: int, options: Optimisation, device: torch.device) -> float:
    """Accumulate one step's gradients; returns the mean loss of this process's clips."""
    total = 0.0
    rank, processes = distributed.world()
    for part in range(options.accumulate):
        seed = (options.seed << 32) + step * options.accumulate + part
        row = rank * options.batch_size // processes
        with autocast(device, options.precision):
            loss = task.loss(loader.next(), step=step, seed=seed, row=row)
        (loss / options.accumulate).backward()
        total += loss.item() / options.accumulate
    return total


def _progress(steps: int, done: int, name: str) -> Any:
    # A log file gets a line every 10 seconds, a terminal several a second.
    interval = 0.2 if sys.stderr.isatty() else 10
    quiet = distributed.world().rank > 0
    # Within 80 columns: clips/s say what tqdm's own rate would.
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    bar = tqdm(
        total=steps,
        initial=done,
        desc=name,
        bar_format=layout,
        mininterval=interval,
        dynamic_ncols=True,
        disable=quiet,
    )
    return contextlib.closing(bar)


def _clear(out: Path, first: int) -> None:
    """Remove what a kill left half written, and before the first step an earlier run: its weights never stand beside
    this one's configuration."""
    names = (checkpoint.WEIGHTS, checkpoint.CONFIG, RUN, REPORT)
    for left in (path for name in (*names, "state-*") for path in out.glob(f".{name}.*.part")):
        left.unlink()
    samples = out / SAMPLES
    for left in samples.glob(".*.part"):
        left.unlink()
    for later in (path for path in samples.glob("step-*.jpg") if path.name > SAMPLE.format(first)):
        later.unlink()
    if not first:
        checkpoint.clear_states(out)
        for name in names:
            (out / name).unlink(missing_ok=True)
