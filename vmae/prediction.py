"""What a masked autoencoder predicts, as pixels that people can look at."""

import math
from typing import NamedTuple

from torch import Tensor

from vmae.flow import flow_scores
from vmae.mae import VideoMAE
from vmae.tokenizer import AdaptiveTokenizer
from vmae.tokens import TUBELET, Tokens
from vmae_kernels import scatter_tokens


class Prediction(NamedTuple):
    """Of a clip: which of its tokens were seen and which predicted, and the video with these in their place."""

    visible: Tensor
    """int64 [V]."""
    selected: Tensor
    """int64 [K]."""
    video: Tensor
    """uint8 [1, 3, T, H, W], on the CPU."""


def predicted(
    clip: Tensor,
    model: VideoMAE,
    tokenizer: AdaptiveTokenizer | None = None,
    tokens: Tokens | None = None,
    *,
    frames: int | None = None,
) -> Prediction:
    """Mask a clip as in pretraining, always in the same way, and predict the tokens that the strategy selects.

    Latents are decoded by the tokenizer, among its own of all other tokens; pixels stand in the clip.

    Args:
        clip: uint8 [1, 3, T, H, W], on the models' device.
        model: in evaluation mode.
        tokenizer: that of the model's targets, needed where they are latents.
        tokens: of the clip, by the tokenizer; encoded here if not given.
        frames: how many of the video to return, from its start; all if not given.

    Raises:
        ValueError: there is no tokenizer where one is needed, or it has other latents.
    """
    if tokens is None and tokenizer is not None:
        tokens = tokenizer.encode(clip)
    scores = flow_scores(clip).to(clip.device) if model.config.strategy == "flow" else None
    mask, chosen = model.masks(clip, tokens, scores=scores, seed=0)
    said = model.predict(clip, mask.visible, chosen).float()
    length = clip.shape[2] if frames is None else min(frames, clip.shape[2])
    visible, selected = mask.visible[0].cpu(), chosen[0].cpu()
    if model.config.target == "pixels":
        return Prediction(visible, selected, _in_place(clip, chosen[0], said[0])[:, :, :length].cpu())
    if tokenizer is None or tokens is None:
        raise ValueError("tokenizer: expected the one of the model's targets, got none")
    latents = scatter_tokens(said.clamp(-1, 1), chosen, tokens.latents.shape[1], fill=tokens.latents)
    grid = (length // TUBELET[0], *tokens.grid[1:])  # what is decoded never looks at later tokens
    shown = tokens._replace(latents=latents[:, : math.prod(grid)], grid=grid)
    return Prediction(visible, selected, to_bytes(tokenizer.decode(shown)))


def _in_place(clip: Tensor, chosen: Tensor, said: Tensor) -> Tensor:
    """The clip with predicted tubelets [K, values]: less their mean, by their deviation, which the clip has to give."""
    t, h, w = TUBELET
    cut = clip[0].unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(1, (-1, t))
    grid = cut.shape[1], cut.shape[3], cut.shape[5]
    tubelets = cut.permute(1, 3, 5, 2, 4, 6, 0).reshape(math.prod(grid), -1, 3).float() / 255
    true = tubelets[chosen]
    pixels = said.unflatten(1, (-1, 3)) * (true.std(1, keepdim=True) + 1e-6) + true.mean(1, keepdim=True)
    whole = scatter_tokens(pixels.flatten(1)[None], chosen[None], len(tubelets), fill=tubelets.flatten(1)[None])
    video = whole.view(*grid, t, h, w, 3).permute(6, 0, 3, 1, 4, 2, 5)
    return to_bytes(video.reshape(clip.shape))


def to_bytes(video: Tensor) -> Tensor:
    """A video in [0, 1] as uint8, on the CPU."""
    return (255 * video.float().clamp(0, 1)).round().byte().cpu()
