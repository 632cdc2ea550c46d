"""What a compiler says of the kernels, for GPUs that are not here."""

import dataclasses
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from vmae_kernels import _triton, resources

pytestmark = pytest.mark.skipif(_triton.INTERPRETED, reason="Triton interprets")


def test_every_kernel_is_compiled():
    found = {
        name
        for case in resources.cases(90)
        for name, value in vars(sys.modules[f"vmae_kernels.{case.module}"]).items()
        if name.endswith("_kernel") and isinstance(value, _triton.triton.JITFunction)
    }
    assert {case.kernel for case in resources.cases(90)} == found
    assert {case.kernel for case in resources.cases(90) if case.first} == found


def test_nothing_spills_and_what_multiplies_does_so_in_matrix_instructions():
    """One configuration of each kernel on each architecture; `make resources` compiles all."""
    rows = resources.measured()
    assert len(rows) >= 4 * 15
    assert not [row for row in rows if row.complaints]
    lines = resources.table(rows).splitlines()
    assert len(lines) == 1 + len(rows)


def test_what_will_not_do_is_named():
    """A block that no thread's registers hold, in a kernel that is said to multiply matrices."""
    case = next(case for case in resources.cases(90) if case.kernel == "_partition_kernel")
    arguments = case.arguments | {"BLOCK": 16384, "TILE": 16384}
    row = resources.compiled(dataclasses.replace(case, arguments=arguments, warps=4, matrix=True, wide=True), 90)
    assert row.spilled
    assert any("expected all in registers, found" in complaint for complaint in row.complaints)
    assert any("expected matrix instructions" in complaint for complaint in row.complaints)


def test_json_and_exit_status():
    """The interpreter cannot compile: one line, and no table."""
    command = [sys.executable, "-m", "vmae_kernels.resources", "--json"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("resources: error: expected Triton as a compiler")
