"""What this machine offers vmae: versions, processors, and what will run."""

import importlib.metadata
import os
import platform
import shutil
from typing import Any

import torch

from vmae.optimisation import native_bf16
from vmae_kernels import _csrc

PACKAGES = ("vmae", "torch", "triton", "av", "numpy", "einops", "safetensors", "huggingface_hub", "transformers")


def report() -> dict[str, Any]:
    """Facts by name, ready for json."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "ffmpeg": _ffmpeg(),
        "cpu": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "bf16": "native" if native_bf16() else "emulated: --precision auto is fp32",
        },
        "memory_gib": _memory_gib(),
        "free_disk_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "cuda": [
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
            for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
        "kernels": {
            "VMAE_KERNELS": os.environ.get("VMAE_KERNELS", "auto"),
            "CPU": "the extension's where it has one, else the PyTorch references",
            "CUDA": "the Triton kernels where Triton is installed, the extension's convolutions",
            "extension": _csrc.facts().get("missing") or _extension(_csrc.facts()),
        },
        "cuda_convolutions": [
            {
                "kernel": f"{kernel['kernel']} {kernel['math']} {' x '.join(map(str, kernel['tile'][:3]))}",
                **{name: kernel[name] for name in ("registers", "local_bytes", "shared_bytes", "blocks")},
            }
            for kernel in _csrc.occupancy()
        ],
    }
    return facts


def show(facts: dict[str, Any], indent: str = "") -> str:
    """The report for people."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", show(value, indent + "  ")]
        elif isinstance(value, list):
            described = "; ".join(", ".join(f"{k} {v}" for k, v in item.items()) for item in value)
            lines.append(f"{indent}{name:<16}  {described or 'none'}")
        else:
            lines.append(f"{indent}{name:<16}  {'not installed' if value is None else value}")
    return "\n".join(lines)


def _extension(facts: dict[str, Any]) -> str:
    cuda = f"CUDA {facts['cuda']} for {', '.join(facts['architectures'])}" if facts["cuda"] else "the CPU alone"
    cpu = "AMX for causal_conv3d, attention and the model's layers in bfloat16" if facts.get("amx") else "no AMX here"
    return f"built for {cuda}; {cpu}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ffmpeg() -> str | None:
    try:
        import av
    except ImportError:
        return None
    return getattr(av, "ffmpeg_version_info", None) or "libavcodec " + ".".join(
        map(str, av.library_versions["libavcodec"])
    )


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
