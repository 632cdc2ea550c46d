"""The suites' machinery: what they refuse to report, the report, and the gate."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def suite(tmp_path: Path, test: str) -> subprocess.CompletedProcess:
    """Run a suite of one test with the conftest of the suites."""
    (tmp_path / "conftest.py").write_text((FOLDER / "conftest.py").read_text())
    (tmp_path / "bench_it.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    command += [f"--benchmark-json={tmp_path / 'out.json'}", str(tmp_path / "bench_it.py")]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    environment.pop("PYTEST_XDIST_WORKER", None)  # else nothing is measured
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)


def test_what_was_not_checked_is_not_reported(tmp_path):
    done = suite(tmp_path, "def test_fast(benchmark):\n    benchmark.pedantic(lambda: None)\n")
    assert done.returncode != 0
    assert "not reported: the results of test_fast were not checked in this run" in done.stdout + done.stderr
    assert not (tmp_path / "out.json").exists() or not (tmp_path / "out.json").read_text()


def test_times_are_those_measured_elsewhere(tmp_path):
    done = suite(tmp_path, "def test_it(report):\n    report([3.0, 1.0, 2.0], checked='by hand', colour='red')\n")
    assert done.returncode == 0, done.stdout
    (bench,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert bench["stats"]["data"] == pytest.approx([3.0, 1.0, 2.0])
    assert bench["stats"]["median"] == pytest.approx(2.0)
    assert bench["extra_info"]["colour"] == "red"
    assert bench["extra_info"].keys() >= {"device", "versions", "commit", "checked"}


@pytest.fixture
def found() -> dict:
    """Results as the suites write them: two lines of steps, one of them out of memory at the end, and a kernel."""
    shared = {"model": "base", "precision": "bf16", "checkpointing": False, "batch": 1, "size": 224, "budget": 0.15}
    benchmarks = []
    for way, per_frame in (("vmae", 5), ("huggingface", 20)):
        for frames in (16, 32, 64, 128):
            facts = {
                "way": way,
                "frames": frames,
                "bytes": (per_frame * frames + 100) * 2**20,
                "flops": frames * 10**10,
            }
            facts |= {"flops_per_s": 1e12, "share_of_peak": 0.5, "parts": {"forward": 1.0, "backward": 3.0}, **shared}
            if way == "vmae":
                predicted = {"bytes": 2 * facts["bytes"], "flops": facts["flops"], "seconds_at_least": 0.5}
                facts["predicted"] = predicted
            benchmarks.append({"name": way, "stats": {"median": per_frame * frames / 128}, "extra_info": facts})
    kernel = {"operation": "topk<", "frames": 128, "dtype": "float32", "backward": False, "seconds_of": {"other": 0.02}}
    kernel |= {"best": "other", "speedup": 2.0, "bytes_per_s": 5e9, "share_of_limit": 0.25}
    benchmarks.append({"name": "topk", "stats": {"median": 0.01}, "extra_info": kernel})
    versions = {"python": "3.11", "torch": "2.13", "transformers": "none"}
    machine = {"cpu": "A & B", "cores": 2, "threads": 2, "capability": "AVX2", "versions": versions, "commit": "abc"}
    return {
        "benchmarks": benchmarks,
        "machine_info": {"vmae": machine},
        "datetime": "2026-01-02T03:04:05",
        "limits": {"bf16": 1e12, "fp32": 1e11, "bandwidth": 1e10},
        "out_of_memory": [
            {**shared, "way": "huggingface", "frames": 512},
            {**shared, "way": "huggingface", "frames": 256},
            {**shared, "way": "dual-masking", "frames": 128},
            {"tokenizer": "base", "frames": 512},
        ],
        "left_out": ["test_step[large]"],
        "failed": ["test_step[small]"],
    }


def test_report(found, tmp_path):
    import report

    results = tmp_path / "machine-2026.json"
    results.write_text(json.dumps(found))
    text = report.write(results).read_text()
    assert "# Measured on A & B, 2 cores, AVX2, 2026-01-02" in text
    assert "Time was over for 1, which are named at the end." in text
    assert "## Left out\n\nTime was over for test_step[large]." in text
    assert "FAILED, and so not here: test_step[small]." in text
    first = next(line for line in text.splitlines() if line.startswith("| vmae, 15% decoded, bf16 | 5 s | 1.00 x |"))
    assert "0.72 GiB" in first
    assert "| Hugging Face's VideoMAE, all decoded, bf16 | 20 s | 4.00 x | 2.60 GiB |" in text
    assert "| 20.00 MiB, from 100 MiB at none, within 0.0%, from 32 frames on | at 256 frames |" in text
    assert "| 0.72 GiB | 2.000 | 1.000 | 10.00 |" in text
    assert "| topk< float32 | 128 | forward | 10 ms | other: 20 ms | 2.00 x | 5 GB/s | 25% |" in text
    assert "| dual masking with SDPA, 15%, bf16 |  |  | at 128 frames |" in text
    assert "| base | 512 |  | out of memory |  |" in text
    page = results.with_suffix(".html").read_text()
    assert '<a href="machine-2026.json">machine-2026.json</a> holds every number' in page
    assert "<code>python benchmarks/run.py</code>" in page
    assert "A &amp; B" in page
    assert "topk&lt; float32" in page
    plots = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(plots) == 3
    assert all((tmp_path / plot).stat().st_size > 5000 for plot in plots)


def test_report_without_matplotlib(found, tmp_path, monkeypatch):
    import report

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.json").write_text(json.dumps(found))
    assert "![" not in report.write(tmp_path / "a.json").read_text()


def test_compared():
    import gate

    before = {"a": {"bytes": 100, "flops": 100}, "gone": {"bytes": 1}}
    assert gate.compared({"a": {"bytes": 100.9, "flops": 99.1}, "new": {"bytes": 9}}, before, 0.01) == ([], [])
    worse, better = gate.compared({"a": {"bytes": 102, "flops": 98}}, before, 0.01)
    assert worse == ["a: bytes 100 -> 102 (+2.0%)"]
    assert better == ["a: flops 100 -> 98 (-2.0%)"]


def test_gate(monkeypatch, tmp_path, capsys, found):
    import gate

    def run(*arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", ["gate.py", *arguments])
        (tmp_path / "results.json").write_text(json.dumps(found))
        with pytest.raises(SystemExit) as ended:
            gate.main()
        return ended.value.code

    monkeypatch.setattr(gate, "traced", lambda: {"a step": {"bytes": 100.0}})
    monkeypatch.setattr(gate, "BASELINE", tmp_path / "baseline.json")
    results = str(tmp_path / "results.json")
    assert "baseline.json: No such file" in run()
    monkeypatch.setattr(sys, "argv", ["gate.py", "--update"])
    gate.main()
    assert run() == 0
    assert "none.json: No such file" in run("--results", str(tmp_path / "none.json"))
    assert run("--results", results) == 0  # half of what is predicted, which is said
    assert "1 steps traced, 4 measured: 0 numbers worse" in (out := capsys.readouterr().out)
    assert out.count("better: vmae") == 4
    found["benchmarks"][3]["extra_info"]["bytes"] *= 2.3
    assert run("--results", results) == 1
    assert "WORSE: vmae, 15% decoded, bf16, 128 frames: bytes" in capsys.readouterr().out
    (tmp_path / "other.json").write_text("[]")
    assert "other.json: expected results of benchmarks/run.py" in run("--results", str(tmp_path / "other.json"))
    found["benchmarks"] = found["benchmarks"][4:]
    assert "expected measured steps of vmae, found none" in run("--results", results)
    monkeypatch.setattr(gate, "traced", lambda: {"a step": {"bytes": 102.0}})
    assert run() == 1


def test_steps_ask_for_no_more_than_they_did():
    import gate

    worse, _ = gate.compared(gate.traced(), json.loads(gate.BASELINE.read_text()), gate.TRACED)
    assert not worse, "worse than benchmarks/baseline.json; if it is meant: python benchmarks/gate.py --update"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report", "missing.json"], "run.py: error: [Errno 2] No such file or directory"),
        (["--report", "other.json"], "other.json: expected results of this script, found no 'benchmarks'"),
        (["--report", "cut.json"], "run.py: error: "),
        (["-k", "fsq"], "-k: expected with --out"),
        (["speed"], "expected suites of kernels, frames, peers, pipeline, causal_conv3d, got speed"),
        (["kernels", "--minutes", "0", "--out", "old.json"], "run.py: error: nothing was measured"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_mistakes(arguments, message, tmp_path):
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "cut.json").write_text('{"a"')
    (tmp_path / "old.json").write_text("old")
    command = [sys.executable, str(FOLDER / "run.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "old.json").read_text() == "old"
