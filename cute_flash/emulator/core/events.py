"""What observers are told of: barriers, copies, the work of units, and places in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..ptx.parse import Instruction


class Unit(NamedTuple):
    """Who works asynchronously on shared memory: a queue of a CTA, whose work completes in numbered steps.

    name, number: ("bulk", thread) for bulk stores, ("products", warpgroup) for wgmma, ("tensor", thread) for
    tcgen05, ("copies", warp) for cp.async that an mbarrier tracks. epoch: the step that the work belongs to;
    whoever learns that the step is over (`unit_done`, or an mbarrier's phase) may touch what it touched. cta,
    warp: who issued it.
    """

    cta: int
    name: str
    number: int
    epoch: int
    warp: int


class Span(NamedTuple):
    """Consecutive bytes of a CTA's shared memory."""

    cta: int
    address: int
    size: int


class Columns(NamedTuple):
    """Columns first … first + count of some lanes of a CTA's tensor memory."""

    cta: int
    lanes: slice
    first: int
    count: int


class Rows(NamedTuple):
    """Places in global memory: `nbytes` bytes from each address."""

    address: np.ndarray
    nbytes: int


class Order(NamedTuple):
    """How an access of global memory is ordered with those of other threads.

    strong: .relaxed or more, at the scope of the GPU or the system; acquire, release: as it says. update: an
    atomic one; returns: and the thread gets what was there; sums: it adds floating-point numbers, so that the
    result depends on who comes first. lasting: a read of what nobody writes while the kernel runs (.nc).
    """

    strong: bool = False
    acquire: bool = False
    release: bool = False
    update: bool = False
    returns: bool = False
    sums: bool = False
    lasting: bool = False


class Barrier:
    """One mbarrier. phase: number of completed phases; pending: arrivals that the current one lacks; bytes:
    what it still expects (negative: came early).
    """

    __slots__ = ("cta", "address", "number", "expected", "pending", "bytes", "phase")

    def __init__(self, cta: int, address: int, number: int, expected: int):
        self.cta, self.address, self.number = cta, address, number
        self.expected = self.pending = expected
        self.bytes = self.phase = 0

    @property
    def key(self) -> str:
        """What waits for it are parked under."""
        return f"mbarrier {self.address:#x} of CTA {self.cta}"

    def __repr__(self) -> str:
        return (
            f"mbarrier {self.address:#x} (phase {self.phase}, {self.pending} of {self.expected} arrivals and "
            f"{self.bytes} bytes outstanding)"
        )


@dataclass(slots=True)
class Copy:
    """One cp.async instruction of a set of threads, as arrays with one entry per thread."""

    thread: np.ndarray  # number of the thread in the wave
    cta: np.ndarray
    shared: np.ndarray  # destination address in its CTA
    source: np.ndarray  # global address
    filled: np.ndarray  # bytes that are read; the rest of the destination becomes zero
    size: int
    where: Instruction
    group: np.ndarray | None = None  # how many groups the thread had committed at issue
    landed: bool = False
    tracked: int = 0  # number of the arrival at an mbarrier that follows it, for its warp; 0: none does

    def part(self, chosen: np.ndarray) -> Copy:
        """The entries for which the bool array `chosen` is True."""
        arrays = (a[chosen] for a in (self.thread, self.cta, self.shared, self.source, self.filled))
        return Copy(*arrays, self.size, self.where, self.group[chosen], self.landed, self.tracked)
