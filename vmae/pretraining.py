"""Pretraining a masked autoencoder on the tokens of a frozen tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vmae import checkpoint
from vmae.mae import VideoMAE, VideoMAEConfig
from vmae.masking import Strategy
from vmae.tokenizer import AdaptiveTokenizer
from vmae.training import Clips, Optimisation, Task, check_run, clips_of, device_of, fit


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
    return fit(_Pretraining(VideoMAE(config), tokenizer), clips_of(run), run)


class _Pretraining(Task):
    def __init__(self, model: VideoMAE, tokenizer: AdaptiveTokenizer | None):
        super().__init__(model)
        self.tokenizer = tokenizer

    def loss(self, clip: Tensor, *, step: int, seed: int) -> Tensor:
        return self.model(clip, self.tokenizer.encode(clip) if self.tokenizer else None, seed=seed)
