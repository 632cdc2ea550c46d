"""What the kernels need of a GPU, found without one: they are compiled for its architecture, and their code is read.

    python -m vmae_kernels.resources [--json] [--all]

One configuration of each kernel, or with --all every kind that its launcher chooses.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import reference
from ._triton import INTERPRETED, tl, triton
from .attention import configuration as attention_configuration
from .fsq import configuration as fsq_configuration
from .gather_tokens import configuration as rows_configuration
from .scatter_tokens import FILL_BACKWARD, SPAN
from .soft_topk import configuration as soft_configuration
from .topk import configuration as topk_configuration
from .tubelets import configuration as tubelets_configuration

ARCHITECTURES = (80, 90, 100, 120)
SHARED = {80: 163, 90: 227, 100: 227, 120: 99}  # KiB that a block can have
MATRIX = {
    80: r"\bHMMA",
    90: r"\bHGMMA",
    100: r"\bUTC\w*MMA",
    120: r"\bHMMA",
}  # instructions that multiply matrices of half types


@dataclass(frozen=True)
class Case:
    """A kernel as its launcher specialises it."""

    module: str
    kernel: str
    about: str
    arguments: dict[str, Any]
    """By parameter: a type ("*fp32" for a pointer, "i32", "fp32"), STRIDE, or the value it is specialised for."""
    warps: int = 4
    stages: int = 3
    first: bool = True
    """Whether it stands for its kernel."""
    matrix: bool = False
    """Whether it multiplies matrices of half types."""
    wide: bool = False
    """Whether it is to load and store 16 bytes at a time."""


STRIDE = "stride"  # 32 bits, a multiple of 16
_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Resources:
    kernel: str
    about: str
    architecture: int
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread that found no register."""
    shared: int
    """Bytes of a block."""
    instructions: int
    matrix: int
    """How many of them multiply matrices."""
    wide: int
    """How many of them load or store 16 bytes."""
    complaints: list[str] = field(default_factory=list)
    """Why this will not do, one line each."""


def cases(architecture: int) -> Iterator[Case]:
    """All kernels, each in the configurations of its launcher."""
    arguments: dict[str, Any]
    options: dict[str, Any]
    for dtype, n in (("fp32", 12544), ("bf16", 12544), ("fp32", 1568), ("fp32", 100_000)):
        options = topk_configuration(n, 8)
        warps = options.pop("num_warps")
        arguments = {"p_scores": f"*{dtype}", "p_selected": "*i64", "p_rest": "*i64", "n": "i32", "k": "i32",
                     "stride_row": STRIDE, "stride": 1, "REST": True}  # fmt: skip
        first = (dtype, n) == ("fp32", 12544)
        yield Case("topk", "_partition_kernel", f"{dtype}, N = {n}", arguments | options, warps, first=first)
    for n in (1568, 3136, 12544):
        options = soft_configuration(n)
        warps = options.pop("num_warps")
        for sums in (False, True):
            out = "*fp32" if sums else "*i32"
            arguments = {"p_scores": "*fp32", "p_weight": "*fp32", "p_out": out, "n": "i32", "k": "i32",
                         "samples": "i32", "sigma": "fp32", "seed": "i64", "row0": "i32", "stride_row": STRIDE,
                         "stride": 1, "stride_wrow": STRIDE, "stride_w": 1, "SUMS": sums, "NOISE": True}  # fmt: skip
            about = f"{'backward' if sums else 'forward'}, N = {n}"
            yield Case("soft_topk", "_indicator_kernel", about, arguments | options, warps, first=n == 1568)
    arguments = {"p_factors": "*fp32", "p_out": "*fp32", "n": "i32", "samples": "i32", "seed": "i64", "row0": "i32"}
    yield Case("soft_topk", "_gradient_kernel", "fp32", arguments | {"WIDE": tl.float32, "BLOCK": 1024})
    for bits, d in ((16, 768), (32, 384), (32, 5)):
        options = rows_configuration(d, bits // 8)
        warps, aligned = options.pop("num_warps"), d % 16 == 0
        row = STRIDE if aligned else "i32"
        sizes = {"n": "i32", "k": "i32", "d": row}
        index = {"p_indices": "*i64", "stride_ib": "i32", "stride_ik": 1}
        arguments = {"p_x": f"*i{bits}", "p_y": f"*i{bits}", "stride_xb": row, "stride_xn": row, "stride_xd": 1}
        arguments |= sizes | index | options
        about, first = f"{bits} bits, D = {d}", d == 768
        yield Case("gather_tokens", "_gather_kernel", about, arguments, warps, first=first, wide=aligned)
        sizes.pop("k")
        for fill in (1, 3):
            arguments = {"p_y": f"*i{bits}", "p_inverse": "*i32", "p_fill": f"*i{bits}", "p_x": f"*i{bits}",
                         "stride_yb": row, "stride_yk": row, "stride_yd": 1, "stride_fb": row, "stride_fn": row,
                         "stride_fd": 1, "FILL": fill}  # fmt: skip
            arguments |= sizes | options
            named = f"{about}, fill of {fill} dimensions"
            yield Case("gather_tokens", "_place_kernel", named, arguments, warps, first=first, wide=aligned)
    options = dict(FILL_BACKWARD)
    warps = options.pop("num_warps")
    arguments = {"p_grad": "*bf16", "p_inverse": "*i32", "p_sums": "*fp32", "rows": "i32", "n": "i32", "d": STRIDE,
                 "stride_gb": STRIDE, "stride_gn": STRIDE, "stride_gd": 1, "WIDE": tl.float32, "SPAN": SPAN,
                 **options}  # fmt: skip
    yield Case("scatter_tokens", "_fill_backward_kernel", "bf16, D = 384", arguments, warps, wide=True)
    arguments = {"p_indices": "*i64", "p_inverse": "*i32", "n": "i32", "k": "i32", "stride_ib": "i32", "stride_ik": 1}
    yield Case("gather_tokens", "_invert_kernel", "int64", arguments | {"ROWS": 1024})
    arguments = {"p_grad": "*bf16", "p_order": "*i64", "p_starts": "*i32", "p_x": "*bf16", "n": "i32", "k": "i32",
                 "d": STRIDE, "stride_gb": STRIDE, "stride_gk": STRIDE, "stride_gd": 1, "WIDE": tl.float32,
                 "COLUMNS": 1024}  # fmt: skip
    yield Case("gather_tokens", "_sum_kernel", "bf16, D = 768", arguments)
    options = rows_configuration(384, 2)
    warps = options.pop("num_warps")
    arguments = {"p_visible": "*bf16", "p_visible_indices": "*i64", "p_selected_indices": "*i64", "p_mask": "*fp32",
                 "p_positions": "*fp32", "p_z": "*bf16", "v": "i32", "k": "i32", "n": "i32", "d": STRIDE,
                 "stride_vb": STRIDE, "stride_vi": STRIDE, "stride_vd": 1, "stride_ib": "i32", "stride_ii": 1,
                 "stride_sb": "i32", "stride_si": 1, "stride_m": 1, "stride_pb": 0, "stride_pn": STRIDE,
                 "stride_pd": 1, "WIDE": tl.float32}  # fmt: skip
    yield Case("decoder_tokens", "_decoder_tokens_kernel", "bf16, D = 384", arguments | options, warps, wide=True)
    scale, shift = reference.affine((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True)
    for packed in (True, False):
        place: dict[str, Any] = {"stride_vc": 1, "stride_vw": 3} if packed else {"stride_vc": STRIDE, "stride_vw": 1}
        arguments = {"p_video": "*u8", "p_indices": "*i64", "p_patches": "*bf16", "k": "i32", "grid_t": "i32",
                     "grid_h": "i32", "grid_w": "i32", "stride_vb": STRIDE, "stride_vt": STRIDE, "stride_vh": STRIDE,
                     **place, "stride_ib": "i32", "stride_ik": 1, "T": 2, "H": 16, "W": 16, "C": 3, "SCALE": scale,
                     "SHIFT": shift, "PACKED": packed, "COMPUTE": tl.float32}  # fmt: skip
        options = tubelets_configuration(2 * 16 * 16 * 3)
        warps = options.pop("num_warps")
        about = f"uint8, channels {'last' if packed else 'first'}"
        yield Case("tubelets", "_tubelets_kernel", about, arguments | options, warps, first=packed, wide=packed)
    half, offset, move, width = reference.fsq_numbers((8,) * 6)
    arguments = {"p_z": "*fp32", "p_quantized": "*fp32", "p_codes": "*i32", "rows": "i32", "HALF": half,
                 "OFFSET": offset, "SHIFT": move, "WIDTH": width, "HIGHEST": (3.0,) * 6,
                 "RADIX": tuple(8**i for i in range(6)), "L": 6, "WIDE": tl.float32}  # fmt: skip
    options = fsq_configuration(6)
    warps = options.pop("num_warps")
    yield Case("fsq", "_fsq_kernel", "fp32, L = 6", arguments | options, warps)
    arguments = {"p_grad": "*fp32", "p_z": "*fp32", "p_out": "*fp32", "n": STRIDE, "SHIFT": move, "SLOPE": half, "L": 6,
                 "WIDE": tl.float32, "BLOCK": 1024}  # fmt: skip
    yield Case("fsq", "_fsq_backward_kernel", "fp32, L = 6", arguments, wide=True)
    for dtype in _SIZES:
        for d in (16, 32, 64, 80, 96, 128):
            for indexed, packed in ((False, False), (True, False), (False, True)):
                yield from _attention_cases(architecture, dtype, d, indexed, packed)


def _attention_cases(architecture: int, dtype: str, d: int, indexed: bool, packed: bool) -> Iterator[Case]:
    names = (*(f"stride_{x}{y}" for x in "gqkv" for y in "bhmn"), "stride_ob", "stride_oh", "stride_om", "stride_db",
             "stride_dh", "stride_dm", "stride_dn")  # fmt: skip
    arguments: dict[str, Any] = {f"p_{x}": f"*{dtype}" for x in ("q", "k", "v", "o", "grad", "dq", "dk", "dv")}
    arguments |= {"p_lse": "*fp32", "p_delta": "*fp32"} | dict.fromkeys(names, STRIDE)
    arguments |= {f"stride_{x}d": 1 for x in "gqkv"} | dict.fromkeys(("heads", "m", "n", "total", "stride_lse"), "i32")
    arguments |= {"p_indices": "*i64" if indexed else f"*{dtype}", "stride_ib": "i32", "stride_is": 1}
    arguments |= dict.fromkeys(("p_cu_q", "p_cu_k"), "*i32" if packed else f"*{dtype}")
    arguments |= {"scale": "fp32", "factor": "fp32", "PACKED": packed, "INDEXED": indexed, "D": d, "WIDE": tl.float32}
    kind = ", indexed" if indexed else ", packed" if packed else ""
    for kernel in ("_forward_kernel", "_delta_kernel", "_keys_backward_kernel", "_queries_backward_kernel"):
        if kernel == "_delta_kernel" and kind:
            continue
        backward = kernel != "_forward_kernel"
        options = attention_configuration(d, _SIZES[dtype], backward=backward, architecture=architecture)
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        if kernel == "_delta_kernel":
            options |= {"BLOCK_M": 32}
        multiplies = kernel != "_delta_kernel"
        yield Case("attention", kernel, f"{dtype}, d = {d}{kind}", arguments | options, warps, stages,
                   first=(dtype, d, kind) == ("bf16", 64, ""), matrix=multiplies and dtype != "fp32",
                   wide=d >= 64)  # fmt: skip


def compiled(case: Case, architecture: int) -> Resources:
    """Compile a case, and say what came of it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(sys.modules[f"{__package__}.{case.module}"], case.kernel)
    given = {name: case.arguments[name] for name in kernel.arg_names}
    types = {name: "i32" if value == STRIDE else value for name, value in given.items() if isinstance(value, str)}
    aligned = [
        i for i, value in enumerate(given.values()) if isinstance(value, str) and (value[0] == "*" or value == STRIDE)
    ]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in given},
        constexprs={(i,): value for i, (name, value) in enumerate(given.items()) if name not in types},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": case.module == "attention"}
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        usage, code = (_cuobjdump(option, file) for option in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected the use of registers, got {usage!r}")
    registers, spilled = map(int, found.groups())
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", code, re.MULTILINE)
    matrix = sum(bool(re.search(MATRIX[architecture], line)) for line in lines)
    wide = sum(bool(re.search(r"\b(LDG|STG|LDGSTS)\.\S*128", line)) for line in lines)
    complaints = []
    if spilled:
        complaints.append(f"expected all in registers, found {spilled} bytes of a thread spilled")
    if binary.metadata.shared > SHARED[architecture] * 1024:
        complaints.append(
            f"expected {SHARED[architecture]} KiB of shared memory at most, found {binary.metadata.shared}"
        )
    if case.matrix and not matrix:
        complaints.append(f"expected matrix instructions ({MATRIX[architecture]}), found none")
    if case.wide and not wide:
        complaints.append("expected loads or stores of 16 bytes, found none")
    return Resources(f"{case.module}: {case.kernel.strip('_').removesuffix('_kernel')}", case.about, architecture,
                     registers, spilled, binary.metadata.shared, len(lines), matrix, wide, complaints)  # fmt: skip


def _cuobjdump(option: str, file: Path) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, file], capture_output=True, text=True, check=True).stdout


def _compiled(number: int, architecture: int) -> Resources:
    return compiled(list(cases(architecture))[number], architecture)


def measured(*, every: bool = False, processes: int = 2) -> list[Resources]:
    """All cases, or one for each kernel, on all architectures.

    Raises:
        RuntimeError: Triton is not installed, or interprets.
    """
    if triton is None or INTERPRETED:
        raise RuntimeError("expected Triton as a compiler: installed, and without TRITON_INTERPRET=1")
    wanted = [i for i, case in enumerate(cases(ARCHITECTURES[0])) if every or case.first]
    jobs = [(i, architecture) for i in wanted for architecture in ARCHITECTURES]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(_compiled, *zip(*jobs, strict=True)))


def table(rows: list[Resources]) -> str:
    head = ("kernel", "case", "sm", "registers", "spilled", "shared", "instr", "matrix", "16 bytes")
    lines = ["{:<36}{:<26}{:>4}{:>10}{:>9}{:>8}{:>7}{:>8}{:>10}".format(*head)]
    for row in rows:
        kernel, about, *numbers, complaints = asdict(row).values()
        lines.append("{:<36}{:<26}{:>4}{:>10}{:>9}{:>8}{:>7}{:>8}{:>10}".format(kernel, about, *numbers))
        lines += [f"  {complaint}" for complaint in complaints]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m vmae_kernels.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print json in place of a table")
    parser.add_argument("--all", action="store_true", help="every configuration, not one for each kernel")
    asked = parser.parse_args()
    try:
        rows = measured(every=asked.all)
    except RuntimeError as error:
        sys.exit(f"resources: error: {error}")
    print(json.dumps([asdict(row) for row in rows], indent=2) if asked.json else table(rows))
    sys.exit(any(row.complaints for row in rows))
