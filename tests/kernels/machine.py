"""A plugin for pytest: Triton compiles for a GPU, and `ptx_machine` runs what it made, on CPU tensors.

VMAE_MACHINE names the architecture: 80, 90, 100 or 120.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import settings
from ptx_machine import Machine
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver

from vmae_kernels import _triton
from vmae_kernels.resources import SHARED

ARCHITECTURE = int(os.environ.get("VMAE_MACHINE", "80"))
MACHINE = Machine()


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[ARCHITECTURE] * 1024, "multiprocessor_count": 1, "warpSize": 32}

    def load_binary(self, name: str, *_: Any) -> tuple:
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


class Launch(NamedTuple):
    kernel: str
    ptx: str
    run: Callable[[str], None]
    """Once more, with this code."""


launches: list[Launch] = []


class _Launcher:
    """What starts a compiled kernel: PTX lies beside the binary, in Triton's cache."""

    def __init__(self, source: Any, metadata: Any):
        self.kinds = list(source.signature.values())
        self.metadata = metadata
        file = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        self.ptx = Path(file).read_text()

    def __call__(self, *everything: Any) -> None:
        grid, values = everything[:3], everything[9:]
        given, memory = [], {}
        for kind, value in zip(self.kinds, values, strict=True):
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                given.append(int(0 if value is None else value.data_ptr()).to_bytes(8, "little"))
                if value is not None:
                    storage = value.untyped_storage()
                    memory[storage.data_ptr()] = storage.data_ptr(), bytes_of(storage), f"a tensor {list(value.shape)}"
            elif kind[0] in "iu":
                size = max(int(kind[1:]) // 8, 1)
                given.append((int(value) & (2 ** (8 * size) - 1)).to_bytes(size, "little"))
            else:
                given.append(np.array(value, {"fp32": np.float32, "fp64": np.float64}[kind]).tobytes())
        given += [bytes(8), bytes(8)]  # scratch memory, which no kernel here asks for
        name, threads, shared = self.metadata.name, 32 * self.metadata.num_warps, self.metadata.shared

        def run(ptx: str) -> None:
            MACHINE.launch(ptx, grid, threads, given, list(memory.values()), shared=shared, name=name)

        launches.append(Launch(name, self.ptx, run))
        run(self.ptx)


def bytes_of(storage: torch.UntypedStorage) -> np.ndarray:
    """A view of them."""
    return torch.tensor([], dtype=torch.uint8).set_(storage).numpy()


class _Driver:
    launcher_cls = _Launcher
    utils = _Utils()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(ARCHITECTURE, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


# The convolution has no Triton kernel; the others do not show which kernel the operation runs, or are of the choice.
OUTSIDE_ONLY = ("test_compiled_equals_eager", "test_symbolic_settings", "test_autocast", "test_forced_implementation")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left = [item for item in items if item.originalname in OUTSIDE_ONLY or "causal_conv3d" in item.name]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_configure() -> None:
    settings.register_profile("machine", max_examples=3, deadline=None)
    settings.load_profile("machine")
    install()


def install() -> None:
    driver.set_active(_Driver())
    _triton.why_not = lambda x: None
    _triton.architecture = lambda x: ARCHITECTURE


@pytest.fixture(autouse=True)
def poisoned():
    """What a kernel is to write holds NaN, or the largest integer, until it does."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills new memory, too
    yield
    torch.use_deterministic_algorithms(before)
