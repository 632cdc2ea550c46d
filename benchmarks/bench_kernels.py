"""Each operation of vmae_kernels beside what else does the same in plain PyTorch, at the sizes of a pretraining step.

    python -m pytest benchmarks/bench_kernels.py --benchmark-json=kernels.json [-k "attention and 128"] [--minutes 10]

Of each operation the obvious way to write it (where it differs) and the best one known; forward, and backward with it
where there is a gradient. All results are compared before anything is timed. The cache is overwritten before each call.
On CUDA a call is timed by events behind a long write, so that the time to start it does not count. GB/s and TFLOP/s
count each needed byte and product once, and are set beside what the device copies and multiplies in the same run.
"""

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from measuring import DEVICE, PRECISION, in_turns
from torch import Tensor

import vmae_kernels as ours
from vmae.mae import IMAGENET_MEAN as MEAN
from vmae.mae import IMAGENET_STD as STD
from vmae_kernels.layer_norm import layer_norm as rounded_layer_norm
from vmae_kernels.linear import linear as layer
from vmae_kernels.mlp import mlp as fused_mlp
from vmae_kernels.philox import normals

CUDA = DEVICE == "cuda"
DTYPES = [torch.bfloat16, torch.float32] if PRECISION == "bf16" else [torch.float32]  # bf16 is not emulated


class Case(NamedTuple):
    inputs: list[Tensor]
    """Those with gradients require them."""
    contestants: dict[str, Callable]
    """"ours", then the others, from the obvious to the best known."""
    bytes: tuple[int, int] = (0, 0)
    """Needed, forward and backward."""
    flops: tuple[int, int] = (0, 0)
    tolerance: tuple[float, float] = (0.0, 0.0)
    """Of results, relative to the largest number, or for integers the share that may differ; and of gradients."""
    exact: dict[str, Callable] | None = None
    """What to compare ours with instead of the others, if those draw other noise."""


def tokens_of(frames: int) -> tuple[int, int, int]:
    """All tokens at 224 x 224, visible ones, and those that the decoder reconstructs."""
    n = frames // 2 * 196
    return n, frames // 2 * 20, math.floor(0.15 * n + 0.5)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.requires_grad_(grad)


def chosen(b: int, n: int, k: int, seed: int = 0) -> Tensor:
    """k of n, ascending, as masks are."""
    return torch.rand(b, n, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :k].sort(1).values.to(DEVICE)


def flat(x: Tensor, rows: Tensor) -> Tensor:
    """The fastest gather of PyTorch."""
    index = (rows + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]).flatten()
    return x.flatten(0, 1).index_select(0, index).view(*rows.shape, -1)


def rounding(dtype: torch.dtype) -> tuple[float, float]:
    """What sums in another order may change, relative to the largest number: of results, and of gradients."""
    return (0.01, 0.03) if dtype == torch.bfloat16 else (1e-5, 1e-4)


def topk(frames: int, dtype: torch.dtype) -> Case:
    n, _, k = tokens_of(frames)
    k = k * 2 // 3  # of the budget a third is drawn at random

    def stable(s: Tensor) -> Tensor:
        return s.argsort(dim=1, descending=True, stable=True)[:, :k].sort(1).values

    def by_value(s: Tensor) -> Tensor:
        return s.topk(k, sorted=False).indices.sort(1).values

    others = {"stable argsort": stable, "topk, sort": by_value}
    return Case([rand(8, n, grad=False)], {"ours": lambda s: ours.topk(s, k)} | others, (8 * (4 * n + 8 * k), 0))


def topk_partition(frames: int, dtype: torch.dtype) -> Case:
    n, _, k = tokens_of(frames)

    def stable(s: Tensor) -> tuple[Tensor, Tensor]:
        order = s.argsort(dim=1, descending=True, stable=True)
        return order[:, :k].sort(1).values, order[:, k:].sort(1).values

    def by_mask(s: Tensor) -> tuple[Tensor, Tensor]:
        selected = s.topk(k, sorted=False).indices.sort(1).values
        rest = torch.ones_like(s, dtype=torch.bool).scatter_(1, selected, False)
        return selected, rest.nonzero()[:, 1].view(len(s), -1)

    contestants = {
        "ours": lambda s: ours.topk_partition(s, k),
        "stable argsort": stable,
        "topk, sort, nonzero": by_mask,
    }
    return Case([rand(8, n, grad=False)], contestants, (8 * 12 * n, 0))


class SoftTopk(torch.autograd.Function):
    """Perturbed top-k of 16 samples with a control variate, as one would write it: noise is drawn twice, not kept."""

    SAMPLES, SIGMA = 16, 0.5

    @staticmethod
    def chosen(s: Tensor, k: int) -> Tensor:
        return torch.zeros_like(s).scatter_(1, s.topk(k, sorted=False).indices, 1.0)

    @staticmethod
    def forward(ctx, s: Tensor, k: int, noise: Callable[[], Iterator[Tensor]]) -> Tensor:
        ctx.save_for_backward(s)
        ctx.k, ctx.noise = k, noise
        total = torch.zeros_like(s)
        for z in noise():
            total += SoftTopk.chosen(s + SoftTopk.SIGMA * z, k)
        return total / SoftTopk.SAMPLES

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (s,) = ctx.saved_tensors
        still, total = (grad * SoftTopk.chosen(s, ctx.k)).sum(1, keepdim=True), torch.zeros_like(s)
        for z in ctx.noise():
            total += ((grad * SoftTopk.chosen(s + SoftTopk.SIGMA * z, ctx.k)).sum(1, keepdim=True) - still) * z
        return total / (SoftTopk.SAMPLES * SoftTopk.SIGMA), None, None


def soft_topk(frames: int, dtype: torch.dtype) -> Case:
    n = frames // 2 * 196
    k = n // 2

    def drawn() -> Iterator[Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(0)
        return (torch.randn(2, n, generator=generator, device=DEVICE) for _ in range(SoftTopk.SAMPLES))

    def same() -> Iterator[Tensor]:
        for block in range(SoftTopk.SAMPLES // 4):
            yield from normals(2, n, seed=0, block=block, device=torch.device(DEVICE))

    contestants = {
        "ours": lambda s: ours.soft_topk(s, k, sigma=SoftTopk.SIGMA, samples=SoftTopk.SAMPLES, seed=0),
        "one by one": lambda s: SoftTopk.apply(s, k, drawn),
    }
    exact = {"one by one, the same noise": lambda s: SoftTopk.apply(s, k, same)}
    # Where two scores all but tie, rounding may choose either in a sample, and that moves the sums.
    return Case([rand(2, n)], contestants, (2 * 8 * n, 2 * 12 * n), tolerance=(0.07, 0.01), exact=exact)


def gather_tokens(frames: int, dtype: torch.dtype) -> Case:
    n, v, _ = tokens_of(frames)
    x, rows = rand(2, n, 768, dtype=dtype), chosen(2, n, v)
    contestants = {
        "ours": lambda x: ours.gather_tokens(x, rows, unique=True),
        "torch.gather, expanded": lambda x: x.gather(1, rows[..., None].expand(-1, -1, 768)),
        "index_select, flat": lambda x: flat(x, rows),
    }
    row = 2 * 768 * x.element_size()
    return Case([x], contestants, (2 * v * row, (v + n) * row))


def scatter_tokens(frames: int, dtype: torch.dtype) -> Case:
    n, _, k = tokens_of(frames)
    y, fill, rows = rand(2, k, 384, dtype=dtype), rand(384, seed=1, dtype=dtype), chosen(2, n, k)
    index = (rows + torch.arange(2, device=DEVICE)[:, None] * n).flatten()
    contestants = {
        "ours": lambda y, fill: ours.scatter_tokens(y, rows, n, fill=fill),
        "expand, scatter": lambda y, fill: fill.expand(2, n, -1).scatter(1, rows[..., None].expand(-1, -1, 384), y),
        "expand, index_copy, flat": lambda y, fill: (
            fill.expand(2 * n, -1).index_copy(0, index, y.flatten(0, 1)).view(2, n, -1)
        ),
    }
    row = 2 * 384 * y.element_size()
    # The gradient of fill adds up 20,000 numbers and more.
    return Case([y, fill], contestants, ((k + n) * row, (k + n) * row), tolerance=rounding(dtype))


def decoder_tokens(frames: int, dtype: torch.dtype) -> Case:
    n, v, k = tokens_of(frames)
    visible, mask, positions = rand(2, v, 384, dtype=dtype), rand(384, seed=1), rand(n, 384, seed=2, grad=False)
    seen, picked = chosen(2, n, v), chosen(2, n, k, seed=1)

    def selects(x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        first = x + positions.index_select(0, seen.flatten()).view(*seen.shape, -1)
        second = mask + positions.index_select(0, picked.flatten()).view(*picked.shape, -1)
        return torch.cat((first.to(x.dtype), second.to(x.dtype)), 1)

    contestants = {
        "ours": lambda x, m, p: ours.decoder_tokens(x, seen, picked, m, p),
        "p[indices], sum, cat": lambda x, m, p: torch.cat((x + p[seen], m + p[picked]), 1).to(x.dtype),
        "index_select, sum, cat": selects,
    }
    size, row = visible.element_size(), 2 * 384
    moved = ((v + v + k) * size + (v + k) * 4) * row, (v + v + k) * size * row
    return Case([visible, mask, positions], contestants, moved, tolerance=rounding(dtype))


def tubelets(frames: int, dtype: torch.dtype) -> Case:
    n, v, _ = tokens_of(frames)
    video = torch.randint(
        0, 256, (1, frames, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    video, rows = video.to(DEVICE).permute(0, 4, 1, 2, 3), chosen(1, n, v)
    mean, std = (torch.tensor(x, device=DEVICE) for x in (MEAN, STD))

    def cut(video: Tensor) -> Tensor:
        split = video.unflatten(4, (14, 16)).unflatten(3, (14, 16)).unflatten(2, (-1, 2))
        return split.permute(0, 2, 4, 6, 3, 5, 7, 1)

    def normalised(video: Tensor) -> Tensor:
        every = cut((video / 255 - mean.view(3, 1, 1, 1)) / std.view(3, 1, 1, 1))
        return every.flatten(4).flatten(1, 3)[0, rows[0]][None].to(dtype)

    def by_place(video: Tensor) -> Tensor:
        picked = cut(video)[0, rows[0] // 196, rows[0] // 14 % 14, rows[0] % 14].float()
        return (picked / 255).sub_(mean).div_(std).flatten(1)[None].to(dtype)

    contestants = {
        "ours": lambda video: ours.tubelets(video, rows, mean=MEAN, std=STD, dtype=dtype),
        "normalise, cut, choose": normalised,
        "choose by place, normalise": by_place,
    }
    moved = v * 1536 * (1 + dtype.itemsize)
    return Case([video], contestants, (moved, 0), tolerance=rounding(dtype))


def qkv(frames: int, dtype: torch.dtype) -> tuple[list[Tensor], int]:
    """Of the decoder of a base model, heads inside tokens, as a linear layer gives them."""
    _, v, k = tokens_of(frames)
    parts = (rand(1, v + k, 6, 64, seed=s, dtype=dtype).detach() for s in range(3))
    return [x.transpose(1, 2).requires_grad_() for x in parts], v + k


def attention(frames: int, dtype: torch.dtype) -> Case:
    heads, n = qkv(frames, dtype)
    others = {"scaled_dot_product_attention": F.scaled_dot_product_attention}
    products = 2 * n * n * 384
    return Case(
        heads, {"ours": ours.attention} | others, flops=(2 * products, 5 * products),
        tolerance=rounding(dtype),
    )  # fmt: skip


def attention_kv_indices(frames: int, dtype: torch.dtype) -> Case:
    heads, n = qkv(frames, dtype)
    keys = tokens_of(frames)[1]
    rows = chosen(1, n, keys)

    def selected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.index_select(2, rows[0]) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    contestants = {"ours": lambda q, k, v: ours.attention(q, k, v, kv_indices=rows), "index_select, SDPA": selected}
    products = 2 * n * keys * 384
    return Case(heads, contestants, flops=(2 * products, 5 * products), tolerance=rounding(dtype))


def attention_varlen(frames: int, dtype: torch.dtype) -> Case:
    lengths = [frames * x // 128 for x in (784, 1568, 392, 1100)]
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(DEVICE)
    packed = [rand(sum(lengths), 6, 64, seed=s, dtype=dtype) for s in range(3)]

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*([part.transpose(0, 1)[None] for part in x.split(lengths)] for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part)[0].transpose(0, 1) for part in parts])

    def mine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ours.attention_varlen(q, k, v, starts, starts, max(lengths), max(lengths))

    products = sum(2 * n * n * 384 for n in lengths)
    return Case(
        packed, {"ours": mine, "SDPA one by one": one_by_one}, flops=(2 * products, 5 * products),
        tolerance=rounding(dtype),
    )  # fmt: skip


def linear(frames: int, dtype: torch.dtype) -> Case:
    """The second layer of an MLP, as autocast has it: the weight is float32, and so is its gradient."""
    rows, inputs, outputs = tokens_of(frames)[1], 3072, 768
    tensors = [rand(1, rows, inputs, dtype=dtype), rand(outputs, inputs, seed=1), rand(outputs, seed=2)]
    contestants = {"ours": layer, "casts, F.linear": lambda x, w, b: F.linear(x, w.to(dtype), b.to(dtype))}
    products = 2 * rows * inputs * outputs
    return Case(tensors, contestants, flops=(products, 2 * products), tolerance=rounding(dtype))


def mlp(frames: int, dtype: torch.dtype) -> Case:
    """As autocast has it, too."""
    rows, width = tokens_of(frames)[1], 768
    shapes = (4 * width, width), (4 * width,), (width, 4 * width), (width,)
    weights = [rand(*shape, seed=seed) / shape[-1] ** 0.5 for seed, shape in enumerate(shapes)]
    weights = [x.detach().requires_grad_() for x in weights]

    def written(x: Tensor, *weights: Tensor) -> Tensor:
        first, first_bias, second, second_bias = (w.to(dtype) for w in weights)
        return F.linear(F.gelu(F.linear(x, first, first_bias)), second, second_bias)

    products = 4 * rows * width * 4 * width
    return Case(
        [rand(1, rows, width, seed=4, dtype=dtype), *weights], {"ours": fused_mlp, "casts, F.linear, F.gelu": written},
        flops=(products, 2 * products), tolerance=rounding(dtype),
    )  # fmt: skip


def layer_norm(frames: int, dtype: torch.dtype) -> Case:
    """Of float32, for a layer that takes another dtype."""
    rows, width = tokens_of(frames)[1], 768
    n = rows * width

    def mine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(DEVICE, dtype):
            return rounded_layer_norm(x, weight, bias, 1e-6)

    def written(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), weight, bias, 1e-6).to(dtype)

    tensors = [rand(1, rows, width), rand(width, seed=1), rand(width, seed=2)]
    return Case(tensors, {"ours": mine, "F.layer_norm, cast": written}, (6 * n, 10 * n), tolerance=rounding(dtype))


def fsq(frames: int, dtype: torch.dtype) -> Case:
    n = tokens_of(frames)[0]
    half, offset = 3.5035, 0.5
    shift = math.atanh(offset / half)
    radix = 8 ** torch.arange(6, dtype=torch.int32, device=DEVICE)

    def written(z: Tensor) -> tuple[Tensor, Tensor]:
        bounded = (z + shift).tanh() * half - offset
        quantized = bounded + (bounded.round() - bounded).detach()
        return quantized / 4, ((quantized.detach() + 4).int() * radix).sum(-1, dtype=torch.int32)

    contestants = {"ours": lambda z: ours.fsq(z, [8] * 6), "tanh, round, detach": written}
    return Case([rand(2, n, 6)], contestants, (2 * n * 52, 2 * n * 72), tolerance=(1e-5, 1e-4))


OPERATIONS: dict[Callable[[int, torch.dtype], Case], list[torch.dtype]] = {
    topk: [torch.float32],
    topk_partition: [torch.float32],
    soft_topk: [torch.float32],
    gather_tokens: DTYPES,
    scatter_tokens: DTYPES,
    decoder_tokens: DTYPES,
    tubelets: DTYPES,
    fsq: [torch.float32],
    attention: DTYPES,
    attention_kv_indices: DTYPES,
    attention_varlen: DTYPES,
    # Elsewhere they are PyTorch's.
    linear: [] if CUDA else DTYPES[:-1],
    mlp: [] if CUDA else DTYPES[:-1],
    layer_norm: [] if CUDA else DTYPES[:-1],
}
POINTS = [
    pytest.param(operation, frames, dtype, id=f"{operation.__name__}-{frames}-{str(dtype)[6:]}", marks=marks)
    for frames, marks in ((128, ()), (1024, pytest.mark.later))
    for operation, dtypes in OPERATIONS.items()
    for dtype in dtypes
]


def results(function: Callable, inputs: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    """What a function gives, and if there is a gradient of its first result those of its inputs."""
    with torch.set_grad_enabled(grad is not None):
        y = function(*inputs)
    y = y if isinstance(y, tuple) else (y,)
    return [*y] if grad is None else [*y, *torch.autograd.grad(y[0], [x for x in inputs if x.requires_grad], grad)]


def difference(case: Case, grad: Tensor | None) -> float:
    """The largest between our results and another's; raises if it is too large."""
    mine = results(case.contestants["ours"], case.inputs, grad)
    worst = 0.0
    for name, function in (case.exact or case.contestants).items():
        others = results(function, case.inputs, grad)
        gradients = 0 if grad is None else sum(x.requires_grad for x in case.inputs)
        for place, (a, b) in enumerate(zip(mine, others, strict=True)):
            tolerance = case.tolerance[place >= len(mine) - gradients]
            off = distance(a.detach(), b.detach())
            if not off <= tolerance:
                raise AssertionError(f"{name} gives another result {place}: expected within {tolerance}, got {off:.2g}")
            worst = max(worst, off)
    return worst


def distance(a: Tensor, b: Tensor) -> float:
    if not a.is_floating_point():
        return float((a != b).double().mean())
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize(("operation", "frames", "dtype"), POINTS)
def test_operation(benchmark, report, limits, operation, frames, dtype, backward):
    if not CUDA and frames > 128 and "attention" in operation.__name__:
        pytest.skip("minutes on a CPU")
    case = operation(frames, dtype)
    if backward and not any(x.requires_grad for x in case.inputs):
        pytest.skip("has no gradient here")
    first = results(case.contestants["ours"], case.inputs, None)[0]
    grad = rand(*first.shape, seed=9, dtype=first.dtype, grad=False) if backward else None
    off = difference(case, grad)
    runs = {
        name: functools.partial(results, function, case.inputs, grad) for name, function in case.contestants.items()
    }
    times = in_turns(runs)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    best = min((name for name in medians if name != "ours"), key=medians.__getitem__)
    compared = ", ".join(dict.fromkeys(("ours", *(case.exact or case.contestants))))
    moved, products = (sum(x[: 1 + backward]) for x in (case.bytes, case.flops))
    limit = (limits.bf16 if dtype == torch.bfloat16 else limits.fp32) if products else limits.bandwidth
    benchmark.group = f"{operation.__name__}, {frames} frames, {str(dtype)[6:]}, {'both' if backward else 'forward'}"
    rate = (products or moved) / medians["ours"]
    report(
        times["ours"], checked=f"{compared} agree within {off:.1e}",
        operation=operation.__name__, frames=frames, dtype=str(dtype)[6:], backward=backward,
        seconds_of={name: medians[name] for name in medians}, best=best, speedup=medians[best] / medians["ours"],
        **({"flops_per_s": rate} if products else {"bytes_per_s": rate}), share_of_limit=rate / limit,
    )  # fmt: skip
