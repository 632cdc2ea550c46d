"""VMAE_AUTOTUNE=1: what a search finds, where it is kept, and what is done without it."""

import json
import math
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from vmae_kernels import _tuning

RULE = {"BLOCK": 64, "ONE": False, "num_warps": 4}
LIMITS = {"BLOCK": (16, 512), "num_warps": (1, 8)}
X = torch.zeros(3)


def test_neighbours():
    found = list(_tuning.neighbours(RULE | {"num_warps": 8}, LIMITS))
    assert [(c["BLOCK"], c["num_warps"]) for c in found] == [(128, 8), (32, 8), (64, 4)]
    assert all(c["ONE"] is False for c in found)


@pytest.mark.parametrize("block", [16, 64, 512])
@pytest.mark.parametrize("warps", [1, 8])
def test_a_search_ends_at_the_fastest(block, warps):
    """Of a function with one valley, whose bottom may lie at the limits."""
    asked = []

    def seconds(configuration):
        asked.append((configuration["BLOCK"], configuration["num_warps"]))
        assert all(low <= configuration[name] <= high for name, (low, high) in LIMITS.items())
        distance = abs(math.log2(configuration["BLOCK"] / block)) + abs(math.log2(configuration["num_warps"] / warps))
        return 1 + distance

    assert _tuning.search(RULE, LIMITS, seconds) == {"BLOCK": block, "ONE": False, "num_warps": warps}
    assert len(asked) == len(set(asked))


def test_what_is_hardly_faster_or_cannot_run_is_not_taken():
    assert _tuning.search(RULE, LIMITS, lambda c: 1.0 - 0.01 * (c["BLOCK"] > 64)) == RULE
    assert _tuning.search(RULE, LIMITS, lambda c: 1.0 if c == RULE else math.inf) == RULE
    wanted = RULE | {"num_warps": 8}
    assert _tuning.search(RULE, LIMITS, lambda c: math.inf if c["num_warps"] < 8 else 1.0) == wanted


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of what is kept; nothing is yet, here or in memory."""
    monkeypatch.setenv("VMAE_AUTOTUNE", "1")
    monkeypatch.setenv("VMAE_AUTOTUNE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(_tuning, "_found", {})
    monkeypatch.setattr(_tuning, "_duration", lambda run, configuration, on_gpu: 1 / configuration["BLOCK"])
    return tmp_path / "kept"


def launched(kind=(3, "D5"), like=X):
    """The configuration that a launch is made with."""
    runs = []
    _tuning.launch("kernel", like, kind, RULE, LIMITS, runs.append)
    (configuration,) = runs
    return configuration


def test_without_it_the_rule_holds(kept, monkeypatch):
    for value in (None, "0"):
        monkeypatch.delenv("VMAE_AUTOTUNE") if value is None else monkeypatch.setenv("VMAE_AUTOTUNE", value)
        assert launched() == RULE
    assert not kept.exists()


def files(kept):
    return sorted(path for path in kept.rglob("*") if path.is_file())


def test_what_is_found_is_kept_for_calls_of_its_kind(kept, monkeypatch):
    best = RULE | {"BLOCK": 512}
    assert launched() == best
    (file,) = files(kept)
    assert file.name == "kernel-float32-4-D5.json"
    assert json.loads(file.read_text()) == best
    searches = []
    monkeypatch.setattr(_tuning, "search", lambda rule, limits, seconds: searches.append(rule) or rule)
    assert launched((4, "D5")) == best  # as many, up to the next power of 2
    monkeypatch.setattr(_tuning, "_found", {})
    assert launched() == best  # from the file
    assert not searches
    for other in ({"kind": (5, "D5")}, {"kind": (3, "D6")}, {"like": X.half()}):
        assert launched(**other) == RULE
    assert len(searches) == 3
    assert len(files(kept)) == 4


def test_a_rule_beyond_the_limits_is_kept_too(kept, monkeypatch):
    """As where rows are shorter than any block that a search would try."""
    rule, searches = RULE | {"BLOCK": 8, "num_warps": 1}, []
    monkeypatch.setattr(_tuning, "search", lambda rule, limits, seconds: searches.append(rule) or rule)
    for _ in range(2):
        monkeypatch.setattr(_tuning, "_found", {})
        _tuning.launch("kernel", X, (3,), rule, LIMITS, lambda configuration: None)
    assert len(searches) == 1


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "7", '{"BLOCK": 512}', '{"BLOCK": 1024, "ONE": false, "num_warps": 4}',
     '{"BLOCK": 96, "ONE": false, "num_warps": 4}', '{"BLOCK": 64, "ONE": true, "num_warps": 4}'],
)  # fmt: skip
def test_a_damaged_file_is_made_anew(kept, damage, monkeypatch):
    best = launched()
    (file,) = files(kept)
    file.write_text(damage)
    monkeypatch.setattr(_tuning, "_found", {})
    assert launched() == best
    assert json.loads(file.read_text()) == best


@pytest.mark.filterwarnings("default::UserWarning:vmae_kernels")
def test_where_nothing_can_be_kept_it_is_said(kept):
    kept.write_text("a file, where a folder is to be")
    with pytest.warns(UserWarning, match=r"kept.*what VMAE_AUTOTUNE=1 has found cannot be kept"):
        assert launched() == RULE | {"BLOCK": 512}


@pytest.mark.filterwarnings("default::UserWarning:vmae_kernels")
def test_without_a_home_it_is_said(kept, monkeypatch):
    monkeypatch.delenv("VMAE_AUTOTUNE_DIR")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.warns(UserWarning, match="no home directory; VMAE_AUTOTUNE_DIR"):
        assert launched() == RULE | {"BLOCK": 512}
    assert not Path("~").exists()


def test_threads_keep_whole_files(kept):
    """And search once."""
    searches = []
    threads = [threading.Thread(target=lambda i=i: searches.append(launched((i % 5 * 100 + 1,)))) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(searches) == 40
    assert len(files(kept)) == len({1, 128, 256, 512}) == len([json.loads(file.read_text()) for file in files(kept)])


def test_what_was_found_for_other_tensors_may_not_fit(kept):
    """Alignment decides how much shared memory a configuration takes: the rule's runs then."""
    from triton.runtime.errors import OutOfResources

    runs = []

    def run(configuration):
        runs.append(configuration)
        if configuration != RULE:
            raise OutOfResources(300, 200, "shared memory")

    assert launched() != RULE
    _tuning.launch("kernel", X, (3, "D5"), RULE, LIMITS, run)
    assert runs[-1] == RULE


def test_the_time_of_a_launch():
    """On a CPU, where only Triton's interpreter launches; what a GPU has not got is no error."""
    from triton.runtime.errors import OutOfResources

    assert 0 <= _tuning._duration(lambda configuration: None, RULE, False) < 1

    def too_large(configuration):
        raise OutOfResources(300, 200, "shared memory")

    assert _tuning._duration(too_large, RULE, False) == math.inf
    with pytest.raises(ZeroDivisionError):
        _tuning._duration(lambda configuration: 1 / 0, RULE, False)
