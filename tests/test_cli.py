"""Every command, as a user types it, on generated videos."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vmae import AdaptiveTokenizer, VideoMAE, VideoMAEConfig, checkpoint, cli, demo
from vmae.evaluation import evaluate
from vmae.watching import read_losses

SMALL = ["--frames", "16", "--size", "32", "--workers", "0"]
TINY = [*SMALL, "--model", "tiny", "--steps", "2"]


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["vmae", *map(str, arguments)])
    cli.main()


def refused(monkeypatch, capsys, *arguments) -> str:
    """The one line that a command ends with when it is asked for something wrong."""
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vmae: error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, moving_square) -> Path:
    """A folder with a tokenizer and a mae, made by the commands."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        common = ["--data", moving_square, *TINY]
        run(patch, "tokenizer", *common, "--out", folder / "tokenizer")
        run(patch, "pretrain", *common, "--out", folder / "mae", "--tokenizer", folder / "tokenizer")
    return folder


def test_training_commands_write_models(trained):
    for name in ("tokenizer", "mae"):
        assert len(read_losses(trained / name / "log.jsonl")) == 2
        assert (trained / name / "model.safetensors").stat().st_size > 100_000


def test_a_tokenizer_is_evaluated(trained, video_folder, monkeypatch, capsys):
    monkeypatch.setattr("vmae.tokenizer_training.evaluate", functools.partial(evaluate, scenes=4))
    asked = ["tokenizer", "--evaluate", trained / "tokenizer", "--data", video_folder, *SMALL]
    run(monkeypatch, *asked)
    text = capsys.readouterr().out
    for words in (
        "2 clips of 16 frames at 32 x 32",
        "broken.mp4",
        "mean colour",
        "49% of the tokens, adaptive",
        "untrained",
    ):
        assert words in text
    run(monkeypatch, *asked, "--json")
    result = json.loads(capsys.readouterr().out)
    assert f"{result['psnr']['all']:.2f}" in text
    assert len(result["entropy"]) == 6


def test_evaluations_that_cannot_be_made_are_refused(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "x.mp4").write_bytes(b"no video")
    for tokenizer, data, words in (
        (tmp_path / "nothing", tmp_path, "nothing: expected a saved AdaptiveTokenizer"),
        (trained / "mae", tmp_path, "expected AdaptiveTokenizer, found VideoMAE"),
        (trained / "tokenizer", tmp_path / "nothing", "nothing: expected a folder of videos"),
        (trained / "tokenizer", tmp_path, "none of the 1 videos could be used"),
    ):
        asked = ["tokenizer", "--evaluate", tokenizer, "--data", data, *SMALL]
        assert words in refused(monkeypatch, capsys, *asked)


def test_encode_writes_features_and_grid(trained, moving_square, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "features.safetensors"
    run(monkeypatch, "encode", moving_square, "--model", trained / "mae", "--out", out, "--precision", "fp32")
    assert "[32, 192]" in capsys.readouterr().out
    with safe_open(out, framework="pt") as file:
        features, metadata = file.get_tensor("features"), file.metadata()
    assert features.dtype == torch.float32
    assert metadata["grid"] == "8 2 2"
    assert metadata["video"] == "square.mp4"
    from vmae import load_clip

    model = checkpoint.load(VideoMAE, trained / "mae")
    with torch.no_grad():
        expected = model.encode(load_clip(moving_square, frames=16, size=32))[0]
    torch.testing.assert_close(features, expected)
    arguments = ["encode", moving_square, "--model", trained / "mae", "--out", out, "--precision", "fp32"]
    run(monkeypatch, *arguments, "--frames", "32", "--stride", "2")
    with safe_open(out, framework="pt") as file:
        features, metadata = file.get_tensor("features"), file.metadata()
    with torch.no_grad():
        expected = model.encode(load_clip(moving_square, frames=32, size=32, stride=2))[0]
    torch.testing.assert_close(features, expected)
    assert (metadata["grid"], metadata["frames"], metadata["stride"]) == ("16 2 2", "32", "2")


def test_only_what_it_made_is_replaced(trained, moving_square, tmp_path, monkeypatch, capsys):
    """Neither a video nor a model, though it be of the same format."""
    mae, tokenizer = trained / "mae", trained / "tokenizer"
    encode = ["encode", moving_square, "--model", mae, "--out"]
    show = ["show", moving_square, "--tokenizer", tokenizer, "--frames", "16", "--size", "32", "--out"]
    video, features, shown = (tmp_path / name for name in ("copy.mp4", "features.safetensors", "page.html"))
    shutil.copy(moving_square, video)
    for command, own, what in ((encode, features, "features"), (show, shown, "a page")):
        run(monkeypatch, *command, own)
        made = own.read_bytes()
        for other in (video, mae / "model.safetensors", features if own == shown else shown):
            if other.exists():
                before = other.read_bytes()
                assert f"expected a new file, or {what} to replace" in refused(monkeypatch, capsys, *command, other)
                assert other.read_bytes() == before
        stamp = own.stat().st_ino
        run(monkeypatch, *command, own)
        assert own.stat().st_ino != stamp
        assert len(own.read_bytes()) == len(made)


def test_show_writes_one_self_contained_page(trained, moving_square, tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    arguments = ["--tokenizer", trained / "tokenizer", "--out", out, "--frames", "64", "--size", "64"]
    run(monkeypatch, "show", moving_square, *arguments, "--model", trained / "mae", "--budget", "0.3")
    text = out.read_text()
    (facts,) = json.loads(text.split('type="application/json">')[1].split("</script>")[0])["sections"]
    assert facts["title"] == "square.mp4"
    assert facts["note"] == "The file has 40 frames and is looped."
    assert "32 x 4 x 4 = 512 tokens" in facts["facts"]
    assert [one["tokens"] for one in facts["strategies"]["adaptive"] if one["budget"] == 0.3] == [154]
    assert [picture["title"].split(",")[0] for picture in facts["pictures"]] == ["tokenizer", "model"]


def test_doctor_reports(monkeypatch, capsys):
    run(monkeypatch, "doctor", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["cpu"]["cores"] >= 1
    run(monkeypatch, "doctor")
    assert "torch" in capsys.readouterr().out


def test_demo_does_the_whole_job(moving_square, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "demo_clips", lambda: {"bigbuckbunny": moving_square, "carphone": moving_square})
    monkeypatch.setattr(demo, "SIZE", 32)
    for _ in range(2):  # an earlier demo is replaced
        run(monkeypatch, "demo", "--out", tmp_path / "demo", "--tokenizer-steps", "2", "--mae-steps", "2")
    names = {p.name for p in (tmp_path / "demo").iterdir()}
    assert names == {demo.MARK, "tokenizer", "mae", "page.html", "features.safetensors", "videos.txt"}
    assert "page.html" in capsys.readouterr().out


def test_pretraining_takes_what_the_cache_command_stored(trained, moving_square, tmp_path, monkeypatch, capsys):
    data = ["--data", moving_square, "--val", moving_square, "--tokenizer", trained / "tokenizer", *TINY]
    stored = ["--cache", tmp_path / "cache", "--views", "3"]
    run(monkeypatch, "cache", *data, *stored)
    assert "holds all views; 4 were missing" in capsys.readouterr().out
    shards = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    run(monkeypatch, "cache", *data, *stored)
    assert "0 were missing" in capsys.readouterr().out
    monkeypatch.setattr(AdaptiveTokenizer, "encode", None)  # there is no need of it any more
    monkeypatch.setattr("vmae.pretraining.sample_clip", lambda run: None)  # but for samples
    run(monkeypatch, "pretrain", *data, *stored, "--out", tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == shards
    monkeypatch.undo()
    run(monkeypatch, "pretrain", *data, "--views", "3", "--out", tmp_path / "other")
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("run", "other")]
    first, second = ([{k: json.loads(line).get(k) for k in ("loss", "val_loss")} for line in log] for log in logs)
    assert first == second
    assert first[-1]["val_loss"] > 0


def test_evaluation_of_a_model(trained, moving_square, monkeypatch, capsys):
    data = ["--data", moving_square, "--val", moving_square, "--tokenizer", trained / "tokenizer", *TINY]
    run(monkeypatch, "pretrain", *data, "--evaluate", trained / "mae")
    assert "trained with adaptive; 1 clips of" in capsys.readouterr().out
    run(monkeypatch, "pretrain", *data, "--evaluate", trained / "mae", "--json")
    assert json.loads(capsys.readouterr().out)["strategies"]["running_cell"]["loss"] > 0


def test_conversion_there_and_back(trained, tmp_path, monkeypatch):
    pixels = VideoMAE(VideoMAEConfig.tiny(frames=16, size=32, target="pixels", strategy="none", random=0.0))
    checkpoint.save(pixels, tmp_path / "mine")
    run(monkeypatch, "convert", tmp_path / "mine", tmp_path / "theirs", "--to", "huggingface")
    run(monkeypatch, "convert", tmp_path / "theirs", tmp_path / "again", "--frames", "128")
    again = checkpoint.load(VideoMAE, tmp_path / "again")
    assert (again.config.frames, again.config.size) == (128, 32)
    assert all(torch.equal(value, pixels.state_dict()[name]) for name, value in again.state_dict().items())
    with pytest.raises(SystemExit):
        run(monkeypatch, "convert", tmp_path / "theirs", tmp_path / "again")


def test_pretraining_begins_with_given_weights(trained, moving_square, tmp_path, monkeypatch):
    start = VideoMAE(VideoMAEConfig.tiny(frames=16, size=32, width=96, target="pixels", strategy="none", random=0.0))
    checkpoint.save(start, tmp_path / "start")
    data = ["--data", moving_square, "--tokenizer", trained / "tokenizer", *SMALL, "--steps", "1", "--lr", "1e-9"]
    run(monkeypatch, "pretrain", *data, "--init", tmp_path / "start", "--out", tmp_path / "run")
    model = checkpoint.load(VideoMAE, tmp_path / "run")
    assert (model.config.width, model.config.target, model.head.out_features) == (96, "latent", 6)
    assert torch.allclose(model.patch_embed.weight, start.patch_embed.weight, atol=1e-6)
    assert torch.allclose(model.decoder_blocks[0].attn.qkv.weight, start.decoder_blocks[0].attn.qkv.weight, atol=1e-6)


def test_compiling_needs_a_compiler(trained, moving_square, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    arguments = ["--data", moving_square, "--tokenizer", trained / "tokenizer", *TINY, "--out", tmp_path / "run"]
    error = refused(monkeypatch, capsys, "pretrain", *arguments, "--compile", "--device", "cpu")
    assert "compile: expected a C++ compiler, found no no-such-compiler" in error


def test_probe_prints_its_table(trained, moving_square, video_folder, tmp_path, monkeypatch, capsys):
    for name in ("train", "val"):
        lines = []
        for label in (0, 1):
            for i in range(3) if name == "train" else (3,):
                copy = tmp_path / f"{name}{label}{i}.mp4"
                # With some bytes at its end that are its own: a video may be in one list only.
                copy.write_bytes((moving_square if label else video_folder / "b.mp4").read_bytes() + bytes(8 * i + 4))
                lines.append(f"{copy.name} {label}")
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    data = ["--train", tmp_path / "train.txt", "--val", tmp_path / "val.txt", "--frames", "4", "--seeds", "2"]
    run(monkeypatch, "probe", "--model", trained / "mae", *data, "--workers", "0", "--out", tmp_path / "probe.json")
    table = capsys.readouterr().out
    assert all(word in table for word in ("pretrained", "random", "pixels", "linear", "attentive", "±"))
    assert len(json.loads((tmp_path / "probe.json").read_text())["scores"]) == 9


def test_demo_leaves_other_folders_alone(moving_square, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "demo_clips", lambda: {"bigbuckbunny": moving_square})
    (tmp_path / "thesis.txt").write_text("precious")
    (tmp_path / "videos.txt").write_text("mine.mp4 0")
    error = refused(monkeypatch, capsys, "demo", "--out", tmp_path)
    assert "holds files that are no demo's" in error
    assert {p.name for p in tmp_path.iterdir()} == {"thesis.txt", "videos.txt"}


def test_a_refused_demo_keeps_the_earlier_one(moving_square, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "demo_clips", lambda: {"bigbuckbunny": moving_square})
    (tmp_path / demo.MARK).write_text("")
    (tmp_path / "page.html").write_text("earlier")
    assert "steps: expected at least 1, got 0" in refused(
        monkeypatch, capsys, "demo", "--out", tmp_path, "--mae-steps", "0"
    )
    assert (tmp_path / "page.html").read_text() == "earlier"


def test_wrong_input_ends_with_one_line(trained, moving_square, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    mae, tokenizer = trained / "mae", trained / "tokenizer"
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    encode = ["encode", moving_square, "--model", mae, "--out", out]
    show = ["show", moving_square, "--tokenizer", tokenizer, "--out", out]
    train = ["tokenizer", "--data", moving_square, "--out", out, *SMALL]
    pretrain = ["pretrain", "--data", moving_square, "--tokenizer", tokenizer, "--out", out, *SMALL]
    cases: list[tuple[str, list]] = [
        ("missing.mp4: expected a video file, found no such file",
         ["encode", tmp_path / "missing.mp4", "--model", mae, "--out", out]),
        ("text.mp4: cannot be decoded", ["encode", text, "--model", mae, "--out", out]),
        ("expected a saved VideoMAE", ["encode", moving_square, "--model", tmp_path, "--out", out]),
        ("is no readable VideoMAE: expected VideoMAE, found AdaptiveTokenizer",
         ["encode", moving_square, "--model", tokenizer, "--out", out]),
        ("frames: expected a positive multiple of 2, got 7", [*encode, "--frames", "7"]),
        ("frames: expected a positive multiple of 2, got 0", [*encode, "--frames", "0"]),
        ("size: expected a positive multiple of 16, got 50", [*encode, "--size", "50"]),
        ("size: expected a positive multiple of 16, got -2", [*encode, "--size", "-2"]),
        ("random: expected at most the budget", [*show, "--budget", "0.01"]),
        ("budget: expected 1 to 11264 of 12544 tokens", [*show, "--budget", "0.99"]),
        ("frames: expected a positive multiple of 2, got 5", [*show, "--frames", "5"]),
        ("found no such file", ["tokenizer", "--data", tmp_path / "nothing", "--out", out, *SMALL]),
        ("text.mp4: cannot be decoded", ["tokenizer", "--data", text, "--out", out, *SMALL]),
        ("steps: expected at least 1, got 0", [*train, "--steps", "0"]),
        ("workers: expected at least 0, got -1", [*train, "--workers", "-1"]),
        ("beta1: expected a number from 0 to below 1, got 1.5", [*train, "--beta1", "1.5"]),
        ("mask_ratio: expected a number from 0 to 1, got 2.0", [*pretrain, "--mask-ratio", "2"]),
        ("mask_ratio: expected at least one of 4 places to stay visible", [*pretrain, "--mask-ratio", "1"]),
        ("budget: expected 1 to 24 of 32 tokens", [*pretrain, "--budget", "0", "--random", "0"]),
        ("tokenizer: expected a tokenizer's folder", ["pretrain", "--data", moving_square, "--out", out, *SMALL]),
        ("views: expected at least 1 with --cache", [*pretrain, "--cache", out]),
        ("views: expected at least 0, got -1", [*pretrain, "--views", "-1"]),
        ("cache: expected a folder, got none", ["cache", *pretrain[1:]]),
        ("cache: expected something to store, target pixels and uniform need nothing",
         ["cache", *pretrain[1:], "--views", "1", "--cache", out, "--target", "pixels", "--strategy", "uniform"]),
        ("text.mp4: expected a folder for the cache, found a file", [*pretrain, "--views", "1", "--cache", text]),
        ("crop: expected a number above 0, up to 1, got 0.0", [*pretrain, "--crop", "0"]),
        ("jitter: expected a number from 0 to below 4, got 9.0", [*pretrain, "--jitter", "9"]),
        ("resume: expected without --overwrite", [*pretrain, "--resume", "--overwrite"]),
        ("window", [*pretrain, "--window", "5"]),
        ("expected a saved VideoMAE with config.json", [*pretrain, "--init", tmp_path]),
        ("val: expected videos to evaluate on, got none", [*pretrain, "--evaluate", mae]),
        ("json: expected with --evaluate", [*pretrain, "--json"]),
        ("parallel: expected ddp for a tokenizer, got fsdp", [*train, "--parallel", "fsdp"]),
        ("expected config.json, found no such file", ["convert", tmp_path, out]),
        ("is no readable VideoMAE of Hugging Face's", ["convert", mae, out]),
        ("frames, size: expected with --to vmae alone", ["convert", mae, out, "--to", "huggingface", "--size", "32"]),
        ("frames: expected different numbers of frames",
         ["probe", "--model", mae, "--train", text, "--val", text, "--frames", "8", "8"]),
    ]  # fmt: skip
    for words, arguments in cases:
        assert words in refused(monkeypatch, capsys, *arguments)
        assert not out.exists(), arguments


def test_an_output_that_cannot_be_written_is_named(trained, moving_square, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("vmae.features.load_clip", None)  # it is refused before the work is done
    for out, words in (
        (tmp_path / "file" / "features.safetensors", f"expected {tmp_path / 'file'} to be a folder, found a file"),
        (tmp_path, "expected a file to write, found a directory"),
        (tmp_path / "pipe", "expected a file to write, found a device or pipe"),
    ):
        arguments = ["encode", moving_square, "--model", trained / "mae", "--out", out]
        assert words in refused(monkeypatch, capsys, *arguments)
    run_out = ["tokenizer", "--data", moving_square, "--out", tmp_path / "file", *SMALL]
    assert "to be a folder, found a file" in refused(monkeypatch, capsys, *run_out)


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    checkpoint.write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "text"


def test_the_installed_command_answers():
    command = Path(sys.executable).parent / "vmae"
    answer = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    for name in cli.COMMANDS:
        assert name in answer


def test_presets_can_be_made():
    with torch.device("meta"):
        for name in ("tiny", "small", "base", "large"):
            VideoMAE(getattr(VideoMAEConfig, name)(frames=4, size=64))
