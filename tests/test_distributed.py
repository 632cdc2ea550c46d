"""Several processes do what one does with all the clips."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS = 4
COMMON = ["--model", "tiny", "--size", "32", "--workers", "0", "--precision", "fp32", "--lr", "1e-3"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TIMINGS = {"clips_per_s", "waiting", "decoded_frames_per_s", "memory_gib"}


@pytest.fixture(scope="module")
def commands(video_folder, tokenizer_dir) -> dict[str, list[str]]:
    data = ["--data", str(video_folder), "--batch-size", "4", "--steps", str(STEPS), "--save-every", "2"]
    gan = ["--gan-after", "0.3", "--aside", "0.4", "--ema", "0.9", "--keep-all", "0.5"]
    mae = ["--tokenizer", str(tokenizer_dir), "--val", str(video_folder), "--crop", "0.5"]
    return {
        "mae": ["pretrain", *COMMON, *data, *mae, "--frames", "16"],
        "cached": ["pretrain", *COMMON, *data, *mae, "--frames", "16", "--views", "2"],
        "tokenizer": ["tokenizer", *COMMON, *data, *gan, "--frames", "8"],
    }


def start(command: list[str], out: Path, *more: str, processes: int) -> subprocess.CompletedProcess:
    launcher = TORCHRUN if processes == 2 else []
    arguments = [sys.executable, *launcher, "-m", "vmae", *command, "--out", str(out), *more]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)


def run(command: list[str], out: Path, *more: str, processes: int = 1) -> None:
    done = start(command, out, *more, processes=processes)
    assert done.returncode == 0, done.stderr


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def check_equal(out: Path, expected: Path) -> None:
    """The same but for the order in which gradients are summed."""
    for mine, theirs in zip(log_of(out), log_of(expected), strict=True):
        assert mine.keys() == theirs.keys()
        for name in theirs.keys() - TIMINGS - {"entropy", "chosen"}:
            # Adam divides by a gradient's size, so that where one is near 0 its rounding is amplified.
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3 if mine["step"] else 1e-5), name
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (out, expected))
    assert mine.keys() == theirs.keys()
    error = torch.cat([(mine[name] - theirs[name]).flatten() for name in theirs]).norm()
    assert error < 2e-3 * torch.cat([value.flatten() for value in theirs.values()]).norm()


@pytest.fixture(scope="module")
def alone(commands, tmp_path_factory):
    """A function from a run's name to the folder where one process did it."""
    known: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp("alone") / name
            run(commands[name], known[name])
        return known[name]

    return get


@pytest.mark.parametrize(
    ("name", "more"), [("mae", ["--parallel", "fsdp"]), ("tokenizer", [])], ids=["mae-fsdp", "tokenizer-ddp"]
)
def test_two_processes_do_what_one_does_with_the_double_batch(name, more, commands, alone, tmp_path):
    run(commands[name], tmp_path / "run", *more, processes=2)
    check_equal(tmp_path / "run", alone(name))


def test_two_processes_fill_one_cache(commands, alone, tmp_path):
    run(commands["cached"], tmp_path / "run", "--cache", str(tmp_path / "cache"), processes=2)
    check_equal(tmp_path / "run", alone("cached"))
    shards = list((tmp_path / "cache").iterdir())
    assert len(shards) >= 2
    # Two usable videos in two random views and one from the middle; the third file is broken.
    keys = [name.rpartition(".")[0] for path in shards for name in load_file(path)]
    assert len(keys) == 2 * len(set(keys)) == 2 * 2 * 3


@pytest.mark.parametrize("more", [[], ["--parallel", "fsdp"]], ids=["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(more, commands, alone, tmp_path):
    out = tmp_path / "run"
    run(commands["mae"], out, *more, processes=2)
    (out / f"state-{STEPS:08d}.safetensors").unlink()  # back to the checkpoint in the middle
    run(commands["mae"], out, "--resume")
    check_equal(out, alone("mae"))
    (out / f"state-{STEPS:08d}.safetensors").unlink()
    run(commands["mae"], out, "--resume", *more, processes=2)
    check_equal(out, alone("mae"))


def test_a_batch_that_cannot_be_divided_is_refused(commands, tmp_path):
    done = start(commands["mae"], tmp_path / "run", "--batch-size", "3", processes=2)
    assert done.returncode == 1
    assert "vmae: error: batch_size: expected a multiple of the 2 processes, got 3" in done.stderr
    assert not (tmp_path / "run" / "log.jsonl").exists()
