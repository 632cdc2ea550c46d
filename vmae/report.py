"""What people look at: the page that shows scores and selections, and the plot of losses."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vmae import checkpoint
from vmae.masking import Strategy, TubeMask, select, tube_mask
from vmae.tokens import TUBELET, Tokens

LATENT_FRAMES_SHOWN = 8
STRATEGIES_SHOWN: tuple[Strategy, ...] = ("adaptive", "random", "uniform", "none")
_VISIBLE_TINT = np.array([64, 128, 255], dtype=np.float32)


@dataclass(frozen=True)
class Section:
    """One video of the page: its clip uint8 [1, 3, T, H, W], its tokens, and what to say about them."""

    title: str
    note: str
    clip: Tensor
    tokens: Tokens


@dataclass(frozen=True)
class Masking:
    """How tokens are masked on the page."""

    mask_ratio: float = 0.9
    """Share of places that the encoder does not see."""
    budget: float = 0.15
    """Share of tokens that the decoder reconstructs."""
    random: float = 0.05
    """Share of tokens that the adaptive strategy draws at random, within the budget."""
    seed: int = 0


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


def read_losses(log: Path) -> list[float]:
    """The losses of a training log, of a tokenizer those of the pixels; a line that a kill cut short does not count."""
    losses = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            figures = json.loads(line)
        except json.JSONDecodeError:
            break
        if figures["loss"] is not None:  # a step that was left out
            losses.append(float(figures.get("pixels", figures["loss"])))
    return losses


def motion(clip: Tensor) -> np.ndarray:
    """[T', H', W']: how much each token's brightness differs from the token a latent frame earlier; 0 in the first."""
    gray = clip[0].float().mean(0).numpy()
    t, h, w = (n // s for n, s in zip(gray.shape, TUBELET, strict=True))
    tubelets = gray.reshape(t, TUBELET[0], h, TUBELET[1], w, TUBELET[2])
    change = np.zeros((t, h, w), dtype=np.float32)
    change[1:] = np.abs(np.diff(tubelets, axis=0)).mean(axis=(1, 3, 5))
    return change


def selections(tokens: Tokens, masking: Masking) -> tuple[TubeMask, dict[Strategy, Tensor]]:
    """The tube mask and the tokens [K] that each strategy shown selects, for one clip."""
    mask = tube_mask(tokens.grid, 1, mask_ratio=masking.mask_ratio, seed=masking.seed)
    chosen = {
        strategy: select(
            strategy,
            mask.hidden,
            tokens.grid,
            budget=masking.budget,
            random=masking.random if strategy == "adaptive" else 0.0,
            seed=masking.seed,
            scores=tokens.scores,
        )[0]
        for strategy in STRATEGIES_SHOWN
    }
    return mask, chosen


def page(sections: Sequence[Section], masking: Masking, out: str | Path) -> None:
    """Write one self-contained HTML file: frames, scores and every strategy's selection side by side."""
    body = "\n".join(_section(section, masking) for section in sections)
    text = _PAGE.format(
        title=html.escape(", ".join(section.title for section in sections)),
        body=body,
        mask=f"{masking.mask_ratio:.0%}",
        budget=f"{masking.budget:.0%}",
    )
    checkpoint.write_text(out, text)


def _section(section: Section, masking: Masking) -> str:
    tokens, grid = section.tokens, section.tokens.grid
    mask, chosen = selections(tokens, masking)
    scores = tokens.scores[0].numpy().reshape(grid)
    moved = motion(section.clip)
    hidden = np.zeros(moved.size, dtype=bool)
    hidden[mask.hidden[0].numpy()] = True
    total = max(float(moved.flatten()[hidden].sum()), 1e-9)
    shown = np.unique(np.linspace(0, grid[0] - 1, LATENT_FRAMES_SHOWN).round().astype(int))
    frames = section.clip[0].permute(1, 2, 3, 0).numpy()
    heads = ["<th>frame</th>", "<th>score</th>"]
    for strategy, picked in chosen.items():
        share = moved.flatten()[picked.numpy()].sum() / total
        heads.append(f"<th>{strategy}<small>{len(picked):,} tokens, {share:.0%} of motion</small></th>")
    rows = []
    for t in shown:
        frame = frames[t * TUBELET[0]]
        cells = [_cell(frame, f"frame {t * TUBELET[0]}"), _cell(_heat(frame, scores, t), f"scores, latent frame {t}")]
        for strategy, picked in chosen.items():
            drawn = _selection(frame, grid, t, picked.numpy(), mask.visible[0].numpy())
            cells.append(_cell(drawn, f"{strategy}, latent frame {t}"))
        rows.append(f'<tr><th scope="row">{t * TUBELET[0]}</th>{"".join(cells)}</tr>')
    n = moved.size
    return _SECTION.format(
        title=html.escape(section.title),
        note=html.escape(section.note),
        facts=f"{section.clip.shape[2]} frames of {frames.shape[1]} x {frames.shape[2]}, "
        f"{grid[0]} x {grid[1]} x {grid[2]} = {n:,} tokens, of which the encoder sees {n - int(hidden.sum()):,}",
        timeline=_timeline(scores, chosen["adaptive"].numpy(), grid),
        heads="".join(heads),
        rows="\n".join(rows),
    )


def _enlarge(values: np.ndarray) -> np.ndarray:
    """One value per place -> one per pixel."""
    return values.repeat(TUBELET[1], axis=0).repeat(TUBELET[2], axis=1)


def _heat(frame: np.ndarray, scores: np.ndarray, t: int) -> np.ndarray:
    """A frame's scores as colour over its grey picture, on one scale for the whole clip."""
    low, high = np.percentile(scores, (1, 99))
    level = _enlarge(np.clip((scores[t] - low) / max(high - low, 1e-9), 0, 1))
    colour = matplotlib.colormaps["inferno"](level)[..., :3] * 255
    return 0.3 * frame.mean(axis=2, keepdims=True) + 0.7 * colour


def _selection(
    frame: np.ndarray, grid: tuple[int, int, int], t: int, selected: np.ndarray, visible: np.ndarray
) -> np.ndarray:
    """A frame in which selected tokens are bright, visible ones blue, and all others dark."""
    places = grid[1] * grid[2]
    state = np.zeros(places, dtype=np.int8)
    state[visible[visible // places == t] % places] = 1
    state[selected[selected // places == t] % places] = 2
    pixels = _enlarge(state.reshape(grid[1:]))[..., None]
    dark, tinted = 0.18 * frame, 0.35 * frame + 0.65 * _VISIBLE_TINT
    return np.where(pixels == 2, frame, np.where(pixels == 1, tinted, dark))


def _cell(image: np.ndarray, alt: str) -> str:
    file = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(file, format="JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<td><img src="data:image/jpeg;base64,{data}" alt="{alt}" loading="lazy"></td>'


def _timeline(scores: np.ndarray, selected: np.ndarray, grid: tuple[int, int, int]) -> str:
    """Mean score (line) and adaptive tokens (bars) of every latent frame, as an inline drawing."""
    mean = scores.reshape(grid[0], -1).mean(axis=1)
    count = np.bincount(selected // (grid[1] * grid[2]), minlength=grid[0])
    x = (np.arange(grid[0]) + 0.5) * 600 / grid[0]
    y = 78 - 74 * mean / max(float(mean.max()), 1e-9)
    bars = "".join(
        f'<rect x="{a - 240 / grid[0]:.1f}" y="{80 - 76 * c / max(count.max(), 1):.1f}" '
        f'width="{480 / grid[0]:.1f}" height="{76 * c / max(count.max(), 1):.1f}"/>'
        for a, c in zip(x, count, strict=True)
    )
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    line = f'<polyline points="{points}"/>'
    attributes = 'viewBox="0 0 600 80" preserveAspectRatio="none" role="img" aria-label="scores over time"'
    return f"<svg {attributes}>{bars}{line}</svg>"


_SECTION = """<section>
<h2>{title}</h2>
<p>{facts}. {note}</p>
<figure>{timeline}<figcaption>Left to right through the clip: the line is the mean score of each latent frame, the
bars are how many of its tokens the adaptive strategy selects.</figcaption></figure>
<div class="scroll"><table>
<thead><tr><th></th>{heads}</tr></thead>
<tbody>
{rows}
</tbody></table></div>
</section>"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vmae: {title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1b1b1f; --paper: #fff; --soft: #6a6a75; --line: #d9d9e0;
  --accent: #3a6fd8; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #ececf1; --paper: #131316; --soft: #9a9aa6; --line: #33333b; --accent: #7aa5ff; }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1400px; padding: 1.5rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ margin: 2.5rem 0 0; font-size: 1.2rem; }} p {{ margin: .4rem 0; max-width: 75ch; }}
figure {{ margin: 1rem 0; }} figcaption, small {{ color: var(--soft); font-size: .8rem; font-weight: normal; }}
svg {{ width: 100%; max-width: 900px; height: 80px; display: block; border-bottom: 1px solid var(--line); }}
svg rect {{ fill: var(--accent); opacity: .3; }}
svg polyline {{ fill: none; stroke: var(--ink); stroke-width: 1.5; vector-effect: non-scaling-stroke; }}
svg {{ overflow: visible; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; min-width: 900px; }}
th {{ text-align: left; padding: .3rem; vertical-align: bottom; }} th small {{ display: block; }}
tbody th {{ color: var(--soft); font-weight: normal; text-align: right; vertical-align: middle; }}
td {{ padding: 2px; width: 16.5%; }} td img {{ width: 100%; display: block; border-radius: 3px; }}
.key {{ display: inline-block; width: .9em; height: .9em; border-radius: 2px; vertical-align: -.1em;
  background: #4080ff; }}
</style>
</head>
<body>
<h1>Which tokens does the decoder reconstruct?</h1>
<p>The encoder of a masked autoencoder sees few tokens: {mask} of the places are hidden from it, the others are
<span class="key"></span> blue. The decoder reconstructs some of the hidden ones: bright tokens are selected, dark ones
are skipped. The strategy “none” reconstructs them all; the others have the same budget, {budget} of all tokens. A
token's score is how much its place changes from one latent frame to the next, in the tokenizer's learned features
(bright is high). The share of motion is that of the change in brightness, summed over all hidden tokens.</p>
{body}
</body>
</html>
"""
