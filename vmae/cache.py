"""What frozen models say of a view of a video, computed once and stored: a folder of shards.

A shard is a safetensors file with many entries, written whole or not at all under a name of its own, so any number of
processes can fill one folder. An entry is found by its key alone: a hash of everything that it depends on.
"""

import contextlib
import functools
import hashlib
import json
import time
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vmae import checkpoint
from vmae.video import View

FORMAT = "vmae cache 1"
DECODING = 2  # counts changes of what a view of a file shows: entries from before are not found again


class CacheError(ValueError):
    """A folder that cannot serve as a cache, or not this one: one line that names the file."""


def entry_key(path: Path, view: View, source: str) -> str:
    """Of what a source says of a view of a file: the same only for the same bytes, view and source."""
    facts = [DECODING, content_hash(path), view.frames, view.times, view.crop, view.size, view.flip, source]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def content_hash(path: Path) -> str:
    """Of a file's bytes."""
    status = path.stat()
    return _content_hash(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=65536)
def _content_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_hash(state: dict[str, Tensor], about: Any = None) -> str:
    """Of a model's weights, and of whatever else decides what it computes, as json writes it."""
    digest = hashlib.sha256(json.dumps(about, default=str).encode())
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(checkpoint.bytes_of(value.cpu()))
    return digest.hexdigest()[:32]


class Cache:
    """The entries in a folder: tuples of tensors by key. `add` collects entries; `flush` writes them as a shard."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise CacheError(f"{self.folder}: expected a folder for the cache, found a file")
        try:
            checkpoint.check_writable(self.folder / "shard")
        except ValueError as error:
            raise CacheError(str(error)) from error
        self._places: dict[str, tuple[Path, int, list[int]]] = {}  # key -> shard, number of tensors, their checksums
        self._known: set[str] = set()
        self._new: dict[str, tuple[Tensor, ...]] = {}
        self._opened = functools.lru_cache(maxsize=16)(_open)
        for left in self.folder.glob(".*.safetensors.*.part"):  # by a writer that was killed, if it is old
            with contextlib.suppress(OSError):
                if left.stat().st_mtime < time.time() - 3600:
                    left.unlink()
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:  # for processes that are not forked: files are opened anew
        return {**self.__dict__, "_opened": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opened=functools.lru_cache(maxsize=16)(_open))

    def refresh(self) -> None:
        """Look for shards that others have written since.

        Raises:
            CacheError: a safetensors file in the folder is no shard of a cache, or is damaged.
        """
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._known:
                for key, checksums in _contents(path).items():
                    self._places[key] = (path, len(checksums), checksums)
                self._known.add(path.name)

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._new

    def __len__(self) -> int:
        return len(self._places | self._new)

    def get(self, key: str) -> tuple[Tensor, ...]:
        """An entry's tensors.

        Raises:
            KeyError: there is no such entry.
            CacheError: its shard is damaged or gone.
        """
        if key in self._new:
            return tuple(tensor.clone() for tensor in self._new[key])
        path, count, checksums = self._places[key]
        from safetensors import SafetensorError

        try:
            shard = self._opened(path)
            tensors = tuple(shard.get_tensor(f"{key}.{i}").clone() for i in range(count))  # not the file's own memory
        except (OSError, SafetensorError) as error:
            raise CacheError(f"{path}: damaged or gone ({error}); remove it, and fill the cache again") from error
        if [checkpoint.checksum(tensor) for tensor in tensors] != checksums:
            raise CacheError(f"{path}: damaged: an entry is not what was written; remove it, and fill the cache again")
        return tensors

    def add(self, key: str, tensors: Sequence[Tensor]) -> None:
        """Collect an entry; it is stored by the next `flush`."""
        self._new[key] = tuple(tensor.detach().cpu().contiguous().clone() for tensor in tensors)

    @property
    def unwritten(self) -> int:
        return len(self._new)

    def flush(self) -> None:
        """Write the entries collected since the last time, if there are any.

        Raises:
            OSError: the disk is full, or the folder cannot be written; the entries stay collected.
        """
        from safetensors.torch import save_file

        if not self._new:
            return
        tensors = {f"{key}.{i}": tensor for key, entry in self._new.items() for i, tensor in enumerate(entry)}
        entries = json.dumps(
            {key: [checkpoint.checksum(tensor) for tensor in entry] for key, entry in self._new.items()}
        )
        metadata = {"format": FORMAT, "entries": entries, "checksum": str(zlib.crc32(entries.encode()))}
        with checkpoint.replacing(self.folder / f"{uuid.uuid4().hex}.safetensors") as temporary:
            save_file(tensors, temporary, metadata=metadata)
        self._new = {}
        self.refresh()


def _open(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, "pt")


def _contents(path: Path) -> dict[str, list[int]]:
    """A shard's keys, and the checksums of each entry's tensors, from its header."""
    from safetensors import SafetensorError

    try:
        with _open(path) as shard:
            metadata = shard.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{path}: damaged ({error}); remove it, and fill the cache again") from error
    if metadata.get("format") != FORMAT:
        raise CacheError(f"{path}: expected a shard of a cache ({FORMAT!r}), found {metadata.get('format')!r}")
    entries = metadata.get("entries", "")
    if str(zlib.crc32(entries.encode())) != metadata.get("checksum"):
        raise CacheError(f"{path}: damaged: its header is not what was written; remove it, and fill the cache again")
    return json.loads(entries)
