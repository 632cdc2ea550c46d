"""Runs that stop, in whatever way, and go on: they end as if they had never stopped."""

import dataclasses
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vmae import AdaptiveTokenizer, TokenizerConfig, checkpoint, resume
from vmae.optimisation import Optimisation
from vmae.pretraining import PretrainRun, pretrain
from vmae.tokenizer_training import TokenizerRun, _TokenizerTraining, train_tokenizer
from vmae.training import Clips

STEPS = 8
TIMINGS = {"clips_per_s", "waiting", "decoded_frames_per_s", "memory_gib"}


@pytest.fixture(scope="module")
def commands(video_folder, tokenizer_dir) -> dict[str, list[str]]:
    """By name: a run of STEPS steps that has much to remember. Each of its checkpoints is a chance to fail."""
    steps = ["--steps", str(STEPS), "--save-every", "1", "--batch-size", "2", "--lr", "2e-3"]
    small = ["--model", "tiny", "--data", str(video_folder), "--size", "32"]
    gan = ["--gan-after", "0.3", "--aside", "0.4", "--ema", "0.9", "--r1", "1"]
    augmented = ["--crop", "0.5", "--flip", "--jitter", "0.2", "--val", str(video_folder)]
    return {
        "tokenizer": ["tokenizer", *small, *steps, "--frames", "8", *gan],
        "mae": ["pretrain", *small, *steps, "--frames", "16", "--tokenizer", str(tokenizer_dir), *augmented],
    }


def start(command: list[str], out: Path, *more: str, **options) -> subprocess.Popen:
    """With two threads, whose turns must not show in the bits."""
    arguments = [sys.executable, "-m", "vmae", *command, "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, env=environment, **pipes, **options)


def finish(command: list[str], out: Path, *more: str) -> str:
    """Run to the end; returns what it said on stderr."""
    process = start(command, out, *more)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def outcome(out: Path) -> tuple[list[dict], dict[str, bytes]]:
    """All of a run that must be the same: log without timings, model, and state."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    log = [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]
    states = sorted(out.glob("state-*.safetensors"))
    tensors = {f"state {name}": value for name, value in load_file(states[-1]).items()}
    tensors |= {f"model {name}": value for name, value in load_file(out / "model.safetensors").items()}
    return log, {name: value.numpy().tobytes() for name, value in tensors.items()}


@pytest.fixture(scope="module")
def uninterrupted(commands, tmp_path_factory):
    """A function from a run's name to its outcome and its seconds, of a process that nothing disturbs."""
    known = {}

    def get(name: str):
        if name not in known:
            out = tmp_path_factory.mktemp("whole") / name
            begin = time.monotonic()
            finish(commands[name], out)
            known[name] = outcome(out), time.monotonic() - begin
        return known[name]

    return get


def killed_and_resumed(name, number, commands, uninterrupted, out, *, kills) -> None:
    """Kill a run at moments drawn by `number`, then let it end: it is what it would have been."""
    expected, seconds = uninterrupted(name)
    draw = random.Random(number)
    for _ in range(kills):
        process = start(commands[name], out, "--resume", "--workers", str(number % 2))
        try:
            process.communicate(timeout=seconds * draw.uniform(0.3, 1.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    finish(commands[name], out, "--resume")
    assert outcome(out) == expected


@pytest.mark.parametrize(("name", "number"), [("tokenizer", 4), ("mae", 1)])
def test_killed_at_any_moment_it_goes_on_bitwise(name, number, commands, uninterrupted, tmp_path):
    killed_and_resumed(name, number, commands, uninterrupted, tmp_path / "run", kills=1)


@pytest.mark.long
@pytest.mark.parametrize("number", range(2, 18))
@pytest.mark.parametrize("name", ["tokenizer", "mae"])
def test_killed_at_many_moments_it_goes_on_bitwise(name, number, commands, uninterrupted, tmp_path):
    killed_and_resumed(name, number, commands, uninterrupted, tmp_path / "run", kills=2)


def wait_for(out: Path, steps: int, process: subprocess.Popen) -> None:
    for _ in range(1200):
        log = out / "log.jsonl"
        if log.exists() and log.read_bytes().count(b"\n") >= steps:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("the run did not get there")


def children(pid: int) -> list[int]:
    found = " ".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")).split()
    assert found
    return [int(number) for number in found]


@pytest.mark.parametrize(
    ("sent", "name", "group"), [(signal.SIGINT, "mae", True), (signal.SIGTERM, "tokenizer", False)]
)
def test_stopped_by_a_signal_it_saves_and_goes_on_bitwise(sent, name, group, commands, uninterrupted, tmp_path):
    expected, _ = uninterrupted(name)
    # Checkpoints of its own would come only at the end. A terminal sends Ctrl-C to the decoding process as well.
    rarely = ["--save-every", "1000", "--workers", "1"]
    process = start(commands[name], tmp_path / "run", *rarely, start_new_session=True)
    wait_for(tmp_path / "run", 2, process)
    if group:
        os.killpg(process.pid, sent)
    else:  # as a scheduler ends a job: every process of it gets the signal, the decoding ones first
        for child in (*children(process.pid), process.pid):
            os.kill(child, sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    stopped = re.search(r"interrupted: stopped after (\d+) steps; the model is in .*run; --resume goes on", errors)
    assert stopped, errors
    assert 2 <= int(stopped[1]) < STEPS
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == int(stopped[1])
    finish(commands[name], tmp_path / "run", "--resume")
    log, tensors = outcome(tmp_path / "run")
    # Figures of checkpoints that it did not make are not in its log; nor had it models to choose from.
    for mine, theirs in zip(log[: int(stopped[1])], expected[0], strict=False):
        assert mine.items() <= theirs.items()
    state = {key: value for key, value in tensors.items() if key.startswith("state ")}
    assert state == {key: expected[1][key] for key in state}


# --- in one process: what a run goes on from, and what it refuses ---------------------------------------------------


def mae_run(data: Path, out: Path, tokenizer: Path, **changes) -> PretrainRun:
    options = Optimisation(steps=4, save_every=1, lr=1e-3, precision="fp32", **changes.pop("optimisation", {}))
    clips = Clips(frames=8, size=32, workers=0, **changes.pop("clips", {}))
    return PretrainRun(data, out, tokenizer=tokenizer, model="tiny", clips=clips, optimisation=options, **changes)


class Crash(Exception):
    """What ends a run in the middle."""


def crash_at(monkeypatch, step: int) -> None:
    """End runs in the middle of the checkpoint after so many steps."""
    original = checkpoint.save_state

    def save_state(tensors, facts, directory, number):
        if number == step:
            raise Crash
        original(tensors, facts, directory, number)

    monkeypatch.setattr(checkpoint, "save_state", save_state)


@pytest.fixture
def halted(moving_square, tokenizer_dir, tmp_path, monkeypatch) -> PretrainRun:
    """A run of four steps that ended after two."""
    run = mae_run(moving_square, tmp_path / "run", tokenizer_dir)
    crash_at(monkeypatch, 3)
    with pytest.raises(Crash):
        pretrain(run)
    monkeypatch.undo()
    return dataclasses.replace(run, resume=True)


@pytest.fixture(scope="module")
def whole(moving_square, tokenizer_dir, tmp_path_factory):
    return outcome(pretrain(mae_run(moving_square, tmp_path_factory.mktemp("whole") / "run", tokenizer_dir)))


def test_the_log_is_cut_to_the_checkpoint(halted, whole):
    assert len((halted.out / "log.jsonl").read_text().splitlines()) == 3  # one more than the checkpoint knows of
    with open(halted.out / "log.jsonl", "a") as log:
        log.write('{"step": 3, "loss"' * 200)  # more than what follows writes over
    assert outcome(pretrain(halted)) == whole


def test_two_checkpoints_are_kept(halted):
    assert [p.name for p in sorted(halted.out.glob("state-*"))] == [f"state-0000000{i}.safetensors" for i in (1, 2)]
    pretrain(halted)
    assert [p.name for p in sorted(halted.out.glob("state-*"))] == [f"state-0000000{i}.safetensors" for i in (3, 4)]


def test_what_a_kill_left_half_written_goes(halted):
    left = [halted.out / f".{name}.abc.part" for name in ("state-00000003.safetensors", "model.safetensors")]
    for path in left:
        path.write_bytes(b"half")
    pretrain(halted)
    assert not any(path.exists() for path in left)


def test_without_a_checkpoint_it_begins(moving_square, tokenizer_dir, whole, tmp_path, capsys):
    run = mae_run(moving_square, tmp_path / "run", tokenizer_dir, resume=True)
    assert outcome(pretrain(run)) == whole
    assert "holds no checkpoint; the run begins at its first step" in capsys.readouterr().err


def test_killed_in_its_first_checkpoint_it_begins(moving_square, tokenizer_dir, whole, tmp_path, monkeypatch):
    run = mae_run(moving_square, tmp_path / "run", tokenizer_dir)
    crash_at(monkeypatch, 1)
    with pytest.raises(Crash):
        pretrain(run)
    monkeypatch.undo()
    left = {path.name for path in run.out.iterdir()} - {"report.html"}  # which a crash leaves, and a kill does not
    assert left == {"config.json", "model.safetensors", "log.jsonl", "run.json"}
    assert outcome(pretrain(dataclasses.replace(run, resume=True))) == whole


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_without_checkpoints_is_not_trained_over(halted, capsys):
    for path in halted.out.glob("state-*"):
        path.unlink()
    before = files_of(halted.out)
    with pytest.raises(ValueError, match="holds a model but no checkpoint to go on from; choose another --out"):
        pretrain(halted)
    assert files_of(halted.out) == before
    (halted.out / "log.jsonl").unlink()  # as a converted or downloaded model
    (halted.out / "run.json").unlink()
    with pytest.raises(ValueError, match="holds a model but no checkpoint to go on from"):
        pretrain(halted)
    assert (halted.out / "model.safetensors").read_bytes() == before[str(halted.out / "model.safetensors")]


def test_a_run_that_is_done_needs_no_checkpoint(halted, capsys):
    pretrain(halted)
    for path in halted.out.glob("state-*"):
        path.unlink()
    before = files_of(halted.out)
    pretrain(halted)
    assert files_of(halted.out) == before
    assert "all 4 steps are done" in capsys.readouterr().err


@pytest.mark.parametrize(("left", "steps"), [("gone", [2, 3]), ("empty", [2, 3]), ("a line and a half", [0, 2, 3])])
def test_a_log_that_is_shorter_than_the_checkpoint_knows(left, steps, halted, whole, capsys):
    log = halted.out / "log.jsonl"
    data = log.read_bytes()
    log.write_bytes(data[: data.index(b"\n") + 20] if left == "a line and a half" else b"")
    if left == "gone":
        log.unlink()
    pretrain(halted)
    assert "log.jsonl: holds less than at the checkpoint" in capsys.readouterr().err
    lines, tensors = outcome(halted.out)
    assert [line["step"] for line in lines] == steps
    assert lines[-2:] == whole[0][-2:]
    assert tensors == whole[1]


@pytest.mark.parametrize("text", ["[]", "5", "{", None])
def test_settings_that_cannot_be_read(text, halted):
    if text is None:
        (halted.out / "run.json").unlink()
    else:
        (halted.out / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json: expected the settings of the run to go on with, found none"):
        pretrain(halted)


def test_a_damaged_checkpoint_does_not_outlive_a_good_one(halted, monkeypatch):
    damage(halted.out / "state-00000002.safetensors", "bit")
    checkpoint.save_state({"x": torch.zeros(1)}, {}, halted.out, 1)
    assert [path.name for path in checkpoint.states(halted.out)] == ["state-00000001.safetensors"]


def test_a_run_that_is_done_stays_as_it_is(halted, capsys):
    pretrain(halted)
    before = files_of(halted.out)
    pretrain(halted)
    assert files_of(halted.out) == before
    assert "all 4 steps are done" in capsys.readouterr().err


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "bit":
        data[-len(data) // 3] ^= 4
    elif how == "header":
        data[9] ^= 4
    elif how == "facts":  # one bit of the number of steps
        data[data.index(b'\\"step\\": 2') + 10] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "empty", "bit", "header", "facts"])
def test_of_a_damaged_checkpoint_the_one_before_is_taken(how, halted, whole, capsys):
    damage(halted.out / "state-00000002.safetensors", how)
    pretrain(halted)
    assert re.search(r"state-00000002\.safetensors: damaged: .*; looking for an earlier one", capsys.readouterr().err)
    assert outcome(halted.out) == whole


def test_with_all_checkpoints_damaged_it_says_so(halted):
    for path in halted.out.glob("state-*"):
        damage(path, "bit")
    with pytest.raises(
        ValueError, match=r"state-00000002\.safetensors: damaged: .*no earlier one.*--overwrite"
    ) as caught:
        pretrain(halted)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimisation": {"seed": 1}}, r"seed: expected 0, as the run in .* began with, got 1"),
        ({"optimisation": {"batch_size": 2}}, "batch_size: expected 1, .*, got 2"),
        ({"clips": {"stride": 2}}, "stride: expected 1, .*, got 2"),
        ({"budget": 0.2}, "budget: expected 0.15, .*, got 0.2"),
        ({"strategy": "random"}, "strategy: expected 'adaptive', .*, got 'random'"),
    ],
    ids=str,
)
def test_other_settings_are_refused(changes, words, halted):
    run = mae_run(halted.data, halted.out, halted.tokenizer, resume=True, **changes)
    with pytest.raises(ValueError, match=words):
        pretrain(run)
    assert len(list(halted.out.glob("state-*"))) == 2


def test_other_videos_are_refused(halted, video_folder):
    with pytest.raises(ValueError, match=r"expected the videos that the run in .* began with, found others"):
        pretrain(dataclasses.replace(halted, data=video_folder))


def test_other_videos_of_the_same_names_are_refused(halted, tmp_path):
    other = tmp_path / halted.data.name
    other.write_bytes(halted.data.read_bytes() + bytes(8))
    with pytest.raises(ValueError, match=r"expected the videos that the run in .* began with, found others"):
        pretrain(dataclasses.replace(halted, data=other))


def test_other_settings_are_refused_before_the_cache_is_filled(halted, tmp_path):
    with pytest.raises(ValueError, match=r"views: expected 0, .*, got 2"):
        pretrain(dataclasses.replace(halted, cache=tmp_path / "cache", views=2))
    assert not (tmp_path / "cache").exists()


def test_where_things_are_may_change(halted, whole, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(halted.out, moved / "run")
    shutil.copy(halted.data, moved / halted.data.name)
    clips = dataclasses.replace(halted.clips, workers=1)
    options = dataclasses.replace(halted.optimisation, save_every=3)
    places = {"data": moved / halted.data.name, "out": moved / "run"}
    assert outcome(pretrain(dataclasses.replace(halted, **places, clips=clips, optimisation=options))) == whole


def test_resume_and_overwrite_contradict(halted):
    with pytest.raises(ValueError, match="resume: expected without --overwrite"):
        pretrain(dataclasses.replace(halted, overwrite=True))


def test_another_tokenizer_is_refused(halted, tmp_path):
    torch.manual_seed(5)
    other = tmp_path / "other"
    checkpoint.save(AdaptiveTokenizer(TokenizerConfig.tiny()), other)
    with pytest.raises(ValueError, match=r"tokenizer: expected the one that the run in .* began with"):
        pretrain(dataclasses.replace(halted, tokenizer=other))


def test_the_number_of_threads_is_kept(halted, whole):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert outcome(pretrain(halted)) == whole
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bytes_", [100, 15_000_000])
def test_full_disk_leaves_the_last_checkpoint(bytes_, halted, whole):
    """Nothing can be written, or the model but not the state: that is three times as large."""
    before = {path.name: path.read_bytes() for path in halted.out.glob("state-*")}
    command = [
        *("pretrain", "--data", str(halted.data), "--tokenizer", str(halted.tokenizer), "--model", "tiny"),
        *("--frames", "8", "--size", "32", "--workers", "0", "--steps", "4", "--save-every", "1", "--lr", "1e-3"),
        *("--precision", "fp32", "--crop", "1", "--no-flip"),
    ]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))  # noqa: E731
    process = start(command, halted.out, "--resume", preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert re.search(r"vmae: error: .*: cannot be written: ", errors.splitlines()[-1]), errors
    assert "Traceback" not in errors
    assert {path.name: path.read_bytes() for path in halted.out.glob("state-*")} == before
    assert not list(halted.out.glob(".*.part"))
    assert outcome(pretrain(halted)) == whole


def test_a_tokenizers_memory_is_complete(video_folder, tmp_path, monkeypatch):
    """Optimizer, discriminator with its own, averaged weights, counts and choice: at every step to stop at."""

    def run(name: str, **changes) -> TokenizerRun:
        options = Optimisation(steps=4, save_every=1, lr=2e-3, precision="fp32", batch_size=2)
        clips = Clips(frames=8, size=32, workers=0)
        return TokenizerRun(video_folder, tmp_path / name, model="tiny", clips=clips, optimisation=options,
                            gan_after=0.4, aside=0.4, ema=0.9, **changes)  # fmt: skip

    expected = outcome(train_tokenizer(run("whole")))
    for step in range(1, 4):
        crash_at(monkeypatch, step + 1)
        with pytest.raises(Crash):
            train_tokenizer(run(f"at {step}"))
        monkeypatch.undo()
        assert outcome(train_tokenizer(run(f"at {step}", resume=True))) == expected


@pytest.mark.parametrize("changes", [{"overwrite": True}, {"resume": True}])
def test_a_folder_in_which_another_process_trains_is_left_alone(
    changes, video_folder, tokenizer_dir, tmp_path, monkeypatch
):
    """Whatever it asks for, and whether or not it came so early that it saw no run there."""
    run = mae_run(video_folder, tmp_path, tokenizer_dir)
    crash_at(monkeypatch, 2)
    with pytest.raises(Crash):
        pretrain(run)
    monkeypatch.undo()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / checkpoint.LOG)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process is training there"):
            pretrain(dataclasses.replace(run, **changes))
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        other.kill()
    pretrain(dataclasses.replace(run, **changes))  # it left nothing behind that would have to be removed


def test_while_it_trains_no_other_process_can(video_folder, tokenizer_dir, tmp_path, monkeypatch):
    run = mae_run(video_folder, tmp_path, tokenizer_dir)
    ask = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command, said = [sys.executable, "-c", ask, str(tmp_path / checkpoint.LOG)], []
    original = resume.save
    monkeypatch.setattr(
        resume, "save",
        lambda *args: (original(*args), said.append(subprocess.run(command, stderr=subprocess.PIPE).stderr)),
    )  # fmt: skip
    pretrain(run)
    assert len(said) == 4
    assert all(b"BlockingIOError" in error for error in said)
    assert subprocess.run(command).returncode == 0


@pytest.mark.parametrize("best", [0.25, math.inf])
def test_what_shows_in_no_figure_is_remembered(best, video_folder, tmp_path):
    run = TokenizerRun(video_folder, tmp_path / "run", model="tiny")
    before, after = (
        _TokenizerTraining(AdaptiveTokenizer(TokenizerConfig.tiny(width=8, scorer_width=8)), run, []) for _ in range(2)
    )
    before.best, before.adversarial, before.discriminator_loss, before.failures = best, True, 0.125, 3
    tensors, facts = before.state()
    after.restore(tensors, json.loads(json.dumps(facts)))
    assert (after.best, after.adversarial, after.discriminator_loss, after.failures) == (best, True, 0.125, 3)
