"""Files that are either whole or not there, and models as a folder of safetensors and json."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from torch import nn

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:  # the models need torch alone; only saving and loading needs the rest

    class PyTorchModelHubMixin:  # type: ignore[no-redef]
        pass


CONFIG, WEIGHTS = "config.json", "model.safetensors"


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


def check_writable(path: str | Path) -> None:
    """Raise `ValueError` unless a file can take this place: nothing is there, or a file, and a folder above it."""
    path = Path(path)
    if path.exists() and not path.is_file():
        found = "a directory" if path.is_dir() else "a device or pipe"
        raise ValueError(f"{path}: expected a file to write, found {found}")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{path}: expected {above} to be a folder, found a file")


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
        map_location="cpu", strict=True, **model_kwargs,
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
    """Write a model's configuration, then its weights; a kill at any moment leaves each of the two whole."""
    from safetensors.torch import save_model

    directory = Path(directory)
    config = {"model": type(model).__name__, **asdict(model.config)}
    write_text(directory / CONFIG, json.dumps(config, indent=2) + "\n")
    with replacing(directory / WEIGHTS) as temporary:
        save_model(model, str(temporary))


T = TypeVar("T", bound=Saved)


def load(cls: type[T], directory: str | Path, device: str | torch.device = "cpu") -> T:
    """Read a model from a folder, for inference.

    Raises:
        ValueError: a file is missing or damaged, or belongs to another model; the message names the folder.
    """
    from safetensors import SafetensorError

    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise ValueError(f"{directory}: expected a saved {cls.__name__} with {name}, found no such file")
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        if config.get("model") != cls.__name__:
            raise ValueError(f"expected {cls.__name__}, found {config.get('model')}")
        known = {field.name for field in fields(get_type_hints(cls.__init__)["config"])}
        if unknown := config.keys() - known - {"model"}:
            raise ValueError(f"its configuration has the unknown settings {', '.join(sorted(unknown))}")
        return cls.from_pretrained(directory, map_location=str(device))
    except (SafetensorError, json.JSONDecodeError, TypeError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{directory}: is no readable {cls.__name__}: {reason}") from error
