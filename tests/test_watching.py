"""The report of a training run: curves, samples, command and settings, while it goes on and when it has ended."""

import json
import math
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from vmae import AdaptiveTokenizer, VideoMAE, checkpoint, load_clip, watching
from vmae.evaluation import reconstruction
from vmae.masking import tube_mask
from vmae.optimisation import Optimisation
from vmae.prediction import predicted
from vmae.pretraining import PretrainRun, pretrain
from vmae.tokenizer_training import TokenizerRun, train_tokenizer
from vmae.training import Clips, TrainingError
from vmae.watching import REPORT, SAMPLES, masked, read_losses, status, watch, write_report, write_sample


@pytest.fixture(scope="module")
def runs(moving_square, tmp_path_factory):
    """A tokenizer's run, and two models' of it."""
    folder = tmp_path_factory.mktemp("runs")
    options = Optimisation(steps=5, save_every=2, precision="fp32", lr=1e-3)
    clips = Clips(frames=32, size=32, workers=0)
    train_tokenizer(
        TokenizerRun(moving_square, folder / "tokenizer", model="tiny", gan=0.0, clips=clips, optimisation=options)
    )
    how = {"model": "tiny", "clips": clips, "optimisation": options, "tokenizer": folder / "tokenizer"}
    pretrain(PretrainRun(moving_square, folder / "latent", **how))
    pretrain(PretrainRun(moving_square, folder / "pixels", target="pixels", strategy="random", mask_ratio=0.6, **how))
    return folder


def means(pictures: np.ndarray) -> np.ndarray:
    """Of every token, without its border: an untrained model makes noise, of which JPEG keeps the means."""
    tokens = pictures.reshape(*pictures.shape[:-3], 2, 16, 2, 16, 3)
    return tokens[..., 2:14, :, 2:14, :].astype(float).mean((-4, -2))


def sample_of(run, step: int, rows: int = 3) -> np.ndarray:
    """[rows, 4, 32, 32, 3]."""
    picture = np.asarray(Image.open(run / SAMPLES / f"step-{step:08d}.jpg")).astype(int)
    return picture.reshape(rows, 32, 4, 32, 3).swapaxes(1, 2)


@pytest.mark.parametrize("name", ["tokenizer", "latent", "pixels"])
def test_every_run_ends_with_a_report(runs, name):
    text = (runs / name / REPORT).read_text()
    assert "all 5 steps are done" in text
    assert "http-equiv" not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert text.count("data:image/jpeg;base64,") == 3  # after steps 2, 4 and 5
    settings = json.loads((runs / name / "run.json").read_text())
    assert settings["command"].split()[0] == sys.orig_argv[0]
    assert settings["kind"] == ("tokenizer" if name == "tokenizer" else "pretraining")
    assert "&quot;save_every&quot;: 2" in text
    plots = dict(re.findall(r"<figcaption><strong>([^<]+)</strong> (.*?)</figcaption>", text))
    assert {"loss", "learning rate", "gradient's norm", "clips/s", "memory, GiB"} <= plots.keys()
    assert ("bits of each dimension's codes" in plots) == (name == "tokenizer")
    last = json.loads((runs / name / "log.jsonl").read_text().splitlines()[-1])
    assert f">loss {last['loss']:.4g}<" in plots["loss"]


def test_a_curve_goes_through_its_points(tmp_path):
    """(step, loss) (0, 4), (1, 1), (2, 3) and one step left out."""
    run = run_of(tmp_path / "run", 9, 0)
    losses = [4, 1, 3, None]
    (run / "log.jsonl").write_text(
        "".join(json.dumps({"step": i, **LINE, "loss": x}) + "\n" for i, x in enumerate(losses))
    )
    text = write_report(run).read_text()
    (points,) = re.findall(r'aria-label="loss">.*?<polyline points="([^"]+)"', text)
    assert points == "0.0,18.0 250.0,178.0 500.0,71.3"
    log_of(run, [i % 7 for i in range(20000)])
    text = write_report(run).read_text()
    pale, mean = re.findall(r'aria-label="loss">.*?<polyline points="([^"]+)".*?<polyline points="([^"]+)"', text)[0]
    assert len(pale.split()) == len(mean.split()) == 1000
    heights = [float(pair.split(",")[1]) for pair in mean.split()]
    assert max(heights) - min(heights) < 3  # the mean of 0 to 6 is 3, wherever
    assert np.mean(heights) == pytest.approx(178 - 80, abs=2)


def test_a_tokenizers_sample(runs, moving_square):
    clip = load_clip(moving_square, frames=32, size=32)[:, :, :16]
    model = checkpoint.load(AdaptiveTokenizer, runs / "tokenizer")
    with torch.no_grad():
        tokens = model.encode(clip)
        rows = [clip / 255, *(reconstruction(model, tokens, name).clamp(0, 1) for name in ("all", "adaptive"))]
    for row, drawn in zip(rows, sample_of(runs / "tokenizer", 5), strict=True):
        wanted = 255 * row[0][:, [0, 5, 10, 15]].permute(1, 2, 3, 0).numpy()
        assert np.abs(means(drawn) - means(wanted)).max() < 8


@pytest.mark.parametrize("name", ["latent", "pixels"])
def test_a_models_sample(runs, moving_square, name):
    clip = load_clip(moving_square, frames=32, size=32)
    model = checkpoint.load(VideoMAE, runs / name)
    tokenizer = checkpoint.load(AdaptiveTokenizer, runs / "tokenizer") if name == "latent" else None
    with torch.inference_mode():
        found = predicted(clip, model, tokenizer)
    seen = tube_mask((16, 2, 2), 1, mask_ratio=model.config.mask_ratio, seed=0).visible[0]
    assert torch.equal(found.visible, seen)
    assert len(found.selected) == 10
    video, tokens, made = sample_of(runs / name, 5)
    for column, frame in enumerate((0, 5, 10, 15)):
        own, said = (x[0, :, frame].permute(1, 2, 0).numpy().astype(int) for x in (clip, found.video))
        assert np.abs(means(video[column]) - means(own)).max() < 8
        for place in range(4):
            token, at = frame // 2 * 4 + place, (place // 2, place % 2)
            for drawn, pixels in ((tokens, own), (made, said)):
                blue = 0.35 * pixels + 0.65 * np.array([64, 128, 255])
                bright = token in found.selected and token not in found.visible
                wanted = pixels if bright else blue if token in found.visible else 0.18 * pixels
                assert np.abs(means(drawn[column])[at] - means(wanted)[at]).max() < 8


def test_masked():
    clip = torch.full((3, 2, 32, 32), 100, dtype=torch.uint8)
    shown = masked(clip, torch.tensor([1]), torch.tensor([2]))
    assert (shown[:, :, :16, :16] == 18).all()
    assert (shown[:, :, :16, 16:] == 100).all()
    assert shown[:, 0, 20, 5].tolist() == [round(35 + 0.65 * x) for x in (64, 128, 255)]
    assert (shown[:, :, 16:, 16:] == 18).all()


LINE = {"loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "clips_per_s": 4.0, "waiting": 0.0, "memory_gib": 1.0, "skipped": 0}


def log_of(run, losses: list) -> None:
    lines = [json.dumps({"step": i, **LINE, "loss": loss}) + "\n" for i, loss in enumerate(losses)]
    (run / "log.jsonl").write_text("".join(lines))


def run_of(folder, steps: int, lines: int, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"optimisation": {"steps": steps}, "command": "vmae <x>"}))
    text = "".join(json.dumps({"step": i, **LINE, **changes}) + "\n" for i in range(lines))
    (folder / "log.jsonl").write_text(text + '{"step": 9, "lo')
    return folder


def test_while_it_goes_on(tmp_path):
    run = run_of(tmp_path / "run", 1000, 300, skipped=2)
    text = write_report(run, refresh=7).read_text()
    assert "step 300 of 1,000 (30%), loss 2.0000 (mean of 20), 4 clips/s, skipped videos 2 times" in text
    assert '<meta http-equiv="refresh" content="7">' in text
    assert "vmae &lt;x&gt;" in text
    assert "Samples" not in text
    assert "before the first of 10 steps" in write_report(run_of(tmp_path / "new", 10, 0)).read_text()
    assert "no loss" not in status([{"step": 0, **LINE, "loss": None}], 2)


def test_samples_are_thinned(tmp_path):
    run = run_of(tmp_path / "run", 100, 100)
    for step in range(1, 31):
        write_sample(run, step, [torch.full((3, 4, 16, 16), step, dtype=torch.uint8)])
    text = write_report(run).read_text()
    shown = [int(step) for step in re.findall(r"after step (\d+)<", text)]
    assert len(shown) == 10
    assert (shown[0], shown[-1]) == (1, 30)


def test_watch_ends_with_the_run(tmp_path, capsys, monkeypatch):
    run = run_of(tmp_path / "run", 3, 1)
    later = threading.Thread(target=lambda: (time.sleep(0.5), run_of(run, 3, 3)))
    later.start()
    watch(run, 0.1)
    later.join()
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(f"{REPORT}: open it in a browser; it is written again every 0.1 s")
    assert said[1].startswith("step 1 of 3 (33%)")
    assert said[-1].startswith("all 3 steps are done")
    assert len(said) == 3
    assert "http-equiv" not in (run / REPORT).read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: expected the folder of a training run, with run.json"),
        (["run", "--every", "0"], "every: expected a number of seconds above 0, got 0"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    run_of(tmp_path / "run", 3, 3)
    done = subprocess.run(
        [sys.executable, "-m", "vmae", "watch", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def small(moving_square, out, **changes) -> PretrainRun:
    options = Optimisation(steps=6, save_every=1, precision="fp32", lr=1e-3)
    how = {"model": "tiny", "clips": Clips(frames=16, size=32, workers=0), "optimisation": options, **changes}
    return PretrainRun(moving_square, out, target="pixels", strategy="random", mask_ratio=0.6, **how)


def test_a_run_that_fails_has_a_report_too(moving_square, tmp_path, monkeypatch):
    monkeypatch.setattr(VideoMAE, "forward", lambda self, *_, **__: sum(p.sum() for p in self.parameters()) * math.nan)
    with pytest.raises(TrainingError, match="diverged"):
        pretrain(small(moving_square, tmp_path / "run"))
    assert "step 4 of 6" in (tmp_path / "run" / REPORT).read_text()


@pytest.mark.parametrize("error", [OSError("no space"), torch.OutOfMemoryError("much"), ValueError("odd")])
def test_a_sample_that_cannot_be_made_ends_nothing(moving_square, tmp_path, monkeypatch, capsys, error):
    def fails(clip, model, *_, **__):
        assert not model.training
        raise error

    trained = []
    monkeypatch.setattr("vmae.pretraining.predicted", fails)
    monkeypatch.setattr("vmae.training.set_learning_rate", lambda optimizer, step, options: trained.append(step))
    out = pretrain(small(moving_square, tmp_path / "run"))
    assert len(trained) == 6
    assert f"no sample after step 1: {error}" in capsys.readouterr().err
    assert (out / "model.safetensors").exists()
    assert "all 6 steps are done" in (out / REPORT).read_text()


def test_samples_change_nothing(moving_square, tmp_path, monkeypatch):
    def losses(name: str) -> list:
        out = pretrain(small(moving_square, tmp_path / name))
        return [line["loss"] for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())]

    with_samples = losses("with")
    monkeypatch.setattr("vmae.pretraining.sample_clip", lambda run: None)
    assert losses("without") == with_samples
    assert (tmp_path / "with" / SAMPLES).exists()
    assert not (tmp_path / "without" / SAMPLES).exists()


def test_what_a_run_left_is_removed_by_the_next(runs, moving_square, tmp_path):
    """Samples and report of a run that is replaced, and samples after the checkpoint that a run goes on from."""
    options = Optimisation(steps=2, save_every=1, precision="fp32", lr=1e-3)
    clips = Clips(frames=16, size=32, workers=0)
    how = {"model": "tiny", "clips": clips, "optimisation": options, "target": "pixels", "strategy": "random"}
    (tmp_path / "run" / SAMPLES).mkdir(parents=True)
    (tmp_path / "run" / SAMPLES / "step-00000009.jpg").write_bytes(b"old")
    (tmp_path / "run" / SAMPLES / ".step-00000001.jpg.x.part").write_bytes(b"cut")
    pretrain(PretrainRun(moving_square, tmp_path / "run", mask_ratio=0.6, **how))
    names = sorted(path.name for path in (tmp_path / "run" / SAMPLES).iterdir())
    assert names == ["step-00000001.jpg", "step-00000002.jpg"]
    assert watching.status([{"step": 1, **LINE}], 2).startswith("all 2 steps")


def test_losses_of_a_log_that_was_cut_short(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0, "loss": 2.5}\n{"step": 1, "loss": null}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert read_losses(log) == [2.5, 1.5]
