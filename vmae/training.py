"""The training loop: it logs, saves, leaves out what is not finite, and stops cleanly."""

import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vmae import checkpoint
from vmae.dataset import ClipDataset, batches
from vmae.memory import memory_gib
from vmae.tokens import check_clip
from vmae.video import Start

LOG, RUN = "log.jsonl", "run.json"
PATIENCE = 5  # steps without a number, in a row
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
    workers: int = 1
    """Processes that decode."""

    def check(self) -> None:
        """Raise `ValueError` for a setting out of range: not at construction, which the command line reports badly."""
        check_clip(self.frames, self.size)
        if self.workers < 0:
            raise ValueError(f"workers: expected at least 0, got {self.workers}")


@dataclass(frozen=True)
class Optimisation:
    """AdamW with linear warm-up and cosine decay."""

    steps: int = 10_000
    batch_size: int = 1
    """Clips per forward pass."""
    accumulate: int = 1
    """Forward passes per step."""
    lr: float = 3e-4
    """Peak learning rate."""
    warmup: int = 500
    """Steps of linear warm-up; at most a tenth of all steps."""
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    precision: Literal["bf16", "fp32"] = "bf16"
    save_every: int = 500
    """Steps between checkpoints; there is always one at the end."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def check(self) -> None:
        """Raise `ValueError` for a setting out of range."""
        for name in ("steps", "batch_size", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number from 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number from 0 to below 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed: expected an integer from 0 to 2^31 - 1, got {self.seed}")


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


def check_run(run: Run) -> None:
    """Raise `ValueError` for what can be seen to be wrong before any work."""
    run.clips.check()
    run.optimisation.check()
    checkpoint.check_writable(run.out / RUN)
    if not run.overwrite and any((run.out / name).exists() for name in (LOG, checkpoint.WEIGHTS)):
        raise ValueError(f"{run.out}: already holds a run; choose another --out, or give --overwrite to replace it")


def device_of(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected cuda to be available, this PyTorch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def learning_rate(step: int, options: Optimisation) -> float:
    """Of step 0 to steps - 1: a linear rise to the peak, then half a cosine down to a hundredth of it."""
    warmup = min(options.warmup, options.steps // 10)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / max(options.steps - warmup, 1)
    return options.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


class Task:
    """What a run trains. The loop calls, in each step, `loss` for every forward pass, then `updated`."""

    def __init__(self, model: Any):
        self.model = model

    def loss(self, clip: Tensor, *, step: int, seed: int) -> Tensor:
        """The scalar to minimise for a batch of clips."""
        raise NotImplementedError

    def updated(self, step: int) -> dict[str, Any]:
        """After the optimizer's step: what else is to be done, and figures for the log."""
        return {}

    def save(self, out: Path) -> dict[str, Any]:
        """Write what is worth keeping so far; returns figures for the log."""
        checkpoint.save(self.model, out)
        return {}

    def stopped(self, out: Path) -> None:
        """Write what is worth keeping at once: the run is being stopped."""
        self.save(out)


def clips_of(run: Run, start: Start = "random") -> ClipDataset:
    """The clips that a run's settings name."""
    settings = asdict(run.clips)
    del settings["workers"]
    return ClipDataset(run.data, start=start, seed=run.optimisation.seed, **settings)


def fit(task: Task, dataset: ClipDataset, run: Run) -> Path:
    """Train on the clips of a dataset; writes configuration, log and checkpoints to `run.out`, and returns it.

    A step whose loss or gradient is not finite changes nothing; `PATIENCE` of them in a row end the run.
    """
    options, out = run.optimisation, run.out
    device = device_of(options.device)
    model = task.model.to(device).train()
    optimizer = adamw(model, options)
    skipped: list[str] = []
    clips = _on_device(
        batches(dataset, options.batch_size, workers=run.clips.workers, seed=options.seed, skipped=skipped), device
    )
    clips = itertools.chain([next(clips)], clips)  # videos that cannot be used show before anything is written
    _clear(out)
    checkpoint.write_text(out / RUN, json.dumps(asdict(run), indent=2, default=str) + "\n")
    told: set[str] = set()
    step = failures = 0
    with open(out / LOG, "w", encoding="utf-8") as log, _progress(options.steps, out.name) as bar:
        try:
            for step in range(options.steps):
                begin = time.perf_counter()
                set_learning_rate(optimizer, step, options)
                loss = _backward(task, clips, step, options, device)
                norm = float(nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm))
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
                rate = options.batch_size * options.accumulate / (time.perf_counter() - begin)
                for reason in set(skipped) - told:
                    bar.write(f"skipped: {reason}", file=sys.stderr)
                told.update(skipped)
                if not finite:
                    bar.write(f"step {step}: loss {loss}, gradient {norm}: left out", file=sys.stderr)
                line |= {"clips_per_s": round(rate, 3), "memory_gib": round(memory_gib(device), 3)}
                line |= {"skipped": len(skipped)}
                if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
                    line |= task.save(out)
                log.write(json.dumps(line) + "\n")
                log.flush()
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:.2f} clips/s, {line['memory_gib']:.2f} GiB", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            if step == 0:
                raise KeyboardInterrupt("stopped before the first step was done") from None
            task.stopped(out)
            raise KeyboardInterrupt(f"stopped at step {step}; the model so far is in {out}") from None
    if told:
        print(f"skipped {len(told)} videos that could not be used", file=sys.stderr)
    return out


def adamw(model: nn.Module, options: Optimisation) -> torch.optim.AdamW:
    """Weight decay for matrices and kernels, none for the rest."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, options: Optimisation) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, options)


def _backward(task: Task, clips: Iterator[Tensor], step: int, options: Optimisation, device: torch.device) -> float:
    """Accumulate one step's gradients; returns the mean loss."""
    total = 0.0
    for part in range(options.accumulate):
        seed = (options.seed << 32) + step * options.accumulate + part
        with autocast(device, options.precision):
            loss = task.loss(next(clips), step=step, seed=seed)
        (loss / options.accumulate).backward()
        total += loss.item() / options.accumulate
    return total


def _on_device(source: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[Tensor]:
    for clip, _ in source:
        yield clip.to(device, non_blocking=True)


def _progress(steps: int, name: str) -> Any:
    # A log file gets a line every 10 seconds, a terminal several a second.
    interval = 0.2 if sys.stderr.isatty() else 10
    bar = tqdm(total=steps, desc=name, unit="step", mininterval=interval, dynamic_ncols=True)
    return contextlib.closing(bar)


def _clear(out: Path) -> None:
    """Remove an earlier run, so that its weights never stand beside this one's configuration."""
    for name in (checkpoint.WEIGHTS, checkpoint.CONFIG, LOG, RUN):
        (out / name).unlink(missing_ok=True)
        for left in out.glob(f".{name}.*.part"):  # by a run that was killed while it wrote
            left.unlink()
