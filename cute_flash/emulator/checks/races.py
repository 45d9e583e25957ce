"""Data races in shared memory, by vector clocks; those in tensor and global memory are files of their own.

The agents are the warps of a cluster, its mbarriers, and the units that copy and multiply on their own. Each
works in epochs. clock[cluster, warp, agent] is the last epoch of an agent that a warp knows to be over. A
barrier passes knowledge on: from who arrives to who leaves. An access races with an earlier one of another
agent whose epoch the accessing warp does not know, unless both only read or both are atomic. Of a warp some
of whose lanes arrive, others learn what those lanes know (meetings.py).

    cp.async            a write of its thread's warp, under way until the thread waits for it; where an
                        mbarrier tracks it, a write of the warp's copies, in an epoch that the arrival ends
    bulk load           a write in an epoch of the mbarrier that it signals: its phase
    store, product      a read by a unit, in an epoch that ends with the wait for its group

Generic and asynchronous accesses are different proxies. A generic write is ordered before an asynchronous
access by a proxy fence of a warp that knows of the write; fenced[cluster, warp, PROXY, writer] are the epochs
that a warp knows to be so ordered, and fenced[..., TENSOR, writer] those in which the writer's accesses of
tensor memory lie before its tcgen05.fence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import DataRace
from ..core.events import Columns, Order, Rows, Span, Unit
from ..core.memory import RANK_SHIFT
from ..core.observe import Observer
from ..units.cluster import ClusterBarriers
from ..units.sync import NamedBarriers
from .clocks import Clocks
from .global_races import GlobalRaces
from .meetings import EVERY_LANE, lanes_of
from .race_state import NOBODY, PROXY, TENSOR, Access, History, Released, UnitAccess, Word, wider
from .tensor_races import TensorRaces

if TYPE_CHECKING:
    from ..core.events import Barrier, Copy
    from ..core.machine import Machine
    from ..core.state import Threads


class RaceDetector(Observer):
    """Raises DataRace at the second of two conflicting accesses.

    State is kept per cell: the granules of every CTA, each as wide as the program's narrowest shared access.
    """

    def __init__(self) -> None:
        self.everywhere = GlobalRaces()

    def begin(self, m: Machine) -> None:
        """Start a wave with empty histories, but of global memory."""
        self.m = m
        self.granule = m.code.shared_granule
        self.count = m.shared.stride // self.granule
        self.cells = m.ctas * self.count
        self.clocks = Clocks(m)
        self.named: dict[tuple[int, int], Released] = {}
        self.leaving: dict[int, list[Released]] = {}
        self.words: dict[tuple[int, int], Word] = {}
        self.writer = np.full(self.cells, NOBODY, np.int16)
        self.written = np.zeros(self.cells, np.int32)
        self.write_step = np.zeros(self.cells, np.int32)
        self.copier = np.full(self.cells, NOBODY, np.int16)
        self.copy_step = np.zeros(self.cells, np.int32)
        self.reads: dict[int, History] = {}
        self.atomics: dict[int, History] = {}
        self.closed: dict[Unit, Released] = {}
        self.tensor = TensorRaces(self.clocks, m)
        self.everywhere.begin(m, self.clocks)

    # Accesses of threads.

    def shared_read(self, m: Machine, g: Threads, address: np.ndarray, size: int) -> None:
        a = self._access(g, "reads", address, size)
        self._check_copies(a)
        self._check_writes(a)
        self._check_history(a, self.atomics, "atomic update")
        self._record(self.reads, a)

    def shared_write(
        self, m: Machine, g: Threads, address: np.ndarray, values: np.ndarray, atomic: bool = False
    ) -> None:
        a = self._access(g, "updates" if atomic else "writes", address, values.itemsize * values.shape[1])
        self._check_copies(a)
        self._check_writes(a)
        self._check_history(a, self.reads, "read")
        if atomic:
            self._record(self.atomics, a)
            return
        self._check_history(a, self.atomics, "atomic update")
        self._check_together(a, values)
        self._record_write(a.cell, a.cluster, a.warp, m.at)

    def global_read(self, m: Machine, g: Threads, address: np.ndarray, size: int, order: Order) -> None:
        self.everywhere.read(g, address, size, order)

    def global_write(
        self, m: Machine, g: Threads, address: np.ndarray, values: np.ndarray, order: Order
    ) -> None:
        self.everywhere.write(g, address, values, order)

    def global_fence(self, m: Machine, g: Threads, acquire: bool, release: bool) -> None:
        self.everywhere.fence(g, acquire, release)

    def bulk_read(self, m: Machine, warp: tuple[int, int], barrier: Barrier, rows: Rows) -> None:
        self.everywhere.load(warp, barrier, rows)

    def bulk_write(self, m: Machine, unit: Unit, rows: Rows, order: Order) -> None:
        self.everywhere.store(unit, rows, order)

    def bulk_written(self, m: Machine, warp: tuple[int, int], unit: Unit) -> None:
        self.everywhere.stored(warp, unit)

    def copy_issue(self, m: Machine, g: Threads, copy: Copy) -> None:
        self.everywhere.copy(copy)
        address = copy.shared | m.rank[copy.cta] << RANK_SHIFT
        a = self._access(g, "copies to", address, copy.size)
        self._check_copies(a)
        self._check_writes(a)
        self._check_history(a, self.reads, "read")
        self._check_history(a, self.atomics, "atomic update")
        order = np.argsort(a.cell, kind="stable")
        twice = np.flatnonzero(np.diff(a.cell[order]) == 0)
        if len(twice):
            raise a.race(int(order[twice[0] + 1]), "another thread's copy in the same instruction", m.at)
        self.copier[a.cell] = a.warp
        self.copy_step[a.cell] = m.at

    def copy_done(self, m: Machine, copy: Copy) -> None:
        self.everywhere.copy(copy)
        cell, n = self._cells(copy.cta, copy.shared, copy.size)
        cta, warp = np.repeat(copy.cta, n), np.repeat(copy.thread // 32 // m.ctas, n)
        self.copier[cell] = NOBODY
        self._record_write(cell, *self.clocks.who(cta, warp), self.copy_step[cell])

    def copy_tracked(self, m: Machine, unit: Unit, copy: Copy) -> None:
        cell, _ = self._cells(copy.cta, copy.shared, copy.size)
        agent = self.clocks.copies((unit.cta, unit.warp))
        self.copier[cell] = NOBODY
        self.writer[cell], self.written[cell] = agent, unit.epoch
        self.write_step[cell] = self.copy_step[cell]

    # Accesses of units.

    def async_read(self, m: Machine, unit: Unit, cta: int, address: np.ndarray, size: int) -> None:
        cell, _ = self._cells(np.full(len(address), cta), address, size)
        a = self._unit_access("a copy or product reads", (unit.cta, unit.warp), cta, cell)
        self._check_copies(a)
        self._check_writes(a)
        self._check_history(a, self.atomics, "atomic update")
        self._check_proxy(a)
        agent = self.clocks.agent(unit)
        self._history(self.reads, agent).record(cell, unit.epoch, m.at)

    def async_write(self, m: Machine, warp: tuple[int, int], barrier: Barrier, span: Span) -> None:
        address = np.arange(span.address, span.address + span.size, self.granule)
        cell = span.cta * self.count + address // self.granule
        a = self._unit_access("a copy writes", warp, span.cta, cell)
        self._check_copies(a)
        self._check_writes(a)
        self._check_history(a, self.reads, "read")
        self._check_history(a, self.atomics, "atomic update")
        self._check_proxy(a)
        self.writer[cell] = self.clocks.barrier_agent(barrier)
        self.written[cell] = barrier.phase + 1
        self.write_step[cell] = m.at

    def unit_done(self, m: Machine, warp: tuple[int, int], unit: Unit) -> None:
        cluster, number = self.clocks.one(warp)
        agent = self.clocks.agent(unit)
        self.clocks.known[cluster, number, agent] = max(self.clocks.known[cluster, number, agent], unit.epoch)

    def unit_commit(self, m: Machine, unit: Unit) -> None:
        cluster, number = self.clocks.one((unit.cta, unit.warp))
        agent = self.clocks.agent(unit)
        known = self.clocks.known[cluster, number].copy()
        known[number] -= 1
        known[agent] = unit.epoch
        fenced = self.clocks.fenced[cluster, number].copy()
        fenced[TENSOR, number] = known[number]
        self.closed[unit] = Released(known, fenced)

    def tensor_access(self, m: Machine, warp: tuple[int, int], columns: Columns, write: bool) -> None:
        self.tensor.access(warp, columns, write)

    def tensor_stored(self, m: Machine, g: Threads) -> None:
        self.tensor.stored(g)

    def tensor_loaded(self, m: Machine, g: Threads) -> None:
        self.tensor.loaded(g)

    def tensor_fence(self, m: Machine, g: Threads, before: bool) -> None:
        for warp in zip(g.cta_at.tolist(), g.warp_at.tolist(), strict=True):
            cluster, number = self.clocks.one(warp)
            if before:
                own = self.clocks.known[cluster, number]
                self.clocks.fenced[cluster, number, TENSOR, number] = own[number]
                own[number] += 1
            else:
                self.tensor.fence(cluster, number)

    def tensor_work(self, m: Machine, unit: Unit, columns: Columns, write: bool) -> None:
        self.tensor.work(unit, columns, write)

    def tensor_free(self, m: Machine, warp: tuple[int, int], columns: Columns) -> None:
        self.tensor.free(warp, columns)

    def proxy_fence(self, m: Machine, g: Threads, barriers_only: bool) -> None:
        cluster, warp = self.clocks.who(g.cta_at, g.warp_at)
        made_by = set(zip(cluster.tolist(), warp.tolist(), strict=True))
        for (cta, _), word in self.words.items():
            if (cta // m.cluster, word.warp) in made_by:
                word.fenced = True
        if barriers_only:
            return
        known = self.clocks.known[cluster, warp][:, : self.clocks.generic]
        self.clocks.fenced[cluster, warp, PROXY] = np.maximum(self.clocks.fenced[cluster, warp, PROXY], known)
        self.clocks.known[cluster, warp, warp] += 1

    # Barriers.

    def barrier_arrive(self, m: Machine, g: Threads, number: np.ndarray) -> None:
        for cta, warp, n in zip(g.cta_at.tolist(), g.warp_at.tolist(), number.tolist(), strict=True):
            into = self.named.setdefault((cta, n), self._nothing())
            self._publish((cta, warp), into)

    def barrier_complete(self, m: Machine, complete: np.ndarray) -> None:
        for entry in m.part(NamedBarriers).waiting:
            warp, cta = np.nonzero(entry.mask.any(axis=2))
            number = entry.number[warp, cta]
            free = complete[cta, number]
            for w, c, n in zip(warp[free].tolist(), cta[free].tolist(), number[free].tolist(), strict=True):
                self._learn((c, w), self.named[c, n])
                self._meet((c, w))
        for cta, number in zip(*np.nonzero(complete), strict=True):
            self.named.pop((int(cta), int(number)), None)

    def warp_meet(self, m: Machine, g: Threads) -> None:
        for cta, warp, lanes in zip(g.cta_at.tolist(), g.warp_at.tolist(), lanes_of(g).tolist(), strict=True):
            self._meet((cta, warp), lanes)

    def cluster_arrive(self, m: Machine, g: Threads, release: bool) -> None:
        for cta, warp in zip(g.cta_at.tolist(), g.warp_at.tolist(), strict=True):
            cluster = cta // m.cluster
            rounds = self.leaving.setdefault(cluster, [])
            while len(rounds) <= int(m.part(ClusterBarriers).phase[cluster]):
                rounds.append(self._nothing())
            if release:
                self._publish((cta, warp), rounds[-1])
            else:
                self._publish_barriers((cta, warp))

    def cluster_wait(self, m: Machine, g: Threads) -> None:
        for cta, warp in zip(g.cta_at.tolist(), g.warp_at.tolist(), strict=True):
            due = int(m.part(ClusterBarriers).due[warp, cta])
            self._learn((cta, warp), self.leaving[cta // m.cluster][due])
            self._meet((cta, warp))

    def mbarrier_init(self, m: Machine, warp: tuple[int, int], barrier: Barrier) -> None:
        cluster, number = self.clocks.one(warp)
        epoch = int(self.clocks.known[cluster, number, number])
        word = Word(number, epoch, m.at, False, self._nothing(), self._nothing())
        self.words[barrier.cta, barrier.address] = word

    def mbarrier_use(self, m: Machine, warp: tuple[int, int], barrier: Barrier, by_unit: bool) -> None:
        word = self.words[barrier.cta, barrier.address]
        cluster, number = self.clocks.one(warp)
        who = f"(CTA {m.cta_name(warp[0])}, warp {warp[1]})"
        made = f"its initialisation by warp {word.warp % m.warps} ({m.line(word.step)}) {who}"
        if number != word.warp and self.clocks.known[cluster, number, word.warp] < word.epoch:
            raise DataRace(f"uses {barrier!r} without an order to {made}")
        if by_unit and not word.fenced:
            raise DataRace(f"lets a copy or product signal {barrier!r} without a fence after {made}")

    def mbarrier_arrive(self, m: Machine, warp: tuple[int, int], barrier: Barrier, lanes: int) -> None:
        self._publish(warp, self.words[barrier.cta, barrier.address].arriving, lanes)

    def mbarrier_arrive_relaxed(self, m: Machine, warp: tuple[int, int], barrier: Barrier) -> None:
        if self.clocks.permissive:
            # What the warp has waited for in tensor memory is over, whatever an arrival releases.
            fenced = self.clocks.fenced[self.clocks.one(warp)].copy()
            fenced[PROXY] = 0
            self.words[barrier.cta, barrier.address].arriving.join(np.zeros(0, np.int32), fenced)

    def unit_arrive(self, m: Machine, unit: Unit, barrier: Barrier) -> None:
        into = self.words[barrier.cta, barrier.address].arriving
        closed = self._copied(unit) if unit.name == "copies" else self.closed[unit]
        into.clock = wider(into.clock, self.clocks.known.shape[2])
        into.join(closed.clock, closed.fenced)

    def mbarrier_complete(self, m: Machine, barrier: Barrier) -> None:
        word = self.words[barrier.cta, barrier.address]
        word.released, word.arriving = word.arriving, self._nothing()

    def mbarrier_wait(self, m: Machine, warp: tuple[int, int], barrier: Barrier) -> None:
        self._learn(warp, self.words[barrier.cta, barrier.address].released)
        cluster, number = self.clocks.one(warp)
        agent = self.clocks.barrier_agent(barrier)
        known = self.clocks.known[cluster, number]
        known[agent] = max(known[agent], barrier.phase)

    # Knowledge.

    def _copied(self, unit: Unit) -> Released:
        """What the end of a warp's tracked copies teaches: nothing but that."""
        released = self._nothing()
        released.clock[self.clocks.copies((unit.cta, unit.warp))] = unit.epoch
        return released

    def _meet(self, warp: tuple[int, int], lanes: int = EVERY_LANE) -> None:
        for meetings in (self.clocks.meetings, self.everywhere.meetings):
            meetings.meet(self.clocks.known, *self.clocks.one(warp), lanes)

    def _nothing(self) -> Released:
        agents, generic = self.clocks.known.shape[2], self.clocks.generic
        return Released(np.zeros(agents, np.int32), np.zeros((2, generic), np.int32))

    def _publish(self, warp: tuple[int, int], into: Released, lanes: int = EVERY_LANE) -> None:
        """A warp's knowledge joins a barrier's; its next epoch begins."""
        cluster, number = self.clocks.one(warp)
        into.clock = wider(into.clock, self.clocks.known.shape[2])
        known = self.clocks.known[cluster, number]
        if not self.clocks.meetings.speaks_for_all(cluster, number, lanes):
            known = known.copy()
            known[number] = self.clocks.meetings.met[cluster, number]
        into.join(known, self.clocks.fenced[cluster, number])
        self.clocks.known[cluster, number, number] += 1

    def _publish_barriers(self, warp: tuple[int, int]) -> None:
        """A relaxed arrival passes on only what fence.mbarrier_init has made visible to the cluster."""
        cluster, number = self.clocks.one(warp)
        for (cta, _), word in self.words.items():
            if word.fenced and word.warp == number and cta // self.m.cluster == cluster:
                word.epoch = 0

    def _learn(self, warp: tuple[int, int], released: Released) -> None:
        cluster, number = self.clocks.one(warp)
        mine = self.clocks.known[cluster, number]
        np.maximum(mine[: len(released.clock)], released.clock, out=mine[: len(released.clock)])
        fenced = self.clocks.fenced[cluster, number]
        np.maximum(fenced, released.fenced, out=fenced)

    # Histories.

    def _cells(self, cta: np.ndarray, address: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """The granules touched, access by access, and how many each touches."""
        n = max(1, size // self.granule)
        first = cta * self.count + address // self.granule
        return (first if n == 1 else (first[:, None] + np.arange(n)).reshape(-1)), n

    def _access(self, g: Threads, verb: str, address: np.ndarray, size: int) -> Access:
        owner, local = self.m.place(g, address, True)
        cell, n = self._cells(owner, local, size)
        self.clocks.meetings.touched[self.clocks.who(g.cta_at, g.warp_at)] |= lanes_of(g)
        cluster, warp = self.clocks.who(g.cta, g.warp)
        if n > 1:
            cluster, warp = np.repeat(cluster, n), np.repeat(warp, n)
        return Access(self.m, g, verb, address, cell, cluster, warp)

    def _unit_access(self, verb: str, warp: tuple[int, int], cta: int, cell: np.ndarray) -> UnitAccess:
        cluster, number = self.clocks.one(warp)
        base = cta * self.m.shared.stride
        return UnitAccess(
            self.m, verb, base, cell, np.full(1, cluster), np.full(1, number), self.granule
        )

    def _history(self, histories: dict[int, History], agent: int) -> History:
        if agent not in histories:
            histories[agent] = History(self.cells)
        return histories[agent]

    def _record(self, histories: dict[int, History], a: Access) -> None:
        epoch = self.clocks.known[a.cluster, a.warp, a.warp]
        for warp in np.unique(a.warp):
            own = a.warp == warp
            self._history(histories, int(warp)).record(a.cell[own], epoch[own], self.m.at)

    def _record_write(
        self, cell: np.ndarray, cluster: np.ndarray, warp: np.ndarray, step: np.ndarray | int
    ) -> None:
        self.writer[cell] = warp
        self.written[cell] = self.clocks.known[cluster, warp, warp]
        self.write_step[cell] = step

    # Checks.

    def _check_copies(self, a: Access | UnitAccess) -> None:
        under_way = self.copier[a.cell] != NOBODY
        if np.count_nonzero(under_way):
            k = int(np.flatnonzero(under_way)[0])
            warp = int(self.copier[a.cell[k]]) % self.m.warps
            other = f"the copy of warp {warp} that is still under way there"
            raise a.race(k, other, int(self.copy_step[a.cell[k]]))

    def _check_writes(self, a: Access | UnitAccess) -> None:
        writer = self.writer[a.cell]
        race = (writer != NOBODY) & (writer != a.warp)
        race &= self.written[a.cell] > self.clocks.known[a.cluster, a.warp, writer]
        if np.count_nonzero(race):
            k = int(np.flatnonzero(race)[0])
            raise a.race(k, self._named(int(writer[k]), "write"), int(self.write_step[a.cell[k]]))

    def _check_history(self, a: Access | UnitAccess, histories: dict[int, History], noun: str) -> None:
        for agent, history in histories.items():
            race = history.epoch[a.cell] > self.clocks.known[a.cluster, a.warp, agent]
            if agent < self.clocks.warps:
                race &= a.warp != agent
            if np.count_nonzero(race):
                k = int(np.flatnonzero(race)[0])
                raise a.race(k, self._named(agent, noun), int(history.step[a.cell[k]]))

    def _check_proxy(self, a: UnitAccess) -> None:
        """A generic write before an asynchronous access needs a proxy fence between."""
        writer = self.writer[a.cell]
        generic = (writer != NOBODY) & (writer < self.clocks.generic)
        if not np.count_nonzero(generic):
            return
        k = np.flatnonzero(generic)
        late = self.written[a.cell[k]] > self.clocks.fenced[a.cluster, a.warp, PROXY, writer[k]]
        if np.count_nonzero(late):
            first = int(k[np.flatnonzero(late)[0]])
            other = f"{self._named(int(writer[first]), 'write')}: no fence.proxy.async between"
            raise a.race(first, other, int(self.write_step[a.cell[first]]))

    def _named(self, agent: int, noun: str) -> str:
        if agent < self.clocks.warps:
            return f"the {noun} of warp {agent % self.m.warps}"
        if agent < self.clocks.generic:
            return f"the copy of warp {agent % self.m.warps} that an mbarrier tracks"
        name = self.clocks.agents.names[agent]
        if name[0] == "barrier":
            return f"the {noun} of a copy that signals mbarrier {name[2]:#x}"
        return f"the {noun} of {name[0]} {name[2]}, which nobody has waited for"

    def _check_together(self, a: Access, values: np.ndarray) -> None:
        """Two warps writing one place in one step race; lanes of one warp only when their values differ."""
        g, size = a.g, values.itemsize * values.shape[1]
        owner, local = self.m.place(g, a.address, True)
        place = owner * (self.count * self.granule) + local
        order = np.argsort(place, kind="stable")
        near = place[order]
        clash = np.flatnonzero(near[1:] < near[:-1] + size)
        if not len(clash):
            return
        one, other = order[clash], order[clash + 1]
        same = (near[clash] == near[clash + 1]) & (values[one] == values[other]).all(axis=1)
        race = np.flatnonzero((g.warp[one] != g.warp[other]) | (g.cta[one] != g.cta[other]) | ~same)
        if len(race):
            k, partner = int(other[race[0]]), int(one[race[0]])
            who = f"warp {int(g.warp[partner])}, lane {int(g.lane[partner])}"
            raise a.race(
                k * len(a.cell) // len(a.address), f"the write of {who} in the same instruction", a.m.at
            )
