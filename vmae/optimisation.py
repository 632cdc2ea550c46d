"""How the models are optimised: AdamW, its settings, and where and in which precision it all runs."""

import functools
import math
import platform
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class Optimisation:
    """AdamW with linear warm-up and cosine decay."""

    steps: int = 10_000
    batch_size: int = 1
    """Clips per forward pass, of all processes together."""
    accumulate: int = 1
    """Forward passes per step."""
    lr: float = 3e-4
    """Peak learning rate."""
    warmup: int = 500
    """Steps of linear warm-up; at most a tenth of all steps."""
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    precision: Precision = "auto"
    """auto is bf16, but fp32 on CPUs that only emulate bf16."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes (torchrun) share the work: each with the whole model, or with a part of it."""
    save_every: int = 500
    """Steps between checkpoints; there is always one at the end."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def check(self) -> None:
        """Raise `ValueError` for a setting out of range."""
        for name in ("steps", "batch_size", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number from 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number from 0 to below 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed: expected an integer from 0 to 2^31 - 1, got {self.seed}")


def device_of(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected cuda to be available, this PyTorch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    # Without the cache of the weights' casts: each is used once, and all would stay until the forward pass ends.
    enabled = precision_of(precision, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def precision_of(name: str, device: torch.device) -> Literal["bf16", "fp32"]:
    """What "auto" means there: bf16, but fp32 on CPUs that only emulate it, which takes many times as long."""
    if name not in get_args(Precision):
        raise ValueError(f"precision: expected one of {', '.join(get_args(Precision))}, got {name!r}")
    if name == "auto":
        return "fp32" if device.type == "cpu" and not native_bf16() else "bf16"
    return "bf16" if name == "bf16" else "fp32"


@functools.cache
def native_bf16() -> bool:
    """Whether matrix products in bfloat16 are the processor's own (AVX-512 BF16, AMX or Arm's)."""
    # PyTorch has no public question for it.
    if platform.machine() in ("arm64", "aarch64"):
        known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return bool(known and known())
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(test() for test in tests if test)


def learning_rate(step: int, options: Optimisation) -> float:
    """Of step 0 to steps - 1: a linear rise to the peak, then half a cosine down to a hundredth of it."""
    warmup = min(options.warmup, options.steps // 10)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / max(options.steps - warmup, 1)
    return options.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def adamw(model: nn.Module, options: Optimisation) -> torch.optim.AdamW:
    """Weight decay for matrices and kernels, none for the rest."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, options: Optimisation) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, options)
