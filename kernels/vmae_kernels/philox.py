"""Counter-based random numbers: Philox4x32-10 in integer arithmetic, the same bits on every device.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3.
"""

import math

import torch
from torch import Tensor

from . import _csrc
from ._library import compiled, ops, register_factory

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# The last counter word keeps the uses of one seed apart.
STREAM_NOISE, STREAM_TUBE, STREAM_RANDOM, STREAM_PROBE, STREAM_NUISANCE, STREAM_CELL = 0, 1, 2, 3, 4, 5


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits per counter.

    `counter`: four int64 tensors of one shape (or broadcastable) with values in [0, 2^32); `seed`: an integer, taken
    modulo 2^64. Returns four int64 tensors with values in [0, 2^32).
    """
    a, b, c, d = counter
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        # A product of two 32-bit words wraps in int64 but keeps all 64 bits. Only a and c are multiplied, so only
        # theirs are cut to 32 bits here, which also undoes the sign extension.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = ((second >> 32) ^ b).bitwise_xor_(key0).bitwise_and_(_MASK)
        c = ((first >> 32) ^ d).bitwise_xor_(key1).bitwise_and_(_MASK)
        b, d = second, first
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return a, b & _MASK, c, d & _MASK


def _words(
    rows: int, n: int, blocks: range, seed: int, stream: int, row: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words per element of [blocks, rows, n]."""
    element = torch.arange(n, device=device)
    number = torch.arange(row, row + rows, device=device)[:, None]
    block = torch.arange(blocks.start, blocks.stop, device=device)[:, None, None]
    # Of these sizes for as long as they can be: two of the rounds cost next to nothing.
    return philox((element, number, block, torch.full((), stream, device=device)), seed)


def _random_words(
    rows: int, n: int, key0: int, key1: int, block: int, stream: int, row: int, device: torch.device
) -> tuple[Tensor, ...]:
    words = _words(rows, n, range(block, block + 1), key0 | key1 << 32, stream, row, device)
    return tuple(word[0].clone() for word in words)


def _fake_words(
    rows: int, n: int, key0: int, key1: int, block: int, stream: int, row: int, device: torch.device
) -> tuple[Tensor, ...]:
    return tuple(torch.empty(rows, n, dtype=torch.int64, device=device) for _ in range(4))


# Opaque, because compilers make wrong code of it: for a seed that is a variable Inductor has taken words for floats.
register_factory(
    "random_words(SymInt rows, SymInt n, SymInt key0, SymInt key1, int block, int stream, SymInt row, Device device)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _random_words,
    fake=_fake_words,
)


def random_words(
    rows: int, n: int, *, seed: int, block: int, stream: int, device: torch.device, row: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words per element of [rows, n], keyed by (element, row, block, stream) and `seed`; rows count from `row`."""
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    return ops.random_words(rows, n, key0, key1, block, stream, row, device)


def random_keys(rows: int, n: int, *, seed: int, stream: int, device: torch.device, row: int = 0) -> Tensor:
    """[rows, n] float32 holding uniform integers of 24 bits, exactly: keys for a random selection by `topk`."""
    return (random_words(rows, n, seed=seed, block=0, stream=stream, device=device, row=row)[0] >> 8).float()


def normals(
    rows: int, n: int, *, seed: int, block: int, device: torch.device, stream: int = STREAM_NOISE, row: int = 0
) -> Tensor:
    """[4, rows, n] float32 standard normals (Box-Muller): samples 4 * block to 4 * block + 3 of every element."""
    return _box_muller(
        _upper_bits(random_words(rows, n, seed=seed, block=block, stream=stream, device=device, row=row))
    )


def normals_of_blocks(rows: int, n: int, *, seed: int, blocks: range, device: torch.device, row: int) -> Tensor:
    """`normals` of consecutive blocks, one behind the other: [4 * blocks, rows, n]; seed: of 64 bits, signed. Not for
    what torch.compile sees."""
    if device.type == "cpu" and compiled("soft_topk", _csrc.missing):
        bits = torch.empty(4, len(blocks), rows, n)
        _csrc.ops.random_bits(bits, seed, STREAM_NOISE, blocks.start, row)
    else:
        bits = _upper_bits(_words(rows, n, blocks, seed, STREAM_NOISE, row, device))
    return _box_muller(bits).transpose(0, 1).flatten(0, 1)


def _upper_bits(words: tuple[Tensor, ...]) -> Tensor:
    """24 bits, which fill a float32 exactly."""
    return torch.stack([(word >> 8).float() for word in words])


def _box_muller(bits: Tensor) -> Tensor:
    """[4, ...] of 24 bits, which are overwritten."""
    radius = bits[0::2].add_(1).mul_(2.0**-24).log_().mul_(-2).sqrt_()  # of a number in (0, 1]
    angle = bits[1::2].mul_(2 * math.pi * 2.0**-24)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), 1).flatten(0, 1)
