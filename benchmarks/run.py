"""Run the suites, and write what they found to benchmarks/results/DEVICE-DATE: .json, .md, .html and plots.

    python benchmarks/run.py                          # 13 minutes on a CPU, 8 on a GPU; a tenth more for what was begun
    python benchmarks/run.py --minutes 60 frames      # longer, one suite
    python benchmarks/run.py --report FILE.json       # tables, plots and page of earlier results again

What is not reached in time is left out, and the page says so. The json is pytest-benchmark's, whose `compare` works on
it. Plots need matplotlib; nothing else needs more than torch, einops and pytest-benchmark.
"""

import argparse
import datetime
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measuring import DEVICE, machine
from report import write

HERE = Path(__file__).parent
SUITES = ("kernels", "frames", "peers", "pipeline", "causal_conv3d")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", default=SUITES, metavar="suite", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--minutes", type=float, default=8 if DEVICE == "cuda" else 13)
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/DEVICE-DATE.json)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="measure nothing, report this")
    parser.add_argument("--gpu", action="store_true", help="refuse to run without one")
    parser.add_argument("-k", default="", help="cases, as pytest chooses them")
    args = parser.parse_args()
    if unknown := set(args.suites) - set(SUITES):
        parser.error(f"expected suites of {', '.join(SUITES)}, got {', '.join(sorted(unknown))}")
    if args.gpu and DEVICE != "cuda":
        parser.exit(2, "run.py: error: --gpu: expected a CUDA device, found none\n")
    if args.k and not args.out and not args.report:
        parser.error("-k: expected with --out, for it is a part of the suites that is measured")
    try:
        if args.report:
            print(f"written to {write(args.report)}")
        else:
            sys.exit(measure(args))
    except KeyError as error:
        sys.exit(f"run.py: error: {args.report}: expected results of this script, found no {error}")
    except (OSError, ValueError) as error:
        sys.exit(f"run.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("run.py: interrupted; nothing is written")


def measure(args: argparse.Namespace) -> int:
    """Returns pytest's status."""
    part = "" if set(args.suites) == set(SUITES) else "-" + "-".join(args.suites)
    out = args.out or HERE / "results" / f"{device()}-{datetime.date.today()}{part}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:  # what stops half-way leaves earlier results alone
        new = Path(folder) / out.name
        command = [
            *(sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir", str(HERE), "-k", args.k),
            *(f"--minutes={args.minutes}", f"--benchmark-json={new}", "--benchmark-columns=median,min,max,rounds"),
            *(str(HERE / f"bench_{suite}.py") for suite in args.suites),
        ]
        # Where vmae is not installed, as on a machine that was lent for an hour.
        path = os.pathsep.join((str(HERE.parent), str(HERE.parent / "kernels"), os.environ.get("PYTHONPATH", "")))
        said = shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]])
        status = subprocess.run(command, env={**os.environ, "PYTHONPATH": path, "BENCH_COMMAND": said}).returncode
        if not new.exists() or not new.stat().st_size:
            sys.exit("run.py: error: nothing was measured, and nothing is written")
        new.replace(out)
    print(f"written to {out} and {write(out)}")
    return status


def device() -> str:
    """Of this machine, fit for a file's name."""
    found = machine()
    cpu = f"{found['cpu']}{' AMX' * ('AMX' in found['capability'])} {found['cores']} cores"
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else cpu
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    main()
