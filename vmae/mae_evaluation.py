"""What a masked autoencoder has learned: its loss beside that of guesses, on the tokens that each strategy selects."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vmae import checkpoint
from vmae.dataset import ClipDataset
from vmae.flow import flow_available, flow_scores
from vmae.mae import VideoMAE, everest_scores
from vmae.masking import SCORED, STRATEGIES, Grid, Strategy, TubeMask, select, tube_mask
from vmae.motion import motion
from vmae.optimisation import autocast, device_of
from vmae.pretraining import PretrainRun
from vmae.tokenizer import AdaptiveTokenizer
from vmae.tokens import Tokens, check_video
from vmae.training import clips_of
from vmae.video import VideoError


@dataclass(frozen=True)
class Selected:
    """Means over clips, for the tokens that one strategy selects."""

    tokens: int
    loss: float
    """Mean squared error of the model."""
    constant: float
    """Of the constant that is best for these very tokens: their variance."""
    position: float
    """Of the mean at the same position over the training clips."""
    nearest: float
    """Of a copy of the nearest visible token's target."""
    motion: float
    """Share of the hidden tokens' change in brightness."""
    overlap: float
    """Share of them that the adaptive strategy selects too; of all tokens, for a strategy that selects more."""


@dataclass(frozen=True)
class MaeEvaluation:
    model: str
    trained_with: str
    """The model's own strategy."""
    target: str
    clips: int
    skipped: list[str]
    """Why a video was left out, one line each."""
    frames: int
    size: int
    strategies: dict[Strategy, Selected]


def nearest_visible(mask: TubeMask, grid: Grid) -> Tensor:
    """For every token the visible one nearest to it, int64 [B, N]: in its own latent frame, the first of several.

    Tubes are visible in every latent frame, so that no other frame holds a nearer one.
    """
    frames, height, width = grid
    places = height * width
    visible = mask.visible[:, : mask.visible.shape[1] // frames]  # those of the first latent frame
    every = torch.arange(places, device=visible.device)
    rows, columns = every // width, every % width
    y, x = visible // width, visible % width
    distance = (rows[None, :, None] - y[:, None]) ** 2 + (columns[None, :, None] - x[:, None]) ** 2
    place = visible.gather(1, distance.argmin(2))  # [B, P]
    return (torch.arange(frames, device=visible.device)[:, None] * places + place[:, None]).flatten(1)


@torch.no_grad()
def evaluated_mae(folder: Path, run: PretrainRun) -> MaeEvaluation:
    """Measure the model in a folder on the middle of the videos in `run.val`; `run.data` are those it was trained on.

    Masks are drawn by the number of the clip, the same for every model. Flow is left out without OpenCV.

    Raises:
        ValueError: no validation videos, or no tokenizer where there is need of one; a model cannot be read.
    """
    run.clips.check()
    if run.val is None:
        raise ValueError("val: expected videos to evaluate on, got none")
    if run.tokenizer is None:
        raise ValueError("tokenizer: expected a tokenizer's folder, whose scores are compared, got none")
    device = device_of(run.optimisation.device)
    model = checkpoint.load(VideoMAE, folder, device)
    tokenizer = checkpoint.load(AdaptiveTokenizer, run.tokenizer, device)
    context = functools.partial(autocast, device, run.optimisation.precision)
    if model.config.target == "latent" and (found := len(tokenizer.config.levels)) != model.config.latent_width:
        raise ValueError(
            f"tokenizer: expected latents of {model.config.latent_width} numbers, as the model in {folder} predicts, "
            f"got one of {found}"
        )
    skipped: list[str] = []

    def clips(dataset: ClipDataset, name: str) -> Iterator[tuple[Tensor, Tokens]]:
        for index in tqdm(range(len(dataset)), desc=name, unit="clip", dynamic_ncols=True):
            try:
                clip = dataset[index][0][None].to(device)
            except VideoError as error:
                skipped.append(str(error))
                continue
            with context():
                tokens = tokenizer.encode(clip, window=run.window)
            yield clip, tokens

    def targets(clip: Tensor, tokens: Tokens) -> Tensor:
        """Of all tokens [N, L]."""
        n = math.prod(tokens.grid)
        return model.target(clip, tokens, torch.arange(n, device=device)[None])[0]

    total, count = torch.zeros(()), 0
    for clip, tokens in clips(clips_of(run, start="center"), "training clips"):
        total, count = total.to(device) + targets(clip, tokens), count + 1
    if not count:
        raise VideoError(f"{run.data}: none of its videos could be used; the last one: {skipped[-1]}")
    positions = total / count

    strategies: list[Strategy] = [strategy for strategy in STRATEGIES if strategy != "flow" or flow_available()]
    figures: dict[Strategy, list[list[float]]] = {strategy: [] for strategy in strategies}
    moments: dict[Strategy, Tensor] = {}  # number, sum and sum of squares of the targets, for the best constant
    number = 0
    for number, (clip, tokens) in enumerate(clips(clips_of(run, start="center", data=run.val), "validation clips"), 1):
        config, grid = model.config, check_video(clip)
        mask = tube_mask(grid, 1, mask_ratio=config.mask_ratio, seed=number, device=device)
        wanted, near = targets(clip, tokens), nearest_visible(mask, grid)[0]
        moved = torch.from_numpy(motion(clip.cpu())).flatten().to(device)
        scores = {
            "adaptive": tokens.scores,
            "everest": everest_scores(clip, model.patch_embed),
            "flow": flow_scores(clip).to(device) if "flow" in strategies else None,
        }
        adaptive: Tensor | None = None
        for strategy in strategies:
            shares = {"budget": config.budget, "random": run.random if strategy in SCORED else 0.0}
            # What each draws at random is its own, or what they share by chance would not be.
            seed = (strategies.index(strategy) << 32) + number
            chosen = select(strategy, mask.hidden, grid, **shares, seed=seed, scores=scores.get(strategy))
            with context():
                prediction = model.predict(clip, mask.visible, chosen)[0].float()
            picked = chosen[0]
            adaptive = picked if adaptive is None else adaptive
            truth = wanted[picked]
            errors = [
                (guess - truth).square().mean() for guess in (prediction, positions[picked], wanted[near[picked]])
            ]
            share = moved[picked].sum() / moved[mask.hidden[0]].sum().clamp_min(1e-9)
            overlap = torch.isin(picked, adaptive).float().mean()
            figures[strategy].append([float(x) for x in (*errors, share, overlap)])
            moment = torch.stack((torch.full_like(truth[0], len(truth)), truth.sum(0), truth.square().sum(0))).double()
            moments[strategy] = moments.get(strategy, 0) + moment
    if not number:
        raise VideoError(f"{run.val}: none of its videos could be used; the last one: {skipped[-1]}")
    rows = {}
    for strategy, clips_figures in figures.items():
        loss, position, nearest, share, overlap = torch.tensor(clips_figures, dtype=torch.float64).mean(0).tolist()
        n, sums, squares = moments[strategy]
        constant = float((squares / n - (sums / n).square()).mean())
        rows[strategy] = Selected(int(n[0]) // number, loss, constant, position, nearest, share, overlap)
    return MaeEvaluation(
        str(folder), model.config.strategy, model.config.target, number, skipped, run.clips.frames, run.clips.size, rows
    )


def mae_table(result: MaeEvaluation) -> str:
    """The figures as text."""
    head = ("tokens of", "tokens", "model", "constant", "position", "nearest", "motion", "overlap")
    lines = [
        f"{result.model}: trained with {result.trained_with}; {result.clips} clips of {result.frames} frames, "
        f"{result.size} px",
        *(f"skipped: {reason}" for reason in result.skipped),
        f"mean squared error of the {result.target} target, by which tokens it is taken over and by what is guessed",
        "{:<14}{:>8}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}".format(*head),
    ]
    for name, row in result.strategies.items():
        tokens, *errors, share, overlap = dataclasses.astuple(row)
        cells = "".join(f"{error:>10.4f}" for error in errors)
        lines.append(f"{name:<14}{tokens:>8}{cells}{share:>9.0%} {overlap:>9.0%}")
    lines += [
        "constant: the best for these very tokens; position: their place's mean over the training clips;",
        "nearest: the nearest visible token's target; motion: share of all hidden tokens' change in brightness;",
        "overlap: share that the adaptive strategy selects too",
    ]
    return "\n".join(lines)
