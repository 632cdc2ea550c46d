"""Which tokens the encoder sees and which ones the decoder reconstructs: index tensors, seeded, without a host sync.

Token i of a grid (T, H, W) stands at latent frame i // (H * W); P = H * W is the number of places in a latent frame.
Every index tensor is int64 and ascending in each row.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from vmae_kernels import gather_tokens, topk, topk_partition
from vmae_kernels.philox import STREAM_CELL, STREAM_RANDOM, STREAM_TUBE, random_keys, random_words

Grid = tuple[int, int, int]
Strategy = Literal["adaptive", "random", "uniform", "running_cell", "flow", "everest", "none"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
SCORED: tuple[Strategy, ...] = ("adaptive", "flow", "everest")  # the highest scores, of whichever kind


class TubeMask(NamedTuple):
    """What the encoder sees and what it does not: [B, V] and [B, N - V], together every token once."""

    visible: Tensor
    hidden: Tensor


def share(ratio: float, n: int) -> float:
    """ratio * n as decimals multiply: 0.29 of 100 is 29, not 28.999999999999996."""
    return round(ratio * n, 8)


def check_ratio(name: str, ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {ratio}")


def visible_places(places: int, mask_ratio: float) -> int:
    """How many of a latent frame's places the encoder sees: P - floor(mask_ratio * P)."""
    check_ratio("mask_ratio", mask_ratio)
    return places - math.floor(share(mask_ratio, places))


def tube_mask(
    grid: Grid, batch: int, *, mask_ratio: float, seed: int, row: int = 0, device: torch.device | str = "cpu"
) -> TubeMask:
    """Random tube masking: the same random places are visible in every latent frame.

    `row` is the first clip's place in the batch that this one is a part of: parts are masked as the whole is.

    Source: Tong et al., "VideoMAE" (NeurIPS 2022), section 3.2.
    """
    frames, height, width = grid
    places = height * width
    count = visible_places(places, mask_ratio)
    keys = random_keys(batch, places, seed=seed, stream=STREAM_TUBE, row=row, device=torch.device(device))
    frame = torch.arange(frames, device=device)[None, :, None] * places
    visible, hidden = (
        (chosen[:, None, :] + frame).flatten(1) for chosen in topk_partition(keys, count)
    )  # [B, 1, V / T] + [1, T, 1]
    return TubeMask(visible, hidden)


def check_masks(grid: Grid, *, mask_ratio: float, strategy: Strategy, budget: float, random: float) -> None:
    """Raise `ValueError` unless the encoder sees a token and the decoder finds as many as it is to reconstruct."""
    frames, places = grid[0], grid[1] * grid[2]
    visible = visible_places(places, mask_ratio)
    k, hidden = decoder_budget(frames * places, budget=budget, random=random).total, frames * (places - visible)
    if visible < 1:
        raise ValueError(f"mask_ratio: expected at least one of {places} places to stay visible, got {mask_ratio}")
    if hidden < 1:
        raise ValueError(f"mask_ratio: expected at least one of {places} places to be hidden, got {mask_ratio}")
    if strategy != "none" and not 1 <= k <= hidden:
        raise ValueError(
            f"budget: expected 1 to {hidden} of {frames * places} tokens, as many as are hidden, got {budget} = {k}"
        )


class Budget(NamedTuple):
    """How many tokens the decoder reconstructs, and how many of them are drawn at random."""

    total: int
    random: int


def decoder_budget(tokens: int, *, budget: float, random: float) -> Budget:
    """K = floor(budget * N + 1/2), of which floor(random * N + 1/2) at random (LVMAE, section 3)."""
    check_ratio("budget", budget)
    check_ratio("random", random)
    if random > budget:
        raise ValueError(f"random: expected at most the budget, {budget}, got {random}")
    total, drawn = (math.floor(share(ratio, tokens) + 0.5) for ratio in (budget, random))
    return Budget(total, drawn)


def select(
    strategy: Strategy,
    hidden: Tensor,
    grid: Grid,
    *,
    budget: float,
    random: float = 0.0,
    seed: int,
    row: int = 0,
    scores: Tensor | None = None,
) -> Tensor:
    """The tokens that the decoder reconstructs: K of the hidden ones, as `decoder_budget` counts them.

    Args:
        strategy: "adaptive", "flow" and "everest" take the highest scores (of the tokenizer's scorer, of optical flow,
            of patch embeddings: they differ in the scores given, and in nothing else) and a share at random;
            "random"; "uniform" (evenly spaced latent frames, as few as hold K hidden tokens, thinned evenly to K);
            "running_cell" (one token in four of each cell of 2 x 2 places, another one in each latent frame, then the
            next in turn; a turn that is not needed whole is thinned evenly); "none" (all hidden tokens).
        hidden: [B, N - V] of a `TubeMask`.
        grid: (T, H, W) of the tokens.
        budget, random: shares of all N tokens; `random` counts for the strategies with scores alone.
        seed: of what is drawn at random; `row` as in `tube_mask`.
        scores: [B, N] floating point, needed by the strategies with scores; ties go to the earlier token.

    Returns:
        int64 [B, K], ascending, distinct, none of them visible; [B, N - V] for "none".

    Raises:
        ValueError: unknown strategy, scores missing or of a wrong shape, or fewer hidden tokens than K.
        TypeError: scores are not floating point.

    Source: LVMAE (NeurIPS 2024), section 3 and appendix; the baselines as compared there. Running cells: VideoMAE V2
    (CVPR 2023), section 3.2, whose masks keep a half or a quarter of the tokens, where ours keep exactly K.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    n = math.prod(grid)
    rows, count = hidden.shape
    k, drawn = decoder_budget(n, budget=budget, random=random)
    if strategy == "none":
        return hidden
    if k > count:
        raise ValueError(f"budget: expected at most the {count} of {n} tokens that are hidden, got {budget} = {k}")
    if strategy == "uniform":
        return hidden[:, _uniform_places(grid[0], count // grid[0], k, hidden.device)]
    if strategy == "running_cell":
        return hidden.gather(1, topk(_running_cell(hidden, grid, k, seed=seed, row=row).float(), k))
    keys = random_keys(rows, count, seed=seed, stream=STREAM_RANDOM, row=row, device=hidden.device)
    if strategy in SCORED:
        if scores is None or scores.shape != (rows, n):
            raise ValueError(
                f"scores: expected shape {[rows, n]} for the strategy {strategy}, "
                f"got {None if scores is None else list(scores.shape)}"
            )
        ranked = gather_tokens(scores[..., None], hidden, unique=True)[..., 0]
        # The highest scores outrank every random key, so that one selection takes both shares in index order.
        keys = keys.scatter(1, topk(ranked, k - drawn), math.inf)
    return hidden.gather(1, topk(keys, k))


def _uniform_places(frames: int, per_frame: int, k: int, device: torch.device) -> Tensor:
    """Places [K] in a row of hidden tokens that has `per_frame` of them in each latent frame."""
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    used = -(-k // per_frame)
    frame = torch.arange(used, device=device) * frames // used
    places = (frame[:, None] * per_frame + torch.arange(per_frame, device=device)).flatten()
    return places[torch.arange(k, device=device) * len(places) // k]


def _running_cell(hidden: Tensor, grid: Grid, k: int, *, seed: int, row: int) -> Tensor:
    """Which k of the hidden tokens running cells take: bool, of the shape of `hidden`."""
    _, height, width = grid
    frame, y, x = hidden // (height * width), hidden // width % height, hidden % width
    # Each clip begins at a turn of its own.
    start = random_words(len(hidden), 1, seed=seed, block=0, stream=STREAM_CELL, row=row, device=hidden.device)[0]
    turn = (2 * (y % 2) + x % 2 - frame + start) % 4
    taken, left = torch.zeros_like(hidden, dtype=torch.bool), torch.full_like(start, k)
    for number in range(4):
        mine = turn == number
        place, count = mine.cumsum(1), mine.sum(1, keepdim=True)  # places from 1
        wanted = torch.minimum(left, count)
        # Where `place * wanted / count` passes a whole number: `wanted` of `count`, evenly.
        step = place * wanted // count.clamp_min(1) > (place - 1) * wanted // count.clamp_min(1)
        taken |= mine & step
        left = left - wanted
    return taken
