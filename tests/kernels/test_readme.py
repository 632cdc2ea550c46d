"""The examples in kernels/README.md run, and its table holds every operation."""

import re
from pathlib import Path

import pytest

import vmae_kernels

README = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number):
    exec(EXAMPLES[number], {})


def test_nothing_is_left_out():
    rows = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(vmae_kernels.__all__)
    lines = re.findall(r"from vmae_kernels import (.*)", "\n".join(EXAMPLES))
    assert {"topk", *", ".join(lines).split(", ")} == set(vmae_kernels.__all__)
