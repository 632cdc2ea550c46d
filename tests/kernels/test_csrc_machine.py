"""The convolution's CUDA kernels without a GPU: what nvcc makes of csrc/ is run by `ptx_machine`, and launched by
csrc's own host code over a CUDA runtime that is machine.cpp.

It takes minutes of compilation, nvcc, and `pip install --no-deps nvidia-cutlass`.
"""

import ctypes
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from ptx_machine import Machine, Traffic
from ptx_program import Fault, waits
from test_causal_conv3d import oracle, rand

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
CSRC = ROOT / "csrc"
sys.path.insert(0, str(CSRC))
import build  # noqa: E402

pytestmark = pytest.mark.machine
MATHS = {
    "Bfloat16": ("bfloat16.cu", torch.bfloat16),
    "Float16": ("float16.cu", torch.float16),
    "TensorFloat32": ("tensor_float32.cu", torch.float32),
    "ExactFloat32": ("exact_float32.cu", torch.float32),
}
CARRY = ctypes.CFUNCTYPE(None, ctypes.c_char_p, *[ctypes.c_int] * 4, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t)


class Extension:
    """csrc's launchers for one kind of arithmetic, and the code that they launch."""

    def __init__(self, math):
        source, self.dtype = MATHS[math]
        self.math, self.machine, self.launched = math, Machine(), []
        self.change = lambda ptx: ptx
        library = ROOT / "build" / "machine" / f"{math}.so"
        sources = [*CSRC.glob("*.cu*"), *CSRC.glob("*.h"), HERE / "machine.cpp"]
        if not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in sources):
            compile_machine(math, CSRC / source, library)
        self.library = ctypes.CDLL(str(library))
        self.library.machine_workspace.restype = ctypes.c_int64
        self.ptx = {}
        for module in re.split(r"(?=^\.version)", library.with_suffix(".ptx").read_text(), flags=re.MULTILINE)[1:]:
            self.ptx[int(re.search(r"\.target\s+sm_(\d+)", module)[1])] = module.split("\nFatbin")[0]

    def run(self, architecture, function, numbers, *tensors, more=()):
        """Call a launcher with tensors, which are all the memory that its kernels may touch."""
        memory = [(t.data_ptr(), bytes_of(t), f"a tensor {list(t.shape)}") for t in tensors if t is not None]
        failed = []

        def carry(name, x, y, z, threads, arguments, shared):
            try:
                name = name.decode()
                ptx = self.ptx[architecture]
                program = self.machine.program(ptx, name)
                given = [
                    ctypes.string_at(arguments[i], size) for i, (_, size) in enumerate(program.parameters.values())
                ]
                self.launched.append(name)
                self.machine.launch(self.change(ptx), (x, y, z), threads, given, memory, shared=shared, name=name)
            except BaseException as error:
                failed.append(error)

        callback = CARRY(carry)
        self.library.machine_set(callback, architecture)
        getattr(self.library, f"machine_{function}")(
            (ctypes.c_int64 * 12)(*numbers),
            *[ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors],
            *more,
        )
        if failed:
            raise failed[0]


def bytes_of(x):
    storage = x.untyped_storage()
    first = x.storage_offset() * x.element_size()
    return torch.tensor([], dtype=torch.uint8).set_(storage).numpy()[first : first + x.numel() * x.element_size()]


def compile_machine(math, source, library):
    """For both architectures; the code goes beside the library."""
    nvcc, cutlass, triton = build.nvcc(), find_spec("cutlass_library"), find_spec("triton")
    if nvcc is None or cutlass is None or triton is None:
        pytest.skip("needs nvcc, nvidia-cutlass, and triton for its cuobjdump")
    library.parent.mkdir(parents=True, exist_ok=True)
    options = ["-std=c++20", "--expt-relaxed-constexpr", "-O3", "-Xcompiler=-fPIC", "-cudart=none", "-DVMAE_SM90A",
               f"-DMACHINE_MATH={math}", f"-I{CSRC}",
               f"-I{Path(cutlass.submodule_search_locations[0]) / 'source/include'}"]  # fmt: skip
    code = [f"-gencode=arch=compute_{name},code=compute_{name}" for name in ("80", "90a")]
    kernels, machine = (library.with_suffix(f".{part}.o") for part in ("kernels", "machine"))
    subprocess.run([nvcc, *options, *code, "-c", source, "-o", kernels], check=True)
    subprocess.run([nvcc, *options, "-c", HERE / "machine.cpp", "-o", machine], check=True)
    cuobjdump = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    listed = subprocess.run([cuobjdump, "--dump-ptx", kernels], capture_output=True, text=True, check=True)
    library.with_suffix(".ptx").write_text(listed.stdout)
    subprocess.run(["c++", "-shared", "-Wl,-Bsymbolic", kernels, machine, "-o", library], check=True)


@pytest.fixture(scope="module", params=list(MATHS))
def extension(request):
    return Extension(request.param)


def last(x, dtype):
    """Channels-last, with NaN before and after it."""
    if x is None or x.numel() == 0:
        return None
    memory = torch.full((x.numel() + 64,), torch.nan, dtype=dtype)
    y = memory[32 : 32 + x.numel()].view(x.permute(0, 2, 3, 4, 1).shape).permute(0, 4, 1, 2, 3)
    return y.copy_(x)


def close(got, wanted, dtype, slack):
    """Rounded once, from sums in float32 whose error is a share of the largest."""
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0
    assert ((got.double() - wanted).abs() <= rounding * wanted.abs() + slack * wanted.abs().max()).all()


# batch, channels, outputs, frames, height, width, kernel, stride; whether there is a cache
CASES = {
    "wide": (1, 64, 136, 3, 5, 7, (3, 3, 3), (1, 1, 1), True),
    "narrow": (2, 32, 40, 2, 6, 5, (3, 3, 3), (1, 1, 1), False),
    "strided": (1, 16, 24, 4, 6, 8, (3, 3, 3), (2, 2, 2), True),
    "odd channels": (1, 3, 20, 4, 5, 6, (3, 3, 3), (1, 2, 2), True),
    "odd outputs": (1, 8, 5, 2, 9, 4, (2, 3, 1), (1, 1, 1), True),
    "pointwise": (1, 72, 16, 2, 4, 4, (1, 1, 1), (1, 1, 1), False),
    "far taps": (1, 8, 8, 4, 3, 3, (5, 7, 7), (1, 4, 3), True),
}


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name", list(CASES))
def test_convolution_and_gradients(extension, name, architecture):
    b, c, o, t, h, w, kernel, stride, cached = CASES[name]
    numbers, dtype = (b, c, o, t, h, w, *kernel, *stride), extension.dtype
    past = kernel[0] - stride[0]
    x, weight, bias = rand(b, c, t, h, w).to(dtype), rand(o, c, *kernel, seed=2).to(dtype), rand(o, seed=3).to(dtype)
    cache = rand(b, c, past, h, w, seed=1).to(dtype) if cached and past else None
    exact = [None if v is None else v.double().requires_grad_() for v in (x, weight, bias, cache)]
    wanted = oracle(exact[0], exact[1], exact[2], stride, exact[3])
    dy = rand(*wanted.shape, seed=9).to(dtype)
    inputs = [exact[0], exact[1]] + ([exact[3]] if cache is not None else [])
    dx, dweight, *dcache = torch.autograd.grad(wanted, inputs, dy.double())
    slack = 1e-3 if extension.math == "TensorFloat32" else 1e-5  # tf32 keeps 11 bits of each factor

    extension.launched.clear()
    extension.machine.traffic = Traffic()
    y = last(torch.full(wanted.shape, torch.nan), dtype)
    extension.run(architecture, "convolve", numbers, last(x, dtype), last(cache, dtype), last(weight, dtype), bias, y,
                  more=(0,))  # fmt: skip
    close(y, wanted, dtype, slack)
    half = extension.dtype in (torch.bfloat16, torch.float16)
    if half and not (c % 8 or o % 8):  # swizzled, so that no two threads meet in a bank
        assert extension.machine.traffic.conflicts == 0
    by_wgmma = [bool(re.search(r"TileI\w*Lb1E", kernel)) for kernel in extension.launched]
    assert any(by_wgmma) == (half and architecture == 90 and c % 8 == 0)

    silu = last(torch.full(wanted.shape, torch.nan), dtype)
    inputs = last(x, dtype), last(cache, dtype), last(weight, dtype)
    extension.run(architecture, "convolve", numbers, *inputs, None, silu, more=(1,))
    plain = oracle(exact[0], exact[1], None, stride, exact[3])
    close(silu, torch.nn.functional.silu(plain), dtype, slack)

    turned, gradient = last(weight.transpose(0, 1), dtype), last(dy, dtype)
    got_dx = last(torch.full(x.shape, torch.nan), dtype)
    got_dcache = None if cache is None else last(torch.full(cache.shape, torch.nan), dtype)
    extension.run(architecture, "input_gradient", numbers, gradient, turned, got_dx, got_dcache)
    close(got_dx, dx, dtype, slack)
    if dcache:
        close(got_dcache, dcache[0], dtype, slack)

    workspace = torch.full((extension.library.machine_workspace((ctypes.c_int64 * 12)(*numbers)),), torch.nan)
    got_dweight = last(torch.full(weight.shape, torch.nan), dtype)
    extension.run(architecture, "weight_gradient", numbers, last(x, dtype), last(cache, dtype), gradient, workspace,
                  got_dweight)  # fmt: skip
    close(got_dweight, dweight, dtype, slack)


@pytest.mark.parametrize("architecture", [80, 90])
def test_a_kernel_without_one_of_its_waits_is_noticed(extension, architecture):
    """Each barrier, and each wait for copies or products, is taken out of the convolution's kernel by itself."""
    b, c, o, t, h, w = 1, 64, 72, 1, 9, 8  # 72 rows and columns, and more tiles in depth than stages
    x, weight = (
        rand(*shape, seed=seed).to(extension.dtype) for seed, shape in enumerate([(b, c, t, h, w), (o, c, 1, 3, 3)])
    )
    y = last(torch.zeros(b, o, t, h, w), extension.dtype)
    arguments = architecture, "convolve", (b, c, o, t, h, w, 1, 3, 3, 1, 1, 1), last(x, extension.dtype), None
    extension.run(*arguments, last(weight, extension.dtype), None, y, more=(0,))
    name = extension.launched[-1]
    whole = extension.ptx[architecture]
    begin = whole.index(f".entry {name}")
    end = whole.find(".entry", begin + 1)
    own = whole[begin : None if end < 0 else end]
    noticed, tried = 0, 0
    try:
        for _, without in waits(own):
            tried += 1
            extension.change = lambda ptx, without=without: ptx.replace(own, without)
            try:
                extension.run(*arguments, last(weight, extension.dtype), None, y, more=(0,))
            except Fault:
                noticed += 1
    finally:
        extension.change = lambda ptx: ptx
    assert tried >= 5
    assert noticed >= 0.8 * tried  # the last barrier guards nothing here
