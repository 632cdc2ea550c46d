"""Programs in PTX, which compilers make of kernels, taken apart for `ptx_machine`."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NUMBERS = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64, "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64,
     "tf32": np.uint32,
}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

LANES = 32  # threads of a warp
Array = Any
Block = Any  # of ptx_machine, which knows the others


class Fault(Exception):
    """What a GPU would have done wrong, or might have."""


class Unknown(Exception):
    """What this machine does not know."""


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

    @functools.cached_property
    def meetings(self) -> tuple[list[int], list[int]]:
        return met_after(self)


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
    """Labels, declarations and instructions. A label within braces gets its scope's number, for the same one may come
    again in the next; where a branch goes is looked for from the innermost scope outwards."""
    found: list[tuple[str, int]] = []  # and the scope it stands in
    inside, labels, scope = [-1], {}, 0  # inside: the scope around each
    piece, depth = "", 0
    for token in re.findall(r"[{};]|[^{};]+", body):
        blank = not piece.strip()
        if token == ";":
            found.append((" ".join(piece.split()), scope))
            piece = ""
        elif token == "{" and blank:
            inside.append(scope)
            scope = len(inside) - 1
        elif token == "}" and depth == 0:
            scope = inside[scope]
        else:
            depth += (token == "{") - (token == "}")
            piece += token
        while depth == 0 and (label := re.match(r"\s*([$\w]+):(?!:)", piece)):
            if (label[1], scope) in labels:
                raise Unknown(f"the label {label[1]} twice")
            labels[label[1], scope] = f"{label[1]}.{scope}" if scope else label[1]
            found.append((labels[label[1], scope] + ":", scope))
            piece = piece[label.end() :]
    named = []
    for statement, at in found:
        branch = re.fullmatch(r"(.*\bbra\S*\s+)(\S+)", statement)
        if branch is not None:
            while (branch[2], at) not in labels:
                at = inside[at]
                if at < 0:
                    raise Unknown(statement)
            statement = branch[1] + labels[branch[2], at]
        if statement:
            named.append(statement)
    return named


def _declare(program: Program, statement: str) -> None:
    if statement.startswith(".reg"):
        for known in re.sub(r"^\.reg\s+\.\w+\s+", "", statement).split(","):
            kind = re.match(r"\.reg\s+\.(\w+)", statement)[1]
            many = re.fullmatch(r"\s*([%\w$]+)<(\d+)>\s*", known)
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [known.strip()]
            if any(program.registers.get(name, kind) != kind for name in names):
                raise Unknown(f"{statement}: of another kind elsewhere")
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


def waits(ptx: str) -> Iterator[tuple[str, str]]:
    """The code without one of its barriers and waits ("wait"), or fences ("fence"), for each: is that noticed?"""
    wait = (
        r"\b(bar\.sync|barrier\.sync|cp\.async\.wait_(group|all)|wgmma\.wait_group|tcgen05\.wait::\w+|"
        r"mbarrier\.try_wait|fence\.proxy\.async)\b[^;]*;"
    )
    for found in re.finditer(wait, ptx):
        yield "fence" if found[1].startswith("fence") else "wait", ptx[: found.start()] + ptx[found.end() :]


def met_after(program: Program) -> tuple[list[int], list[int]]:
    """The basic block of each instruction, and of each block those that every way from it comes through, as bits.

    Threads that have parted meet again there: one that has come so far waits for the others.
    """
    count = len(program.instructions)
    starts = {0, *program.labels.values()}
    follow: dict[int, list[int]] = {}  # by a block's last instruction
    for i, instruction in enumerate(program.instructions):
        head, targets = instruction.parts[0], []
        if head in ("bra", "ret", "exit", "trap"):
            starts.add(i + 1)
            targets = [program.labels[instruction.operands[0]]] if head == "bra" else [count]
            if instruction.guard is not None:
                targets.append(i + 1)
            follow[i] = targets
    order = sorted(start for start in starts if start < count)
    number = {start: i for i, start in enumerate(order)}
    block_of = [0] * count
    ends = []
    for i, start in enumerate(order):
        end = order[i + 1] if i + 1 < len(order) else count
        block_of[start:end] = [i] * (end - start)
        ends.append(end - 1)
    number[count] = last = len(order)  # where all end
    next_blocks = [[number[target] for target in follow.get(end, [end + 1])] for end in ends]
    everything = (1 << (last + 1)) - 1
    after = [everything] * last + [1 << last]
    changed = True
    while changed:
        changed = False
        for i in reversed(range(last)):
            common = everything
            for block in next_blocks[i]:
                common &= after[block]
            if common | 1 << i != after[i]:
                after[i], changed = common | 1 << i, True
    return block_of, after
