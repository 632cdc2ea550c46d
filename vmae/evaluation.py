"""How good a tokenizer is: what it reconstructs, how much of its codes it uses, and what its scores mean."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vmae.dataset import ClipDataset
from vmae.flow import flow_available, flow_scores
from vmae.scenes import KINDS, average_precision, scene
from vmae.scorer import token_scores
from vmae.tokenizer import AdaptiveTokenizer
from vmae.tokens import TUBELET, Tokens
from vmae.video import VideoError


@dataclass(frozen=True)
class Evaluation:
    """Means over clips."""

    clips: int
    skipped: list[str]
    """Why a video was left out, one line each."""
    frames: int
    size: int
    keep: float
    psnr: dict[str, float]
    """dB, by what stands for the clip."""
    ssim: dict[str, float]
    entropy: list[float]
    """Bits, of each dimension's codes."""
    precision: dict[str, dict[str, float]]
    """By score and kind of scene: area under the precision-recall curve."""


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of videos [B, C, T, H, W] in [0, 1], 100 dB at most; [B]."""
    return -10 * (a - b).square().flatten(1).mean(1).clamp_min(1e-10).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of videos [B, C, T, H, W] in [0, 1], the mean over frames and channels; [B].

    Source: Wang et al., "Image quality assessment" (IEEE TIP 2004), section III: Gaussian window of 11 x 11 pixels with
    standard deviation 1.5, K1 = 0.01, K2 = 0.03; only where the window lies inside the picture.
    """
    batch = a.shape[0]
    # In float64: variances are differences of squares, and convolutions may round to less than float32.
    a, b = (x.double().transpose(1, 2).reshape(-1, 1, *x.shape[3:]) for x in (a, b))
    window = torch.exp(-((torch.arange(11, device=a.device) - 5.0) ** 2) / (2 * 1.5**2)).to(a.dtype)
    window = window / window.sum()

    def local(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window[None, None, :, None]), window[None, None, None, :])

    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    index = index / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.reshape(batch, -1).mean(1).float()


def mean_colour(video: Tensor) -> Tensor:
    """Every tubelet of a video [B, C, T, H, W] filled with its mean colour: C exact numbers a token."""
    t, h, w = TUBELET
    mean = F.avg_pool3d(video, TUBELET)
    return mean.repeat_interleave(t, 2).repeat_interleave(h, 3).repeat_interleave(w, 4)


def code_counts(codes: Tensor, levels: tuple[int, ...], weights: Tensor | None = None) -> Tensor:
    """How often each level occurs in each dimension of the codes, each with its weight: [L, max(levels)], float64."""
    counts = torch.zeros(len(levels), max(levels), dtype=torch.float64, device=codes.device)
    rest = codes.flatten().long()
    weights = None if weights is None else weights.flatten().double()
    for row, level in zip(counts, levels, strict=True):
        row[:level] = torch.bincount(rest % level, weights, minlength=level)
        rest = rest // level
    return counts


def entropy_bits(counts: Tensor) -> list[float]:
    """The entropy of each row of counts [L, levels], in bits."""
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    return (0.0 - (share * share.clamp_min(1e-300).log2()).sum(1)).tolist()


def reconstruction(tokenizer: AdaptiveTokenizer, tokens: Tokens, name: str, *, seed: int = 0) -> Tensor:
    """The video in [0, 1] of `all` tokens, or of as many as training keeps: the highest scores (`adaptive`) or any ones
    (`random`, drawn by `seed`), in both cases with the whole first latent frame."""
    if name == "all":
        return tokenizer.decode(tokens)
    scores = tokens.scores
    if name == "random":
        scores = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)).to(scores.device)
    return tokenizer.decode(tokens, tokenizer.keep_weights(scores, tokens.grid, seed=0))


@torch.no_grad()
def evaluate(
    tokenizer: AdaptiveTokenizer,
    dataset: ClipDataset,
    *,
    untrained: AdaptiveTokenizer | None = None,
    autocast: Callable[[], AbstractContextManager],
    seed: int = 0,
    scenes: int = 64,
    progress: bool = True,
) -> Evaluation:
    """Measure a tokenizer on every video of a dataset that can be used, one clip each, and on generated scenes.

    Args:
        tokenizer: in evaluation mode.
        dataset: its clips are `dataset[i]`.
        untrained: the tokenizer as it was initialised, for comparison of its scores.
        autocast: gives the context to compute in.
        seed: of what is drawn at random.
        scenes: number of scenes of each kind.
        progress: show a bar.

    Raises:
        VideoError: none of the videos can be used.
    """
    device = tokenizer.encoder.stem.weight.device
    psnrs: dict[str, list[float]] = {}
    ssims: dict[str, list[float]] = {}
    counts, skipped, used = torch.zeros((), device=device), [], 0
    for index in tqdm(range(len(dataset)), desc="clips", disable=not progress, mininterval=1):
        try:
            clip = dataset[index][0][None].to(device)
        except VideoError as error:
            skipped.append(str(error))
            continue
        used += 1
        truth = clip.float() / 255
        pictures = {"mean": mean_colour(truth)}
        with autocast():
            tokens = tokenizer.encode(clip)
            for name in ("all", "adaptive", "random"):
                pictures[name] = reconstruction(tokenizer, tokens, name, seed=seed + index)
        for name, picture in pictures.items():
            psnrs.setdefault(name, []).append(psnr(picture.float(), truth).item())
            ssims.setdefault(name, []).append(ssim(picture.float(), truth).item())
        counts = counts + code_counts(tokens.codes, tokenizer.config.levels)
    if not used:
        raise VideoError(f"none of the {len(dataset)} videos could be used; the last one: {skipped[-1]}")
    return Evaluation(
        clips=used,
        skipped=skipped,
        frames=dataset.sampling["frames"],
        size=dataset.sampling["size"],
        keep=tokenizer.config.keep,
        psnr={name: sum(values) / used for name, values in psnrs.items()},
        ssim={name: sum(values) / used for name, values in ssims.items()},
        entropy=entropy_bits(counts),
        precision=score_precision(tokenizer, untrained, scenes=scenes),
    )


def frame_difference(video: Tensor) -> Tensor:
    """Mean absolute difference of each tubelet of a video uint8 [B, C, T, H, W] from the one before it in time: [B, N].

    The first latent frame takes the second one's.
    """
    t, h, w = TUBELET
    x = video.float()
    change = F.avg_pool3d((x[:, :, t:] - x[:, :, :-t]).abs().mean(1, keepdim=True), (t, h, w))
    return torch.cat((change[:, :, :1], change), dim=2).flatten(1)


def _scores(tokenizer: AdaptiveTokenizer, video: Tensor) -> Tensor:
    x = tokenizer.normalised(video.to(tokenizer.encoder.stem.weight.device))
    return token_scores(tokenizer.scorer(x)).cpu()


@torch.no_grad()
def score_precision(
    tokenizer: AdaptiveTokenizer, untrained: AdaptiveTokenizer | None = None, *, scenes: int
) -> dict[str, dict[str, float]]:
    """How well scores find what moves in generated scenes: mean average precision, by score and kind of scene.

    The first latent frame, which has none before it, does not count.
    """
    scorers: dict[str, Callable[[Tensor], Tensor]] = {"trained": functools.partial(_scores, tokenizer)}
    if untrained is not None:
        scorers["untrained"] = functools.partial(_scores, untrained)
    scorers["frame difference"] = frame_difference
    if flow_available():
        scorers["optical flow (DIS)"] = flow_scores
    total: dict[str, dict[str, float]] = {name: dict.fromkeys(KINDS, 0.0) for name in scorers}
    for kind in KINDS:
        for seed in range(scenes):
            video, moves = scene(kind, seed=seed)
            first = moves.shape[1] // (video.shape[2] // TUBELET[0])
            for name, score in scorers.items():
                total[name][kind] += average_precision(score(video)[:, first:], moves[:, first:]) / scenes
    return total


def table(result: Evaluation) -> str:
    """An evaluation as text."""
    labels = {
        "mean": "mean colour of each tubelet",
        "all": "all tokens",
        "adaptive": f"{result.keep:.0%} of the tokens, adaptive",
        "random": f"{result.keep:.0%} of the tokens, random",
    }
    width = max(map(len, labels.values()))
    lines = [f"{result.clips} clips of {result.frames} frames at {result.size} x {result.size}"]
    lines += [f"skipped: {reason}" for reason in result.skipped]
    lines += ["", f"{'reconstruction':<{width}}  PSNR, dB    SSIM"]
    lines += [f"{label:<{width}}  {result.psnr[key]:8.2f}  {result.ssim[key]:6.3f}" for key, label in labels.items()]
    lines += ["", f"{'entropy of the codes, bits':<{width}}  " + "  ".join(f"{bits:.2f}" for bits in result.entropy)]
    lines += ["", f"{'average precision of scores':<{width}}  " + "  ".join(f"{kind:>6}" for kind in KINDS)]
    for name, by_kind in result.precision.items():
        lines.append(f"{name:<{width}}  " + "  ".join(f"{by_kind[kind]:6.3f}" for kind in KINDS))
    return "\n".join(lines)
