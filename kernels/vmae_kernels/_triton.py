"""Triton, where it is installed: it compiles kernels for CUDA, or interprets them on the CPU if TRITON_INTERPRET=1.

Kernels are defined in any case, so that a file reads the same; without Triton they cannot be launched.
"""

import contextlib
import importlib
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


class _Missing:
    """Stands where kernels name Triton's types."""

    constexpr = None


triton: Any = None
tl: Any = _Missing
with contextlib.suppress(ImportError):
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")

# Triton decides when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def jit(function: Any) -> Any:
    """`triton.jit`."""
    return function if triton is None else triton.jit(function)


def why_not(x: Tensor) -> str | None:
    """Why no kernel can run on the device of x, or None."""
    if triton is None:
        return "Triton, which is not installed"
    if not (x.is_cuda or (INTERPRETED and x.is_cpu)):
        return f"a CUDA tensor, or a CPU tensor with TRITON_INTERPRET=1, got one on {x.device.type}"
    return None


def on_device(x: Tensor) -> AbstractContextManager:
    """Launches inside are made on x's device, whichever is the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def architecture(x: Tensor) -> int:
    """Of the GPU that x is on, as in sm_90; where there is none, that one."""
    if not x.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def power_of_2(n: int) -> int:
    """The smallest one that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """x [B, N, D] as integers of its element's size, to be copied: [B, N, 2 D] where elements have 16 bytes."""
    if x.element_size() == 16:
        return torch.view_as_real(x).flatten(2).view(torch.int64)
    return x.view(_INTEGERS[x.element_size()])
