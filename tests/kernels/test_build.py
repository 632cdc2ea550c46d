"""The build of csrc/: what it makes of its settings, and that the library loads."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
sys.path.insert(0, str(CSRC))
import build  # noqa: E402


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """An nvcc that knows three architectures and compiles nothing."""
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "--version) echo 'Cuda compilation tools, release 12.8, V12.8.61';;\n"
        "--list-gpu-arch) printf 'compute_80\\ncompute_90\\ncompute_120\\n';;\n"
        "*) echo 'some.cu(3): error: expected a ;' >&2; exit 1;;\n"
        "esac\n"
    )
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return str(path)


def test_architectures(compiler, monkeypatch):
    sm = "-gencode=arch=compute_{0},code=sm_{0}"
    assert build._architectures(compiler) == [sm.format("80"), sm.format("90a")]  # 10.0 is unknown to it
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 12.0+PTX")
    ptx = "-gencode=arch=compute_120,code=compute_120"
    assert build._architectures(compiler) == [sm.format("86"), sm.format("120"), ptx]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    with pytest.raises(build.Impossible, match="got 'Ampere'"):
        build._architectures(compiler)


def test_jobs(monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert build._jobs() >= 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert build._jobs() == 7


def test_nvcc(compiler, monkeypatch, tmp_path):
    assert build.nvcc() == compiler
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert build.nvcc() is None
    with pytest.raises(build.Impossible, match=r"no nvcc|cutlass_library is not there"):
        build.build("cuda", tmp_path / "out")


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@needs_compiler
def test_the_compilers_first_error(tmp_path, monkeypatch):
    failing = tmp_path / "c++"
    failing.write_text(
        "#!/bin/sh\necho noise >&2\necho 'x.cpp:1:2: error: first' >&2\necho 'error: second' >&2\nexit 1\n"
    )
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(build.Impossible, match=r"^x.cpp:1:2: error: first \(all of it: .*build.log\)$"):
        build.build("cpu", tmp_path / "out")


@needs_compiler
def test_the_library_loads_and_has_no_python_in_it(tmp_path):
    library = build.build("cpu", tmp_path)
    program = f"import torch; torch.ops.load_library({str(library)!r}); print(torch.ops.vmae_csrc.facts())"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed)["cuda"] is None
    symbols = library.read_bytes()
    assert b"PyObject" not in symbols
    assert b"libpython" not in symbols
