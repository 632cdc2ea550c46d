"""The instructions of PTX that our kernels are made of, each as a function of a block's registers and memory."""

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx_program import LANES, NUMBERS, UNSIGNED, Array, Block, Fault, Instruction, Program, Unknown

Step = Callable[[Any, Array], None]
"""Of a block (`ptx_machine.Block`), and which of its threads take part; None: all."""


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


def exactly(function: Callable) -> Callable:
    """In float64, rounded once: what `.approx` may be."""
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


# Operands and result are of the kind that the instruction ends with.
SAME = {
    "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt,
    "rcp": exactly(lambda x: 1 / x), "rsqrt": exactly(lambda x: 1 / np.sqrt(x)), "ex2": exactly(np.exp2),
    "lg2": exactly(np.log2), "sin": exactly(np.sin), "cos": exactly(np.cos),
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
}  # fmt: skip
LEAST = {"min": (np.minimum, np.fmin), "max": (np.maximum, np.fmax)}  # with `.NaN`, or of whole numbers; else
STRANGE = {"sat", "satfinite", "relu", "rz", "rm", "rp", "xorsign", "oob"}  # what would change a result
NOTHING = ("fence", "membar")  # barriers order what threads do to memory


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
            return "barrier", (barrier, count)
        if STRANGE & set(parts) and (head, STRANGE & set(parts)) != ("cvt", {"sat"}):
            raise Unknown(instruction.text)
        if ".".join(parts).removesuffix(".shared::cta") == "fence.proxy.async":
            return None, lambda block, mask: block.shared.fence(block.active(mask))
        if head in NOTHING:
            return None, lambda block, mask: None
        if head in SAME and "cc" not in parts:
            return None, self.simple(parts, operands, SAME[head])
        if head in LEAST:
            two = LEAST[head]["NaN" not in parts and self._real(parts)]
            return None, self.simple(parts, operands, lambda *numbers: functools.reduce(two, numbers))
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
        """All operands and the result of the last part's kind; `.ftz` flushes numbers before and after.

        Of `.f32.f16` and `.f32.bf16` (compute capability 10.0) all but the last operand are halves, the rest is not.
        """
        kind = kind or parts[-1]
        mixed = parts[-2] == "f32" and kind in ("f16", "bf16")
        if len({*parts} & {*NUMBERS}) > 1 and not mixed:
            raise Unknown(".".join(parts))
        if isinstance(function, np.ufunc) and function.nin != len(operands) - 1:  # one more would be its result's place
            raise Unknown(f"{'.'.join(parts)} of {len(operands) - 1} operands")
        if "ftz" in parts:
            plain = function

            def function(*values: Array) -> Array:
                return flushed(plain(*[flushed(value) for value in values]))

        if kind.endswith("x2"):  # two numbers a register
            one = kind.removesuffix("x2")
            size = np.dtype(NUMBERS[one]).itemsize

            def both(*registers: Array) -> Array:
                halves = function(*[decoded(x.view(UNSIGNED[size]), one) for x in registers])
                return encoded(halves, one).view(UNSIGNED[2 * size])

            whole = f"u{16 * size}"
            return self.apply(operands[0], whole, both, *[self.source(x, whole) for x in operands[1:]])
        if mixed:
            wide = [self.widened_source(x, kind) for x in operands[1:-1]]
            return self.apply(operands[0], "f32", function, *wide, self.source(operands[-1], "f32"))
        return self.apply(operands[0], kind, function, *[self.source(x, kind) for x in operands[1:]])

    def widened_source(self, text: str, kind: str) -> Callable[[Block], Array]:
        narrow = self.source(text, kind)
        return lambda block: narrow(block).astype(np.float32)

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
        return parts[-1].removesuffix("x2") in ("f16", "bf16", "f32", "f64")

    def _add(self, parts: list[str], operands: list[str]) -> Step:
        return self._carried(parts, operands, lambda a, b, carry: a + b)

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
        kind = "f32" if "f32" in parts else parts[-1].removesuffix("x2")
        wide = {"f32": np.float64, "f64": np.longdouble, "f16": np.float32, "bf16": np.float32}[kind]
        own = NUMBERS[kind] if kind != "bf16" else np.float32
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

    # Bits.

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
        return self._shifted(f"u{parts[-1][1:]}", operands, np.left_shift)

    def _shr(self, parts: list[str], operands: list[str]) -> Step:
        return self._shifted(parts[-1].replace("b", "u"), operands, np.right_shift)

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
        pair = kind.endswith("x2")  # two halves, which give a predicate each
        read = "u32" if pair else f"u{kind[1:]}" if kind[0] == "b" and kind != "bf16" else kind
        a, b = (self.source(x, read) for x in operands[1:3])
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
        writes = [None if name == "_" else self.result(name, "pred") for name in names]

        def step(block: Block, mask: Array) -> None:
            if pair:
                halves = (decoded(x(block).view(np.uint16), kind.removesuffix("x2")) for x in (a, b))
                results = compare(*halves).reshape(-1, 2).T
            else:
                holds = compare(a(block), b(block))
                results = holds, ~holds
            for write, value in zip(writes, results, strict=False):
                if write is not None:
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
        size, source, address = (
            np.dtype(NUMBERS[kind]).itemsize,
            self.source(operands[1], kind),
            self.address(operands[0]),
        )

        def step(block: Block, mask: Array) -> None:
            some = block.active(mask)
            where = address(block)[some]
            block.aligned(where, size)
            for region, which in block.parts(where, size):  # in any order: no block needs another's
                view = region.views[size].view(NUMBERS[kind])
                np.add.at(view, (where[which].astype(np.int64) - region.start) // size, source(block)[some][which])

        return step

    def _cp(self, parts: list[str], operands: list[str]) -> Step:
        """Asynchronous copies: carried out when they are waited for, their bytes taboo until then."""
        if parts[:2] != ["cp", "async"]:
            raise Unknown(".".join(parts))

        def commit(block: Block, mask: Array) -> None:
            block.committed = block.committed + (1 if mask is None else mask.astype(np.int64))

        if "commit_group" in parts:
            return commit
        if "wait_group" in parts or "wait_all" in parts:
            remain = 0 if "wait_all" in parts else int(operands[0])

            def wait(block: Block, mask: Array) -> None:
                if "wait_all" in parts:
                    commit(block, mask)
                which = np.full(block.threads, remain)
                block.complete(which if mask is None else np.where(mask, which, -1))

            return wait
        if "mbarrier" in parts:
            raise Unknown(".".join(parts))
        to, of, size = self.address(operands[0]), self.address(operands[1]), int(operands[2], 0)
        given = self.source(operands[3], "u32") if len(operands) > 3 else None

        def copy(block: Block, mask: Array) -> None:
            some = block.active(mask)
            shared, address = to(block).astype(np.int64)[some], of(block)[some]
            taken = np.full(len(some), size) if given is None else np.minimum(given(block)[some], size).astype(np.int64)
            block.aligned(address[taken > 0], size)
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

    def _one(self, block: Block, mask: Array) -> int:
        some = block.active(mask)
        if len(some) != 1:
            raise Fault(f"{len(some)} threads where one is asked for")
        return int(some[0])

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
        if "abs" in parts:
            raise Unknown(".".join(parts))
        least = {name: two["NaN" not in parts and kind == "f32"] for name, two in LEAST.items()}
        how = (SAME | least)[parts[2]]
        source, write = self.source(operands[1], kind), self.result(operands[0], kind)
        members = self.source(operands[2], "u32")

        def step(block: Block, mask: Array) -> None:
            self._together(block, mask)
            if (members(block)[block.active(mask)] != 0xFFFFFFFF).any():
                raise Unknown("a reduction of a part of a warp")
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
            for phase in (block.shared.phase, block.tensor.phase):
                phase[np.unique(block.active(mask) // LANES)] += 1

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
        if (m, n, k, of) == (8, 8, 4, "f64"):
            return self._mma_of_doubles(operands)
        if (m, n) != (16, 8) or of not in ("f16", "bf16", "tf32") or parts[-4] != "f32":
            raise Unknown(".".join(parts))
        a, b = ([self.source(x, "u32") for x in self.vector(operand)] for operand in operands[1:3])
        seeds = [self.source(x, "f32") for x in self.vector(operands[3])]
        writes = [self.result(x, "f32") for x in self.vector(operands[0])]

        def step(block: Block, mask: Array) -> None:
            self._together(block, mask)
            left = fragment_a([x(block) for x in a], of, k)
            right = fragment_b([x(block) for x in b], of, k)
            total = left.astype(np.float64) @ right.astype(np.float64)  # [warps, 16, 8]
            for write, seed, value in zip(writes, seeds, spread(total), strict=True):
                write(block, (seed(block).astype(np.float64) + value).astype(np.float32), mask)

        return step

    def _mma_of_doubles(self, operands: list[str]) -> Step:
        a, b = (self.source(operand.strip("{} "), "f64") for operand in operands[1:3])
        seeds = [self.source(x, "f64") for x in self.vector(operands[3])]
        writes = [self.result(x, "f64") for x in self.vector(operands[0])]

        def step(block: Block, mask: Array) -> None:
            self._together(block, mask)
            total = a(block).reshape(-1, 8, 4) @ b(block).reshape(-1, 8, 4).swapaxes(1, 2)  # [warps, 8, 8]
            for i, (write, seed) in enumerate(zip(writes, seeds, strict=True)):
                write(block, seed(block) + total[:, :, i::2].reshape(-1), mask)

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
                                block.shared.released(places)
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
        a = [self.source(x, "u32" if in_registers else "u64") for x in self.vector(operands[1])]
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
                right = self._described(block, int(b(block)[threads[0]]), n, k, of, turned_b, threads[0], read)
                if rows is None:
                    left = self._described(block, int(a[0](block)[threads[0]]), 64, k, of, turned_a, threads[0], read)
                    left = left.reshape(4, 16, k)
                else:
                    left = rows[threads[0] // 32 : threads[0] // 32 + 4]
                totals[threads[0] // 32 : threads[0] // 32 + 4] = left @ right.T
            for places in read:
                block.shared.reader[places] = -1  # all of the group read it
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
        self, block: Block, descriptor: int, rows: int, k: int, of: str, turned: int, thread: int, read: list[Array]
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
        bits_of = np.ascontiguousarray(block.shared.read_by_product(touched, thread)).view(UNSIGNED[size])[..., 0]
        read.append(touched)
        return (bits_of.view(np.float32) if of == "tf32" else decoded(bits_of, of)).astype(np.float64)

    # Tensor memory (compute capability 10.0).

    def _elect(self, parts: list[str], operands: list[str]) -> Step:
        lane, elected = (x.strip() for x in operands[0].split("|"))
        writes = self.result(lane, "u32"), self.result(elected, "pred")

        def step(block: Block, mask: Array) -> None:
            self._together(block, mask)
            writes[0](block, np.zeros(block.threads, np.uint32), mask)
            writes[1](block, block.all % LANES == 0, mask)

        return step

    def _mbarrier(self, parts: list[str], operands: list[str]) -> Step:
        if parts[1] == "try_wait" and "parity" in parts:
            complete = self.result(operands[0], "pred")
            address, parity = self.address(operands[1]), self.source(operands[2], "u32")

            def wait(block: Block, mask: Array) -> None:
                some = block.active(mask)
                which = {(int(a), int(p)) for a, p in zip(address(block)[some], parity(block)[some], strict=True)}
                if len(which) > 1:
                    raise Unknown("threads that wait for different barriers at once")
                if len(some) < block.alive.sum():
                    raise Unknown("a part of a block that waits for products")
                place, wanted = which.pop()
                block.in_shared(np.full(len(some), place), some, 8, False)
                complete(block, np.full(block.threads, block.tensor.waited(place, wanted)), mask)

            return wait
        if parts[1] not in ("init", "inval"):
            raise Unknown(".".join(parts))
        address, count = self.address(operands[0]), int(operands[1]) if len(operands) > 1 else 1

        def step(block: Block, mask: Array) -> None:
            if count != 1:
                raise Unknown(f"a barrier at which {count} arrive")
            some = block.active(mask)
            for place in block.in_shared(address(block)[some], some, 8, True).tolist():
                if parts[1] == "init":
                    block.tensor.ready(place)
                else:
                    block.tensor.barrier_at(place)
                    del block.tensor.barriers[place]

        return step

    def _tcgen05(self, parts: list[str], operands: list[str]) -> Step:
        what = parts[1]
        if "cta_group::2" in parts:
            raise Unknown(".".join(parts))
        if what == "mma":
            return self._tensor_product(parts, operands)
        if what in ("ld", "st"):
            return self._tensor_move(parts, operands)
        if what == "commit" and "multicast::cluster" not in parts:
            address = self.address(operands[0])

            def commit(block: Block, mask: Array) -> None:
                thread = self._one(block, mask)
                block.tensor.commit(int(address(block)[thread]), thread)

            return commit
        if what in ("wait::ld", "wait::st"):
            return lambda block, mask: block.tensor.finish(what[-2:], block.active(mask))
        if what == "relinquish_alloc_permit":
            return lambda block, mask: setattr(block.tensor, "closed", True)
        if what.startswith("fence::"):
            return lambda block, mask: None
        if what not in ("alloc", "dealloc"):
            raise Unknown(".".join(parts))
        first = self.address(operands[0]) if what == "alloc" else self.source(operands[0], "u32")
        columns = self.source(operands[1], "u32")

        def reserve(block: Block, mask: Array) -> None:
            some = block.active(mask)
            if len(some) != LANES or len(set(some // LANES)) > 1:
                raise Fault("tensor memory is given out to one whole warp")
            value, count = int(first(block)[some[0]]), int(columns(block)[some[0]])
            if what == "alloc":
                begin = np.array([[block.tensor.allocate(count)]], np.uint32)
                block.store("shared", np.array([value]), some[:1], begin)
            else:
                block.tensor.free(value, count, int(some[0]))

        return reserve

    def _tensor_move(self, parts: list[str], operands: list[str]) -> Step:
        """Between registers and the quarter of tensor memory that is a warp's."""
        shape = next((x for x in parts if x in ("32x32b", "16x32bx2")), None)
        if shape is None or parts[-1] != "b32" or "pack::16b" in parts or "unpack::16b" in parts:
            raise Unknown(".".join(parts))
        load = parts[1] == "ld"
        names, at, *rest = operands if load else (operands[-1], operands[0], *operands[1:-1])
        address, apart = self.address(at), int(rest[0], 0) if rest else 0
        registers = self.vector(names)
        ends = [self.result(x, "u32") if load else self.source(x, "u32") for x in registers]

        def step(block: Block, mask: Array) -> None:
            self._together(block, mask)
            some = block.active(mask)
            begin = address(block)[some].astype(np.int64) & 0xFFFFFFFF
            lane, column, thread = begin >> 16, begin & 0xFFFF, some % LANES
            if (lane // LANES != some // LANES % 4).any() or (lane % (32 if shape == "32x32b" else 16)).any():
                raise Fault("a warp reaches beyond its own lanes of tensor memory")
            if shape == "32x32b":
                lane = lane + thread
            else:
                lane, column = lane + thread % 16, column + thread // 16 * apart
            places = block.tensor.places(lane[:, None], column[:, None] + np.arange(len(registers)))
            if not load:
                block.tensor.store(places, some, np.stack([source(block)[some] for source in ends], 1))
                return
            values = block.tensor.load(places, some)
            for i, write in enumerate(ends):
                whole = np.zeros(block.threads, np.uint32)
                whole[some] = values[:, i]
                write(block, whole, mask)

        return step

    def _tensor_product(self, parts: list[str], operands: list[str]) -> Step:
        """One thread's product D = A B + D, D in tensor memory, A there or in shared memory, B in this, each described
        by 64 bits, and all by 32 more."""
        if parts[2:] != ["cta_group::1", "kind::f16"] or len(operands) != 5:
            raise Unknown(".".join(parts))
        out, in_tensor = self.address(operands[0]), operands[1].startswith("[")
        a = self.address(operands[1]) if in_tensor else self.source(operands[1], "u64")
        b, described, added = map(self.source, operands[2:], ("u64", "u32", "pred"))

        def step(block: Block, mask: Array) -> None:
            thread = self._one(block, mask)
            word = int(described(block)[thread])
            if word >> 4 & 3 != 1 or word & 0xE080604F:
                raise Unknown(f"a product described by {word:#x}")
            kinds = [{0: "f16", 1: "bf16"}[word >> shift & 7] for shift in (7, 10)]
            turned = [word >> shift & 1 for shift in (15, 16)]
            n, m, k = (word >> 17 & 63) * 8, (word >> 24 & 31) * 16, 16
            if m not in (64, 128) or not 0 < n <= 256 or n % (8 if m == 64 else 16):
                raise Unknown(f"a product of {m} rows and {n} columns")
            tensor, read = block.tensor, []

            def matrix(descriptor: int, rows: int, i: int) -> Array:
                if descriptor >> 46 & 7 != 1 or descriptor >> 52 & 0x1FF or descriptor >> 61 & 1:
                    raise Unknown(f"a matrix described by {descriptor:#x}")
                return self._described(block, descriptor, rows, k, kinds[i], turned[i], thread, read)

            def placed(address: int, columns: int) -> Array:
                """Where rows of a matrix are: of 64, 16 in each warp's quarter."""
                row = np.arange(m)
                lane = row if m == 128 else row // 16 * 32 + row % 16
                return tensor.places((address >> 16) + lane[:, None], (address & 0xFFFF) + np.arange(columns)[None])

            right = matrix(int(b(block)[thread]), n, 1)
            left_places = None
            if in_tensor:
                left_places = placed(int(a(block)[thread]) & 0xFFFFFFFF, k // 2)
                pairs = tensor.read_by_product(left_places, thread)
                left = decoded(np.ascontiguousarray(pairs).view(np.uint16), kinds[0]).astype(np.float64)
            else:
                left = matrix(int(a(block)[thread]), m, 0)
            places = placed(int(out(block)[thread]) & 0xFFFFFFFF, n)
            tensor.product(places, left @ right.T, bool(added(block)[thread]), thread, read, left_places)

        return step


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


def compiled(program: Program, threads: int, symbols: dict[str, int]) -> list[tuple]:
    """Of each instruction: what it does to the flow (or None), a step or target, its guard and whether that is negated,
    the registers it names, and its text. `symbols`: where the program's constants are."""
    return _Compiler(program, threads, symbols).code()
