"""The page that shows a video beside its scores, what each strategy selects, and what models make of it.

One HTML file with everything in it (page.html is its skeleton): pictures as sheets of JPEG, selections as bits.
"""

import base64
import html
import importlib.resources
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vmae import checkpoint
from vmae.flow import flow_available, flow_scores
from vmae.mae import VideoMAE, everest_scores
from vmae.masking import SCORED, STRATEGIES, Strategy, TubeMask, check_masks, select, tube_mask
from vmae.motion import motion
from vmae.optimisation import autocast
from vmae.prediction import predicted, to_bytes
from vmae.tokenizer import AdaptiveTokenizer
from vmae.tokens import Tokens, check_clip
from vmae.video import frame_count, load_clip

BUDGETS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHEET = 64  # frames; more would make pictures that phones do not open


@dataclass(frozen=True)
class Masking:
    """How tokens are masked on the page."""

    mask_ratio: float = 0.9
    """Share of places that the encoder does not see."""
    budget: float = 0.15
    """Share of tokens that the decoder reconstructs, at first: the page has a slider."""
    random: float = 0.05
    """Share of tokens that strategies with scores draw at random, within the budget."""
    seed: int = 0


class Picture(NamedTuple):
    """What a model makes of the clip: uint8 [1, 3, T, H, W], and of which tokens [K], all if None."""

    title: str
    clip: Tensor
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Section:
    """One video of the page: its clip uint8 [1, 3, T, H, W], its tokens, and what to say about them."""

    title: str
    note: str
    clip: Tensor
    tokens: Tokens
    pictures: Sequence[Picture] = ()
    scores: dict[Strategy, Tensor] | None = None
    """What other strategies than "adaptive" rank by, [1, N] each."""


@torch.inference_mode()
def section(
    path: Path,
    tokenizer: AdaptiveTokenizer,
    *,
    title: str,
    frames: int,
    size: int,
    model: VideoMAE | None = None,
    precision: str = "auto",
) -> Section:
    """What the page shows of a clip from the middle of a video; of `model` too what it predicts, with its own masks.

    Raises:
        ValueError: the model predicts other latents than the tokenizer's.
    """
    check_clip(frames, size)
    clip = load_clip(path, frames=frames, size=size)
    device = next(tokenizer.parameters()).device
    with autocast(device, precision):
        tokens = tokenizer.encode(clip.to(device))
        seen = to_bytes(tokenizer.decode(tokens))
        pictures = [Picture(f"tokenizer, {_psnr(seen, clip):.1f} dB", seen)]
        scores: dict[Strategy, Tensor] = {"flow": flow_scores(clip)} if flow_available() else {}
        if model is not None:
            found = predicted(clip.to(device), model.to(device).eval(), tokenizer, tokens)
            share = len(found.selected) / math.prod(tokens.grid)
            pictures.append(Picture(f"model, {share:.0%} of the tokens", found.video, found.selected))
            scores["everest"] = everest_scores(clip.to(device), model.patch_embed).cpu()
    tokens = Tokens(tokens.latents.cpu(), tokens.codes.cpu(), tokens.scores.cpu(), tokens.grid)
    count = frame_count(path)
    note = f"The file has {count} frames and is looped." if count < frames else ""
    return Section(title, note, clip, tokens, pictures, scores)


def _psnr(a: Tensor, b: Tensor) -> float:
    return -10 * math.log10(max(float((a.float() - b.float()).div(255).square().mean()), 1e-10))


# --- what is selected -----------------------------------------------------------------------------------------------


class Selection(NamedTuple):
    """What a strategy selects, at a budget."""

    budget: float
    tokens: Tensor
    """int64 [K], ascending."""
    motion: float
    """Share of all hidden tokens' change in brightness."""


def selections(section: Section, masking: Masking) -> tuple[TubeMask, dict[Strategy, list[Selection]]]:
    """The tube mask, and what every strategy selects at every budget of the slider."""
    grid, n = section.tokens.grid, math.prod(section.tokens.grid)
    check_masks(grid, mask_ratio=masking.mask_ratio, strategy="adaptive", budget=masking.budget, random=masking.random)
    mask = tube_mask(grid, 1, mask_ratio=masking.mask_ratio, seed=masking.seed)
    hidden = mask.hidden[0]
    moved = torch.from_numpy(motion(section.clip)).flatten()
    total = moved[hidden].sum().clamp_min(1e-9)
    scores = {"adaptive": section.tokens.scores, **(section.scores or {})}
    most = len(hidden) / n
    budgets = sorted({masking.budget, *(b for b in BUDGETS if b <= most)})
    chosen: dict[Strategy, list[Selection]] = {}
    for strategy in STRATEGIES:
        if strategy in SCORED and strategy not in scores:
            continue
        for budget in [most] if strategy == "none" else budgets:
            drawn = min(masking.random, budget) if strategy in SCORED else 0.0
            picked = select(
                strategy, mask.hidden, grid, budget=budget, random=drawn, seed=masking.seed, scores=scores.get(strategy)
            )[0]
            found = Selection(budget, picked, float(moved[picked].sum() / total))
            chosen.setdefault(strategy, []).append(found)
    return mask, chosen


# --- the file -------------------------------------------------------------------------------------------------------


def page(sections: Sequence[Section], masking: Masking, out: str | Path) -> None:
    """Write one self-contained HTML file."""
    import matplotlib  # takes long, and only pages need it

    data = {
        "sections": [_facts(section, masking) for section in sections],
        "budget": masking.budget,
        "inferno": _base64((matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.uint8)),
    }
    text = _skeleton().replace("{{TITLE}}", html.escape(", ".join(section.title for section in sections)))
    # Nothing in it may end the script that it stands in, or begin another.
    checkpoint.write_text(out, text.replace("{{DATA}}", json.dumps(data).replace("<", "\\u003c")))


def _skeleton() -> str:
    return importlib.resources.files("vmae").joinpath("page.html").read_text(encoding="utf-8")


def is_page(path: Path) -> bool:
    """Whether `page` wrote this file."""
    head = _skeleton().partition("{{TITLE}}")[0].encode()
    with open(path, "rb") as file:
        return file.read(len(head)) == head


def _facts(section: Section, masking: Masking) -> dict[str, Any]:
    grid, n = section.tokens.grid, math.prod(section.tokens.grid)
    mask, chosen = selections(section, masking)
    frames, height, width = section.clip.shape[2:]
    scores = section.tokens.scores[0].float().numpy().reshape(grid)
    low, high = np.percentile(scores, (1, 99))
    level = np.clip((scores - low) / max(high - low, 1e-9), 0, 1)
    seen = mask.visible.shape[1]
    return {
        "title": section.title,
        "note": section.note,
        "facts": f"{frames:,} frames of {height} x {width}, {grid[0]} x {grid[1]} x {grid[2]} = {n:,} tokens, of which "
        f"the encoder sees {seen:,}",
        "frames": frames,
        "height": height,
        "width": width,
        "grid": grid,
        "clip": _sheets(section.clip),
        "pictures": [
            {
                "title": picture.title,
                "sheets": _sheets(picture.clip),
                "tokens": None if picture.tokens is None else _bits(picture.tokens, n),
            }
            for picture in section.pictures
        ],
        "levels": _base64((255 * level).round().astype(np.uint8)),
        "scores": [round(float(mean), 6) for mean in scores.reshape(grid[0], -1).mean(1)],
        "visible": _bits(mask.visible[0], n),
        "hidden": n - seen,
        "strategies": {
            strategy: [
                {"budget": one.budget, "tokens": len(one.tokens), "motion": one.motion, "bits": _bits(one.tokens, n)}
                for one in found
            ]
            for strategy, found in chosen.items()
        },
    }


def _bits(tokens: Tensor, n: int) -> str:
    """The set of tokens as bits, the first token's the highest of the first byte."""
    there = np.zeros(n, dtype=bool)
    there[tokens.numpy()] = True
    return _base64(np.packbits(there))


def _base64(values: np.ndarray | bytes) -> str:
    return base64.b64encode(values if isinstance(values, bytes) else values.tobytes()).decode()


def _sheets(clip: Tensor) -> dict[str, Any]:
    """A clip [1, 3, T, H, W] as JPEG pictures of up to 64 frames in rows of `columns`."""
    frames = clip[0].permute(1, 2, 3, 0).numpy()
    columns = math.isqrt(min(SHEET, len(frames)) - 1) + 1
    sheets = []
    for begin in range(0, len(frames), SHEET):
        part = frames[begin : begin + SHEET]
        rows = -(-len(part) // columns)
        part = np.concatenate((part, np.zeros_like(part[:1]).repeat(rows * columns - len(part), 0)))
        sheet = part.reshape(rows, columns, *part.shape[1:]).swapaxes(1, 2)
        file = io.BytesIO()
        picture = sheet.reshape(rows * part.shape[1], columns * part.shape[2], 3)
        Image.fromarray(picture).save(file, format="JPEG", quality=75)
        sheets.append("data:image/jpeg;base64," + _base64(file.getvalue()))
    return {"columns": columns, "per": SHEET, "files": sheets}
