"""What the tokenizer's recipe adds to the loop: adversary, averaging, the choice of a checkpoint, divergence."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import write_video
from safetensors.torch import save_file
from test_losses import vgg_weights

from vmae import AdaptiveTokenizer, ClipDataset, TokenizerConfig, batches, checkpoint, tokenizer_training
from vmae.optimisation import Optimisation
from vmae.tokenizer_training import TokenizerRun, evaluated, train_tokenizer
from vmae.training import PATIENCE, Clips, TrainingError


def run_on(data: Path, out: Path, *, steps: int = 6, size: int = 32, options: dict | None = None, **changes):
    settings = {"gan": 0.0, "aside": 0.0, **changes}
    optimisation = Optimisation(steps=steps, precision="fp32", lr=2e-3, **(options or {}))
    return TokenizerRun(
        data, out, model="tiny", clips=Clips(frames=8, size=size, workers=0), optimisation=optimisation, **settings
    )


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def tiny() -> AdaptiveTokenizer:
    return tokenizer_training.initialised(TokenizerConfig.tiny(), 0)


@pytest.fixture(scope="module")
def many_videos(tmp_path_factory) -> Path:
    """Ten videos, two of them broken."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(8):
        write_video(folder / f"{i}.mp4", 12 + i)
    for name in ("x.mp4", "y.mp4"):
        (folder / name).write_bytes(b"this is no video")
    return folder


def test_the_adversary_begins_when_it_should_and_trains(moving_square, tmp_path):
    out = train_tokenizer(run_on(moving_square, tmp_path / "run", gan=0.1, gan_after=0.5))
    log = log_of(out)
    assert ["discriminator" in line for line in log] == [False] * 3 + [True] * 3
    assert all(math.isfinite(line[name]) for line in log[3:] for name in ("discriminator", "adversarial"))
    assert log[-1]["discriminator"] != log[3]["discriminator"]
    for line in log:
        adversarial = 0.1 * line.get("adversarial", 0.0)
        if line["keep"] == 1:
            assert line["loss"] == pytest.approx(line["pixels"] + adversarial, rel=1e-5)
        else:  # and what keeps the scores stable
            assert line["loss"] > line["pixels"] + adversarial


def test_the_discriminator_learns_to_tell_real_from_fake(moving_square, tmp_path):
    run = run_on(moving_square, tmp_path / "run", gan=0.1)
    task = tokenizer_training._TokenizerTraining(
        tiny(), run, ClipDataset(moving_square, frames=8, size=32).split(0, seed=0)[1]
    )
    real = torch.rand(2, 3, 8, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for step in range(16, 46):
        task.passes = [(real, torch.zeros_like(real))]
        task._train_discriminator(step)
        if step == 16:
            first = task.figures["discriminator"]
    assert first == pytest.approx(2 * math.log(2), abs=0.1)
    assert task.figures["discriminator"] < 0.7 * first


def test_the_tokenizers_step_leaves_no_gradient_in_the_discriminator(moving_square, tmp_path):
    run = run_on(moving_square, tmp_path / "run", gan=0.1, gan_after=0.0)
    task = tokenizer_training._TokenizerTraining(tiny(), run, [])
    batch = next(batches(ClipDataset(moving_square, frames=8, size=32), 1))
    task.loss(batch, step=0, seed=0, row=0).backward()
    assert all(p.grad is None for p in task.discriminator.parameters())


def test_r1_counts_in_every_fourth_step(moving_square, tmp_path):
    real = torch.rand(2, 3, 8, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for step, differs in ((1, False), (4, True)):
        weights = []
        for r1 in (0.0, 1e3):
            task = tokenizer_training._TokenizerTraining(tiny(), run_on(moving_square, tmp_path, gan=0.1, r1=r1), [])
            task.passes = [(real, -real)]
            task._train_discriminator(step)
            weights.append(task.discriminator.stem.weight.detach().clone())
        assert torch.equal(*weights) != differs


def test_a_discriminator_that_wins_ends_the_run(moving_square, tmp_path, monkeypatch):
    def lost(real, fake):
        return 0.001 * real.mean().sigmoid()

    monkeypatch.setattr(tokenizer_training, "discriminator_loss", lost)
    monkeypatch.setattr(tokenizer_training, "MEMORY", 0.5)
    run = run_on(moving_square, tmp_path / "run", steps=40, gan=0.1, gan_after=0.0)
    with pytest.raises(TrainingError, match=r"step \d+: the discriminator has won: its loss was 0\.0"):
        train_tokenizer(run)
    assert 3 <= len(log_of(tmp_path / "run")) < 10


def test_a_discriminator_without_a_number_is_left_out_then_ends_the_run(moving_square, tmp_path, monkeypatch):
    loss, broken = tokenizer_training.discriminator_loss, [False, True, True, False, *[True] * PATIENCE]
    flags = iter(broken)

    def sometimes(real, fake):
        return loss(real, fake) * (float("nan") if next(flags) else 1)

    monkeypatch.setattr(tokenizer_training, "discriminator_loss", sometimes)
    words = rf"step {len(broken) - 1}: the discriminator diverged: expected a finite.*nan.*{PATIENCE} times in a row"
    with pytest.raises(TrainingError, match=words):
        train_tokenizer(run_on(moving_square, tmp_path / "run", steps=20, gan=0.1, gan_after=0.0))
    seen = ["discriminator" in line for line in log_of(tmp_path / "run")]
    assert seen == [not flag for flag in broken[:-1]]


def test_codes_that_collapse_end_the_run(moving_square, tmp_path, monkeypatch):
    counts = tokenizer_training.code_counts

    def collapsed(codes, levels, weights):
        result = counts(codes, levels, weights)
        result[3] = 0
        result[3, 5] = codes.numel()
        return result

    monkeypatch.setattr(tokenizer_training, "code_counts", collapsed)
    with pytest.raises(TrainingError, match=r"step 5: the codes have collapsed: dimension 3 of 6 carried 0\.000"):
        train_tokenizer(run_on(moving_square, tmp_path / "run", steps=10))


def test_the_log_has_the_entropy_of_every_dimension(moving_square, tmp_path):
    for line in log_of(train_tokenizer(run_on(moving_square, tmp_path / "run"))):
        assert len(line["entropy"]) == 6
        assert all(0 <= bits <= 3 for bits in line["entropy"])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_steps_keeps_all_tokens(share, moving_square, tmp_path, monkeypatch):
    kept = [line["keep"] for line in log_of(train_tokenizer(
        run_on(moving_square, tmp_path / "run", steps=24, size=16, keep=0.6, keep_all=share)
    ))]  # fmt: skip
    assert set(kept) <= {0.6, 1.0}
    assert sum(k == 1 for k in kept) / 24 == pytest.approx(share, abs=0.25)
    config = checkpoint.load(AdaptiveTokenizer, tmp_path / "run").config
    assert config.keep == 0.6


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_saved_weights_are_the_average(decay, moving_square, tmp_path, monkeypatch):
    seen = []
    updated = tokenizer_training._TokenizerTraining.updated

    def recorded(self, step):
        seen.append(self.model.encoder.stem.weight.detach().clone())
        return updated(self, step)

    monkeypatch.setattr(tokenizer_training._TokenizerTraining, "updated", recorded)
    run = run_on(moving_square, tmp_path / "run", ema=decay)
    expected = tokenizer_training.initialised(tiny().config, 0).encoder.stem.weight.detach()
    out = train_tokenizer(run)
    for step, weight in enumerate(seen):
        share = min(decay, (1 + step) / (10 + step))
        expected = share * expected + (1 - share) * weight
    torch.testing.assert_close(checkpoint.load(AdaptiveTokenizer, out).encoder.stem.weight.detach(), expected)


def test_the_model_that_does_best_on_videos_set_aside_is_saved(many_videos, tmp_path, monkeypatch):
    trained = set()
    load = ClipDataset.load

    def recorded(self, index, epoch):
        trained.add((self.entries[index][0].name, epoch, len(self)))
        return load(self, index, epoch)

    monkeypatch.setattr(ClipDataset, "load", recorded)
    errors = iter([5.0, 3.0, 4.0, 3.5])
    monkeypatch.setattr(tokenizer_training._TokenizerTraining, "_error_aside", lambda self: next(errors))
    saved, save = [], checkpoint.save

    def recorded_save(model, out):
        saved.append(model.encoder.stem.weight.clone())
        save(model, out)

    monkeypatch.setattr(checkpoint, "save", recorded_save)
    run = run_on(many_videos, tmp_path / "run", steps=8, aside=0.5, options={"save_every": 2})
    out = train_tokenizer(run)
    lines = [line for line in log_of(out) if "aside" in line]
    assert [(line["step"], line["aside"], line["chosen"]) for line in lines] == [
        (1, 5.0, True), (3, 3.0, True), (5, 4.0, False), (7, 3.5, False)
    ]  # fmt: skip
    assert len(saved) == 2
    assert torch.equal(checkpoint.load(AdaptiveTokenizer, out).encoder.stem.weight, saved[1])
    sizes = {count for _, _, count in trained}
    assert 5 in sizes  # half of ten
    aside = {name for name, _, count in trained if count == 5} - {name for name, epoch, _ in trained if epoch > 0}
    assert aside  # some videos were only ever looked at, not trained on


def test_aside_and_trained_videos_are_disjoint_and_repeat_by_seed(many_videos):
    dataset = ClipDataset(many_videos, frames=8, size=32)
    rest, aside = dataset.split(3, seed=1)
    assert (len(rest), len(aside)) == (7, 3)
    assert sorted(rest.entries + aside.entries) == sorted(dataset.entries)
    assert dataset.split(3, seed=1)[1].entries == aside.entries
    assert dataset.split(3, seed=2)[1].entries != aside.entries
    with pytest.raises(ValueError, match="0 to 10 entries, got 11"):
        dataset.split(11, seed=0)


@pytest.mark.parametrize(
    ("perceptual", "chosen"), [(False, [True, True, True, True]), (True, [True, True, False, True])]
)
def test_the_choice_under_an_adversary(perceptual, chosen, many_videos, tmp_path, monkeypatch):
    """What did not see the adversary no longer competes; pixels alone cannot judge it, and the newest model is kept."""
    errors = iter([1.0, 2.0, 3.0, 1.5])
    monkeypatch.setattr(tokenizer_training._TokenizerTraining, "_error_aside", lambda self: next(errors))
    weights = str(tmp_path / "vgg.safetensors") if perceptual else None
    save_file(vgg_weights(), tmp_path / "vgg.safetensors")
    run = run_on(
        many_videos, tmp_path / "run", steps=8, size=16, aside=0.5, gan=0.1, gan_after=0.3, perceptual=weights,
        options={"save_every": 2},
    )  # fmt: skip
    lines = [line for line in log_of(train_tokenizer(run)) if "aside" in line]
    assert [line["chosen"] for line in lines] == chosen


def test_a_stopped_run_keeps_the_best_and_saves_at_once_if_there_is_none(moving_square, tmp_path, monkeypatch):
    aside = [ClipDataset(moving_square, frames=8, size=32)[0][0][None]]
    task = tokenizer_training._TokenizerTraining(tiny(), run_on(moving_square, tmp_path), aside)

    def unwanted(self):
        raise AssertionError("there may be no time to look at clips")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_training._TokenizerTraining, "_error_aside", unwanted)
        task.stopped(tmp_path)
    first = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        task.average.encoder.stem.weight += 1
    task.stopped(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == first


def test_a_save_that_is_stopped_is_made_up_for(moving_square, tmp_path, monkeypatch):
    aside = [ClipDataset(moving_square, frames=8, size=32)[0][0][None]]
    task = tokenizer_training._TokenizerTraining(tiny(), run_on(moving_square, tmp_path), aside)

    def interrupted(model, out):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            task.save(tmp_path)
    assert task.save(tmp_path)["chosen"]


def test_the_seed_determines_a_run_with_an_adversary(moving_square, tmp_path):
    logs = []
    for name in ("a", "b"):
        torch.manual_seed(len(name) if name == "a" else 99)  # what the caller drew before does not matter
        out = train_tokenizer(run_on(moving_square, tmp_path / name, steps=4, gan=0.1, gan_after=0.0))
        logs.append([(line["loss"], line["discriminator"]) for line in log_of(out)])
    assert logs[0] == logs[1]


def test_broken_videos_set_aside_are_named(many_videos, tmp_path, capsys):
    dataset = ClipDataset(many_videos, frames=8, size=32)
    for seed in range(20):  # the first one that sets a broken video aside
        aside = dataset.split(5, seed=seed)[1]
        if broken := [path for path, _ in aside.entries if path.name in ("x.mp4", "y.mp4")]:
            break
    out = train_tokenizer(run_on(many_videos, tmp_path / "run", steps=1, aside=0.5, options={"seed": seed}))
    text = capsys.readouterr().err
    assert all(f"skipped: {path}" in text for path in broken)
    assert "aside" in log_of(out)[-1]


def test_the_error_aside_is_the_loss_without_the_adversary(moving_square, tmp_path):
    model = tiny()
    clip = ClipDataset(moving_square, frames=8, size=32)[0][0][None]
    task = tokenizer_training._TokenizerTraining(model, run_on(moving_square, tmp_path / "run"), [clip])
    model.eval()
    expected = [model(clip, seed=0, keep=keep).pixels.item() for keep in (1.0, 0.49)]
    # decode stays in [0, 1], where the network may leave it
    assert task._error_aside() == pytest.approx(sum(expected) / 2, rel=0.05)


def test_perceptual_loss_by_named_weights(moving_square, tmp_path, capsys):
    save_file(vgg_weights(), tmp_path / "vgg.safetensors")
    run = run_on(moving_square, tmp_path / "run", steps=2, perceptual=str(tmp_path / "vgg.safetensors"), keep_all=1.0)
    for line in log_of(train_tokenizer(run)):
        assert line["perceptual"] > 0
        assert line["loss"] == pytest.approx(line["pixels"] + 0.1 * line["perceptual"], rel=1e-5)
    assert "no perceptual loss" not in capsys.readouterr().err
    train_tokenizer(run_on(moving_square, tmp_path / "other", steps=1))
    assert "no perceptual loss: --perceptual names its weights" in capsys.readouterr().err
    with pytest.raises(ValueError, match="found no file nothing"):
        train_tokenizer(run_on(moving_square, tmp_path / "third", perceptual="nothing"))
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"keep": 1.5}, r"keep.*1\.5"), ({"ema": 1.0}, r"ema.*1\.0"), ({"gan": -1.0}, r"gan.*-1"),
     ({"aside": 0.9}, r"aside.*0\.9"), ({"r1": math.inf}, "r1.*inf"), ({"keep_all": float("nan")}, "keep_all.*nan")],
)  # fmt: skip
def test_wrong_settings_are_refused(changes, words, moving_square, tmp_path):
    with pytest.raises(ValueError, match=words):
        train_tokenizer(run_on(moving_square, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_evaluation_compares_with_the_scorer_that_training_began_with(video_folder, tmp_path, monkeypatch):
    run = run_on(video_folder, tmp_path / "run", options={"seed": 3})
    out = train_tokenizer(run)
    asked, original = [], tokenizer_training.evaluate

    def recorded(tokenizer, dataset, *, untrained, autocast):
        asked.append((untrained, dataset))
        return original(tokenizer, dataset, untrained=untrained, autocast=autocast, scenes=1, progress=False)

    monkeypatch.setattr(tokenizer_training, "evaluate", recorded)
    result = evaluated(out, dataclasses.replace(run, out=tmp_path / "unused"))
    untrained, dataset = asked[0]
    start = tokenizer_training.initialised(untrained.config, 3)
    assert torch.equal(untrained.scorer.first.weight, start.scorer.first.weight)
    assert not torch.equal(untrained.scorer.first.weight, checkpoint.load(AdaptiveTokenizer, out).scorer.first.weight)
    assert dataset.sampling["start"] == "center"
    assert result.clips == 2
    assert not (tmp_path / "unused").exists()
