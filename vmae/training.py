"""Training: the tokenizer and the masked autoencoder, by one loop that logs, saves and stops cleanly."""

import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vmae import checkpoint
from vmae.dataset import ClipDataset, batches
from vmae.mae import VideoMAE, VideoMAEConfig
from vmae.masking import Strategy
from vmae.memory import memory_gib
from vmae.tokenizer import AdaptiveTokenizer, TokenizerConfig
from vmae.tokens import check_clip

LOG, RUN = "log.jsonl", "run.json"


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


@dataclass(frozen=True)
class TokenizerRun:
    """Train an adaptive tokenizer: reconstruct pixels from the tokens that score highest."""

    data: Path
    """Folder of videos, list of `path label` lines, csv with a header, or one video."""
    out: Path
    """Folder for the model, its log and the run's configuration."""
    model: Literal["tiny", "small", "base"] = "base"
    selection: Literal["perturbed", "straight_through"] = "perturbed"
    """How gradients pass the top-k to the scores."""
    clips: Clips = field(default_factory=lambda: Clips(frames=16, size=128))
    optimisation: Optimisation = field(default_factory=lambda: Optimisation(lr=1e-4, beta2=0.99, weight_decay=0.0))
    overwrite: bool = False
    """Replace a run that `out` already holds."""


@dataclass(frozen=True)
class PretrainRun:
    """Pretrain a masked autoencoder on the tokens of a frozen tokenizer."""

    data: Path
    """Folder of videos, list of `path label` lines, csv with a header, or one video."""
    out: Path
    """Folder for the model, its log and the run's configuration."""
    tokenizer: Path | None = None
    """Folder of a trained tokenizer; not needed for pixel targets without the adaptive strategy."""
    model: Literal["tiny", "small", "base", "large"] = "base"
    strategy: Strategy = "adaptive"
    """Which hidden tokens the decoder reconstructs."""
    target: Literal["latent", "pixels"] = "latent"
    mask_ratio: float = 0.9
    """Share of places that the encoder does not see."""
    budget: float = 0.15
    """Share of tokens that the decoder reconstructs."""
    random: float = 0.05
    """Share of tokens that the adaptive strategy draws at random, within the budget."""
    clips: Clips = field(default_factory=Clips)
    optimisation: Optimisation = field(default_factory=Optimisation)
    overwrite: bool = False
    """Replace a run that `out` already holds."""


def check_run(run: TokenizerRun | PretrainRun) -> None:
    """Raise `ValueError` for what can be seen to be wrong before any work."""
    run.clips.check()
    run.optimisation.check()
    checkpoint.check_writable(run.out / RUN)
    if not run.overwrite and any((run.out / name).exists() for name in (LOG, checkpoint.WEIGHTS)):
        raise ValueError(f"{run.out}: already holds a run; choose another --out, or give --overwrite to replace it")


def train_tokenizer(run: TokenizerRun) -> Path:
    """Returns the folder of the trained tokenizer."""
    check_run(run)
    preset: Callable[..., TokenizerConfig] = getattr(TokenizerConfig, run.model)
    torch.manual_seed(run.optimisation.seed)
    model = AdaptiveTokenizer(preset(selection=run.selection))
    return _fit(model, lambda clip, seed: model(clip, seed=seed).loss, run)


def pretrain(run: PretrainRun) -> Path:
    """Returns the folder of the pretrained model."""
    check_run(run)
    needed = run.target == "latent" or run.strategy == "adaptive"
    if needed and run.tokenizer is None:
        raise ValueError(
            f"tokenizer: expected a tokenizer's folder for target {run.target} and strategy {run.strategy}, got none"
        )
    device = device_of(run.optimisation.device)
    tokenizer = None
    if needed and run.tokenizer is not None:
        tokenizer = checkpoint.load(AdaptiveTokenizer, run.tokenizer, device)
    preset: Callable[..., VideoMAEConfig] = getattr(VideoMAEConfig, run.model)
    settings: dict[str, Any] = {"latent_width": len(tokenizer.config.levels)} if tokenizer else {}
    config = preset(
        frames=run.clips.frames,
        size=run.clips.size,
        strategy=run.strategy,
        target=run.target,
        mask_ratio=run.mask_ratio,
        budget=run.budget,
        random=run.random if run.strategy == "adaptive" else 0.0,
        **settings,
    )
    torch.manual_seed(run.optimisation.seed)
    model = VideoMAE(config)

    def loss_of(clip: Tensor, seed: int) -> Tensor:
        return model(clip, tokenizer.encode(clip) if tokenizer else None, seed=seed)

    return _fit(model, loss_of, run)


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


def _fit(model: Any, loss_of: Callable[[Tensor, int], Tensor], run: TokenizerRun | PretrainRun) -> Path:
    """Train `model` on `loss_of(clip, seed)`; writes configuration, log and checkpoints to `run.out`."""
    options, out = run.optimisation, run.out
    source = run.clips
    dataset = ClipDataset(
        run.data,
        frames=source.frames,
        size=source.size,
        fps=source.fps,
        stride=source.stride,
        short=source.short,
        seed=options.seed,
    )
    device = device_of(options.device)
    model.to(device).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), fused=True)
    skipped: list[str] = []
    clips = _on_device(
        batches(dataset, options.batch_size, workers=source.workers, seed=options.seed, skipped=skipped), device
    )
    clips = itertools.chain([next(clips)], clips)  # videos that cannot be used show before anything is written
    _clear(out)
    checkpoint.write_text(out / RUN, json.dumps(asdict(run), indent=2, default=str) + "\n")
    told: set[str] = set()
    step = 0
    with open(out / LOG, "w", encoding="utf-8") as log, _progress(options.steps, out.name) as bar:
        try:
            for step in range(options.steps):
                begin = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, options)
                loss = _backward(loss_of, clips, step, options, device)
                norm = float(nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm))
                if not math.isfinite(loss) or not math.isfinite(norm):
                    raise TrainingError(
                        f"step {step}: expected a finite loss and gradient, got {loss} and {norm}; "
                        f"{out} holds the last checkpoint, if there was one; try a lower --lr"
                    )
                optimizer.step()
                optimizer.zero_grad()
                rate = options.batch_size * options.accumulate / (time.perf_counter() - begin)
                for reason in set(skipped) - told:
                    bar.write(f"skipped: {reason}", file=sys.stderr)
                told.update(skipped)
                line = {
                    "step": step,
                    "loss": loss,
                    "lr": learning_rate(step, options),
                    "grad_norm": norm,
                    "clips_per_s": round(rate, 3),
                    "memory_gib": round(memory_gib(device), 3),
                    "skipped": len(skipped),
                }
                log.write(json.dumps(line) + "\n")
                log.flush()
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:.2f} clips/s, {line['memory_gib']:.2f} GiB", refresh=False)
                bar.update()
                if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
                    checkpoint.save(model, out)
        except KeyboardInterrupt:
            if step == 0:
                raise KeyboardInterrupt("stopped before the first step was done") from None
            checkpoint.save(model, out)
            raise KeyboardInterrupt(f"stopped at step {step}; the model so far is in {out}") from None
    if told:
        print(f"skipped {len(told)} videos that could not be used", file=sys.stderr)
    return out


def _backward(
    loss_of: Callable[[Tensor, int], Tensor],
    clips: Iterator[Tensor],
    step: int,
    options: Optimisation,
    device: torch.device,
) -> float:
    """Accumulate one step's gradients; returns the mean loss."""
    total = 0.0
    for part in range(options.accumulate):
        seed = (options.seed << 32) + step * options.accumulate + part
        with autocast(device, options.precision):
            loss = loss_of(next(clips), seed)
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
