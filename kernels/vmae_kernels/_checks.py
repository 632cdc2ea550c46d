"""Argument checks shared by the public operations: each error names the value received and the value expected."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def sizes(name: str, x: Tensor, letters: str, **known: int) -> tuple[int, ...]:
    """The sizes of `x`, whose dimensions are named by `letters` ("B N D"); those in `known` must match."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor [{', '.join(letters.split())}], got {type(x).__name__}")
    names, shape = letters.split(), tuple(x.shape)
    if len(shape) != len(names):
        raise ValueError(f"{name}: expected shape [{', '.join(names)}], got {list(shape)}")
    for letter, size in known.items():
        if shape[names.index(letter)] != size:
            wanted = f"[{', '.join(names)}] with {letter} = {size}"
            raise ValueError(f"{name}: expected shape {wanted}, got {list(shape)}")
    return shape


def dtype_in(name: str, x: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if x.dtype not in allowed:
        expected = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name}: expected dtype {expected}, got {str(x.dtype).removeprefix('torch.')}")


def same_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {x.dtype}")


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {x.device}")


def count(name: str, value: int, low: int, high: int | None = None, why: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: expected {bounds}{f' ({why})' if why else ''}, got {value}")
