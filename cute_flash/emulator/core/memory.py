"""Memory spaces: host memory that a kernel may touch, and the per-owner spaces (shared per CTA, local per
thread).

Addresses are int64 arrays of shape (n,), one per thread. An access moves `count` elements of `width` bytes
per thread and is checked as a whole: inside an allocation, aligned to its size, and (for the poisoned
spaces) written before it is read. Generic addresses: host addresses lie below 2**47; shared, local and
parameter space have windows above.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import Misaligned, OutOfBounds, UninitializedRead

if TYPE_CHECKING:
    from .geometry import Geometry
    from .state import Threads

WINDOW_SHIFT = 48
WINDOWS = {"global": 0, "shared": 1 << WINDOW_SHIFT, "local": 2 << WINDOW_SHIFT, "param": 3 << WINDOW_SHIFT}
RANK_SHIFT = 24  # shared addresses hold the CTA's rank in its cluster from this bit on
WIDEST = 32  # bytes: the widest access, ld.global.v8.b32
POISON = 0xFF
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class _Region:
    """One allocation; `units` sees its bytes from the last multiple of WIDEST before it to the first one
    after it.
    """

    def __init__(self, address: int, nbytes: int, name: str):
        self.start, self.end, self.name = address, address + nbytes, name
        self.origin = address & -WIDEST
        span = -(-(self.end - self.origin) // WIDEST) * WIDEST
        self.bytes = np.frombuffer((ctypes.c_uint8 * span).from_address(self.origin), np.uint8)

    def units(self, width: int, count: int) -> np.ndarray:
        """Shape (span / (width * count), count)."""
        return self.bytes.view(UNSIGNED[width]).reshape(-1, count)


class GlobalMemory:
    """The host memory that kernels may touch, as named allocations at their real addresses."""

    def __init__(self) -> None:
        self.regions: list[_Region] = []
        self.starts: list[int] = []

    def add(self, address: int, nbytes: int, name: str) -> None:
        """Allow kernels to touch [address, address + nbytes). The caller keeps the memory alive.

        Overlapping allocations are joined (two tensors that share storage); empty ones are ignored.
        """
        if nbytes <= 0:
            return
        region = _Region(address, nbytes, name)
        joined = [r for r in self.regions if r.start <= region.end - 1 and region.start <= r.end - 1]
        if joined:
            start = min(r.start for r in [*joined, region])
            end = max(r.end for r in [*joined, region])
            names = dict.fromkeys([*(r.name for r in joined), name])
            region = _Region(start, end - start, "+".join(names))
            self.regions = [r for r in self.regions if r not in joined]
        self.regions.append(region)
        self.regions.sort(key=lambda r: r.start)
        self.starts = [r.start for r in self.regions]

    def find(self, address: int) -> _Region | None:
        """The allocation that contains `address`."""
        at = bisect_right(self.starts, address) - 1
        return self.regions[at] if at >= 0 and address < self.regions[at].end else None

    def load(self, m: Geometry, g: Threads, address: np.ndarray, width: int, count: int) -> np.ndarray:
        """Elements at each thread's address, shape (n, count), unsigned of `width` bytes."""
        region = self._check(m, g, address, width * count, "load")
        if region is not None:
            return region.units(width, count)[(address - region.origin) // (width * count)]
        values = np.empty((len(address), count), UNSIGNED[width])
        for region, members in self._split(address):
            values[members] = region.units(width, count)[
                (address[members] - region.origin) // (width * count)
            ]
        return values

    def store(self, m: Geometry, g: Threads, address: np.ndarray, values: np.ndarray) -> None:
        """Write values of shape (n, count); of several threads at one address the last one stays."""
        width, count = values.itemsize, values.shape[1]
        region = self._check(m, g, address, width * count, "store")
        if region is not None:
            region.units(width, count)[(address - region.origin) // (width * count)] = values
            return
        for region, members in self._split(address):
            at = (address[members] - region.origin) // (width * count)
            region.units(width, count)[at] = values[members]

    def _check(self, m: Geometry, g: Threads, address: np.ndarray, size: int, what: str) -> _Region | None:
        """The one allocation that holds all accesses, or None; raises on a bad address."""
        if size > 1:
            odd = address & (size - 1)
            if np.count_nonzero(odd):
                k = int(np.flatnonzero(odd)[0])
                raise m.fault(Misaligned, g, k, f"global {what} of {size} bytes at {int(address[k]):#x}")
        low, high = int(address.min()), int(address.max())
        region = self.find(low)
        if region is not None and high + size <= region.end:
            return region
        for k, each in enumerate(address.tolist()):
            region = self.find(each)
            if region is None or each + size > region.end:
                text = f"global {what} of {size} bytes at {each:#x}: {self.describe(each)}"
                raise m.fault(OutOfBounds, g, k, text)
        return None

    def check(self, m: Geometry, g: Threads, address: np.ndarray, used: np.ndarray, alignment: int) -> None:
        """Check an asynchronous read of used[k] bytes at address[k] that will happen later."""
        if (address & (alignment - 1)).any():
            k = int(np.flatnonzero(address & (alignment - 1))[0])
            raise m.fault(Misaligned, g, k, f"copy of {alignment} bytes from global {int(address[k]):#x}")
        reading = used > 0
        if not reading.all():
            address, used = address[reading], used[reading]
            if not len(address):
                return
        low, high = int(address.min()), int((address + used).max())
        region = self.find(low)
        if region is not None and high <= region.end:
            return
        positions = np.flatnonzero(reading)
        for k, each, size in zip(positions.tolist(), address.tolist(), used.tolist(), strict=True):
            region = self.find(each)
            if region is None or each + size > region.end:
                text = f"copy of {size} bytes from global {each:#x}: {self.describe(each)}"
                raise m.fault(OutOfBounds, g, k, text)

    def fetch(self, address: np.ndarray, size: int) -> np.ndarray:
        """Bytes at checked, aligned addresses, shape (n, size)."""
        if not len(address):
            return np.empty((0, size), np.uint8)
        region = self.find(int(address[0]))
        if region.origin <= int(address.min()) and int(address.max()) < region.end:
            return region.bytes.reshape(-1, size)[(address - region.origin) // size]
        values = np.empty((len(address), size), np.uint8)
        for region, members in self._split(address):
            values[members] = region.bytes.reshape(-1, size)[(address[members] - region.origin) // size]
        return values

    def peek(self, address: int, size: int) -> np.ndarray:
        """`size` bytes at one checked address."""
        region = self.find(address)
        return region.bytes[address - region.origin : address - region.origin + size]

    def _split(self, address: np.ndarray) -> list[tuple[_Region, np.ndarray]]:
        owner = np.searchsorted(self.starts, address, side="right") - 1
        return [(self.regions[i], np.flatnonzero(owner == i)) for i in np.unique(owner)]

    def describe(self, address: int) -> str:
        """Where a bad address lies, relative to the nearest allocation."""
        if not self.regions:
            return "no memory is allocated"
        near = min(self.regions, key=lambda r: min(abs(address - r.start), abs(address - r.end)))
        if address < near.start:
            return f"{near.start - address} bytes before {near.name} ({near.end - near.start} bytes)"
        return f"{address - near.start} bytes into {near.name} ({near.end - near.start} bytes)"


class OwnedMemory:
    """A space of which each owner (a CTA, a thread) has its own poisoned copy: addresses base .. base +
    size.

    bytes, written: uint8 (owners, stride); written is 1 where a byte has been stored. strict: reads of
    other bytes raise.
    """

    def __init__(self, space: str, owners: int, base: int, size: int):
        self.space, self.base, self.end = space, base, base + size
        self.stride = -(-max(self.end, 1) // 128) * 128
        self.strict = True
        self.bytes = np.full((owners, self.stride), POISON, np.uint8)
        self.written = np.zeros((owners, self.stride), np.uint8)

    def units(self, width: int, count: int) -> np.ndarray:
        """All bytes as elements: shape (owners * stride / (width * count), count)."""
        return self.bytes.reshape(-1).view(UNSIGNED[width]).reshape(-1, count)

    def position(
        self, m: Geometry, g: Threads, owner: np.ndarray, address: np.ndarray, size: int
    ) -> np.ndarray:
        """Index of each access in units of `size` bytes, after the bounds and alignment checks."""
        bad = (address < self.base) | (address > self.end - size)
        if np.count_nonzero(bad):
            k = int(np.flatnonzero(bad)[0])
            limits = f"{self.space} memory is [{self.base}, {self.end})"
            raise m.fault(OutOfBounds, g, k, f"{size} bytes at {self.space} {int(address[k]):#x}: {limits}")
        if size > 1 and np.count_nonzero(address & (size - 1)):
            k = int(np.flatnonzero(address & (size - 1))[0])
            raise m.fault(Misaligned, g, k, f"{size} bytes at {self.space} {int(address[k]):#x}")
        return (owner * self.stride + address) // size

    def load(
        self, m: Geometry, g: Threads, owner: np.ndarray, address: np.ndarray, width: int, count: int
    ) -> np.ndarray:
        """Elements at each thread's address, shape (n, count), unsigned of `width` bytes."""
        size = width * count
        at = self.position(m, g, owner, address, size)
        if self.strict:
            self._check_written(m, g, address, at, size)
        return self.units(width, count)[at]

    def _check_written(self, m: Geometry, g: Threads, address: np.ndarray, at: np.ndarray, size: int) -> None:
        step = min(size, 8)
        flags = self.written.reshape(-1).view(UNSIGNED[step]).reshape(-1, size // step)[at]
        if np.count_nonzero(flags == int.from_bytes(b"\1" * step, "little")) != flags.size:
            missing = self.written.reshape(-1, size)[at] == 0
            k = int(np.flatnonzero(missing.any(axis=1))[0])
            where = int(address[k]) + int(np.flatnonzero(missing[k])[0])
            raise m.fault(UninitializedRead, g, k, f"{self.space} byte {where:#x} was never written")

    def unwritten(self, address: int, owner: str) -> UninitializedRead:
        """The error for an asynchronous read of a byte that nothing has written."""
        return UninitializedRead(f"{self.space} byte {address:#x} of CTA {owner} was never written")

    def store(
        self, m: Geometry, g: Threads, owner: np.ndarray, address: np.ndarray, values: np.ndarray
    ) -> None:
        """Write values of shape (n, count)."""
        width, count = values.itemsize, values.shape[1]
        at = self.position(m, g, owner, address, width * count)
        self.units(width, count)[at] = values
        self.mark(at, width * count)

    def mark(self, at: np.ndarray, size: int) -> None:
        """Note the units `at` of `size` bytes as written."""
        step = min(size, 8)
        flags = self.written.reshape(-1).view(UNSIGNED[step]).reshape(-1, size // step)
        flags[at] = int.from_bytes(b"\1" * step, "little")


class ParameterMemory:
    """The kernel's parameter block: read-only, the same for every thread."""

    def __init__(self, block: bytes):
        self.size = len(block)
        span = -(-max(len(block), 1) // WIDEST) * WIDEST
        self.bytes = np.zeros(span, np.uint8)
        self.bytes[: len(block)] = np.frombuffer(block, np.uint8)

    def load(self, m: Geometry, g: Threads, address: np.ndarray, width: int, count: int) -> np.ndarray:
        """Elements at each thread's offset, shape (n, count)."""
        size = width * count
        bad = (address < 0) | (address + size > self.size)
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            raise m.fault(OutOfBounds, g, k, f"parameter offset {int(address[k])} of {self.size} bytes")
        if (address & (size - 1)).any():
            raise m.fault(Misaligned, g, 0, f"{size} bytes at parameter offset {int(address[0])}")
        return self.bytes.view(UNSIGNED[width]).reshape(-1, count)[address // size]
