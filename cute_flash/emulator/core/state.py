"""Threads and registers of one wave of CTAs.

Every register is an array over all threads of the wave, shape (warps, ctas, 32). `Threads` is a set of
threads that execute together; its `index` selects them in any such array: slices where the set is a
rectangle of whole warps (then reads are views), index arrays otherwise. Threads carry no lane masks into an
instruction: a divergent branch makes two sets of one, and sets that meet at the same instruction become one
again.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

LANES = 32

# Typed views of a register by name: (register width in bits, numpy dtype, elements per register).
VIEWS = {
    "pred": (1, np.bool_, 1),
    "u8": (8, np.uint8, 1),
    "s8": (8, np.int8, 1),
    "u16": (16, np.uint16, 1),
    "s16": (16, np.int16, 1),
    "f16": (16, np.float16, 1),
    "u32": (32, np.uint32, 1),
    "s32": (32, np.int32, 1),
    "f32": (32, np.float32, 1),
    "f16x2": (32, np.float16, 2),
    "u16x2": (32, np.uint16, 2),
    "s16x2": (32, np.int16, 2),
    "u64": (64, np.uint64, 1),
    "s64": (64, np.int64, 1),
    "f64": (64, np.float64, 1),
    "f32x2": (64, np.float32, 2),
    "u32x2": (64, np.uint32, 2),
    "u64x2": (128, np.uint64, 2),
}
STORAGE = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64, 128: np.dtype("V16")}


class Threads:
    """A set of threads of one wave, ordered by (warp, cta, lane).

    mask: bool (warps, ctas, 32), never changed after construction. index: see the module's text. shape: the
    shape of `array[index]`. size: number of threads. whole: True when all 32 lanes of every warp in the set
    are present.
    """

    def __init__(self, mask: np.ndarray):
        self.mask = mask
        self.size = int(np.count_nonzero(mask))
        lanes = mask.sum(axis=2)
        present = lanes > 0
        self.warp_mask = present
        self.warps = int(np.count_nonzero(present))
        self.whole = self.size == LANES * self.warps
        warp, cta = np.nonzero(present)
        self.warp_at, self.cta_at = warp, cta
        if not self.whole:
            self.index: tuple = np.nonzero(mask)
            self.shape: tuple[int, ...] = (self.size,)
            return
        rows, columns = np.flatnonzero(present.any(axis=1)), np.flatnonzero(present.any(axis=0))
        rectangle = len(rows) * len(columns) == self.warps
        if rectangle and _is_range(rows) and _is_range(columns):
            self.index = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            self.shape = (len(rows), len(columns), LANES)
        else:
            self.index = (warp, cta)
            self.shape = (self.warps, LANES)

    @cached_property
    def cta(self) -> np.ndarray:
        """CTA of each thread in the wave, shape (size,)."""
        return np.nonzero(self.mask)[1]

    @cached_property
    def warp(self) -> np.ndarray:
        """Warp inside its CTA of each thread, shape (size,)."""
        return np.nonzero(self.mask)[0]

    @cached_property
    def lane(self) -> np.ndarray:
        """Lane of each thread, shape (size,)."""
        return np.nonzero(self.mask)[2]

    @cached_property
    def flat(self) -> np.ndarray:
        """Number of each thread in the raveled (warps, ctas, 32) order, shape (size,)."""
        return np.flatnonzero(self.mask)

    @cached_property
    def flat_warp(self) -> np.ndarray:
        """Number of each warp of the set in the raveled (warps, ctas) order, shape (warps,)."""
        return np.flatnonzero(self.warp_mask)

    @cached_property
    def slot(self) -> np.ndarray:
        """For each thread the position of its warp in flat_warp, shape (size,)."""
        return np.searchsorted(self.flat_warp, self.flat // LANES)

    def gather(self, bank: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Rows of a register file for a set of whole warps, shape (len(rows), warps, 32), copied."""
        if isinstance(self.index[0], slice):
            return bank[(rows, *self.index)].reshape(len(rows), -1, LANES)
        return bank[rows[:, None], self.index[0], self.index[1]]

    def scatter(self, bank: np.ndarray, rows: np.ndarray, values: np.ndarray) -> None:
        """The inverse of gather: write values of shape (len(rows), warps, 32)."""
        if isinstance(self.index[0], slice):
            bank[(rows, *self.index)] = values.reshape(len(rows), *self.shape)
        else:
            bank[rows[:, None], self.index[0], self.index[1]] = values


def _is_range(values: np.ndarray) -> bool:
    return len(values) == 0 or values[-1] - values[0] + 1 == len(values)


class ThreadSets:
    """Makes Threads and remembers them, so that a set that forms again is not analysed again."""

    LIMIT = 4096

    def __init__(self, warps: int, ctas: int):
        self.shape = (warps, ctas, LANES)
        self.known: dict[bytes, Threads] = {}

    def of(self, mask: np.ndarray) -> Threads:
        key = np.packbits(mask).tobytes()
        found = self.known.get(key)
        if found is None:
            if len(self.known) >= self.LIMIT:
                self.known.clear()
            found = self.known[key] = Threads(mask)
        return found

    def select(self, threads: Threads, chosen: np.ndarray) -> Threads:
        """The members of `threads` whose entry in the bool array `chosen` (shape threads.shape) is True."""
        mask = np.zeros(self.shape, bool)
        mask[threads.index] = chosen
        return self.of(mask)

    def union(self, one: Threads, other: Threads) -> Threads:
        return self.of(one.mask | other.mask)

    def without(self, one: Threads, other: Threads) -> Threads:
        return self.of(one.mask & ~other.mask)


class Registers:
    """Register files of a wave, one bank per width.

    rows[view][row] is the (warps, ctas, 32[, elements]) array of a register under a typed view of VIEWS.
    Constants are rows too: constant k of a width is row -1 - k; it repeats its value and cannot be written.
    """

    def __init__(self, counts: dict[int, int], constants: dict[int, list[np.ndarray]], warps: int, ctas: int):
        self.shape = (warps, ctas, LANES)
        self.constants = constants
        self.banks: dict[int, np.ndarray] = {}
        for width, storage in STORAGE.items():
            bank = np.empty((counts.get(width, 0), *self.shape), storage)
            # Poison: all ones is NaN in every float format. Predicates have no such value and start False.
            bank.view(np.uint8).fill(0xFF if width > 1 else 0)
            self.banks[width] = bank
        self.rows = _Rows(self)

    def view(self, name: str) -> list[np.ndarray]:
        """All rows under one typed view."""
        width, dtype, elements = VIEWS[name]
        bank = self.banks[width].view(dtype)
        tail = (elements,) if elements > 1 else ()
        rows = list(bank.reshape(*self.banks[width].shape, *tail))
        for values in reversed(self.constants.get(width, [])):
            values = np.atleast_1d(np.ascontiguousarray(values, STORAGE[width]))
            typed = values.view(dtype).reshape(*values.shape, *tail)
            rows.append(np.broadcast_to(typed, (*self.shape, *tail)))
        return rows


class _Rows(dict):
    """Views by name, made on first use: a program needs few of them."""

    def __init__(self, registers: Registers):
        super().__init__()
        self.registers = registers

    def __missing__(self, name: str) -> list[np.ndarray]:
        self[name] = self.registers.view(name)
        return self[name]
