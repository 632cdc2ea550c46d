"""The wheel, and what importing it needs."""

import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, folder: Path | None = None) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build writes beside its sources
    source.mkdir()
    for name in ("kernels", "vmae", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True)
    return next(folder.glob("vmae-*.whl"))


def test_wheel_holds_both_packages_and_the_command(wheel, tmp_path):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for module in ROOT.glob("vmae/*.py"):
        assert f"vmae/{module.name}" in names
    for module in ROOT.glob("kernels/vmae_kernels/*.py"):
        assert f"vmae_kernels/{module.name}" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "kernels"))]
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "vmae = vmae.__main__:main" in zipfile.ZipFile(wheel).read(entry).decode()
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
        import torch, vmae, vmae_kernels
        print(vmae.__file__, vmae_kernels.__file__)
        tokens = vmae.AdaptiveTokenizer(vmae.TokenizerConfig.tiny()).encode(torch.zeros(1, 3, 4, 32, 32))
        model = vmae.VideoMAE(vmae.VideoMAEConfig.tiny(frames=4, size=32, mask_ratio=0.5))
        print(float(model(torch.zeros(1, 3, 4, 32, 32), tokens, seed=1)))
    """
    answer = run(code, tmp_path)  # Python looks in the current folder first
    assert answer.count(str(tmp_path)) == 2


def test_the_command_starts_without_what_few_of_its_parts_need():
    """Each of them would make every start longer by a quarter to two thirds of a second."""
    loaded = set(run("import sys, vmae.cli; print(*sys.modules)").split())
    assert {"tyro", "vmae.page", "vmae.probe"} <= loaded
    assert not {"matplotlib", "sklearn", "torch.distributed.tensor", "torch._dynamo"} & loaded


def test_ctrl_c_while_the_command_still_imports_is_no_traceback():
    code = """
        import sys

        class Interrupting:
            def find_spec(self, name, *_):
                if name == "torch":
                    raise KeyboardInterrupt

        sys.meta_path.insert(0, Interrupting())
        from vmae.__main__ import main

        main()
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "\nvmae: interrupted\n")


def test_one_thread_makes_the_first_call_to_mkls_vector_mathematics():
    """Several at once can see a half-done answer: of thirty processes one had positions with other last bits."""
    code = """
        import ctypes, torch

        library = ctypes.CDLL(torch.__path__[0] + "/lib/libtorch_cpu.so") if torch.backends.mkl.is_available() else None
        if not hasattr(library, "mkl_vml_serv_cpu_detect"):
            raise SystemExit
        start = ctypes.cast(library.mkl_vml_serv_cpu_detect, ctypes.c_void_p).value
        assert ctypes.string_at(start, 2) == bytes((0x8B, 0x05))  # it begins with loading what it knows
        known = ctypes.c_int.from_address(start + 6 + ctypes.c_int.from_address(start + 2).value)
        print(known.value)
        import vmae_kernels
        print(known.value)
    """
    answer = run(code)
    if not answer:
        pytest.skip("this PyTorch holds no MKL")
    before, after = map(int, answer.split())
    assert before == -1
    assert after >= 0


BLOCK = """
    from importlib.machinery import PathFinder

    found = PathFinder.find_spec

    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else found(name, path, target)

    PathFinder.find_spec = classmethod(find_spec)  # as if they were not installed
"""


def test_importing_vmae_needs_no_video_library():
    code = textwrap.dedent(BLOCK.format(blocked={"av"})) + "import vmae\nprint('imported')"
    assert run(code) == "imported\n"


def test_a_training_step_needs_torch_and_einops_alone():
    optional = {"av", "huggingface_hub", "matplotlib", "numpy", "PIL", "safetensors", "tqdm", "triton", "tyro"}
    code = """
        import torch, vmae, vmae.bench, vmae.planning
        clip = torch.zeros(1, 3, 4, 32, 32)
        tokens = vmae.AdaptiveTokenizer(vmae.TokenizerConfig.tiny()).encode(clip)
        vmae.VideoMAE(vmae.VideoMAEConfig.tiny(frames=4, size=32, mask_ratio=0.5))(clip, tokens, seed=1).backward()
        print("trained")
    """
    assert run(textwrap.dedent(BLOCK.format(blocked=optional)) + textwrap.dedent(code)) == "trained\n"
