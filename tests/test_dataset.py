"""Folders, lists and batches of videos."""

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from numbered_videos import CLIP, GOP, check_refusal, numbers_of, write_numbers

from vmae.dataset import ClipDataset, batches, decoded, read_entries
from vmae.video import VideoError, load_clip

# --- lists of videos ----------------------------------------------------------------------------------------------


def names(entries) -> list[tuple[str, int]]:
    return [(path.name, label) for path, label in entries]


def test_folder_at_any_depth(tmp_path):
    for name in ("b.mp4", "a.avi", "deep/er/c.mkv", "deep/D.MP4", "with space/e f.webm"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("notes.txt", "deep/labels.csv", "mp4", "g.mp4.part"):
        (tmp_path / name).write_bytes(b"x")
    entries = read_entries(tmp_path)
    assert {path for path, _ in entries} == {
        tmp_path / name for name in ("b.mp4", "a.avi", "deep/er/c.mkv", "deep/D.MP4", "with space/e f.webm")
    }
    assert len(entries) == 5
    assert all(label == -1 for _, label in entries)
    assert entries == sorted(entries)
    assert read_entries(str(tmp_path)) == entries


def test_a_folder_named_like_a_video_is_none(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    (tmp_path / "a.mp4" / "b.mp4").write_bytes(b"x")
    assert read_entries(tmp_path) == [(tmp_path / "a.mp4" / "b.mp4", -1)]


def test_a_single_video(tmp_path):
    path = write_numbers(tmp_path / "a.mp4", range(5))
    assert read_entries(path) == [(path, -1)]


@pytest.mark.parametrize("name", ["train.txt", "train.csv", "list"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_videomae_list(tmp_path, name, newline):
    lines = [
        "clips/a.mp4 3",
        "clips/my holiday 2.mp4 0",
        f"{tmp_path / 'elsewhere' / 'b.mkv'} 12",
        "",
        "c.avi -1",
        "../d.mp4 7",
    ]
    (tmp_path / "lists").mkdir()
    source = tmp_path / "lists" / name
    source.write_bytes(newline.join(lines).encode())
    expected = [
        (tmp_path / "lists/clips/a.mp4", 3),
        (tmp_path / "lists/clips/my holiday 2.mp4", 0),
        (tmp_path / "elsewhere/b.mkv", 12),
        (tmp_path / "lists/c.avi", -1),
        (tmp_path / "lists/../d.mp4", 7),
    ]
    entries = read_entries(source)
    assert [(path.resolve(), label) for path, label in entries] == [(path.resolve(), label) for path, label in expected]


def test_list_without_labels(tmp_path):
    source = tmp_path / "list.txt"
    source.write_text("a.mp4\nmy holiday.mp4\n")
    assert read_entries(source) == [(tmp_path / "a.mp4", -1), (tmp_path / "my holiday.mp4", -1)]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["path,label", "a.mp4,3", "my clip 4.mp4,0"], [("a.mp4", 3), ("my clip 4.mp4", 0)]),
        (["label,path", "3,a.mp4", "0,b.mp4"], [("a.mp4", 3), ("b.mp4", 0)]),
        (["path", "a.mp4", "b c.mp4"], [("a.mp4", -1), ("b c.mp4", -1)]),
        (["path,label", '"a, b.mp4",3'], [("a, b.mp4", 3)]),
        (["id,path,split,label", "1,a.mp4,train,3"], [("a.mp4", 3)]),
    ],
)
def test_csv_with_a_header(tmp_path, lines, expected, newline):
    source = tmp_path / "train.csv"
    source.write_bytes(newline.join([*lines, ""]).encode())
    entries = read_entries(source)
    assert names(entries) == expected
    assert all(path.parent == tmp_path for path, _ in entries)


def test_names_in_other_scripts(tmp_path):
    source = tmp_path / "train.csv"
    source.write_bytes("vidéo/動画.mp4 2\n".encode())
    assert read_entries(source) == [(tmp_path / "vidéo/動画.mp4", 2)]


@pytest.mark.parametrize(
    "what", ["missing", "missing.csv", "folder", "empty.txt", "blank.csv", "header.csv", "binary.txt"]
)
def test_source_without_videos(tmp_path, what):
    source = tmp_path / what
    if what == "folder":
        source.mkdir()
        (source / "notes.txt").write_text("x")
    elif not what.startswith("missing"):
        content = {
            "empty.txt": b"",
            "blank.csv": b"\n \n",
            "header.csv": b"path,label\n",
            "binary.txt": b"\xff\xfe\0\x80",
        }
        source.write_bytes(content[what])
    with pytest.raises(VideoError) as caught:
        ClipDataset(source, frames=2, size=CLIP)
    check_refusal(caught.value, source)


@pytest.mark.parametrize("lines", [["path,label", "a.mp4,cat"], ["path,label", "a.mp4,"], ["path,label", ",3"]])
def test_csv_line_that_cannot_be_read(tmp_path, lines):
    source = tmp_path / "train.csv"
    source.write_text("\n".join(lines))
    try:
        entries = read_entries(source)
    except VideoError as error:
        check_refusal(error, source)
    else:
        assert entries == [(tmp_path / "a.mp4", -1)]
        assert lines[1].endswith(",")


@pytest.mark.parametrize("separator", [" ", "\t", "  "])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_lists_as_other_programs_write_them(tmp_path, start, separator):
    path = tmp_path / "list.txt"
    path.write_text(f"{start}a b.mp4{separator}3\n\nc.mp4\n", encoding="utf-8")
    assert read_entries(path) == [(tmp_path / "a b.mp4", 3), (tmp_path / "c.mp4", -1)]
    path.write_text(f"{start}path,label\na b.mp4,3\n", encoding="utf-8")
    assert read_entries(path) == [(tmp_path / "a b.mp4", 3)]


def test_blanks_in_a_csv_file_belong_to_no_name(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("path, label\na b.mp4, 3\n")
    assert read_entries(path) == [(tmp_path / "a b.mp4", 3)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x" * 200_000, "expected a text file that lists videos"),
        ("a.mp4 99999999999\n", r":1: expected a path and an integer label, got 'a\.mp4' and '99999999999'"),
    ],
)  # fmt: skip
def test_what_is_no_list_is_named(text, words, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(VideoError, match=rf"list\.txt: ?{words}|list\.txt{words}"):
        read_entries(path)


def test_a_name_that_no_file_can_have_is_skipped(folder, tmp_path):
    good = read_entries(folder)[0][0]
    (tmp_path / "list.txt").write_text(f"{'x' * 300}.mp4\n{good.resolve()}\n")
    batch = next(batches(ClipDataset(tmp_path / "list.txt", frames=2, size=CLIP), 2))
    assert batch.own.tolist().count(True) == 1
    assert "xxx.mp4: cannot be decoded" in batch.skipped[0]


def test_csv_without_a_header_is_named(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("a.mp4,0\nb.mp4,1\n")
    with pytest.raises(VideoError, match=r"list\.csv:1: expected .path label., or a csv file whose header"):
        read_entries(path)


def test_a_worker_ends_with_its_run_whenever_that_is_killed():
    """Also between its own beginning and PyTorch's first look at who its parent is."""
    text = """
import multiprocessing, time
from vmae.dataset import start_worker

def work():
    start_worker(0)
    print("started", flush=True)
    time.sleep(100)

if __name__ == "__main__":
    for _ in range(2):
        multiprocessing.Process(target=work).start()
    time.sleep(100)
"""
    run = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    for _ in range(2):
        assert run.stdout.readline() == "started\n"
    run.kill()
    assert run.communicate(timeout=20) == ("", None)  # when nobody has the pipe any more


def test_a_killed_worker_is_named(folder):
    source = batches(ClipDataset(folder, frames=2, size=CLIP), 1, workers=1)
    next(source)
    for process in multiprocessing.active_children():
        with contextlib.suppress(RuntimeError):  # PyTorch's handler of SIGCHLD, where the signal comes this soon
            process.kill()
    with pytest.raises(OSError, match="a decoding process was killed"):
        list(itertools.islice(source, 20))


@pytest.mark.parametrize(
    "error", [EOFError(), ConnectionResetError(104, "reset"), RuntimeError("DataLoader worker (pid 7) is killed")]
)
def test_whatever_pytorch_makes_of_a_killed_worker(monkeypatch, error):
    """It depends on what the worker was about when it ended."""

    def end(*_):
        raise error

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", lambda _: iter(end, None))
    with pytest.raises(OSError, match="a decoding process was killed"):
        list(decoded([1], workers=1))
    with pytest.raises(type(error)):
        list(decoded([1], workers=0))


class Raises(torch.utils.data.Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, _):
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), NotImplementedError("x"), EOFError("y")])
def test_what_a_worker_raises_is_raised(error, workers):
    with pytest.raises(type(error), match=str(error)):
        list(decoded(Raises(error), workers=workers))


def test_an_interrupt_leaves_no_signal_blocked(monkeypatch):
    """Python runs a signal's handler as `pthread_sigmask` returns, when the mask is another already."""
    real = signal.pthread_sigmask

    def interrupted(how, mask):
        before = real(how, mask)
        if how == signal.SIG_BLOCK and mask:
            raise KeyboardInterrupt
        return before

    before = real(signal.SIG_BLOCK, ())
    monkeypatch.setattr(signal, "pthread_sigmask", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(decoded([1], workers=1))
        assert real(signal.SIG_BLOCK, ()) == before
    finally:
        real(signal.SIG_SETMASK, before)


# --- the dataset --------------------------------------------------------------------------------------------------

ENTRIES = 6
STEPS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos 0, ..., 5; video v has the frames 16 v, ..., 16 v + 15; and a list of them."""
    folder = tmp_path_factory.mktemp("data set")
    for video in range(ENTRIES):
        write_numbers(folder / f"video {video}.mkv", range(STEPS * video, STEPS * (video + 1)), options=GOP)
    lines = [f"video {video}.mkv {video}" for video in range(ENTRIES)]
    (folder / "train.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def spoilt(folder, tmp_path):
    """The list, with a missing, an empty, a cut and an unreadable file among the six."""
    cut = (folder / "video 0.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.avi").write_text("no video")
    lines = (folder / "train.csv").read_text().splitlines()
    lines = [f"{folder / line}" for line in lines]
    for at, name in ((0, "missing.mp4"), (3, "empty.mp4"), (5, "cut.mkv"), (9, "text.avi")):
        lines.insert(at, f"{name} 99")
    (tmp_path / "spoilt.csv").write_text("\n".join(lines))
    return tmp_path / "spoilt.csv"


BROKEN = ("missing.mp4", "empty.mp4", "cut.mkv", "text.avi")


def check_clip(clip: torch.Tensor, label: int, frames: int) -> int:
    """Consecutive frames of the video that the label names; returns the place of the first."""
    found = [number - STEPS * label for number in numbers_of(clip)]
    assert found == list(range(found[0], found[0] + frames))
    assert 0 <= found[0] <= STEPS - frames
    return found[0]


def test_item(folder):
    dataset = ClipDataset(folder / "train.csv", frames=4, size=CLIP)
    assert len(dataset) == ENTRIES
    for index in range(ENTRIES):
        clip, label = dataset[index]
        assert clip.shape == (3, 4, CLIP, CLIP)
        assert clip.dtype == torch.uint8
        assert label == index
        check_clip(clip, label, 4)


def test_item_of_a_folder_has_no_label(folder):
    dataset = ClipDataset(folder, frames=4, size=CLIP, start=3)
    clip, label = dataset[2]
    assert label == -1
    assert numbers_of(clip) == [35, 36, 37, 38]


def test_sampling_is_that_of_load_clip(folder):
    how = {"frames": 5, "size": 40, "fps": 5.0, "start": 2}
    clip, _ = ClipDataset(folder / "train.csv", **how)[1]
    assert torch.equal(clip, load_clip(folder / "video 1.mkv", **how)[0])
    with pytest.raises(VideoError, match=r"video 0\.mkv"):
        ClipDataset(folder / "train.csv", frames=17, size=CLIP, short="refuse")[0]


def test_items_that_are_kept_short(folder):
    dataset = ClipDataset(folder / "train.csv", frames=2 * STEPS, size=CLIP, short="keep")
    for index in range(ENTRIES):
        clip, label = dataset[index]
        assert check_clip(clip, label, STEPS) == 0
    with pytest.raises(ValueError, match="short: expected loop or refuse, as the clips of a batch have one length"):
        batches(dataset, 2)


def test_items_are_seeded(folder):
    def starts(seed):
        dataset = ClipDataset(folder / "train.csv", frames=2, size=CLIP, seed=seed)
        return [check_clip(*dataset[index], 2) for index in range(ENTRIES)]

    torch.manual_seed(1)
    random.seed(1)
    first = starts(0)
    assert starts(0) == first
    others = [starts(seed) for seed in range(1, 4)]
    assert all(other != first for other in others)
    assert len(set(first)) > 1  # the videos do not all start at the same frame


def test_epochs_start_elsewhere(folder):
    dataset = ClipDataset(folder / "train.csv", frames=2, size=CLIP)
    starts = [[check_clip(*dataset.load(index, epoch), 2) for index in range(ENTRIES)] for epoch in range(4)]
    assert len(set(map(tuple, starts))) == 4
    assert starts[2] == [check_clip(*dataset.load(index, 2), 2) for index in range(ENTRIES)]


def test_the_same_in_another_process(folder):
    dataset = ClipDataset(folder / "train.csv", frames=2, size=CLIP, seed=5)
    here = [int(dataset[index][0].long().sum()) for index in range(ENTRIES)]
    code = (
        "import sys; from vmae.dataset import ClipDataset; "
        f"d = ClipDataset(sys.argv[1], frames=2, size={CLIP}, seed=5); "
        f"print([int(d[i][0].long().sum()) for i in range({ENTRIES})])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", code, str(folder / "train.csv")]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    assert there.strip() == str(here)


def test_unusable_item_raises(spoilt):
    dataset = ClipDataset(spoilt, frames=4, size=CLIP)
    with pytest.raises(VideoError) as caught:
        dataset[0]
    check_refusal(caught.value, spoilt.parent / "missing.mp4")


# --- batches ------------------------------------------------------------------------------------------------------


def take(count: int, *args, skipped: list[str] | None = None, **kwargs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Clips and labels of the first batches; why videos were left out goes to `skipped`."""
    taken = list(itertools.islice(batches(*args, **kwargs), count))
    if skipped is not None:
        skipped += [reason for batch in taken for reason in batch.skipped]
    return [(batch.clips, batch.labels) for batch in taken]


def test_batch_is_channels_last(folder):
    [(clips, labels)] = take(1, ClipDataset(folder / "train.csv", frames=4, size=CLIP), 3)
    assert clips.shape == (3, 3, 4, CLIP, CLIP)
    assert clips.dtype == torch.uint8
    assert clips.is_contiguous(memory_format=torch.channels_last_3d)
    assert labels.shape == (3,)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 15])
def test_every_epoch_has_every_video_once(folder, size):
    dataset = ClipDataset(folder / "train.csv", frames=2, size=CLIP)
    labels, starts = [], []
    for clips, batch in take(-(-3 * ENTRIES // size), dataset, size):
        labels += batch.tolist()
        starts += [check_clip(clip, label, 2) for clip, label in zip(clips, batch.tolist(), strict=True)]
    epochs = [labels[at : at + ENTRIES] for at in range(0, 3 * ENTRIES, ENTRIES)]
    assert all(sorted(epoch) == list(range(ENTRIES)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1  # each epoch in an order of its own
    by_video = [{start for start, label in zip(starts, labels, strict=True) if label == video} for video in range(6)]
    assert any(len(found) > 1 for found in by_video)  # other starts in other epochs


def same(first, second) -> bool:
    return all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, second, strict=True))


def test_batches_are_seeded(folder):
    dataset = ClipDataset(folder / "train.csv", frames=2, size=CLIP)
    torch.manual_seed(1)
    first = take(6, dataset, 3, seed=4)
    torch.manual_seed(2)
    assert same(first, take(6, dataset, 3, seed=4))
    others = [take(6, dataset, 3, seed=seed) for seed in (5, 6)]
    assert not any(same(first, other) for other in others)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_batches(folder, spoilt, workers):
    for source, count in ((folder / "train.csv", 7), (spoilt, 5)):
        dataset = ClipDataset(source, frames=2, size=CLIP)
        lone: list[str] = []
        several: list[str] = []
        expected = take(count, dataset, 4, seed=4, skipped=lone)
        assert same(expected, take(count, dataset, 4, seed=4, workers=workers, skipped=several))
        assert several == lone


def test_another_video_stands_for_one_that_cannot_be_used(spoilt):
    dataset = ClipDataset(spoilt, frames=4, size=CLIP)
    n = ENTRIES + len(BROKEN)
    assert len(dataset) == n
    skipped: list[str] = []
    labels = []
    for clips, batch in take(3 * n // 3, dataset, 3, skipped=skipped):
        labels += batch.tolist()
        for clip, label in zip(clips, batch.tolist(), strict=True):
            check_clip(clip, label, 4)
    for at in range(0, 3 * n, n):
        assert set(labels[at : at + n]) == set(range(ENTRIES))
    # Each in its turn of three epochs, and perhaps as another one's substitute.
    counts = [sum(str(spoilt.parent / name) in text for text in skipped) for name in BROKEN]
    assert sum(counts) == len(skipped)
    assert all(count >= 3 for count in counts)
    assert all(len(text.splitlines()) == 1 for text in skipped)


def test_a_batch_depends_on_its_place_alone(spoilt):
    dataset = ClipDataset(spoilt, frames=2, size=CLIP)
    whole = take(8, dataset, 4, seed=4)
    assert same(whole[3:], take(5, dataset, 4, seed=4, start=3))
    halves = [take(8, dataset, 4, seed=4, part=(i, 2)) for i in range(2)]
    joined = [(torch.cat((a, b)), torch.cat((c, d))) for (a, c), (b, d) in zip(*halves, strict=True)]
    assert same(whole, joined)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 3 processes, got 4"):
        batches(dataset, 4, part=(0, 3))


def test_views_come_again(folder):
    dataset = ClipDataset(folder / "train.csv", frames=2, size=CLIP, views=3)
    views = [[dataset.view(i, epoch) for i in range(ENTRIES)] for epoch in range(7)]
    assert views[0] == views[3] == views[6]
    assert views[1] == views[4]
    assert len({tuple(v) for v in views[:3]}) == 3
    endless = ClipDataset(folder / "train.csv", frames=2, size=CLIP)
    assert [endless.view(i, 1) for i in range(ENTRIES)] == views[1]
    with pytest.raises(ValueError, match="views: expected at least 0, got -1"):
        ClipDataset(folder / "train.csv", frames=2, size=CLIP, views=-1)


@pytest.mark.parametrize("workers", [0, 2])
def test_extras_are_stacked(folder, workers):
    dataset = ClipDataset(folder / "train.csv", frames=2, size=CLIP)
    batch = next(batches(dataset, 3, workers=workers, extras=_start_and_sum))
    clips = batch.clips
    assert [int(clip.long().sum()) for clip in clips] == batch.extras[1].tolist()
    starts = [check_clip(clip, int(label), 2) for clip, label in zip(clips, batch.labels, strict=True)]
    assert starts == batch.extras[0].tolist()
    assert batch.seconds > 0


def _start_and_sum(path, view, clip):
    return torch.tensor(view.frames[0]), clip.long().sum()


def test_skipping_needs_no_list(spoilt):
    [(_, labels), _] = take(2, ClipDataset(spoilt, frames=4, size=CLIP), 3)
    assert set(labels.tolist()) <= set(range(ENTRIES))


@pytest.mark.parametrize("workers", [0, 2])
def test_one_usable_video_is_enough(folder, tmp_path, workers):
    lines = [f"{folder / 'video 2.mkv'} 2", *(f"missing {i}.mp4 99" for i in range(5))]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    dataset = ClipDataset(tmp_path / "list.txt", frames=2, size=CLIP)
    for seed in range(1 if workers else 6):
        for _, labels in take(8, dataset, 2, seed=seed, workers=workers):
            assert labels.tolist() == [2, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_usable_video(tmp_path, workers):
    (tmp_path / "list.txt").write_text("missing 0.mp4 1\nmissing 1.mp4 2\nmissing 2.mp4 3\n")
    dataset = ClipDataset(tmp_path / "list.txt", frames=2, size=CLIP)
    with pytest.raises(
        VideoError, match=r": none of 3 videos could be used; the last one: .*missing \d\.mp4"
    ) as caught:
        take(1, dataset, 2, workers=workers)
    assert len(str(caught.value).splitlines()) == 1


def test_a_program_that_leaves_its_workers_ends(folder):
    code = (
        "import sys; from vmae import ClipDataset, batches; "
        f"clips = batches(ClipDataset(sys.argv[1], frames=2, size={CLIP}), 1, workers=2); print(next(clips).labels)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "tensor([-1])\n"
    assert done.stderr == ""


def test_ctrl_c_is_not_for_the_workers(folder):
    """A terminal sends it to the whole group; the run decides when to stop, and may want clips until then.

    Nor is it for one that has only just been born: here the second worker is, when it comes.
    """
    code = f"""
import itertools, os, signal, sys, time
from vmae import ClipDataset, batches

births = []
os.register_at_fork(before=lambda: births.append(1), after_in_child=lambda: time.sleep(2 * len(births) - 2))
clips = batches(ClipDataset(sys.argv[1], frames=2, size={CLIP}), 1, workers=2)
next(clips)
signal.signal(signal.SIGINT, lambda *_: None)
os.killpg(0, signal.SIGINT)
print(len(list(itertools.islice(clips, 20))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "20\n"
    assert done.stderr == ""


@pytest.mark.parametrize("start", ["center", 5])
def test_fixed_starts_in_batches(folder, start):
    dataset = ClipDataset(folder / "train.csv", frames=4, size=CLIP, start=start)
    firsts = {
        check_clip(clip, int(label), 4) for batch in take(4, dataset, 3) for clip, label in zip(*batch, strict=True)
    }
    assert firsts == ({5} if start == 5 else {6})
