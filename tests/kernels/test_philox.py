"""Philox against Random123's known answers and against Python integers; normals against Box and Muller's formula."""

import math
import random

import pytest
import torch

from vmae_kernels.philox import normals, philox, random_keys, random_words

CPU = torch.device("cpu")


def naive(counter, key):
    """Philox4x32-10 as Salmon et al. (2011) print it, in unbounded integers."""
    c, k = list(counter), list(key)
    for round_ in range(10):
        if round_:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
    return tuple(c)


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


KNOWN = [
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    low, high = words(key)
    got = philox(tuple(torch.tensor(word) for word in words(counter)), low | high << 32)
    assert tuple(int(word) for word in got) == words(answer)
    assert naive(words(counter), words(key)) == words(answer)


def test_random_counters():
    draw = random.Random(0)
    edges = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    counters = [tuple(draw.choice([draw.getrandbits(32), *edges]) for _ in range(4)) for _ in range(500)]
    columns = tuple(torch.tensor(column) for column in zip(*counters, strict=True))
    for seed in (0, 1, 2**32, 2**63 - 1, draw.getrandbits(64)):
        got = philox(columns, seed)
        assert all(word.dtype == torch.int64 for word in got)
        key = (seed % 2**32, seed >> 32)
        assert list(zip(*(word.tolist() for word in got), strict=True)) == [naive(c, key) for c in counters]


def test_seed_modulo_2_64_and_broadcast():
    counter = (torch.arange(5)[None], torch.arange(3)[:, None], torch.tensor(7), torch.tensor(9))
    for seed in (-1, -(2**63), 2**63 - 1, 12345):
        a, b = philox(counter, seed), philox(counter, seed % 2**64)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    key = (2**32 - 1, 2**32 - 1)
    got = philox(counter, -1)
    for row in range(3):
        for element in range(5):
            assert tuple(int(word[row, element]) for word in got) == naive((element, row, 7, 9), key)


def test_random_words_key_each_element():
    seed = 0x0123456789ABCDEF
    got = random_words(3, 4, seed=seed, block=5, stream=2, device=CPU)
    for row in range(3):
        for element in range(4):
            wanted = naive((element, row, 5, 2), (seed % 2**32, seed >> 32))
            assert tuple(int(word[row, element]) for word in got) == wanted


def test_random_keys():
    keys = random_keys(4, 2000, seed=3, stream=1, device=CPU)
    assert keys.dtype == torch.float32
    assert keys.shape == (4, 2000)
    assert torch.equal(keys, keys.long().float())
    assert keys.min() >= 0
    assert keys.max() < 2**24
    assert abs(keys.mean().item() / 2**23 - 1) < 4 / math.sqrt(3 * keys.numel())
    other = random_keys(4, 2000, seed=3, stream=2, device=CPU)
    assert not torch.equal(keys, other)
    assert len({tuple(row) for row in keys.tolist()}) == 4


@pytest.mark.parametrize("seed", [0, -3, 2**40 + 17])
def test_box_muller(seed):
    rows, n, block = 2, 50, 3
    got = normals(rows, n, seed=seed, block=block, device=CPU)
    assert got.shape == (4, rows, n)
    assert got.dtype == torch.float32
    key = (seed % 2**32, (seed >> 32) % 2**32)
    for row in range(rows):
        for element in range(n):
            u = [word >> 8 for word in naive((element, row, block, 0), key)]
            for pair in (0, 1):
                radius = math.sqrt(-2 * math.log((u[2 * pair] + 1) / 2**24))
                angle = 2 * math.pi * u[2 * pair + 1] / 2**24
                wanted = (radius * math.cos(angle), radius * math.sin(angle))
                for i, value in enumerate(wanted):
                    assert abs(got[2 * pair + i, row, element].item() - value) < 1e-5


def test_normal_moments():
    x = normals(20, 10_000, seed=7, block=0, device=CPU).double().reshape(4, -1)
    count = x.shape[1]
    assert x.isfinite().all()
    for sample in x:
        # Moments of a standard normal: 0, 1, 0, 3, with variances 1, 2, 15, 96 per draw; five standard errors.
        for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs(sample.pow(power).mean().item() - mean) < 5 * math.sqrt(variance / count)
    off_diagonal = torch.corrcoef(x) - torch.eye(4, dtype=torch.float64)
    assert off_diagonal.abs().max() < 5 / math.sqrt(count)
    next_block = normals(20, 10_000, seed=7, block=1, device=CPU).double().reshape(4, -1)
    assert abs(torch.corrcoef(torch.stack((x[0], next_block[0])))[0, 1].item()) < 5 / math.sqrt(count)
