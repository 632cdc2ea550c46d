"""Probes against brute force and closed forms, and the whole measurement on generated videos."""

import dataclasses
import json
import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vmae import VideoError, VideoMAE, VideoMAEConfig, checkpoint, load_clip
from vmae.probe import (
    FEATURES,
    FOLDS,
    L2,
    PROBES,
    AttentiveProbe,
    Comparison,
    ProbeRun,
    attentive,
    balanced_accuracy,
    choose_l2,
    compare,
    drawn,
    fit_attentive,
    fit_linear,
    knn,
    linear,
    pool,
    pool_pixels,
    pooled,
    probe,
    random_encoder,
    read_lists,
    spread,
    table,
    verdict,
)

SMALL = {"width": 32, "depth": 1, "heads": 2, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 1}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More gain nothing on tensors this small, and wait for each other where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(n: int, *, classes: int, width: int, distance: float, seed: int = 0):
    """Vectors [n, width] around a centre for each class, the centres alike for all seeds; and labels."""
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, width, generator=generator(99))
    return torch.randn(n, width, generator=generator(seed)) + distance * centres[labels], labels


def share(guess: torch.Tensor, labels: torch.Tensor) -> float:
    return float((guess == labels).double().mean())


# --- what is kept of a clip


def test_pooled_features_are_means_of_their_parts():
    t, h, w, d = 16, 3, 4, 5
    features = torch.randn(2, t * h * w, d, generator=generator())
    vector, tokens = pool(features, (t, h, w))
    assert tokens.shape == (2, 8 * 2 * 2, d)
    x = features.view(2, t, h, w, d)
    torch.testing.assert_close(vector, features.mean(1))
    for place in range(32):
        i, j, k = place // 4, place // 2 % 2, place % 2
        # Three rows in two parts share the one in the middle.
        part = x[:, 2 * i : 2 * i + 2, j : j + 2, 2 * k : 2 * k + 2]
        torch.testing.assert_close(tokens[:, place], part.mean((1, 2, 3)))
    assert pool(features[:, : 3 * h * w], (3, h, w)).tokens.shape == (2, 3 * 2 * 2, d)
    assert pool(features[:, :2], (2, 1, 1)).tokens.shape == (2, 2, d)


def test_pooled_pixels_are_mean_colours():
    clip = torch.randint(0, 256, (2, 3, 32, 16, 32), generator=generator(), dtype=torch.uint8)
    vector, tokens = pool_pixels(clip)
    assert vector.shape == (2, 8 * 4 * 4 * 3)
    assert tokens.shape == (2, 8 * 2 * 2, 12)
    for b, c, t, y, x in ((0, 0, 0, 0, 0), (1, 2, 7, 3, 3), (1, 0, 3, 2, 1), (0, 1, 5, 1, 2)):
        colour = clip[b, c, 4 * t : 4 * t + 4, 4 * y : 4 * y + 4, 8 * x : 8 * x + 8].float().mean() / 255
        torch.testing.assert_close(vector.view(2, 3, 8, 4, 4)[b, c, t, y, x], colour)
        torch.testing.assert_close(tokens[b, t * 4 + y // 2 * 2 + x // 2, (y % 2 * 2 + x % 2) * 3 + c], colour)
    assert pool_pixels(clip[:, :, :4]).tokens.shape == (2, 2 * 2 * 2, 12)


@pytest.mark.parametrize(("t", "cells"), [(1, 4), (3, 8), (3, 4), (5, 8), (8, 8), (7, 2)])
def test_shorter_clips_fill_as_many_cells(t, cells):
    """Cell i of n sees the frames that it overlaps, of n cells laid over T frames."""
    features = torch.randn(2, t * 2 * 2, 5, generator=generator())
    vector, tokens = pool(features, (t, 2, 2), cells)
    torch.testing.assert_close(vector, features.mean(1))
    clip = torch.randint(0, 256, (2, 3, 2 * t, 16, 16), generator=generator(), dtype=torch.uint8)
    colours, colour_tokens = pool_pixels(clip, cells)
    assert (tokens.shape, colour_tokens.shape) == ((2, cells * 4, 5), (2, cells * 4, 12))
    for i in range(cells):
        latent, frames = (
            [frame for frame in range(n) if frame < (i + 1) * n / cells and frame + 1 > i * n / cells]
            for n in (t, 2 * t)
        )
        torch.testing.assert_close(tokens[:, 4 * i : 4 * i + 4], features.view(2, t, 4, 5)[:, latent].mean(1))
        mean = clip[:, 1, frames, :4, 4:8].float().mean((1, 2, 3)) / 255
        torch.testing.assert_close(colours.view(2, 3, cells, 4, 4)[:, 1, i, 0, 1], mean)


def test_clips_of_different_lengths_are_pooled_as_each_alone():
    config = VideoMAEConfig.tiny(frames=8, size=32, **SMALL)
    encoders = [random_encoder(config, seed) for seed in (0, 1)]
    clips = [
        torch.randint(0, 256, (1, 3, frames, 32, 32), generator=generator(), dtype=torch.uint8) for frames in (6, 16, 2)
    ]
    together, alone = pooled(clips, encoders, "fp32", 8), [pooled(clip, encoders, "fp32", 8) for clip in clips]
    for kind, found in enumerate(together):
        for name in ("vector", "tokens"):
            expected = torch.cat([getattr(one[kind], name) for one in alone])
            torch.testing.assert_close(getattr(found, name), expected)
    assert together[0].tokens.shape == (3, 8 * 2 * 2, 32)
    assert together[2].vector.shape == (3, 8 * 4 * 4 * 3)


def test_each_encoder_in_turn_then_pixels():
    config = VideoMAEConfig.tiny(frames=8, size=32, **SMALL)
    encoders = [random_encoder(config, seed) for seed in (0, 1, 0)]
    clip = torch.randint(0, 256, (2, 3, 12, 48, 48), generator=generator(), dtype=torch.uint8)  # not the model's own
    kinds = pooled(clip, encoders, "fp32")
    assert len(kinds) == 4
    with torch.no_grad():
        torch.testing.assert_close(kinds[1].vector, encoders[1].encode(clip).mean(1))
    assert torch.equal(kinds[0].tokens, kinds[2].tokens)
    assert not torch.allclose(kinds[0].tokens, kinds[1].tokens, atol=0.1)
    assert torch.equal(kinds[3].tokens, pool_pixels(clip).tokens)
    half = pooled(clip, encoders[:1], "bf16")[0].vector
    assert half.dtype == torch.float32
    assert 0 < (half - kinds[0].vector).abs().max() < 0.1


def test_a_random_encoder_leaves_the_default_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    random_encoder(VideoMAEConfig.tiny(frames=8, size=32, **SMALL), 0)
    assert torch.rand(()) == expected


# --- kNN


def test_knn_against_brute_force():
    classes, n, m, width = 3, 40, 25, 6
    train, labels = clusters(n, classes=classes, width=width, distance=0.4)
    val, truth = clusters(m, classes=classes, width=width, distance=0.4, seed=1)
    scale = torch.tensor([1e-3, 1, 5, 1, 100, 1])
    train, val = train * scale + 7, val * scale + 7
    a, b = train.numpy().astype(np.float64), val.numpy().astype(np.float64)
    mean, std = a.mean(0), a.std(0)
    a, b = (a - mean) / std, (b - mean) / std
    expected = []
    for row in b:
        cosines = [float(row @ other / np.linalg.norm(row) / np.linalg.norm(other)) for other in a]
        nearest = sorted(range(n), key=lambda i: -cosines[i])[:10]
        votes = [sum(math.exp(cosines[i] / 0.07) for i in nearest if labels[i] == c) for c in range(classes)]
        expected.append(int(np.argmax(votes)))
    guess = knn(train, labels, val, classes=classes)
    assert guess.tolist() == expected
    assert 0.4 < share(guess, truth) < 1  # a hard enough case to tell the two apart


def test_knn_votes_are_weighted_and_fewer_than_ten_will_do():
    near, far = [1.0, 0.1], [-1.0, 0.2]
    train = torch.tensor([near, far, [-1.0, 0.1], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 1])
    assert knn(train, labels, torch.tensor([near]), classes=2).tolist() == [0]  # one against three
    assert knn(train, labels, torch.tensor([near]), classes=2, temperature=100.0).tolist() == [1]
    constant = torch.cat((train, torch.full((4, 1), 0.3)), 1)  # says nothing, and must not divide by zero
    assert knn(constant, labels, constant, classes=2).tolist() == [0, 1, 1, 1]


# --- linear probe


def test_linear_probe_is_at_the_minimum_of_its_objective():
    x, labels = clusters(60, classes=3, width=8, distance=0.5)
    x = x * torch.tensor([1, 10, 1e-2, 1, 1, 1, 1, 1]) + 3
    for l2 in L2:
        fitted = fit_linear(x, labels, classes=3, l2=l2)
        z = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
        onehot = F.one_hot(labels).double()
        # Derivatives on paper: X^T (softmax - onehot) / n + l2 W, and the mean of (softmax - onehot) for the bias.
        error = ((z @ fitted.weight + fitted.bias).softmax(1) - onehot) / len(x)
        gradient = z.T @ error + l2 * fitted.weight
        assert max(gradient.abs().max(), error.sum(0).abs().max()) < 1e-5
        torch.testing.assert_close(fitted.logits(x), z @ fitted.weight + fitted.bias)
    assert fitted.weight.norm() > 10 * fit_linear(x, labels, classes=3, l2=L2[0]).weight.norm()


def test_regularisation_is_chosen_by_cross_validation_on_the_training_vectors():
    x, labels = clusters(42, classes=2, width=30, distance=0.15)
    chosen = choose_l2(x, labels, classes=2, seed=0)
    assert chosen == choose_l2(x, labels, classes=2, seed=0)
    # The folds again, by their definition: of the shuffled classes, one behind the other, each fifth one.
    draw = generator(0)
    order = []
    for label in (0, 1):
        index = [i for i in range(len(x)) if labels[i] == label]
        order += [index[i] for i in torch.randperm(len(index), generator=draw).tolist()]
    right = []
    for l2 in L2:
        count = 0
        for fold in range(FOLDS):
            held = order[fold::FOLDS]
            rest = [i for i in order if i not in held]
            fitted = fit_linear(x[rest], labels[rest], classes=2, l2=l2)
            count += int((fitted.logits(x[held]).argmax(1) == labels[held]).sum())
        right.append(count)
    assert len(set(right)) > 1
    assert chosen == L2[right.index(max(right))]


def test_of_equal_strengths_the_strongest_is_chosen():
    x, labels = clusters(40, classes=2, width=4, distance=20)
    assert choose_l2(x, labels, classes=2, seed=0) == L2[0]


def test_linear_probe_of_classes_with_a_single_video():
    x = torch.tensor([[0.0, 1.0], [4.0, -1.0], [8.0, 1.0]])
    assert linear(x, torch.arange(3), x, classes=3, seed=0).tolist() == [0, 1, 2]


# --- attentive probe


def hidden_class(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [n, 16, 12] of noise. One, marked and at a random place, tells the class; another one says the opposite,
    so that the mean tells nothing."""
    draw = generator(seed)
    tokens, labels = 0.3 * torch.randn(n, 16, 12, generator=draw), torch.arange(n) % 2
    for i in range(n):
        here, there = torch.randperm(16, generator=draw)[:2].tolist()
        tokens[i, here, 0] += 3
        tokens[i, here, 1] += 2 * labels[i] - 1
        tokens[i, there, 0] -= 3
        tokens[i, there, 1] -= 2 * labels[i] - 1
    return tokens, labels


def test_attentive_probe_finds_what_the_mean_hides():
    (train, labels), (val, truth) = hidden_class(200, 0), hidden_class(100, 1)
    assert share(linear(train.mean(1), labels, val.mean(1), classes=2, seed=0), truth) < 0.7
    assert share(attentive(train, labels, val, classes=2, width=16, heads=2, seed=0), truth) > 0.95


def test_attentive_probe_can_tell_places_apart():
    def first_and_last(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        draw = generator(seed)
        labels = torch.arange(n) % 2
        tokens = 0.3 * torch.randn(n, 8, 4, generator=draw)
        sign = 2.0 * labels - 1
        tokens[:, 0, 0] += sign
        tokens[:, -1, 0] -= sign
        return tokens, labels

    (train, labels), (val, truth) = first_and_last(200, 0), first_and_last(100, 1)
    assert share(attentive(train, labels, val, classes=2, width=8, heads=2, seed=0), truth) > 0.95


def test_attention_equals_pytorchs_with_all_its_matrices():
    n, channels, width, heads = 6, 10, 12, 3
    tokens = torch.randn(4, n, channels, generator=generator()) * 2 + 1
    mine = AttentiveProbe(tokens, classes=2, width=width, heads=heads, generator=generator(1))
    theirs = torch.nn.MultiheadAttention(width, heads, bias=False, kdim=channels, vdim=channels, batch_first=True)
    query = torch.randn(1, 1, width, generator=generator(2))
    with torch.no_grad():
        theirs.out_proj.weight.copy_(torch.eye(width))
        q = (query[0, 0] @ theirs.q_proj_weight.T).view(heads, -1) / (width // heads) ** 0.5
        mine.keys.copy_(torch.einsum("hd,hdc->hc", q, theirs.k_proj_weight.view(heads, -1, channels)))
        mine.values.copy_(theirs.v_proj_weight.view(heads, -1, channels).transpose(1, 2))
        mean, std = tokens.flatten(0, 1).mean(0), tokens.flatten(0, 1).std(0, correction=0)
        x = (tokens - mean) / std
        expected = theirs(query.expand(4, 1, width), x, x)[0][:, 0]
        torch.testing.assert_close(mine.attended(tokens), expected)


# --- all probes


def probes(train, labels, val, *, classes, seed=0):
    """Each probe's classes of vectors; the attentive one sees them as four equal tokens."""

    def tokens(x):
        return x[:, None].expand(-1, 4, -1)

    return {
        "knn": knn(train, labels, val, classes=classes),
        "linear": linear(train, labels, val, classes=classes, seed=seed),
        "attentive": attentive(tokens(train), labels, tokens(val), classes=classes, width=16, heads=2, seed=seed),
    }


def test_separable_classes_are_all_recognised():
    train, labels = clusters(60, classes=3, width=8, distance=4)
    val, truth = clusters(30, classes=3, width=8, distance=4, seed=1)
    for guess in probes(train, labels, val, classes=3).values():
        assert share(guess, truth) == 1


def test_shuffled_labels_leave_chance():
    train, _ = clusters(100, classes=4, width=8, distance=4)
    labels = torch.randint(0, 4, (100,), generator=generator(5))
    val, _ = clusters(1200, classes=4, width=8, distance=4, seed=1)
    truth = torch.randint(0, 4, (1200,), generator=generator(6))
    for guess in probes(train, labels, val, classes=4).values():
        assert 0.2 < share(guess, truth) < 0.3


def test_a_guess_does_not_depend_on_the_other_validation_videos():
    train, labels = clusters(60, classes=3, width=8, distance=0.5)
    val, _ = clusters(40, classes=3, width=8, distance=0.5, seed=1)
    others = torch.cat((val[:10], 1000 * val[10:] + 500))
    one, two = (probes(train, labels, x, classes=3) for x in (val, others))
    for name in PROBES:
        assert torch.equal(one[name][:10], two[name][:10])


def test_a_seed_repeats_and_another_one_differs():
    tokens, labels = hidden_class(40, 0)
    options = {"classes": 2, "width": 16, "heads": 2, "device": "cpu"}
    first = fit_attentive(tokens, labels, seed=1, **options)
    torch.rand(3)  # nothing may depend on the default generator
    again, other = (fit_attentive(tokens, labels, seed=seed, **options) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.keys, other.keys)


# --- figures


def test_each_seed_draws_nine_tenths_of_each_class():
    labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 3 + [3])
    index = drawn(labels, 0)
    assert torch.bincount(labels[index]).tolist() == [27, 18, 2, 1]
    assert index.tolist() == sorted(set(index.tolist()))
    assert torch.equal(index, drawn(labels, 0))
    assert not torch.equal(index, drawn(labels, 1))


def test_balanced_accuracy_counts_classes_alike():
    labels = torch.tensor([0] * 8 + [3] * 2)  # classes without a video do not count
    right = torch.tensor([[True] * 8 + [False] * 2, [True] * 4 + [False] * 4 + [True, False]])
    assert balanced_accuracy(right, labels).tolist() == [0.5, 0.5]
    assert spread(right.double().mean(1)).values == [0.8, 0.5]
    assert spread(torch.tensor([1.0, 2, 3, 6])).mean == 3
    assert spread(torch.tensor([1.0, 2, 3, 6])).std == pytest.approx(math.sqrt(14 / 3))


def test_margin_of_a_comparison():
    right = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 1, 1]]).bool()
    other = torch.tensor([[0, 0, 1, 0, 1, 1], [0, 1, 0, 0, 1, 1]]).bool()
    difference, margin = compare(right, other)
    assert difference == pytest.approx(1.5 / 6)
    paired = [1, 0.5, 0, 0, 0, 0]
    error = math.sqrt(sum((x - 0.25) ** 2 for x in paired) / 5 / 6)
    seeds = math.sqrt(2) / 2 * (1 / 6 + 0)
    assert seeds < 2 * error
    assert margin == pytest.approx(2 * error)
    difference, margin = compare(right[:, [0, 0]], ~right[:, [2, 2]])  # videos alike: only seeds differ
    assert (difference, margin) == pytest.approx((0.5, math.sqrt(2) / 2))
    assert [verdict(x, 0.25) for x in (0.3, 0.25, -0.25, -0.3)] == ["above", "level with", "level with", "below"]


# --- the whole


def write_colours(path: Path, *, red: bool, seed: int, frames: int = 12) -> None:
    """Noise of a colour that is more often red, or more often blue."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(0, 100, 3)
    colour[0 if red else 2] += 35
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(frames):
            picture = (rng.integers(0, 120, (32, 32, 3)) + colour).astype(np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """A folder with videos, lists of them, and a model. Labels are 3 (blue) and 7 (red)."""
    folder = tmp_path_factory.mktemp("colours")
    lists: dict[str, list[str]] = {"train": [], "val": []}
    for i in range(20):
        write_colours(folder / f"{i}.mp4", red=i % 2 == 1, seed=i)
        lists["train" if i < 12 else "val"].append(f"{i}.mp4 {7 if i % 2 else 3}")
    (folder / "broken.mp4").write_bytes(b"this is no video")
    lists["train"].insert(5, "broken.mp4 7")
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    torch.manual_seed(7)
    checkpoint.save(VideoMAE(VideoMAEConfig.tiny(frames=8, size=32, **SMALL)), folder / "model")
    return folder


def run_of(colours: Path, **changes) -> ProbeRun:
    settings = {"frames": (4, 8), "seeds": 2, "workers": 0, "precision": "fp32", "device": "cpu", **changes}
    return ProbeRun(
        **{"model": colours / "model", "train": colours / "train.txt", "val": colours / "val.txt", **settings}
    )


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Attentive probes that are hardly trained, and less to choose from."""
    patch.setattr("vmae.probe.EPOCHS", 20)
    patch.setattr("vmae.probe.L2", (1.0, 0.01))


@pytest.fixture
def quick(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def measured(colours):
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return probe(run_of(colours, out=colours / "results" / "probe.json"), progress=False)


def test_results_of_every_probe_at_every_number_of_frames(measured, colours):
    assert (measured.train, measured.val, measured.classes) == (12, 8, 2)
    assert (measured.floor, measured.balanced_floor) == (0.5, 0.5)
    assert [score.frames for score in measured.scores] == [4] * 9 + [8] * 9
    keys = {(score.frames, score.features, score.probe): score for score in measured.scores}
    assert set(keys) == {(frames, kind, name) for frames in (4, 8) for kind in FEATURES for name in PROBES}
    for score in measured.scores:
        assert len(score.accuracy.values) == 2
        assert score.accuracy.values == score.balanced.values  # as many of each class
        assert score.accuracy.mean == sum(score.accuracy.values) / 2
    assert len({tuple(score.accuracy.values) for score in measured.scores}) > 2  # they can be told apart
    for c in measured.comparisons:
        difference = (
            keys[c.frames, "pretrained", c.probe].accuracy.mean - keys[c.frames, c.against, c.probe].accuracy.mean
        )
        assert c.difference == pytest.approx(difference)
        assert c.verdict == ("level with" if abs(c.difference) <= c.margin else "above" if difference > 0 else "below")
    assert len(measured.comparisons) == 12
    assert json.loads((colours / "results" / "probe.json").read_text()) == dataclasses.asdict(measured) | {
        "run": measured.run | {"frames": [4, 8]}
    }
    assert measured.run["size"] == 32
    assert measured.run["model"] == str(colours / "model")


def test_a_broken_video_is_left_out_and_named(measured):
    assert len(measured.skipped) == 1
    assert "broken.mp4" in measured.skipped[0]


def test_figures_are_those_of_the_features_by_hand(measured, colours, quick):
    """Again from the files: which video has which label, which encoder and which videos belong to which seed."""
    paths, labels, trained = read_lists(colours / "train.txt", colours / "val.txt")
    assert trained == 13
    assert labels.tolist() == [0, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1] + [0, 1] * 4
    usable = [i for i, path in enumerate(paths) if path.name != "broken.mp4"]
    clips = torch.cat([load_clip(paths[i], frames=4, size=32) for i in usable])
    labels = labels[usable]
    model = checkpoint.load(VideoMAE, colours / "model")
    for features in FEATURES:
        values: dict[str, list[float]] = {name: [] for name in PROBES}
        for seed in (0, 1):
            torch.manual_seed(seed)
            encoder = VideoMAE(model.config) if features == "random" else model
            with torch.no_grad():
                seen = pool_pixels(clips) if features == "pixels" else pool(encoder.encode(clips), (2, 2, 2))
            part = drawn(labels[:12], seed)
            (x, tokens), known = seen, labels[part]
            guesses = {
                "knn": knn(x[part], known, x[12:], classes=2),
                "linear": linear(x[part], known, x[12:], classes=2, seed=seed),
                "attentive": attentive(tokens[part], known, tokens[12:], classes=2, width=32, heads=2, seed=seed),
            }
            for name, guess in guesses.items():
                values[name].append(share(guess, labels[12:]))
        for score in measured.scores:
            if (score.frames, score.features) == (4, features):
                assert score.accuracy.values == values[score.probe]


def test_measurement_repeats_with_workers_and_batches(measured, colours, quick):
    again = probe(run_of(colours, workers=1, batch_size=6), progress=False)
    for one, two in zip(measured.scores, again.scores, strict=True):
        assert one == two


def test_result_as_text(measured, colours):
    lines = table(measured).splitlines()
    assert "12 training and 8 validation videos of 2 classes, 2 seeds, 32 x 32 pixels" in lines[0]
    assert "broken.mp4" in lines[1]
    header = next(line for line in lines if line.startswith("accuracy"))
    row = next(line for line in lines if line.startswith("pixels      attentive"))
    assert header.split()[2:] == ["4", "frames", "8", "frames"]
    spreads = [s.accuracy for s in measured.scores if (s.features, s.probe) == ("pixels", "attentive")]
    cells = [f"{100 * s.mean:.1f} ± {100 * s.std:.1f}" for s in spreads]
    assert " ".join(row.split()[2:]) == " ".join(cells)
    floor = next(line for line in lines if line.startswith("the largest class"))
    assert floor.split()[3:] == ["50.0", "50.0"]
    assert {len(line) for line in lines if "±" in line and line.split()[0] in FEATURES} == {len(header)}  # aligned
    assert [line.split(",")[0] for line in lines if "%" in line][:2] == ["accuracy", "balanced accuracy"]
    assert sum(line.startswith(("4 frames, ", "8 frames, ")) for line in lines) == 6
    assert "at most 8 x 2 x 2 parts" in table(measured)
    assert "two standard errors of the difference" in table(measured)
    other = dataclasses.replace(
        measured,
        comparisons=[
            Comparison(8, "knn", "random", 0.25, 0.125, "above"),
            Comparison(8, "knn", "pixels", -0.125, 0.25, "level with"),
        ],
    )
    line = "8 frames, knn: pretrained is above random (+25.0, margin 12.5) and level with pixels (-12.5, margin 25.0)"
    assert line in table(other).splitlines()


def test_videos_too_short_at_one_number_of_frames_are_left_out_at_all(colours, tmp_path, quick):
    for i in range(3):
        write_colours(tmp_path / f"short{i}.mp4", red=i == 1, seed=i, frames=5)
    train = [f"{colours}/{i}.mp4 {i % 2}" for i in range(8)] + [f"short{i}.mp4 {i}" for i in range(2)]
    val = [f"{colours}/{i}.mp4 {i % 2}" for i in range(12, 17)] + ["short2.mp4 0"]
    run = run_of(colours, **lists(tmp_path, train, val), short="refuse", size=16, batch_size=2)
    result = probe(run, progress=False)
    assert (result.train, result.val, len(result.skipped), result.run["size"]) == (8, 5, 3, 16)
    assert all("too short" in reason for reason in result.skipped)
    assert (result.floor, result.balanced_floor) == (0.6, 0.5)  # three of five are blue
    assert any(score.accuracy != score.balanced for score in result.scores)


def test_short_videos_are_kept_and_encoded_as_they_are(colours, tmp_path, quick, monkeypatch):
    for i, frames in enumerate((5, 7, 3, 1)):
        write_colours(tmp_path / f"short{i}.mp4", red=i % 2 == 1, seed=i, frames=frames)
    train = [f"{colours}/{i}.mp4 {i % 2}" for i in range(7)] + [f"short{i}.mp4 {i % 2}" for i in (0, 1, 3)]
    val = [f"{colours}/{i}.mp4 {i % 2}" for i in range(12, 16)] + ["short2.mp4 0"]
    run = run_of(colours, **lists(tmp_path, train, val), short="keep", frames=(8,))
    encode, seen = VideoMAE.encode, []

    def recorded(model, clip):
        packed = isinstance(clip, list)
        seen.append((packed, [x.shape[2] for x in clip] if packed else [clip.shape[2]] * len(clip)))
        return encode(model, clip)

    monkeypatch.setattr(VideoMAE, "encode", recorded)
    alone = probe(run, progress=False)
    lengths = [8] * 7 + [4, 6] + [8] * 4 + [2]
    assert seen == [(False, [length]) for length in lengths for _ in range(3)]  # by three encoders
    seen.clear()
    batches = probe(dataclasses.replace(run, batch_size=3), progress=False)
    parts = [lengths[i : i + 3] for i in range(0, len(lengths), 3)]
    assert seen == [(len(set(part)) > 1, part) for part in parts for _ in range(3)]
    assert [one.accuracy for one in alone.scores] == [one.accuracy for one in batches.scores]
    assert (alone.train, alone.val, len(alone.skipped)) == (9, 5, 1)
    assert "short3.mp4: too short: the clip needs 2 frames, the file has 1" in alone.skipped[0]


def lists(folder: Path, train: list[str], val: list[str]) -> dict[str, Path]:
    (folder / "train.txt").write_text("\n".join(train))
    (folder / "val.txt").write_text("\n".join(val))
    return {"train": folder / "train.txt", "val": folder / "val.txt"}


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (["a.mp4", "b.mp4 1"], ["c.mp4 1"], r"train: expected a label from 0 .* got none or -1 for .*a\.mp4"),
        (["a.mp4 0", "b.mp4 1"], ["c.mp4 1", "d.mp4"], r"val: expected a label from 0 .* got none or -1 for .*d\.mp4"),
        (["a.mp4 4", "b.mp4 4"], ["c.mp4 4", "d.mp4 4"], "^train: .*two classes or more, got only label 4"),
        (["a.mp4 0", "b.mp4 4"], ["c.mp4 4", "d.mp4 4"], "^val: .*two classes or more, got only label 4"),
        (["a.mp4 0", "b.mp4 1"], ["c.mp4 1", "d.mp4 2", "e.mp4 5"], "^val: .*labels of the training videos, got 2, 5"),
        (["a.mp4 0", "b.mp4 1"], ["c.mp4 1", "./b.mp4 0"], r"not in the training list, got .*b\.mp4, there as .*b"),
        (["a.mp4 0", "b.mp4 1"], ["c.mp4 1", "copy.mp4 0"], r"not in the training list, got .*copy.mp4, there as .*a"),
        (["a.mp4 0", "b.mp4 1", "copy.mp4 1"], ["c.mp4 1", "d.mp4 0"], r"one label for a video, got 0 and 1 .*copy"),
    ],
)  # fmt: skip
def test_lists_that_are_refused(colours, tmp_path, train, val, message):
    for name, content in (("a", b"same"), ("copy", b"same"), ("c", b"long"), ("d", b"longer")):
        (tmp_path / f"{name}.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        probe(run_of(colours, **lists(tmp_path, train, val)), progress=False)


def test_a_class_without_a_usable_video_is_refused(colours, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    good = [f"{colours}/0.mp4 0", f"{colours}/1.mp4 1"]
    for train, val, name in (
        ([good[0], "bad.mp4 1"], [f"{colours}/2.mp4 0", f"{colours}/3.mp4 1"], "train"),
        (good, [f"{colours}/2.mp4 0", "bad.mp4 1"], "val"),
    ):
        with pytest.raises(VideoError, match=rf"^{name}: expected a video .* each of the 2 classes.*1.*bad\.mp4"):
            probe(run_of(colours, **lists(tmp_path, train, val)), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": (8, 7)}, "frames: expected a positive multiple of 2, got 7"),
        ({"frames": ()}, r"frames: expected different numbers of frames, got \(\)"),
        ({"frames": (8, 8)}, r"frames: expected different numbers of frames, got \(8, 8\)"),
        ({"size": 40}, "size: expected a positive multiple of 16, got 40"),
        ({"seeds": 1}, "seeds: expected at least 2, got 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"workers": -1}, "workers: expected at least 0, got -1"),
        ({"precision": "fp16"}, "precision: expected one of auto, bf16, fp32, got 'fp16'"),
        ({"device": "tpu"}, "device: expected one of auto, cpu, cuda, got 'tpu'"),
        ({"stride": 0}, "stride"),
        ({"model": Path("nowhere")}, "nowhere: expected a saved VideoMAE"),
        ({"out": Path()}, "expected a file to write, found a directory"),
        ({"train": Path("nowhere.txt")}, "nowhere.txt: expected a folder of videos, a video or a list"),
    ],
)
def test_settings_that_are_refused(colours, changes, message):
    with pytest.raises(ValueError, match=message):
        probe(run_of(colours, **changes), progress=False)


def test_progress_goes_to_stderr(colours, tmp_path, capsys, quick):
    files = lists(
        tmp_path, [f"{colours}/{i}.mp4 {i % 2}" for i in (0, 1)], [f"{colours}/{i}.mp4 {i % 2}" for i in (2, 3)]
    )
    probe(run_of(colours, frames=(2,), **files))
    out, err = capsys.readouterr()
    assert out == ""
    assert "2 frames: 100%" in err
    assert "clip/s" in err
    assert "probes: 100%" in err
