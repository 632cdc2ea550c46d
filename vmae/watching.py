"""A training run to look at: curves, samples, its command and settings, on one page that is written as it goes on."""

import base64
import html
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vmae import checkpoint
from vmae.checkpoint import LOG, RUN
from vmae.tokens import TUBELET

REPORT, SAMPLES, SAMPLE = "report.html", "samples", "step-{:08d}.jpg"
SHOWN = 10  # samples on the page
POINTS = 1000  # of a line, at most
COLOURS = ("#3a78d8", "#e0722f", "#2f9e58", "#c43d5c", "#8a5fc7", "#8a7a28")
CURVES = {  # figures of the log by the plot they stand in
    "loss": ("loss", "val_loss", "aside"),
    "its parts": ("pixels", "perceptual", "adversarial", "discriminator"),
    "learning rate": ("lr",),
    "gradient's norm": ("grad_norm",),
    "bits of each dimension's codes": ("entropy",),
    "clips/s": ("clips_per_s",),
    "share of time that waits for clips": ("waiting",),
    "memory, GiB": ("memory_gib",),
}


def write_report(run: Path, *, refresh: int | None = None) -> Path:
    """Write `report.html` of a run's folder, whether it goes on or not; a browser reads it again every `refresh` s.

    Raises:
        ValueError: the folder holds no run.
    """
    settings, lines = _read(run)
    steps = settings["optimisation"]["steps"]
    samples = sorted((run / SAMPLES).glob(SAMPLE.replace("{:08d}", "*")))
    count = min(SHOWN, len(samples))
    places = [round(i * (len(samples) - 1) / max(count - 1, 1)) for i in range(count)]
    pictures = "\n".join(
        f'<figure><img src="data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}" alt="sample">'
        f"<figcaption>after step {int(path.stem.split('-')[1]):,}</figcaption></figure>"
        for path in (samples[i] for i in places)
    )
    command = settings.pop("command", "unknown")
    text = _PAGE.format(
        name=html.escape(run.resolve().name),
        refresh="" if refresh is None else f'<meta http-equiv="refresh" content="{refresh}">',
        status=html.escape(status(lines, steps)),
        curves=_curves(lines),
        samples=f"<h2>Samples</h2>\n<p>{_LEGEND[settings.get('kind', '')]}</p>\n{pictures}" if pictures else "",
        command=html.escape(command),
        settings=html.escape(json.dumps(settings, indent=2)),
    )
    checkpoint.write_text(run / REPORT, text)
    return run / REPORT


def watch(run: Path, every: float) -> None:
    """Write the report again and again, and say how the run stands, until it has done its steps."""
    if every <= 0:
        raise ValueError(f"every: expected a number of seconds above 0, got {every:g}")
    said = ""
    while True:
        settings, lines = _read(run)
        steps = settings["optimisation"]["steps"]
        done = bool(lines) and lines[-1]["step"] + 1 == steps
        page = write_report(run, refresh=None if done else max(math.ceil(every), 5))
        if not said:
            print(f"{page}: open it in a browser; it is written again every {every:g} s")
        if (now := status(lines, steps)) != said:
            print(now, flush=True)
            said = now
        if done:
            return
        time.sleep(every)


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


def times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def status(lines: list[dict[str, Any]], steps: int) -> str:
    """How a run stands, in a line."""
    if not lines:
        return f"before the first of {steps:,} steps"
    last = lines[-1]
    done = last["step"] + 1
    recent = [line["loss"] for line in lines[-20:] if line["loss"] is not None]
    loss = f", loss {sum(recent) / len(recent):.4f} (mean of {len(recent)})" if recent else ""
    skipped = f", skipped videos {times(last['skipped'])}" if last.get("skipped") else ""
    if done == steps:
        return f"all {steps:,} steps are done{loss}{skipped}"
    return f"step {done:,} of {steps:,} ({done / steps:.0%}){loss}, {last['clips_per_s']:g} clips/s{skipped}"


def _read(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        settings = json.loads((run / RUN).read_text(encoding="utf-8"))
        settings["optimisation"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{run}: expected the folder of a training run, with {RUN}") from None
    return settings, read_log(run / LOG) if (run / LOG).exists() else []


def _curves(lines: list[dict[str, Any]]) -> str:
    """A plot for each of `CURVES` that the log has."""
    plots = []
    for title, names in CURVES.items():
        series: dict[str, list[tuple[int, float]]] = {}
        for name in names:
            for line in lines:
                value = line.get(name)
                parts = {f"{name} {i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
                for part, number in parts.items():
                    if number is not None:
                        series.setdefault(part, []).append((line["step"], number))
        if series:
            plots.append(_plot(title, series))
    return f'<div class="plots">{"".join(plots)}</div>'


def _plot(title: str, series: dict[str, list[tuple[int, float]]]) -> str:
    """Lines over steps: of many points a pale one of all, and their running mean."""
    values = [value for pairs in series.values() for _, value in pairs]
    steps = [step for pairs in series.values() for step, _ in pairs]
    low, high, first, last = min(values), max(values), min(steps), max(steps)
    drawn, key = [], []
    for number, (name, pairs) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        x = np.array([step for step, _ in pairs], dtype=float)
        y = np.array([value for _, value in pairs], dtype=float)
        width = len(y) // 50
        if width > 1:
            drawn.append(_line(x, y, (first, last, low, high), colour, "0.25"))
            x, y = x[width - 1 :], np.convolve(y, np.ones(width) / width, mode="valid")
        drawn.append(_line(x, y, (first, last, low, high), colour, "1"))
        key.append(f'<span style="color: {colour}">{html.escape(name)} {pairs[-1][1]:.4g}</span>')
    labels = f"{high:.4g}", f"{low:.4g}", f"step {first:,}", f"{last:,}"
    places = ('x="4" y="12"', 'x="4" y="176"', 'x="4" y="194"', 'x="496" y="194" text-anchor="end"')
    texts = "".join(f"<text {place}>{label}</text>" for place, label in zip(places, labels, strict=True))
    return (
        f'<figure><figcaption><strong>{title}</strong> {", ".join(key)}</figcaption><svg viewBox="0 0 500 200" '
        f'role="img" aria-label="{title}"><path d="M0 180H500"/>{"".join(drawn)}{texts}</svg></figure>'
    )


def _line(x: np.ndarray, y: np.ndarray, bounds: tuple[float, float, float, float], colour: str, opacity: str) -> str:
    first, last, low, high = bounds
    if len(x) > POINTS:
        kept = np.unique(np.linspace(0, len(x) - 1, POINTS).round().astype(int))
        x, y = x[kept], y[kept]
    across = 500 * (x - first) / max(last - first, 1)
    down = 178 - 160 * (y - low) / max(high - low, 1e-12)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True))
    dot = f'<circle cx="{across[0]:.1f}" cy="{down[0]:.1f}" r="2" fill="{colour}"/>' if len(x) == 1 else ""
    return f'<polyline points="{points}" stroke="{colour}" opacity="{opacity}"/>{dot}'


# --- samples --------------------------------------------------------------------------------------------------------


def write_sample(run: Path, step: int, rows: list[Tensor]) -> None:
    """Store clips uint8 [3, T, H, W] of the same size below each other, four of their frames from left to right."""
    shown = np.unique(np.linspace(0, rows[0].shape[1] - 1, 4).round().astype(int))
    picture = np.concatenate(
        [np.concatenate(list(row[:, shown].permute(1, 2, 3, 0).cpu().numpy()), 1) for row in rows], 0
    )
    with checkpoint.replacing(run / SAMPLES / SAMPLE.format(step)) as temporary:
        Image.fromarray(picture).save(temporary, format="JPEG", quality=85)


def masked(clip: Tensor, selected: Tensor, visible: Tensor | None = None) -> Tensor:
    """A clip uint8 [3, T, H, W] whose tokens are bright if selected, blue if visible, and dark if neither."""
    t, h, w = (side // step for side, step in zip(clip.shape[1:], TUBELET, strict=True))
    state = clip.new_zeros(t * h * w)
    state[selected] = 1
    if visible is not None:
        state[visible] = 2
    state = state.view(t, h, w)
    for axis, step in enumerate(TUBELET):
        state = state.repeat_interleave(step, axis)
    blue = clip.new_tensor([64, 128, 255]).view(3, 1, 1, 1).float()
    tinted = 0.35 * clip + 0.65 * blue
    shown = (0.18 * clip).where(state != 1, clip.float()).where(state != 2, tinted)
    return shown.round().byte()


_LEGEND = {
    "tokenizer": "From top to bottom: the video, what the tokenizer makes of all tokens, and of those that it keeps.",
    "pretraining": "From top to bottom: the video; the tokens that the encoder sees (blue) and those that the decoder "
    "reconstructs (bright); and what it makes of them.",
    "": "",
}

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh}
<link rel="icon" href="data:,">
<title>{name}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1b1b1f; --paper: #fff; --card: #f5f5f8; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #ececf1; --paper: #131316; --card: #1c1c21; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1140px; padding: 1rem; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.15rem; margin: 2rem 0 .3rem; }}
img {{ max-width: 100%; background: #fff; border-radius: 4px; }}
figure {{ margin: 0 0 1rem; }} figcaption {{ font-size: .85rem; }}
.plots {{ display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); }}
svg {{ width: 100%; display: block; }} svg polyline {{ fill: none; stroke-width: 1.5; stroke-linejoin: round; }}
svg path {{ stroke: currentColor; opacity: .3; }} svg text {{ font-size: 11px; fill: currentColor; opacity: .7; }}
pre {{ background: var(--card); border-radius: 6px; padding: .7rem; overflow-x: auto; white-space: pre-wrap; }}
</style>
</head>
<body>
<h1>{name}</h1>
<p>{status}</p>
{curves}
{samples}
<h2>Command</h2>
<pre>{command}</pre>
<h2>Settings</h2>
<pre>{settings}</pre>
</body>
</html>
"""
