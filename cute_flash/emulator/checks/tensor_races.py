"""Data races in tensor memory, with the clocks of the race clocks.

A load is a read by its warp. A store is under way until its warp's tcgen05.wait::st; then it is a write by
the warp. A product or a copy reads and writes as the unit of its thread, in the epoch that the thread's next
commit ends: a warp may touch what it touched when it knows that epoch to be over, from the mbarrier that the
commit arrived at. Work of one thread happens in order; work of another thread is ordered behind it once
that thread knows of its issue.

`Options(by_the_book=True)` asks for what PTX asks for beyond that: a load is under way until its warp's
tcgen05.wait::ld; what a warp has done is known to others if tcgen05.fence::before_thread_sync came before its
arrival (a commit implies it); what a warp has heard of is ordered before its own accesses by
tcgen05.fence::after_thread_sync. flash-attn-4's forward kernels for sm_100, right on hardware, have none of
the three, so a kernel without them is not known to be wrong.

`Options(permissive=True)` takes a warp-wide tcgen05.wait for what it is on hardware: the accesses of all its
lanes are over. Who hears of the warp afterwards, from one lane or by a relaxed arrival, knows of them.

State is kept per cell: one column of 16 lanes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..base.errors import DataRace
from ..core.events import Columns, Unit
from ..units.tensor_memory import COLUMNS, LANES
from .meetings import EVERY_LANE
from .race_state import NOBODY, TENSOR, UNDER_WAY

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads
    from .clocks import Clocks

GROUP = 16  # lanes of a cell


class Marks:
    """Per cell who did something last (an agent's number), and the epochs and step in which.

    issue: for a unit's work the epoch of the warp that issued it.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.agent = np.full(shape, NOBODY, np.int16)
        self.warp = np.full(shape, NOBODY, np.int16)
        self.epoch, self.issue, self.step = (np.zeros(shape, np.int32) for _ in range(3))

    def note(self, where: tuple, who: Who, step: int) -> None:
        """`who` did it in these cells."""
        self.agent[where], self.warp[where] = who.agent, who.warp
        self.epoch[where], self.issue[where], self.step[where] = who.epoch, who.issue, step


class Who(NamedTuple):
    """Who accesses tensor memory: agent and epoch; the warp that issues it, its epoch, and the epochs that it
    knows to be over, by agent. ordered: those whose work it knows to be issued.
    """

    agent: int
    epoch: int
    warp: int
    issue: int
    known: np.ndarray
    ordered: np.ndarray
    text: str

    @property
    def is_unit(self) -> bool:
        return self.agent != self.warp


class TensorRaces:
    """The detector's part for tensor memory."""

    def __init__(self, clocks: Clocks, m: Machine):
        self.clocks, self.m = clocks, m
        self.shape = (m.ctas, LANES // GROUP, COLUMNS)
        self.writes, self.under_way = Marks(self.shape), Marks(self.shape)
        self.reads: dict[int, Marks] = {}  # by agent
        self.storing: dict[tuple[int, int], list[tuple]] = {}  # (cta, warp) -> cells of its stores
        self.loading: dict[tuple[int, int], list[tuple]] = {}  # the same of loads
        self.seen: dict[tuple[int, int], np.ndarray] = {}  # (cluster, warp) -> epochs before its last fence
        self.unwaited: set[tuple[int, int]] = set()  # (cta, warp) with loads since its last wait for them

    def access(self, warp: tuple[int, int], columns: Columns, write: bool) -> None:
        """A load or the issue of a store."""
        who, where = self._warp(warp, self.clocks.by_the_book), _cells(columns)
        self.clocks.meetings.touched[self.clocks.one(warp)] = EVERY_LANE
        verb = "stores to" if write else "loads"
        self._check(who, where, f"{verb} {_named(columns)}", write)
        if write:
            self.under_way.note(where, who, self.m.at)
            self.storing.setdefault(warp, []).append(where)
            return
        self.unwaited.add(warp)
        if self.clocks.by_the_book:
            self.loading.setdefault(warp, []).append(where)
            who = who._replace(epoch=UNDER_WAY)
        self._reads(who).note(where, who, self.m.at)

    def loaded(self, g: Threads) -> None:
        """Each warp's loads are done."""
        for warp in zip(g.cta_at.tolist(), g.warp_at.tolist(), strict=True):
            who = self._warp(warp)
            for where in self.loading.pop(warp, ()):
                self._reads(who).epoch[where] = who.epoch
            self.unwaited.discard(warp)
            self._over(warp)

    def _over(self, warp: tuple[int, int]) -> None:
        """A warp has waited: permissive, its accesses are over if none is left to wait for."""
        if self.clocks.permissive and warp not in self.unwaited and warp not in self.storing:
            cluster, number = self.clocks.one(warp)
            self.clocks.fenced[cluster, number, TENSOR, number] = self.clocks.known[cluster, number, number]
            self.clocks.known[cluster, number, number] += 1

    def _waited(self, cluster: int, warp: int, known: np.ndarray) -> np.ndarray:
        """`known` and, permissive, what others have waited for before this warp heard of them."""
        if not self.clocks.permissive:
            return known
        fenced = self.clocks.fenced[cluster, warp, TENSOR]
        return np.concatenate([np.maximum(known[: len(fenced)], fenced), known[len(fenced) :]])

    def fence(self, cluster: int, warp: int) -> None:
        """What a warp knows now is ordered before its accesses from now on."""
        known = self.clocks.known[cluster, warp].copy()
        fenced = self.clocks.fenced[cluster, warp, TENSOR]
        known[: len(fenced)] = np.minimum(known[: len(fenced)], fenced)
        self.seen[cluster, warp] = known

    def _known(self, cluster: int, warp: int, by_the_book: bool) -> np.ndarray:
        """The epochs that order accesses of tensor memory for a warp."""
        clock = self.clocks.known[cluster, warp]
        if not by_the_book:
            return clock
        known = np.zeros_like(clock)
        seen = self.seen.get((cluster, warp), known)
        known[: len(seen)] = seen
        known[warp] = clock[warp]
        return known

    def stored(self, g: Threads) -> None:
        """Each warp's stores are done."""
        for warp in zip(g.cta_at.tolist(), g.warp_at.tolist(), strict=True):
            who = self._warp(warp)
            for where in self.storing.pop(warp, ()):
                self.writes.note(where, who, int(self.under_way.step[where].flat[0]))
                self.under_way.agent[where] = NOBODY
            self._over(warp)

    def work(self, unit: Unit, columns: Columns, write: bool) -> None:
        """A product or a copy is issued."""
        clocks, where = self.clocks, _cells(columns)
        agent = clocks.agent(unit)
        cluster, number = clocks.one((unit.cta, unit.warp))
        issue = int(clocks.known[cluster, number, number])
        text = f"issued by CTA {self.m.cta_name(unit.cta)}, warp {unit.warp}"
        known = self._known(cluster, number, clocks.by_the_book)
        who = Who(agent, unit.epoch, number, issue, self._waited(cluster, number, known), known, text)
        verb = "writes" if write else "reads"
        self._check(who, where, f"a product or copy {verb} {_named(columns)}", write)
        (self.writes if write else self._reads(who)).note(where, who, self.m.at)

    def free(self, warp: tuple[int, int], columns: Columns) -> None:
        """Columns are given back: everything that touched them must be over."""
        where = _cells(columns)
        self._check(self._warp(warp), where, f"deallocates {_named(columns)}", True)
        for marks in (self.writes, self.under_way, *self.reads.values()):
            marks.agent[where] = NOBODY

    def _warp(self, warp: tuple[int, int], by_the_book: bool = False) -> Who:
        cluster, number = self.clocks.one(warp)
        epoch = int(self.clocks.known[cluster, number, number])
        text = f"CTA {self.m.cta_name(warp[0])}, warp {warp[1]}"
        known = self._known(cluster, number, by_the_book)
        return Who(number, epoch, number, epoch, self._waited(cluster, number, known), known, text)

    def _reads(self, who: Who) -> Marks:
        if who.agent not in self.reads:
            self.reads[who.agent] = Marks(self.shape)
        return self.reads[who.agent]

    def _check(self, who: Who, where: tuple, what: str, write: bool) -> None:
        """Raise if somebody's access of these cells is not known to be over."""
        pending = self.under_way.agent[where] != NOBODY
        if pending.any():
            why = "the store that no tcgen05.wait::st has waited for, of"
            raise self._race(who, what, why, self.under_way, where, pending)
        self._check_marks(who, where, what, self.writes, "the write of")
        for agent, marks in self.reads.items() if write else ():
            if agent != who.agent:
                self._check_marks(who, where, what, marks, "the read of")

    def _check_marks(self, who: Who, where: tuple, what: str, marks: Marks, noun: str) -> None:
        agent = marks.agent[where]
        if agent.max() == NOBODY:
            return
        known, epoch = who.known, marks.epoch[where]
        late = (agent != NOBODY) & (agent != who.agent) & (epoch > known[agent])
        if who.is_unit and late.any():
            # Work of the tensor unit follows work that it is ordered behind, finished or not.
            units = agent >= self.clocks.warps
            issuer = marks.warp[where]
            late &= ~(units & ((marks.issue[where] <= who.ordered[issuer]) | (issuer == who.warp)))
        if late.any():
            raise self._race(who, what, noun, marks, where, late)

    def _race(
        self, who: Who, what: str, noun: str, marks: Marks, where: tuple, late: np.ndarray
    ) -> DataRace:
        k = tuple(int(v[0]) for v in np.nonzero(late))
        agent, warp = int(marks.agent[where][k]), int(marks.warp[where][k]) % self.m.warps
        other = f"warp {warp}" if agent < self.clocks.warps else f"work that warp {warp} issued"
        step = self.m.line(int(marks.step[where][k]))
        return DataRace(f"{what} without an order to {noun} {other} ({step}) ({who.text})")


def _cells(columns: Columns) -> tuple:
    lanes = slice(columns.lanes.start // GROUP, -(-columns.lanes.stop // GROUP))
    return columns.cta, lanes, slice(columns.first, columns.first + columns.count)


def _named(columns: Columns) -> str:
    lanes = f"lanes {columns.lanes.start} to {columns.lanes.stop - 1}"
    return f"columns {columns.first} to {columns.first + columns.count - 1}, {lanes} of tensor memory"
