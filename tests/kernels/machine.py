"""A plugin for pytest: Triton compiles for a GPU, and `ptx_machine` runs what it made, on CPU tensors.

VMAE_MACHINE names the architecture, 80 or 90.
"""

import os
from typing import Any

import numpy as np
import pytest
import torch
import triton
from hypothesis import settings
from ptx_machine import Machine
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver
from vmae_kernels import _triton
from vmae_kernels.resources import SHARED

ARCHITECTURE = int(os.environ.get("VMAE_MACHINE", "80"))
MACHINE = Machine()
launched: list[str] = []


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[ARCHITECTURE] * 1024, "multiprocessor_count": 1, "warpSize": 32}

    def load_binary(self, name: str, *_: Any) -> tuple:
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


class _Launcher:
    """What starts a compiled kernel: PTX lies beside the binary, in Triton's cache."""

    def __init__(self, source: Any, metadata: Any):
        self.kinds = list(source.signature.values())
        self.metadata = metadata
        file = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        with open(file) as text:
            self.ptx = text.read()

    def __call__(self, *everything: Any) -> None:
        grid, arguments = everything[:3], everything[9:]
        given, memory = [], {}
        for kind, value in zip(self.kinds, arguments, strict=True):
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                if value is None:
                    given.append(bytes(8))
                    continue
                given.append(int(value.data_ptr()).to_bytes(8, "little"))
                storage = value.untyped_storage()
                if storage.nbytes():
                    memory[storage.data_ptr()] = (storage.data_ptr(), bytes_of(storage), f"a tensor {list(value.shape)}")
            elif kind[0] == "i" or kind[0] == "u":
                size = max(int(kind[1:]) // 8, 1)
                given.append((int(value) & (2 ** (8 * size) - 1)).to_bytes(size, "little"))
            else:
                given.append(np.array(value, {"fp32": np.float32, "fp64": np.float64}[kind]).tobytes())
        given += [bytes(8), bytes(8)]  # scratch memory that no kernel here asks for
        launched.append(self.metadata.name)
        MACHINE.launch(self.ptx, grid, 32 * self.metadata.num_warps, given, list(memory.values()),
                       shared=self.metadata.shared, name=self.metadata.name)  # fmt: skip


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
