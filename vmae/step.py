"""One pretraining step to plan or to measure: its settings, and the step itself on any model."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vmae.mae import VideoMAE, VideoMAEConfig
from vmae.masking import Grid
from vmae.optimisation import Optimisation, adamw, autocast
from vmae.tokens import TUBELET, Tokens

Preset = Literal["tiny", "small", "base", "large"]
Mark = Callable[[str], None]
PARTS = ("embedding", "encoder", "decoder", "loss", "backward", "optimizer")
"""What a step goes through, in this order; embedding is masks and tubelets too."""


@dataclass(frozen=True)
class Step:
    """A pretraining step: forward, backward, clipping of the gradient and AdamW, on tokens that are given."""

    model: Preset = "base"
    frames: int = 128
    """Frames per clip."""
    size: int = 224
    """Rows and columns, in pixels."""
    budget: float = 0.15
    """Share of all tokens that the decoder reconstructs; 1 stands for all that the encoder does not see."""
    batch: int = 1
    """Clips."""
    precision: Literal["bf16", "fp32"] = "bf16"
    checkpointing: bool = False
    """Keep no activations inside the blocks: less memory, more time."""

    def config(self) -> VideoMAEConfig:
        """Raises `ValueError` for a step that cannot be."""
        if self.batch < 1:
            raise ValueError(f"batch: expected at least 1, got {self.batch}")
        preset: Callable[..., VideoMAEConfig] = getattr(VideoMAEConfig, self.model)
        shares: dict[str, Any] = {"budget": self.budget, "random": min(VideoMAEConfig.random, self.budget)}
        return preset(frames=self.frames, size=self.size, **({"strategy": "none"} if self.budget == 1 else shares))

    @property
    def grid(self) -> Grid:
        return self.frames // TUBELET[0], self.size // TUBELET[1], self.size // TUBELET[2]

    @property
    def tokens(self) -> int:
        """N, of one clip."""
        return math.prod(self.grid)


def inputs(step: Step, device: torch.device | str = "cpu") -> tuple[Tensor, Tokens]:
    """A clip of noise and random tokens: what is in them changes neither time nor memory."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (step.batch, step.frames, step.size, step.size, 3)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator).permute(0, 4, 1, 2, 3)
    n, width = step.tokens, step.config().latent_width
    latents = torch.rand(step.batch, n, width, device=device, generator=generator)
    codes = torch.zeros(step.batch, n, dtype=torch.int32, device=device)
    scores = torch.rand(step.batch, n, device=device, generator=generator)
    return clip, Tokens(latents, codes, scores, step.grid)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """What `vmae pretrain` takes, its state in place, as it is before every step but the first."""
    optimizer = adamw(model, Optimisation(lr=1e-6))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def train(
    loss: Callable[[], Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, precision: str, mark: Mark
) -> Tensor:
    """A training step on what `loss` gives; calls `mark` where backward, optimizer and what comes after begin."""
    device = next(model.parameters()).device
    with autocast(device, precision):
        value = loss()
    mark("backward")
    value.backward()
    mark("optimizer")
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    mark("end")
    return value.detach()


def run(
    model: VideoMAE,
    optimizer: torch.optim.Optimizer,
    clip: Tensor,
    tokens: Tokens,
    precision: str,
    mark: Mark = lambda part: None,
) -> Tensor:
    """A step of ours, the loss; calls `mark` with each of `PARTS` as it begins, and with "end"."""

    def loss() -> Tensor:
        mark("embedding")
        with ExitStack() as hooks:  # gone before the backward, which with checkpointing goes through the blocks again
            for module, part in ((model.blocks[0], "encoder"), (model.to_decoder, "decoder")):
                hooks.enter_context(module.register_forward_pre_hook(lambda *_, part=part: mark(part)))
            hooks.enter_context(model.head.register_forward_hook(lambda *_: mark("loss")))
            return model(clip, tokens, seed=1)

    return train(loss, model, optimizer, precision, mark)
