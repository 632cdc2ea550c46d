"""What the suites share: they time elsewhere, check before they report, and end in time."""

import gc
import os
import shlex
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measuring import DEVICE, flushed, machine

from vmae.bench import Case, OutOfMemory, in_a_process
from vmae.planning import Device, costs, this_device

_now = 0.0
_out_of_memory: list[dict[str, Any]] = []
_left_out: list[str] = []
_failed: list[str] = []


def clock() -> float:
    """What pytest-benchmark reads: it stands still but for what was measured, by events or in another process."""
    return _now


def tick(seconds: float) -> None:
    global _now
    _now += seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "begin no measurement after so many, and stop those in processes of their own when a tenth more are over"
    parser.addoption("--minutes", type=float, default=None, help=help)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "later: worth less than the others, if time is short")
    config.stash[_begin] = time.monotonic()


_begin = pytest.StashKey[float]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("later") is not None)
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - item.config.stash[_begin] > 60 * minutes:
        _left_out.append(item.name)
        pytest.skip(f"{minutes:g} minutes are over")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed.append(report.nodeid.rpartition("::")[2])


@pytest.fixture(scope="session")
def limits() -> Device:
    """What this device computes and moves at most, measured in this run."""
    return this_device()


@pytest.fixture
def report(benchmark: Any) -> Callable[..., None]:
    """Give pytest-benchmark what was measured, and what to say about it; `checked` has to tell what was compared."""

    def report(seconds: list[float], *, checked: str, **facts: Any) -> None:
        given = iter(seconds)
        benchmark.pedantic(lambda: tick(next(given)), rounds=len(seconds))
        about = {name: machine()[name] for name in ("versions", "commit")}
        benchmark.extra_info.update(facts, checked=checked, device=DEVICE, **about)

    return report


@pytest.fixture
def elsewhere(request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """What another process measures in the seconds that it is given; skips, and notes why, where that is nothing."""

    def run(measure: Callable[[float | None], dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
        minutes, elapsed = request.config.getoption("--minutes"), time.monotonic() - request.config.stash[_begin]
        if DEVICE == "cuda":  # what this process holds, the other cannot have
            flushed.cache_clear()
            gc.collect()
            torch.cuda.empty_cache()
        try:
            return measure(None if minutes is None else 66 * minutes - elapsed)
        except OutOfMemory as error:
            _out_of_memory.append(about)
            pytest.skip(f"out of memory: {error}")
        except TimeoutError as error:
            _left_out.append(request.node.name)
            pytest.skip(str(error))

    return run


@pytest.fixture
def report_step(
    elsewhere: Callable[..., dict[str, Any]], report: Callable[..., None], limits: Device
) -> Callable[[Case], None]:
    """Measure a step in a process of its own, and report it."""

    def run(case: Case) -> None:
        step = case.step
        about = {"way": case.way, **{name: getattr(step, name) for name in step.__dataclass_fields__}}
        found = elsewhere(lambda timeout: in_a_process(case, timeout), about)
        seconds = statistics.median(found["seconds"])
        peak = limits.bf16 if step.precision == "bf16" else limits.fp32
        about |= {name: found[name] for name in ("parts", "bytes", "bytes_between_steps", "flops", "loss")}
        about["tokens_per_clip"] = step.tokens
        about["clips_per_s"], about["tokens_per_s"] = step.batch / seconds, found["tokens"] / seconds
        about["flops_per_s"], about["share_of_peak"] = found["flops"] / seconds, found["flops"] / seconds / peak
        if case.way == "vmae":
            predicted = costs(step, cuda=DEVICE == "cuda")
            about["predicted"] = {
                "bytes": predicted.peak - predicted.idle,
                "bytes_between_steps": predicted.idle,
                "flops": sum(predicted.flops().values()),
                "seconds_at_least": predicted.seconds(limits),
            }
        report(found["seconds"], checked=found["checked"], **about)

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["vmae"] = machine()
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    unchecked = [bench["name"] for bench in output_json["benchmarks"] if not bench["extra_info"].get("checked")]
    if unchecked:
        raise pytest.UsageError(f"not reported: the results of {', '.join(unchecked)} were not checked in this run")
    output_json["out_of_memory"], output_json["left_out"] = _out_of_memory, _left_out
    output_json["command"] = os.environ.get("BENCH_COMMAND") or shlex.join(["pytest", *config.invocation_params.args])
    output_json["limits"], output_json["failed"] = this_device()._asdict(), _failed
