"""Batches on their way to a run: on its device, and with how long the run waited for them."""

import os
import time
from collections.abc import Iterator

import torch

from vmae.dataset import Batch

MUCH_WAITING = 0.1  # share of the time, from which on there is advice


class Loader:
    """Batches on a device. The first one is fetched at once."""

    def __init__(self, clips: Iterator[Batch], device: torch.device, *, workers: int):
        self.clips, self.device, self.workers = clips, device, workers
        self.waited = 0.0
        """Seconds, in this step."""
        self.skipped: list[str] = []
        """Why videos were left out in this step, one line each."""
        self._named: set[str] = set()
        self._frames = self._decoding = self._seconds = self._waiting = 0.0
        self._first: Batch | None = next(clips)

    def next(self) -> Batch:
        begin = time.perf_counter()
        batch, self._first = (self._first or next(self.clips)).to(self.device), None
        self.waited += time.perf_counter() - begin
        self.skipped += batch.skipped
        self._frames += batch.clips.shape[0] * batch.clips.shape[2]
        self._decoding += batch.seconds
        return batch

    def told(self) -> list[str]:
        """Why videos were left out in this step, where that is news."""
        news = [reason for reason in dict.fromkeys(self.skipped) if reason not in self._named]
        self._named.update(news)
        return news

    def next_step(self, seconds: float) -> None:
        """The step took so many seconds, waiting included."""
        self._seconds += seconds
        self._waiting += self.waited
        self.waited, self.skipped = 0.0, []

    @property
    def speed(self) -> float:
        """Frames per second that all decoding processes together can manage, by what they took so far."""
        return max(self.workers, 1) * self._frames / max(self._decoding, 1e-9)

    def report(self, size: int) -> str:
        """How fast clips of so many rows came, and what to do about it."""
        cores = os.cpu_count() or 1
        share = self._waiting / max(self._seconds, 1e-9)
        several = f"{self.workers} decoding processes manage"
        who = {0: "decoding between the steps manages", 1: "the decoding process manages"}.get(self.workers, several)
        text = f"clips: {who} {self.speed:.0f} frames/s; {share:.0%} of the time was spent waiting for them"
        if share <= MUCH_WAITING:
            return text
        more = f"more --workers ({self.workers} now, {cores} cores here), " if self.workers < cores else ""
        return f"{text}. What helps: {more}videos stored at {size} pixels on the short side and with more keyframes"
