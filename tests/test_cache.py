"""The cache on disk: keys, entries bit for bit, several writers, kills, full disks, and files that are damaged."""

import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vmae import AdaptiveTokenizer, TokenizerConfig
from vmae.cache import FORMAT, Cache, CacheError, content_hash, entry_key, state_hash
from vmae.video import View

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip


def same(first, second) -> bool:
    """Tensors alike in type, shape and every bit."""

    def bits(tensor):
        return tensor.detach().contiguous().flatten().view(torch.uint8)

    return len(first) == len(second) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
        for a, b in zip(first, second, strict=True)
    )


def key_of(number: int) -> str:
    return f"{number:032x}"


def entry_of(number: int, length: int = 5) -> tuple[torch.Tensor, ...]:
    """Codes and scores, as they are for this key wherever they are computed."""
    codes = (torch.arange(length) * (number + 1) % 251).to(torch.int32)
    return codes, codes / 7 + number


def filled(folder: Path, numbers=range(3)) -> Cache:
    cache = Cache(folder)
    for number in numbers:
        cache.add(key_of(number), entry_of(number))
    cache.flush()
    return cache


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def check_named(error: BaseException, path: Path) -> None:
    """One line that names the file and says more."""
    message = str(error)
    assert str(path) in message
    assert len(message.splitlines()) == 1, message
    assert len(message) > len(str(path)) + 5


def check_refused(folder: Path, path: Path) -> None:
    with pytest.raises(CacheError) as caught:
        Cache(folder)
    check_named(caught.value, path)


@pytest.fixture
def shard(tmp_path) -> Path:
    """The one shard of a folder with three entries."""
    filled(tmp_path / "cache")
    [path] = shards(tmp_path / "cache")
    return path


# --- keys ---------------------------------------------------------------------------------------------------------

VIEW = View(frames=(3, 5, 7), times=(0.12, 0.2, 0.28), crop=(1, 2, 30, 40), size=32, flip=False)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "a.mp4"
    path.write_bytes(bytes(range(256)) * 1000)
    return path


def test_each_fact_alone_changes_the_key(file, tmp_path):
    other = tmp_path / "b.mp4"
    other.write_bytes(file.read_bytes()[:-1] + b"x")
    facts = {
        "frames": ((3, 5, 7), (3, 5, 8), (35, 7), ()),
        "times": ((0.12, 0.2, 0.28), (0.12, 0.2, 0.2800000000000001)),
        "crop": ((1, 2, 30, 40), (12, 3, 0, 40), (2, 1, 30, 40), None),
        "size": (32, 64),
        "flip": (False, True),
    }
    keys = {
        entry_key(path, View(**dict(zip(facts, values, strict=True))), source)
        for values in itertools.product(*facts.values())
        for path in (file, other)
        for source in ("a", "b", "ab", "")
    }
    assert len(keys) == 4 * 2 * 4 * 2 * 2 * 2 * 4
    assert all(len(key) >= 32 and key.isalnum() for key in keys)


numbers = st.lists(st.integers(0, 30), max_size=3).map(tuple)
views = st.builds(
    View,
    frames=numbers,
    times=st.lists(st.floats(0, 100), max_size=3).map(tuple),
    crop=st.none() | st.tuples(*[st.integers(0, 99)] * 4),
    size=st.integers(1, 99),
    flip=st.booleans(),
)


@settings(max_examples=100, deadline=None)
@given(first=views, second=views, sources=st.tuples(st.text(max_size=3), st.text(max_size=3)))
def test_keys_are_the_same_just_where_the_facts_are(first, second, sources):
    first_key, second_key = entry_key(Path(__file__), first, sources[0]), entry_key(Path(__file__), second, sources[1])
    assert (first_key == second_key) == ((first, sources[0]) == (second, sources[1]))
    assert first_key == entry_key(Path(__file__), replace(first), sources[0])


def test_a_file_is_known_by_its_bytes_alone(file, tmp_path):
    key = entry_key(file, VIEW, "s")
    (tmp_path / "deep").mkdir()
    copy = Path(shutil.copy(file, tmp_path / "deep" / "copy.mkv"))
    os.utime(file, ns=(0, 10**18))
    assert entry_key(file, VIEW, "s") == key
    assert entry_key(copy, VIEW, "s") == key
    assert entry_key(file.rename(tmp_path / "renamed.mp4"), VIEW, "s") == key
    assert content_hash(copy) == content_hash(tmp_path / "renamed.mp4")


@pytest.mark.parametrize("at", [0, 70_000, -1])
def test_one_changed_byte_is_another_file(file, at):
    key, changed = entry_key(file, VIEW, "s"), file.stat().st_mtime_ns
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(changed + 1, changed + 1))  # of the same length, in the next nanosecond
    assert entry_key(file, VIEW, "s") != key
    content[at] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(changed + 2, changed + 2))
    assert entry_key(file, VIEW, "s") == key


def test_state_hash_knows_every_weight():
    torch.manual_seed(0)
    model = AdaptiveTokenizer(TokenizerConfig.tiny(width=8, scorer_width=4))
    state = model.state_dict()
    hashes = {state_hash(state, model.config)}
    for name, value in state.items():
        for at in {0, value.numel() - 1}:
            changed = value.clone()
            changed.flatten().view(torch.int32)[at] ^= 1  # the last bit of a number
            hashes.add(state_hash({**state, name: changed}, model.config))
    assert len(hashes) == 1 + sum(min(value.numel(), 2) for value in state.values())
    hashes |= {
        state_hash(state, TokenizerConfig.tiny(width=8, scorer_width=4, **c)) for c in ({"tile": 8}, {"keep": 0.5})
    }
    assert len(hashes) == 3 + sum(min(value.numel(), 2) for value in state.values())


def test_state_hash_knows_names_shapes_types_and_what_it_is_about():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    states = [
        {"a": a, "b": b},
        {"a": b, "b": a},
        {"a": a, "c": b},
        {"a": a},
        {},
        {"ab": torch.cat((a, b))},
        {"a": a[None], "b": b},
        {"a": a[:, None], "b": b},
        {"a": a.view(torch.int32), "b": b},
        {"a": a.double(), "b": b},
        {"a": a, "b": b, "c": torch.empty(0)},
        {"a": a, "b": b, "c": torch.empty(0, 1)},
        {"a": torch.tensor([1.0, -0.0]), "b": b},
        {"a": torch.tensor([1.0, 0.0]), "b": b},
    ]
    hashes = [state_hash(state, about) for state in states for about in (None, "x", {"n": 1}, [1, 2])]
    assert len(set(hashes)) == len(hashes)


def test_state_hash_does_not_depend_on_order_or_memory():
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    other = torch.ones(2)
    digest = state_hash({"a": weight, "b": other}, {"n": 1})
    assert state_hash({"b": other.clone(), "a": weight.clone()}, {"n": 1}) == digest
    assert state_hash({"a": weight.T.contiguous().T, "b": torch.ones(1).expand(2)}, {"n": 1}) == digest
    assert state_hash({"a": torch.nn.Parameter(weight), "b": other}, {"n": 1}) == digest


# --- entries ------------------------------------------------------------------------------------------------------


@st.composite
def tensors(draw) -> torch.Tensor:
    """Any bits, of any type that a file can hold, in any shape."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = int(torch.tensor([1, *shape]).prod()) * dtype.itemsize
    content = torch.tensor(list(draw(st.binary(min_size=count, max_size=count))), dtype=torch.uint8)
    if dtype == torch.bool:
        content %= 2
    tensor = content.view(dtype).reshape(shape)
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


@settings(max_examples=40, deadline=None)
@given(entries=st.lists(st.lists(tensors(), max_size=3), max_size=4))
def test_entries_come_back_bit_for_bit(entries):
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(folder)
        for number, entry in enumerate(entries):
            cache.add(key_of(number), entry)
        check_entries(cache, entries)
        assert cache.unwritten == len(entries)
        cache.flush()
        assert cache.unwritten == 0
        check_entries(cache, entries)
        check_entries(Cache(folder), entries)


def check_entries(cache: Cache, entries) -> None:
    assert len(cache) == len(entries)
    for number, entry in enumerate(entries):
        assert key_of(number) in cache
        assert same(cache.get(key_of(number)), entry)


def test_tensors_that_share_memory_are_stored(tmp_path):
    row = torch.arange(6.0)
    entries = [(row, row), (row[:4], row[2:]), (row[:3],), (row[3:],)]
    cache = Cache(tmp_path)
    for number, entry in enumerate(entries):
        cache.add(key_of(number), entry)
    cache.flush()
    check_entries(Cache(tmp_path), entries)


def test_tensors_of_a_model_are_stored(tmp_path):
    layer = torch.nn.Linear(3, 2)
    cache = Cache(tmp_path)
    cache.add(key_of(0), [layer.weight, layer.weight.T * 2])
    assert not any(tensor.requires_grad for tensor in cache.get(key_of(0)))
    cache.flush()
    assert same(Cache(tmp_path).get(key_of(0)), (layer.weight, layer.weight.T * 2))


@pytest.mark.parametrize("written", [False, True])
def test_what_get_returned_can_be_changed(tmp_path, written):
    cache = Cache(tmp_path)
    cache.add(key_of(1), entry_of(1))
    if written:
        cache.flush()
    for tensor in cache.get(key_of(1)):
        tensor.zero_()
    assert same(cache.get(key_of(1)), entry_of(1))


def test_there_is_no_entry_but_what_was_added(tmp_path):
    for cache in (Cache(tmp_path / "none"), filled(tmp_path / "some")):
        for key in (key_of(9), "", key_of(1)[:-1], key_of(1) + ".0"):
            assert key not in cache
            with pytest.raises(KeyError):
                cache.get(key)
    assert len(Cache(tmp_path / "none")) == 0


def test_nothing_is_written_when_nothing_was_added(tmp_path):
    Cache(tmp_path / "none").flush()
    assert not (tmp_path / "none").exists() or not any((tmp_path / "none").iterdir())
    cache = filled(tmp_path / "some")
    before = os.listdir(tmp_path / "some")
    assert len(before) == 1
    for again in (cache, Cache(tmp_path / "some")):
        again.flush()
    assert os.listdir(tmp_path / "some") == before


def test_a_shard_can_be_read_by_other_users(tmp_path):
    mask = os.umask(0o022)
    try:
        filled(tmp_path)
    finally:
        os.umask(mask)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o644]


def test_a_cache_is_pickled(tmp_path):
    cache = filled(tmp_path / "cache")
    cache.get(key_of(0))  # a file is open
    cache.add(key_of(3), entry_of(3))
    other = pickle.loads(pickle.dumps(cache))
    check_entries(other, [entry_of(number) for number in range(4)])
    check_entries(cache, [entry_of(number) for number in range(4)])
    filled(tmp_path / "cache", [4])
    other.refresh()
    assert same(other.get(key_of(4)), entry_of(4))


# --- several writers ----------------------------------------------------------------------------------------------

steps = st.tuples(st.sampled_from(["add", "add", "flush", "refresh"]), st.integers(0, 2), st.integers(0, 5))


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(steps, max_size=15))
@example([("add", at, number) for at in (0, 1) for number in (0, at + 1)] + [("flush", at, 0) for at in (0, 1)])
@example([("add", 0, 0), ("flush", 0, 0), ("add", 0, 0), ("add", 1, 0)])
def test_several_caches_of_one_folder(steps):
    with tempfile.TemporaryDirectory() as folder:
        caches = [Cache(folder) for _ in range(3)]
        seen: list[set[int]] = [set() for _ in caches]  # what each one must know of
        stored: set[int] = set()
        added: list[set[int]] = [set() for _ in caches]
        for what, at, number in steps:
            if what == "add":
                caches[at].add(key_of(number), entry_of(number))
                added[at].add(number)
                seen[at].add(number)
            elif what == "flush":
                caches[at].flush()
                stored |= added[at]
                added[at] = set()
            else:
                caches[at].refresh()
                seen[at] |= stored
            for cache, known in zip(caches, seen, strict=True):
                assert all(same(cache.get(key_of(i)), entry_of(i)) for i in known)
                present = {i for i in range(6) if key_of(i) in cache}
                assert known <= present <= known | stored
                assert len(cache) == len(present)
        last = Cache(folder)
        assert {i for i in range(6) if key_of(i) in last} == stored
        assert len(last) == len(stored)
        assert all(same(last.get(key_of(i)), entry_of(i)) for i in stored)


FORK = multiprocessing.get_context("fork")


def _write(folder: Path, numbers: list[int], barrier) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    cache = Cache(folder)
    barrier.wait(60)
    for count, number in enumerate(numbers):
        cache.add(key_of(number), entry_of(number))
        if count % 3 == 2:
            cache.flush()
            assert all(same(cache.get(key_of(i)), entry_of(i)) for i in numbers[: count + 1])
    cache.flush()


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    barrier = FORK.Barrier(3)
    parts = [list(range(start, start + 20)) for start in (0, 10, 20)]  # some keys are written by two
    writers = [FORK.Process(target=_write, args=(tmp_path / "cache", part, barrier)) for part in parts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    check_entries(Cache(tmp_path / "cache"), [entry_of(number) for number in range(40)])
    assert os.listdir(tmp_path / "cache") == [path.name for path in (tmp_path / "cache").glob("*.safetensors")]


LARGE = 200_000


def _write_for_ever(folder: Path, first: int, written) -> None:
    torch.set_num_threads(1)
    cache = Cache(folder)
    for number in itertools.count(first):
        cache.add(key_of(number), entry_of(number, LARGE))
        if number % 2:
            cache.flush()
            written.send(number + 1)


def test_a_killed_writer_leaves_whole_shards(tmp_path):
    promised: set[int] = set()
    for first in range(0, 500, 100):
        receive, send = FORK.Pipe(duplex=False)
        writer = FORK.Process(target=_write_for_ever, args=(tmp_path, first, send), daemon=True)
        writer.start()
        send.close()
        assert receive.poll(60)
        last = receive.recv()
        time.sleep(random.uniform(0, 0.05))
        writer.kill()
        writer.join(60)
        assert writer.exitcode == -signal.SIGKILL
        while receive.poll():
            try:
                last = receive.recv()
            except EOFError:
                break
        receive.close()
        promised |= set(range(first, last))
        cache = Cache(tmp_path)
        present = {number for number in range(600) if key_of(number) in cache}
        assert promised <= present
        assert len(cache) == len(present)
        assert len(present - promised) <= 2 * (first // 100 + 1)  # what was written, but not yet told
        assert all(same(cache.get(key_of(i)), entry_of(i, LARGE)) for i in present if i >= first)
    assert all(same(cache.get(key_of(i)), entry_of(i, LARGE)) for i in present)
    cache.add(key_of(1000), entry_of(1000))
    cache.flush()
    assert same(Cache(tmp_path).get(key_of(1000)), entry_of(1000))


def test_files_left_by_a_kill_are_ignored(shard):
    whole = shard.read_bytes()
    (shard.parent / f".{shard.name}.abc123.part").write_bytes(whole[: len(whole) // 2])
    old = shard.parent / f".{shard.name}.xyz.part"
    old.write_bytes(b"")
    os.utime(old, (0, 0))  # no writer is at work on it any more
    (shard.parent / "notes.txt").write_text("no shard")
    check_entries(Cache(shard.parent), [entry_of(number) for number in range(3)])
    assert [path.name for path in shard.parent.glob(".*")] == [f".{shard.name}.abc123.part"]


# --- damage -------------------------------------------------------------------------------------------------------


def header_of(path: Path) -> int:
    """How many bytes come before the tensors."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_a_truncated_shard_is_refused(shard):
    whole, header = shard.read_bytes(), header_of(shard)
    for length in sorted({0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1, *range(0, len(whole), 97)}):
        shard.write_bytes(whole[:length])
        check_refused(shard.parent, shard)
    shard.write_bytes(whole + b"\0")
    check_refused(shard.parent, shard)
    shard.write_bytes(whole)
    check_entries(Cache(shard.parent), [entry_of(number) for number in range(3)])


def test_a_flipped_bit_in_a_tensor_is_refused(shard):
    whole, header = shard.read_bytes(), header_of(shard)
    for at in range(8 * header, 8 * len(whole), 5):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        shard.write_bytes(damaged)
        cache, right, refused = Cache(shard.parent), 0, 0
        for number in range(3):
            try:
                right += same(cache.get(key_of(number)), entry_of(number))
            except CacheError as error:
                check_named(error, shard)
                refused += 1
        assert (right, refused) == (2, 1), at


def check_never_wrong(shard: Path, damaged: bytes) -> None:
    """What is damaged in a header: the shard or the entry is refused, or the entry is not there."""
    shard.write_bytes(damaged)
    try:
        cache = Cache(shard.parent)
    except CacheError as error:
        check_named(error, shard)
        return
    for number in range(3):
        try:
            assert same(cache.get(key_of(number)), entry_of(number))
        except CacheError as error:
            check_named(error, shard)
        except KeyError:
            assert key_of(number) not in cache


def test_a_flipped_bit_in_the_header_gives_no_wrong_entry(shard):
    whole = shard.read_bytes()
    for at in range(0, 8 * header_of(shard), 31):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        check_never_wrong(shard, damaged)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"entries"', b'"entriec"'),
        (b'"entries":"{', b'"entries":"y'),
        (b'"entries":"{', b'"entries":"['),
        (b'"format"', b'"formav"'),
        (FORMAT.encode(), FORMAT.encode()[:-1] + b"3"),
        (b"__metadata__", b"__metadatc__"),
    ],
)
def test_damage_to_what_the_header_says_of_the_entries_is_refused(shard, before, after):
    whole = shard.read_bytes()
    assert before in whole
    shard.write_bytes(whole.replace(before, after, 1))
    check_refused(shard.parent, shard)


@pytest.mark.parametrize(
    ("before", "after"), [(b'"dtype":"I32"', b'"dtype":"F32"'), (b'"shape":[2,3]', b'"shape":[3,2]')]
)
def test_another_type_or_shape_in_the_header_is_damage(tmp_path, before, after):
    cache = Cache(tmp_path)
    cache.add(key_of(0), [torch.arange(6, dtype=torch.int32).reshape(2, 3)])
    cache.flush()
    [path] = shards(tmp_path)
    whole = path.read_bytes()
    assert before in whole
    path.write_bytes(whole.replace(before, after))
    with pytest.raises(CacheError) as caught:
        Cache(tmp_path).get(key_of(0))
    check_named(caught.value, path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"format": FORMAT[:-1] + "0", "entries": "{}"},
        {"entries": "{}"},
        {"format": FORMAT},
        {"format": FORMAT, "entries": ""},
        {"format": FORMAT, "entries": "[]"},
        {"format": FORMAT, "entries": json.dumps({key_of(0): 7})},
    ],
)
def test_a_foreign_safetensors_file_is_refused(shard, metadata):
    foreign = shard.with_name("model.safetensors")
    save_file({"weight": torch.ones(3)}, foreign, metadata=metadata)
    check_refused(shard.parent, foreign)


@pytest.mark.parametrize("content", [b"", b"notes on the data\n", b"{}" * 50, bytes(64), b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_refused(shard, content):
    foreign = shard.with_name("notes.safetensors")
    foreign.write_bytes(content)
    check_refused(shard.parent, foreign)


def test_a_folder_named_like_a_shard_is_refused(shard):
    foreign = shard.with_name("folder.safetensors")
    foreign.mkdir()
    check_refused(shard.parent, foreign)


def test_a_damaged_shard_that_comes_later_is_refused(shard):
    cache = Cache(shard.parent)
    foreign = shard.with_name("later.safetensors")
    foreign.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CacheError) as caught:
        cache.refresh()
    check_named(caught.value, foreign)
    assert same(cache.get(key_of(0)), entry_of(0))


@pytest.mark.parametrize("damage", ["gone", "truncated", "another"])
def test_a_shard_that_is_lost_after_opening_is_named(shard, damage):
    cache = Cache(shard.parent)
    if damage == "gone":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        filled(shard.parent / "other", [7])
        shutil.copy(shards(shard.parent / "other")[0], shard)
    with pytest.raises(CacheError) as caught:
        cache.get(key_of(1))
    check_named(caught.value, shard)


def test_a_removed_shard_takes_its_entries_alone(shard):
    filled(shard.parent, [3, 4])
    shard.unlink()
    cache = Cache(shard.parent)
    assert [number for number in range(5) if key_of(number) in cache] == [3, 4]
    assert same(cache.get(key_of(4)), entry_of(4))


def test_a_file_is_no_folder_for_a_cache(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    check_refused(path, path)
    assert path.read_text() == "x"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises((CacheError, OSError)) as caught:
        filled(tmp_path / "file" / "cache")
    check_named(caught.value, tmp_path / "file")


def test_full_disk_keeps_the_entries_for_later(shard):
    folder = shard.parent
    cache = Cache(folder)
    large = entry_of(7, LARGE)
    cache.add(key_of(7), large)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        for _ in range(2):
            with pytest.raises(OSError, match=r"\.safetensors") as caught:
                cache.flush()
            check_named(caught.value, folder)
            assert os.listdir(folder) == [shard.name]
            assert cache.unwritten == 1
            assert same(cache.get(key_of(7)), large)
            assert same(cache.get(key_of(0)), entry_of(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    cache.flush()
    assert cache.unwritten == 0
    assert same(Cache(folder).get(key_of(7)), large)
    assert len(Cache(folder)) == 4
