"""What one pretraining step takes on this machine: time by part, memory and arithmetic, after a check of its results.

Every case is measured in a process of its own: `python -m vmae.bench '{"step": {"frames": 16}}'`.
"""

import contextlib
import ctypes
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vmae.mae import IMAGENET_MEAN, IMAGENET_STD, VideoMAE
from vmae.masking import tube_mask
from vmae.optimisation import autocast
from vmae.planning import GIB, Costs, Device, costs, flops_of
from vmae.step import Mark, Step, inputs, optimizer_of, run, train
from vmae.tokens import TUBELET, Tokens

Way = Literal["vmae", "references", "plain", "dual-masking", "huggingface"]
CHECKED_FRAMES = 4  # gradients are compared on clips of at most so many
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # of the loss, beside the same in float32 by other means
GRADIENT = 1e-3  # of every weight's gradient, beside it; more only where the other means in bf16 are off by more


@dataclass(frozen=True)
class Case:
    """A step, and who does it."""

    step: Step = field(default_factory=Step)
    way: Way = "vmae"
    """"vmae"; "references": the same with VMAE_KERNELS=torch; "plain": the same work in plain PyTorch; "dual-masking":
    VideoMAEv2's decoder, on pixels and a running cell of tokens, in plain PyTorch; "huggingface": its VideoMAE, which
    decodes all tokens, whatever the budget."""
    device: Literal["cpu", "cuda"] = "cpu"
    rounds: int = 3
    """Steps that are timed, or fewer: not less than one, and none begins after `limit` seconds of them."""
    limit: float = 10.0

    def __post_init__(self):
        if self.way not in get_args(Way):
            raise ValueError(f"way: expected one of {', '.join(get_args(Way))}, got {self.way!r}")


class Subject(NamedTuple):
    """What is measured: a step that trains `model`, and its loss by other means."""

    model: nn.Module
    step: Callable[[Mark], Tensor]
    expected: Callable[[], Tensor]
    """The loss that the next step is to give, by other means; differentiable, unless it is another model's."""


class OutOfMemory(RuntimeError):
    """The case needs more memory than there is."""


def measure(case: Case) -> dict[str, Any]:
    """Seconds, parts (seconds each), bytes and FLOP of a case, measured in this process, which should do nothing else.

    Raises:
        ValueError: no model can do such a step, or its results are wrong: then nothing is measured.
    """
    os.environ["VMAE_KERNELS"] = "torch" if case.way == "references" else os.environ.get("VMAE_KERNELS", "auto")
    memory = memory_of(case.device)
    error = check(case)
    gc.collect()
    before = memory.now()
    subject = _subject(case)
    with torch.no_grad():
        expected = float(subject.expected())
    with _Flops() as flops:
        loss = float(subject.step(lambda part: None))
    _compare("loss", abs(loss - expected), abs(expected), case)
    gc.collect()
    idle = memory.now()
    memory.forget_peak()
    subject.step(lambda part: None)  # the first has left code behind that oneDNN made for these sizes, some 20 MB
    peak = memory.peak()
    memory.done()
    times: list[dict[str, float]] = []
    begin = time.perf_counter()
    while not times or (len(times) < case.rounds and time.perf_counter() - begin < case.limit):
        times.append(timed(subject.step, case.device))
    return {
        "seconds": [sum(parts.values()) for parts in times],
        "parts": {part: statistics.median(parts[part] for parts in times) for part in times[0]},
        "bytes": None if idle is None or peak is None else peak - idle,
        "bytes_between_steps": None if idle is None or before is None else idle - before,
        "flops": flops.total,
        "tokens": case.step.batch * case.step.tokens,
        "loss": loss,
        "checked": f"{'loss' if case.way == 'huggingface' else 'gradient of every weight'} at "
        f"{min(case.step.frames, CHECKED_FRAMES)} frames within {error:.1e}, loss of all within "
        f"{abs(loss - expected) / abs(expected):.1e} of that by other means in float32",
    }


def in_a_process(case: Case, timeout: float | None = None) -> dict[str, Any]:
    """`measure` in a new process, which has `timeout` seconds.

    Raises:
        OutOfMemory: the machine has too little.
        TimeoutError: the seconds are over.
        ValueError: as there.
    """
    return printed_by([sys.executable, "-m", "vmae.bench", json.dumps(asdict(case))], case.way, timeout)


def printed_by(command: list[str], what: str, timeout: float | None = None) -> Any:
    """The json that a command prints last. Raises as `in_a_process`, in the name of `what`."""
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{what}: not done after {timeout:.0f} s") from None
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    said = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
    told = any(words in said for words in ("OutOfMemoryError", "MemoryError", "DefaultCPUAllocator"))
    if told or child.returncode == -9:  # by the allocator; killed by the system when nothing was left
        raise OutOfMemory(said)
    raise ValueError(f"{what}: {said}")


def check(case: Case) -> float:
    """Compare the gradient of a short clip with that by other means in float32, weight by weight.

    Queries, keys and values count as weights of their own. In bf16 a gradient may be off by twice what the other means
    are off by in bf16. Returns the largest distance, relative to the weight's gradient.

    Raises:
        ValueError: too far.
    """
    step = replace(case.step, frames=min(case.step.frames, CHECKED_FRAMES), batch=1)
    subject = _subject(replace(case, step=step))
    if case.way == "huggingface":  # whose oracle is our model with copies of its weights: there the loss counts
        with torch.no_grad():
            loss = float(subject.expected())
        off = abs(float(subject.step(lambda part: None)) - loss)
        _compare("loss", off, abs(loss), case)
        return off / abs(loss)
    parameters = dict(subject.model.named_parameters())

    def by_other_means(precision: str) -> dict[str, Tensor]:
        with autocast(torch.device(case.device), precision):
            loss = subject.expected()
        return _by_weight(parameters, torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True))

    exact = by_other_means("fp32")
    rounded = exact if step.precision == "fp32" else by_other_means(step.precision)
    found: dict[str, Tensor] = {}

    def keep(part: str) -> None:
        if part == "optimizer":
            found.update(_by_weight(parameters, [torch.zeros_like(p) if p.grad is None else p.grad.clone()
                                                 for p in parameters.values()]))  # fmt: skip

    subject.step(keep)
    whole = _norm(list(exact.values()))
    worst = 0.0
    for name, wanted in exact.items():
        off, norm = _norm([found[name].double() - wanted.double()]), _norm([wanted])
        allowed = 2 * _norm([rounded[name].double() - wanted.double()]) + GRADIENT * norm
        # The last term is for what is zero but for rounding, as the gradient of keys' biases.
        if not off <= allowed + 1e-3 * TOLERANCE[step.precision] * whole:
            raise ValueError(
                f"{case.way}: gradient of {name}: expected within {allowed / norm:.2g} of that by other means in "
                f"float32, got {off / norm:.2g}"
            )
        worst = max(worst, off / max(norm, 1e-3 * whole))
    return worst


def _by_weight(parameters: dict[str, nn.Parameter], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients by name, those of queries, keys and values apart."""
    named = {}
    for name, gradient in zip(parameters, gradients, strict=True):
        if "qkv" in name:
            named.update({f"{name}[{part}]": piece for part, piece in zip("qkv", gradient.chunk(3), strict=True)})
        else:
            named[name] = gradient
    return named


def _norm(tensors: list[Tensor]) -> float:
    return sum(float(x.double().square().sum()) for x in tensors) ** 0.5


def _compare(what: str, off: float, size: float, case: Case) -> None:
    if not off <= TOLERANCE[case.step.precision] * size:
        raise ValueError(
            f"{case.way}: {what}: expected within {TOLERANCE[case.step.precision]:g} of that by other means in "
            f"float32, got {off / size:.2g}"
        )


def timed(step: Callable[[Mark], Tensor], device: str) -> dict[str, float]:
    """Seconds by part."""
    marks: list[tuple[str, Any]] = []
    if device == "cuda":

        def mark(part: str) -> None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append((part, event))

        torch.cuda.synchronize()
        step(mark)
        torch.cuda.synchronize()
        return {part: start.elapsed_time(end) / 1000 for (part, start), (_, end) in itertools.pairwise(marks)}
    step(lambda part: marks.append((part, time.perf_counter())))
    return {part: end - start for (part, start), (_, end) in itertools.pairwise(marks)}


class _Flops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.total += flops_of(func, args, kwargs or {}, out)
        return out


class CudaMemory:
    """Bytes that PyTorch's allocator has given out."""

    now = staticmethod(lambda: torch.cuda.memory_allocated())
    peak = staticmethod(lambda: torch.cuda.max_memory_allocated())
    forget_peak = staticmethod(lambda: torch.cuda.reset_peak_memory_stats())
    done = staticmethod(lambda: None)


class CpuMemory:
    """Resident memory on Linux; elsewhere None. Until `done` the C library gives back at once what is freed.

    So what is resident is what is in use, as the allocator of CUDA counts it, and not what is kept for later.
    """

    TRIM, MMAP = -1, -3  # mallopt's names for its thresholds

    def __init__(self):
        self.forgot = True
        self._set(1 << 16)

    def now(self) -> int | None:
        return self._status("VmRSS")

    def peak(self) -> int | None:
        return self._status("VmHWM") if self.forgot else None

    def forget_peak(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not Linux, or not allowed: then the peak is not this step's
            self.forgot = False

    def done(self) -> None:
        self._set(1 << 25)  # where the C library's own adaption ends

    def _set(self, threshold: int) -> None:
        with contextlib.suppress(AttributeError, OSError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(self.MMAP, threshold)
            libc.mallopt(self.TRIM, 2 * threshold)
            libc.malloc_trim(0)

    def _status(self, name: str) -> int | None:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        found = next((line for line in lines if line.startswith(name)), None)
        return None if found is None else 1024 * int(found.split()[1])


def memory_of(device: str) -> CudaMemory | CpuMemory:
    return CudaMemory() if device == "cuda" else CpuMemory()


def _subject(case: Case) -> Subject:
    if case.way == "huggingface":
        return _huggingface(case)
    step, config = case.step, case.step.config()
    if case.way == "dual-masking":
        config = replace(config, strategy="running_cell", target="pixels")
    torch.manual_seed(0)
    model = VideoMAE(config).to(case.device).train()
    model.checkpointing = step.checkpointing
    clip, tokens = inputs(step, case.device)
    optimizer = optimizer_of(model)
    if case.way in ("vmae", "references"):
        return Subject(
            model,
            lambda mark: run(model, optimizer, clip, tokens, step.precision, mark),
            lambda: plain(model, clip, tokens),
        )
    return Subject(
        model,
        lambda mark: train(lambda: plain(model, clip, tokens, mark), model, optimizer, step.precision, mark),
        lambda: model(clip, tokens, seed=1),
    )


def plain(model: VideoMAE, clip: Tensor, tokens: Tokens, mark: Mark = lambda part: None) -> Tensor:
    """The loss of `model(clip, tokens, seed=1)`, as one would write it in plain PyTorch.

    With the strategy "running_cell" and pixels for a target this is VideoMAEv2's dual masking.
    """
    mark("embedding")
    config = model.config
    mask, selected = model.masks(clip, tokens, seed=1)
    batch = torch.arange(len(clip), device=clip.device)[:, None]
    t, h, w = TUBELET
    patches = rearrange(clip, "b c (t i) (h j) (w k) -> b (t h w) (i j k) c", i=t, j=h, k=w)
    mean, std = (clip.new_tensor(values, dtype=torch.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
    seen = ((patches[batch, mask.visible].float() / 255 - mean) / std).flatten(2).to(model.patch_embed.weight.dtype)
    if patches.shape[1] != len(model.encoder_positions):
        model._set_positions(patches.shape[1])
    x = _layer(model.patch_embed, seen) + model.encoder_positions[mask.visible]
    mark("encoder")
    for block in model.blocks:
        x = _plain_block(block, x)
    x = model.norm(x)
    mark("decoder")
    positions = model.decoder_positions
    x = torch.cat((_layer(model.to_decoder, x) + positions[mask.visible], model.mask_token + positions[selected]), 1)
    for block in model.decoder_blocks:
        x = _plain_block(block, x)
    prediction = _layer(model.head, model.decoder_norm(x[:, mask.visible.shape[1] :]))
    mark("loss")
    if config.target == "latent":
        return F.mse_loss(prediction.float(), tokens.latents[batch, selected].float())
    pixels = patches[batch, selected].float() / 255
    return F.mse_loss(
        prediction.float(),
        ((pixels - pixels.mean(2, keepdim=True)) / (pixels.var(2, keepdim=True).sqrt() + 1e-6)).flatten(2),
    )


def _plain_block(block: Any, x: Tensor) -> Tensor:
    qkv = _layer(block.attn.qkv, nn.LayerNorm.forward(block.norm1, x))
    q, k, v = rearrange(qkv, "b n (s h d) -> s b h n d", s=3, h=block.attn.heads)
    o = F.scaled_dot_product_attention(q, k, v)
    x = x + _layer(block.attn.proj, rearrange(o, "b h n d -> b n (h d)"))
    first, gelu, last = block.mlp
    return x + _layer(last, gelu(_layer(first, nn.LayerNorm.forward(block.norm2, x))))


def _layer(layer: nn.Linear, x: Tensor) -> Tensor:
    """PyTorch's, not ours."""
    return F.linear(x, layer.weight, layer.bias)


def _huggingface(case: Case) -> Subject:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    from vmae.videomae import read_videomae

    step, ours = case.step, case.step.config()
    torch.manual_seed(0)
    config = VideoMAEConfig(
        num_frames=step.frames, image_size=step.size, hidden_size=ours.width, num_hidden_layers=ours.depth,
        num_attention_heads=ours.heads, intermediate_size=4 * ours.width, decoder_hidden_size=ours.decoder_width,
        decoder_num_hidden_layers=ours.decoder_depth, decoder_num_attention_heads=ours.decoder_heads,
        decoder_intermediate_size=4 * ours.decoder_width,
    )  # fmt: skip
    model: Any = VideoMAEForPreTraining(config)
    model.to(case.device).train()
    if step.checkpointing:
        model.gradient_checkpointing_enable()
    clip, _ = inputs(step, case.device)
    mean, std = (torch.tensor(x, device=case.device)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    video = (clip.transpose(1, 2).float() / 255 - mean) / std
    hidden = torch.ones(step.batch, step.tokens, dtype=torch.bool, device=case.device)
    mask = tube_mask(step.grid, step.batch, mask_ratio=ours.mask_ratio, seed=1, device=case.device)
    hidden.scatter_(1, mask.visible, False)
    optimizer = optimizer_of(model)

    def converted() -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            mine = read_videomae(Path(folder)).to(case.device)
        return mine(clip, seed=1)

    def step_(mark: Mark) -> Tensor:
        mark("forward")
        return train(lambda: model(video, bool_masked_pos=hidden).loss, model, optimizer, step.precision, mark)

    return Subject(model, step_, converted)


def quick(step: Step, device: Device, limit: float) -> Iterator[tuple[Step, dict[str, Any] | None, Costs]]:
    """A step and others like it, shorter ones and some that decode all, as far as `limit` seconds go.

    Each comes with its figures, or None if it was out of memory, and with its prediction. What is not done when the
    seconds are over is stopped.
    """
    end = time.perf_counter() + limit
    for budget in sorted({step.budget, 1.0}):
        for frames in sorted({step.frames, *(n for n in (16, 32, 64) if n < step.frames)}):
            other = replace(step, frames=frames, budget=budget)
            try:
                predicted = costs(other, cuda=device.cuda)
            except ValueError:  # so short that the budget is less than a token
                continue
            # A process starts and checks for some seconds, and does the step twice and a half times.
            if time.perf_counter() + 8 + 5 * predicted.seconds(device) > end:
                break
            try:
                case = Case(other, device="cuda" if device.cuda else "cpu", limit=2)
                found = in_a_process(case, timeout=max(1.0, end - time.perf_counter()))
            except OutOfMemory:
                found = None
            except TimeoutError:
                break
            yield other, found, predicted


def heading(step: Step, device: Device) -> str:
    """Of the table whose lines `line` gives."""
    return (
        f"{step.model}, clips of {step.size} x {step.size}, {step.precision}, on {device.name}: products at "
        f"{max(device.bf16, device.fp32) / 1e12:.3g} TFLOP/s, copies at {device.bandwidth / 1e9:.3g} GB/s\n"
        f"{'frames':>7}{'decoded':>9}{'step':>10}{'clips/s':>9}{'TFLOP/s':>9}{'memory':>12}{'planned':>12}"
    )


def line(step: Step, found: dict[str, Any] | None, predicted: Costs, device: Device) -> str:
    planned = f"{(predicted.peak - predicted.idle) / GIB:.2f} GiB"
    start = f"{step.frames:7,}{step.budget:9.0%}"
    if found is None:
        return f"{start}{'out of memory':>28}{'':12}{planned:>12}"
    seconds = statistics.median(found["seconds"])
    memory = "unknown" if found["bytes"] is None else f"{found['bytes'] / GIB:.2f} GiB"
    rates = f"{step.batch / seconds:9.3g}{found['flops'] / seconds / 1e12:9.3g}"
    return f"{start}{seconds:8.3g} s{rates}{memory:>12}{planned:>12}"


def facts(step: Step, found: dict[str, Any] | None, predicted: Costs) -> dict[str, Any]:
    """The same for programs: seconds, bytes and FLOP; no figures if it was out of memory."""
    planned = {"bytes": predicted.peak - predicted.idle, "flops": sum(predicted.flops().values())}
    return {"step": asdict(step), "found": found, "planned": planned}


def main() -> None:
    settings = json.loads(sys.argv[1])
    case = Case(**{**settings, "step": Step(**settings.get("step", {}))})
    try:
        print(json.dumps(measure(case)))
    except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
