"""A block's tensor memory, of compute capability 10.0, where asynchronous products are added up."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from ptx_memory import Notes, Shared
from ptx_program import LANES, Array, Fault, Unknown

ROWS, COLUMNS = 128, 512  # of words of 32 bits; a row is called a lane, and 32 of them are a warp's


class Product(NamedTuple):
    """Under way."""

    thread: int
    shared: list[Array]
    """Bytes of shared memory that it reads."""
    read: Array | None
    """Words of tensor memory that it reads, or None."""
    written: Array


@dataclass
class Barrier:
    """In shared memory, at which one arrival ends a phase: that of products."""

    phase: int = 0
    arriving: int | None = None
    """How many products of the block have to be done for the arrival to come, if one is on its way."""


class TensorMemory:
    def __init__(self, shared: Shared, threads: int):
        self.shared, self.threads = shared, threads
        self.barriers: dict[int, Barrier] = {}
        self.products: list[Product] = []  # those under way
        self.done = 0  # products
        self.phase = np.zeros(threads // LANES + 1, np.int32)  # of each warp: how often its threads have met
        self.begin: int | None = None
        self.closed = False
        self.stores: list[tuple[Array, Array, Array]] = []  # places, threads, values
        self.loads: list[tuple[Array, Array]] = []  # places, threads

    def allocate(self, columns: int) -> int:
        if self.begin is not None:
            raise Unknown("tensor memory asked for twice")
        if self.closed or columns not in (32, 64, 128, 256, 512):
            raise Fault(f"{columns} columns of tensor memory asked for{', which was said not to be' * self.closed}")
        # Not from 0 on, where that is possible.
        self.begin, self.columns = (columns if columns < COLUMNS else 0), columns
        self.words = np.full(ROWS * COLUMNS, 0xA5A5A5A5, np.uint32)
        self.notes = Notes(ROWS * COLUMNS, self.threads, "word of tensor memory")
        self.notes.phase = self.phase
        return self.begin

    def free(self, begin: int, columns: int, thread: int) -> None:
        if (begin, columns) != (self.begin, self.columns):
            raise Fault(f"{columns} columns of tensor memory from {begin} on are given back, which are not had")
        if self.products or self.stores or self.loads:
            raise Fault("tensor memory is given back while it is in use")
        whole = self.places(np.arange(ROWS)[:, None], begin + np.arange(columns))
        self.notes.touch(whole.reshape(1, -1), np.array([thread]), True)
        self.begin = None

    def barrier(self) -> None:
        if self.begin is not None:
            self.notes.barrier()

    def places(self, lane: Array, column: Array) -> Array:
        if self.begin is None or (column < self.begin).any() or (column >= self.begin + self.columns).any():
            raise Fault("columns of tensor memory that are not had")
        if (lane >= ROWS).any():
            raise Fault(f"lane {lane.max()} of tensor memory")
        return lane * COLUMNS + column

    def load(self, places: Array, threads: Array) -> Array:
        """Read at once: that registers hold it only when it was waited for is left to the assembler, who knows them.
        Until then nothing may be written there."""
        self.notes.touch(places, threads, False)
        np.add.at(self.notes.watched, places, 1)
        self.loads.append((places, threads))
        return self.words[places]

    def store(self, places: Array, threads: Array, values: Array) -> None:
        """Written when it is waited for."""
        self.notes.touch(places, threads, True)
        np.add.at(self.notes.flying, places, 1)
        self.stores.append((places, threads, values))

    def finish(self, what: str, threads: Array) -> None:
        """Those threads' loads or stores are waited for."""
        if what == "ld":
            loads, self.loads = self.loads, []
            for places, of in loads:
                due = np.isin(of, threads)
                np.subtract.at(self.notes.watched, places[due], 1)
                if not due.all():
                    self.loads.append((places[~due], of[~due]))
            return
        self.phase[np.unique(threads // LANES)] += 1  # a warp's threads see each other's
        stores, self.stores = self.stores, []
        for places, of, values in stores:
            due = np.isin(of, threads)
            np.subtract.at(self.notes.flying, places[due], 1)
            self.words[places[due]] = values[due]
            if not due.all():
                self.stores.append((places[~due], of[~due], values[~due]))

    def read_by_product(self, places: Array, thread: int) -> Array:
        self.notes.touch(places.reshape(1, -1), np.array([thread]), False, later=True)
        np.add.at(self.notes.watched, places, 1)
        return self.words[places]

    def product(
        self, places: Array, product: Array, added: bool, thread: int, shared: list[Array], read: Array | None
    ) -> None:
        """Written at once, but not to be touched until it is waited for, save by other products, which come in turn."""
        mine = self.notes.flying[places] > 0
        for other in self.stores:
            if np.isin(other[0], places).any():
                raise Fault("a product writes where a store was not waited for")
        fresh = places[~mine]
        if fresh.size:
            self.notes.touch(fresh.reshape(1, -1), np.array([thread]), True, later=True)
        np.add.at(self.notes.flying, places, 1)
        seed = self.words[places].view(np.float32).astype(np.float64) if added else 0.0
        self.words[places] = (seed + product).astype(np.float32).view(np.uint32)
        self.products.append(Product(thread, shared, read, places))

    def ready(self, address: int) -> None:
        if address in self.barriers:
            raise Fault(f"a barrier at byte {address} of shared memory, where one is")
        self.barriers[address] = Barrier()

    def barrier_at(self, address: int) -> Barrier:
        if address not in self.barriers:
            raise Fault(f"byte {address} of shared memory, where no barrier is")
        return self.barriers[address]

    def commit(self, address: int, thread: int) -> None:
        """The barrier ends its phase when the thread's products up to now are done."""
        barrier = self.barrier_at(address)
        if barrier.arriving is not None:
            raise Fault("a second arrival at a barrier, before one has waited for the first")
        if any(product.thread != thread for product in self.products):
            raise Unknown("products of several threads")
        barrier.arriving = self.done + len(self.products)

    def waited(self, address: int, parity: int) -> bool:
        """Whether the phase of a parity is over; it is as soon as it can be."""
        barrier = self.barrier_at(address)
        if barrier.phase % 2 == parity:
            if barrier.arriving is None:
                raise Fault("waits for products that nobody has asked for")
            self._finish_products(barrier.arriving)
            barrier.phase, barrier.arriving = barrier.phase + 1, None
        return True

    def _finish_products(self, count: int) -> None:
        while self.done < count:
            product = self.products.pop(0)
            self.done += 1
            for places in product.shared:
                self.shared.released(places)
            np.subtract.at(self.notes.flying, product.written, 1)
            if product.read is not None:
                np.subtract.at(self.notes.watched, product.read, 1)
