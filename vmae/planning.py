"""Whether a pretraining step fits, before there is a GPU: its memory, arithmetic and time, without doing it.

The step itself runs, on tensors that have shapes but no numbers. What it allocates and frees is written down, so the
prediction follows the code, and nothing here repeats it.
"""

import functools
import itertools
import math
import os
import re
import textwrap
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from vmae.mae import LayerNorm, Linear, VideoMAE
from vmae.masking import decoder_budget, visible_places
from vmae.step import PARTS, Step, inputs, optimizer_of, run
from vmae.tokens import TUBELET
from vmae_kernels import attention

GIB = 2**30
GATHERS = {"gather_tokens", "decoder_tokens", "tubelets", "gather", "index_select", "index"}  # read what they return
BLOCK = 512  # bytes that PyTorch's CUDA allocator rounds to
MARGIN = 0.1  # of a step: what an allocator loses between its blocks, and this prediction may miss
FIXED = 1 * GIB  # what Python, PyTorch, CUDA and their workspaces take before the first tensor
LONGEST, LARGEST = 1 << 20, 1 << 12  # frames and clips that a search ends at


class Device(NamedTuple):
    """What a step can be done on: the most that it computes and moves in a second."""

    name: str
    cuda: bool
    bf16: float
    """FLOP/s of matrix products."""
    fp32: float
    bandwidth: float
    """Bytes/s, of its memory."""
    memory: float
    """Bytes."""
    attention: float
    """FLOP/s of attention as a share of that of matrix products."""
    call: float
    """Seconds that starting an operation takes."""
    source: str


def _datasheet(name: str, bf16: float, fp32: float, terabytes: float, gigabytes: float) -> Device:
    """TFLOP/s without sparsity, TB/s and GB; four fifths and nine tenths of what is printed is reached in practice."""
    said = "80 % of its datasheet's arithmetic, 90 % of its bandwidth, attention at half the speed: assumed"
    return Device(name, True, 0.8e12 * bf16, 0.8e12 * fp32, 0.9e12 * terabytes, 1e9 * gigabytes, 0.5, 8e-6, said)


DEVICES = {
    "a100": _datasheet("A100", 312, 19.5, 2.04, 80),
    "h100": _datasheet("H100", 989, 67, 3.35, 80),
    "h200": Device(
        "H200", True, 790e12, 54e12, 4.3e12, 141e9, 0.5, 8e-6, "bf16 products and copies measured on one, else assumed"
    ),
    "b200": _datasheet("B200", 2250, 80, 8.0, 180),
    "l40s": _datasheet("L40S", 362, 91.6, 0.864, 48),
    "rtx4090": _datasheet("RTX 4090", 165, 82.6, 1.008, 24),
}


@functools.cache
def this_device() -> Device:
    """The machine's GPU, or else its CPU, from a second of measuring."""
    cuda = torch.cuda.is_available()
    where = "cuda" if cuda else "cpu"

    def best(work: Callable[[], Any]) -> float:
        times: list[float] = []
        end = time.perf_counter() + 0.15
        while len(times) < 3 or (time.perf_counter() < end and len(times) < 100):
            begin = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times)

    def product(dtype: torch.dtype, n: int) -> float:
        a = torch.randn(n, n, device=where).to(dtype)  # not ones: processors are faster on what does not change
        return 2 * n**3 / best(lambda: a @ a)

    small, large = (8192, 8192) if cuda else (256, 2048)
    fp32, bf16 = product(torch.float32, large), product(torch.bfloat16, small)
    if not cuda and bf16 > fp32 / 4:  # else it is emulated, and that slowly
        bf16 = product(torch.bfloat16, large)
    dtype = torch.bfloat16 if bf16 > fp32 else torch.float32
    q = torch.randn(1, 12, 4096 if cuda else 1536, 64, device=where).to(dtype)
    attended = 4 * q.numel() * q.shape[2] / best(lambda: attention(q, q, q)) / max(bf16, fp32)
    x = torch.ones(1 << (28 if cuda else 24), device=where)
    y = torch.empty_like(x)
    bandwidth = 2 * x.nbytes / best(lambda: y.copy_(x))
    one = torch.ones(1, device=where)
    call = best(lambda: [one + 1 for _ in range(1000)]) / 1000
    name = torch.cuda.get_device_name() if cuda else "this machine's CPU"
    memory = torch.cuda.mem_get_info()[1] if cuda else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(name, cuda, bf16, fp32, bandwidth, memory, min(attended, 1.0), call, "measured just now")


_aten = torch.ops.aten
FLOPS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    ),
}
"""Arithmetic of operations that torch.utils.flop_counter does not know: PyTorch's attention on CPUs."""


class Work(NamedTuple):
    """What a call of an operation has to do at least."""

    part: str
    operation: str
    dtype: torch.dtype
    flops: int
    bytes: int
    """Read and written."""


class Recorder(TorchDispatchMode):
    """Writes down every call of an operation, and every tensor's memory as it comes and goes."""

    def __init__(self):
        super().__init__()
        self.part = ""
        self.work: list[Work] = []
        self.memory: list[tuple[int, int]] = []  # (number of the tensor's storage, bytes that came or went)
        self.labels: list[str] = []  # of storages, by number
        self._numbers: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:  # a question, and asked often
            return out
        given, made = ([x for x in tree_leaves(some) if isinstance(x, Tensor)] for some in ((args, kwargs), out))
        # Casts of weights are kept until autocast ends.
        cast = func is _aten._to_copy.default and self._number(given[0], "weights") is not None
        for x in made:
            self.see(x, "weights as bf16" if cast else self.part)
        if not any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments):  # no view
            dtype = made[0].dtype if made else torch.float32
            name = func._overloadpacket.__name__
            most = sum(x.numel() for x in made) if name in GATHERS else math.inf
            moved = sum(min(x.numel(), most) * x.element_size() for x in given) + sum(x.nbytes for x in made)
            self.work.append(Work(self.part, name, dtype, flops_of(func, args, kwargs, out), int(moved)))
        return out

    def see(self, x: Tensor, label: str) -> None:
        """Count a tensor's memory, if it is new, until it is freed."""
        storage = x.untyped_storage()
        if storage in self._numbers:
            return
        number, size = len(self.labels), -(-storage.nbytes() // BLOCK) * BLOCK
        self._numbers[storage] = number
        self.labels.append(label)
        self.memory.append((number, size))
        weakref.finalize(storage, self.memory.append, (number, -size))

    def relabel(self, x: Tensor, label: str) -> None:
        self.labels[self._numbers[x.untyped_storage()]] = label

    def _number(self, x: Tensor, label: str) -> int | None:
        number = self._numbers.get(x.untyped_storage())
        return number if number is not None and self.labels[number] == label else None


def flops_of(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    packet = func._overloadpacket
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    return FLOPS[packet](*args, **kwargs) if packet in FLOPS else 0


@dataclass(frozen=True)
class Costs:
    """What one step takes."""

    memory: dict[str, int]
    """Bytes at the peak, by what they are for."""
    idle: int
    """Bytes between steps: weights, optimizer, inputs."""
    part: str
    """When the peak is."""
    work: tuple[Work, ...]

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    def flops(self) -> dict[str, int]:
        """By part of the step."""
        total: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
        for work in self.work:
            total[work.part] += work.flops
        return dict(total)

    def seconds(self, device: Device) -> float:
        """With perfect kernels: every operation as fast as arithmetic or memory allow, one after the other."""
        total = 0.0
        for work in self.work:
            rate = device.bf16 if work.dtype == torch.bfloat16 else device.fp32
            rate *= device.attention if "attention" in work.operation else 1
            total += max(work.flops / rate, work.bytes / device.bandwidth, device.call)
        return total


def costs(step: Step, *, cuda: bool = True) -> Costs:
    """What a pretraining step takes on a GPU, or on a CPU.

    Raises:
        ValueError: no model can do such a step.
    """
    with torch.device("meta"):
        model = VideoMAE(step.config()).train()
    model.checkpointing = step.checkpointing
    recorder = Recorder()
    with FakeTensorMode():
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype)))
            for name, b in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(b.shape, dtype=b.dtype))
            if cuda and isinstance(module, (Linear, LayerNorm)):  # our own are for CPUs, and cast no weight, nor a norm
                module.__class__ = type(module).__bases__[0]
        optimizer = optimizer_of(model)
        clip, tokens = inputs(step)
        for x in (*model.parameters(), *model.buffers()):
            recorder.see(x, "weights")
        for x in tree_leaves([*optimizer.state.values()]):
            recorder.see(x, "optimizer")
        for x in (clip, *tokens[:3]):
            recorder.see(x, "inputs")
        idle, begin = sum(size for _, size in recorder.memory), len(recorder.memory)
        parts = {}  # of what was written down since

        def mark(part: str) -> None:
            recorder.part = part
            parts[len(recorder.memory)] = part
            if part == "optimizer":
                for p in model.parameters():
                    if p.grad is not None:
                        recorder.relabel(p.grad, "gradients")

        with recorder:
            run(model, optimizer, clip, tokens, step.precision, mark)
    return _at_peak(recorder, begin, idle, parts)


NAMES = {
    "weights": "weights and positions",
    "optimizer": "optimizer",
    "inputs": "clips and tokens",
    "gradients": "gradients",
    "weights as bf16": "weights as bf16",
    "embedding": "embedding's activations",
    "encoder": "encoder's activations",
    "decoder": "decoder's activations",
    "loss": "decoder's activations",
    "backward": "the backward's own",
    "": "the backward's own",
}


def _at_peak(recorder: Recorder, begin: int, idle: int, parts: dict[int, str]) -> Costs:
    now, peak, at = 0, 0, 0
    for i, (_, size) in enumerate(recorder.memory):
        now += size
        if i >= begin and now > peak:
            peak, at = now, i
    alive: dict[int, int] = {}
    for number, size in recorder.memory[: at + 1]:
        alive[number] = alive.get(number, 0) + size
    memory: Counter[str] = Counter()
    for number, size in alive.items():
        memory[NAMES.get(recorder.labels[number], recorder.labels[number])] += size
    order = list(dict.fromkeys(NAMES.values()))
    found = {name: memory[name] for name in order if memory[name]}
    return Costs(found, idle, parts[max(i for i in parts if i <= at)], tuple(recorder.work))


@dataclass(frozen=True)
class Plan:
    """What is predicted of a step on a device."""

    step: Step
    device: Device
    memory: float
    """Bytes that there are."""
    costs: Costs
    frames: int
    """The most per clip that fit, with everything else as it is; 0 if not even two do."""
    batch: int
    """The most clips that fit."""

    @property
    def needed(self) -> float:
        return needed(self.costs)

    @property
    def seconds(self) -> float:
        """With perfect kernels."""
        return self.costs.seconds(self.device)


def needed(costs: Costs) -> float:
    """Bytes that a device must have."""
    return FIXED + costs.peak + MARGIN * (costs.peak - costs.idle)


def plan(step: Step, device: Device, memory: float | None = None) -> Plan:
    """Predict a step, and the largest that fit into `memory` bytes, by default the device's.

    Raises:
        ValueError: no model can do such a step.
    """
    room = device.memory if memory is None else memory
    known: dict[Step, Costs] = {}

    def of(step: Step) -> Costs:
        if step not in known:
            known[step] = costs(step, cuda=device.cuda)
        return known[step]

    this = of(step)

    def largest(field: str, unit: int, limit: int) -> int:
        def changed(n: int) -> Step:
            new: Any = {field: unit * n}
            return replace(step, **new)

        least = 1
        while not _possible(changed(least)):  # clips so short that nothing would be decoded
            least += 1
        found = _largest(
            lambda n: needed(of(changed(n))) if n >= least else 0.0, room, getattr(step, field) // unit, limit // unit
        )
        return unit * found if found >= least else 0

    return Plan(step, device, room, this, largest("frames", TUBELET[0], LONGEST), largest("batch", 1, LARGEST))


def _possible(step: Step) -> bool:
    try:
        step.config()
    except ValueError:
        return False
    return True


def _largest(need: Callable[[int], float], room: float, start: int, limit: int) -> int:
    """The largest n up to a limit, or 0, with need(n) <= room, where need rises, along a line nearly.

    Guesses where a line through two known numbers meets `room`, or just behind; every third turn halves what is left.
    """
    low, high = 0, limit + 1  # low fits, high does not
    known: dict[int, float] = {}
    n = min(start, limit)
    for turn in itertools.count():
        known[n] = need(n)
        low, high = (n, high) if known[n] <= room else (low, n)
        if high - low <= 1:
            return low
        if low not in known:
            n = high // 2
        elif high not in known:
            before = max((i for i in known if i < low), default=low // 2)
            slope = (known[low] - known.get(before, 0)) / (low - before)
            n = max(low + int((room - known[low]) / slope) + 1 if slope else high, low + low // 4 + 1)
        else:
            n = low + int((high - low) * (room - known[low]) / (known[high] - known[low])) + turn % 3
            n = (low + high) // 2 if turn % 3 == 2 else n
        n = min(max(n, low + 1), high - 1)
    raise AssertionError


def parse_memory(text: str) -> float:
    """Bytes of what people write: 80GB, 24 GiB, 512MiB.

    Raises:
        ValueError: it is no amount of memory.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"memory: expected an amount like 80GB or 24GiB, got {text!r}")
    return float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1)


def table(plan: Plan) -> str:
    """A plan for people."""
    step, costs, device, config = plan.step, plan.costs, plan.device, plan.step.config()
    grid = step.grid
    visible = grid[0] * visible_places(grid[1] * grid[2], config.mask_ratio)
    decoded = step.tokens - visible
    if config.strategy != "none":
        decoded = decoder_budget(step.tokens, budget=config.budget, random=config.random).total
    lines = [
        f"{step.model}, {step.batch} x {step.frames:,} frames of {step.size} x {step.size}, {step.precision}"
        f"{', checkpointing' if step.checkpointing else ''}: {step.tokens:,} tokens a clip, of which the encoder sees "
        f"{visible:,} and the decoder reconstructs {decoded:,}",
        "",
        f"Memory at its peak, in the {costs.part}",
        *(f"  {name:<26}{size / GIB:9.2f} GiB" for name, size in costs.memory.items()),
        f"  {'together':<26}{costs.peak / GIB:9.2f} GiB, {(costs.peak - costs.idle) / GIB:.2f} more than between steps",
        "",
    ]
    fits = "fits" if plan.needed <= plan.memory else "does NOT fit"
    flops = costs.flops()
    lines += [
        f"With {FIXED / GIB:.0f} GiB for Python and libraries and {MARGIN:.0%} of the step as a margin: "
        f"{plan.needed / GIB:.2f} GiB, which {fits} into {plan.memory / GIB:.1f} GiB",
        f"  the longest clips that do: {plan.frames:,} frames" if plan.frames else "  no clip is short enough",
        f"  the most clips of this length that do: {plan.batch:,}",
        "",
        f"Arithmetic of a step: {sum(flops.values()) / 1e12:.3g} TFLOP "
        f"({', '.join(f'{part} {n / 1e12:.3g}' for part, n in flops.items() if n > sum(flops.values()) / 500)})",
        f"Time of a step on {device.name}: {plan.seconds:.3g} s if every kernel were perfect, that is "
        f"{step.batch / plan.seconds:.3g} clips/s",
        "",
        "How sure: the memory is what the step's own code asks for; on CPUs it was measured to be so within 10 %, and "
        "is not yet measured on a GPU.",
        f"The time is from what the device computes and moves at best ({device.source}): on a CPU steps took 0.9 to "
        "1.6 times as long; on a GPU, where it is not yet measured, expect more.",
    ]
    return "\n".join(textwrap.fill(line, 80) for line in lines)


def facts(plan: Plan) -> dict[str, Any]:
    """A plan for programs: bytes, FLOP and seconds."""
    return {
        "step": asdict(plan.step),
        "device": plan.device._asdict(),
        "memory": {"there": plan.memory, "needed": plan.needed, "peak": plan.costs.peak, "idle": plan.costs.idle}
        | {"components": plan.costs.memory, "at": plan.costs.part},
        "fits": plan.needed <= plan.memory,
        "largest": {"frames": plan.frames, "batch": plan.batch},
        "flops": plan.costs.flops(),
        "seconds_at_least": plan.seconds,
    }
