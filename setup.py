"""Builds the compiled extension of csrc/ where that is possible; everything else is in pyproject.toml.

VMAE_BUILD decides:
    auto   (default) with nvcc, the extension for CUDA and the CPU; if that fails, or without nvcc, none
    cpu    its part for the CPU alone, for which a C++ compiler is enough, or an error
    force  for CUDA and the CPU, or an error
    skip   none
csrc/build.py says what a build needs, and which other variables it heeds.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import build

MODE = os.environ.get("VMAE_BUILD", "auto")
if MODE not in ("auto", "cpu", "force", "skip"):
    sys.exit(f"VMAE_BUILD: expected auto, cpu, force or skip, got {MODE!r}")
TARGET = {"auto": "cuda" if build.nvcc() else None, "cpu": "cpu", "force": "cuda", "skip": None}[MODE]
FILES = {name.partition(".")[0]: name for name in (build.LIBRARY, build.OCCUPANCY)}
# Of an isolated build; one with --no-build-isolation has to bring them.
NEEDS = {
    None: [],
    "cpu": ["torch>=2.10", "ninja"],
    "cuda": ["torch>=2.10", "ninja", "nvidia-cutlass>=4.2", "pybind11>=2.12"],
}[TARGET]


def say(line: str) -> None:
    """Past pip, which shows what a build prints only where it is asked to."""
    print(f"vmae: {line}", file=sys.stderr)


class BuildExtension(build_ext):
    """One build makes both: the library, and the module that tells of its kernels where pybind11 is at hand."""

    def get_ext_filename(self, fullname: str) -> str:
        *package, stem = fullname.split(".")
        return "/".join([*package, FILES[stem]])

    def build_extensions(self) -> None:
        try:
            build.build(TARGET, Path(self.build_temp).resolve())
        except build.Impossible as reason:
            if MODE != "auto":
                raise SystemExit(f"VMAE_BUILD={MODE}: cannot build the extension: {reason}") from None
            say(f"without the compiled extension, which could not be built: {reason}")
        targets = {extension.name: Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions}
        built = {name: Path(self.build_temp) / target.name for name, target in targets.items()}
        self.extensions = [extension for extension in self.extensions if built[extension.name].exists()]
        for extension in self.extensions:
            targets[extension.name].parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(built[extension.name]), str(targets[extension.name]))


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        built = any(Path(self.bdist_dir or ".").rglob(build.LIBRARY))
        self.root_is_pure = not built
        return ("py3", "none", super().get_tag()[2] if built else "any")


if TARGET is None and MODE == "auto" and {"bdist_wheel", "editable_wheel"} & {*sys.argv}:  # pip comes for facts first
    say("without the compiled extension: there is no nvcc (VMAE_BUILD=cpu builds its part for the CPU)")
setup(
    ext_modules=[Extension(f"vmae_kernels.{stem}", []) for stem in FILES] if TARGET else [],
    setup_requires=NEEDS,
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
)
