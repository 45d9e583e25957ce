"""Checkers and counters that look on from outside; a run without them pays nothing.

An Observer's hooks are called before the access or event they name. Threads and addresses are those of one
instruction; m.at is its step. `Options(races=True)` attaches a RaceDetector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from ..machine.machine import Machine
    from ..units.mbarrier import Barrier
    from ..units.sync import Copy
    from .state import Threads


class Unit(NamedTuple):
    """Who works asynchronously on shared memory: a queue of a CTA, whose work completes in numbered steps.

    name, number: ("bulk", thread) for bulk stores, ("products", warpgroup) for wgmma, ("tensor", thread) for
    tcgen05. epoch: the step that the work belongs to; whoever learns that the step is over (`unit_done`, or
    an mbarrier's phase) may touch what it touched. cta, warp: who issued it.
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


class Observer:
    """Base class: every hook does nothing."""

    def begin(self, m: Machine) -> None:
        """A wave of CTAs starts."""

    def step(self, m: Machine, g: Threads) -> None:
        """Step m.at is about to run on `g`. Overriding this one makes every instruction slower."""

    def shared_read(self, m: Machine, g: Threads, address: np.ndarray, size: int) -> None:
        """Each thread reads `size` bytes of shared memory."""

    def shared_write(
        self, m: Machine, g: Threads, address: np.ndarray, values: np.ndarray, atomic: bool = False
    ) -> None:
        """Each thread writes values[k] (count elements) to shared memory."""

    def copy_issue(self, m: Machine, g: Threads, copy: Copy) -> None:
        """Each thread starts an asynchronous copy into shared memory."""

    def copy_done(self, m: Machine, copy: Copy) -> None:
        """The threads of `copy` have waited for it."""

    def async_read(self, m: Machine, unit: Unit, cta: int, address: np.ndarray, size: int) -> None:
        """A unit begins to read `size` bytes at each address of `cta`'s shared memory (async proxy)."""

    def async_write(self, m: Machine, warp: tuple[int, int], barrier: Barrier, span: Span) -> None:
        """A copy issued by (cta, warp) begins to write a part of shared memory.

        It is over when the barrier's current phase is.
        """

    def unit_done(self, m: Machine, warp: tuple[int, int], unit: Unit) -> None:
        """(cta, warp) has waited for a unit's steps up to unit.epoch."""

    def proxy_fence(self, m: Machine, g: Threads, barriers_only: bool) -> None:
        """Each warp orders its generic accesses, and those it knows of, before asynchronous ones.

        barriers_only: its initialisations of mbarriers only.
        """

    def unit_commit(self, m: Machine, unit: Unit) -> None:
        """A step of a unit ends: what its issuer knows to be over now is over when the step is."""

    def unit_arrive(self, m: Machine, unit: Unit, barrier: Barrier) -> None:
        """A unit arrives at a barrier when its steps up to unit.epoch are over."""

    def tensor_access(self, m: Machine, warp: tuple[int, int], columns: Columns, write: bool) -> None:
        """(cta, warp) loads from tensor memory, or begins to store to it."""

    def tensor_stored(self, m: Machine, g: Threads) -> None:
        """Each warp has waited for its stores to tensor memory."""

    def tensor_loaded(self, m: Machine, g: Threads) -> None:
        """Each warp has waited for its loads from tensor memory."""

    def tensor_fence(self, m: Machine, g: Threads, before: bool) -> None:
        """Each warp executes tcgen05.fence, ::before_thread_sync or ::after_thread_sync."""

    def tensor_work(self, m: Machine, unit: Unit, columns: Columns, write: bool) -> None:
        """A unit begins to read tensor memory, or to write it."""

    def tensor_free(self, m: Machine, warp: tuple[int, int], columns: Columns) -> None:
        """(cta, warp) deallocates columns."""

    def mbarrier_init(self, m: Machine, warp: tuple[int, int], barrier: Barrier) -> None:
        """(cta, warp) initialises a barrier."""

    def mbarrier_use(self, m: Machine, warp: tuple[int, int], barrier: Barrier, by_unit: bool) -> None:
        """(cta, warp) is about to use a barrier, or to let a copy or a product signal it (by_unit)."""

    def mbarrier_arrive(self, m: Machine, warp: tuple[int, int], barrier: Barrier, lanes: int) -> None:
        """Some lanes of (cta, warp), as bits, arrive at a barrier; called for each of them."""

    def mbarrier_complete(self, m: Machine, barrier: Barrier) -> None:
        """A barrier's phase is complete."""

    def mbarrier_wait(self, m: Machine, warp: tuple[int, int], barrier: Barrier) -> None:
        """(cta, warp) has seen that the phase before the barrier's current one is complete."""

    def warp_meet(self, m: Machine, g: Threads) -> None:
        """The lanes of each warp leave bar.warp.sync."""

    def cluster_arrive(self, m: Machine, g: Threads, release: bool) -> None:
        """Each warp arrives at its cluster's barrier."""

    def cluster_wait(self, m: Machine, g: Threads) -> None:
        """Each warp leaves its cluster's barrier."""

    def barrier_arrive(self, m: Machine, g: Threads, number: np.ndarray) -> None:
        """Each warp arrives at a named barrier."""

    def barrier_complete(self, m: Machine, complete: np.ndarray) -> None:
        """Named barriers complete: bool (ctas, 16). m.barriers still holds who is present and who waits."""


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, members: tuple[Observer, ...]):
        self.members = members


def _fan_out(name: str) -> None:
    def call(self: Observers, *args, **kwargs) -> None:
        for member in self.members:
            getattr(member, name)(*args, **kwargs)

    setattr(Observers, name, call)


for _name in (name for name in vars(Observer) if not name.startswith("_")):
    _fan_out(_name)


class Trace(Observer):
    """Collects a line per executed step: who, and which PTX line. limit: lines kept."""

    def __init__(self, limit: int = 100000):
        self.limit = limit
        self.lines: list[str] = []

    def step(self, m: Machine, g: Threads) -> None:
        if len(self.lines) < self.limit:
            warps = sorted({(m.cta_name(int(c)), int(w)) for w, c in zip(g.warp_at, g.cta_at, strict=True)})
            self.lines.append(f"{len(warps)} warps from {warps[0]}, {g.size} threads: {m.line(m.at)}")


class BankConflicts(Observer):
    """Counts shared-memory wavefronts per PTX line.

    A warp's access is served in phases of 128 bytes (32, 16 or 8 lanes for 4, 8 or 16 bytes each); a phase
    takes as many wavefronts as the busiest of the 32 banks has different words. wavefronts[line] = (needed,
    without any conflict).
    """

    def __init__(self) -> None:
        self.wavefronts: dict[int, tuple[int, int]] = {}

    def shared_read(self, m: Machine, g: Threads, address: np.ndarray, size: int) -> None:
        self._count(m, g, address, size)

    def shared_write(
        self, m: Machine, g: Threads, address: np.ndarray, values: np.ndarray, atomic: bool = False
    ) -> None:
        self._count(m, g, address, values.itemsize * values.shape[1])

    def _count(self, m: Machine, g: Threads, address: np.ndarray, size: int) -> None:
        lanes = max(1, min(32, 128 // size))
        phase = g.slot * (32 // lanes) + g.lane // lanes
        words = (address[:, None] // 4 + np.arange(max(1, size // 4))).reshape(-1)
        phases = np.repeat(phase, max(1, size // 4))
        unique = np.unique(phases * (1 << 32) + words)
        bank = (unique >> 32) * 32 + (unique & 31)
        per_bank = np.bincount(bank, minlength=(int(phases.max()) + 1) * 32).reshape(-1, 32)
        needed, ideal = int(per_bank.max(axis=1).sum()), len(np.unique(phase))
        line = m.code.steps[m.at].where.line
        have = self.wavefronts.get(line, (0, 0))
        self.wavefronts[line] = (have[0] + needed, have[1] + ideal)
