"""What pretraining needs to know of a clip beside its pixels: tokens and scores, from frozen models or from a cache."""

import copy
import functools
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from vmae.cache import Cache, CacheError, entry_key, state_hash
from vmae.dataset import Batch, ClipDataset, Extras, decoded
from vmae.flow import flow_scores
from vmae.mae import everest_scores
from vmae.tokenizer import AdaptiveTokenizer, latents_of
from vmae.tokens import Tokens, check_video
from vmae.video import VideoError, View, load_view

FLUSH_SECONDS, FLUSH_ENTRIES = 30, 256  # between shards


@dataclass(frozen=True)
class Source:
    """Something frozen that says tensors [B, N] of clips uint8 [B, 3, T, H, W]."""

    name: str
    """Of all that its results depend on, other than the clip: part of a cache's keys."""
    count: int
    """Of tensors."""
    compute: Callable[[Tensor], tuple[Tensor, ...]]
    decoding: bool = False
    """Whether it runs where clips are decoded, rather than on the run's device."""


def tokenizer_source(
    tokenizer: AdaptiveTokenizer, context: Callable[[], AbstractContextManager], precision: str, window: int | None
) -> Source:
    """Codes int32 and scores float32 of a frozen tokenizer, computed under a context such as autocast."""
    device = next(tokenizer.parameters()).device
    tokenizer.stream(window=window)  # refuses a window that it cannot have

    @torch.no_grad()
    def compute(clip: Tensor) -> tuple[Tensor, ...]:
        with context():
            tokens = tokenizer.encode(clip.to(device, non_blocking=True), window=window)
        return tokens.codes, tokens.scores.float()

    weights = state_hash(tokenizer.state_dict(), tokenizer.config)
    return Source(f"tokenizer {weights} window {window} {precision}", 2, compute)


def flow_source() -> Source:
    return Source("flow DIS medium", 1, _flow, decoding=True)


def _flow(clip: Tensor) -> tuple[Tensor, ...]:
    return (flow_scores(clip),)


def everest_source(embedding: nn.Linear) -> Source:
    """Scores by a patch embedding as it is now."""
    frozen = copy.deepcopy(embedding).requires_grad_(False)
    device = frozen.weight.device
    return Source(
        f"everest {state_hash(frozen.state_dict())}", 1, lambda clip: (everest_scores(clip.to(device), frozen),)
    )


class Targets:
    """Tokens and scores of clips, each where there is a source of it: computed as clips come, or read from a cache."""

    def __init__(
        self, tokens: Source | None, scores: Source | None, *, levels: tuple[int, ...] = (), cache: Cache | None = None
    ):
        self.tokens, self.scores, self.levels, self.cache = tokens, scores, levels, cache
        self.sources = [source for source in (tokens, scores) if source]

    @property
    def extras(self) -> Extras | None:
        """What is to be done where clips are decoded."""
        if self.cache is not None and self.sources:
            return functools.partial(_stored, self.cache, [source.name for source in self.sources])
        computed = [source.compute for source in self.sources if source.decoding]
        return functools.partial(_computed, computed) if computed else None

    def of(self, batch: Batch, device: torch.device) -> tuple[Tokens | None, Tensor | None]:
        """The tokens of a batch and the scores [B, N], on a device."""
        extras = iter(batch.extras)
        said = {
            source: [next(extras) for _ in range(source.count)]
            if self.cache is not None or source.decoding
            else source.compute(batch.clips)
            for source in self.sources
        }
        tokens = scores = None
        if self.tokens:
            codes, own = (tensor.to(device, non_blocking=True) for tensor in said[self.tokens])
            tokens = Tokens(latents_of(codes, self.levels), codes, own, check_video(batch.clips))
        if self.scores:
            scores = said[self.scores][0].to(device, non_blocking=True)
        return tokens, scores

    def fill(self, dataset: ClipDataset, *, views: int, workers: int, part: tuple[int, int] = (0, 1)) -> int:
        """Store what is missing in the cache of the first `views` views of each video; returns how many were missing.

        Any number of processes may do so at once, in one folder: `part` as for `batches`, or each on its own. A kill
        loses what was computed within the last half minute.
        """
        if self.cache is None or not self.sources:
            return 0
        cache = self.cache
        items = [(index, number) for number in range(views) for index in range(len(dataset))][part[0] :: part[1]]
        random.Random(time.time_ns()).shuffle(items)  # several that fill one cache seldom meet
        missing_views = _Missing(dataset, cache, [source.name for source in self.sources], items)
        computed, written = 0, time.monotonic()
        bar = tqdm(total=len(items), desc=cache.folder.name, unit="view", disable=part[0] > 0, dynamic_ncols=True)
        with bar:
            for item in decoded(missing_views, workers=workers, batch_size=None):
                if isinstance(item, str):
                    bar.write(f"skipped: {item}", file=sys.stderr)
                elif item is not None:
                    keys, clip = item
                    missing = [(key, s) for key, s in zip(keys, self.sources, strict=True) if key not in cache]
                    for key, source in missing:
                        cache.add(key, [tensor[0] for tensor in source.compute(clip[None])])
                    computed += bool(missing)
                    if cache.unwritten >= FLUSH_ENTRIES or time.monotonic() > written + FLUSH_SECONDS:
                        cache.flush()
                        written = time.monotonic()
                bar.update()
        cache.flush()
        return computed


def _stored(cache: Cache, sources: Sequence[str], path: Path, view: View, clip: Tensor) -> tuple[Tensor, ...]:
    try:
        return tuple(tensor for source in sources for tensor in cache.get(entry_key(path, view, source)))
    except KeyError:
        raise CacheError(f"{cache.folder}: has no entry for this view of {path}; fill it anew") from None


def _computed(computes: Sequence[Callable], path: Path, view: View, clip: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor[0] for compute in computes for tensor in compute(clip[None]))


class _Missing(Dataset):
    """Views that a cache lacks: their keys, one per source, and the clip; None where it has them all."""

    def __init__(self, dataset: ClipDataset, cache: Cache, sources: list[str], items: list[tuple[int, int]]):
        self.dataset, self.cache, self.sources, self.items = dataset, cache, sources, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int) -> tuple[list[str], Tensor] | str | None:
        index, number = self.items[item]
        path, _ = self.dataset.entries[index]
        try:
            view = self.dataset.view(index, number)
            keys = [entry_key(path, view, source) for source in self.sources]
            if all(key in self.cache for key in keys):
                return None
            return keys, load_view(path, view)[0]
        except VideoError as error:
            return str(error)
