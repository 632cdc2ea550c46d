"""Registration of the operations with PyTorch, and the one place that decides which implementation runs."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _csrc, _triton

# The name that this package was imported by, so that copies of it do not meet.
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")
ops = getattr(torch.ops, NAMESPACE)
_library = torch.library.Library(NAMESPACE, "DEF")


def chosen() -> str:
    """VMAE_KERNELS: auto, or what is forced: triton for operations that have a Triton kernel, csrc for those of the
    compiled extension, torch for all.

    Raises:
        ValueError: it is none of these.
    """
    choice = os.environ.get("VMAE_KERNELS", "auto")
    if choice not in ("auto", "triton", "csrc", "torch"):
        raise ValueError(f"VMAE_KERNELS: expected auto, triton, csrc or torch, got {choice!r}")
    return choice


def _by_kernel(operation: str, x: Tensor) -> bool:
    """Whether VMAE_KERNELS gives a call on tensors like x to the Triton kernel, rather than to the reference.

    Raises:
        ValueError: it asks for what cannot be.
    """
    choice = chosen()
    if choice == "torch" or (choice != "triton" and x.is_cpu):
        return False
    reason = _triton.why_not(x)
    if choice == "triton" and reason:
        raise ValueError(f"VMAE_KERNELS=triton: {operation} expected {reason}")
    return reason is None


def compiled(operation: str, why_not: Callable[[], str | None]) -> bool:
    """Whether VMAE_KERNELS gives a call to the compiled extension, unless there is a reason why not.

    Raises:
        ValueError: it asks for what cannot be.
    """
    choice = chosen()
    if choice == "torch":
        return False
    reason = why_not()
    if choice == "csrc" and reason:
        raise ValueError(f"VMAE_KERNELS=csrc: {operation} expected {reason}")
    return reason is None


_NEW = 1 << 25  # bytes: from here on glibc takes a tensor's memory from the system, and gives it back


def in_huge_pages(x: Tensor) -> Tensor:
    """x, of which nothing was written yet: the extension asks for memory that costs less to be written first."""
    if x.is_cpu and x.nbytes >= _NEW and chosen() != "torch" and not _csrc.missing():
        _csrc.ops.huge_pages(x)
    return x


def register(
    schema: str,
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    kernel: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] = lambda ctx, inputs, output: None,
    autocast: int = 0,
) -> None:
    """Define an opaque operation for CPU and CUDA; `fake` gives the shapes of its results.

    `kernel`, with the arguments of `reference`, launches the Triton kernel; VMAE_KERNELS chooses. Without one there is
    nothing to choose: the operation is what another one has chosen.

    Under autocast the first `autocast` arguments are cast, the others never: without a rule of its own an operation
    can come out in one dtype eagerly and in another one compiled.
    """
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(name, _dispatching(name, reference, kernel) if kernel else reference, device)
        _library.impl(name, _autocast_rule(name, device.lower(), autocast), f"Autocast{device}")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    if backward is not None:
        _library.impl(name, _differentiated(name, backward, setup_context), "Autograd")


def register_composite(schema: str, reference: Callable[..., Any], *, kernel: Callable[..., Any] | None = None) -> None:
    """Define an operation made of differentiable ones, PyTorch's or ours: autograd, autocast and fakes are theirs.

    One that is not for Triton to do has no `kernel`, and VMAE_KERNELS does not concern it.
    """
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    run = _dispatching(name, reference, kernel) if kernel else reference
    _library.impl(name, run, "CompositeImplicitAutograd")


def register_factory(schema: str, implementation: Callable[..., Any], *, fake: Callable[..., Any]) -> None:
    """Define an opaque operation without tensors among its arguments: it makes some, on the device that it is given."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def _dispatching(name: str, reference: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return (kernel if _by_kernel(name, args[0]) else reference)(*args)

    return run


def _differentiated(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> Callable[..., Any]:
    """What `torch.library.register_autograd` makes, in half of its time: a small call is mostly this."""
    operation = getattr(ops, name).default

    def below(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operation(*args)

    def forward(ctx: Any, *args: Any) -> Any:
        result = below(*args)
        setup_context(ctx, args, result)
        return result

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def run(*args: Any) -> Any:
        return function.apply(*args) if torch.is_grad_enabled() and torch._C._any_requires_grad(*args) else below(*args)

    return run


def _autocast_rule(name: str, device_type: str, cast: int) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            head = (x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in args[:cast])
            return getattr(ops, name)(*head, *args[cast:])

    return run
