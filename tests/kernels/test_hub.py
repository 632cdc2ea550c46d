"""The package as a kernel of Hugging Face's Hub, loaded by their library and run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HUB = Path(__file__).parents[2] / "kernels" / "hub.py"


def python(*arguments):
    """What a process of its own prints: a kernel stays loaded."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    for _ in range(2):  # again, over what is there
        python(HUB, folder)
    return folder


def test_what_it_holds(repository):
    """The Hub's own reader of metadata takes it, and finds the files to be those that it names."""
    rust = pytest.importorskip("kernels._rust")
    variants = sorted(path.name for path in (repository / "build").iterdir())
    assert variants == ["torch-cpu", "torch-cuda"]
    identifiers = set()
    for variant in variants:
        folder = repository / "build" / variant
        metadata = rust.Metadata.read_from_file(folder / "metadata.json")
        assert metadata.name.python_name == "vmae_kernels"
        assert metadata.python_depends == []
        assert f"torch-{str(metadata.backend.backend_type).lower()}" == variant
        assert bool(metadata.backend.archs) == (variant == "torch-cuda")
        metadata.digest.validate(rust.Digest.hash_variant(metadata.digest.algorithm, folder))
        identifiers.add(metadata.id)
        assert (folder / "topk.py").read_bytes() == (HUB.parent / "vmae_kernels" / "topk.py").read_bytes()
    assert len(identifiers) == 2
    assert (repository / "README.md").read_text().startswith("---\nlibrary_name: kernels\n")


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_it_loads_beside_the_installed_package(repository, choice, monkeypatch):
    monkeypatch.setenv("VMAE_KERNELS", choice)
    monkeypatch.setenv("TRITON_INTERPRET", str(int(choice == "triton")))
    pytest.importorskip("kernels")
    code = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
import torch
import vmae_kernels
from kernels import get_local_kernel
hub = get_local_kernel(Path(sys.argv[1]), backend="cpu")
assert hub.__name__.startswith("_vmae_kernels_cpu_"), hub.__name__
assert Path(hub.__file__).is_relative_to(sys.argv[1])
assert hub.__all__ == vmae_kernels.__all__
assert hasattr(getattr(torch.ops, hub.__name__), "gather_tokens")
x = torch.randn(2, 50, 8, requires_grad=True)
scores = torch.randn(2, 50)
def function(package, x):
    return package.gather_tokens(x, package.topk(scores, 7), unique=True).square().sum()
wanted = torch.autograd.grad(function(vmae_kernels, x), x)
assert torch.equal(torch.autograd.grad(function(hub, x), x)[0], wanted[0])
compiled = torch.compile(lambda x: function(hub, x), fullgraph=True, backend="aot_eager")
assert torch.equal(torch.autograd.grad(compiled(x), x)[0], wanted[0])
q = torch.randn(1, 2, 5, 16)
assert torch.equal(hub.attention(q, q, q), vmae_kernels.attention(q, q, q))
below = spec_from_file_location("below", Path(hub.__file__).parent / "vmae_kernels" / "__init__.py")
module = module_from_spec(below)
below.loader.exec_module(module)
assert module.topk is hub.topk and module.__all__ == hub.__all__
print("loaded")
"""
    assert python("-c", code, repository) == "loaded\n"


def test_older_versions_of_the_library_find_it(repository):
    """They import the folder of the package's name, from each variant."""
    for variant in ("torch-cpu", "torch-cuda"):
        code = (
            "import sys, vmae_kernels as v, torch; print(v.topk(torch.tensor([3.0, 1.0, 2.0]), 2).tolist(), v.__file__)"
        )
        environment = os.environ | {"PYTHONPATH": str(repository / "build" / variant)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.stdout == f"[0, 2] {repository / 'build' / variant / 'vmae_kernels' / '__init__.py'}\n", done.stderr


def test_a_folder_that_cannot_be_written_ends_with_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for arguments, said in (([file], "hub: error: "), ([], "usage: ")):
        done = subprocess.run([sys.executable, HUB, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert done.stderr.startswith(said)
        assert done.stderr.count("\n") == 1


def test_a_copy_inside_another_package_runs_beside_the_installed_one(tmp_path):
    shutil.copytree(HUB.parent / "vmae_kernels", tmp_path / "theirs" / "nested" / "vmae_kernels")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, vmae_kernels
from theirs.nested.vmae_kernels import soft_topk
x = torch.randn(2, 9, requires_grad=True)
for function in (soft_topk, vmae_kernels.soft_topk):
    print(torch.autograd.grad(function(x, 3, sigma=0.5, samples=8, seed=1).square().sum(), x)[0].tolist())
print(torch.ops.theirs_nested_vmae_kernels.soft_topk is not torch.ops.vmae_kernels.soft_topk)
"""
    ours, theirs, apart = python("-c", code, tmp_path).splitlines()
    assert ours == theirs
    assert apart == "True"
