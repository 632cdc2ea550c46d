"""All that a run needs to go on as if it had never stopped: what is saved, and how it is taken up again."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vmae import checkpoint, distributed
from vmae.dataset import ClipDataset
from vmae.optimisation import device_of, precision_of

if TYPE_CHECKING:
    from vmae.training import Run, Task

FREE = frozenset(
    {
        *("out", "data", "val", "cache", "tokenizer", "overwrite", "resume", "workers", "device", "save_every"),
        *("parallel", "command", "kind"),
    }
)
"""Settings that may differ when a run goes on: where things are, and what changes no step."""


class Position(NamedTuple):
    """Where a run stands."""

    step: int = 0
    """The next one."""
    log: int = 0
    """Its size in bytes."""
    skipped: int = 0
    """How often a video was."""
    failures: int = 0
    """Steps that changed nothing, up to here in a row."""


def settings(run: "Run", dataset: ClipDataset) -> dict[str, Any]:
    """What `run.json` tells of a run: its precision is what "auto" stands for here."""
    found = {**json.loads(json.dumps(asdict(run), default=str)), "videos": _fingerprint(dataset)}
    options = run.optimisation
    found["optimisation"]["precision"] = precision_of(options.precision, device_of(options.device))
    return found


def check(run: "Run", dataset: ClipDataset) -> None:
    """Before any work: raise `ValueError` if a run is to go on that began with other settings or videos."""
    file = run.out / checkpoint.RUN
    if not run.resume or not (file.exists() or checkpoint.states(run.out)):
        return
    try:
        before, now = _flat(json.loads(file.read_text(encoding="utf-8"))), _flat(settings(run, dataset))
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: expected the settings of the run to go on with, found none ({error})") from error
    for name in sorted(now.keys() | before.keys()):
        if name == "videos" and now[name] != before.get(name):
            raise ValueError(f"{run.data}: expected the videos that the run in {run.out} began with, found others")
        if name not in FREE and now.get(name) != before.get(name):
            raise ValueError(
                f"{name}: expected {before.get(name)!r}, as the run in {run.out} began with, got {now.get(name)!r}"
            )


def save(task: "Task", optimizer: torch.optim.Optimizer, directory: Path, position: Position) -> None:
    """Write a run's state. Of several processes all must call this, and the first one writes."""
    more, facts = task.state()
    parts = {"model": task.model.state_dict(), "optimizer": optimizer_state(optimizer), "task": more}
    tensors = {f"{part}/{k}": distributed.whole(v) for part, values in parts.items() for k, v in values.items()}
    facts = {
        **position._asdict(),
        "threads": torch.get_num_threads(),
        "processes": distributed.world().size,
        "torch": torch.__version__,
        "task": facts,
    }
    if distributed.world().rank == 0:
        checkpoint.save_state(tensors, facts, directory, position.step)


def restore(task: "Task", optimizer: torch.optim.Optimizer, run: "Run") -> Position:
    """Take up a run, which `check` has let pass, where its last checkpoint left it; a run that has none begins.

    Raises:
        ValueError: all its checkpoints are damaged, or gone.
    """
    saved = checkpoint.load_state(run.out)
    if saved is None:
        return _without_checkpoint(run)
    tensors, facts = saved
    if (now := torch.__version__) != facts["torch"]:
        distributed.say(
            f"the run began with torch {facts['torch']}, this is {now}: it may round otherwise from here on"
        )
    if distributed.world().size == facts["processes"]:
        torch.set_num_threads(facts["threads"])  # sums are split among them
    restore_optimizer(optimizer, part(tensors, "optimizer"))
    weights = part(tensors, "model")
    for name, value in task.model.state_dict().items():
        distributed.assign(value, weights[name])
    task.restore(part(tensors, "task"), facts["task"])
    return Position(*(facts[name] for name in Position._fields))


def part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those under `name/`, without it."""
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def _states(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimizer by the place of their parameter; one that never had a gradient has none."""
    states = [optimizer.state.get(parameter, {}) for parameter in _parameters(optimizer)]
    return {f"{i}.{name}": value for i, state in enumerate(states) for name, value in state.items()}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {name: distributed.whole(value) for name, value in _states(optimizer).items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Take up what `optimizer_state` gave, for the same parameters, which stay as they are."""
    known = {int(name.partition(".")[0]) for name in state}
    for i, parameter in enumerate(_parameters(optimizer)):
        parameter.grad = torch.zeros_like(parameter) if i in known else None
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()  # makes the tensors to copy to, as they are laid out here
    optimizer.zero_grad()
    for name, target in _states(optimizer).items():
        distributed.assign(target, state[name])


def _without_checkpoint(run: "Run") -> Position:
    """Begin, unless there is a model that no kill before the first checkpoint can have left."""
    try:
        before = _flat(json.loads((run.out / checkpoint.RUN).read_text(encoding="utf-8")))
        done = (run.out / checkpoint.LOG).read_bytes().count(b"\n")
        began = done <= min(before["save_every"], before["steps"])
    except (OSError, ValueError, AttributeError, KeyError):
        done, began = 0, False
    model = (run.out / checkpoint.WEIGHTS).exists()
    if model and done == run.optimisation.steps:  # killed after its last step, or the checkpoints were removed
        return Position(step=done)
    if model and not began:
        raise ValueError(
            f"{run.out}: holds a model but no checkpoint to go on from; choose another --out, or give --overwrite to "
            "begin again"
        )
    distributed.say(f"{run.out}: holds no checkpoint; the run begins at its first step")
    return Position()


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _fingerprint(dataset: ClipDataset) -> str:
    """Of the videos and their order, wherever their folder lies: of names and labels, and of a thousand sizes."""
    entries = dataset.entries
    names = [f"{path.name} {label}" for path, label in entries]
    paths = [path for path, _ in entries[:: -(-len(entries) // 1000)]]
    sizes = [path.stat().st_size if path.is_file() else None for path in paths]
    return hashlib.sha256(json.dumps([names, sizes]).encode()).hexdigest()[:16]
