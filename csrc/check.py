"""Compiles the extension for every architecture, on any machine with nvcc, and checks what came out.

    python csrc/check.py FOLDER TABLE

No kernel keeps registers in local memory; those for wgmma use it and the others of 16 bits or tf32 the tensor cores;
each fits its multiprocessor as its tile says; the library needs no symbols but the C library's, C++'s and those of
libtorch's stable ABI of 2.10, and no CUDA library but what is linked into it. The kernels' registers, shared memory and
occupancy go to TABLE, a page of Markdown.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import build

# All in libtorch 2.10.0 (nm -D libtorch_cpu.so, libtorch_cuda.so).
STABLE_ABI = {
    "aoti_torch_abi_version", "aoti_torch_create_device_guard", "aoti_torch_delete_device_guard",
    "aoti_torch_delete_library_object", "aoti_torch_delete_tensor_object", "aoti_torch_get_current_cuda_stream",
    "aoti_torch_get_data_ptr", "aoti_torch_get_device_index", "aoti_torch_get_dim", "aoti_torch_get_dtype",
    "aoti_torch_get_numel", "aoti_torch_get_size", "aoti_torch_get_sizes", "aoti_torch_library_def",
    "aoti_torch_library_init_def", "aoti_torch_library_init_impl", "aoti_torch_new_tensor_handle",
    "torch_call_dispatcher", "torch_delete_list", "torch_get_mutable_data_ptr", "torch_library_impl",
    "torch_list_get_item", "torch_list_push_back", "torch_list_size", "torch_new_list_reserve_size",
    "torch_new_string_handle", "torch_parallel_for", "torch_get_num_threads",
}  # fmt: skip
STABLE_ABI_PATTERNS = r"aoti_torch_(dtype|layout|device_type)_\w+"
SYSTEM_LIBRARIES = r"(libtorch|libstdc\+\+|libm|libgcc_s|libc|libdl|librt|libpthread|ld-linux-\S+)\.so(\.\d+)?"
SHARED_KIB = {80: 163, 90: 227, 100: 227}  # of a block, and (with 1 KiB a block more) of a multiprocessor
REGISTERS = 65536
THREADS = 256
MATRIX = {"wgmma": r"\bHGMMA", "mma": r"\b[HU]\w*MMA", "fma": r"\bFFMA"}


@dataclass
class Kernel:
    architecture: int
    name: str
    math: str
    tile: tuple[int, ...]  # rows, columns, depth, stages, elements of a copy, blocks of a multiprocessor, wgmma
    registers: int
    local: int  # bytes

    @property
    def shared(self) -> int:
        if not self.tile:
            return 0
        rows, columns, depth, stages, *_ = self.tile
        size = 4 if "32" in self.math else 2
        pipeline = (rows + columns) * depth * stages * size
        result = rows * (columns * size + 16) if self.name == "convolution" else 0
        return max(pipeline, result)

    @property
    def blocks(self) -> int:
        """Of a multiprocessor at a time."""
        allocated = -(-self.registers // 8) * 8 * THREADS
        available = (SHARED_KIB[self.architecture] + 1) * 1024
        return min(REGISTERS // allocated, available // (self.shared + 1024), 8)

    @property
    def arithmetic(self) -> str:
        if not self.tile:
            return "none"
        return "wgmma" if self.tile[6] else "fma" if self.math == "ExactFloat32" else "mma"


def kernels(cuobjdump: str, library: Path) -> Iterator[tuple[Kernel, str]]:
    """Each kernel of the library, and its machine code."""
    code: dict[tuple[int, str], list[str]] = {}
    architecture, lines = 0, []
    for line in _output(cuobjdump, "-sass", str(library)).splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.search(r"Function : (\S+)", line):
            lines = code.setdefault((architecture, match[1]), [])
        else:
            lines.append(line)
    usage = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
    for part in re.split(r"(?=arch = sm_)", _output(cuobjdump, "-res-usage", str(library)))[1:]:
        architecture = int(re.match(r"arch = sm_(\d+)", part)[1])
        for symbol, registers, stack, local in usage.findall(part):
            name = re.search(r"4vmae\d+(\w+?)_kernelI", symbol)
            math = re.search(r"_kernelINS_\d+([A-Z]\w*?\d+)E", symbol)
            numbers = re.search(r"TileI((?:L[ib]\d+E)+)", symbol)
            tile = tuple(map(int, re.findall(r"L[ib](\d+)E", numbers[1]))) if numbers else ()
            kernel = Kernel(
                architecture, name[1], math[1] if math else "", tile, int(registers), int(stack) + int(local)
            )
            yield kernel, "\n".join(code[architecture, symbol])


def complaints(kernel: Kernel, code: str) -> Iterator[str]:
    about = f"sm_{kernel.architecture} {kernel.name} {kernel.math} {kernel.tile}"
    if kernel.tile and kernel.tile[6] and kernel.architecture != 90:
        if len(code.splitlines()) > 100:
            yield f"{about}: expected no code where there is no wgmma"
        return
    if kernel.local or re.search(r"\b(LDL|STL)\b", code):
        yield f"{about}: {kernel.local} bytes in local memory"
    if kernel.tile and not re.search(MATRIX[kernel.arithmetic], code):
        yield f"{about}: no {kernel.arithmetic}"
    if kernel.tile and kernel.tile[4] > 1 and not re.search(r"\bLDGSTS\.E\S*\.128", code):
        yield f"{about}: no asynchronous copies of 16 bytes"
    if kernel.tile and kernel.blocks < kernel.tile[5]:
        yield f"{about}: {kernel.blocks} blocks a multiprocessor, expected {kernel.tile[5]}"


def symbols(library: Path) -> Iterator[str]:
    """What the library should not need."""
    for line in _output("nm", "-D", "--undefined-only", str(library)).splitlines():
        symbol = line.split()[-1]
        if "@" in symbol or symbol in STABLE_ABI or symbol.startswith(("_ITM_", "__gmon_start__")):
            continue  # a version after @ names the C or C++ library's
        if not re.fullmatch(STABLE_ABI_PATTERNS, symbol):
            yield f"undefined symbol {symbol}"
    for needed in re.findall(r"NEEDED.*\[(\S+)\]", _output("readelf", "-d", str(library))):
        if not re.fullmatch(SYSTEM_LIBRARIES, needed):
            yield f"needs {needed}"


def table(found: list[Kernel]) -> str:
    lines = [
        "# The extension's kernels",
        "",
        "Written by `make cuda`: what each takes of a multiprocessor, by compute capability. Sizes of tiles are rows x",
        "columns x depth, and how many of them are on their way; copies are in elements.",
        "",
        "| capability | kernel | arithmetic | tile | copies | instructions | registers | shared, KiB | blocks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for k in sorted(found, key=lambda k: (k.architecture, k.name, k.math, [-n for n in k.tile])):
        if not k.tile or (k.tile[6] and k.architecture != 90):
            continue
        rows, columns, depth, stages, copies, *_ = k.tile
        lines.append(
            f"| {k.architecture / 10} | {k.name} | {k.math} | {rows} x {columns} x {depth}, {stages} | {copies} "
            f"| {k.arithmetic} | {k.registers} | {k.shared / 1024:.0f} | {k.blocks} |"
        )
    return "\n".join(lines) + "\n"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _cuobjdump() -> str:
    found = shutil.which("cuobjdump", path=str(Path(build.nvcc() or "").parent)) or shutil.which("cuobjdump")
    triton = find_spec("triton")
    if found is None and triton is not None and triton.origin:
        found = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if found is None:
        raise build.Impossible("no cuobjdump: it comes with the CUDA toolkit, and with Triton")
    return found


def main(folder: Path, page: Path) -> None:
    library = build.build("cuda", folder)
    found, wrong = [], [*symbols(library)]
    for kernel, code in kernels(_cuobjdump(), library):
        found.append(kernel)
        wrong += complaints(kernel, code)
    if not any(kernel.arithmetic == "wgmma" and kernel.architecture == 90 for kernel in found):
        wrong.append("no kernel with wgmma for sm_90a")
    page.write_text(table(found))
    print(f"{library}: {len(found)} kernels, {library.stat().st_size / 2**20:.1f} MiB; table in {page}")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except build.Impossible as reason:
        sys.exit(f"cannot build {build.LIBRARY}: {reason}")
