"""What an encoder's frozen features are worth: probes of them, of a random encoder's features and of plain pixels."""

import json
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from vmae import checkpoint
from vmae.cache import content_hash
from vmae.dataset import ClipDataset, decoded, read_entries
from vmae.mae import VideoMAE, VideoMAEConfig
from vmae.masking import Grid
from vmae.optimisation import Optimisation, Precision, adamw, autocast, device_of, set_learning_rate
from vmae.tokens import TUBELET, check_clip, check_video
from vmae.video import Short, VideoError

FEATURES = ("pretrained", "random", "pixels")
PROBES = ("knn", "linear", "attentive")
POOLED: Grid = (8, 2, 2)  # the most tokens of a clip that the attentive probe sees: latent frames, rows, columns
SHARE = 0.9  # of each class's training videos that a seed draws
NEIGHBOURS, TEMPERATURE = 10, 0.07
FOLDS, L2 = 5, (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)  # from the strongest
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 100, 32, 1e-3, 0.05  # of the attentive probe
AT_ONCE = 1024  # clips to predict


@dataclass(frozen=True)
class ProbeRun:
    """Measure what a pretrained encoder's frozen features say about labelled videos."""

    model: Path
    """Folder of a pretrained model."""
    train: Path
    """List of `path label` lines, or csv with a header, that the probes are fitted to."""
    val: Path
    """Such a list, with other videos of the same classes, that the probes are tried on."""
    out: Path | None = None
    """File for the results, as json."""
    frames: tuple[int, ...] = (16, 32, 64, 128)
    """Frames per clip: the features are measured at each of these numbers."""
    size: int | None = None
    """Rows and columns, in pixels; the model's own if not given."""
    seeds: int = 3
    """How often every probe is fitted, each time to its own share of the training videos."""
    stride: int = 1
    """Take every n-th frame."""
    fps: float | None = None
    """Sample by time at this rate instead."""
    short: Short = "loop"
    """What to do with a video shorter than a clip: begin again at its start, skip it, or keep it as short as it is."""
    batch_size: int = 1
    """Clips to encode at once."""
    workers: int = 1
    """Processes that decode."""
    precision: Precision = "auto"
    """Of the encoders; auto is bf16, but fp32 on CPUs that only emulate bf16. Probes are fitted in float32 and 64."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def check(self) -> None:
        """Raise `ValueError` for a setting out of range."""
        if not self.frames or len(set(self.frames)) < len(self.frames):
            raise ValueError(f"frames: expected different numbers of frames, got {self.frames}")
        for frames in self.frames:
            check_clip(frames, TUBELET[1] if self.size is None else self.size)
        for name, least in (("seeds", 2), ("batch_size", 1), ("workers", 0)):  # one seed has no spread
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name, known in (("precision", get_args(Precision)), ("device", ("auto", "cpu", "cuda"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.out is not None:
            checkpoint.check_writable(self.out, "scores of a probe", _holds_scores)


def _holds_scores(path: Path) -> bool:
    try:
        return "scores" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


@dataclass(frozen=True)
class Spread:
    """A figure by seed."""

    values: list[float]
    mean: float
    std: float
    """With one degree of freedom less than seeds."""


@dataclass(frozen=True)
class Score:
    """How often one probe of one kind of features is right on the validation videos."""

    frames: int
    features: str
    """One of FEATURES."""
    probe: str
    """One of PROBES."""
    accuracy: Spread
    balanced: Spread
    """The mean over classes of the share of their videos that are recognised."""


@dataclass(frozen=True)
class Comparison:
    """The pretrained encoder's mean accuracy against that of other features."""

    frames: int
    probe: str
    against: str
    difference: float
    margin: float
    """What the difference must exceed, up or down, to count (see `compare`)."""
    verdict: Literal["above", "level with", "below"]


@dataclass(frozen=True)
class ProbeResult:
    """All shares are from 0 to 1."""

    run: dict[str, Any]
    """The settings, with the size that was used."""
    train: int
    """Videos used."""
    val: int
    classes: int
    skipped: list[str]
    """Why a video was left out, one line each."""
    floor: float
    """Accuracy of always naming the largest class of the validation videos."""
    balanced_floor: float
    """Balanced accuracy of always naming one class."""
    scores: list[Score]
    comparisons: list[Comparison]


class Pooled(NamedTuple):
    """What is kept of n clips.

    vector: float32 [n, D], what kNN and linear probe see; tokens: float32 [n, N, C], what the attentive probe sees.
    """

    vector: Tensor
    tokens: Tensor


# --- features ------------------------------------------------------------------------------------------------------


def pool(features: Tensor, grid: Grid, length: int | None = None) -> Pooled:
    """The mean of an encoder's features [B, T * H * W, D], and their means in the cells of a grid of at most POOLED.

    `length`: latent frames of the longest clip that this one is compared with. A shorter one gets as many cells, for
    the same probes, and they share its latent frames.
    """
    x = rearrange(features.float(), "b (t h w) d -> b d t h w", t=grid[0], h=grid[1], w=grid[2])
    t, h, w = map(min, (length or grid[0], *grid[1:]), POOLED)
    return Pooled(x.mean((2, 3, 4)), F.adaptive_avg_pool3d(x, (t, h, w)).flatten(2).transpose(1, 2))


def pool_pixels(clip: Tensor, length: int | None = None) -> Pooled:
    """A clip uint8 [B, 3, T, H, W] as the mean colours of at most 8 x 4 x 4 cells: as one vector of up to 384 numbers,
    and as tokens of 2 x 2 cells, so that both hold the same. `length` as for `pool`."""
    t, h, w = min(length or clip.shape[2] // TUBELET[0], POOLED[0]), 2 * POOLED[1], 2 * POOLED[2]
    x = F.adaptive_avg_pool3d(clip.float() / 255, (t, h, w))
    return Pooled(x.flatten(1), rearrange(x, "b c t (h i) (w j) -> b (t h w) (i j c)", i=2, j=2))


def random_encoder(config: VideoMAEConfig, seed: int) -> VideoMAE:
    """A model as it is before pretraining, drawn by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VideoMAE(config).eval()


class _Attempts(Dataset):
    """The clips of a dataset; an unusable video is returned as the text of its error."""

    def __init__(self, dataset: ClipDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.dataset[index][0]
        except VideoError as error:
            return str(error)


@torch.inference_mode()
def pooled(
    clip: Tensor | Sequence[Tensor], encoders: Sequence[VideoMAE], precision: str, length: int | None = None
) -> list[Pooled]:
    """What is kept of clips uint8 [B, 3, T, H, W]: of each encoder's features, then of the pixels; on the CPU.

    `length` as for `pool`; where clips differ in theirs, they are a sequence of [1, 3, T, H, W].
    """
    clips = [clip] if isinstance(clip, Tensor) else clip
    grids = [check_video(clip) for clip in clips]

    def kept(encoder: VideoMAE) -> list[Pooled]:
        features = [encoder.encode(clip)] if isinstance(clip, Tensor) else encoder.encode(clip)
        return [pool(x, grid, length) for x, grid in zip(features, grids, strict=True)]

    with autocast(clips[0].device, precision):
        kinds = [kept(encoder) for encoder in encoders]
    kinds.append([pool_pixels(clip, length) for clip in clips])
    return [Pooled(*(torch.cat(parts).cpu() for parts in zip(*kind, strict=True))) for kind in kinds]


def _encode(
    run: ProbeRun, dataset: ClipDataset, videos: list[int], encoders: Sequence[VideoMAE], progress: bool
) -> tuple[dict[int, list[Pooled]], dict[int, str]]:
    """What is kept of each of the videos' clips, as by `pooled`, and why others were left out."""
    device = device_of(run.device)
    kept: dict[int, list[Pooled]] = {}
    skipped: dict[int, str] = {}
    clips = decoded(_Attempts(dataset), workers=run.workers, batch_size=None, sampler=videos)
    frames = dataset.sampling["frames"]
    bar = tqdm(clips, desc=f"{frames} frames", total=len(videos), unit="clip", disable=not progress, mininterval=1)
    batch: dict[int, Tensor] = {}
    for video, item in zip(videos, bar, strict=True):
        if isinstance(item, str):
            skipped[video] = item
        else:
            batch[video] = item
        if batch and (len(batch) == run.batch_size or video == videos[-1]):
            kinds = pooled(_together(list(batch.values()), device), encoders, run.precision, frames // TUBELET[0])
            for row, key in enumerate(batch):
                kept[key] = [Pooled(kind.vector[row], kind.tokens[row]) for kind in kinds]
            batch = {}
    return kept, skipped


def _together(clips: list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    """Clips [3, T, H, W] on a device: as one tensor or, where they differ in length, as many of [1, 3, T, H, W]."""
    if len({clip.shape for clip in clips}) == 1:
        return torch.stack(clips).to(device)
    return [clip[None].to(device) for clip in clips]


# --- probes --------------------------------------------------------------------------------------------------------


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the last dimension's numbers; 1 in place of a deviation that is only rounding."""
    var, mean = torch.var_mean(x.flatten(0, -2), 0, correction=0)
    std = var.sqrt()
    return mean, torch.where(std > 1e-6 * mean.abs(), std, 1.0)


def by_class(labels: Tensor, seed: int) -> list[Tensor]:
    """The indices of each class's videos, of labels int64 [n], in an order drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    places = [(labels.cpu() == label).nonzero().flatten() for label in labels.unique().tolist()]
    return [index[torch.randperm(len(index), generator=generator)] for index in places]


def drawn(labels: Tensor, seed: int) -> Tensor:
    """The indices of SHARE of each class's videos, ascending; of two or more at least one is left out."""
    parts = []
    for index in by_class(labels, seed):
        left_out = max(1, round((1 - SHARE) * len(index))) if len(index) > 1 else 0
        parts.append(index[left_out:])
    return torch.cat(parts).sort().values


def knn(
    train: Tensor,
    labels: Tensor,
    val: Tensor,
    *,
    classes: int,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """The classes int64 [m] of vectors [m, D], by the nearest of labelled ones [n, D].

    Vectors are standardised by the labelled ones' moments and compared by their cosine; each of the nearest (10, or all
    if there are fewer) votes for its class with weight exp(cosine / temperature).

    Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018), section
    3.4; DINO (ICCV 2021), section 3.2, which takes 20 neighbours.
    """
    mean, std = moments(train)
    train = F.normalize((train - mean) / std, dim=1)
    predicted = []
    for part in val.split(AT_ONCE):
        cosine = F.normalize((part - mean) / std, dim=1) @ train.T
        nearest = cosine.topk(min(neighbours, len(train)), dim=1)
        votes = cosine.new_zeros(len(part), classes)
        votes.scatter_add_(1, labels[nearest.indices], (nearest.values / temperature).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


class Linear(NamedTuple):
    """A linear classifier of standardised vectors, in float64."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    """[D, classes]"""
    bias: Tensor

    def logits(self, x: Tensor) -> Tensor:
        return ((x.double() - self.mean) / self.std) @ self.weight + self.bias


def fit_linear(x: Tensor, labels: Tensor, *, classes: int, l2: float) -> Linear:
    """Multinomial logistic regression on vectors [n, D], standardised by their own moments.

    Minimises mean cross-entropy + l2 / 2 * |weight|^2, which has one minimum, by L-BFGS on all vectors at once.
    """
    mean, std = moments(x.double())
    x = (x.double() - mean) / std
    weight = x.new_zeros(x.shape[1], classes, requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-6, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return Linear(mean, std, weight.detach(), bias.detach())


def choose_l2(x: Tensor, labels: Tensor, *, classes: int, seed: int) -> float:
    """The strength out of L2 that is right most often in stratified cross-validation; of equals the strongest.

    Each fold is standardised without the vectors that it holds out.
    """
    order = torch.cat(by_class(labels, seed)).to(x.device)
    folds = [order[fold::FOLDS] for fold in range(min(FOLDS, len(order)))]
    right = dict.fromkeys(L2, 0)
    for held in folds:
        rest = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill_(0, held, False)
        for l2 in L2:
            fitted = fit_linear(x[rest], labels[rest], classes=classes, l2=l2)
            right[l2] += int((fitted.logits(x[held]).argmax(1) == labels[held]).sum())
    return max(L2, key=lambda l2: right[l2])


def linear(train: Tensor, labels: Tensor, val: Tensor, *, classes: int, seed: int) -> Tensor:
    """The classes int64 [m] of vectors [m, D], by logistic regression on labelled ones [n, D]; the seed draws folds."""
    l2 = choose_l2(train, labels, classes=classes, seed=seed)
    return fit_linear(train, labels, classes=classes, l2=l2).logits(val).argmax(1)


class AttentiveProbe(nn.Module):
    """One query's multi-head attention over a clip's tokens float32 [B, N, C], then a linear classifier.

    The query times a head's keys is linear in the tokens, so that one vector of C numbers stands for both, and a head's
    values can be computed after the weighted mean instead of before: the same function as with all matrices, at 1 / N
    of the work. Each head also learns a weight for each place, since pixels say nothing about theirs. Tokens are
    standardised by the training tokens' moments, not by a LayerNorm, which would take a pixel token's brightness.

    Source: V-JEPA (Bardes et al., TMLR 2024), section 4.3, without its MLP; Psomas et al., "Attention, please!" (ICLR
    2026), for the equivalence.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tokens: Tensor, *, classes: int, width: int, heads: int, generator: torch.Generator):
        super().__init__()
        n, channels = tokens.shape[1:]
        for name, moment in zip(("mean", "std"), moments(tokens), strict=True):
            self.register_buffer(name, moment)
        self.keys = nn.Parameter(0.02 * torch.randn(heads, channels, generator=generator))
        self.places = nn.Parameter(torch.zeros(heads, n))
        self.values = nn.Parameter(torch.randn(heads, channels, width // heads, generator=generator) / channels**0.5)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def attended(self, tokens: Tensor) -> Tensor:
        """What the heads read, [B, width]."""
        x = (tokens - self.mean) / self.std
        weights = (torch.einsum("bnc,hc->bhn", x, self.keys) + self.places).softmax(2)
        return torch.einsum("bhc,hcd->bhd", weights @ x, self.values).flatten(1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.attended(tokens)))


def fit_attentive(
    tokens: Tensor, labels: Tensor, *, classes: int, width: int, heads: int, seed: int, device: torch.device | str
) -> AttentiveProbe:
    """An attentive probe of tokens [n, N, C], trained by AdamW for EPOCHS passes with warm-up and cosine decay.

    The seed draws the first weights and the order of the clips.
    """
    generator = torch.Generator().manual_seed(seed)
    probe = AttentiveProbe(tokens, classes=classes, width=width, heads=heads, generator=generator).to(device)
    steps = EPOCHS * math.ceil(len(tokens) / BATCH)
    options = Optimisation(steps=steps, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, beta2=0.999)
    optimizer = adamw(probe, options)
    step = 0
    for _ in range(EPOCHS):
        for part in torch.randperm(len(tokens), generator=generator).split(BATCH):
            set_learning_rate(optimizer, step, options)
            optimizer.zero_grad()
            F.cross_entropy(probe(tokens[part].to(device)), labels[part].to(device)).backward()
            optimizer.step()
            step += 1
    return probe


def attentive(
    train: Tensor, labels: Tensor, val: Tensor, *, classes: int, width: int, heads: int, seed: int,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """The classes int64 [m] of tokens [m, N, C], by an attentive probe of labelled ones [n, N, C]."""
    probe = fit_attentive(train, labels, classes=classes, width=width, heads=heads, seed=seed, device=device)
    with torch.no_grad():
        return torch.cat([probe(part.to(device)).argmax(1).cpu() for part in val.split(AT_ONCE)])


# --- the measurement -----------------------------------------------------------------------------------------------


def read_lists(train: Path, val: Path) -> tuple[list[Path], Tensor, int]:
    """The videos of both lists, their classes int64 [n] numbered from 0, and how many are for training: the first ones.

    Raises:
        ValueError: a video has no label or is in both lists, a list has one class only, or a class of the validation
            list is not in the training list.
    """
    lists = {"train": read_entries(train), "val": read_entries(val)}
    for name, entries in lists.items():
        for path, label in entries:
            if label < 0:
                raise ValueError(f"{name}: expected a label from 0 for every video, got none or {label} for {path}")
        if len({label for _, label in entries}) < 2:
            raise ValueError(f"{name}: expected videos of two classes or more, got only label {entries[0][1]}")
    known = sorted({label for _, label in lists["train"]})
    if unknown := sorted({label for _, label in lists["val"]} - set(known)):
        raise ValueError(f"val: expected labels of the training videos, got {', '.join(map(str, unknown))}")
    entries = lists["train"] + lists["val"]
    seen: dict[str, int] = {}
    for number, content in enumerate(_identities([path for path, _ in entries])):
        first = seen.setdefault(content, number)
        (path, label), (before, known_label) = entries[number], entries[first]
        if first < len(lists["train"]) <= number:
            raise ValueError(f"val: expected videos that are not in the training list, got {path}, there as {before}")
        if label != known_label:
            raise ValueError(f"train, val: expected one label for a video, got {known_label} and {label} for {path}")
    labels = torch.tensor([known.index(label) for _, label in entries])
    return [path for path, _ in entries], labels, len(lists["train"])


def _identities(paths: Sequence[Path]) -> list[str]:
    """For each file what only its copies have too. Read are those alone whose size another one has."""
    sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
    often = Counter(sizes)
    return [
        content_hash(path) if size >= 0 and often[size] > 1 else str(path.resolve())
        for path, size in zip(paths, sizes, strict=True)
    ]


def _check_left(labels: Tensor, trained: int, skipped: dict[int, str]) -> None:
    """Raise `VideoError` unless both lists still have all their classes."""
    left = torch.tensor([video not in skipped for video in range(len(labels))])
    for name, part in (("train", slice(trained)), ("val", slice(trained, None))):
        before, after = labels[part].unique(), labels[part][left[part]].unique()
        if len(after) < len(before):
            raise VideoError(
                f"{name}: expected a video that can be used of each of the {len(before)} classes, found some of "
                f"{len(after)}; one that cannot: {next(iter(skipped.values()))}"
            )


def spread(values: Tensor) -> Spread:
    return Spread(values.tolist(), float(values.mean()), float(values.std(correction=1)))


def balanced_accuracy(right: Tensor, labels: Tensor) -> Tensor:
    """The mean over the classes in labels int64 [n] of the share that is right, of bools [S, n]; float64 [S]."""
    return torch.stack([right[:, labels == label].double().mean(1) for label in labels.unique()]).mean(0)


def compare(right: Tensor, other: Tensor) -> tuple[float, float]:
    """By how much more often one is right than another on the same videos, and what that must exceed to count.

    Both are bools [S, n], by seed and video. The margin is the larger of two: the sum of both standard deviations over
    seeds, and two standard errors of the difference over videos, in pairs: the seeds do not tell how much depends on
    which videos the list happens to hold.
    """
    right, other = right.double(), other.double()
    paired = right.mean(0) - other.mean(0)
    seeds = right.mean(1).std(correction=1) + other.mean(1).std(correction=1)
    videos = 2 * paired.std(correction=1) / len(paired) ** 0.5
    return float(paired.mean()), float(torch.maximum(seeds, videos))


def verdict(difference: float, margin: float) -> Literal["above", "level with", "below"]:
    if abs(difference) <= margin:
        return "level with"
    return "above" if difference > 0 else "below"


def predicted(
    train: Pooled, labels: Tensor, val: Pooled, *, classes: int, width: int, heads: int, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """The classes int64 [m] of validation clips by each of PROBES, fitted to training clips with labels int64 [n]."""
    vector, known, unknown = (x.to(device) for x in (train.vector, labels, val.vector))
    attended = attentive(
        train.tokens, labels, val.tokens, classes=classes, width=width, heads=heads, seed=seed, device=device
    )
    return {
        "knn": knn(vector, known, unknown, classes=classes).cpu(),
        "linear": linear(vector, known, unknown, classes=classes, seed=seed).cpu(),
        "attentive": attended,
    }


def _stacked(clips: list[Pooled]) -> Pooled:
    return Pooled(torch.stack([clip.vector for clip in clips]), torch.stack([clip.tokens for clip in clips]))


def probe(run: ProbeRun, *, progress: bool = True) -> ProbeResult:
    """Fit kNN, a linear and an attentive probe to features of clips from the middle of the videos, at each number of
    frames: of the pretrained encoder, of randomly initialised ones of its configuration, and of pixels.

    Each seed draws SHARE of each class's training videos, the same ones for all that is compared; it also initialises
    its own random encoder and attentive probe. Positions are computed for any number of frames, but the encoder was
    pretrained at one. A video that cannot be used at some number of frames is left out at all of them.

    Each clip is decoded once, for 1 + seeds encoders. In memory there remain the mean of its features and at most
    8 x 2 x 2 means of parts: (1 + seeds) * 33 * D * 4 bytes for each video and number of frames, 0.4 MB for ViT-B.

    Raises:
        ValueError: a setting is out of range, the lists are not as `read_lists` wants them, or the folder holds no
            model.
        VideoError: some class has no video left that can be used.
    """
    run.check()
    paths, labels, trained = read_lists(run.train, run.val)
    device = device_of(run.device)
    model = checkpoint.load(VideoMAE, run.model, device)
    config, size = model.config, model.config.size if run.size is None else run.size
    encoders = [model, *(random_encoder(config, seed).to(device) for seed in range(run.seeds))]
    kept: dict[int, dict[int, list[Pooled]]] = {}
    skipped: dict[int, str] = {}
    for frames in run.frames:
        dataset = ClipDataset(
            run.train, frames=frames, size=size, stride=run.stride, fps=run.fps, short=run.short, start="center"
        )
        dataset.entries = list(zip(paths, labels.tolist(), strict=True))
        videos = [video for video in range(len(paths)) if video not in skipped]
        kept[frames], more = _encode(run, dataset, videos, encoders, progress)
        skipped |= more
        _check_left(labels, trained, skipped)
    videos = [video for video in range(len(paths)) if video not in skipped]
    train, val = [v for v in videos if v < trained], [v for v in videos if v >= trained]
    right: dict[tuple[int, str, str], list[Tensor]] = {}
    rounds = [(frames, features, seed) for frames in run.frames for features in FEATURES for seed in range(run.seeds)]
    for frames, features, seed in tqdm(rounds, desc="probes", disable=not progress, mininterval=1):
        kind = {"pretrained": 0, "random": 1 + seed, "pixels": -1}[features]
        mine = [train[i] for i in drawn(labels[train], seed).tolist()]
        guesses = predicted(
            _stacked([kept[frames][video][kind] for video in mine]),
            labels[mine],
            _stacked([kept[frames][video][kind] for video in val]),
            classes=int(labels.max()) + 1,
            width=config.width,
            heads=config.heads,
            seed=seed,
            device=device,
        )
        for name, guess in guesses.items():
            right.setdefault((frames, features, name), []).append(guess == labels[val])
    result = _result(run, size, labels[train], labels[val], list(skipped.values()), right)
    if run.out is not None:
        checkpoint.write_text(run.out, json.dumps(asdict(result), indent=2) + "\n")
    return result


def _result(
    run: ProbeRun,
    size: int,
    train: Tensor,
    val: Tensor,
    skipped: list[str],
    right: dict[tuple[int, str, str], list[Tensor]],
) -> ProbeResult:
    """From the labels of both lists and what was right, by seed, for each number of frames, features and probe."""
    hits = {key: torch.stack(seeds) for key, seeds in right.items()}
    scores = [
        Score(*key, accuracy=spread(hit.double().mean(1)), balanced=spread(balanced_accuracy(hit, val)))
        for key, hit in hits.items()
    ]
    comparisons = []
    for frames in run.frames:
        for name in PROBES:
            for against in FEATURES[1:]:
                difference, margin = compare(hits[frames, "pretrained", name], hits[frames, against, name])
                comparisons.append(Comparison(frames, name, against, difference, margin, verdict(difference, margin)))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(run).items()}
    counts = val.unique(return_counts=True)[1]
    return ProbeResult(
        run=settings | {"size": size},
        train=len(train),
        val=len(val),
        classes=len(train.unique()),
        skipped=skipped,
        floor=int(counts.max()) / len(val),
        balanced_floor=1 / len(counts),
        scores=scores,
        comparisons=comparisons,
    )


NOTES = (
    "± is the standard deviation over seeds: each draws {share:.0%} of each class's training videos and, for random, "
    "an encoder. knn and linear see the mean of an encoder's tokens, attentive sees the means of at most {t} x {h} x "
    "{w} parts (frames, rows, columns); pixels are the mean colours of at most {t} x {hh} x {ww} parts of the clip.",
    "pretrained counts as above (below) others if its mean accuracy is higher (lower) by more than the margin, the "
    "larger of: the sum of the two standard deviations, and two standard errors of the difference over the validation "
    "videos.",
)


def table(result: ProbeResult) -> str:
    """A result as text: accuracies in percent, then where the pretrained encoder is above the others."""
    run = result.run
    lines = [
        f"{run['model']}: {result.train} training and {result.val} validation videos of {result.classes} classes, "
        f"{run['seeds']} seeds, {run['size']} x {run['size']} pixels"
    ]
    lines += [f"skipped: {reason}" for reason in result.skipped]
    scores = {(score.frames, score.features, score.probe): score for score in result.scores}
    for title, figure, constant, floor in (
        ("accuracy, %", "accuracy", "the largest class", result.floor),
        ("balanced accuracy, %", "balanced", "any one class", result.balanced_floor),
    ):
        lines += ["", f"{title:<24}" + "".join(f"{f'{frames} frames':>14}" for frames in run["frames"])]
        lines.append(f"{constant:<24}" + f"{100 * floor:>8.1f}{'':6}" * len(run["frames"]))
        for features in FEATURES:
            for name in PROBES:
                row = [getattr(scores[frames, features, name], figure) for frames in run["frames"]]
                cells = "".join(f"{f'{100 * cell.mean:.1f} ± {100 * cell.std:.1f}':>14}" for cell in row)
                lines.append(f"{features:<12}{name:<12}{cells}")
    t, h, w = POOLED
    notes = (note.format(share=SHARE, t=t, h=h, w=w, hh=2 * h, ww=2 * w) for note in NOTES)
    lines += ["", *(textwrap.fill(note, 80) for note in notes), ""]
    for frames in run["frames"]:
        for name in PROBES:
            words = [
                f"{c.verdict} {c.against} ({100 * c.difference:+.1f}, margin {100 * c.margin:.1f})"
                for c in result.comparisons
                if (c.frames, c.probe) == (frames, name)
            ]
            lines.append(f"{frames} frames, {name}: pretrained is {' and '.join(words)}")
    return "\n".join(line.rstrip() for line in lines)
