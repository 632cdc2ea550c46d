"""Every command, as a user types it, on generated videos."""

import json
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
    run(
        monkeypatch,
        "encode",
        moving_square,
        "--model",
        trained / "mae",
        "--out",
        out,
        "--frames",
        "32",
        "--stride",
        "1",
    )
    with safe_open(out, framework="pt") as file:
        assert file.get_tensor("features").shape == (64, 192)


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
    assert names == {"tokenizer", "mae", "page.html", "loss.png", "features.safetensors", "videos.txt"}
    assert (tmp_path / "demo/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "page.html" in capsys.readouterr().out


def test_demo_leaves_other_folders_alone(moving_square, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "demo_clips", lambda: {"bigbuckbunny": moving_square})
    (tmp_path / "thesis.txt").write_text("precious")
    error = refused(monkeypatch, capsys, "demo", "--out", tmp_path)
    assert "holds files that are no demo's" in error
    assert (tmp_path / "thesis.txt").exists()


def test_wrong_input_ends_with_one_line(trained, moving_square, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    mae, tokenizer = trained / "mae", trained / "tokenizer"
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    cases: list[tuple[str, list]] = [
        ("missing.mp4: expected a video file, found no such file",
         ["encode", tmp_path / "missing.mp4", "--model", mae, "--out", out]),
        ("text.mp4: cannot be decoded", ["encode", text, "--model", mae, "--out", out]),
        ("expected a saved VideoMAE", ["encode", moving_square, "--model", tmp_path, "--out", out]),
        ("is no readable VideoMAE", ["encode", moving_square, "--model", tokenizer, "--out", out]),
        ("even number of frames, got T = 7", ["encode", moving_square, "--model", mae, "--out", out, "--frames", "7"]),
        ("multiples of 16", ["encode", moving_square, "--model", mae, "--out", out, "--size", "50"]),
        ("size: expected at least 1, got -2", ["encode", moving_square, "--model", mae, "--out", out, "--size", "-2"]),
        ("frames: expected at least 1, got 0",
         ["encode", moving_square, "--model", mae, "--out", out, "--frames", "0"]),
        ("random: expected at most the budget",
         ["show", moving_square, "--tokenizer", tokenizer, "--out", out, "--budget", "0.01"]),
        ("budget: expected at most the",
         ["show", moving_square, "--tokenizer", tokenizer, "--out", out, "--budget", "0.99"]),
        ("found no such file", ["tokenizer", "--data", tmp_path / "nothing", "--out", out]),
        ("mask_ratio: expected a number from 0 to 1, got 2.0",
         ["pretrain", "--data", moving_square, "--tokenizer", tokenizer, "--out", out, "--mask-ratio", "2", *SMALL]),
        ("tokenizer: expected a tokenizer's folder", ["pretrain", "--data", moving_square, "--out", out, *SMALL]),
    ]  # fmt: skip
    for words, arguments in cases:
        assert words in refused(monkeypatch, capsys, *arguments)
        assert not out.exists(), arguments


def test_an_output_that_cannot_be_written_is_named(trained, moving_square, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "features.safetensors"
    assert "file" in refused(monkeypatch, capsys, "encode", moving_square, "--model", trained / "mae", "--out", out)


def test_the_installed_command_answers():
    command = Path(sys.executable).parent / "vmae"
    answer = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    for name in ("doctor", "demo", "tokenizer", "pretrain", "encode", "show"):
        assert name in answer


def test_presets_can_be_made():
    with torch.device("meta"):
        for name in ("tiny", "small", "base", "large"):
            VideoMAE(getattr(VideoMAEConfig, name)(frames=2, size=16))
