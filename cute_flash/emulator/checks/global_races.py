"""Data races in global memory between all CTAs of a launch, with the clocks of the race detector.

Two accesses of one place conflict where one of them writes, unless both are strong: atomic, or a load or
store that is .relaxed or more, at the scope of the GPU or the system. They race if nothing orders them.
Inside a cluster barriers order them, as in shared memory. Between clusters only a flag does: a strong write
that releases (.release, .acq_rel, or a fence of its thread before it) and a strong read of what it wrote that
acquires (.acquire, .acq_rel, or a fence of its thread after it). What a flag passes on stays with its place
in memory: an atomic update adds to it, a store puts its own there instead. CTAs of different waves are as
unordered as those of one: which ones run together is not the program's choice.

Updates do not conflict, whatever their order: where it decides the bits of a floating-point sum, that is no
error unless it is asked for (ordered_reductions). Then a sum is added to after all that has been added, and
of the lanes of a warp by one at a time.

Threads and units are agents, as for shared memory. What a wave hears of other clusters it keeps in the same
clocks, under agents named ("far", number).

    cp.async            a read of its warp, at issue and until the thread has waited for it
    bulk load           a read in an epoch of the mbarrier that it signals: its phase
    bulk store          a write of its warp's copies, or an update, in an epoch that ends with a wait for its
                        group (not .read)
    ld.nc               a read that lasts as long as the kernel: no order to a write makes it right
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..base.errors import DataRace
from ..core.events import Order, Rows, Unit
from .global_state import Agents, Cells, Chains, Knowledge, Told
from .meetings import Meetings, lanes_of
from .race_state import UNDER_WAY, wider

if TYPE_CHECKING:
    from ..core.events import Barrier, Copy
    from ..core.machine import Machine
    from ..core.state import Threads
    from .clocks import Clocks

WRITES = "bulk writes"  # the units of bulk stores, whose steps are over when memory has been written


class Touch(NamedTuple):
    """One access: what it does in words, and for each of its accessors the address, the cluster of the wave
    and the warp in it, the agent and its epoch; cell (accessors, granules): the places in `cells`.

    fault: makes the error for one accessor.
    """

    verb: str
    address: np.ndarray
    cluster: np.ndarray
    warp: np.ndarray
    agent: np.ndarray
    epoch: np.ndarray
    cells: Cells
    cell: np.ndarray
    fault: Callable[[int, str], DataRace]


class GlobalRaces:
    """The detector's part for global memory: one for all waves of a launch."""

    def __init__(self) -> None:
        self.agents: Agents | None = None
        self.cells: dict[int, Cells] = {}  # by the address of the allocation
        self.chains, self.told = Chains(), Told()

    def begin(self, m: Machine, clocks: Clocks) -> None:
        """Start a wave: what its warps know of others is nothing."""
        self.m, self.clocks = m, clocks
        self.granule = m.code.global_granule
        self.ordered = m.options.ordered_reductions
        if self.agents is None:
            self.agents = Agents(m.unlaunched.total // m.cluster, clocks.warps)
        self.first = m.first // m.cluster  # cluster
        clusters = np.arange(m.ctas // m.cluster)
        self.meetings = Meetings(len(clusters), clocks.warps)
        self.nobody = clocks.number("nobody")
        self.far = np.full(len(self.agents.cluster), self.nobody, np.int32)
        warps = np.arange(clocks.warps)
        self.numbers = self.agents.warp(self.first + clusters[:, None], warps).astype(np.int32)
        self.fences = np.zeros(m.live.shape, np.int32)  # per thread, what it knew at its last fence
        self.heard: dict[tuple[int, int], int] = {}  # (cluster, warp) -> what strong reads found

    # Accesses.

    def read(self, g: Threads, address: np.ndarray, size: int, order: Order) -> None:
        """Threads load."""
        t = self._threads(g, "reads", address, size)
        if t is None:
            return
        if order.lasting:
            t = t._replace(epoch=np.full_like(t.epoch, UNDER_WAY))
        self._read(t, order)
        if order.strong:
            self._hear(t, order)

    def write(self, g: Threads, address: np.ndarray, values: np.ndarray, order: Order) -> None:
        """Threads store, or update."""
        size = values.itemsize * values.shape[1]
        t = self._threads(g, "updates" if order.update else "writes", address, size)
        if t is None:
            return
        if not order.strong:
            self._check_together(g, t, values, size)
        self._write(t, order)
        if order.strong:
            self._tell(g, t, order)
        else:
            t.cells.told[t.cell] = 0

    def copy(self, copy: Copy) -> None:
        """Threads read what they copy to shared memory, or have waited until it was read."""
        m = self.m
        warp, cta, lane = np.unravel_index(copy.thread, m.live.shape)
        np.bitwise_or.at(self.meetings.touched, self.clocks.who(cta, warp), 1 << lane)
        for size in np.unique(copy.filled[copy.filled > 0]).tolist():
            some = np.flatnonzero(copy.filled == size)

            def fault(k: int, text: str, some: np.ndarray = some) -> DataRace:
                k = some[k]
                return DataRace(f"{text} (CTA {m.cta_name(int(cta[k]))}, warp {warp[k]}, lane {lane[k]})")

            who = self.clocks.who(cta[some], warp[some])
            t = self._touch("copies from", copy.source[some], size, *who, fault)
            if t is not None:
                self._read(t, Order())

    def load(self, warp: tuple[int, int], barrier: Barrier, rows: Rows) -> None:
        """A bulk load of (cta, warp) begins."""
        t = self._unit("a copy reads", warp, self.clocks.barrier_agent(barrier), barrier.phase + 1, rows)
        if t is not None:
            self._read(t, Order())

    def store(self, unit: Unit, rows: Rows, order: Order) -> None:
        """A bulk store or reduction begins."""
        agent = self._writes(unit)
        verb = "a copy updates" if order.update else "a copy writes"
        t = self._unit(verb, (unit.cta, unit.warp), agent, unit.epoch, rows)
        if t is not None:
            self._write(t, order)

    def stored(self, warp: tuple[int, int], unit: Unit) -> None:
        """(cta, warp) has waited for a unit's writes."""
        agent = self._writes(unit)
        known = self.clocks.known[self.clocks.one(warp)]
        known[agent] = max(known[agent], unit.epoch)

    def _writes(self, unit: Unit) -> int:
        """What writes a warp's bulk stores. Its lanes may all issue one, the same, where none is elected."""
        return self.clocks.agent(unit._replace(name=WRITES, number=unit.warp))

    def fence(self, g: Threads, acquire: bool, release: bool) -> None:
        """Threads execute a fence of the GPU's scope."""
        for cta, warp, lanes in zip(g.cta_at.tolist(), g.warp_at.tolist(), lanes_of(g).tolist(), strict=True):
            who = self.clocks.one((cta, warp))
            if acquire:
                self._learn(who, self.heard.pop(who, 0))
            if release:
                own = np.array([lane for lane in range(32) if lanes >> lane & 1])
                speaks = np.array([self.meetings.speaks_for_all(*who, 1 << lane) for lane in own.tolist()])
                for said in np.unique(speaks):
                    self.fences[warp, cta, own[speaks == said]] = self._knowledge(who, said)
                self._next(who)

    # What is touched.

    def _threads(self, g: Threads, verb: str, address: np.ndarray, size: int) -> Touch | None:
        self.meetings.touched[self.clocks.who(g.cta_at, g.warp_at)] |= lanes_of(g)
        cluster, warp = self.clocks.who(g.cta, g.warp)
        return self._touch(
            verb, address, size, cluster, warp, lambda k, text: self.m.fault(DataRace, g, k, text)
        )

    def _unit(
        self, verb: str, warp: tuple[int, int], agent: int, epoch: int, rows: Rows
    ) -> Touch | None:
        cluster, number = self.clocks.one(warp)
        many = len(rows.address)
        who = f"(issued by CTA {self.m.cta_name(warp[0])}, warp {warp[1]})"
        t = self._touch(
            verb, rows.address, rows.nbytes, np.full(many, cluster), np.full(many, number),
            lambda k, text: DataRace(f"{text} {who}"),
        )  # fmt: skip
        if t is None:
            return None
        unit = self.agents.unit(self.first + cluster, agent)
        self._name(cluster, agent, unit)
        return t._replace(agent=np.full(many, unit), epoch=np.full(many, epoch, np.int32))

    def _touch(
        self, verb: str, address: np.ndarray, size: int, cluster: np.ndarray, warp: np.ndarray,
        fault: Callable,
    ) -> Touch | None:  # fmt: skip
        """None where a place lies in no allocation, which the access itself will find."""
        if not len(address):
            return None
        region = self.m.memory.find(int(address.min()))
        if region is None or int(address.max()) + size > region.end:
            return None
        if region.start not in self.cells:
            self.cells[region.start] = Cells(-(-len(region.bytes) // self.granule))
        within = address - region.origin
        first = within // self.granule
        count = int(((within + size - 1) // self.granule - first).max()) + 1
        agent = self.agents.warp(self.first + cluster, warp)
        epoch = self.clocks.known[cluster, warp, warp]
        cell = first[:, None] + np.arange(count)
        return Touch(verb, address, cluster, warp, agent, epoch, self.cells[region.start], cell, fault)

    # Order.

    def _name(self, cluster: int | slice, number: int, agent: int) -> None:
        """In the clocks of a cluster, or of all, `number` is an agent's."""
        self.numbers = wider(self.numbers, number + 1)
        self.numbers[cluster, number] = agent
        self.far = np.append(self.far, np.full(len(self.agents.cluster) - len(self.far), self.nobody))

    def _known(self, cluster: np.ndarray, warp: np.ndarray, agents: np.ndarray) -> np.ndarray:
        """The last epoch of each agent that a warp knows to be over."""
        near = self.agents.cluster[agents] == self.first + cluster
        number = np.where(near, self.agents.own[agents], self.far[agents])
        return self.clocks.known[cluster, warp, number]

    def _knowledge(self, who: tuple[int, int], speaks: bool) -> int:
        """What a warp knows, as something to be told. speaks: whether who tells it knows all of its work."""
        cluster, warp = who
        known = self.clocks.known[cluster, warp].copy()
        if not speaks:
            known[warp] = self.meetings.met[who]
        agents = wider(self.numbers, len(known))[cluster, : len(known)]
        held = np.flatnonzero((agents > 0) & (known > 0))
        held = held[np.argsort(agents[held])]
        return self.told.add(Knowledge(agents[held], known[held]))

    def _next(self, who: tuple[int, int]) -> None:
        """What a warp does from now on has not been told."""
        cluster, warp = who
        self.clocks.known[cluster, warp, warp] += 1

    def _learn(self, who: tuple[int, int], told: int) -> None:
        cluster, warp = who
        agents, epochs = self.told.held[told]
        near = self.agents.cluster[agents] == self.first + cluster
        for agent in agents[~near & (self.far[agents] == self.nobody)].tolist():
            number = self.clocks.number("far", agent)
            self._name(slice(None), number, agent)
            self.far[agent] = number
        number = np.where(near, self.agents.own[agents], self.far[agents])
        known = self.clocks.known[cluster, warp]
        known[number] = np.maximum(known[number], epochs)

    def _hear(self, t: Touch, order: Order) -> None:
        """Strong reads find what the writes before them have told."""
        told = t.cells.told[t.cell[:, 0]]
        for k in np.flatnonzero(told).tolist():
            who = int(t.cluster[k]), int(t.warp[k])
            if order.acquire:
                self._learn(who, int(told[k]))
            else:
                self.heard[who] = self.told.join(self.heard.get(who, 0), int(told[k]))

    def _tell(self, g: Threads, t: Touch, order: Order) -> None:
        """Strong writes pass on what their threads know, or knew at their last fence; updates in turn."""
        cell = t.cell[:, 0]
        if order.acquire or order.release:
            self._tell_in_turn(g, t, order)
            return
        new = self.fences[g.index].reshape(-1)
        if not order.update:
            t.cells.told[t.cell] = new[:, None]
            return
        if order.returns:
            self._hear(t, order)
        for k in np.flatnonzero(new).tolist():
            t.cells.told[t.cell[k]] = self.told.join(int(t.cells.told[cell[k]]), int(new[k]))

    def _tell_in_turn(self, g: Threads, t: Touch, order: Order) -> None:
        fences = self.fences[g.index].reshape(-1)
        for k, cell in enumerate(t.cell[:, 0].tolist()):
            who = int(t.cluster[k]), int(t.warp[k])
            old = int(t.cells.told[cell])
            if order.acquire:
                self._learn(who, old)
            elif order.returns:
                self.heard[who] = self.told.join(self.heard.get(who, 0), old)
            new = int(fences[k])
            if order.release:
                same = (t.cluster == who[0]) & (t.warp == who[1]) & (t.cell[:, 0] == cell)
                lanes = int((1 << g.lane[same].astype(np.int64)).sum())
                new = self._knowledge(who, self.meetings.speaks_for_all(*who, lanes))
            t.cells.told[t.cell[k]] = self.told.join(old, new) if order.update else new
        for who in set(zip(t.cluster.tolist(), t.warp.tolist(), strict=True)) if order.release else ():
            self._next(who)

    # Checks.

    def _read(self, t: Touch, order: Order) -> None:
        self._check_writes(t)
        if not order.strong:
            self._check_chain(t, t.cells.updates[t.cell], "update")
        self._record(t, t.cells.reads, order.strong)

    def _write(self, t: Touch, order: Order) -> None:
        self._check_writes(t)
        self._check_chain(t, t.cells.reads[t.cell], "read", order.strong)
        if order.strong:
            if order.sums and self.ordered:
                self._check_sums(t)
            self._record(t, t.cells.updates, True)
            return
        self._check_chain(t, t.cells.updates[t.cell], "update")
        c = t.cells
        c.writer[t.cell], c.written[t.cell] = t.agent[:, None], t.epoch[:, None]
        c.step[t.cell] = self.m.at
        c.reads[t.cell] = c.updates[t.cell] = 0

    def _record(self, t: Touch, chains: np.ndarray, strong: bool) -> None:
        """Add the access to the chains of its places."""
        last = chains[t.cell]
        if (last == last[:, :1]).all():
            last = last[:, :1]
        key = last.astype(np.int64) * len(self.agents.cluster) + t.agent[:, None]
        _, first, back = np.unique(key, return_index=True, return_inverse=True)
        new = [
            self.chains.add(int(last.flat[k]), int(t.agent[k // last.shape[1]]),
                            int(t.epoch[k // last.shape[1]]), strong, self.m.at)
            for k in first.tolist()
        ]  # fmt: skip
        chains[t.cell] = np.array(new, np.int32)[back].reshape(last.shape)

    def _check_writes(self, t: Touch) -> None:
        writer = t.cells.writer[t.cell]
        if not writer.any():
            return
        known = self._known(t.cluster[:, None], t.warp[:, None], writer)
        lasting = t.epoch[:, None] == UNDER_WAY
        other = (writer != t.agent[:, None]) & (t.cells.written[t.cell] > known)
        late = (writer > 0) & (other | lasting)
        if late.any():
            k, n = (int(v[0]) for v in np.nonzero(late))
            raise self._race(t, k, int(writer[k, n]), "write", int(t.cells.step[t.cell[k, n]]))

    def _check_sums(self, t: Touch) -> None:
        """Raise if what is added may come before or after something else. A warp's copies are in no order."""
        order = np.argsort(t.address, kind="stable")
        met = np.flatnonzero(np.diff(t.address[order]) == 0)
        if len(met):
            one, other = int(order[met[0]]), int(order[met[0] + 1])
            raise self._race(t, other, int(t.agent[one]), "update", self.m.at)
        self._check_chain(t, t.cells.updates[t.cell], "update", own=True)

    def _check_chain(
        self, t: Touch, last: np.ndarray, noun: str, plain_only: bool = False, own: bool = False
    ) -> None:
        """Raise if an access of these chains is not known to be over. own: an agent's own ones count, too."""
        if not last.any():
            return
        key = last.astype(np.int64) * len(self.agents.cluster) + t.agent[:, None]
        for at in np.unique(key, return_index=True)[1].tolist():
            k = at // last.shape[1]
            for entry in self.chains.walk(int(last.flat[at])):
                mine = entry.agent == t.agent[k] and entry.epoch != UNDER_WAY and not own
                if mine or plain_only and entry.strong:
                    continue
                if entry.epoch > self._known(t.cluster[k], t.warp[k], entry.agent):
                    raise self._race(t, k, entry.agent, noun, entry.step)

    def _check_together(self, g: Threads, t: Touch, values: np.ndarray, size: int) -> None:
        """Two warps writing one place in one step race; lanes of one warp only when their values differ."""
        order = np.argsort(t.address, kind="stable")
        near = t.address[order]
        clash = np.flatnonzero(near[1:] < near[:-1] + size)
        if not len(clash):
            return
        one, other = order[clash], order[clash + 1]
        same = (near[clash] == near[clash + 1]) & (values[one] == values[other]).all(axis=1)
        race = np.flatnonzero((t.agent[one] != t.agent[other]) | ~same)
        if len(race):
            raise self._race(t, int(other[race[0]]), int(t.agent[one[race[0]]]), "write", self.m.at)

    def _race(self, t: Touch, k: int, agent: int, noun: str, step: int) -> DataRace:
        region = self.m.memory.find(int(t.address[k]))
        where = f"{region.name} {int(t.address[k]) - region.start:#x} in global memory"
        other = f"the {noun} of {self._named(agent)} ({self.m.line(step)})"
        return t.fault(k, f"{t.verb} {where} without an order to {other}")

    def _named(self, agent: int) -> str:
        m, cluster, own = self.m, int(self.agents.cluster[agent]), int(self.agents.own[agent])
        if own >= self.clocks.warps:
            return f"a bulk copy of CTA {self._cta(cluster * m.cluster)}"
        return f"CTA {self._cta(cluster * m.cluster + own // m.warps)}, warp {own % m.warps}"

    def _cta(self, number: int) -> str:
        x, y, z = (int(v[0]) for v in self.m.coordinates(np.array([number])))
        return f"({x}, {y}, {z})"
