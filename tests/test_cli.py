"""Every command, as a user types it, on generated videos."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vmae import VideoMAE, VideoMAEConfig, checkpoint, cli, demo
from vmae.report import read_losses

SMALL = ["--frames", "16", "--size", "32", "--workers", "0"]


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
        common = ["--data", moving_square, "--model", "tiny", *SMALL, "--steps", "2"]
        run(patch, "tokenizer", *common, "--out", folder / "tokenizer")
        run(patch, "pretrain", *common, "--out", folder / "mae", "--tokenizer", folder / "tokenizer")
    return folder


def test_training_commands_write_models(trained):
    for name in ("tokenizer", "mae"):
        assert len(read_losses(trained / name / "log.jsonl")) == 2
        assert (trained / name / "model.safetensors").stat().st_size > 100_000


def test_a_tokenizer_is_evaluated(trained, video_folder, monkeypatch, capsys):
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


def test_show_writes_one_self_contained_page(trained, moving_square, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    arguments = ["--tokenizer", trained / "tokenizer", "--out", page, "--frames", "64", "--size", "64"]
    run(monkeypatch, "show", moving_square, *arguments)
    text = page.read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "<script" not in text
    assert text.count("data:image/jpeg;base64,") == 8 * 6
    for word in ("adaptive", "random", "uniform", "none", "square.mp4", "32 x 4 x 4 = 512 tokens"):
        assert word in text
    assert "The file has 40 frames and is looped." in text


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
    assert names == {demo.MARK, "tokenizer", "mae", "page.html", "loss.png", "features.safetensors", "videos.txt"}
    assert (tmp_path / "demo/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "page.html" in capsys.readouterr().out


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
        ("budget: expected at most the", [*show, "--budget", "0.99"]),
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
    for name in ("doctor", "demo", "tokenizer", "pretrain", "encode", "show"):
        assert name in answer


def test_presets_can_be_made():
    with torch.device("meta"):
        for name in ("tiny", "small", "base", "large"):
            VideoMAE(getattr(VideoMAEConfig, name)(frames=4, size=64))
