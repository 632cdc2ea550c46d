"""The compiled extension, where it was built: csrc/ of the repository, in PyTorch's stable ABI."""

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).with_name("libvmae_csrc.so")
ops = torch.ops.vmae_csrc
OPERATIONS = ("convolve", "input_gradient", "weight_gradient", "attention", "attention_backward", "linear",
              "linear_input_gradient", "linear_gelu_gradient", "linear_weight_gradient", "layer_norm",
              "layer_norm_backward", "topk", "topk_mask", "random_bits", "gather", "huge_pages")  # fmt: skip


@functools.cache
def _problem() -> str | None:
    """Why the extension is not there, or None."""
    if not hasattr(ops, "facts"):  # else another copy of this package has loaded its own
        if not LIBRARY.exists():
            return "the compiled extension, which was not built (VMAE_BUILD=force pip install says why)"
        try:
            torch.ops.load_library(LIBRARY)
        except OSError as error:
            return f"the compiled extension, which could not be loaded: {error}"
    absent = [name for name in OPERATIONS if not hasattr(ops, name)]
    return f"the compiled extension of this version, found an older one without {', '.join(absent)}" if absent else None


@functools.cache
def facts() -> dict[str, Any]:
    """What the extension was built with and for, and what it offers here; `missing` says why there is none."""
    problem = _problem()
    return {"missing": problem} if problem else json.loads(ops.facts())


def missing() -> str | None:
    return facts().get("missing")


def without_amx() -> str | None:
    """What its operations for CPUs with Intel AMX lack here, or None."""
    return missing() or (None if facts()["amx"] else "a processor with Intel AMX")


def occupancy() -> list[dict[str, Any]]:
    """The compiled kernels on the current CUDA device: tile, registers, memory and blocks of a multiprocessor.

    Empty where the optional module that tells was not built, or there is no CUDA device.
    """
    try:
        module = importlib.import_module("._csrc_occupancy", __package__)
    except ImportError:
        return []
    return module.occupancy(str(LIBRARY)) if torch.cuda.is_available() and facts().get("cuda") else []
