"""Compiles this folder into libvmae_csrc.so, with ninja.

    python csrc/build.py cpu|cuda FOLDER

It keeps to PyTorch's stable ABI, so that one build serves every Python and every torch from 2.10. It needs torch's
headers and, for CUDA, nvcc and CUTLASS's headers; no GPU, and of CUDA's libraries its runtime alone.

TORCH_CUDA_ARCH_LIST names the GPUs (default: those of ARCHITECTURES that nvcc knows), MAX_JOBS the number of compilers
at a time (default: as many as processors and memory allow).
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIBRARY = "libvmae_csrc.so"
OCCUPANCY = f"_csrc_occupancy{sysconfig.get_config_var('EXT_SUFFIX')}"
HOST_SOURCES = ("ops.cpp", "cpu_ops.cpp", "amx.cpp", "amx_attention.cpp", "amx_conv3d.cpp", "amx_linear.cpp",
                "layer_norm.cpp", "topk.cpp")  # fmt: skip
CUDA_SOURCES = ("cuda_ops.cpp", "bfloat16.cu", "float16.cu", "tensor_float32.cu", "exact_float32.cu")
ARCHITECTURES = "8.0;9.0a;10.0+PTX"
GIB_PER_COMPILER = 3


class Impossible(Exception):
    """Why the extension cannot be built."""


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def build(target: str, folder: Path) -> Path:
    """Build the library for "cpu" or "cuda" in `folder`, as far as it is older than its sources.

    Raises:
        Impossible: with the compiler's first error, or what is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(_ninja_file(target))
    command = [_ninja(), "-C", str(folder), f"-j{_jobs()}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    (folder / "build.log").write_text(done.stdout)
    if done.returncode:
        error = re.search(r"^.*\b(?:error|fatal)\b.*$", done.stdout, re.MULTILINE | re.IGNORECASE)
        raise Impossible(f"{error[0][:500] if error else done.stdout[-500:]} (all of it: {folder / 'build.log'})")
    return folder / LIBRARY


def _ninja_file(target: str) -> str:
    cxx = shutil.which(os.environ.get("CXX", "c++"))
    if cxx is None:
        raise Impossible("no C++ compiler: expected c++ on PATH, or CXX")
    torch = _folder_of("torch", "include", "install without build isolation: pip install --no-build-isolation .")
    flags = f"-O3 -DTORCH_TARGET_VERSION=0x020a000000000000 {_include(FOLDER, torch, torch / 'torch/csrc/api/include')}"
    facts = {"cuda": None, "architectures": []}
    sources, link = list(HOST_SOURCES), f"{cxx} -shared -Wl,--no-as-needed"
    rules = []
    if target == "cuda":
        compiler = nvcc()
        if compiler is None:
            raise Impossible("no nvcc: expected it on PATH, or in CUDA_HOME/bin")
        cutlass = _folder_of("cutlass_library", "source/include", "pip install --no-deps nvidia-cutlass")
        architectures = _architectures(compiler)
        version = _output(compiler, "--version")
        release = re.search(r"release ([\d.]+)", version)
        facts = {
            "cuda": release[1] if release else "unknown",
            "architectures": [flag.rpartition("=")[2] for flag in architectures],
        }
        sources += CUDA_SOURCES
        if "sm_90a" in facts["architectures"]:
            flags += " -DVMAE_SM90A"  # kernels with wgmma may be launched
        rules.append(
            f"{compiler} -ccbin {cxx} -std=c++20 -Xcompiler=-fPIC,-fvisibility=hidden --expt-relaxed-constexpr "
            f"-Xptxas=-v {flags} {_include(cutlass)} {' '.join(architectures)}"
        )
        link = f"{compiler} -ccbin {cxx} -shared -cudart=static -Xlinker=--no-as-needed"
    text = [
        "rule cxx",
        f"  command = {cxx} -std=c++20 -fPIC -fvisibility=hidden -Wall {flags} $defined -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
    ]
    if rules:
        text += ["rule nvcc", f"  command = {rules[0]} -MMD -MF $out.d -x cu -c $in -o $out", "  depfile = $out.d"]
    text += ["rule link", f"  command = {link} $in -o $out -L{shlex.quote(str(torch.parent))}/lib -ltorch"]
    objects = []
    for source in sources:
        objects.append(f"{Path(source).stem}.o")
        rule = "nvcc" if source in CUDA_SOURCES else "cxx"
        text.append(f"build {objects[-1]}: {rule} {_escaped(FOLDER / source)}")
        if source == "ops.cpp":
            # Quoted for C++, then for the shell.
            literal = json.dumps(json.dumps(facts))
            text.append(f"  defined = '-DVMAE_BUILD_FACTS={literal}'")
    text.append(f"build {LIBRARY}: link {' '.join(objects)}")
    if target == "cuda":
        text += _occupancy_module(cxx, Path(compiler))
    return "\n".join(text) + "\n"


def _occupancy_module(cxx: str, compiler: Path) -> list[str]:
    """The optional Python module, where pybind11 and Python's headers are."""
    pybind11, python = find_spec("pybind11"), Path(sysconfig.get_path("include"))
    if pybind11 is None or not (python / "Python.h").exists():
        return []
    folders = [FOLDER, python, Path(pybind11.submodule_search_locations[0]) / "include"]
    folders += re.findall(r'-I([^"\s]+)', _dryrun(compiler))
    return [
        "rule module",
        f"  command = {cxx} -std=c++20 -O2 -fPIC -fvisibility=hidden -shared {_include(*folders)} $in -o $out -ldl",
        f"build {OCCUPANCY}: module {_escaped(FOLDER / 'occupancy.cpp')}",
    ]


def _include(*folders: object) -> str:
    return " ".join(f"-I{shlex.quote(str(folder))}" for folder in folders)


def _escaped(path: Path) -> str:
    """For ninja, which quotes it for the shell by itself."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _dryrun(compiler: Path) -> str:
    """What nvcc would run, with its include folders."""
    done = subprocess.run([compiler, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    return next((line for line in done.stderr.splitlines() if "INCLUDES=" in line), "")


def _folder_of(package: str, below: str, remedy: str) -> Path:
    spec = find_spec(package)
    folders = [Path(place) / below for place in (spec.submodule_search_locations or [])] if spec else []
    if not folders or not folders[0].is_dir():
        raise Impossible(f"{package} is not there ({remedy})")
    return folders[0]


def _architectures(compiler: str) -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST; of the default list, for those that it knows."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    known = _output(compiler, "--list-gpu-arch").split()
    flags = []
    for name in re.split(r"[;,\s]+", (given or ARCHITECTURES).strip("; ,")):
        parts = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if parts is None:
            raise Impossible(f"TORCH_CUDA_ARCH_LIST: expected numbers such as {ARCHITECTURES}, got {name!r}")
        number = parts[1] + parts[2] + parts[3]
        if given is None and f"compute_{parts[1]}{parts[2]}" not in known:
            continue
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if parts[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _ninja() -> str:
    beside = Path(sys.executable).with_name("ninja")
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if found is None:
        raise Impossible("no ninja (pip install ninja)")
    return found


def _jobs() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return int(os.environ.get("MAX_JOBS", 0)) or max(1, min(os.cpu_count() or 1, int(memory / GIB_PER_COMPILER)))


if __name__ == "__main__":
    try:
        print(build(sys.argv[1], Path(sys.argv[2])))
    except Impossible as reason:
        sys.exit(f"cannot build {LIBRARY}: {reason}")
