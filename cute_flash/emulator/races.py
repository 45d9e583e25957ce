"""Data races in shared memory, by vector clocks.

The agents are the warps of a CTA. Each has a clock for every warp of its CTA: clock[cta, w, v] is the last
epoch of v that w knows to be over. Arriving at a barrier publishes a warp's clocks, leaving one takes over
those of everybody who arrived. An access races with an earlier one of another warp whose epoch it does not
know, unless both only read or both are atomic. A cp.async is a write that is under way from its issue until
its thread waits for it: nobody, its own thread included, may touch the bytes until then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .errors import DataRace
from .observe import Observer

if TYPE_CHECKING:
    from .machine import Machine
    from .state import Threads
    from .sync import Copy

NOBODY = -1


class History:
    """Per cell and warp the epoch and the step of its latest access of one kind; empty until there is one."""

    def __init__(self, cells: int, warps: int):
        self.shape = (cells, warps)
        self.clock: np.ndarray | None = None
        self.step: np.ndarray | None = None

    def record(self, cell: np.ndarray, warp: np.ndarray, clock: np.ndarray, step: int) -> None:
        """Note an access of each cell."""
        if self.clock is None:
            self.clock, self.step = np.zeros(self.shape, np.int32), np.zeros(self.shape, np.int32)
        self.clock[cell, warp] = clock
        self.step[cell, warp] = step


class Access(NamedTuple):
    """One access of a set of threads: what it does in words, addresses per thread, and cell, CTA, warp per
    granule.
    """

    m: Machine
    g: Threads
    verb: str
    address: np.ndarray
    cell: np.ndarray
    cta: np.ndarray
    warp: np.ndarray

    def race(self, k: int, other: str, step: int) -> DataRace:
        """The error for granule k."""
        thread = k * len(self.address) // len(self.cell)
        what = f"{self.verb} shared {int(self.address[thread]):#x}"
        text = f"{what} without an order to {other} ({self.m.line(step)})"
        return self.m.fault(DataRace, self.g, thread, text)


class RaceDetector(Observer):
    """Raises DataRace at the second of two conflicting accesses.

    State is kept per cell: the granules of every CTA, each as wide as the program's narrowest shared access.
    """

    def begin(self, m: Machine) -> None:
        """Start a wave with empty histories."""
        self.granule = m.code.shared_granule
        self.count = m.shared.stride // self.granule
        cells = m.ctas * self.count
        self.clock = np.zeros((m.ctas, m.warps, m.warps), np.int32)
        self.clock[:, range(m.warps), range(m.warps)] = 1
        self.published = np.zeros((m.ctas, 16, m.warps), np.int32)
        self.write_warp = np.full(cells, NOBODY, np.int16)
        self.write_clock = np.zeros(cells, np.int32)
        self.write_step = np.zeros(cells, np.int32)
        self.copy_warp = np.full(cells, NOBODY, np.int16)
        self.copy_step = np.zeros(cells, np.int32)
        self.reads, self.atomics = History(cells, m.warps), History(cells, m.warps)

    # Accesses.

    def shared_read(self, m: Machine, g: Threads, address: np.ndarray, size: int) -> None:
        a = self._access(m, g, "reads", address, size)
        self._check_copies(a)
        self._check_writes(a)
        self._check_history(a, self.atomics, "atomic update")
        self.reads.record(a.cell, a.warp, self.clock[a.cta, a.warp, a.warp], m.at)

    def shared_write(
        self, m: Machine, g: Threads, address: np.ndarray, values: np.ndarray, atomic: bool = False
    ) -> None:
        a = self._access(m, g, "updates" if atomic else "writes", address, values.itemsize * values.shape[1])
        self._check_copies(a)
        self._check_writes(a)
        self._check_history(a, self.reads, "read")
        if atomic:
            self.atomics.record(a.cell, a.warp, self.clock[a.cta, a.warp, a.warp], m.at)
            return
        self._check_history(a, self.atomics, "atomic update")
        self._check_together(a, values)
        self._record_write(a.cell, a.cta, a.warp, m.at)

    def copy_issue(self, m: Machine, g: Threads, copy: Copy) -> None:
        a = self._access(m, g, "copies to", copy.shared, copy.size)
        self._check_copies(a)
        self._check_writes(a)
        self._check_history(a, self.reads, "read")
        self._check_history(a, self.atomics, "atomic update")
        order = np.argsort(a.cell, kind="stable")
        twice = np.flatnonzero(np.diff(a.cell[order]) == 0)
        if len(twice):
            raise a.race(int(order[twice[0] + 1]), "another thread's copy in the same instruction", m.at)
        self.copy_warp[a.cell] = a.warp
        self.copy_step[a.cell] = m.at

    def copy_done(self, m: Machine, copy: Copy) -> None:
        cell, cta, warp = self._cells(copy.cta, copy.thread // 32 // m.ctas, copy.shared, copy.size)
        self.copy_warp[cell] = NOBODY
        self._record_write(cell, cta, warp, self.copy_step[cell])

    # Barriers.

    def barrier_arrive(self, m: Machine, g: Threads, number: np.ndarray) -> None:
        warp, cta = g.warp_at, g.cta_at
        np.maximum.at(self.published, (cta, number), self.clock[cta, warp])
        self.clock[cta, warp, warp] += 1

    def barrier_complete(self, m: Machine, complete: np.ndarray) -> None:
        for entry in m.barriers.waiting:
            warp, cta = np.nonzero(entry.mask.any(axis=2))
            number = entry.number[warp, cta]
            free = complete[cta, number]
            warp, cta, number = warp[free], cta[free], number[free]
            self.clock[cta, warp] = np.maximum(self.clock[cta, warp], self.published[cta, number])
        self.published[complete] = 0

    # Histories.

    def _access(self, m: Machine, g: Threads, verb: str, address: np.ndarray, size: int) -> Access:
        return Access(m, g, verb, address, *self._cells(g.cta, g.warp, address, size))

    def _cells(
        self, cta: np.ndarray, warp: np.ndarray, address: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(cell, cta, warp) of every granule touched, thread by thread."""
        n = size // self.granule
        first = cta * self.count + address // self.granule
        if n == 1:
            return first, cta, warp
        return (first[:, None] + np.arange(n)).reshape(-1), np.repeat(cta, n), np.repeat(warp, n)

    def _record_write(
        self, cell: np.ndarray, cta: np.ndarray, warp: np.ndarray, step: np.ndarray | int
    ) -> None:
        self.write_warp[cell] = warp
        self.write_clock[cell] = self.clock[cta, warp, warp]
        self.write_step[cell] = step

    def _check_copies(self, a: Access) -> None:
        under_way = self.copy_warp[a.cell] != NOBODY
        if np.count_nonzero(under_way):
            k = int(np.flatnonzero(under_way)[0])
            other = f"the copy of warp {int(self.copy_warp[a.cell[k]])} that is still under way there"
            raise a.race(k, other, int(self.copy_step[a.cell[k]]))

    def _check_writes(self, a: Access) -> None:
        writer = self.write_warp[a.cell]
        race = (writer != NOBODY) & (writer != a.warp)
        race &= self.write_clock[a.cell] > self.clock[a.cta, a.warp, writer]
        if np.count_nonzero(race):
            k = int(np.flatnonzero(race)[0])
            raise a.race(k, f"the write of warp {int(writer[k])}", int(self.write_step[a.cell[k]]))

    def _check_history(self, a: Access, history: History, noun: str) -> None:
        if history.clock is None:
            return
        race = history.clock[a.cell] > self.clock[a.cta, a.warp]
        race[np.arange(len(a.cell)), a.warp] = False
        if np.count_nonzero(race):
            k, warp = (int(v[0]) for v in np.nonzero(race))
            raise a.race(k, f"the {noun} of warp {warp}", int(history.step[a.cell[k], warp]))

    def _check_together(self, a: Access, values: np.ndarray) -> None:
        """Two warps writing one place in one step race; lanes of one warp only when their values differ."""
        g, size = a.g, values.itemsize * values.shape[1]
        place = g.cta * (self.count * self.granule) + a.address
        order = np.argsort(place, kind="stable")
        near = place[order]
        clash = np.flatnonzero(near[1:] < near[:-1] + size)
        if not len(clash):
            return
        one, other = order[clash], order[clash + 1]
        same = (near[clash] == near[clash + 1]) & (values[one] == values[other]).all(axis=1)
        race = np.flatnonzero((g.warp[one] != g.warp[other]) | ~same)
        if len(race):
            k, partner = int(other[race[0]]), int(one[race[0]])
            who = f"warp {int(g.warp[partner])}, lane {int(g.lane[partner])}"
            raise a.race(
                k * len(a.cell) // len(a.address), f"the write of {who} in the same instruction", a.m.at
            )
