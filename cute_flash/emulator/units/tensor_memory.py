"""Tensor memory: per CTA 128 lanes of 512 columns of 32 bits, and who has which columns.

Columns are allocated in powers of two. Warps load and store their own quarter of the lanes; products and
copies reach all of them. Words are poisoned and flagged like shared memory.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import OutOfBounds, TensorMemoryError, UninitializedRead
from ..core.events import Columns
from ..core.machine import Machine, Part

if TYPE_CHECKING:
    from ..core.state import Threads

LANES, COLUMNS = 128, 512
QUARTER = 32  # lanes that one warp of a warpgroup reaches
SMALLEST = 32  # columns
POISON = 0xFFFFFFFF
NBYTES = 5 * LANES * COLUMNS  # of host memory per CTA: words, and a flag for each


def split(address: int) -> tuple[int, int]:
    """(lane, column) of a tensor memory address."""
    return address >> 16, address & 0xFFFF


class TensorMemory(Part):
    """The tensor memories of a wave's CTAs and their allocators.

    words: uint32, written: bool, both (ctas, LANES, COLUMNS) and made on first use. strict: reads of words
    that nothing has written raise. room[cta, c]: columns from c to the end of the allocation that holds c.
    """

    def __init__(self, m: Machine):
        super().__init__(m)
        self.strict = m.options.uninitialized == "error"
        self.room = np.zeros((m.ctas, COLUMNS), np.int64)
        self.blocks: list[dict[int, int]] = [{} for _ in range(m.ctas)]  # first column -> columns
        self.last = [COLUMNS] * m.ctas  # columns of the latest allocation
        self.relinquished = [False] * m.ctas
        self.granted: dict[tuple[int, int], int] = {}  # (cta, warp) of a pair -> its first column
        self.stores: dict[tuple[int, int], list] = {}  # (cta, warp) -> stores since its last wait
        self.asking: dict[int, tuple[int, int]] = {}  # cta that waits for its peer -> (warp, columns)

    @cached_property
    def words(self) -> np.ndarray:
        return np.full((self.machine.ctas, LANES, COLUMNS), POISON, np.uint32)

    @cached_property
    def written(self) -> np.ndarray:
        return np.zeros((self.machine.ctas, LANES, COLUMNS), bool)

    # Allocation.

    def key(self, cta: int) -> str:
        """What waits for columns of a CTA is parked under."""
        return f"tensor memory of CTA {self.machine.cta_name(cta)}"

    def allocate(self, cta: int, columns: int) -> int | None:
        """The first column of a new allocation, None while there is no room."""
        self._check_request(cta, columns)
        return self._take([cta], columns)

    def allocate_pair(self, cta: int, warp: int, columns: int) -> int | None:
        """The same columns of both CTAs of a pair, once a warp of each has asked; None until then."""
        if (cta, warp) in self.granted:
            return self.granted.pop((cta, warp))
        m = self.machine
        peer = cta - m.rank[cta] + (m.rank[cta] ^ 1)
        for each in (cta, peer):
            self._check_request(each, columns)
        self.asking[cta] = warp, columns
        if peer not in self.asking:
            return None
        other, wanted = self.asking[peer]
        if wanted != columns:
            raise TensorMemoryError(f"the CTAs of a pair ask for {columns} and {wanted} columns")
        base = self._take([cta, peer], columns)
        if base is not None:
            del self.asking[peer], self.asking[cta]
            self.granted[peer, other] = base
            m.wake(self.key(peer))
        return base

    def _check_request(self, cta: int, columns: int) -> None:
        name = self.machine.cta_name(cta)
        if columns & columns - 1 or not SMALLEST <= columns <= COLUMNS:
            allowed = f"a power of two from {SMALLEST} to {COLUMNS}"
            raise TensorMemoryError(f"CTA {name} allocates {columns} columns; allowed: {allowed}")
        if self.relinquished[cta]:
            raise TensorMemoryError(f"CTA {name} allocates after it has relinquished its permit")
        if columns > self.last[cta]:
            text = f"CTA {name} allocates {columns} columns after {self.last[cta]}: allocations may not grow"
            raise TensorMemoryError(text)

    def _take(self, ctas: list[int], columns: int) -> int | None:
        for base in range(0, COLUMNS, columns):
            if not self.room[ctas, base : base + columns].any():
                for cta in ctas:
                    self.blocks[cta][base] = self.last[cta] = columns
                    self.room[cta, base : base + columns] = np.arange(columns, 0, -1)
                return base
        return None

    def release(self, cta: int, address: int, columns: int) -> Columns:
        """Give an allocation back: its address and its whole size. Returns what was freed."""
        lane, base = split(address)
        if lane or self.blocks[cta].get(base) != columns:
            have = ", ".join(f"{n} columns at {b}" for b, n in self.blocks[cta].items()) or "none"
            text = f"deallocates {columns} columns at {address:#x}; allocated: {have}"
            raise TensorMemoryError(f"CTA {self.machine.cta_name(cta)} {text}")
        del self.blocks[cta][base]
        self.room[cta, base : base + columns] = 0
        self.words[cta, :, base : base + columns] = POISON
        self.written[cta, :, base : base + columns] = False
        self.machine.wake(self.key(cta))
        return Columns(cta, slice(0, LANES), base, columns)

    def ended(self) -> None:
        """Every thread has exited: nothing may still be allocated."""
        for cta, blocks in enumerate(self.blocks):
            for base, columns in blocks.items():
                name = self.machine.cta_name(cta)
                text = f"CTA {name} exits without deallocating {columns} columns of tensor memory at {base}"
                raise TensorMemoryError(text)

    # Access.

    def check_columns(self, cta: int, column: int, count: int, what: str) -> None:
        """Raise OutOfBounds unless [column, column + count) lies in one allocation."""
        if not 0 <= column < COLUMNS or self.room[cta, column] < count:
            have = ", ".join(f"[{b}, {b + n})" for b, n in self.blocks[cta].items()) or "none"
            text = f"{what} touches columns [{column}, {column + count}); allocated: {have}"
            raise OutOfBounds(f"{text} (CTA {self.machine.cta_name(cta)})")

    def check_written(self, cta: int, lanes: slice | np.ndarray, columns: slice, what: str) -> None:
        """Raise UninitializedRead unless all these words have been written."""
        flags = self.written[cta, lanes, columns]
        if self.strict and not flags.all():
            lane, column = (int(v[0]) for v in np.nonzero(~flags))
            raise self.unwritten(what, cta, int(np.arange(LANES)[lanes][lane]), columns.start + column)

    def unwritten(self, what: str, cta: int, lane: int, column: int) -> UninitializedRead:
        """The error for a word that nothing has written."""
        where = f"lane {lane}, column {column} of tensor memory, which was never written"
        return UninitializedRead(f"{what} reads {where} (CTA {self.machine.cta_name(cta)})")

    def starts(self, g: Threads, address: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray]:
        """(first lane, first column) that each warp of `g` reaches with its address, `lanes` at a time.

        Lane bits 5 and 6 of an address may be left out (0): hardware then takes the warp's own quarter.
        """
        own, lane = g.warp_at % 4 * QUARTER, address >> 16
        inside = lane & QUARTER - 1
        wrong = ((lane - inside != own) & (lane != inside)) | (inside % lanes != 0)
        if wrong.any():
            k = int(np.flatnonzero(wrong)[0])
            allowed = f"{own[k]} to {own[k] + QUARTER - 1} in steps of {lanes}"
            text = f"lane {int(lane[k])} of tensor memory; this warp reaches lanes {allowed}"
            raise self.machine.warp_fault(TensorMemoryError, g, k, text)
        return own + inside, address & 0xFFFF
