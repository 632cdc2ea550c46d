"""Tokens and scores from a cache: bitwise what is computed, filled once, and never those of another view or model."""

import functools
import itertools
import multiprocessing
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_videos import write_numbers

from vmae import AdaptiveTokenizer, ClipDataset, TokenizerConfig, batches
from vmae.cache import Cache, CacheError
from vmae.flow import flow_available, flow_scores
from vmae.mae import everest_scores
from vmae.optimisation import autocast
from vmae.targets import Source, Targets, everest_source, flow_source, tokenizer_source
from vmae.tokenizer import latents_of
from vmae.tokens import Tokens
from vmae.video import Augmentation, load_view

CPU = torch.device("cpu")
VIDEOS = 3
CHANGED = Augmentation(crop=0.5, flip=True, jitter=0.25)
FORK = multiprocessing.get_context("fork")
needs_opencv = pytest.mark.skipif(not flow_available(), reason="needs OpenCV")


@pytest.fixture(autouse=True)
def one_thread():
    """Enough for models this small; and threads do not survive a fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(seed: int = 0, **changes) -> AdaptiveTokenizer:
    torch.manual_seed(seed)
    return AdaptiveTokenizer(TokenizerConfig.tiny(**{"width": 8, "scorer_width": 4, "tile": 4, **changes})).eval()


def tokens_of(tokenizer: AdaptiveTokenizer | None = None, precision: str = "fp32", window: int | None = None) -> Source:
    return tokenizer_source(tokenizer or MODEL, functools.partial(autocast, CPU, precision), precision, window)


def embedding(seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(2 * 16 * 16 * 3, 8)


MODEL = make()
LEVELS = MODEL.config.levels


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("numbered")
    for video in range(VIDEOS):
        write_numbers(folder / f"{video}.mp4", range(30 * video, 30 * video + 20))
    return folder


@pytest.fixture(scope="module")
def spoilt(folder, tmp_path_factory) -> Path:
    """The videos, and two files that are none."""
    spoilt = tmp_path_factory.mktemp("spoilt")
    for path in folder.iterdir():
        shutil.copy(path, spoilt)
    (spoilt / "0broken.mp4").write_bytes(b"this is no video")
    (spoilt / "empty.mp4").write_bytes(b"")
    return spoilt


def clips_of(folder: Path, **changes) -> ClipDataset:
    return ClipDataset(folder, **{"frames": 8, "size": 32, "augmentation": CHANGED, "views": 2, **changes})


def said(asked: Targets, dataset: ClipDataset, count: int, *, size: int = 2, workers: int = 0) -> list[list]:
    """Clips, and all that is known of them, in the first batches."""
    found = []
    for batch in itertools.islice(batches(dataset, size, workers=workers, extras=asked.extras), count):
        tokens, scores = asked.of(batch, CPU)
        found.append([batch.clips, *(tokens[:3] if tokens else ()), *((scores,) if scores is not None else ())])
    return found


def assert_same(first: list[list], second: list[list]) -> None:
    for a, b in zip(first, second, strict=True):
        assert [(x.dtype, x.shape) for x in a] == [(x.dtype, x.shape) for x in b]
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def counting(count: Counter, name: str = "sum") -> Source:
    """A cheap source that counts the clips that it is asked about."""

    def compute(clip):
        count[name] += len(clip)
        return (clip.long().sum((1, 2, 3, 4)), clip[:, 0, 0].float())

    return Source(name, 2, compute)


def entries_of(folder: Path) -> int:
    return len(Cache(folder))


# --- what is stored is what is computed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("with_tokens", "scores", "workers"),
    [
        (True, None, 0),
        (True, "everest", 0),
        (True, "everest", 2),
        (False, "everest", 0),
        pytest.param(True, "flow", 0, marks=needs_opencv),
        pytest.param(True, "flow", 2, marks=needs_opencv),
        pytest.param(False, "flow", 2, marks=needs_opencv),
    ],
)
def test_stored_is_bitwise_what_is_computed(spoilt, tmp_path, with_tokens, scores, workers):
    sources = [
        tokens_of(window=4) if with_tokens else None,
        {"flow": flow_source(), "everest": everest_source(embedding())}.get(scores),
    ]
    dataset = clips_of(spoilt)
    computed = Targets(*sources, levels=LEVELS)
    stored = Targets(*sources, levels=LEVELS, cache=Cache(tmp_path / "cache"))
    assert stored.fill(dataset, views=2, workers=workers) == 2 * VIDEOS
    read = [None if source is None else replace(source, compute=None) for source in sources]  # computes nothing
    stored = Targets(*read, levels=LEVELS, cache=Cache(tmp_path / "cache"))
    # Two epochs and more, with others in the places of what is no video.
    count = 1 + 2 * len(dataset) // 2
    first = said(computed, dataset, count, workers=workers)
    assert len(first[0]) == 1 + 3 * with_tokens + bool(scores)
    assert_same(first, said(stored, dataset, count, workers=workers))


@needs_opencv
def test_what_is_computed_is_what_the_functions_say(folder):
    dataset, linear = clips_of(folder), embedding()
    for window in (None, 4):
        found = said(Targets(tokens_of(window=window), flow_source(), levels=LEVELS), dataset, 2)
        for clips, latents, codes, scores, flow in found:
            with torch.no_grad():
                tokens = MODEL.encode(clips, window=window)
            assert_same([[latents, codes, scores, flow]], [[*tokens[:3], flow_scores(clips)]])
    for clips, scores in said(Targets(None, everest_source(linear)), dataset, 2):
        assert torch.equal(scores, everest_scores(clips, linear).detach())


def test_scores_of_everest_are_of_the_embedding_as_it_was(folder):
    linear = embedding()
    source = everest_source(linear)
    dataset = clips_of(folder)
    before = said(Targets(None, source), dataset, 1)
    with torch.no_grad():
        linear.weight += 1
    assert_same(said(Targets(None, source), dataset, 1), before)
    assert everest_source(linear).name != source.name


def test_bf16_tokens_are_stored_bitwise(folder, tmp_path):
    source, dataset = tokens_of(precision="bf16"), clips_of(folder)
    stored = Targets(source, None, levels=LEVELS, cache=Cache(tmp_path))
    stored.fill(dataset, views=2, workers=0)
    first = said(Targets(source, None, levels=LEVELS), dataset, 3)
    assert_same(first, said(stored, dataset, 3))
    for clips, latents, *_ in first:
        with torch.no_grad(), autocast(CPU, "bf16"):
            assert torch.equal(latents, MODEL.encode(clips).latents)


def test_targets_of_the_middle_of_videos(folder, tmp_path):
    dataset = clips_of(folder, start="center", augmentation=Augmentation(), views=0)
    stored = Targets(tokens_of(), None, levels=LEVELS, cache=Cache(tmp_path))
    assert stored.fill(dataset, views=1, workers=0) == VIDEOS
    assert_same(said(stored, dataset, 5), said(Targets(tokens_of(), None, levels=LEVELS), dataset, 5))


def test_there_may_be_nothing_to_know(folder, tmp_path):
    for cache in (None, Cache(tmp_path)):
        nothing = Targets(None, None, cache=cache)
        assert nothing.extras is None
        assert nothing.fill(clips_of(folder), views=2, workers=0) == 0
        assert [len(found) for found in said(nothing, clips_of(folder), 2)] == [1, 1]
    assert Targets(counting(Counter()), None).fill(clips_of(folder), views=2, workers=0) == 0


def test_workers_that_are_not_forked_read_the_cache(folder, tmp_path):
    dataset = clips_of(folder)
    stored = Targets(counting(Counter()), None, cache=Cache(tmp_path))
    stored.fill(dataset, views=2, workers=0)
    stored.extras(dataset.entries[0][0], dataset.view(0, 0), None)  # a file is open
    usual = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("spawn", force=True)
    try:
        found = next(batches(dataset, VIDEOS, workers=1, extras=stored.extras))
    finally:
        torch.multiprocessing.set_start_method(usual, force=True)
    assert found.extras[0].tolist() == found.clips.long().sum((1, 2, 3, 4)).tolist()


def encoded(levels: tuple[int, ...]) -> Tokens:
    pixels = torch.randint(0, 256, (2, 3, 8, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return make(levels=levels).encode(pixels)


@pytest.mark.parametrize("levels", [(8,) * 6, (3,), (2, 2), (5, 4, 3, 2), (7, 16), (8, 8, 8, 5, 5, 5)])
def test_latents_of_codes_are_those_of_the_tokenizer(levels):
    tokens = encoded(levels)
    latents = latents_of(tokens.codes, levels)
    assert latents.dtype == tokens.latents.dtype == torch.float32
    assert torch.equal(latents, tokens.latents)


@settings(max_examples=50, deadline=None)
@given(levels=st.lists(st.integers(2, 16), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_every_code_has_its_own_latents(levels, seed):
    count = int(torch.tensor(levels).prod())
    codes = torch.randint(count, (2, 50), generator=torch.Generator().manual_seed(seed)).int()
    codes[0, :2] = torch.tensor([0, count - 1])
    latents = latents_of(codes, tuple(levels))
    assert latents.shape == (2, 50, len(levels))
    assert latents.abs().max() <= 1
    assert len(latents.flatten(0, 1).unique(dim=0)) == len(codes.unique())


# --- filling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_fill_computes_each_view_once(folder, tmp_path, workers):
    count: Counter[str] = Counter()
    dataset, source = clips_of(folder), counting(count)
    asked = Targets(source, None, cache=Cache(tmp_path))
    assert asked.fill(dataset, views=2, workers=workers) == count["sum"] == 2 * VIDEOS
    for again in (asked, Targets(source, None, cache=Cache(tmp_path))):
        assert again.fill(dataset, views=2, workers=workers) == 0
    assert count["sum"] == entries_of(tmp_path) == 2 * VIDEOS
    more = clips_of(folder, views=3)  # the same first two
    assert Targets(source, None, cache=Cache(tmp_path)).fill(more, views=3, workers=workers) == VIDEOS
    assert count["sum"] == entries_of(tmp_path) == 3 * VIDEOS


def test_fill_stores_what_the_source_says(folder, tmp_path):
    dataset, source = clips_of(folder), counting(Counter())
    asked = Targets(source, None, cache=Cache(tmp_path))
    asked.fill(dataset, views=2, workers=0)
    for index, number in itertools.product(range(VIDEOS), range(2)):
        path, view = dataset.entries[index][0], dataset.view(index, number)
        clip = load_view(path, view)
        for said, expected in zip(asked.extras(path, view, clip[0]), source.compute(clip), strict=True):
            assert torch.equal(said, expected[0])


def test_fill_decodes_nothing_that_is_stored(folder, tmp_path, monkeypatch):
    dataset, source = clips_of(folder), counting(Counter())
    Targets(source, None, cache=Cache(tmp_path)).fill(dataset, views=1, workers=0)
    decoded = []
    monkeypatch.setattr("vmae.targets.load_view", lambda *view: decoded.append(view) or load_view(*view))
    for expected in (VIDEOS, 0):
        decoded.clear()
        assert Targets(source, None, cache=Cache(tmp_path)).fill(dataset, views=2, workers=0) == expected
        assert len(decoded) == expected


def test_fill_asks_only_the_source_that_lacks_something(folder, tmp_path):
    count: Counter[str] = Counter()
    dataset, one, two = clips_of(folder), counting(count, "one"), counting(count, "two")
    Targets(one, None, cache=Cache(tmp_path)).fill(dataset, views=2, workers=0)
    assert Targets(one, two, cache=Cache(tmp_path)).fill(dataset, views=2, workers=0) == 2 * VIDEOS
    assert count == {"one": 2 * VIDEOS, "two": 2 * VIDEOS}
    assert entries_of(tmp_path) == 4 * VIDEOS


def test_fill_restores_what_a_removed_shard_held(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("vmae.targets.FLUSH_ENTRIES", 2)
    count: Counter[str] = Counter()
    dataset, source = clips_of(folder, views=3), counting(count)
    Targets(source, None, cache=Cache(tmp_path)).fill(dataset, views=3, workers=0)
    shards = sorted(tmp_path.iterdir())
    assert len(shards) > 2
    shards[1].unlink()
    missing = 3 * VIDEOS - entries_of(tmp_path)
    assert 0 < missing < 3 * VIDEOS
    count.clear()
    asked = Targets(source, None, cache=Cache(tmp_path))
    assert asked.fill(dataset, views=3, workers=0) == count["sum"] == missing
    assert entries_of(tmp_path) == 3 * VIDEOS
    next(batches(dataset, 3 * VIDEOS, extras=asked.extras))


def test_an_interrupted_fill_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("vmae.targets.FLUSH_ENTRIES", 1)
    count: Counter[str] = Counter()
    dataset, source = clips_of(folder), counting(count)

    def interrupted(clip):
        if count["sum"] == 4:
            raise KeyboardInterrupt
        return source.compute(clip)

    with pytest.raises(KeyboardInterrupt):
        Targets(replace(source, compute=interrupted), None, cache=Cache(tmp_path)).fill(dataset, views=2, workers=0)
    assert entries_of(tmp_path) == 4
    rest = Targets(source, None, cache=Cache(tmp_path)).fill(dataset, views=2, workers=0)
    assert rest == 2 * VIDEOS - 4
    assert count["sum"] == entries_of(tmp_path) == 2 * VIDEOS


@pytest.mark.parametrize("parts", [1, 2, 4, 7])
def test_parts_cover_every_view_once(folder, tmp_path, parts):
    count: Counter[str] = Counter()
    dataset, source = clips_of(folder), counting(count)
    found = []
    for part in range(parts):
        asked = Targets(source, None, cache=Cache(tmp_path / str(part)))  # none knows of the others
        found.append(asked.fill(dataset, views=2, workers=0, part=(part, parts)))
        if found[-1]:
            shutil.copytree(tmp_path / str(part), tmp_path / "all", dirs_exist_ok=True)
    assert sum(found) == count["sum"] == entries_of(tmp_path / "all") == 2 * VIDEOS
    assert max(found) - min(found) <= 1
    assert Targets(source, None, cache=Cache(tmp_path / "all")).fill(dataset, views=2, workers=0) == 0


def _fill(dataset: ClipDataset, folder: Path) -> None:
    asked = Targets(counting(Counter()), None, cache=Cache(folder))
    asked.fill(dataset, views=4, workers=0)
    next(batches(dataset, 4 * VIDEOS, extras=asked.extras))


def test_processes_fill_one_cache_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("vmae.targets.FLUSH_ENTRIES", 1)
    dataset = clips_of(folder, views=4)
    processes = [FORK.Process(target=_fill, args=(dataset, tmp_path / "cache"), daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert entries_of(tmp_path / "cache") == 4 * VIDEOS
    asked = Targets(counting(Counter()), None, cache=Cache(tmp_path / "cache"))
    assert asked.fill(dataset, views=4, workers=0) == 0
    for batch in itertools.islice(batches(dataset, VIDEOS, extras=asked.extras), 4):
        assert batch.extras[0].tolist() == batch.clips.long().sum((1, 2, 3, 4)).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_no_video_is_reported_and_left_out(spoilt, tmp_path, workers, capfd):
    count: Counter[str] = Counter()
    dataset = clips_of(spoilt)
    assert len(dataset) == VIDEOS + 2
    asked = Targets(counting(count), None, cache=Cache(tmp_path))
    assert asked.fill(dataset, views=2, workers=workers) == count["sum"] == entries_of(tmp_path) == 2 * VIDEOS
    told = capfd.readouterr().err
    for name in ("0broken.mp4", "empty.mp4"):
        assert f"skipped: {spoilt / name}: " in told.replace("\r", "\n")
    assert f"skipped: {spoilt / '0.mp4'}" not in told
    assert asked.fill(dataset, views=2, workers=workers) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_copies_of_a_video_share_their_entries(folder, tmp_path, workers):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / "clips").mkdir(exist_ok=True)
        shutil.copy(folder / "0.mp4", tmp_path / "clips" / name)
    dataset = clips_of(tmp_path / "clips", start="center", augmentation=Augmentation(), views=0)
    asked = Targets(counting(Counter()), None, cache=Cache(tmp_path / "cache"))
    assert asked.fill(dataset, views=1, workers=workers) == 1
    assert next(batches(dataset, 3, extras=asked.extras)).extras[0].unique().numel() == 1
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / "clips" / name).rename(tmp_path / "clips" / f"renamed {name}")
    moved = clips_of(tmp_path / "clips", start="center", augmentation=Augmentation(), views=0)
    assert Targets(counting(Counter()), None, cache=Cache(tmp_path / "cache")).fill(moved, views=1, workers=0) == 0


# --- what is not stored -------------------------------------------------------------------------------------------


def check_not_stored(asked: Targets, dataset: ClipDataset, epoch: int, *, workers: int = 0) -> None:
    """The first view of an epoch is refused, by a line that names the video."""
    with pytest.raises(CacheError) as caught:
        next(batches(dataset, 1, start=epoch * len(dataset), workers=workers, extras=asked.extras))
    message = str(caught.value)
    assert any(str(path) in message for path, _ in dataset.entries)
    assert str(asked.cache.folder) in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_more_views_than_are_stored_are_refused(folder, tmp_path, workers):
    dataset = clips_of(folder, views=2)
    asked = Targets(counting(Counter()), None, cache=Cache(tmp_path))
    asked.fill(dataset, views=2, workers=0)
    for epoch in (2, 3):
        for more in (clips_of(folder, views=4), clips_of(folder, views=0)):
            check_not_stored(asked, more, epoch, workers=workers)
            assert len(next(batches(more, 2 * VIDEOS, extras=asked.extras)).extras) == 2  # those that are
        assert len(next(batches(dataset, 1, start=epoch * VIDEOS, extras=asked.extras)).extras) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"augmentation": replace(CHANGED, crop=0.9)},
        {"augmentation": replace(CHANGED, crop=1.0)},
        {"augmentation": replace(CHANGED, jitter=0.5)},
        {"augmentation": Augmentation()},
        {"seed": 1},
        {"frames": 6},
        {"size": 48},
        {"stride": 2},
        {"fps": 5.0},
        {"start": "center"},
    ],
)
def test_another_view_is_refused(folder, tmp_path, changes):
    asked = Targets(counting(Counter()), None, cache=Cache(tmp_path))
    asked.fill(clips_of(folder), views=2, workers=0)
    check_not_stored(asked, clips_of(folder, **changes), 0)


def test_a_mirrored_view_is_another(folder, tmp_path):
    asked = Targets(counting(Counter()), None, cache=Cache(tmp_path))
    dataset = clips_of(folder)
    asked.fill(dataset, views=2, workers=0)
    path, view = dataset.entries[0][0], dataset.view(0, 0)
    assert len(asked.extras(path, view, load_view(path, view)[0])) == 2
    mirrored = replace(view, flip=not view.flip)
    with pytest.raises(CacheError):
        asked.extras(path, mirrored, load_view(path, mirrored)[0])


def test_a_video_with_other_bytes_is_refused(folder, tmp_path):
    path = Path(shutil.copy(folder / "0.mp4", tmp_path))
    dataset = clips_of(path)
    asked = Targets(counting(Counter()), None, cache=Cache(tmp_path / "cache"))
    asked.fill(dataset, views=2, workers=0)
    shutil.copy(folder / "1.mp4", path)
    check_not_stored(asked, dataset, 0)


def test_another_model_window_or_precision_is_refused(folder, tmp_path):
    dataset, cache = clips_of(folder), Cache(tmp_path)
    stored = [tokens_of(), everest_source(embedding())]
    for source in stored:
        Targets(source, None, cache=cache).fill(dataset, views=2, workers=0)
    others = [
        tokens_of(make(1)),
        tokens_of(make(tile=8)),
        tokens_of(make(levels=(8, 8, 8, 8, 8, 7))),
        tokens_of(window=4),
        tokens_of(window=8),
        tokens_of(precision="bf16"),
        everest_source(embedding(1)),
        flow_source(),
    ]
    assert len({source.name for source in (*stored, *others)}) == len(stored) + len(others)
    for source in others:
        check_not_stored(Targets(source, None, cache=cache), dataset, 0)
    same = [tokens_of(make()), everest_source(embedding())]  # made anew
    assert [source.name for source in same] == [source.name for source in stored]
    for source in same:
        assert len(next(batches(dataset, 1, extras=Targets(source, None, cache=cache).extras)).extras) == source.count


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_stops_a_loop_by_name(folder, tmp_path, workers):
    dataset = clips_of(folder)
    asked = Targets(counting(Counter()), None, cache=Cache(tmp_path))
    asked.fill(dataset, views=2, workers=0)
    [shard] = tmp_path.iterdir()
    content = bytearray(shard.read_bytes())
    for at in range(8 + int.from_bytes(content[:8], "little"), len(content)):
        content[at] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CacheError, match=shard.name) as caught:
        next(batches(dataset, 1, workers=workers, extras=asked.extras))
    assert len(str(caught.value).splitlines()) == 1
