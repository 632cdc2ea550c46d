"""Size, arithmetic, time and memory of the tokenizers, and how memory grows with the number of frames.

    python benchmarks/tokenizer_memory.py
    python benchmarks/tokenizer_memory.py --vidtok ../VidTok       # a checkout of microsoft/VidTok; needs
                                                                   # beartype, lightning and omegaconf

Every figure comes from a process of its own that encodes a random video of one clip in bfloat16. Memory is the peak
resident size while it encodes, tokens included, less what was resident before, with model and video in place.
"""

import argparse
import datetime
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import machine, resident

RESULTS = Path(__file__).parent / "results"
PRESETS = ("tiny", "small", "base")
# Makes the C library give back at once what is freed, so that resident is what is in use; it costs time.
TIDY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vidtok", type=Path, help="checkout of the peer")
    parser.add_argument(
        "--out", type=Path, help="results file (default: benchmarks/results/tokenizer-memory-DATE.json)"
    )
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "FRAMES", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        model, frames, size = args.measure
        print(json.dumps(measure(model, int(frames), int(size), args.vidtok)))
        return
    wanted = [(preset, 128, size) for preset in PRESETS for size in (128, 224)]
    wanted += [(preset, 1024, 128) for preset in PRESETS]
    if args.vidtok:
        wanted += [("vidtok", 32, 128), ("vidtok", 64, 128), ("vidtok", 128, 128)]
        wanted += [("vidtok-tiled", 128, 128), ("vidtok-tiled", 1024, 128)]
    rows = []
    for model, frames, size in wanted:
        figures = child(model, frames, size, args.vidtok, {**os.environ, **TIDY})
        if not model.startswith("vidtok") and "failed" not in figures:
            figures["seconds"] = child(model, frames, size, args.vidtok, dict(os.environ))["seconds"]
        rows.append({"model": model, "frames": frames, "size": size, **figures})
        print(rows[-1], flush=True)
    results = {"what": "encoding one clip in bf16", "machine": machine(), "rows": rows}
    out = args.out or RESULTS / f"tokenizer-memory-{datetime.date.today()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {out}")


def child(model: str, frames: int, size: int, vidtok: Path | None, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", model, str(frames), str(size)]
    command += ["--vidtok", str(vidtok)] if vidtok else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"failed": (done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, frames: int, size: int, vidtok: Path | None) -> dict[str, Any]:
    torch.manual_seed(0)
    frames += name == "vidtok-tiled"  # it takes lengths of 4 k + 1 only
    video = torch.randint(0, 256, (1, frames, size, size, 3), dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    model, encode = _vidtok(vidtok, tiled="tiled" in name) if name.startswith("vidtok") else _ours(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        encode(video[:, :, :17])  # what is allocated once
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the present size
        idle = resident("VmRSS")
        start = time.perf_counter()
        encode(video)
        seconds = time.perf_counter() - start
    figures = {"seconds": round(seconds, 2), "mib": round(1024 * (resident("VmHWM") - idle), 1)}
    figures["parameters_m"] = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    if not name.startswith("vidtok"):
        figures["encode_tflop"] = round(_flop(name, frames, size) / 1e12, 2)
    return figures


def _ours(preset: str) -> tuple[torch.nn.Module, Callable[[torch.Tensor], Any]]:
    from vmae import AdaptiveTokenizer, TokenizerConfig

    model = AdaptiveTokenizer(getattr(TokenizerConfig, preset)()).eval()
    return model, lambda video: model.encode(video[:, :, : video.shape[2] // 2 * 2])


def _flop(preset: str, frames: int, size: int) -> int:
    """Of encoder and scorer, counted on one tile without arithmetic."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from vmae import AdaptiveTokenizer, TokenizerConfig

    with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = AdaptiveTokenizer(getattr(TokenizerConfig, preset)())
        tile = torch.empty(1, model.config.tile, size, size, 3).permute(0, 4, 1, 2, 3)
        model.encoder(tile)
        model.scorer(tile)
    return counter.get_total_flops() * frames // model.config.tile


def _vidtok(checkout: Path | None, *, tiled: bool) -> tuple[torch.nn.Module, Callable[[torch.Tensor], Any]]:
    """The encoder of its causal 18-bit model (v1.1, 4 x 16 x 16 pixels a token), with random weights.

    Tiled as its tile_encode: the first frame, then 16 at a time.
    """
    sys.path.insert(0, str(checkout))
    from vidtok.modules.model_3dcausal_v1_1 import EncoderCausal3DPadding

    settings = {
        "double_z": False, "z_channels": 6, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4, 4],
        "time_downsample_factor": 4, "num_res_blocks": 2, "dropout": 0.0, "use_checkpoint": False,
        "init_pad_mode": "replicate", "norm_type": "layernorm", "interpolation_mode": "trilinear",
    }  # fmt: skip
    model = EncoderCausal3DPadding(**settings).eval()

    def encode(video: torch.Tensor) -> list[torch.Tensor]:
        parts = []
        bounds = [0, 1, *range(17, video.shape[2] + 16, 16)] if tiled else [0, video.shape[2]]
        for module in model.modules():
            if hasattr(module, "causal_cache"):
                module.causal_cache = None
        for start, end in itertools.pairwise(bounds):
            for module in model.modules():
                if hasattr(module, "is_first_chunk"):
                    module.is_first_chunk = start == 0
            parts.append(model(video[:, :, start:end].float() / 127.5 - 1))
        return parts

    return model, encode


if __name__ == "__main__":
    main()
