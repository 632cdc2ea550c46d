"""A GPU's blocks on the CPU: runs PTX, what compilers make of a kernel, instruction by instruction for all threads.

It is slow, and knows what our kernels use; anything else is an `Unknown`. It sees what an interpreter of the source
cannot: what the compiler made of the layouts, matrix fragments and asynchronous copies, and it raises `Fault` for

- an access outside the tensors that were passed, or one whose address is no multiple of its size;
- a race: two threads touch a byte of shared memory, one of them writes, and no barrier lies between; or two blocks do
  so in global memory;
- a byte of an asynchronous copy, or one that an asynchronous product reads, touched before it was waited for. Copies
  read and write as late as the wait allows, so that what needed them earlier finds the old bytes;
- an asynchronous product that reads what threads have written, without a fence between the two ways to memory;
- a shuffle, vote or matrix instruction that not all of its threads reach together; a barrier that some never reach.

Arithmetic is IEEE's, but for `.approx`, which is exact here, and matrix products, summed in float64. All threads of a
block go in step; those that part at a branch meet again where all ways from it lead.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ptx_instructions import compiled
from ptx_memory import Region, Shared
from ptx_program import LANES, NUMBERS, UNSIGNED, Array, Fault, Program, Unknown, parsed
from ptx_tensor_memory import TensorMemory


@dataclass
class Traffic:
    """What has been asked of global memory, but for atomics."""

    loaded: int = 0
    """Bytes, as often as they were asked for."""
    stored: int = 0
    sectors: int = 0
    """Of 32 bytes, each counted once for every block that touches it: what comes through a multiprocessor's cache."""
    widths: Counter = field(default_factory=Counter)
    """Bytes by the size of a thread's access."""
    conflicts: int = 0
    """How many cycles more than needed threads' accesses to shared memory take, which meet in one of its 32 banks."""


class Machine:
    """Launches kernels over memory that is told to it."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.programs: dict[tuple[str, str | None], Program] = {}
        self.code: dict[tuple[int, int], list] = {}

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
        # Notes take eight times a region's own memory: a very large one does without.
        regions = [Region(start, data, label, len(data) < 2**30) for start, data, label in memory if len(data)]
        symbols = {}
        for known, data in program.constants.items():
            symbols[known] = data.__array_interface__["data"][0]
            regions.append(Region(symbols[known], data, known, watched=False))
        shape = (threads, 1, 1) if isinstance(threads, int) else (*threads, 1, 1)[:3]
        code = self.code.get((id(program), int(np.prod(shape))))
        if code is None:
            code = compiled(program, int(np.prod(shape)), symbols)
            self.code[id(program), int(np.prod(shape))] = code
        full = (*grid, 1, 1)[:3]
        with np.errstate(all="ignore"):
            for number in range(int(np.prod(full))):
                place = (number % full[0], number // full[0] % full[1], number // full[0] // full[1])
                block = Block(program, code, shape, place, full, number, arguments, regions, shared, self.traffic)
                block.run()
                self.traffic.sectors += sum(len(np.unique(np.concatenate(x))) for x in block.sectors if x)


class Block:
    def __init__(self, program, code, shape, place, grid, number, parameters, regions, shared, traffic) -> None:
        self.program, self.code, self.number, self.regions = program, code, number + 1, regions
        self.traffic = traffic
        self.sectors: tuple[list[Array], list[Array]] = ([], [])  # read, written
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
        self.whole = np.ones(self.threads, np.bool_)
        self.alive = self.whole
        self.expected: dict[str, int] = {}  # threads at a barrier that names their number
        self.copies: list[dict] = []
        self.committed = np.zeros(self.threads, np.int64)
        # Of each group of asynchronous products under way, and of those in none yet: bytes read, registers written.
        self.products: list[list[tuple[list[Array], set[int]]]] = []
        self.open: list[tuple[list[Array], set[int]]] = []
        self.busy: set[int] = set()
        self.tensor = TensorMemory(self.shared, self.threads)

    def put(self, register: int, value: Array, mask: Array) -> None:
        registers = self.registers
        registers[register] = value if mask is None else np.where(mask, value, registers[register])

    def known(self, mask: Array) -> Array | None:
        """None where no thread is left, `whole` itself where all are there: neither has to be looked for again."""
        return self.whole if mask.all() else mask if mask.any() else None

    def active(self, mask: Array) -> Array:
        return self.all if mask is None else np.flatnonzero(mask)

    def run(self) -> None:
        blocks, after = self.program.meetings
        groups: dict[int, Array] = {0: self.whole}  # threads that go together, by where they are
        waiting: dict[str, list[tuple[Array, int]]] = {}  # by barrier: threads, and where they go on

        def park(pc: int, mask: Array) -> None:
            groups[pc] = groups[pc] | mask if pc in groups else mask

        def waits(pc: int, other: int) -> bool:
            """Whether the threads at another place will come here, too."""
            here, there = blocks[pc], blocks[other]
            return other < pc if here == there else bool(after[there] >> here & 1)

        while groups:
            pc = next(pc for pc in sorted(groups) if not any(waits(pc, other) for other in groups if other != pc))
            mask = self.known(groups.pop(pc))
            alone = True
            while alone and mask is not None:
                pc, mask, alone = self.advance(pc, mask, park, waiting)
                alone = alone or not groups
            if mask is not None:
                park(pc, mask)
            for barrier, arrived in list(waiting.items()):
                count = sum(mask.sum() for mask, _ in arrived)
                if count >= (self.expected[barrier] or self.alive.sum()):
                    if count == self.alive.sum():  # among a part of the threads nothing is forgotten of the others
                        self.shared.barrier()
                        self.tensor.barrier()
                    for mask, pc in waiting.pop(barrier):
                        park(pc, mask)
        if waiting:
            raise Fault(f"{self.program.name}: barrier {next(iter(waiting))} is never reached by all")
        if self.copies:
            raise Fault(f"{self.program.name}: ends with asynchronous copies that were not waited for")
        if self.tensor.begin is not None:
            raise Fault(f"{self.program.name}: ends with tensor memory that was not given back")

    def advance(
        self, pc: int, mask: Array, park: Callable[[int, Array], None], waiting: dict[str, list[tuple[Array, int]]]
    ) -> tuple[int, Array | None, bool]:
        """Carry out one instruction for the threads of a mask: where those are then that go on together, if any do, and
        whether that is no place for others to come."""
        kind, step, guard, negated, touched, text = self.code[pc]
        blocks = self.program.meetings[0]
        now = mask if guard is None else self.known(mask & (self.registers[guard] ^ negated))
        pc, inside = pc + 1, pc + 1 < len(blocks) and blocks[pc] == blocks[pc + 1]
        if now is None:
            return pc, mask, inside
        try:
            if self.busy and not self.busy.isdisjoint(touched):
                raise Fault("a register that an asynchronous product has yet to write")
            if kind is None:
                step(self, None if now is self.whole else now)
                return pc, mask, inside
            others = None if now is mask else self.known(mask & ~now)
            if kind == "branch":
                if others is None:
                    return step, mask, False
                park(step, now)
            elif kind == "exit":
                self.alive = self.alive & ~now
            else:
                barrier, self.expected[barrier] = step
                waiting.setdefault(barrier, []).append((now, pc))
            return pc, others, False
        except Fault as fault:
            raise Fault(f"{fault} ({self.program.name}, block {self.number - 1}: {text})") from None
        except Unknown:
            raise
        except Exception as error:
            raise RuntimeError(f"{self.program.name}: {text}") from error

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

    def aligned(self, addresses: Array, size: int) -> None:
        if (addresses % np.asarray(size, addresses.dtype)).any():
            raise Fault(f"an address that is no multiple of {size}")

    def in_global(self, addresses: Array, element: int, count: int, write: bool) -> list[tuple[Array, Array, Any]]:
        """Where elements [threads, count] lie: a view, the first element's place in it, and for which threads."""
        total = element * count
        self.aligned(addresses, total)
        moved = total * len(addresses)
        self.traffic.loaded += 0 if write else moved
        self.traffic.stored += moved if write else 0
        self.traffic.widths[total] += moved
        self.sectors[write].append(np.unique(addresses.astype(np.int64) // 32))
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
        self.aligned(places, size)
        if (places < 0).any() or (places + size > len(self.shared.data)).any():
            raise Fault(f"bytes {places.min()} to {places.max() + size - 1} of shared memory, which has "
                        f"{len(self.shared.data)}")  # fmt: skip
        self.shared.touch(places[:, None] + np.arange(size), threads, write)
        together = min(128 // max(size, 4), LANES)  # threads whose words go at once
        words = places[:, None] // 4 + np.arange(max(size // 4, 1))
        turn, word = np.divmod(np.unique((threads[:, None] // together << 20) + words), 1 << 20)
        asked = np.zeros((int(turn.max()) + 1, 32), np.int64)
        np.add.at(asked, (turn, word % 32), 1)
        self.traffic.conflicts += int((asked.max(1) - -(-asked.sum(1) // 32)).sum())
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
                        value = self.load("global", copy["address"][due][some], thread[some], 4, int(size) // 4)
                        self.shared.data[shared[some][:, None] + np.arange(size)] = value.view(np.uint8)
            if not due.all():
                left.append({k: v if k == "size" else v[~due] for k, v in copy.items()})
        self.copies = left
