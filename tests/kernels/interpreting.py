"""A plugin for pytest: what the tests of the kernels need where Triton interprets them (see test_interpreter.py)."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings


def pytest_configure() -> None:
    settings.register_profile("interpreter", max_examples=15, deadline=None)
    settings.load_profile("interpreter")
    _mend_the_interpreter()
    _spare_the_interpreter_work()
    # Outside, number by number; here each of them would be a launch, which takes as long as hundreds there.
    for check in ("gradcheck", "gradgradcheck"):
        setattr(torch.autograd, check, functools.partial(getattr(torch.autograd, check), fast_mode=True))


# The convolution has no Triton kernel; the others do not show which kernel the operation runs.
OUTSIDE_ONLY = ("test_compiled_equals_eager", "test_symbolic_settings", "test_autocast")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left = [item for item in items if item.originalname in OUTSIDE_ONLY or "causal_conv3d" in item.name]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True)
def poisoned():
    """What a kernel is to write holds NaN, or the largest integer, until it does."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills new memory, too
    yield
    torch.use_deterministic_algorithms(before)


def _mend_the_interpreter() -> None:
    """Triton's interpreter cuts float32 off to bfloat16, loses subnormal bfloat16, and multiplies bfloat16 matrices as
    if their bits were integers. A GPU does none of it."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(data: np.ndarray) -> np.ndarray:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def cast_impl(self, source, kind):
        if source.dtype.scalar == tl.bfloat16:
            source = TensorHandle(widened(source.data), tl.float32)
            if kind.scalar == tl.float32:
                return source
        if kind.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float32).bfloat16()
            data = rounded.view(torch.int16).numpy().view(np.uint16).reshape(source.data.shape)
            return TensorHandle(data, tl.bfloat16)
        return cast(self, source, kind)

    def create_dot(self, a, b, *rest):
        a, b = (TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot


def _spare_the_interpreter_work() -> None:
    """Three things that take most of its time: Triton's interpreter patches its language for a kernel, then wraps those
    patches in others at each call of a function within; computes each sum and product of integers twice, to find
    overflows, as a GPU does not; and makes a table of dtypes to look one up."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, everything = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_lang(fn):
        return patch(everything) if tl.core.is_builtin(tl.load) else interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    look_up = interpreter._get_np_dtype
    known = functools.cache(look_up)
    interpreter._get_np_dtype = lambda kind: look_up(kind) if kind.scalar.is_ptr() else known(kind.scalar)
