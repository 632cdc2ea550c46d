"""Several processes that train one model, as `torchrun` starts them; a lone process needs none of this."""

import os
import sys
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class World(NamedTuple):
    """Which of how many processes this is."""

    rank: int
    size: int


def world() -> World:
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World(0, 1)


def start(device: torch.device) -> torch.device:
    """Join the other processes, if `torchrun` started this one; returns its own device."""
    if not dist.is_torchelastic_launched():
        return device
    if device.type == "cuda":
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise ValueError(f"nproc-per-node: expected at most one process for each of {count} GPUs, got {number + 1}")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes, for days if need be, unlike for what they do together."""
    if dist.is_initialized():
        dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(days=7)))


def say(text: str) -> None:
    """Tell the user, once."""
    if world().rank == 0:
        print(text, file=sys.stderr)


def total(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def mean(values: Iterable[float], device: torch.device) -> list[float]:
    """Each value's mean over all processes."""
    return (total(torch.tensor(list(values), dtype=torch.float64, device=device)) / world().size).tolist()


def average_gradients(model: nn.Module) -> None:
    """For a model that does without DistributedDataParallel, such as one whose gradients are differentiated again."""
    if dist.is_initialized():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = total(parameter.grad) / world().size


def parallel(model: nn.Module, engine: str, device: torch.device, *, unused: bool) -> Any:
    """What to call in the model's place, such that gradients are those of all processes' clips.

    `engine`: "ddp", every process holds the whole model; or "fsdp", parameters and optimizer state are spread over
    them. `unused`: some steps leave parameters without a gradient.
    """
    if not dist.is_initialized():
        return model
    if engine == "ddp":
        ids = [torch.cuda.current_device()] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            model, device_ids=ids, broadcast_buffers=False, find_unused_parameters=unused
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world().size,))
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(value: Tensor) -> Tensor:
    """A tensor on the CPU, gathered where it is spread over the processes: all of them must ask."""
    if dist.is_initialized():
        from torch.distributed.tensor import DTensor  # takes long, and only some runs need it

        value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().cpu()


def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be spread over the processes."""
    with torch.no_grad():
        if dist.is_initialized():
            from torch.distributed.tensor import DTensor, distribute_tensor

            if isinstance(target, DTensor):
                value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.copy_(value)
