"""Bias and variance of the top-k gradient estimators, where the exact gradient can be computed.

The problem: N tokens carry vectors, the k with the highest scores are kept, and the loss is the squared length of the
sum of what is dropped, so that the worth of a token depends on the others. The exact gradient is that of the expected
loss under Gaussian noise on the scores: a sum over all sets of k tokens, each with its probability by integration.

    python benchmarks/topk_gradients.py
"""

import datetime
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import machine
from torch import Tensor

from vmae_kernels import soft_topk, topk

RESULTS = Path(__file__).parent / "results"
N, K, WIDTH, SIGMA = 8, 3, 4, 0.5
SAMPLES = (1, 4, 16, 64, 256)
REPEATS, PROBLEMS, PROBES = 10_000, 5, 0.125


def loss(weights: Tensor, vectors: Tensor) -> Tensor:
    return ((1 - weights) @ vectors).square().sum(-1)


def exact_gradient(scores: Tensor, vectors: Tensor) -> Tensor:
    """Of E[loss(top-k of scores + SIGMA * noise)] in float64."""
    scores = scores.double().requires_grad_()
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    standard = (x[:, None] - scores) / SIGMA
    density = torch.exp(-(standard**2) / 2) / (SIGMA * math.sqrt(2 * math.pi))
    below = torch.special.ndtr(standard)
    total = torch.zeros((), dtype=torch.float64)
    for chosen in itertools.combinations(range(N), K):
        rest = [i for i in range(N) if i not in chosen]
        # Token i of the set is the lowest kept one, at x: the others of the set lie above, the rest below.
        parts = [
            density[:, i] * torch.stack([1 - below[:, j] for j in chosen if j != i]).prod(0) * below[:, rest].prod(1)
            for i in chosen
        ]
        probability = torch.trapezoid(torch.stack(parts).sum(0), x)
        weights = torch.zeros(N, dtype=torch.float64)
        weights[list(chosen)] = 1.0
        total = total + probability * loss(weights, vectors.double())
    (gradient,) = torch.autograd.grad(total, scores)
    return gradient.float()


# Each estimator takes equal rows of scores [REPEATS, N] and returns one estimate per row.


def perturbed(scores: Tensor, vectors: Tensor, samples: int, seed: int) -> Tensor:
    """The loss at the expected indicator."""
    scores = scores.clone().requires_grad_()
    values = loss(soft_topk(scores, K, sigma=SIGMA, samples=samples, seed=seed), vectors)
    return torch.autograd.grad(values.sum(), scores)[0]


def without_control_variate(scores: Tensor, vectors: Tensor, samples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, *scores.shape, generator=generator)
    kept = torch.stack([indicator(scores + SIGMA * z) for z in noise])
    weights = kept.mean(0).requires_grad_()
    (slope,) = torch.autograd.grad(loss(weights, vectors).sum(), weights)
    return ((kept * slope).sum(-1, keepdim=True) * noise).mean(0) / SIGMA


def straight_through(scores: Tensor, vectors: Tensor, samples: int, seed: int) -> Tensor:
    scores = scores.clone().requires_grad_()
    soft = standardised(scores)
    values = loss(indicator(scores) + soft - soft.detach(), vectors)
    return torch.autograd.grad(values.sum(), scores)[0]


def probed(through: Callable[[Tensor, int, int], Tensor]) -> Callable[[Tensor, Tensor, int, int], Tensor]:
    """As the tokenizer trains: hard weights, but those of the probes, which alone pass gradients, are uniform."""

    def gradient(scores: Tensor, vectors: Tensor, samples: int, seed: int) -> Tensor:
        probe, share = torch.rand(2, *scores.shape, generator=torch.Generator().manual_seed(seed))
        scores = scores.clone().requires_grad_()
        soft = through(standardised(scores), samples, seed)
        weights = torch.where(probe < PROBES, share + (soft - soft.detach()) / PROBES, indicator(scores))
        return torch.autograd.grad(loss(weights, vectors).sum(), scores)[0]

    return gradient


def indicator(scores: Tensor) -> Tensor:
    return torch.zeros_like(scores).scatter(-1, topk(scores.detach(), K), 1.0)


def standardised(scores: Tensor) -> Tensor:
    return (scores - scores.mean(-1, keepdim=True)) / (scores.std(-1, correction=0, keepdim=True) + 1e-6)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "perturbed": perturbed,
    "perturbed, no control variate": without_control_variate,
    "perturbed, probes": probed(lambda s, n, seed: soft_topk(s, K, sigma=SIGMA, samples=n, seed=seed)),
    "straight-through": straight_through,
    "straight-through, probes": probed(lambda s, n, seed: s),
}


def measure() -> list[dict[str, object]]:
    """Medians over problems, by estimator and number of samples.

    The cosine of the mean estimate with the exact gradient (1 is without bias, but for its length), and the standard
    deviation of an estimate over the mean's length.
    """
    generator = torch.Generator().manual_seed(0)
    problems = []
    for _ in range(PROBLEMS):
        scores = standardised(torch.randn(N, generator=generator))
        vectors = torch.randn(N, WIDTH, generator=generator) * torch.rand(N, 1, generator=generator)
        problems.append((scores, vectors, exact_gradient(scores, vectors)))
    rows: list[dict[str, object]] = []
    for name, estimator in ESTIMATORS.items():
        for samples in SAMPLES if name.startswith("perturbed") else (1,):
            cosines, deviations = [], []
            for seed, (scores, vectors, exact) in enumerate(problems):
                estimates = estimator(scores.expand(REPEATS, -1), vectors, samples, seed)
                mean = estimates.mean(0)
                cosines.append(torch.cosine_similarity(mean, exact, dim=0).item())
                deviations.append(((estimates - mean).square().sum(1).mean().sqrt() / mean.norm()).item())
            row = {"cosine": statistics.median(cosines), "deviation": statistics.median(deviations)}
            rows.append({"estimator": name, "samples": samples, **row})
    return rows


def main() -> None:
    rows = measure()
    print(f"{'estimator':<32}{'samples':>8}{'cosine':>9}{'deviation':>11}")
    for row in rows:
        print(f"{row['estimator']:<32}{row['samples']:>8}{row['cosine']:>9.3f}{row['deviation']:>11.2f}")
    out = RESULTS / f"topk-gradients-{datetime.date.today()}.json"
    out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
