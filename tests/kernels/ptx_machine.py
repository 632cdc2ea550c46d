"""A GPU's blocks on the CPU: runs PTX, what compilers make of a kernel, instruction by instruction for all threads.

It is slow, and knows what our kernels use; anything else is an `Unknown`. It sees what an interpreter of the source
cannot: what the compiler made of the layouts, matrix fragments and asynchronous copies, and it raises `Fault` for

- an access outside the tensors that were passed, or one whose address is no multiple of its size;
- a race: two threads touch a byte of shared memory, one of them writes, and no barrier lies between; or two blocks do
  so in global memory;
- a byte of an asynchronous copy, or one that an asynchronous product reads, touched before it was waited for. Copies
  read and write as late as the wait allows, so that what needed them earlier finds the old bytes;
- a shuffle, vote or matrix instruction that not all of its threads reach together; a barrier that some never reach.

Arithmetic is IEEE's, but for `.approx`, which is exact here, and matrix products, summed in float64. The threads of a
warp go in step, those behind first, so that they meet again after a branch.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LANES = 32
NUMBERS = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64, "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64, "f16x2": np.uint32,
    "bf16x2": np.uint32, "tf32": np.uint32,
}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Array = Any
Step = Callable[["Block", Array], None]


class Fault(Exception):
    """What a GPU would have done wrong, or might have."""


class Unknown(Exception):
    """An instruction that this machine does not know."""


# --- numbers -----------------------------------------------------------------------------------------------------


def widened(x: Array) -> Array:
    """bfloat16 bits as float32."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def narrowed(x: Array) -> Array:
    """float32 as bfloat16 bits, to the nearest, halves to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def flushed(x: Array) -> Array:
    """Without what is subnormal, as `.ftz` has it."""
    return np.where(np.abs(x) < np.float32(2**-126), np.copysign(np.float32(0), x), x)


def decoded(bits: Array, kind: str) -> Array:
    return widened(bits) if kind == "bf16" else bits.view(NUMBERS[kind])


def encoded(x: Array, kind: str) -> Array:
    """The bits of numbers of a kind, as unsigned integers."""
    if kind == "pred":
        return np.asarray(x, np.bool_)
    if kind == "bf16":
        return narrowed(x)
    x = np.ascontiguousarray(x, NUMBERS[kind])
    return x.view(UNSIGNED[x.itemsize])


def to_integer(x: Array, kind: str, how: str) -> Array:
    """Rounded as told, then cut to what the kind holds; NaN is 0."""
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[how](x.astype(np.float64))
    bounds = np.iinfo(NUMBERS[kind])
    inside = np.where(np.isnan(x), 0.0, np.clip(rounded, float(bounds.min), float(bounds.max)))
    top = inside >= float(bounds.max)  # which as float64 may be one more
    return np.where(top, bounds.max, np.where(top, 0.0, inside).astype(NUMBERS[kind]))


# --- programs ----------------------------------------------------------------------------------------------------


@dataclass
class Instruction:
    text: str
    parts: list[str]
    operands: list[str]
    guard: tuple[str, bool] | None
    """A predicate's name, and whether it is negated."""


@dataclass
class Program:
    """One kernel of a PTX module."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    """name -> the kind it was declared with"""
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    """name -> where it begins, and its bytes"""
    shared: dict[str, int] = field(default_factory=dict)
    local: dict[str, int] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)
    shared_size: int = 0
    local_size: int = 0


def _sizes(text: str) -> tuple[str, int, int, str]:
    """Of a declaration such as `.align 16 .b8 name[24]`: name, bytes, alignment, kind."""
    align = re.search(r"\.align\s+(\d+)", text)
    found = re.search(r"\.(pred|[bsuf]\d+)\s+(?:\.ptr.*?)?([\w$.%]+)\s*(?:\[(\d*)\])?\s*$", text)
    if found is None:
        raise Unknown(f"declaration {text!r}")
    size = np.dtype(NUMBERS[found[1]]).itemsize
    return found[2], size * int(found[3] or (0 if found[3] == "" else 1)), int(align[1]) if align else size, found[1]


def parsed(ptx: str, name: str | None = None) -> Program:
    """The kernel of a name, or the only one, of a PTX module."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    ptx = re.sub(r"^\s*\.(loc|file|pragma)\b[^\n]*$", "", ptx, flags=re.MULTILINE)
    ptx = re.sub(r"\.section\s+\.debug[^{]*\{.*?\n\s*\}", "", ptx, flags=re.DOTALL)
    entries = re.findall(r"\.entry\s+([\w$]+)", ptx)
    name = name or entries[0]
    head, _, rest = re.split(rf"(\.entry\s+{re.escape(name)}\b)", ptx, maxsplit=1)
    program = Program(name)
    for declaration in re.findall(r"\.(?:global|const)\s+([^;]*\{[^}]*\})\s*;", head):
        left, _, values = declaration.partition("=")
        known, size, _, kind = _sizes(left)
        numbers = [int(value, 0) for value in values.strip(" {}\n").split(",")]
        program.constants[known] = np.array(numbers, NUMBERS[kind]).view(np.uint8)
    offset = 0
    signature, body = re.fullmatch(r"\s*\((.*?)\)([^{]*\{.*)", rest, re.DOTALL).groups()
    for parameter in filter(str.strip, signature.split(",")):
        known, size, align, _ = _sizes(re.sub(r"\.ptr(\s+\.\w+)?(\s+\.align\s+\d+)?", "", parameter.strip()))
        offset = -(-offset // align) * align
        program.parameters[known] = (offset, size)
        offset += size
    for declaration in re.findall(r"\.shared\s+([^;{}=]*);", head):
        _declare(program, ".shared " + declaration)
    body = body[body.index("{") :]
    depth, end = 0, len(body)
    for place, letter in enumerate(body):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            end = place
            break
    for statement in _statements(body[1:end]):
        if statement.endswith(":"):
            program.labels[statement[:-1]] = len(program.instructions)
        elif statement.startswith("."):
            _declare(program, statement)
        else:
            program.instructions.append(_instruction(statement))
    return program


def _statements(body: str) -> list[str]:
    """Labels, declarations and instructions; braces that only make a scope are left out."""
    found = []
    for piece in body.split(";"):
        piece = piece.strip()
        while True:
            piece = piece.lstrip("{} \t\n") if not re.match(r"\{\s*%", piece) else piece
            label = re.match(r"([$\w]+):", piece)
            if label is None or "::" in piece[: label.end() + 1]:
                break
            found.append(label[0])
            piece = piece[label.end() :].strip()
        if piece:
            found.append(" ".join(piece.split()))
    return found


def _declare(program: Program, statement: str) -> None:
    if statement.startswith(".reg"):
        for known in re.sub(r"^\.reg\s+\.\w+\s+", "", statement).split(","):
            kind = re.match(r"\.reg\s+\.(\w+)", statement)[1]
            many = re.fullmatch(r"\s*([%\w$]+)<(\d+)>\s*", known)
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [known.strip()]
            program.registers.update(dict.fromkeys(names, kind))
    elif re.match(r"\.(extern\s+)?shared", statement):
        known, size, align, _ = _sizes(statement)
        program.shared[known] = -(-program.shared_size // align) * align
        program.shared_size = program.shared[known] + size
    elif statement.startswith(".local"):
        known, size, align, _ = _sizes(statement)
        program.local[known] = -(-program.local_size // align) * align
        program.local_size = program.local[known] + size
    elif not statement.startswith((".pragma", ".branchtargets")):
        raise Unknown(statement)


def _instruction(text: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%?[\w$]+)\s+)?([\w.:]+)\s*(.*)", text)
    if found is None:
        raise Unknown(text)
    operands, depth, last = [], 0, ""
    for letter in found[4]:
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            operands.append(last.strip())
            last = ""
        else:
            last += letter
    if last.strip():
        operands.append(last.strip())
    return Instruction(text, found[3].split("."), operands, (found[2], found[1] == "!") if found[2] else None)


def waits(ptx: str) -> Iterator[str]:
    """The code without one of its barriers or waits, for each of them: to see whether that is noticed."""
    wait = r"\b(bar\.sync|barrier\.sync|cp\.async\.wait_(group|all)|wgmma\.wait_group)\b[^;]*;"
    for found in re.finditer(wait, ptx):
        yield ptx[: found.start()] + ptx[found.end() :]


# --- memory ------------------------------------------------------------------------------------------------------


def aligned(addresses: Array, size: int) -> None:
    if (addresses % np.asarray(size, addresses.dtype)).any():
        raise Fault(f"an address that is no multiple of {size}")


class Region:
    """Bytes that blocks share, and which of them have read and written each."""

    def __init__(self, start: int, data: Array, name: str, watched: bool = True):
        self.start, self.data, self.name = start, data, name
        self.views = {size: data[: len(data) // size * size].view(UNSIGNED[size]) for size in UNSIGNED}
        self.writer, self.reader = (np.zeros(len(data) if watched else 0, np.int32) for _ in range(2))
        self.watched = watched

    def touch(self, places: Array, block: int, write: bool) -> Array:
        """Note an access by a block (from 1 on); which places another block has touched so that the order counts."""
        if not self.watched:
            return np.zeros(places.shape, np.bool_)
        writer, reader = self.writer[places], self.reader[places]
        bad = (writer != 0) & (writer != block)
        if write:
            bad |= (reader != 0) & (reader != block)
            self.writer[places] = block
        else:
            self.reader[places] = np.where((reader == 0) | (reader == block), block, -1)
        return bad


class Shared:
    """A block's shared memory, and who has touched each byte since the last barrier."""

    def __init__(self, size: int, threads: int):
        self.data = np.full(size, 0xA5, np.uint8)
        self.views = {width: self.data[: size // width * width].view(UNSIGNED[width]) for width in UNSIGNED}
        self.writer, self.reader = np.zeros(size, np.int32), np.zeros(size, np.int32)  # thread + 1; -2 - warp; -1
        self.written, self.read = np.zeros(size, np.int32), np.zeros(size, np.int32)  # in which phase of its warp
        self.flying = np.zeros(size, np.int32)  # copies under way
        self.watched = np.zeros(size, np.int32)  # products under way that read it
        self.phase = np.zeros(threads // LANES + 1, np.int32)  # of each warp: how often its threads have met

    def barrier(self) -> None:
        self.writer[:] = 0
        self.reader[:] = 0

    def touch(self, places: Array, threads: Array, write: bool) -> None:
        """Note accesses to bytes [threads, bytes], or raise `Fault`."""
        who = np.broadcast_to(threads[:, None] + 1, places.shape)
        warp = (who - 1) // LANES

        def others(known: Array, phase: Array) -> Array:
            """Whether someone else has touched a byte since these threads last met."""
            of = np.where(known > 0, (known - 1) // LANES, -2 - known)  # -1: of several warps
            return (known != 0) & (known != who) & ~((of == warp) & (phase < self.phase[warp]))

        written = others(self.writer[places], self.written[places])
        bad = written | (self.flying[places] > 0)
        if write:
            bad |= others(self.reader[places], self.read[places]) | (self.watched[places] > 0)
        if bad.any():
            thread, byte = (int(x[bad][0]) for x in (who - 1, places))
            verb = "writes" if write else "reads"
            if self.flying[byte]:
                raise Fault(f"thread {thread} {verb} shared byte {byte}, which an asynchronous copy has yet to write")
            if write and self.watched[byte]:
                raise Fault(f"thread {thread} writes shared byte {byte}, which an asynchronous product still reads")
            before = "wrote" if written[bad][0] else "read"
            raise Fault(f"race: thread {thread} {verb} shared byte {byte}, which another {before} since they last met")
        if write:
            self.writer[places], self.written[places] = who, self.phase[warp]
            return
        known = self.reader[places]
        of = np.where(known > 0, (known - 1) // LANES, -2 - known)
        own = (known == 0) | (known == who) | ((of == warp) & (self.read[places] < self.phase[warp]))
        self.reader[places] = np.where(own, who, np.where(of == warp, -2 - warp, -1))
        lost = own & (self.reader[places] != who)  # to another thread that reads it in this very instruction
        if lost.any():
            same = (self.reader[places[lost]] - 1) // LANES == warp[lost]
            self.reader[places[lost]] = np.where(same, -2 - warp[lost], -1)
        self.read[places] = self.phase[warp]


class Machine:
    """Launches kernels over memory that is told to it."""

    def __init__(self) -> None:
        self.programs: dict[tuple[str, str | None], Program] = {}
        self.code: dict[tuple[int, int], list] = {}
        self.executed = 0

    def program(self, ptx: str, name: str | None = None) -> Program:
        if (ptx, name) not in self.programs:
            self.programs[ptx, name] = parsed(ptx, name)
        return self.programs[ptx, name]

    def launch(
        self,
        ptx: str,
        grid: Sequence[int],
        threads: int | Sequence[int],
        arguments: Sequence[bytes] | bytes,
        memory: Sequence[tuple[int, Array, str]],
        *,
        shared: int = 0,
        name: str | None = None,
    ) -> None:
        """Run a kernel: `arguments` as bytes by parameter, or all of them; `memory` as address, bytes, name."""
        program = self.program(ptx, name)
        if not isinstance(arguments, bytes):
            whole = bytearray(max((begin + size for begin, size in program.parameters.values()), default=0))
            for (begin, size), value in zip(program.parameters.values(), arguments, strict=True):
                whole[begin : begin + size] = value[:size].ljust(size, b"\0")
            arguments = bytes(whole)
        regions = [Region(start, data, label) for start, data, label in memory if len(data)]
        symbols = {}
        for known, data in program.constants.items():
            symbols[known] = data.__array_interface__["data"][0]
            regions.append(Region(symbols[known], data, known, watched=False))
        shape = (threads, 1, 1) if isinstance(threads, int) else (*threads, 1, 1)[:3]
        code = self.code.get((id(program), int(np.prod(shape))))
        if code is None:
            code = _compile(program, int(np.prod(shape)), symbols)
            self.code[id(program), int(np.prod(shape))] = code
        full = (*grid, 1, 1)[:3]
        with np.errstate(all="ignore"):
            for number in range(int(np.prod(full))):
                place = (number % full[0], number // full[0] % full[1], number // full[0] // full[1])
                block = Block(program, code, shape, place, full, number, arguments, regions, shared)
                block.run()
                self.executed += block.executed


class Block:
    def __init__(self, program, code, shape, place, grid, number, parameters, regions, shared) -> None:
        self.program, self.code, self.number, self.regions = program, code, number + 1, regions
        self.threads = int(np.prod(shape))
        self.all = np.arange(self.threads)
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.shared = Shared(program.shared_size + shared, self.threads)
        self.local = np.zeros((self.threads, program.local_size), np.uint8)
        self.registers = [
            np.full(self.threads, 0xDEADBEEFDEADBEEF & (2 ** (8 * np.dtype(NUMBERS[kind]).itemsize) - 1)).astype(
                np.bool_ if kind == "pred" else UNSIGNED[np.dtype(NUMBERS[kind]).itemsize]
            )
            for kind in program.registers.values()
        ]
        self.carry = np.zeros(self.threads, np.uint64)
        x, y = self.all % shape[0], self.all // shape[0] % shape[1]
        self.special = {"%laneid": self.all % LANES, "%warpid": self.all // LANES}
        for letter, own, size, at, many in zip(
            "xyz", (x, y, self.all // shape[0] // shape[1]), shape, place, grid, strict=True
        ):
            for kind, value in (("tid", own), ("ntid", size), ("ctaid", at), ("nctaid", many)):
                self.special[f"%{kind}.{letter}"] = np.full(self.threads, value)
        self.alive = np.ones(self.threads, np.bool_)
        self.copies: list[dict] = []
        self.committed = np.zeros(self.threads, np.int64)
        # Of each group of asynchronous products under way, and of those in none yet: bytes read, registers written.
        self.products: list[list[tuple[list[Array], set[int]]]] = []
        self.open: list[tuple[list[Array], set[int]]] = []
        self.busy: set[int] = set()
        self.executed = 0

    def put(self, register: int, value: Array, mask: Array) -> None:
        registers = self.registers
        registers[register] = value if mask is None else np.where(mask, value, registers[register])

    def active(self, mask: Array) -> Array:
        return self.all if mask is None else np.flatnonzero(mask)

    def run(self) -> None:
        code, labels = self.code, set(self.program.labels.values())
        groups: dict[int, Array] = {0: self.alive.copy()}
        waiting: dict[str, tuple[Array, int, int]] = {}

        def park(pc: int, mask: Array) -> None:
            groups[pc] = groups[pc] | mask if pc in groups else mask

        def met(barrier: str) -> bool:
            mask, _, count = waiting[barrier]
            return mask.sum() >= (count or self.alive.sum())

        while groups:
            pc = min(groups)
            mask = groups.pop(pc)
            whole = bool(mask.all())
            while True:
                kind, step, guard, negated, touched, instruction = code[pc]
                self.executed += 1
                now = None if whole else mask
                if guard is not None:
                    holds = self.registers[guard] ^ negated
                    now = holds if now is None else holds & now
                    if not now.any():
                        now = False
                    elif now.all():
                        now = None
                pc += 1
                if now is not False:
                    try:
                        if self.busy and not self.busy.isdisjoint(touched):
                            raise Fault("a register that an asynchronous product has yet to write")
                        if kind is None:
                            step(self, now)
                        elif kind == "branch":
                            if now is None or (now == mask).all():
                                pc = step
                            else:
                                park(step, now)
                                mask, whole = mask & ~now, False
                        elif kind == "exit":
                            gone = self.alive if now is None else now
                            self.alive = self.alive & ~gone
                            mask, whole = mask & ~gone, False
                            if not mask.any():
                                break
                        else:  # a barrier
                            barrier, count = step(self, now)
                            here = self.alive if now is None else now
                            before = waiting.get(barrier, (np.zeros_like(here), pc, count))[0]
                            waiting[barrier] = (before | here, pc, count)
                            break
                    except Fault as fault:
                        raise Fault(f"{fault} ({self.program.name}, block {self.number - 1}: {instruction})") from None
                    except Exception as error:
                        raise RuntimeError(f"{self.program.name}: {instruction}") from error
                if groups and (kind == "branch" or pc in labels):
                    if pc in groups:
                        mask = mask | groups.pop(pc)
                        whole = bool(mask.all())
                    if groups and min(groups) < pc:
                        park(pc, mask)
                        break
            for barrier in [barrier for barrier in waiting if met(barrier)]:
                released, after, _ = waiting.pop(barrier)
                self.shared.barrier()
                park(after, released)
        if waiting:
            raise Fault(f"{self.program.name}: barrier {next(iter(waiting))} is never reached by all")
        if self.copies:
            raise Fault(f"{self.program.name}: ends with asynchronous copies that were not waited for")

    # --- memory --------------------------------------------------------------------------------------------------

    def parts(self, addresses: Array, size: int) -> list[tuple[Region, Any]]:
        """The regions that hold these, each with which of them it holds; all of them, or `Fault`."""
        found, left = [], np.ones(addresses.shape, np.bool_)
        for region in self.regions:
            low, high = int(addresses.min()) - region.start, int(addresses.max()) - region.start
            if low >= 0 and high + size <= len(region.data):
                return [(region, slice(None))]
            offset = addresses.astype(np.int64) - region.start
            inside = (offset >= 0) & (offset + size <= len(region.data)) & left
            if inside.any():
                found.append((region, inside))
                left &= ~inside
        if left.any():
            outside = int(addresses[left][0])
            nearest = min(self.regions, key=lambda region: abs(outside - region.start))
            raise Fault(
                f"address outside every tensor: byte {outside - nearest.start} of {nearest.name}, which has "
                f"{len(nearest.data)}"
            )
        return found

    def in_global(self, addresses: Array, element: int, count: int, write: bool) -> list[tuple[Array, Array, Any]]:
        """Where elements [threads, count] lie: a view, the first element's place in it, and for which threads."""
        total = element * count
        aligned(addresses, total)
        found = []
        for region, which in self.parts(addresses, total):
            offset = addresses[which].astype(np.int64) - region.start
            touched = offset[:, None] + np.arange(total)
            bad = region.touch(touched, self.number, write)
            if bad.any():
                raise Fault(f"race: another block has touched byte {touched[bad][0]} of {region.name}")
            found.append((region.views[element], offset // element, which))
        return found

    def in_shared(self, addresses: Array, threads: Array, size: int, write: bool) -> Array:
        """Their places, noted as touched."""
        places = addresses.astype(np.int64)
        aligned(places, size)
        if (places < 0).any() or (places + size > len(self.shared.data)).any():
            raise Fault(f"bytes {places.min()} to {places.max() + size - 1} of shared memory, which has "
                        f"{len(self.shared.data)}")  # fmt: skip
        self.shared.touch(places[:, None] + np.arange(size), threads, write)
        return places

    def load(self, space: str, addresses: Array, threads: Array, element: int, count: int) -> Array:
        """Elements [threads, count], as unsigned integers."""
        out = np.empty((len(addresses), count), UNSIGNED[element])
        if space == "shared":
            first = self.in_shared(addresses, threads, element * count, False) // element
            return self.shared.views[element][first[:, None] + np.arange(count)]
        for view, first, which in self.in_global(addresses, element, count, False):
            out[which] = view[first[:, None] + np.arange(count)]
        return out

    def store(self, space: str, addresses: Array, threads: Array, values: Array) -> None:
        element, count = values.itemsize, values.shape[1]
        if space == "shared":
            first = self.in_shared(addresses, threads, element * count, True) // element
            targets = [(self.shared.views[element], first, slice(None))]
        else:
            targets = self.in_global(addresses, element, count, True)
        for view, first, which in targets:
            places = first[:, None] + np.arange(count)
            view[places] = values[which]
            if (view[places] != values[which]).any():
                raise Fault("race: threads write different values to one place")

    def complete(self, which: Array) -> None:
        """Carry out the copies of those threads: `which` [threads] counts the groups that may remain, or -1."""
        left = []
        for copy in self.copies:
            due = (which[copy["thread"]] >= 0) & (
                copy["group"] < self.committed[copy["thread"]] - which[copy["thread"]]
            )
            if due.any():
                thread, shared = copy["thread"][due], copy["shared"][due]
                places = shared[:, None] + np.arange(copy["size"])
                np.subtract.at(self.shared.flying, places, 1)
                self.shared.touch(places, thread, True)
                self.shared.data[places] = 0
                for size in np.unique(copy["bytes"][due]):
                    some = copy["bytes"][due] == size
                    if size:
                        value = self.load("global", copy["address"][due][some], thread[some], 1, int(size))
                        self.shared.data[shared[some][:, None] + np.arange(size)] = value
            if not due.all():
                left.append({k: v if k == "size" else v[~due] for k, v in copy.items()})
        self.copies = left


# --- instructions ------------------------------------------------------------------------------------------------


class _Compiler:
    """Makes a function of (block, mask) of each instruction of a program."""

    def __init__(self, program: Program, threads: int, symbols: dict[str, int]) -> None:
        self.program, self.threads, self.symbols = program, threads, symbols
        self.numbers = {name: i for i, name in enumerate(program.registers)}
        self.kinds = list(program.registers.values())

    def code(self) -> list[tuple]:
        made = []
        for instruction in self.program.instructions:
            guard, negated = instruction.guard or (None, False)
            kind, step = self.step(instruction)
            names = re.findall(r"%[\w$]+", " ".join(instruction.operands))
            touched = frozenset(self.numbers[name] for name in names if name in self.numbers)
            asynchronous = instruction.parts[0] == "wgmma"
            number = None if guard is None else self.numbers[guard]
            made.append((kind, step, number, negated, frozenset() if asynchronous else touched, instruction.text))
        return made

    def step(self, instruction: Instruction) -> tuple[str | None, Any]:
        parts, operands = instruction.parts, instruction.operands
        head = parts[0]
        if head == "bra":
            return "branch", self.program.labels[operands[0]]
        if head in ("ret", "exit", "trap"):
            return "exit", None
        if head in ("bar", "barrier") and "warp" not in parts:
            barrier, count = operands[0], int(operands[1]) if len(operands) > 1 else 0
            return "barrier", lambda block, mask: (barrier, count)
        handler = getattr(self, f"_{head}", None)
        if handler is None:
            raise Unknown(instruction.text)
        return None, handler(parts, operands)

    # Operands.

    def constant(self, text: str, kind: str) -> Array:
        size = np.dtype(NUMBERS[kind]).itemsize
        if text[:2] in ("0f", "0F"):
            value = np.array([int(text[2:], 16)], np.uint32)
        elif text[:2] in ("0d", "0D"):
            value = np.array([int(text[2:], 16)], np.uint64)
        else:
            number = int(text.rstrip("U"), 0)
            if kind == "pred":
                return np.full(self.threads, number != 0)
            value = np.array([number & (2 ** (8 * size) - 1)], UNSIGNED[size])
        return decoded(np.full(self.threads, value[0], value.dtype), kind)

    def source(self, text: str, kind: str) -> Callable[[Block], Array]:
        """An operand's numbers, of a kind."""
        if text.startswith(("-%", "!%")):  # only of predicates
            inner = self.source(text[1:], kind)
            return lambda block: ~inner(block)
        if text in self.numbers:
            register = self.numbers[text]
            size = np.dtype(NUMBERS[kind]).itemsize
            held = np.dtype(NUMBERS[self.kinds[register]]).itemsize
            if kind == "pred":
                return lambda block: block.registers[register]
            if held == size:
                return lambda block: decoded(block.registers[register], kind)
            if held > size:
                return lambda block: decoded(block.registers[register].astype(UNSIGNED[size]), kind)
            raise Unknown(f"{text} as {kind}")
        if text.startswith("%"):
            return lambda block: block.special[text].astype(NUMBERS[kind])
        if re.fullmatch(r"-?\d\w*", text):
            value = self.constant(text, kind)
            return lambda block: value
        base = self.address_of(text)
        value = np.full(self.threads, base, NUMBERS[kind])
        return lambda block: value

    def address_of(self, name: str) -> int:
        if name in self.program.parameters:
            return self.program.parameters[name][0]
        for known in (self.program.shared, self.program.local, self.symbols):
            if name in known:
                return known[name]
        raise Unknown(f"operand {name!r}")

    def address(self, text: str) -> Callable[[Block], Array]:
        inner = text.strip("[] ")
        base, sign, offset = (x.strip() for x in re.fullmatch(r"([^+-]*)([+-]?)(.*)", inner).groups())
        step = int(offset, 0) * (-1 if sign == "-" else 1) if offset else 0
        if base not in self.numbers:
            place = self.address_of(base) if not re.fullmatch(r"\d+", base) else int(base)
            value = np.full(self.threads, place + step, np.uint64)
            return lambda block: value
        register = self.numbers[base]
        if self.kinds[register] in ("b64", "u64", "s64"):
            move = np.uint64(step & (2**64 - 1))
            return lambda block: block.registers[register] + move
        return lambda block: block.registers[register].astype(np.int64) + step

    def target(self, text: str) -> tuple[int, int]:
        register = self.numbers[text]
        return register, np.dtype(NUMBERS[self.kinds[register]]).itemsize

    def vector(self, text: str) -> list[str]:
        return [x.strip() for x in text.strip("{} ").split(",")]

    def result(self, text: str, kind: str) -> Callable[[Block, Array, Array], None]:
        """Writes numbers of a kind to a register, which may be wider."""
        register, size = self.target(text)
        own = np.dtype(NUMBERS[kind]).itemsize
        signed = kind[0] == "s"

        def write(block: Block, value: Array, mask: Array) -> None:
            bits = encoded(value, kind)
            if kind != "pred" and own != size:
                if signed:
                    bits = bits.view(f"i{own}").astype(f"i{size}").view(UNSIGNED[size])
                else:
                    bits = bits.astype(UNSIGNED[size])
            block.put(register, bits, mask)

        return write

    def apply(self, target: str, kind: str, function: Callable, *sources: Callable) -> Step:
        write = self.result(target, kind)
        if len(sources) == 1:
            (one,) = sources
            return lambda block, mask: write(block, function(one(block)), mask)
        if len(sources) == 2:
            one, two = sources
            return lambda block, mask: write(block, function(one(block), two(block)), mask)
        return lambda block, mask: write(block, function(*[source(block) for source in sources]), mask)

    def simple(self, parts: list[str], operands: list[str], function: Callable, kind: str | None = None) -> Step:
        """All operands and the result of the last part's kind; `.ftz` flushes numbers before and after."""
        kind = kind or parts[-1]
        if "ftz" in parts:
            plain = function

            def function(*values: Array) -> Array:
                return flushed(plain(*[flushed(value) for value in values]))

        return self.apply(operands[0], kind, function, *[self.source(x, kind) for x in operands[1:]])

    # Moves.

    def _mov(self, parts: list[str], operands: list[str]) -> Step:
        kind = parts[-1]
        to, of = operands
        if of.startswith("{"):
            pieces = self.vector(of)
            size = np.dtype(NUMBERS[kind]).itemsize // len(pieces)
            sources = [self.source(piece, f"u{8 * size}") for piece in pieces]
            whole = f"u{8 * size * len(pieces)}"

            def pack(block: Block, mask: Array) -> None:
                stacked = np.stack([source(block) for source in sources], 1)
                write(block, np.ascontiguousarray(stacked).view(NUMBERS[whole])[:, 0], mask)

            write = self.result(to, whole)
            return pack
        if to.startswith("{"):
            pieces = self.vector(to)
            size = np.dtype(NUMBERS[kind]).itemsize // len(pieces)
            source = self.source(of, f"u{8 * size * len(pieces)}")
            writes = [None if piece == "_" else self.result(piece, f"u{8 * size}") for piece in pieces]

            def unpack(block: Block, mask: Array) -> None:
                values = np.ascontiguousarray(source(block)).view(UNSIGNED[size]).reshape(-1, len(writes))
                for i, write in enumerate(writes):
                    if write is not None:
                        write(block, np.ascontiguousarray(values[:, i]), mask)

            return unpack
        kind = "pred" if kind == "pred" else f"u{8 * np.dtype(NUMBERS[kind]).itemsize}"
        return self.apply(to, kind, lambda x: x, self.source(of, kind))

    def _cvta(self, parts: list[str], operands: list[str]) -> Step:
        return self._mov(parts, operands)  # generic addresses are used where the space is known again

    def _cvt(self, parts: list[str], operands: list[str]) -> Step:
        to, of = parts[-2:]
        how = [x for x in parts if x in ("rni", "rzi", "rmi", "rpi")]
        flush = (lambda x: flushed(x)) if "ftz" in parts else (lambda x: x)
        if to in ("bf16x2", "f16x2"):
            kind = to[:-2]
            high, low = (self.source(x, of) for x in operands[1:])

            def pair(block: Block, mask: Array) -> None:
                with np.errstate(over="ignore"):
                    bits = [encoded(x(block).astype(NUMBERS["f16"]) if kind == "f16" else x(block), kind)
                            for x in (low, high)]  # fmt: skip
                write(block, np.ascontiguousarray(np.stack(bits, 1)).view(np.uint32)[:, 0], mask)

            write = self.result(operands[0], "u32")
            return pair
        source = self.source(operands[1], of)
        real = of in ("f16", "bf16", "f32", "f64")
        if to in ("f16", "bf16", "f32", "f64"):
            if real and how:
                rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[how[0]]
                return self.apply(operands[0], to, lambda x: rounding(flush(x)), source)
            if not {"rn", *how} & set(parts) and np.dtype(NUMBERS[to]).itemsize < np.dtype(NUMBERS[of]).itemsize:
                raise Unknown(".".join(parts))
            if "sat" in parts:
                return self.apply(operands[0], to, lambda x: np.where(x > 0, np.minimum(x, 1), 0), source)
            if to == "bf16":
                return self.apply(operands[0], to, lambda x: x.astype(np.float32), source)
            return self.apply(operands[0], to, lambda x: flush(flush(x).astype(NUMBERS[to])), source)
        if to == "tf32":
            def nearest(x: Array) -> Array:  # halves away from zero
                bits = x.view(np.uint32)
                return np.where(np.isfinite(x), (bits + 0x1000) & np.uint32(0xFFFFE000), bits)

            return self.apply(operands[0], "u32", nearest, source)
        if real:
            return self.apply(operands[0], to, lambda x: to_integer(flush(x), to, how[0]), source)
        if "sat" in parts:
            bounds = np.iinfo(NUMBERS[to])
            return self.apply(operands[0], to, lambda x: np.clip(x, bounds.min, bounds.max), source)
        return self.apply(operands[0], to, lambda x: x.astype(NUMBERS[to]), source)

    def _selp(self, parts: list[str], operands: list[str]) -> Step:
        kind = f"u{8 * np.dtype(NUMBERS[parts[-1]]).itemsize}"
        yes, no = (self.source(x, kind) for x in operands[1:3])
        return self.apply(operands[0], kind, lambda p, a, b: np.where(p, a, b), self.source(operands[3], "pred"),
                          yes, no)  # fmt: skip

    # Arithmetic.

    def _real(self, parts: list[str]) -> bool:
        return parts[-1] in ("f16", "bf16", "f32", "f64")

    def _add(self, parts: list[str], operands: list[str]) -> Step:
        if "cc" in parts:
            return self._carried(parts, operands, lambda a, b, carry: a + b)
        return self.simple(parts, operands, np.add)

    def _addc(self, parts: list[str], operands: list[str]) -> Step:
        return self._carried(parts, operands, lambda a, b, carry: a + b + carry)

    def _carried(self, parts: list[str], operands: list[str], function: Callable) -> Step:
        """Of 32 bits, with the carry of the one before, and a carry for the next if `.cc` says so."""
        sources = [self.source(x, "u32") for x in operands[1:]]
        write = self.result(operands[0], "u32")

        def step(block: Block, mask: Array) -> None:
            total = function(*[source(block).astype(np.uint64) for source in sources], block.carry)
            if "cc" in parts:
                carry = total >> np.uint64(32)
                block.carry = carry if mask is None else np.where(mask, carry, block.carry)
            write(block, total.astype(np.uint32), mask)

        return step

    def _sub(self, parts: list[str], operands: list[str]) -> Step:
        if "cc" in parts:
            raise Unknown(".".join(parts))
        return self.simple(parts, operands, np.subtract)

    def _mul(self, parts: list[str], operands: list[str]) -> Step:
        if self._real(parts):
            return self.simple(parts, operands, np.multiply)
        return self._multiplied(parts, operands, lambda product: product)

    def _mad(self, parts: list[str], operands: list[str]) -> Step:
        if self._real(parts):
            return self._fma(parts, operands)
        if "cc" in parts:
            if "lo" in parts:
                low = np.uint64(2**32 - 1)
                return self._carried(parts, operands, lambda a, b, c, carry: ((a * b) & low) + c)
            return self._carried(parts, operands, lambda a, b, c, carry: ((a * b) >> np.uint64(32)) + c)
        return self._multiplied(parts, operands, lambda product, c: product + c)

    def _madc(self, parts: list[str], operands: list[str]) -> Step:
        if "lo" in parts:
            low = np.uint64(2**32 - 1)
            return self._carried(parts, operands, lambda a, b, c, carry: ((a * b) & low) + c + carry)
        return self._carried(parts, operands, lambda a, b, c, carry: ((a * b) >> np.uint64(32)) + c + carry)

    def _multiplied(self, parts: list[str], operands: list[str], then: Callable) -> Step:
        kind, size = parts[-1], np.dtype(NUMBERS[parts[-1]]).itemsize
        a, b = (self.source(x, kind) for x in operands[1:3])
        out = kind[0] + str(16 * size) if "wide" in parts else kind
        rest = [self.source(x, out) for x in operands[3:]]
        if "lo" in parts:
            return self.apply(operands[0], kind, lambda x, y, *c: then(x * y, *c), a, b, *rest)
        if size < 8:
            double = NUMBERS[kind[0] + str(16 * size)]
            if "wide" in parts:
                return self.apply(operands[0], out, lambda x, y, *c: then(x.astype(double) * y.astype(double), *c), a,
                                  b, *rest)  # fmt: skip
            shift = 8 * size

            def high(x: Array, y: Array, *c: Array) -> Array:
                return then(((x.astype(double) * y.astype(double)) >> double(shift)).astype(NUMBERS[kind]), *c)

            return self.apply(operands[0], kind, high, a, b, *rest)

        def high64(x: Array, y: Array, *c: Array) -> Array:
            product = (x.astype(object) * y.astype(object)) >> 64
            return then(np.array([int(p) & (2**64 - 1) for p in product], np.uint64).view(NUMBERS[kind]), *c)

        return self.apply(operands[0], kind, high64, a, b, *rest)

    def _fma(self, parts: list[str], operands: list[str]) -> Step:
        wide = {"f32": np.float64, "f64": np.longdouble, "f16": np.float32, "bf16": np.float32}[parts[-1]]
        own = NUMBERS[parts[-1]] if parts[-1] != "bf16" else np.float32
        return self.simple(
            parts, operands, lambda a, b, c: (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(own)
        )

    def _div(self, parts: list[str], operands: list[str]) -> Step:
        if self._real(parts):
            return self.simple(parts, operands, np.divide)

        def whole(a: Array, b: Array) -> Array:
            b = np.where(b == 0, 1, b).astype(a.dtype)
            return a // b + ((a % b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)

        return self.simple(parts, operands, whole)

    def _rem(self, parts: list[str], operands: list[str]) -> Step:
        return self.simple(parts, operands, lambda a, b: np.fmod(a, np.where(b == 0, 1, b).astype(a.dtype)))

    def _min(self, parts: list[str], operands: list[str]) -> Step:
        real = np.minimum if "NaN" in parts else np.fmin
        return self.simple(parts, operands, real if self._real(parts) else np.minimum)

    def _max(self, parts: list[str], operands: list[str]) -> Step:
        real = np.maximum if "NaN" in parts else np.fmax
        return self.simple(parts, operands, real if self._real(parts) else np.maximum)

    def _neg(self, parts: list[str], operands: list[str]) -> Step:
        return self.simple(parts, operands, np.negative)

    def _abs(self, parts: list[str], operands: list[str]) -> Step:
        return self.simple(parts, operands, np.abs)

    def _rcp(self, parts: list[str], operands: list[str]) -> Step:
        return self.simple(parts, operands, lambda x: (1 / x.astype(np.float64)).astype(x.dtype))

    def _sqrt(self, parts: list[str], operands: list[str]) -> Step:
        return self.simple(parts, operands, np.sqrt)

    def _rsqrt(self, parts: list[str], operands: list[str]) -> Step:
        return self.simple(parts, operands, lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(x.dtype))

    def _ex2(self, parts: list[str], operands: list[str]) -> Step:
        return self.simple(parts, operands, lambda x: np.exp2(x.astype(np.float64)).astype(x.dtype))

    def _lg2(self, parts: list[str], operands: list[str]) -> Step:
        return self.simple(parts, operands, lambda x: np.log2(x.astype(np.float64)).astype(x.dtype))

    def _sin(self, parts: list[str], operands: list[str]) -> Step:
        return self.simple(parts, operands, lambda x: np.sin(x.astype(np.float64)).astype(x.dtype))

    def _cos(self, parts: list[str], operands: list[str]) -> Step:
        return self.simple(parts, operands, lambda x: np.cos(x.astype(np.float64)).astype(x.dtype))

    # Bits.

    def _bits(self, parts: list[str], operands: list[str], function: Callable) -> Step:
        kind = "pred" if parts[-1] == "pred" else f"u{parts[-1][1:]}"
        return self.simple(parts, operands, function, kind)

    def _and(self, parts: list[str], operands: list[str]) -> Step:
        return self._bits(parts, operands, np.bitwise_and)

    def _or(self, parts: list[str], operands: list[str]) -> Step:
        return self._bits(parts, operands, np.bitwise_or)

    def _xor(self, parts: list[str], operands: list[str]) -> Step:
        return self._bits(parts, operands, np.bitwise_xor)

    def _not(self, parts: list[str], operands: list[str]) -> Step:
        return self._bits(parts, operands, np.invert)

    def _lop3(self, parts: list[str], operands: list[str]) -> Step:
        table = int(operands[4].rstrip("U"), 0)

        def looked_up(a: Array, b: Array, c: Array) -> Array:
            out = np.zeros_like(a)
            for row in range(8):
                if table >> row & 1:
                    out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            return out

        return self.apply(operands[0], "u32", looked_up, *[self.source(x, "u32") for x in operands[1:4]])

    def _shl(self, parts: list[str], operands: list[str]) -> Step:
        kind = f"u{parts[-1][1:]}"
        return self._shifted(kind, operands, np.left_shift)

    def _shr(self, parts: list[str], operands: list[str]) -> Step:
        kind = parts[-1] if parts[-1][0] == "s" else f"u{parts[-1][1:]}"
        return self._shifted(kind, operands, np.right_shift)

    def _shifted(self, kind: str, operands: list[str], function: Callable) -> Step:
        size = 8 * np.dtype(NUMBERS[kind]).itemsize
        signed = kind[0] == "s"

        def shift(x: Array, by: Array) -> Array:
            moved = function(x, np.minimum(by, size - 1).astype(x.dtype))
            return moved if signed else np.where(by >= size, 0, moved).astype(x.dtype)

        return self.apply(operands[0], kind, shift, self.source(operands[1], kind), self.source(operands[2], "u32"))

    def _shf(self, parts: list[str], operands: list[str]) -> Step:
        left, wrap = "l" in parts, "wrap" in parts
        low, high, by = (self.source(x, "u32") for x in operands[1:])

        def funnel(a: Array, b: Array, n: Array) -> Array:
            n = (n & 31 if wrap else np.minimum(n, 32)).astype(np.uint64)
            both = (b.astype(np.uint64) << np.uint64(32)) | a
            return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

        return self.apply(operands[0], "u32", funnel, low, high, by)

    def _bfe(self, parts: list[str], operands: list[str]) -> Step:
        kind = parts[-1]
        size = 8 * np.dtype(NUMBERS[kind]).itemsize
        start, length = (self.source(x, "u32") for x in operands[2:])

        def field_of(x: Array, begin: Array, count: Array) -> Array:
            begin, count = begin & 255, np.minimum(count & 255, size)
            values = [int(v) & (2**size - 1) for v in x]
            out = []
            for value, b, c in zip(values, begin.tolist(), count.tolist(), strict=True):
                bits = (value >> b) & ((1 << c) - 1)
                if kind[0] == "s" and c:
                    top = (value >> min(b + c - 1, size - 1)) & 1
                    if top:
                        bits |= (2**size - 1) & ~((1 << min(c, max(size - b, 0))) - 1)
                out.append(bits)
            return np.array(out, UNSIGNED[size // 8]).view(NUMBERS[kind])

        if kind[0] == "u" and all(re.fullmatch(r"\d\w*", x) for x in operands[2:]):
            b, c = (int(x, 0) for x in operands[2:])
            whole = NUMBERS[kind]((1 << c) - 1)
            return self.apply(operands[0], kind, lambda x: (x >> x.dtype.type(b)) & whole,
                              self.source(operands[1], kind))  # fmt: skip
        return self.apply(operands[0], kind, field_of, self.source(operands[1], kind), start, length)

    def _bfi(self, parts: list[str], operands: list[str]) -> Step:
        kind = f"u{parts[-1][1:]}"
        size = 8 * np.dtype(NUMBERS[kind]).itemsize

        def inserted(a: Array, b: Array, begin: Array, count: Array) -> Array:
            one = a.dtype.type(1)
            begin, count = begin.astype(a.dtype), np.minimum(count, size - begin).astype(a.dtype)
            cover = (np.where(count >= size, 0, one << count) - one) << begin
            return (b & ~cover) | ((a << begin) & cover)

        sources = [self.source(x, kind) for x in operands[1:3]] + [self.source(x, "u32") for x in operands[3:]]
        return self.apply(operands[0], kind, inserted, *sources)

    def _prmt(self, parts: list[str], operands: list[str]) -> Step:
        if parts[-1] != "b32" or len(parts) > 2:
            raise Unknown(".".join(parts))

        def permuted(a: Array, b: Array, selector: Array) -> Array:
            both = np.ascontiguousarray(np.stack((a, b), 1)).view(np.uint8)  # [threads, 8]
            out = np.zeros((len(a), 4), np.uint8)
            for i in range(4):
                nibble = (selector >> np.uint32(4 * i)) & 15
                byte = both[np.arange(len(a)), nibble & 7]
                out[:, i] = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
            return out.view(np.uint32)[:, 0]

        return self.apply(operands[0], "u32", permuted, *[self.source(x, "u32") for x in operands[1:]])

    def _popc(self, parts: list[str], operands: list[str]) -> Step:
        kind = f"u{parts[-1][1:]}"
        return self.apply(operands[0], "u32", lambda x: np.array([int(v).bit_count() for v in x], np.uint32),
                          self.source(operands[1], kind))  # fmt: skip

    def _clz(self, parts: list[str], operands: list[str]) -> Step:
        kind, size = f"u{parts[-1][1:]}", int(parts[-1][1:])
        return self.apply(operands[0], "u32", lambda x: np.array([size - int(v).bit_length() for v in x], np.uint32),
                          self.source(operands[1], kind))  # fmt: skip

    # Comparisons.

    def _setp(self, parts: list[str], operands: list[str]) -> Step:
        kind = parts[-1]
        relation = parts[1]
        a, b = (self.source(x, f"u{kind[1:]}" if kind[0] == "b" and kind != "bf16" else kind) for x in operands[1:3])
        ordered = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
                   "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}  # fmt: skip
        real = self._real(parts)

        def compare(x: Array, y: Array) -> Array:
            if not real:
                return x != y if relation == "ne" else ordered[relation](x, y)
            if "ftz" in parts:
                x, y = flushed(x), flushed(y)
            unordered = np.isnan(x) | np.isnan(y)
            if relation in ("nan", "num"):
                return unordered if relation == "nan" else ~unordered
            if relation in ("ne", "neu"):
                return (x != y) & ~unordered if relation == "ne" else (x != y) | unordered
            if relation in ordered:
                return ordered[relation](x, y)
            return ordered[relation[:-1]](x, y) | unordered

        combine = next((x for x in parts if x in ("and", "or", "xor")), None)
        join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, None: None}[combine]
        other = self.source(operands[3], "pred") if combine else None
        names = [x.strip() for x in operands[0].split("|")]
        writes = [self.result(name, "pred") for name in names if name != "_"]

        def step(block: Block, mask: Array) -> None:
            holds = compare(a(block), b(block))
            results = [holds, ~holds]
            for write, value in zip(writes, results, strict=False):
                write(block, value if join is None else join(value, other(block)), mask)

        return step

    # Memory.

    def _space(self, parts: list[str]) -> str:
        for part in parts:
            space = part.partition("::")[0]
            if space in ("global", "shared", "local", "param", "const"):
                return space or part
        raise Unknown(f"{'.'.join(parts)}: a generic address")

    def _width(self, parts: list[str]) -> int:
        return next((int(x[1:]) for x in parts if re.fullmatch(r"v\d", x)), 1)

    def _ld(self, parts: list[str], operands: list[str]) -> Step:
        kind, space, count = parts[-1], self._space(parts), self._width(parts)
        size = np.dtype(NUMBERS[kind]).itemsize
        bits = f"{'s' if kind[0] == 's' else 'u'}{8 * size}"
        writes = [self.result(name, bits) for name in self.vector(operands[0])]
        if len(writes) != count:
            raise Unknown(f"{'.'.join(parts)} {operands}")
        address = self.address(operands[1])
        if space == "param":

            def load_parameter(block: Block, mask: Array) -> None:
                places = address(block).astype(np.int64)[:, None] + np.arange(size)
                for i, write in enumerate(writes):
                    value = np.ascontiguousarray(block.parameters[places + i * size]).view(NUMBERS[bits])[:, 0]
                    write(block, value, mask)

            return load_parameter
        if space == "local":

            def load_local(block: Block, mask: Array) -> None:
                places = address(block).astype(np.int64)[:, None] + np.arange(size)
                for i, write in enumerate(writes):
                    taken = np.clip(places + i * size, 0, block.local.shape[1] - 1)
                    value = np.take_along_axis(block.local, taken, 1)
                    write(block, np.ascontiguousarray(value).view(NUMBERS[bits])[:, 0], mask)

            return load_local
        if space == "const":
            space = "global"

        def load(block: Block, mask: Array) -> None:
            some = block.active(mask)
            values = block.load(space, address(block)[some], some, size, count)
            for i, write in enumerate(writes):
                whole = np.zeros(block.threads, values.dtype)
                whole[some] = values[:, i]
                write(block, whole.view(NUMBERS[bits]), mask)

        return load

    def _ldu(self, parts: list[str], operands: list[str]) -> Step:
        return self._ld(parts, operands)

    def _st(self, parts: list[str], operands: list[str]) -> Step:
        kind, space = parts[-1], self._space(parts)
        size = np.dtype(NUMBERS[kind]).itemsize
        names = self.vector(operands[1])
        sources, address = [self.source(name, f"u{8 * size}") for name in names], self.address(operands[0])
        if space == "local":

            def store_local(block: Block, mask: Array) -> None:
                some = block.active(mask)
                places = address(block).astype(np.int64)[some][:, None] + np.arange(size)
                for i, source in enumerate(sources):
                    value = np.ascontiguousarray(source(block)[some])
                    block.local[some[:, None], places + i * size] = value.view(np.uint8).reshape(-1, size)

            return store_local

        def store(block: Block, mask: Array) -> None:
            some = block.active(mask)
            values = np.stack([source(block)[some] for source in sources], 1)
            block.store(space, address(block)[some], some, values)

        return store

    def _red(self, parts: list[str], operands: list[str]) -> Step:
        if self._space(parts) != "global" or "add" not in parts:
            raise Unknown(".".join(parts))
        kind = parts[-1]
        size, source, address = np.dtype(NUMBERS[kind]).itemsize, self.source(operands[1], kind), self.address(operands[0])

        def step(block: Block, mask: Array) -> None:
            some = block.active(mask)
            where = address(block)[some]
            aligned(where, size)
            for region, which in block.parts(where, size):  # in any order: no block needs another's
                view = region.views[size].view(NUMBERS[kind])
                np.add.at(view, (where[which].astype(np.int64) - region.start) // size, source(block)[some][which])

        return step

    def _fence(self, parts: list[str], operands: list[str]) -> Step:
        return lambda block, mask: None

    def _membar(self, parts: list[str], operands: list[str]) -> Step:
        return lambda block, mask: None

    def _cp(self, parts: list[str], operands: list[str]) -> Step:
        """Asynchronous copies: carried out when they are waited for, their bytes taboo until then."""
        if parts[:2] != ["cp", "async"]:
            raise Unknown(".".join(parts))
        if "commit_group" in parts:

            def commit(block: Block, mask: Array) -> None:
                block.committed = block.committed + (1 if mask is None else mask.astype(np.int64))

            return commit
        if "wait_group" in parts or "wait_all" in parts:
            everything = "wait_all" in parts
            remain = 0 if everything else int(operands[0])

            def wait(block: Block, mask: Array) -> None:
                if everything:
                    commit_all(block, mask)
                which = np.full(block.threads, remain)
                block.complete(which if mask is None else np.where(mask, which, -1))

            def commit_all(block: Block, mask: Array) -> None:
                block.committed = block.committed + (1 if mask is None else mask.astype(np.int64))

            return wait
        if "mbarrier" in parts:
            raise Unknown(".".join(parts))
        to, of, size = self.address(operands[0]), self.address(operands[1]), int(operands[2], 0)
        given = self.source(operands[3], "u32") if len(operands) > 3 else None

        def copy(block: Block, mask: Array) -> None:
            some = block.active(mask)
            shared, address = to(block).astype(np.int64)[some], of(block)[some]
            taken = np.full(len(some), size) if given is None else np.minimum(given(block)[some], size).astype(np.int64)
            aligned(address[taken > 0], size)
            if (taken > 0).any():
                block.parts(address[taken > 0], size)
            block.in_shared(shared, some, size, True)
            np.add.at(block.shared.flying, shared[:, None] + np.arange(size), 1)
            block.copies.append({"thread": some, "shared": shared, "address": address, "bytes": taken, "size": size,
                                 "group": block.committed[some]})  # fmt: skip

        return copy

    # Warps.

    def _together(self, block: Block, mask: Array) -> None:
        if mask is not None and not (mask.reshape(-1, LANES).all(1) | ~mask.reshape(-1, LANES).any(1)).all():
            raise Fault("not all threads of a warp are here")

    def _shfl(self, parts: list[str], operands: list[str]) -> Step:
        kind = next(x for x in parts if x in ("bfly", "idx", "up", "down"))
        names = [x.strip() for x in operands[0].split("|")]
        source = self.source(operands[1], "u32")
        by, clamp, members = (self.source(x, "u32") for x in operands[2:])
        write = self.result(names[0], "u32")
        also = self.result(names[1], "pred") if len(names) > 1 else None

        def step(block: Block, mask: Array) -> None:
            self._together(block, mask)
            some = block.active(mask)
            if (members(block)[some] != 0xFFFFFFFF).any():
                raise Unknown("a shuffle among a part of a warp")
            lane, offset, bound = block.all % LANES, by(block).astype(np.int64), clamp(block)
            segment = (bound >> 8 & 31).astype(np.int64)
            limit = (bound & 31).astype(np.int64)
            top = (lane & segment) | (limit & ~segment & 31)
            low = lane & segment
            from_ = {"up": lane - offset, "down": lane + offset, "bfly": lane ^ offset,
                     "idx": low | (offset & ~segment & 31)}[kind]  # fmt: skip
            inside = from_ >= top if kind == "up" else from_ <= top
            place = np.where(inside, from_, lane)
            value = source(block)
            write(block, value[block.all - lane + place], mask)
            if also is not None:
                also(block, inside, mask)

        return step

    def _redux(self, parts: list[str], operands: list[str]) -> Step:
        kind = parts[-1] if parts[-1] != "b32" else "u32"
        how = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
               "xor": np.bitwise_xor}[parts[2]]  # fmt: skip
        source, write = self.source(operands[1], kind), self.result(operands[0], kind)

        def step(block: Block, mask: Array) -> None:
            self._together(block, mask)
            total = how.reduce(source(block).reshape(-1, LANES), axis=1, dtype=NUMBERS[kind])
            write(block, np.repeat(total, LANES), mask)

        return step

    def _vote(self, parts: list[str], operands: list[str]) -> Step:
        source = self.source(operands[1], "pred")
        ballot = "ballot" in parts
        write = self.result(operands[0], "u32" if ballot else "pred")

        def step(block: Block, mask: Array) -> None:
            self._together(block, mask)
            votes = source(block).reshape(-1, LANES)
            if ballot:
                said = (votes.astype(np.uint64) << np.arange(LANES, dtype=np.uint64)).sum(1).astype(np.uint32)
            else:
                said = votes.all(1) if "all" in parts else votes.any(1)
            write(block, np.repeat(said, LANES), mask)

        return step

    def _bar(self, parts: list[str], operands: list[str]) -> Step:
        """bar.warp.sync."""

        def step(block: Block, mask: Array) -> None:
            self._together(block, mask)
            block.shared.phase[np.unique(block.active(mask) // LANES)] += 1

        return step

    def _ldmatrix(self, parts: list[str], operands: list[str]) -> Step:
        count = next(int(x[1:]) for x in parts if re.fullmatch(r"x\d", x))
        transposed = "trans" in parts
        writes, address = [self.result(x, "u32") for x in self.vector(operands[0])], self.address(operands[1])

        def step(block: Block, mask: Array) -> None:
            self._together(block, mask)
            rows = self._matrix_rows(block, address, mask, count, False)  # [warps, count, 8, 8] places
            values = block.shared.data[rows[..., None] + np.arange(16)].view(np.uint16)  # [.., 8, 8]
            if transposed:
                values = values.swapaxes(-1, -2)
            pairs = np.ascontiguousarray(values).view(np.uint32).reshape(len(rows), count, LANES)
            for i, write in enumerate(writes):
                whole = np.zeros(block.threads, np.uint32)
                whole[block.active(mask)] = pairs[:, i].reshape(-1)
                write(block, whole, mask)

        return step

    def _matrix_rows(self, block: Block, address: Callable, mask: Array, count: int, write: bool) -> Array:
        """Where the rows [warps, matrices, 8] of matrices lie, of 16 bytes each; noted as touched by those who name
        them."""
        some = block.active(mask)
        named = some.reshape(-1, LANES)[:, : 8 * count]
        rows = block.in_shared(address(block)[named].reshape(-1), named.reshape(-1), 16, write)
        return rows.reshape(-1, count, 8)

    def _stmatrix(self, parts: list[str], operands: list[str]) -> Step:
        count = next(int(x[1:]) for x in parts if re.fullmatch(r"x\d", x))
        transposed = "trans" in parts
        address, sources = self.address(operands[0]), [self.source(x, "u32") for x in self.vector(operands[1])]

        def step(block: Block, mask: Array) -> None:
            self._together(block, mask)
            rows = self._matrix_rows(block, address, mask, count, True)
            for i, source in enumerate(sources):
                pairs = np.ascontiguousarray(source(block)[block.active(mask)]).view(np.uint16).reshape(-1, 8, 8)
                values = np.ascontiguousarray(pairs.swapaxes(1, 2) if transposed else pairs)
                block.shared.data[rows[:, i][..., None] + np.arange(16)] = values.view(np.uint8)

        return step

    # Matrices.

    def _mma(self, parts: list[str], operands: list[str]) -> Step:
        shape = next(x for x in parts if re.fullmatch(r"m\d+n\d+k\d+", x))
        m, n, k = map(int, re.findall(r"\d+", shape))
        of = parts[-3]
        if (m, n) != (16, 8) or of not in ("f16", "bf16", "tf32") or parts[-4] != "f32":
            raise Unknown(".".join(parts))
        a, b, c = ([self.source(x, "u32") for x in self.vector(operand)] for operand in operands[1:4])
        seeds = [self.source(x, "f32") for x in self.vector(operands[3])]
        writes = [self.result(x, "f32") for x in self.vector(operands[0])]
        del c

        def step(block: Block, mask: Array) -> None:
            self._together(block, mask)
            left = fragment_a([x(block) for x in a], of, k)
            right = fragment_b([x(block) for x in b], of, k)
            total = left.astype(np.float64) @ right.astype(np.float64)  # [warps, 16, 8]
            for write, seed, value in zip(writes, seeds, spread(total), strict=True):
                write(block, (seed(block).astype(np.float64) + value).astype(np.float32), mask)

        return step

    def _wgmma(self, parts: list[str], operands: list[str]) -> Step:
        """A warp group's product: what it reads must stand still until it is waited for."""
        if parts[1] in ("fence", "commit_group", "wait_group"):

            def group(block: Block, mask: Array) -> None:
                self._together(block, mask)
                if parts[1] == "commit_group":
                    block.products.append(block.open)
                    block.open = []
                if parts[1] == "wait_group":
                    remain = int(operands[0])
                    while len(block.products) > remain:
                        for read, _ in block.products.pop(0):
                            for places in read:
                                np.subtract.at(block.shared.watched, places, 1)
                    left = [*block.open, *(product for group in block.products for product in group)]
                    block.busy = set().union(*(written for _, written in left))

            return group
        shape = next(x for x in parts if re.fullmatch(r"m\d+n\d+k\d+", x))
        _, n, k = map(int, re.findall(r"\d+", shape))
        of = parts[-2]
        if of not in ("f16", "bf16", "tf32") or "f32" not in parts:
            raise Unknown(".".join(parts))
        out = self.vector(operands[0])
        seeds, writes = [self.source(x, "f32") for x in out], [self.result(x, "f32") for x in out]
        in_registers = operands[1].startswith("{")
        a = [self.source(x, "u32") for x in self.vector(operands[1])] if in_registers else self.source(operands[1], "u64")
        b, scaled = self.source(operands[2], "u64"), self.source(operands[3], "pred")
        signs, layouts = [int(x) for x in operands[4:6]], [int(x) for x in operands[6:]]
        if signs != [1, 1]:
            raise Unknown(f"{'.'.join(parts)}: signs {signs}")
        turned_a, turned_b = (0, layouts[0]) if in_registers and layouts else (layouts or (0, 0))

        def step(block: Block, mask: Array) -> None:
            if mask is not None and not (mask.reshape(-1, 128).all(1) | ~mask.reshape(-1, 128).any(1)).all():
                raise Fault("not all threads of a warp group are here")
            some = block.active(mask).reshape(-1, 128)
            read: list[Array] = []
            totals = np.zeros((block.threads // 32, 16, n))
            rows = None if not in_registers else fragment_a([x(block) for x in a], of, k).astype(np.float64)
            for threads in some:
                right = self._described(block, int(b(block)[threads[0]]), n, k, of, turned_b, threads, read)
                if rows is None:
                    left = self._described(block, int(a(block)[threads[0]]), 64, k, of, turned_a, threads, read)
                    left = left.reshape(4, 16, k)
                else:
                    left = rows[threads[0] // 32 : threads[0] // 32 + 4]
                totals[threads[0] // 32 : threads[0] // 32 + 4] = left @ right.T
            registers = {self.numbers[x] for x in out}
            block.open.append((read, registers))
            block.busy = block.busy | registers
            keep = scaled(block)
            for j in range(n // 8):
                for i, value in enumerate(spread(totals[:, :, 8 * j : 8 * j + 8])):
                    seed = np.where(keep, seeds[4 * j + i](block), 0).astype(np.float64)
                    writes[4 * j + i](block, (seed + value).astype(np.float32), mask)

        return step

    def _described(
        self, block: Block, descriptor: int, rows: int, k: int, of: str, turned: int, threads: Array, read: list[Array]
    ) -> Array:
        """The matrix [rows, k] that a descriptor names in shared memory, whose places are added to `read`; `turned`:
        rows are what lies side by side."""
        size = 4 if of == "tf32" else 2
        start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        swizzle = descriptor >> 62
        if descriptor >> 49 & 7:
            raise Unknown("a descriptor with a base offset")
        line = {0: 16, 1: 128, 2: 64, 3: 32}[swizzle]  # bytes
        row, column = np.arange(rows)[:, None], np.arange(k)[None, :] * size
        if not turned:
            if swizzle == 0:
                places = start + row % 8 * 16 + row // 8 * stride + column // 16 * leading + column % 16
            else:
                places = start + row % 8 * line + row // 8 * stride + column
        else:
            row, column = row * size, np.arange(k)[None, :]
            along, across = (stride, leading) if swizzle == 0 else (leading, stride)
            places = start + row % line + row // line * along + column % 8 * line + column // 8 * across
        bits = {128: 7, 64: 3, 32: 1, 16: 0}[line]
        places = places ^ ((places >> 7 & bits) << 4)
        touched = places[..., None] + np.arange(size)
        if (touched >= len(block.shared.data)).any():
            raise Fault(f"a product reads byte {int(touched.max())} of shared memory, of {len(block.shared.data)}")
        block.shared.touch(touched.reshape(1, -1), threads[:1], False)
        block.shared.reader[touched] = -1  # all of the group read it
        np.add.at(block.shared.watched, touched, 1)
        read.append(touched)
        bits_of = np.ascontiguousarray(block.shared.data[touched]).view(UNSIGNED[size])[..., 0]
        return (bits_of.view(np.float32) if of == "tf32" else decoded(bits_of, of)).astype(np.float64)


_GROUP, _INNER = np.arange(LANES) // 4, np.arange(LANES) % 4


def _pairs(register: Array, of: str) -> Array:
    """[threads] -> [warps, lanes, 2] of half types, or [warps, lanes, 1]."""
    if of == "tf32":
        return (register & np.uint32(0xFFFFE000)).view(np.float32).reshape(-1, LANES, 1)
    return decoded(np.ascontiguousarray(register).view(np.uint16), of).reshape(-1, LANES, 2)


def fragment_a(registers: list[Array], of: str, k: int) -> Array:
    """The left matrix [warps, 16, k] of what its threads hold."""
    wide = 1 if of == "tf32" else 2
    out = np.zeros((len(registers[0]) // LANES, 16, k), np.float32)
    for i, register in enumerate(registers):
        for j in range(wide):
            out[:, _GROUP + 8 * (i % 2), wide * _INNER + j + 4 * wide * (i // 2)] = _pairs(register, of)[:, :, j]
    return out


def fragment_b(registers: list[Array], of: str, k: int) -> Array:
    """The right matrix [warps, k, 8]."""
    wide = 1 if of == "tf32" else 2
    out = np.zeros((len(registers[0]) // LANES, k, 8), np.float32)
    for i, register in enumerate(registers):
        for j in range(wide):
            out[:, wide * _INNER + j + 4 * wide * i, _GROUP] = _pairs(register, of)[:, :, j]
    return out


def spread(total: Array) -> list[Array]:
    """What threads hold of a product [warps, 16, 8]: four numbers each."""
    return [total[:, _GROUP + 8 * (i // 2), 2 * _INNER + i % 2].reshape(-1) for i in range(4)]


def _compile(program: Program, threads: int, symbols: dict[str, int]) -> list[tuple]:
    return _Compiler(program, threads, symbols).code()
