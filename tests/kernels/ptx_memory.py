"""The memories of a GPU, and notes of who has touched what."""

import numpy as np
from ptx_program import LANES, UNSIGNED, Array, Fault


class Region:
    """Bytes that blocks share, and which of them have read and written each."""

    def __init__(self, start: int, data: Array, name: str, watched: bool):
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


class Notes:
    """Of places in memory that a block's threads share: who has touched each since the last barrier."""

    def __init__(self, size: int, threads: int, name: str):
        self.name = name
        self.writer, self.reader = np.zeros(size, np.int32), np.zeros(size, np.int32)  # thread + 1; -2 - warp; -1
        self.written, self.read = np.zeros(size, np.int32), np.zeros(size, np.int32)  # in which phase of its warp
        self.flying = np.zeros(size, np.int32)  # asynchronous writes under way
        self.watched = np.zeros(size, np.int32)  # asynchronous reads under way
        self.phase = np.zeros(threads // LANES + 1, np.int32)  # of each warp: how often its threads have met

    def barrier(self) -> None:
        self.writer[:] = 0
        self.reader[:] = 0

    def touch(self, places: Array, threads: Array, write: bool, *, later: bool = False) -> None:
        """Note accesses to places [threads, ...], or raise `Fault`; `later`: by something asynchronous, which tells
        itself when it is done."""
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
                raise Fault(f"thread {thread} {verb} {self.name} {byte}, which something asynchronous has yet to write")
            if write and self.watched[byte]:
                raise Fault(f"thread {thread} writes {self.name} {byte}, which something asynchronous still reads")
            before = "wrote" if written[bad][0] else "read"
            raise Fault(f"race: thread {thread} {verb} {self.name} {byte}, which another {before} since they last met")
        if later:
            return
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


class Shared(Notes):
    """A block's shared memory."""

    def __init__(self, size: int, threads: int):
        super().__init__(size, threads, "shared byte")
        self.data = np.full(size, 0xA5, np.uint8)
        self.views = {width: self.data[: size // width * width].view(UNSIGNED[width]) for width in UNSIGNED}
        # Who wrote a byte that products may not read yet (thread + 1; -1: before a barrier), and of which warps threads
        # have made a fence since, as bits: their own products may.
        self.unfenced, self.fenced = np.zeros(size, np.int32), np.zeros(size, np.int64)

    def barrier(self) -> None:
        super().barrier()
        self.unfenced[self.fenced != 0] = 0
        self.unfenced[self.unfenced > 0] = -1
        self.fenced[:] = 0

    def touch(self, places: Array, threads: Array, write: bool, *, later: bool = False) -> None:
        super().touch(places, threads, write, later=later)
        if write:
            self.unfenced[places], self.fenced[places] = threads[:, None] + 1, 0

    def fence(self, threads: Array) -> None:
        """What these threads know of may be read by products, which see memory in another way than threads: by their
        own, and behind a barrier by all."""
        for warp in np.unique(threads // LANES):
            by = self.unfenced - 1
            met = (by >= 0) & (by // LANES == warp) & (self.written < self.phase[warp])
            self.fenced[(self.unfenced == -1) | met | np.isin(by, threads[threads // LANES == warp])] |= 1 << int(warp)

    def read_by_product(self, places: Array, thread: int) -> Array:
        """Bytes at places, which must stand still from now on until `released`."""
        outside = (places < 0) | (places >= len(self.data))
        if outside.any():
            raise Fault(f"a product reads byte {int(places[outside][0])} of shared memory, of {len(self.data)}")
        super().touch(places.reshape(1, -1), np.array([thread]), False, later=True)
        hidden = (self.unfenced[places] != 0) & (self.fenced[places] >> (thread // LANES) & 1 == 0)
        if hidden.any():
            byte = int(places[hidden][0])
            raise Fault(f"a product reads shared byte {byte}, behind whose writing there is no fence.proxy.async")
        np.add.at(self.watched, places, 1)
        return self.data[places]

    def released(self, places: Array) -> None:
        np.subtract.at(self.watched, places, 1)
