"""Each reference of vmae_kernels, which is what runs on a CPU, beside what else does the same in plain PyTorch.

    python benchmarks/references.py [--rounds 20] [--only NAME]

For each operation the obvious way to write it, and the best one known. Sizes are those of one pretraining step with
ViT-B at 128 frames of 224 x 224 pixels, batch 1 or 2; forward, and forward with backward where there is a gradient.
All give the same results, which is checked before anything is timed; times are medians of rounds in which they take
turns, in any order.
"""

import argparse
import datetime
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measuring import machine
from torch import Tensor

import vmae_kernels as ours

RESULTS = Path(__file__).parent / "results"
N, V, K = 12544, 1280, 1882  # tokens, visible ones, and those that the decoder reconstructs
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Case(NamedTuple):
    name: str
    inputs: list[Tensor]
    """Those with gradients require them."""
    contestants: dict[str, Callable]
    """ours, then the others, from the obvious to the best known."""
    tolerance: float = 0.0


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.requires_grad_(grad)


def chosen(b: int, n: int, k: int, seed: int = 0) -> Tensor:
    """k of n, ascending, as masks are."""
    return torch.rand(b, n, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :k].sort(1).values


def cases() -> Iterator[Case]:
    yield from selections()
    yield from tokens()
    yield from attentions()
    yield from the_rest()


def selections() -> Iterator[Case]:
    scores = rand(8, N, grad=False)

    def stable(s: Tensor) -> tuple[Tensor, Tensor]:
        order = s.argsort(dim=1, descending=True, stable=True)
        return order[:, :1255].sort(1).values, order[:, 1255:].sort(1).values

    def sorted_topk(s: Tensor) -> tuple[Tensor, Tensor]:  # not exact where scores are equal
        selected = s.topk(1255, sorted=False).indices.sort(1).values
        rest = torch.ones_like(s, dtype=torch.bool).scatter_(1, selected, False)
        return selected, rest.nonzero()[:, 1].view(len(s), -1)

    others = {"stable argsort": stable, "topk, sort, nonzero": sorted_topk}
    yield Case(
        "topk_partition [8, 12544], k = 1,255", [scores], {"ours": lambda s: ours.topk_partition(s, 1255)} | others
    )
    others = {
        "stable argsort": lambda s: stable(s)[0],
        "topk, sort": lambda s: s.topk(1255, sorted=False).indices.sort(1).values,
    }
    yield Case("topk [8, 12544], k = 1,255", [scores], {"ours": lambda s: ours.topk(s, 1255)} | others)

    n, k, sigma, samples = 1372, 686, 0.5, 16

    def stored(s: Tensor) -> Tensor:
        noise = torch.randn(samples, *s.shape, generator=torch.Generator().manual_seed(0))
        return torch.zeros_like(noise).scatter_(2, (s + sigma * noise).topk(k).indices, 1.0).mean(0)

    def one_by_one(s: Tensor) -> Tensor:
        generator, total = torch.Generator().manual_seed(0), torch.zeros_like(s)
        for _ in range(samples):
            noisy = s + sigma * torch.randn(s.shape, generator=generator)
            total += torch.zeros_like(s).scatter_(1, noisy.topk(k, sorted=False).indices, 1.0)
        return total / samples

    contestants = {
        "ours": lambda s: ours.soft_topk(s, k, sigma=sigma, samples=samples, seed=0),
        "stored": stored,
        "one by one": one_by_one,
    }
    # Other noise: the same in expectation.
    yield Case("soft_topk [4, 1372], 16 samples", [rand(4, n, grad=False)], contestants, tolerance=1.0)


def tokens() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        x, rows = rand(2, N, 768, dtype=dtype), chosen(2, N, V)
        wide = rows[..., None].expand(-1, -1, 768)

        def flat(x: Tensor, rows: Tensor) -> Tensor:
            index = (rows + torch.arange(len(x))[:, None] * x.shape[1]).flatten()
            return x.flatten(0, 1).index_select(0, index).view(*rows.shape, -1)

        contestants = {
            "ours": lambda x, rows=rows: ours.gather_tokens(x, rows, unique=True),
            "torch.gather, expanded": lambda x, wide=wide: x.gather(1, wide),
            "x[batch, indices]": lambda x, rows=rows: x[torch.arange(2)[:, None], rows],
            "index_select, flat": lambda x, rows=rows: flat(x, rows),
        }
        yield Case(f"gather_tokens {short} [2, 12544, 768], 1,280", [x], contestants)
        y, fill, rows = rand(2, K, 384, dtype=dtype), rand(384, seed=1, dtype=dtype), chosen(2, N, K)
        wide = rows[..., None].expand(-1, -1, 384)
        index = (rows + torch.arange(2)[:, None] * N).flatten()
        contestants = {
            "ours": lambda y, fill, rows=rows: ours.scatter_tokens(y, rows, N, fill=fill),
            "expand, scatter": lambda y, fill, wide=wide: fill.expand(2, N, -1).scatter(1, wide, y),
            "expand, index_copy, flat": lambda y, fill, index=index: (
                fill.expand(2 * N, -1).index_copy(0, index, y.flatten(0, 1)).view(2, N, -1)
            ),
        }
        tolerance = 0.2 if dtype == torch.bfloat16 else 1e-2  # the gradient of fill: 20,000 numbers added up
        yield Case(f"scatter_tokens {short} [2, 1882, 384], 12,544", [y, fill], contestants, tolerance)
        visible, mask, positions = rand(2, V, 384, dtype=dtype), rand(384, seed=1), rand(N, 384, seed=2, grad=False)
        seen, picked = chosen(2, N, V), chosen(2, N, K, seed=1)

        def gathers(x: Tensor, mask: Tensor, positions: Tensor, seen=seen, picked=picked) -> Tensor:
            first = x + positions[seen]
            return torch.cat((first, mask + positions[picked]), 1).to(x.dtype)

        def selects(x: Tensor, mask: Tensor, positions: Tensor, seen=seen, picked=picked) -> Tensor:
            first = x + positions.index_select(0, seen.flatten()).view(*seen.shape, -1)
            second = mask + positions.index_select(0, picked.flatten()).view(*picked.shape, -1)
            return torch.cat((first.to(x.dtype), second.to(x.dtype)), 1)

        contestants = {
            "ours": lambda x, m, p, seen=seen, picked=picked: ours.decoder_tokens(x, seen, picked, m, p),
            "p[indices], sum, cat": gathers,
            "index_select, sum, cat": selects,
        }
        yield Case(f"decoder_tokens {short} [2, 1280 + 1882, 384]", [visible, mask, positions], contestants, tolerance)
    video = torch.randint(0, 256, (1, 128, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    video, rows = video.permute(0, 4, 1, 2, 3), chosen(1, N, V)

    def cut(v: Tensor) -> Tensor:
        split = v.unflatten(4, (14, 16)).unflatten(3, (14, 16)).unflatten(2, (64, 2))
        return split.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)

    def normalised(v: Tensor) -> Tensor:
        mean, std = (torch.tensor(x).view(1, 3, 1, 1, 1) for x in (MEAN, STD))
        return cut((v / 255 - mean) / std)[0, rows[0]][None]

    def afterwards(v: Tensor) -> Tensor:
        picked = cut(v)[0].index_select(0, rows[0]).unflatten(1, (-1, 3)).float()
        return (picked / 255).sub_(torch.tensor(MEAN)).div_(torch.tensor(STD)).flatten(1)[None]

    def by_place(v: Tensor) -> Tensor:
        split = v.unflatten(4, (14, 16)).unflatten(3, (14, 16)).unflatten(2, (64, 2)).permute(0, 2, 4, 6, 3, 5, 7, 1)
        picked = split[0, rows[0] // 196, rows[0] // 14 % 14, rows[0] % 14].float()
        return (picked / 255).sub_(torch.tensor(MEAN)).div_(torch.tensor(STD)).flatten(1)[None]

    contestants = {
        "ours": lambda v: ours.tubelets(v, rows, mean=MEAN, std=STD),
        "normalise, cut, choose": normalised,
        "cut, choose, normalise": afterwards,
        "choose by place, normalise": by_place,
    }
    yield Case("tubelets uint8 [1, 3, 128, 224, 224], 1,280", [video], contestants, 1e-5)


def attentions() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
        q, k, v = (rand(1, V + K, 6, 64, seed=s, dtype=dtype).detach() for s in range(3))
        heads = [x.transpose(1, 2).requires_grad_() for x in (q, k, v)]
        plain = (
            {"q k^T, softmax, v": lambda q, k, v: ((q @ k.mT) * 0.125).softmax(-1) @ v}
            if dtype == torch.float32
            else {}
        )
        others = plain | {"scaled_dot_product_attention": F.scaled_dot_product_attention}
        yield Case(f"attention {short} [1, 6, 3162, 64]", heads, {"ours": ours.attention} | others, tolerance)
        rows = chosen(1, V + K, V)

        def indexed(q: Tensor, k: Tensor, v: Tensor, rows=rows) -> Tensor:
            return F.scaled_dot_product_attention(q, k[:, :, rows[0]], v[:, :, rows[0]])

        def selected(q: Tensor, k: Tensor, v: Tensor, rows=rows) -> Tensor:
            k, v = (x.index_select(2, rows[0]) for x in (k, v))
            return F.scaled_dot_product_attention(q, k, v)

        contestants = {
            "ours": lambda q, k, v, rows=rows: ours.attention(q, k, v, kv_indices=rows),
            "k[:, :, rows], SDPA": indexed,
            "index_select, SDPA": selected,
        }
        yield Case(f"attention, kv_indices {short} [1, 6, 3162, 64], 1,280", heads, contestants, tolerance)
        lengths = [784, 1568, 392, 1100]
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        packed = [rand(sum(lengths), 6, 64, seed=s, dtype=dtype) for s in range(3)]

        def padded(q: Tensor, k: Tensor, v: Tensor, lengths=lengths) -> Tensor:
            mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
            q, k, v = (
                torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v)
            )
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).transpose(1, 2)[mask]

        def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths=lengths) -> Tensor:
            parts = zip(*([part.transpose(0, 1)[None] for part in x.split(lengths)] for x in (q, k, v)), strict=True)
            return torch.cat([F.scaled_dot_product_attention(*part)[0].transpose(0, 1) for part in parts])

        contestants = {
            "ours": lambda q, k, v, starts=starts: ours.attention_varlen(q, k, v, starts, starts, 1568, 1568),
            "padded, mask": padded,
            "SDPA one by one": one_by_one,
        }
        yield Case(f"attention_varlen {short} [392 to 1568, 6, 64]", packed, contestants, tolerance)


def the_rest() -> Iterator[Case]:
    levels = [8] * 6
    half, offset, shift = (torch.tensor(x) for x in (3.5035, 0.5, torch.tensor(0.5 / 3.5035).atanh().item()))
    radix = 8 ** torch.arange(6, dtype=torch.int32)

    def fsq(z: Tensor) -> tuple[Tensor, Tensor]:
        bounded = (z + shift).tanh() * half - offset
        quantized = bounded + (bounded.round() - bounded).detach()
        codes = ((quantized.detach() + 4).int() * radix).sum(-1, dtype=torch.int32)
        return quantized / 4, codes

    yield Case(
        "fsq [2, 12544, 6]", [rand(2, N, 6)], {"ours": lambda z: ours.fsq(z, levels), "tanh, round, detach": fsq}, 1e-3
    )


def results(function: Callable, inputs: list[Tensor], *, backward: bool) -> list[Tensor]:
    with torch.set_grad_enabled(backward):
        y = function(*inputs)
    y = y if isinstance(y, tuple) else (y,)
    if not backward:
        return [*y]
    wanted = [x for x in inputs if x.requires_grad]
    return [*y, *torch.autograd.grad(y[0], wanted, torch.ones_like(y[0]))]


def measured(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each contestant, by forward and both."""
    table: dict[str, dict[str, float]] = {}
    shuffled = random.Random(0)
    for backward in (False, True) if any(x.requires_grad for x in case.inputs) else (False,):
        ours_first = results(case.contestants["ours"], case.inputs, backward=backward)
        for name, function in case.contestants.items():
            for a, b in zip(ours_first, results(function, case.inputs, backward=backward), strict=True):
                if (a.double() - b.double()).abs().max() > case.tolerance * max(1, b.abs().max()):
                    raise AssertionError(f"{case.name}: {name} gives other results")
        times: dict[str, list[float]] = {name: [] for name in case.contestants}
        order = list(case.contestants.items())
        for _ in range(rounds):
            shuffled.shuffle(order)
            for name, function in order:
                start = time.perf_counter()
                results(function, case.inputs, backward=backward)
                times[name].append(1000 * (time.perf_counter() - start))
        table["forward and backward" if backward else "forward"] = {
            name: round(statistics.median(taken), 3) for name, taken in times.items()
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/references-DATE.json")
    args = parser.parse_args()
    found = {}
    print("| operation | | ours | obvious | best other | ours against it |\n| --- | --- | --- | --- | --- | --- |")
    for case in cases():
        if args.only not in case.name:
            continue
        found[case.name] = measured(case, args.rounds)
        for what, taken in found[case.name].items():
            others = {name: ms for name, ms in taken.items() if name != "ours"}
            obvious, best = next(iter(others)), min(others, key=others.__getitem__)
            print(f"| {case.name} | {what} | {taken['ours']:.2f} ms | {obvious}: {others[obvious]:.2f} | "
                  f"{best}: {others[best]:.2f} | {others[best] / taken['ours']:.2f} x |", flush=True)  # fmt: skip
    out = args.out or RESULTS / f"references-{datetime.date.today()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/references.py --rounds {args.rounds}"
    out.write_text(
        json.dumps({"what": "milliseconds", "command": command, "machine": machine(), "cases": found}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
