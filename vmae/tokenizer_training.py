"""Training an adaptive tokenizer: pixels, a discriminator, a perceptual distance, averaged weights."""

import copy
import functools
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmae import checkpoint, distributed, resume
from vmae.dataset import Batch, ClipDataset
from vmae.evaluation import Evaluation, code_counts, entropy_bits, evaluate, reconstruction
from vmae.losses import Discriminator, discriminator_loss, generator_loss, perceptual_distance, r1_penalty
from vmae.optimisation import Optimisation, adamw, autocast, device_of, set_learning_rate
from vmae.prediction import to_bytes
from vmae.resume import optimizer_state, part, restore_optimizer
from vmae.tokenizer import AdaptiveTokenizer, TokenizerConfig
from vmae.training import (
    HINT,
    PATIENCE,
    SAMPLE_FRAMES,
    Clips,
    Task,
    TrainingError,
    check_run,
    clips_of,
    fit,
    sample_clip,
)
from vmae.video import VideoError

MOST_ASIDE = 64  # videos to choose the checkpoint by
R1_EVERY = 4  # steps; the penalty counts so many times
PERCEPTUAL_FRAMES = 2  # of each clip
MEMORY = 0.98  # of the running figures by which divergence is seen: some fifty steps
FEWEST_BITS, LOWEST_DISCRIMINATOR_LOSS = 0.05, 0.05


@dataclass(frozen=True)
class TokenizerRun:
    """Train an adaptive tokenizer: reconstruct clips from the tokens that score highest."""

    data: Path
    """Folder of videos, list of `path label` lines, csv with a header, or one video."""
    out: Path = Path("runs/tokenizer")
    """Folder for the model, its log and the run's configuration."""
    model: Literal["tiny", "small", "base"] = "base"
    selection: Literal["perturbed", "straight_through"] = "straight_through"
    """How gradients pass the top-k to the scores."""
    keep: float = 0.49
    """Share of tokens that are kept."""
    keep_all: float = 0.5
    """Share of steps that keep all tokens instead."""
    gan: float = 0.1
    """Weight of the adversarial loss; 0 trains without a discriminator."""
    gan_after: float = 0.5
    """Share of the steps after which the adversarial loss begins."""
    r1: float = 10.0
    """Weight of the discriminator's gradient penalty."""
    perceptual: str | None = None
    """Perceptual distance: a safetensors file with torchvision's VGG16, or `package:callable` such as lpips:LPIPS."""
    perceptual_weight: float = 0.1
    ema: float = 0.999
    """Decay of the averaged weights, which are what is saved; 0 saves the last ones."""
    aside: float = 0.05
    """Share of the videos (64 at most) that are not trained on: the saved model is the one that does best on them."""
    clips: Clips = field(default_factory=lambda: Clips(frames=16, size=128))
    optimisation: Optimisation = field(default_factory=lambda: Optimisation(lr=1e-4, beta2=0.99, weight_decay=0.0))
    overwrite: bool = False
    """Replace a run that `out` already holds."""
    resume: bool = False
    """Go on with the run that `out` holds, from its last checkpoint; begin it if there is none."""

    def check(self) -> None:
        """Raise `ValueError` for a setting out of range."""
        for name, low, high in (("keep", 0, 1), ("keep_all", 0, 1), ("gan_after", 0, 1), ("aside", 0, 0.5)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: expected a number from {low} to {high}, got {getattr(self, name)}")
        for name in ("gan", "r1", "perceptual_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number from 0, got {getattr(self, name)}")
        if self.optimisation.parallel != "ddp":
            raise ValueError(f"parallel: expected ddp for a tokenizer, got {self.optimisation.parallel}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a number from 0 to below 1, got {self.ema}")


def train_tokenizer(run: TokenizerRun) -> Path:
    """Returns the folder of the trained tokenizer."""
    run.check()
    distributed.start(device_of(run.optimisation.device))
    check_run(run)
    dataset = clips_of(run)
    count = min(int(run.aside * len(dataset)), MOST_ASIDE)
    dataset, aside = dataset.split(count, seed=run.optimisation.seed)
    resume.check(run, dataset)
    preset: Callable[..., TokenizerConfig] = getattr(TokenizerConfig, run.model)
    config = preset(selection=run.selection, keep=run.keep)
    task = _TokenizerTraining(initialised(config, run.optimisation.seed), run, _clips(aside))
    for missing, consequence in (
        (run.perceptual is None, "no perceptual loss: --perceptual names its weights"),
        (not task.aside, "no videos are set aside (--aside): the last weights are kept, not the best"),
    ):
        if missing:
            distributed.say(consequence)
    return fit(task, dataset, run)


def _clips(dataset: ClipDataset) -> list[Tensor]:
    """One clip uint8 [1, 3, T, H, W] of each video that can be used; the others are named."""
    clips = []
    for index in range(len(dataset)):
        try:
            clips.append(dataset[index][0][None])
        except VideoError as error:
            print(f"skipped: {error}", file=sys.stderr)
    return clips


def initialised(config: TokenizerConfig, seed: int) -> AdaptiveTokenizer:
    """The tokenizer that a run of this seed starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AdaptiveTokenizer(config)


def _seed_of(folder: Path) -> int:
    """The seed of the run that left a tokenizer; 0 if it left no such word."""
    try:
        return int(json.loads((folder / checkpoint.RUN).read_text(encoding="utf-8"))["optimisation"]["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


class _TokenizerTraining(Task):
    kind = "tokenizer"
    unused = True  # the scorer, in steps that keep all tokens

    def __init__(self, model: AdaptiveTokenizer, run: TokenizerRun, aside: list[Tensor]):
        super().__init__(model)
        self.run, self.aside = run, aside
        self.shown = sample_clip(run)
        self.device = device_of(run.optimisation.device)
        self.distance = perceptual_distance(run.perceptual).to(self.device) if run.perceptual else None
        self.average = copy.deepcopy(model).to(self.device).eval().requires_grad_(False)
        self.best, self.adversarial = math.inf, False  # least error aside so far, and whether under the adversary
        self.gan_start = round(run.gan_after * run.optimisation.steps) if run.gan else run.optimisation.steps
        if run.gan:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(run.optimisation.seed)
                self.discriminator = Discriminator(model.config.width).to(self.device)
            # Without momentum, which makes the two chase each other (MAGVIT's setting).
            self.discriminator_optimizer = adamw(self.discriminator, replace(run.optimisation, beta1=0.0))
        self.discriminator_loss, self.failures = 2 * math.log(2), 0  # running; steps without a number, in a row
        self.counts = torch.zeros((), device=self.device)  # of codes, running
        self.step, self.passes = -1, list[tuple[Tensor, Tensor]]()  # real and fake clips of this step
        self.figures: dict[str, Any] = {}

    def loss(self, batch: Batch, *, step: int, seed: int, row: int) -> Tensor:
        run, model, clip = self.run, self.model, batch.clips
        keep = 1.0 if random.Random(f"{seed}/keep").random() < run.keep_all else run.keep
        output = self.parallel(clip, seed=seed, keep=keep, row=row)
        total = output.loss
        if step != self.step:
            self.step, self.passes = step, []
        self.figures = {"keep": keep, "pixels": output.pixels.detach()}  # read when the backward is under way
        counts = code_counts(output.codes, model.config.levels, output.weights.detach())
        self.counts = distributed.total(counts) + MEMORY * self.counts
        real = model.normalised(clip)
        if self.distance is not None:
            perceptual = self._perceptual(real, output.reconstruction, seed=seed)
            total = total + run.perceptual_weight * perceptual
            self.figures["perceptual"] = perceptual.detach()
        if step >= self.gan_start:
            self.discriminator.requires_grad_(False)
            adversarial = generator_loss(self.discriminator(output.reconstruction))
            total = total + run.gan * adversarial
            self.figures["adversarial"] = adversarial.detach()
            self.passes.append((real, output.reconstruction.detach()))
        return total

    def _perceptual(self, real: Tensor, fake: Tensor, *, seed: int) -> Tensor:
        """Distance of a few frames of two batches of clips in [-1, 1]; 0 without such a loss."""
        if self.distance is None:
            return torch.zeros(())
        count = min(PERCEPTUAL_FRAMES, real.shape[2])
        frames = random.Random(f"{seed}/frames").sample(range(real.shape[2]), count)
        pictures = (video[:, :, frames].transpose(1, 2).flatten(0, 1) for video in (real, fake))
        return self.distance(*pictures).float().mean()

    def updated(self, step: int) -> dict[str, Any]:
        decay = min(self.run.ema, (1 + step) / (10 + step))  # the first steps are soon forgotten
        for averaged, current in zip(self.average.parameters(), self.model.parameters(), strict=True):
            averaged.data.lerp_(current.data, 1 - decay)
        if step >= self.gan_start:
            self._train_discriminator(step)
        means = distributed.mean((float(value) for value in self.figures.values()), self.device)
        return dict(zip(self.figures, means, strict=True)) | {"entropy": self._check_codes(step)}

    def _train_discriminator(self, step: int) -> None:
        run = self.run
        self.discriminator.requires_grad_(True)
        set_learning_rate(self.discriminator_optimizer, step, run.optimisation)
        total = 0.0
        for real, fake in self.passes:
            with autocast(self.device, run.optimisation.precision):
                loss = discriminator_loss(self.discriminator(real), self.discriminator(fake))
            penalty = R1_EVERY * run.r1 * r1_penalty(self.discriminator, real) if step % R1_EVERY == 0 else 0.0
            ((loss + penalty) / len(self.passes)).backward()
            total += loss.item() / len(self.passes)
        (total,) = distributed.mean((total,), self.device)
        distributed.average_gradients(self.discriminator)
        norm = float(nn.utils.clip_grad_norm_(self.discriminator.parameters(), run.optimisation.clip_norm))
        finite = math.isfinite(total) and math.isfinite(norm)
        if finite:
            self.discriminator_optimizer.step()
            self.figures["discriminator"] = total
            self.discriminator_loss = MEMORY * self.discriminator_loss + (1 - MEMORY) * total
        self.discriminator_optimizer.zero_grad()
        self.failures = 0 if finite else self.failures + 1
        if self.failures == PATIENCE:
            raise TrainingError(
                f"step {step}: the discriminator diverged: expected a finite loss and gradient, got {total} and "
                f"{norm}, {PATIENCE} times in a row; {HINT.format(run.out)}; try a lower --lr"
            )
        if self.discriminator_loss < LOWEST_DISCRIMINATOR_LOSS:
            raise TrainingError(
                f"step {step}: the discriminator has won: its loss was {self.discriminator_loss:.3f} of late "
                f"(1.386 is a draw); {HINT.format(run.out)}; try a higher --r1 or --gan-after"
            )

    def _check_codes(self, step: int) -> list[float]:
        bits = entropy_bits(self.counts)
        if step >= min(200, self.run.optimisation.steps // 2) and min(bits) < FEWEST_BITS:
            raise TrainingError(
                f"step {step}: the codes have collapsed: dimension {bits.index(min(bits))} of {len(bits)} carried "
                f"{min(bits):.3f} bits of late; {HINT.format(self.run.out)}; try a lower --lr"
            )
        return [round(b, 3) for b in bits]

    def save(self, out: Path) -> dict[str, Any]:
        if not self.aside:
            checkpoint.save(self.average, out)
            return {}
        error = self._error_aside()
        # Pixel error cannot judge what the adversary adds: without a perceptual distance the newest model is kept.
        newest = self.step >= self.gan_start and self.distance is None
        if self.adversarial != (self.step >= self.gan_start):
            self.adversarial, self.best = True, math.inf  # models that did not see the adversary no longer compete
        if chosen := newest or error < self.best:
            checkpoint.save(self.average, out)
            self.best = error
        return {"aside": error, "chosen": chosen}

    @torch.no_grad()
    def sample(self) -> list[Tensor]:
        """Of 16 frames at most: the video, and what all tokens and those kept give."""
        if self.shown is None:
            return []
        clip = self.shown[:, :, :SAMPLE_FRAMES].to(self.device)
        with autocast(self.device, self.run.optimisation.precision):
            tokens = self.average.encode(clip)
            made = [reconstruction(self.average, tokens, name) for name in ("all", "adaptive")]
        return [clip[0].cpu(), *(to_bytes(video)[0] for video in made)]

    def stopped(self, out: Path) -> None:
        if not (out / checkpoint.WEIGHTS).exists():  # else the best one so far is there
            checkpoint.save(self.average, out)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"average/{name}": value for name, value in self.average.state_dict().items()}
        tensors["counts"] = self.counts
        if self.run.gan:
            tensors |= {f"discriminator/{name}": value for name, value in self.discriminator.state_dict().items()}
            tensors |= {f"optimizer/{k}": v for k, v in optimizer_state(self.discriminator_optimizer).items()}
        # json has no infinity
        best = None if self.best == math.inf else self.best
        facts = {"best": best, "adversarial": self.adversarial, "discriminator_loss": self.discriminator_loss}
        return tensors, facts | {"failures": self.failures}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.average.load_state_dict(part(tensors, "average"))
        self.counts = tensors["counts"].to(self.device)
        if self.run.gan:
            restore_optimizer(self.discriminator_optimizer, part(tensors, "optimizer"))
            self.discriminator.load_state_dict(part(tensors, "discriminator"))
        self.best = math.inf if facts["best"] is None else facts["best"]
        self.adversarial, self.failures = facts["adversarial"], facts["failures"]
        self.discriminator_loss = facts["discriminator_loss"]

    @torch.no_grad()
    def _error_aside(self) -> float:
        """The mean loss without its adversarial part on the clips set aside, with all tokens and with the best."""
        errors = []
        for clip in self.aside:
            clip = clip.to(self.device)
            with autocast(self.device, self.run.optimisation.precision):
                tokens, real = self.average.encode(clip), self.average.normalised(clip)
                for name in ("all", "adaptive"):
                    fake = 2 * reconstruction(self.average, tokens, name) - 1
                    perceptual = self.run.perceptual_weight * self._perceptual(real, fake, seed=0)
                    errors.append((F.mse_loss(fake.float(), real) + perceptual).item())
        return sum(errors) / len(errors)


def evaluated(folder: Path, run: TokenizerRun) -> Evaluation:
    """Measure the tokenizer in a folder on the clips of a run, from the middle of its videos."""
    run.clips.check()
    device = device_of(run.optimisation.device)
    tokenizer = checkpoint.load(AdaptiveTokenizer, folder, device)
    dataset = clips_of(run, start="center")
    untrained = initialised(tokenizer.config, _seed_of(folder)).to(device).eval()
    context = functools.partial(autocast, device, run.optimisation.precision)
    return evaluate(tokenizer, dataset, untrained=untrained, autocast=context)
