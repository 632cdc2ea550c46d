"""Registration of the operations with PyTorch, and the one place that decides which implementation runs."""

import os
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "vmae_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")


def require_implementation(operation: str) -> None:
    """Raise if VMAE_KERNELS forces an implementation that `operation` does not have.

    `auto` (the default) and `torch` run the reference; `triton` is refused until an operation has a Triton kernel.
    """
    choice = os.environ.get("VMAE_KERNELS", "auto")
    if choice not in ("auto", "triton", "torch"):
        raise ValueError(f"VMAE_KERNELS: expected auto, triton or torch, got {choice!r}")
    if choice == "triton":
        raise ValueError(f"VMAE_KERNELS=triton, but {operation} has no Triton kernel yet: expected auto or torch")


def register(
    schema: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    autocast: int = 0,
) -> None:
    """Define an opaque operation for CPU and CUDA; `fake` gives the shapes of its results.

    Under autocast the first `autocast` arguments are cast, the others never: without a rule of its own an operation
    can come out in one dtype eagerly and in another one compiled.
    """
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(name, _checked(name, implementation), device)
        _library.impl(name, _autocast_rule(name, device.lower(), autocast), f"Autocast{device}")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)


def register_composite(schema: str, implementation: Callable[..., Any]) -> None:
    """Define an operation made of PyTorch's own differentiable ones: autograd, autocast and fakes are theirs."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, _checked(name, implementation), "CompositeImplicitAutograd")


def register_factory(schema: str, implementation: Callable[..., Any], *, fake: Callable[..., Any]) -> None:
    """Define an opaque operation without tensors among its arguments: it makes some, on the device that it is given."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def _checked(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        require_implementation(name)
        return implementation(*args)

    return run


def _autocast_rule(name: str, device_type: str, cast: int) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            head = (x if x.dtype == torch.float64 else x.to(dtype) for x in args[:cast])
            return getattr(torch.ops.vmae_kernels, name)(*head, *args[cast:])

    return run
