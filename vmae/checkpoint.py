"""Files that are either whole or not there, and models as a folder of safetensors and json."""

import contextlib
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from vmae.distributed import whole, world

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:  # the models need torch alone; only saving and loading needs the rest

    class PyTorchModelHubMixin:  # type: ignore[no-redef]
        pass


CONFIG, WEIGHTS, RUN, LOG = "config.json", "model.safetensors", "run.json", "log.jsonl"


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it takes path's name if the block succeeds, else it is removed."""
    from safetensors import SafetensorError

    check_writable(path)
    path = Path(path).resolve()  # a link is followed, not replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes files that nobody else can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # a full disk, most of all
        raise OSError(f"{path}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path, what: str = "", holds: Callable[[Path], bool] | None = None) -> None:
    """Raise `ValueError` unless a file can take this place: nothing is there, or a file, and a folder above it.

    With `holds` only a file of which it is true may be there, which holds `what`: an earlier result, say, but neither a
    model nor somebody's video.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        found = "a directory" if path.is_dir() else "a device or pipe"
        raise ValueError(f"{path}: expected a file to write, found {found}")
    if holds and path.exists() and not holds(path):
        raise ValueError(f"{path}: expected a new file, or {what} to replace, found another file")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{path}: expected {above} to be a folder, found a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: expected a folder to write to, {above} is read-only")


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class Saved(PyTorchModelHubMixin):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` for a model built from `config`, a dataclass.

    Weights are safetensors only: nothing is unpickled, wherever a file comes from.
    """

    config: Any

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self, save_directory)

    @classmethod
    def _from_pretrained(
        cls, *, model_id, revision, cache_dir, force_download, local_files_only, token,
        map_location="cpu", strict=True, proxies=None, resume_download=None, **model_kwargs,
    ):  # fmt: skip
        from huggingface_hub import hf_hub_download
        from safetensors.torch import load_model

        model = cls(**model_kwargs)
        if Path(model_id).is_dir():
            file = str(Path(model_id) / WEIGHTS)
        else:
            file = hf_hub_download(
                model_id, WEIGHTS, revision=revision, cache_dir=cache_dir, force_download=force_download, token=token,
                local_files_only=local_files_only,
            )  # fmt: skip
        assert isinstance(model, nn.Module)
        load_model(model, file, strict=strict, device=str(map_location))
        return model.to(torch.device(map_location)).eval()


def save(model: Any, directory: str | Path) -> None:
    """Write a model's configuration, then its weights; a kill at any moment leaves each of the two whole.

    Of several processes all must call this, and the first one writes.
    """
    from safetensors.torch import save_file

    tensors = {name: whole(value).contiguous() for name, value in model.state_dict().items()}
    if world().rank > 0:
        return
    directory = Path(directory)
    config = {"model": type(model).__name__, **asdict(model.config)}
    write_text(directory / CONFIG, json.dumps(config, indent=2) + "\n")
    with replacing(directory / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


STATE = "state-{:08d}.safetensors"
STATES_KEPT = 2


def save_state(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], directory: Path, step: int) -> None:
    """Write all that a run needs to go on after `step` steps: one file, whole or not there. Older ones but one go."""
    from safetensors.torch import save_file

    tensors = {name: value.contiguous() for name, value in sorted(tensors.items())}
    text = json.dumps(facts)
    metadata = {"facts": text, "checksum": str(_checksum_of_state(tensors, text))}
    with replacing(directory / STATE.format(step)) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    every = states(directory)
    now = every.index(directory / STATE.format(step)) + 1
    # Later ones than this are damaged, or it would not have been reached again.
    for path in (*every[:now][:-STATES_KEPT], *every[now:]):
        path.unlink()


def load_state(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What the last `save_state` wrote; if that is damaged, a line on stderr says so and the one before is taken.

    Returns None where there is none.

    Raises:
        ValueError: there are some, and all are damaged.
    """
    from safetensors import SafetensorError, safe_open

    complaints = []
    for path in reversed(states(directory)):
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            if int(metadata["checksum"]) != _checksum_of_state(tensors, metadata["facts"]):
                raise ValueError("its contents are not what was written")
            return tensors, json.loads(metadata["facts"])
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            complaints.append(f"{path}: damaged: {' '.join(str(error).split())[:200]}")
            print(f"{complaints[-1]}; looking for an earlier one", file=sys.stderr)
    if complaints:
        raise ValueError(f"{complaints[0]}; no earlier one can be read, so the run cannot go on: use --overwrite")
    return None


def states(directory: Path) -> list[Path]:
    """The files of `save_state`, by step."""
    return sorted(directory.glob("state-*.safetensors"))


def clear_states(directory: Path) -> None:
    for path in states(directory):
        path.unlink()


def _checksum_of_state(tensors: Mapping[str, Tensor], facts: str) -> int:
    value = zlib.crc32(facts.encode())
    for name, tensor in tensors.items():
        value = checksum(tensor, zlib.crc32(name.encode(), value))
    return value


def checksum(tensor: Tensor, value: int = 0) -> int:
    """Of a CPU tensor's type, shape and bytes; `value` is the checksum of what came before."""
    about = f"{tensor.dtype} {list(tensor.shape)} "
    return zlib.crc32(bytes_of(tensor), zlib.crc32(about.encode(), value))


def bytes_of(tensor: Tensor) -> memoryview:
    """What a tensor on the CPU holds."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


T = TypeVar("T", bound=Saved)


def load(cls: type[T], directory: str | Path, device: str | torch.device = "cpu") -> T:
    """Read a model from a folder, for inference.

    Raises:
        ValueError: a file is missing or damaged, or belongs to another model; the message names the folder.
    """
    with _complaints(cls, directory):
        _read_config(cls, directory)
        model = cls.from_pretrained(directory, map_location=str(device))
        assert isinstance(model, nn.Module)
        for name, value in model.state_dict().items():
            if not value.isfinite().all():
                raise ValueError(f"expected numbers, found NaN or infinity in {name}")
        return model


def load_config(cls: type[Saved], directory: str | Path) -> Any:
    """Read a model's configuration from its folder; errors as of `load`."""
    with _complaints(cls, directory):
        return get_type_hints(cls.__init__)["config"](**_read_config(cls, directory))


def _read_config(cls: type[Saved], directory: str | Path) -> dict[str, Any]:
    config = json.loads((Path(directory) / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"expected {CONFIG} to hold settings by name, found {config!r}")
    if (found := config.pop("model", None)) != cls.__name__:
        raise ValueError(f"expected {cls.__name__}, found {found}")
    known = {field.name for field in fields(get_type_hints(cls.__init__)["config"])}
    if unknown := config.keys() - known:
        raise ValueError(f"its configuration has the unknown settings {', '.join(sorted(unknown))}")
    return config


@contextlib.contextmanager
def _complaints(cls: type[Saved], directory: str | Path) -> Iterator[None]:
    """Name the folder in whatever goes wrong with reading a model."""
    from safetensors import SafetensorError

    for name in (CONFIG, WEIGHTS):
        if not (Path(directory) / name).is_file():
            raise ValueError(f"{directory}: expected a saved {cls.__name__} with {name}, found no such file")
    try:
        yield
    except (SafetensorError, json.JSONDecodeError, TypeError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{directory}: is no readable {cls.__name__}: {reason}") from error
