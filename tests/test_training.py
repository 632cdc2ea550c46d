"""Training runs: logs, checkpoints, determinism, and what happens when something goes wrong."""

import dataclasses
import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vmae import AdaptiveTokenizer, ClipDataset, TokenizerConfig, VideoMAE, batches, checkpoint, load_clip, optimisation
from vmae.masking import STRATEGIES
from vmae.optimisation import Optimisation, learning_rate
from vmae.pretraining import PretrainRun, cache, pretrain
from vmae.tokenizer_training import TokenizerRun, train_tokenizer
from vmae.training import PATIENCE, Clips, TrainingError
from vmae.video import Augmentation


def tokenizer_run(data: Path, out: Path, *, steps: int = 3, workers: int = 0, overwrite: bool = False, **options):
    """Without adversary, averaging or steps that keep all tokens: those have tests of their own."""
    options = {"precision": "fp32", "lr": 2e-3, **options}
    clips = Clips(frames=8, size=32, workers=workers)
    return TokenizerRun(data, out, model="tiny", clips=clips, optimisation=Optimisation(steps=steps, **options),
                        overwrite=overwrite, gan=0.0, ema=0.0, keep_all=0.0)  # fmt: skip


def pretrain_run(data: Path, out: Path, tokenizer: Path | None, *, steps: int = 3, **changes):
    options = Optimisation(steps=steps, precision="fp32", lr=1e-3)
    clips = Clips(frames=16, size=32, workers=0)
    return PretrainRun(data, out, tokenizer=tokenizer, model="tiny", clips=clips, optimisation=options, **changes)


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_tokenizer_run_leaves_log_configuration_and_model(moving_square, tmp_path):
    out = train_tokenizer(tokenizer_run(moving_square, tmp_path / "run", steps=25))
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(25))
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["memory_gib"] > 0 for line in log)
    losses = [line["loss"] for line in log]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert json.loads((out / "run.json").read_text())["optimisation"]["steps"] == 25
    loaded = checkpoint.load(AdaptiveTokenizer, out)
    torch.manual_seed(0)
    fresh = AdaptiveTokenizer(TokenizerConfig.tiny())
    assert not torch.equal(loaded.encoder.stem.weight, fresh.encoder.stem.weight)
    files = ["config.json", "log.jsonl", "model.safetensors", "report.html", "run.json", "samples"]
    assert sorted(p.name for p in out.iterdir()) == [*files, "state-00000025.safetensors"]


def test_same_seed_gives_the_same_losses_with_and_without_workers(moving_square, tmp_path):
    runs = [
        log_of(train_tokenizer(tokenizer_run(moving_square, tmp_path / name, workers=workers, seed=seed)))
        for name, workers, seed in (("a", 0, 5), ("b", 1, 5), ("c", 0, 6))
    ]
    losses = [[line["loss"] for line in run] for run in runs]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pretraining_with_every_strategy(strategy, moving_square, tokenizer_dir, tmp_path):
    out = pretrain(pretrain_run(moving_square, tmp_path / "run", tokenizer_dir, strategy=strategy))
    config = checkpoint.load(VideoMAE, out).config
    assert (config.strategy, config.frames, config.size, config.width) == (strategy, 16, 32, 192)
    assert len(log_of(out)) == 3


def test_pixel_targets_need_no_tokenizer(moving_square, tmp_path):
    run = pretrain_run(moving_square, tmp_path / "run", None, strategy="random", target="pixels", steps=1)
    assert checkpoint.load(VideoMAE, pretrain(run)).head.out_features == 1536
    with pytest.raises(ValueError, match=r"tokenizer: expected a tokenizer's folder for target latent.*got none"):
        pretrain(pretrain_run(moving_square, tmp_path / "other", None))
    assert not (tmp_path / "other").exists()


def test_pretraining_leaves_the_tokenizer_alone(moving_square, tokenizer_dir, tmp_path):
    before = (tokenizer_dir / "model.safetensors").read_bytes()
    pretrain(pretrain_run(moving_square, tmp_path / "run", tokenizer_dir, steps=1))
    assert (tokenizer_dir / "model.safetensors").read_bytes() == before


def test_accumulated_parts_make_the_step_of_one_batch(moving_square, tmp_path, monkeypatch):
    original = AdaptiveTokenizer.forward

    def loss(self, video, *, seed, keep, row):  # without masks or noise, so that only the batches differ
        return original(self, video, seed=seed)._replace(loss=(self.encoder(video.float() / 255) ** 2).mean())

    monkeypatch.setattr(AdaptiveTokenizer, "forward", loss)
    runs = {
        name: log_of(train_tokenizer(tokenizer_run(moving_square, tmp_path / name, **options)))
        for name, options in (("whole", {"batch_size": 2}), ("parts", {"accumulate": 2}))
    }
    for whole, parts in zip(runs["whole"], runs["parts"], strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_training_equals_a_plain_loop(moving_square, tmp_path):
    options = {"weight_decay": 0.1, "beta1": 0.8, "beta2": 0.9, "clip_norm": 0.5, "lr": 1e-3, "seed": 3}
    out = train_tokenizer(tokenizer_run(moving_square, tmp_path / "run", steps=20, **options))
    torch.manual_seed(3)
    model = AdaptiveTokenizer(TokenizerConfig.tiny())
    clips = batches(ClipDataset(moving_square, frames=8, size=32, seed=3), 1, seed=3)
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()}
    for step in range(1, 21):
        model.zero_grad()
        model(next(clips)[0], seed=(3 << 32) + step - 1).loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
        rate = 1e-3 * (step / 2 if step <= 2 else 0.01 + 0.99 * (1 + math.cos(math.pi * (step - 3) / 18)) / 2)
        with torch.no_grad():  # Loshchilov and Hutter's AdamW, written out; biases and gains do not decay
            for p, (mean, square) in moments.items():
                grad = p.grad * min(0.5 / (norm + 1e-6), 1)
                mean.lerp_(grad, 0.2)
                square.lerp_(grad**2, 0.1)
                if p.ndim > 1:
                    p.mul_(1 - rate * 0.1)
                p -= rate * (mean / (1 - 0.8**step)) / ((square / (1 - 0.9**step)).sqrt() + 1e-8)
    trained = dict(checkpoint.load(AdaptiveTokenizer, out).named_parameters())
    torch.manual_seed(3)
    moved = dict(AdaptiveTokenizer(TokenizerConfig.tiny()).named_parameters())
    for name, p in model.named_parameters():
        # Rounding grows where a gradient is near 0, since Adam divides by its size.
        error = (trained[name] - p).norm() / (p - moved[name]).norm()
        assert error < 0.02, name


def test_learning_rate_rises_then_follows_a_cosine():
    options = Optimisation(steps=100, warmup=10, lr=2.0)
    rates = [learning_rate(step, options) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(2.0 * (0.01 + 0.99 / 2))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] < 0.025
    assert [learning_rate(i, Optimisation(steps=1, lr=2.0)) for i in range(1)] == [2.0]


@pytest.mark.parametrize(
    "sampling",
    [
        {"stride": 3},
        {"fps": 5.0},
        {"short": "refuse"},
        {"frames": 4},
        {"size": 64},
        {"augmentation": Augmentation(0.5)},
    ],
    ids=str,
)
def test_clips_are_taken_as_asked(sampling, moving_square, tmp_path, monkeypatch):
    run = tokenizer_run(moving_square, tmp_path / "run", seed=7)
    clips = dataclasses.replace(run.clips, **sampling)
    asked = {}

    def dataset(data, **how):
        if how["start"] == "random":  # not the clip of the samples
            asked.update(how, data=data)
        return ClipDataset(data, **how)

    monkeypatch.setattr("vmae.training.ClipDataset", dataset)
    train_tokenizer(dataclasses.replace(run, clips=clips))
    settings = dataclasses.asdict(clips)
    del settings["workers"]
    settings["augmentation"] = clips.augmentation
    assert asked == {**settings, "data": moving_square, "start": "random", "seed": 7, "views": 0}


@pytest.mark.parametrize("command", [train_tokenizer, pretrain, cache])
def test_clips_of_different_lengths_are_refused_before_any_work(command, moving_square, tokenizer_dir, tmp_path):
    run = pretrain_run(moving_square, tmp_path / "run", tokenizer_dir, cache=tmp_path / "cache", views=1)
    if command is train_tokenizer:
        run = tokenizer_run(moving_square, tmp_path / "run")
    with pytest.raises(ValueError, match=r"short: expected loop or refuse, as .* one length, got keep"):
        command(dataclasses.replace(run, clips=dataclasses.replace(run.clips, short="keep")))
    assert list(tmp_path.iterdir()) == []


def test_unusable_videos_are_skipped_and_counted(video_folder, tmp_path, capsys):
    out = train_tokenizer(tokenizer_run(video_folder, tmp_path / "run", steps=6))
    assert log_of(out)[-1]["skipped"] >= 2
    assert f"skipped: {video_folder / 'broken.mp4'}" in capsys.readouterr().err


def test_nothing_but_unusable_videos_is_an_error(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"none of 1 videos could be used.*x\.mp4"):
        train_tokenizer(tokenizer_run(tmp_path, tmp_path / "run"))


def test_validation_takes_every_usable_video_once(video_folder, tmp_path, monkeypatch, capsys):
    names = ["gone.mp4", "a.mp4", "broken.mp4", "b.mp4", "none.mp4"]
    (tmp_path / "val.txt").write_text("\n".join(str(video_folder / name) for name in names))
    settings = {"strategy": "random", "target": "pixels", "val": tmp_path / "val.txt"}
    run = pretrain_run(video_folder, tmp_path / "run", None, steps=2, **settings)
    run = dataclasses.replace(run, optimisation=dataclasses.replace(run.optimisation, batch_size=3, save_every=1))
    seen, forward = [], VideoMAE.forward

    def recorded(model, clip, *arguments, **options):
        value = forward(model, clip, *arguments, **options)
        if not model.training:
            seen.extend(zip(value.tolist(), clip, strict=True))
        return value

    monkeypatch.setattr(VideoMAE, "forward", recorded)
    log = log_of(pretrain(run))
    expected = [load_clip(video_folder / name, frames=16, size=32)[0] for name in ("a.mp4", "b.mp4")]
    assert len(seen) == 12
    for line, clips in zip(log, (seen[:6], seen[6:]), strict=True):
        # In the places of the others stand substitutes, with other masks, which do not count.
        found = [[value for value, clip in clips if torch.equal(clip, wanted)] for wanted in expected]
        assert sum(map(len, found)) == 6
        assert any(line["val_loss"] == pytest.approx((a + b) / 2) for a, b in itertools.product(*found))
    told = capsys.readouterr().err
    assert all(told.count(f"skipped in validation: {video_folder / names[i]}") == 1 for i in (0, 2, 4))


def test_validation_on_nothing_is_refused_before_any_work(video_folder, tmp_path):
    (tmp_path / "val.txt").write_text("gone.mp4\nnone.mp4\n")
    run = pretrain_run(video_folder, tmp_path / "run", None, strategy="random", target="pixels")
    with pytest.raises(ValueError, match=r"none of 2 videos could be used; the last one: .*none\.mp4"):
        pretrain(dataclasses.replace(run, val=tmp_path / "val.txt"))
    assert not run.out.exists()


def test_a_run_cannot_begin_with_what_it_replaces(video_folder, tokenizer_dir, tmp_path):
    run = pretrain_run(video_folder, tmp_path / "run", tokenizer_dir, init=tmp_path / "x" / ".." / "run")
    with pytest.raises(ValueError, match=r"init: expected another folder than --out, got .*run for both"):
        pretrain(run)


def break_steps(monkeypatch, broken) -> None:
    """Make the loss of these steps NaN."""
    original = AdaptiveTokenizer.forward

    def forward(self, video, *, seed, keep=None, row=0):
        output = original(self, video, seed=seed, keep=keep, row=row)
        return output._replace(loss=output.loss * (float("nan") if seed in broken else 1))

    monkeypatch.setattr(AdaptiveTokenizer, "forward", forward)


def test_a_batch_that_gives_no_number_changes_nothing(moving_square, tmp_path, monkeypatch, capsys):
    break_steps(monkeypatch, {2, 3})
    saved, save = [], checkpoint.save

    def recorded(model, out):
        saved.append(model.encoder.stem.weight.clone())
        save(model, out)

    monkeypatch.setattr(checkpoint, "save", recorded)
    out = train_tokenizer(tokenizer_run(moving_square, tmp_path / "run", steps=6, save_every=1))
    assert [line["loss"] is None for line in log_of(out)] == [False, False, True, True, False, False]
    assert "step 2: loss nan" in capsys.readouterr().err
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(saved)]
    assert changed == [True, False, False, True, True]
    assert all(p.isfinite().all() for p in checkpoint.load(AdaptiveTokenizer, out).parameters())


def test_loss_after_loss_that_is_no_number_stops_the_run(moving_square, tmp_path, monkeypatch):
    break_steps(monkeypatch, range(2, 2 + PATIENCE))
    words = rf"step {1 + PATIENCE}: the training diverged: expected a finite loss.*nan.*{PATIENCE} times in a row"
    run = tokenizer_run(moving_square, tmp_path / "run", steps=20, save_every=2)
    for resume in (False, True):  # the steps before the checkpoint still count
        with pytest.raises(TrainingError, match=words):
            train_tokenizer(dataclasses.replace(run, resume=resume))
    model = checkpoint.load(AdaptiveTokenizer, tmp_path / "run")
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_earlier_run_is_not_lost_by_mistake(moving_square, tmp_path):
    out = train_tokenizer(tokenizer_run(moving_square, tmp_path / "run", steps=1))
    weights = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        train_tokenizer(tokenizer_run(moving_square, out, steps=2))
    assert (out / "model.safetensors").read_bytes() == weights
    train_tokenizer(tokenizer_run(moving_square, out, steps=2, overwrite=True))
    assert len(log_of(out)) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [({"steps": 0}, "steps.*0"), ({"batch_size": 0}, "batch_size.*0"), ({"lr": 0.0}, "lr.*0"),
     ({"lr": float("nan")}, "lr.*nan"), ({"clip_norm": -1.0}, "clip_norm.*-1")],
)  # fmt: skip
def test_wrong_options_are_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        train_tokenizer(tokenizer_run(tmp_path, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_among_the_videos(video_folder):
    before = sorted(video_folder.iterdir())
    with pytest.raises(ValueError, match="out: expected another folder than the videos'"):
        train_tokenizer(tokenizer_run(video_folder, video_folder / "."))
    assert sorted(video_folder.iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named(moving_square, tmp_path):
    with pytest.raises(ValueError, match="sees no CUDA device"):
        train_tokenizer(tokenizer_run(moving_square, tmp_path / "run", device="cuda"))


def start_training(data: Path, out: Path, **environment) -> subprocess.Popen:
    command = [sys.executable, "-m", "vmae", "tokenizer", "--data", data, "--out", out, "--model", "tiny"]
    options = ["--frames", "8", "--size", "32", "--workers", "0", "--steps", "100000", "--save-every", "1"]
    return subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


def wait_for_steps(process: subprocess.Popen, out: Path, steps: int) -> None:
    for _ in range(600):
        log = out / "log.jsonl"
        if log.exists() and log.read_text().count("\n") >= steps:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("training did not start")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_the_model(sent, moving_square, tmp_path):
    process = start_training(moving_square, tmp_path / "run")
    wait_for_steps(process, tmp_path / "run", 3)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert re.search(r"interrupted: stopped after \d+ steps; the model is in .*; --resume goes on", errors)
    checkpoint.load(AdaptiveTokenizer, tmp_path / "run")


def test_kill_leaves_whole_files(moving_square, tmp_path):
    process = start_training(moving_square, tmp_path / "run")
    wait_for_steps(process, tmp_path / "run", 4)
    process.kill()
    process.communicate()
    checkpoint.load(AdaptiveTokenizer, tmp_path / "run")


def test_what_a_killed_run_left_is_cleared(moving_square, tmp_path):
    left = tmp_path / "run" / ".model.safetensors.abc.part"
    left.parent.mkdir()
    left.write_bytes(b"half")
    train_tokenizer(tokenizer_run(moving_square, tmp_path / "run", steps=1))
    assert not left.exists()


def test_full_disk_keeps_the_earlier_checkpoint(tokenizer_dir, tmp_path):
    model = checkpoint.load(AdaptiveTokenizer, tokenizer_dir)
    checkpoint.save(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        with pytest.raises(OSError, match=r"model\.safetensors"):
            checkpoint.save(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_damaged_models_are_named(tokenizer_dir, tmp_path):
    with pytest.raises(ValueError, match=r"nothing: expected a saved AdaptiveTokenizer with config\.json"):
        checkpoint.load(AdaptiveTokenizer, tmp_path / "nothing")
    weights = (tokenizer_dir / "model.safetensors").read_bytes()
    config = (tokenizer_dir / "config.json").read_text()
    for name, damaged_weights, damaged_config in (
        ("truncated", weights[: len(weights) // 2], config),
        ("empty", b"", config),
        ("no-json", weights, config[:-20]),
        ("other-width", weights, config.replace('"width": 32', '"width": 64')),
        ("bad-value", weights, config.replace('"tile": 16', '"tile": 3')),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(damaged_weights)
        (folder / "config.json").write_text(damaged_config)
        with pytest.raises(ValueError, match=f"{name}: is no readable AdaptiveTokenizer") as caught:
            checkpoint.load(AdaptiveTokenizer, folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_model_that_is_not_made_of_numbers_is_refused(number, tokenizer_dir, tmp_path):
    model = checkpoint.load(AdaptiveTokenizer, tokenizer_dir)
    with torch.no_grad():
        model.encoder.stem.weight[0, 0, 0, 0, 0] = number
    checkpoint.save(model, tmp_path / "run")
    words = r"run: is no readable AdaptiveTokenizer: expected numbers, found NaN or infinity in encoder\.stem\.weight"
    with pytest.raises(ValueError, match=words):
        checkpoint.load(AdaptiveTokenizer, tmp_path / "run")


def test_a_model_of_another_kind_or_version_is_refused(tokenizer_dir, tmp_path):
    with pytest.raises(ValueError, match="is no readable VideoMAE: expected VideoMAE, found AdaptiveTokenizer"):
        checkpoint.load(VideoMAE, tokenizer_dir)
    checkpoint.save(checkpoint.load(AdaptiveTokenizer, tokenizer_dir), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "codebook": 8}))
    with pytest.raises(ValueError, match="unknown settings codebook"):
        checkpoint.load(AdaptiveTokenizer, tmp_path)


def test_pickles_are_not_read(tokenizer_dir, tmp_path):
    model = checkpoint.load(AdaptiveTokenizer, tokenizer_dir)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((tokenizer_dir / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        AdaptiveTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "device", "native", "wanted"),
    [
        ("auto", "cpu", False, "fp32"),
        ("auto", "cpu", True, "bf16"),
        ("auto", "cuda", False, "bf16"),
        ("bf16", "cpu", False, "bf16"),
        ("fp32", "cuda", True, "fp32"),
    ],
)
def test_precision(monkeypatch, name, device, native, wanted):
    monkeypatch.setattr(optimisation, "native_bf16", lambda: native)
    assert optimisation.precision_of(name, torch.device(device)) == wanted
    if device == "cpu":
        with optimisation.autocast(torch.device(device), name):
            assert torch.is_autocast_enabled("cpu") == (wanted == "bf16")
