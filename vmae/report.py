"""Figures of a training run and of a clip: losses, and where something moves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from vmae import checkpoint
from vmae.tokens import TUBELET


def loss_plot(logs: Mapping[str, Path], out: str | Path) -> None:
    """Draw the losses of training logs, each under its title, one beside the other, to a PNG file."""
    figure = Figure(figsize=(5 * len(logs), 3.2), layout="constrained")
    for axes, (title, log) in zip(np.atleast_1d(figure.subplots(1, len(logs))), logs.items(), strict=True):
        losses = read_losses(log)
        width = max(len(losses) // 20, 1)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(losses, color="0.8", linewidth=0.8, label="each step")
        axes.plot(np.arange(len(smooth)) + width - 1, smooth, color="tab:blue", label=f"mean of {width}")
        axes.set(title=title, xlabel="step", ylabel="loss")
        axes.legend(frameon=False)
    with checkpoint.replacing(out) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def read_log(log: Path) -> list[dict[str, Any]]:
    """The lines of a training log; one that a kill cut short does not count."""
    lines = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def read_losses(log: Path) -> list[float]:
    """The losses of a training log, of a tokenizer those of the pixels."""
    # None is a step that was left out.
    return [float(line.get("pixels", line["loss"])) for line in read_log(log) if line["loss"] is not None]


def motion(clip: Tensor) -> np.ndarray:
    """[T', H', W']: how much each token's brightness differs from the token a latent frame earlier; 0 in the first."""
    gray = clip[0].float().mean(0).numpy()
    t, h, w = (n // s for n, s in zip(gray.shape, TUBELET, strict=True))
    tubelets = gray.reshape(t, TUBELET[0], h, TUBELET[1], w, TUBELET[2])
    change = np.zeros((t, h, w), dtype=np.float32)
    change[1:] = np.abs(np.diff(tubelets, axis=0)).mean(axis=(1, 3, 5))
    return change
