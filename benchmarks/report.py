"""Tables, plots and a page of what the suites measured, from pytest-benchmark's json alone."""

import html
import importlib.util
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

GIB, MIB = 2**30, 2**20
NAMES = {
    "vmae": "vmae, {budget:.0%} decoded",
    "references": "vmae with VMAE_KERNELS=torch, {budget:.0%}",
    "plain": "the same step in plain PyTorch, {budget:.0%}",
    "dual-masking": "dual masking with SDPA, {budget:.0%}",
    "huggingface": "Hugging Face's VideoMAE, all decoded",
}


class Point(NamedTuple):
    """A step that was measured."""

    line: str
    """Who did it, and how much of it."""
    frames: int
    median: float
    facts: dict[str, Any]


class Fit(NamedTuple):
    """A straight line through memory against frames."""

    per_frame: float
    at_none: float
    off: float
    """The largest distance of a point, relative to it."""
    first: int
    """The shortest clip that counts."""


def write(results: Path) -> Path:
    """Write the report beside its results; returns the markdown's path."""
    found = json.loads(results.read_text())
    plots = draw(found, results) if importlib.util.find_spec("matplotlib") else {}
    sections = sections_of(found, results, plots)
    markdown = results.with_suffix(".md")
    title = f"Measured on {device_of(found)}, {found['datetime'][:10]}"
    markdown.write_text(f"# {title}\n\n" + "\n\n".join(map(as_markdown, sections)) + "\n")
    results.with_suffix(".html").write_text(
        _PAGE.format(title=html.escape(title), body="\n".join(map(as_html, sections)))
    )
    return markdown


def device_of(found: dict[str, Any]) -> str:
    info = found["machine_info"]
    return info.get("gpu") or f"{info['vmae']['cpu']}, {info['vmae']['cores']} cores, {info['vmae']['capability']}"


def points_of(found: dict[str, Any]) -> list[Point]:
    points = []
    for bench in found["benchmarks"]:
        facts = bench["extra_info"]
        if "way" in facts:
            points.append(Point(line_of(facts), facts["frames"], bench["stats"]["median"], facts))
    return sorted(points, key=lambda point: point.frames)


def line_of(facts: dict[str, Any]) -> str:
    model = "" if facts["model"] == "base" else f"{facts['model']}: "
    kept = ", checkpointing" if facts["checkpointing"] else ""
    return f"{model}{NAMES[facts['way']].format(**facts)}, {facts['precision']}{kept}"


def fits_of(points: list[Point]) -> dict[str, Fit]:
    """Of the lines with two points or more, without those as short that gradients alone make the peak."""
    lines = defaultdict(list)
    for point in points:
        if point.facts["bytes"] is not None:
            lines[point.line].append((point.frames, point.facts["bytes"]))
    fits = {}
    for line, pairs in lines.items():
        least = min(size for _, size in pairs)
        rising = [pair for pair in pairs if pair[1] > 1.05 * least]
        if len(rising) >= 2:
            slope, start = statistics.linear_regression(*zip(*rising, strict=True))
            off = max(abs(start + slope * frames - size) / size for frames, size in rising)
            fits[line] = Fit(slope, start, off, rising[0][0])
    return fits


class Section(NamedTuple):
    title: str
    text: str
    header: list[str]
    rows: list[list[str]]
    plot: str | None = None


def sections_of(found: dict[str, Any], results: Path, plots: dict[str, str]) -> list[Section]:
    points = points_of(found)
    vmae = found["machine_info"]["vmae"]
    versions = ", ".join(f"{name} {version}" for name, version in vmae["versions"].items() if version != "none")
    limits = found["limits"]
    facts = (
        f"{versions}, extension {vmae.get('extension', 'unknown')}, {vmae['threads']} threads, "
        f"commit {vmae['commit']}. "
        f"Its limits, measured in the same run: bf16 products {limits['bf16'] / 1e12:.3g} TFLOP/s, fp32 "
        f"{limits['fp32'] / 1e12:.3g} TFLOP/s, copies {limits['bandwidth'] / 1e9:.3g} GB/s. By "
        f"`{found.get('command', 'python benchmarks/run.py')}`; [{results.name}]({results.name}) holds every number."
    )
    left_out = found.get("left_out", [])
    if left_out:
        facts += f" Time was over for {len(left_out)}, which are named at the end."
    if note := found.get("note"):
        facts += f" {note}"
    if failed := found.get("failed"):
        facts += f" FAILED, and so not here: {', '.join(failed)}."
    sections = [Section("Machine", facts, [], [])]
    if points:
        sections += steps(points, first_out_of_memory(found), plots, min(128, max(p.frames for p in points)))
    sections += kernels(found, plots)
    sections += pipeline(found)
    if left_out:
        sections.append(Section("Left out", f"Time was over for {', '.join(left_out)}.", [], []))
    return sections


def first_out_of_memory(found: dict[str, Any]) -> dict[str, int]:
    """The shortest clips that did not fit, by line."""
    shortest: dict[str, int] = {}
    for about in found.get("out_of_memory", []):
        if "way" in about:  # of a pipeline the page says so elsewhere
            shortest[line_of(about)] = min(about["frames"], shortest.get(line_of(about), about["frames"]))
    return shortest


def steps(points: list[Point], failed: dict[str, int], plots: dict[str, str], frames: int) -> list[Section]:
    fits = fits_of(points)
    same = [p for p in points if p.frames == frames and p.facts["model"] == "base"]
    ours = next((p for p in same if p.facts["way"] == "vmae" and p.facts["budget"] == 0.15), None)
    rows = [
        [p.line, f"{p.median:.3g} s", f"{p.median / ours.median:.2f} x" if ours else "", gib(p.facts["bytes"]),
         f"{p.facts['flops'] / 1e12:.2f}", f"{p.facts['flops_per_s'] / 1e12:.3g}", f"{p.facts['share_of_peak']:.0%}"]
        for p in sorted(same, key=lambda p: p.median)
    ]  # fmt: skip
    table = Section(
        f"One step at {frames} frames",
        "ViT-B, one clip of 224 x 224: forward, backward, clipping and AdamW; tokens are given. Memory is the peak "
        "less weights, optimizer and clip, which stand between steps; gradients are in it.",
        ["who", "time", "against vmae", "memory", "TFLOP", "TFLOP/s", "of the peak"],
        rows,
    )
    lines = list(dict.fromkeys([*(p.line for p in points), *failed]))
    rows = []
    for line in lines:
        mine = [p for p in points if p.line == line]
        fit = fits.get(line)
        slope = ""
        if fit:
            slope = f"{fit.per_frame / MIB:.2f} MiB, from {fit.at_none / MIB:.0f} MiB at none, within {fit.off:.1%}, "
            slope += f"from {fit.first} frames on"
        measured = "; ".join(f"{p.frames}: {p.median:.3g} s, {gib(p.facts['bytes'])}" for p in mine)
        rows.append([line, measured, slope, f"at {failed[line]} frames" if line in failed else ""])
    memory = Section(
        "Memory and time against frames",
        "A line through memory against frames gives what a further frame takes; short clips, where the gradients alone "
        "make the peak, are left out of it.",
        ["who", "frames: time, memory", "a further frame", "out of memory"],
        rows,
        plots.get("frames"),
    )
    rows = [
        [p.line, str(p.frames), gib(p.facts["bytes"]), f"{p.facts['predicted']['bytes'] / p.facts['bytes']:.3f}",
         f"{p.facts['predicted']['flops'] / p.facts['flops']:.3f}",
         f"{p.median / p.facts['predicted']['seconds_at_least']:.2f}"]
        for p in points if p.facts.get("predicted") and p.facts["bytes"]
    ]  # fmt: skip
    predicted = Section(
        "What `vmae plan` says of the same steps",
        "Predicted memory and FLOP against measured ones, and measured time against that of perfect kernels.",
        ["who", "frames", "memory", "predicted / measured", "FLOP predicted / counted", "time / perfect"],
        rows,
    )
    parts = Section("Where a step's time goes", "", [], [], plots.get("parts"))
    budget = Section("Budget against memory", "", [], [], plots.get("budget"))
    return [table, memory, *(s for s in (parts, budget) if s.plot), predicted]


def kernels(found: dict[str, Any], plots: dict[str, str]) -> list[Section]:
    rows = []
    for bench in found["benchmarks"]:
        facts = bench["extra_info"]
        if "operation" not in facts:
            continue
        rate = f"{facts['flops_per_s'] / 1e12:.3g} TFLOP/s" if "flops_per_s" in facts else (
            f"{facts['bytes_per_s'] / 1e9:.3g} GB/s"
        )  # fmt: skip
        best = facts["seconds_of"][facts["best"]]
        rows.append([
            f"{facts['operation']} {facts['dtype']}", str(facts["frames"]), "both" if facts["backward"] else "forward",
            f"{1000 * bench['stats']['median']:.3g} ms", f"{facts['best']}: {1000 * best:.3g} ms",
            f"{facts['speedup']:.2f} x", rate, f"{facts['share_of_limit']:.0%}",
        ])  # fmt: skip
    text = "Ours beside the best that PyTorch offers, in turns; results are compared first."
    header = ["operation", "frames", "pass", "ours", "best other", "ours against it", "rate", "of the limit"]
    return [Section("Kernels", text, header, rows, plots.get("kernels"))] if rows else []


def pipeline(found: dict[str, Any]) -> list[Section]:
    rows = []
    for bench in found["benchmarks"]:
        facts = bench["extra_info"]
        if "tokenizer" in facts:
            parts = ", ".join(f"{part} {seconds:.2g}" for part, seconds in facts["parts"].items() if seconds > 0.005)
            median = bench["stats"]["median"]
            rows.append([facts["tokenizer"], str(facts["frames"]), f"{median:.3g} s", gib(facts["bytes"]), parts])
    for about in found.get("out_of_memory", []):
        if "tokenizer" in about:
            rows.append([about["tokenizer"], str(about["frames"]), "", "out of memory", ""])
    text = "A video decoded, tokens from the frozen tokenizer, and a step of the base model at 15 %."
    header = ["tokenizer", "frames", "time", "memory", "seconds by part"]
    return [Section("From a file to an updated model", text, header, rows)] if rows else []


def gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.2f} GiB"


def draw(found: dict[str, Any], results: Path) -> dict[str, str]:
    """The plots' files, by what they show."""
    from matplotlib.figure import Figure

    points, plots = points_of(found), {}

    def save(name: str, figure: Figure) -> None:
        file = results.with_name(f"{results.stem}-{name}.png")
        figure.savefig(file, dpi=110)
        plots[name] = file.name

    base = [p for p in points if p.facts["model"] == "base"]
    if base:
        failed, colours = first_out_of_memory(found), {}
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        memory, time = figure.subplots(1, 2)
        for line in dict.fromkeys(p.line for p in base):
            mine = [p for p in base if p.line == line]
            frames = [p.frames for p in mine]
            style = {"marker": "o", "markersize": 4, "linestyle": "-" if mine[0].facts["way"] == "vmae" else "--"}
            (drawn,) = time.plot(frames, [p.median for p in mine], label=line, **style)
            sizes = [p.facts["bytes"] / GIB for p in mine if p.facts["bytes"]]
            if sizes:
                memory.plot(frames[: len(sizes)], sizes, label=line, color=drawn.get_color(), **style)
            colours[line] = drawn.get_color()
        top = memory.get_xaxis_transform()  # how much those would take is not known: a cross at the top
        for line, at in failed.items():
            memory.plot([at], [0.97], marker="x", color=colours.get(line, "gray"), transform=top, linestyle="")
        memory.set(title="memory of a step (x: out of memory)", ylabel="GiB above what stands between steps")
        time.set(title="time of a step", ylabel="seconds")
        ticks = sorted({p.frames for p in base})
        for axes in (memory, time):
            axes.set(xscale="log", xlabel="frames")
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xticks(ticks, [str(t) for t in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        figure.legend(*time.get_legend_handles_labels(), frameon=False, fontsize=7, ncols=3, loc="outside lower center")
        save("frames", figure)
        ours = [
            p for p in base if p.facts["way"] == "vmae" and p.facts["budget"] == 0.15 and not p.facts["checkpointing"]
        ]
        if ours:
            figure = Figure(figsize=(7, 3), layout="constrained")
            axes = figure.subplots()
            left = [0.0] * len(ours)
            for part in ours[0].facts["parts"]:
                share = [p.facts["parts"][part] / sum(p.facts["parts"].values()) for p in ours]
                axes.barh([str(p.frames) for p in ours], share, left=left, label=part)
                left = [a + b for a, b in zip(left, share, strict=True)]
            axes.set(title="share of a step by part, 15 %", xlabel="share of time", ylabel="frames", xlim=(0, 1))
            axes.legend(frameon=False, fontsize=7, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.2))
            save("parts", figure)
    ours = [p for p in points if p.facts["way"] == "vmae" and p.facts["bytes"] and not p.facts["checkpointing"]]
    budgets = defaultdict(list)
    for p in ours:
        budgets[p.facts["model"], p.frames].append((100 * p.facts["budget"], p.facts["bytes"] / GIB))
    budgets = {key: sorted(pairs) for key, pairs in budgets.items() if len(pairs) > 1}
    if budgets:
        figure = Figure(figsize=(7, 3.4), layout="constrained")
        axes = figure.subplots()
        for (model, frames), pairs in sorted(budgets.items()):
            axes.plot(*zip(*pairs, strict=True), marker="o", markersize=4, label=f"{model}, {frames} frames")
        axes.set(title="memory of a step by budget", xlabel="decoded, %", ylabel="GiB", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7)
        save("budget", figure)
    rows = [bench["extra_info"] for bench in found["benchmarks"] if "operation" in bench["extra_info"]]
    if rows:
        figure = Figure(figsize=(8, 1 + 0.2 * len(rows)), layout="constrained")
        axes = figure.subplots()
        names = [f"{r['operation']} {r['frames']} {r['dtype']} {'both' if r['backward'] else ''}" for r in rows]
        axes.barh(names[::-1], [100 * r["share_of_limit"] for r in rows][::-1])
        for place, row in enumerate(reversed(rows)):
            axes.text(100 * row["share_of_limit"], place, f" {row['speedup']:.2f} x", va="center", fontsize=6)
        axes.tick_params(labelsize=6)
        axes.margins(x=0.08, y=0.01)
        axes.set(title="share of the device's limit; times the best other", xlabel="% of copies or products")
        save("kernels", figure)
    return plots


def as_markdown(section: Section) -> str:
    lines = [f"## {section.title}", ""]
    lines += [section.text, ""] if section.text else []
    lines += [f"![{section.title}]({section.plot})", ""] if section.plot else []
    if section.rows:
        lines += [f"| {' | '.join(section.header)} |", f"|{' --- |' * len(section.header)}"]
        lines += [f"| {' | '.join(row)} |" for row in section.rows]
    return "\n".join(lines).rstrip()


_MARKS = re.compile(r"\[([^]]+)\]\(([^)]+)\)|`([^`]+)`")


def _mark(found: re.Match[str]) -> str:
    """Markdown's link or code as HTML."""
    label, address, code = found.groups()
    return f"<code>{code}</code>" if code else f'<a href="{address}">{label}</a>'


def as_html(section: Section) -> str:
    def row(cells: list[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    text = f"<p>{_MARKS.sub(_mark, html.escape(section.text))}</p>" if section.text else ""
    plot = f'<img src="{section.plot}" alt="{html.escape(section.title)}">' if section.plot else ""
    rows = "\n".join(row(cells, "td") for cells in section.rows)
    table = f'<div class="scroll"><table>{row(section.header, "th")}\n{rows}</table></div>' if section.rows else ""
    return f"<section><h2>{html.escape(section.title)}</h2>{text}{plot}{table}</section>"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vmae: {title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1b1b1f; --paper: #fff; --line: #d9d9e0; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #ececf1; --paper: #131316; --line: #33333b; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1200px; padding: 1.5rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ margin: 2.5rem 0 .5rem; font-size: 1.2rem; }} p {{ max-width: 75ch; }}
img {{ max-width: 100%; background: #fff; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .85rem; }}
th, td {{ text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
