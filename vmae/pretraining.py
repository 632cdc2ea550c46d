"""Pretraining a masked autoencoder on the tokens of a frozen tokenizer."""

import functools
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vmae import checkpoint, distributed, resume
from vmae.cache import Cache
from vmae.dataset import Batch, ClipDataset, batches, check_usable
from vmae.flow import flow_available
from vmae.mae import VideoMAE, VideoMAEConfig
from vmae.masking import SCORED, Strategy
from vmae.optimisation import Optimisation, autocast, device_of, precision_of
from vmae.prediction import predicted
from vmae.targets import Targets, everest_source, flow_source, tokenizer_source
from vmae.tokenizer import AdaptiveTokenizer
from vmae.tokens import TUBELET
from vmae.training import SAMPLE_FRAMES, Clips, Task, check_run, clips_of, fit, sample_clip
from vmae.video import Augmentation
from vmae.watching import masked

VALIDATION_SEED = 1 << 62  # no step's


@dataclass(frozen=True)
class PretrainRun:
    """Pretrain a masked autoencoder on the tokens of a frozen tokenizer."""

    data: Path
    """Folder of videos, list of `path label` lines, csv with a header, or one video."""
    out: Path = Path("runs/mae")
    """Folder for the model, its log and the run's configuration."""
    tokenizer: Path | None = None
    """Folder of a trained tokenizer; not needed for pixel targets without the adaptive strategy."""
    window: int | None = None
    """Frames that the tokenizer sees at a time; the paper's way is 16. By default it sees all that came before."""
    val: Path | None = None
    """Videos for a validation loss at every checkpoint, on the middle of each."""
    model: Literal["tiny", "small", "base", "large"] = "base"
    init: Path | None = None
    """Folder of a model to begin with, in place of --model: its sizes, and its weights where they fit."""
    strategy: Strategy = "adaptive"
    """Which hidden tokens the decoder reconstructs."""
    target: Literal["latent", "pixels"] = "latent"
    mask_ratio: float = 0.9
    """Share of places that the encoder does not see."""
    budget: float = 0.15
    """Share of tokens that the decoder reconstructs."""
    random: float = 0.05
    """Share of tokens drawn at random, within the budget, by the strategies that take the highest scores."""
    cache: Path | None = None
    """Folder where what the tokenizer says of each view is stored, and so the flow or EVEREST scores."""
    views: int = 0
    """Random views of each video, which come again in turn; 0 draws new ones in every epoch, and cannot be cached."""
    checkpointing: bool = False
    """Keep no activations inside the blocks: less memory, more time."""
    compile: bool = False
    """Compile the blocks, which takes a minute at first; needs a C++ compiler, or Triton on a GPU."""
    clips: Clips = field(default_factory=lambda: Clips(augmentation=Augmentation(crop=0.5, flip=True)))
    optimisation: Optimisation = field(default_factory=Optimisation)
    overwrite: bool = False
    """Replace a run that `out` already holds."""
    resume: bool = False
    """Go on with the run that `out` holds, from its last checkpoint; begin it if there is none."""

    def check(self) -> None:
        """Raise `ValueError` for settings that contradict each other."""
        if self.tokenizer is None and (self.target == "latent" or self.strategy == "adaptive"):
            raise ValueError(
                f"tokenizer: expected a tokenizer's folder for target {self.target} and strategy {self.strategy}, "
                "got none"
            )
        if self.strategy == "flow" and not flow_available():
            raise ValueError("strategy: expected OpenCV for flow, run: pip install opencv-python-headless")
        for name, folder in (("init", self.init), ("tokenizer", self.tokenizer)):
            if folder is not None and folder.resolve() == self.out.resolve():
                raise ValueError(f"{name}: expected another folder than --out, got {folder} for both")
        if self.cache and not self.views:
            raise ValueError(
                "views: expected at least 1 with --cache, which holds so many random views of each video, got 0"
            )


def pretrain(run: PretrainRun) -> Path:
    """Returns the folder of the pretrained model."""
    run.check()
    device = distributed.start(device_of(run.optimisation.device))
    check_run(run)
    model, tokenizer = _model(run).to(device), _tokenizer(run, device)
    targets = _targets(run, model, tokenizer, device)
    dataset, val = _datasets(run)
    resume.check(run, dataset)
    if val:
        check_usable(val)
    _fill(run, targets, dataset, val)
    return fit(_Pretraining(model, tokenizer, targets, val, run, device), dataset, run, targets.extras)


def cache(run: PretrainRun) -> int:
    """Store in the run's cache what its pretraining will read; returns how many views were missing."""
    run.check()
    run.clips.check()
    if run.cache is None:
        raise ValueError("cache: expected a folder, got none")
    device = distributed.start(device_of(run.optimisation.device))
    targets = _targets(run, _model(run).to(device), _tokenizer(run, device), device)
    if not targets.sources:
        raise ValueError(f"cache: expected something to store, target {run.target} and {run.strategy} need nothing")
    return _fill(run, targets, *_datasets(run))


def _model(run: PretrainRun) -> VideoMAE:
    """The model that the run starts from."""
    preset: Callable[..., VideoMAEConfig] = getattr(VideoMAEConfig, run.model)
    settings: dict[str, Any] = {}
    if run.target == "latent" and run.tokenizer is not None:
        settings["latent_width"] = len(checkpoint.load_config(AdaptiveTokenizer, run.tokenizer).levels)
    if run.init is not None:
        start = checkpoint.load(VideoMAE, run.init)
        preset = functools.partial(replace, start.config)
    config = preset(
        frames=run.clips.frames,
        size=run.clips.size,
        strategy=run.strategy,
        target=run.target,
        mask_ratio=run.mask_ratio,
        budget=run.budget,
        random=run.random if run.strategy in SCORED else 0.0,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.optimisation.seed)
        model = VideoMAE(config)
    if run.init is not None:
        mine, theirs = model.state_dict(), start.state_dict()
        model.load_state_dict({k: theirs[k] if theirs[k].shape == v.shape else v for k, v in mine.items()})
    model.checkpointing = run.checkpointing
    if run.compile:
        _check_compiler(device_of(run.optimisation.device))
        for block in (*model.blocks, *model.decoder_blocks):
            block.compile()
    return model


def _check_compiler(device: torch.device) -> None:
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and not shutil.which(compiler):
        raise ValueError(f"compile: expected a C++ compiler, found no {compiler}; set CXX, or leave --compile out")


def _tokenizer(run: PretrainRun, device: torch.device) -> AdaptiveTokenizer | None:
    """The one that targets or scores come from."""
    if run.tokenizer is None or not (run.target == "latent" or run.strategy == "adaptive"):
        return None
    return checkpoint.load(AdaptiveTokenizer, run.tokenizer, device)


def _targets(run: PretrainRun, model: VideoMAE, tokenizer: AdaptiveTokenizer | None, device: torch.device) -> Targets:
    tokens = scores = None
    levels: tuple[int, ...] = ()
    if tokenizer is not None:
        precision, levels = precision_of(run.optimisation.precision, device), tokenizer.config.levels
        tokens = tokenizer_source(tokenizer, functools.partial(autocast, device, precision), precision, run.window)
    if run.strategy == "flow":
        scores = flow_source()
    if run.strategy == "everest" and run.cache:  # what is stored cannot follow the training
        scores = everest_source(model.patch_embed)
    return Targets(tokens, scores, levels=levels, cache=Cache(run.cache) if run.cache else None)


def _datasets(run: PretrainRun) -> tuple[ClipDataset, ClipDataset | None]:
    val = clips_of(run, start="center", data=run.val) if run.val else None
    return clips_of(run, views=run.views), val


def _fill(run: PretrainRun, targets: Targets, dataset: ClipDataset, val: ClipDataset | None) -> int:
    if targets.cache is None:
        return 0
    workers, part = run.clips.workers, distributed.world()
    count = targets.fill(dataset, views=run.views, workers=workers, part=part)
    if val:
        count += targets.fill(val, views=1, workers=workers, part=part)
    distributed.barrier()
    targets.cache.refresh()  # what other processes stored
    return count


class _Pretraining(Task):
    kind = "pretraining"

    def __init__(
        self,
        model: VideoMAE,
        tokenizer: AdaptiveTokenizer | None,
        targets: Targets,
        val: ClipDataset | None,
        run: PretrainRun,
        device: torch.device,
    ):
        super().__init__(model)
        self.tokenizer, self.targets, self.val, self.run, self.device = tokenizer, targets, val, run, device
        self.told: set[str] = set()  # why validation videos were left out
        spread = run.optimisation.parallel == "fsdp" and distributed.world().size > 1  # no process has all weights
        self.shown = None if spread else sample_clip(run)

    def loss(self, batch: Batch, *, step: int, seed: int, row: int) -> Tensor:
        return self._loss(batch, seed, row, "mean")

    def _loss(self, batch: Batch, seed: int, row: int, reduction: str) -> Tensor:
        tokens, scores = self.targets.of(batch, self.device)
        return self.parallel(batch.clips, tokens, scores=scores, seed=seed, row=row, reduction=reduction)

    def save(self, out: Path) -> dict[str, Any]:
        checkpoint.save(self.model, out)
        return {} if self.val is None else {"val_loss": self._validation_loss(self.val)}

    @torch.no_grad()
    def sample(self) -> list[Tensor]:
        """Of the first 16 frames at most: the video, its masks, and what is predicted."""
        if self.shown is None:
            return []
        self.model.eval()
        try:
            with autocast(self.device, self.run.optimisation.precision):
                found = predicted(self.shown.to(self.device), self.model, self.tokenizer, frames=SAMPLE_FRAMES)
        finally:
            self.model.train()
        clip = self.shown[0, :, :SAMPLE_FRAMES]
        n = math.prod(side // step for side, step in zip(clip.shape[1:], TUBELET, strict=True))
        visible, selected = (part[part < n] for part in (found.visible, found.selected))
        return [clip, masked(clip, selected, visible), masked(found.video[0], selected, visible)]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"sources": [source.name for source in self.targets.sources]}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        began, mine = facts["sources"], self.state()[1]["sources"]
        if len(began) != len(mine):  # EVEREST's scores, which only a cache freezes
            expected = "one" if len(began) > len(mine) else "none"
            raise ValueError(f"cache: expected {expected}, as the run in {self.run.out} began with")
        if began != mine:
            raise ValueError(
                f"tokenizer: expected the one that the run in {self.run.out} began with, got another in "
                f"{self.run.tokenizer}"
            )

    @torch.no_grad()
    def _validation_loss(self, val: ClipDataset) -> float:
        """The mean loss over the clips, with the same masks each time; unusable videos are named, once."""
        options, (rank, processes) = self.run.optimisation, distributed.world()
        size, row = options.batch_size, rank * options.batch_size // processes
        clips = batches(val, size, workers=self.run.clips.workers, part=(rank, processes), extras=self.targets.extras)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.model.eval()
        for number in range(math.ceil(len(val) / size)):
            batch = next(clips).to(self.device)
            with autocast(self.device, options.precision):
                losses = self._loss(batch, VALIDATION_SEED + number, row, "none")
            # The last batch's end is the next epoch's, and a substitute counts where it has its own place.
            counted = batch.own & (number * size + row + torch.arange(len(batch.own)) < len(val))
            sums += torch.stack((losses, torch.ones_like(losses)), 1)[counted.to(self.device)].double().sum(0)
            for reason in batch.skipped:
                if reason not in self.told:
                    self.told.add(reason)
                    print(f"skipped in validation: {reason}", file=sys.stderr)
        self.model.train()
        loss, count = distributed.total(sums).tolist()
        return loss / count
