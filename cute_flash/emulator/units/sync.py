"""Named barriers and cp.async groups of one wave.

Named barrier, per CTA and number: a warp arrives when all its live lanes execute the instruction, and
counts as 32 threads, each time anew: hardware counts arrivals and does not know whose they are. When the
expected count is there, everyone who waits goes on and the barrier starts its next phase. A barrier without a
count expects every warp of the CTA that has not exited; one with a count gets no help from warps that exit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import BarrierError
from ..core.engine import Engine, Operation
from ..core.events import Barrier, Copy, Unit
from ..core.machine import Machine, Part
from ..core.memory import POISON
from ..core.state import LANES
from .mbarrier import MBarriers

if TYPE_CHECKING:
    from ..core.state import Threads
    from ..ptx.parse import Instruction

NUMBERS = 16
# A barrier phase is used by sync and arrive, or by red: PTX forbids a mixture.
PLAIN, REDUCTION = 1, 2


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a barrier instruction asks for: number and count per warp of its set, whether to wait, and for a
    reduction the predicate per warp and lane and what to do with the totals (true threads, threads) per
    warp at release.
    """

    number: np.ndarray
    count: np.ndarray | None
    wait: bool
    holds: np.ndarray | None = None
    on_release: Callable | None = None


@dataclass(frozen=True, slots=True)
class Waiting:
    """Threads parked at a barrier; number is that of the barrier per (warp, cta), -1 where nobody waits."""

    here: int
    mask: np.ndarray  # bool (warps, ctas, 32)
    number: np.ndarray  # int (warps, ctas)
    on_release: Callable | None


class NamedBarriers(Part):
    """The 16 barriers of every CTA of a wave. Arrays are (ctas, NUMBERS[, warps])."""

    def __init__(self, m: Machine):
        super().__init__(m)
        shape = (m.ctas, NUMBERS)
        self.expected = np.zeros(shape, np.int64)  # threads; 0 while nobody has arrived
        self.everyone = np.zeros(shape, bool)  # no count was given
        self.use = np.zeros(shape, np.int8)
        self.present = np.zeros((*shape, m.warps), np.int64)  # arrivals of each warp in this phase
        self.holding = np.zeros((*shape, 2), np.int64)  # threads whose predicate holds, threads
        self.waiting: list[Waiting] = []

    def arrive(self, g: Threads, here: int, arrival: Arrival) -> list[tuple[int, Threads]]:
        """The warps of `g`, each with all its live lanes, arrive.

        Returns the sets that go on: `g` itself unless it waits, and everyone whose barrier is now complete.
        """
        m = self.machine
        warp, cta, number = g.warp_at, g.cta_at, arrival.number
        self._check_form(g, arrival)
        if g.warps > 1 and self._too_many(g, arrival):
            # Some would complete a phase that the others are not part of: they arrive warp by warp.
            parts = (warp == w for w in np.unique(warp))
            return [set_ for part in parts for set_ in self._arrive_part(g, here, arrival, part)]
        self._join(g, arrival)
        if m.watch is not None:
            m.watch.barrier_arrive(m, g, number)
        self.present[cta, number, warp] += 1
        if arrival.holds is not None:
            lanes = g.mask[warp, cta]
            totals = np.stack([(arrival.holds & lanes).sum(axis=1), lanes.sum(axis=1)], axis=1)
            np.add.at(self.holding, (cta, number), totals)
        going: list[tuple[int, Threads]] = []
        if arrival.wait:
            numbers = np.full((m.warps, m.ctas), -1)
            numbers[warp, cta] = number
            self.waiting.append(Waiting(here, g.mask, numbers, arrival.on_release))
        else:
            going.append((here + 1, g))
        return going + self.release()

    def _arrive_part(
        self, g: Threads, here: int, arrival: Arrival, part: np.ndarray
    ) -> list[tuple[int, Threads]]:
        mask = np.zeros_like(g.mask)
        mask[g.warp_at[part], g.cta_at[part]] = g.mask[g.warp_at[part], g.cta_at[part]]
        count = None if arrival.count is None else arrival.count[part]
        holds = None if arrival.holds is None else arrival.holds[part]
        smaller = replace(arrival, number=arrival.number[part], count=count, holds=holds)
        return self.arrive(self.machine.sets.of(mask), here, smaller)

    def _too_many(self, g: Threads, arrival: Arrival) -> bool:
        """Whether a barrier with a count gets more warps from this set than its phase still lacks."""
        if arrival.count is None:
            return False
        joining = self.present.sum(axis=2)
        np.add.at(joining, (g.cta_at, arrival.number), 1)
        return bool((joining[g.cta_at, arrival.number] * LANES > arrival.count).any())

    def _check_form(self, g: Threads, arrival: Arrival) -> None:
        m, number = self.machine, arrival.number
        if ((number < 0) | (number >= NUMBERS)).any():
            k = int(np.flatnonzero((number < 0) | (number >= NUMBERS))[0])
            raise m.warp_fault(
                BarrierError, g, k, f"barrier {int(number[k])} is not one of 0 to {NUMBERS - 1}"
            )
        count = arrival.count
        if count is None:
            return
        wrong = (count % LANES != 0) | (count <= 0) | (count > m.warps * LANES)
        if wrong.any():
            k = int(np.flatnonzero(wrong)[0])
            allowed = f"a multiple of {LANES} from {LANES} to {m.warps * LANES}"
            raise m.warp_fault(BarrierError, g, k, f"barrier count {int(count[k])} is not {allowed}")

    def _join(self, g: Threads, arrival: Arrival) -> None:
        """Check that the warps of `g` fit into their barriers' phases; begin those they are first in."""
        m = self.machine
        cta, number = g.cta_at, arrival.number
        everyone = arrival.count is None
        count = np.full(g.warps, m.warps * LANES) if everyone else arrival.count
        use = PLAIN if arrival.holds is None else REDUCTION
        # Where several are first together with different counts, the last one written stays: the others fail.
        fresh = self.expected[cta, number] == 0
        self.expected[cta[fresh], number[fresh]] = count[fresh]
        self.everyone[cta[fresh], number[fresh]] = everyone
        self.use[cta[fresh], number[fresh]] = use
        other = self.expected[cta, number] != count
        if other.any():
            k = int(np.flatnonzero(other)[0])
            have = int(self.expected[cta[k], number[k]])
            text = f"barrier {int(number[k])} expects {have} threads in this phase, not {int(count[k])}"
            raise m.warp_fault(BarrierError, g, k, text)
        mixed = self.use[cta, number] != use
        if mixed.any():
            k = int(np.flatnonzero(mixed)[0])
            text = f"barrier {int(number[k])} is used by a reduction and by sync or arrive in one phase"
            raise m.warp_fault(BarrierError, g, k, text)

    def arrived(self) -> np.ndarray:
        """Threads that have arrived, with those of exited warps where no count was given: (ctas, NUMBERS)."""
        threads = self.present.sum(axis=2) * LANES
        if self.everyone.any():
            gone = ~self.machine.live.any(axis=2).T  # (ctas, warps)
            missing = (gone[:, None, :] & (self.present == 0)).sum(axis=2) * LANES
            threads = threads + np.where(self.everyone, missing, 0)
        return threads

    def release(self) -> list[tuple[int, Threads]]:
        """Complete every barrier that has its count; returns the sets that go on."""
        complete = (self.expected > 0) & (self.arrived() >= self.expected)
        if not complete.any():
            return []
        m = self.machine
        m.progress += 1
        if m.watch is not None:
            m.watch.barrier_complete(m, complete & (self.expected > 0))
        remaining, going = [], []
        for entry in self.waiting:
            free = (entry.number >= 0) & complete[np.arange(m.ctas), entry.number]
            released = entry.mask & free[:, :, None]
            if not released.any():
                remaining.append(entry)
                continue
            threads = m.sets.of(released)
            if entry.on_release is not None:
                number = entry.number[threads.warp_at, threads.cta_at]
                entry.on_release(m, threads, self.holding[threads.cta_at, number])
            going.append((entry.here + 1, threads))
            rest = entry.mask & ~free[:, :, None]
            if rest.any():
                remaining.append(replace(entry, mask=rest))
        self.waiting = remaining
        self.expected[complete] = 0
        self.everyone[complete] = False
        self.present[complete] = 0
        self.holding[complete] = 0
        return going

    def exited(self) -> list[tuple[int, Threads]]:
        return self.release() if self.waiting else []

    def describe(self) -> list[str]:
        """One line per CTA and barrier that warps wait at, for the deadlock message."""
        m = self.machine
        arrived = self.arrived()
        lines = []
        for entry in self.waiting:
            warps: dict[tuple[int, int], list[int]] = {}
            for warp, cta in zip(*np.nonzero(entry.mask.any(axis=2)), strict=True):
                warps.setdefault((int(cta), int(entry.number[warp, cta])), []).append(int(warp))
            lines += [
                f"CTA {m.cta_name(cta)} warps {names} wait at barrier {number} "
                f"({int(arrived[cta, number])} of {int(self.expected[cta, number])} threads arrived), "
                f"{m.line(entry.here)}"
                for (cta, number), names in warps.items()
            ]
        return lines


@dataclass(eq=False)
class TrackedCopies(Operation):
    """Arrivals at mbarriers that follow the copies that the threads of one warp have issued before.

    lanes: numbers of the threads in the wave; barriers: where each arrives.
    """

    unit: Unit
    lanes: np.ndarray
    barriers: list[Barrier]
    where: Instruction

    kind = "copy"

    def land(self, m: Machine) -> None:
        m.part(AsyncCopies).complete(self)
        for barrier in self.barriers:
            if m.watch is not None:
                m.watch.unit_arrive(m, self.unit, barrier)
            m.part(MBarriers).arrive(barrier, 1, None)


class AsyncCopies(Part):
    """cp.async copies, which wait in groups that every thread commits for itself, or that mbarriers track.

    Eager copies land at issue. Late ones read global memory and land when a wait forces them; until then
    their destination holds poison. Random ones land at issue, at a wait or at any scheduling point between.
    """

    def __init__(self, m: Machine):
        super().__init__(m)
        self.committed = np.zeros(m.warps * m.ctas * LANES, np.int64)
        self.arrivals = np.zeros((m.warps, m.ctas), np.int64)  # that have been asked for, per warp
        self.pending: list[Copy] = []

    def issue(self, g: Threads, copy: Copy) -> None:
        """Start a copy; bounds and alignment are checked now, whenever the data moves."""
        m = self.machine
        copy.group = self.committed[copy.thread]
        at = m.shared.position(m, g, copy.cta, copy.shared, copy.size)
        m.memory.check(m, g, copy.source, copy.filled, copy.size)
        if m.watch is not None:
            m.watch.copy_issue(m, g, copy)
        if m.lands_at_issue("copy"):
            self.land(copy)
        else:
            m.shared.bytes.reshape(-1, copy.size)[at] = POISON
            m.shared.mark(at, copy.size)
        if not copy.landed or m.watch is not None:
            self.pending.append(copy)

    def land(self, copy: Copy) -> None:
        """Move the bytes."""
        m, size = self.machine, copy.size
        at = (copy.cta * m.shared.stride + copy.shared) // size
        destination = m.shared.bytes.reshape(-1, size)
        whole = copy.filled == size
        if whole.all():
            destination[at] = m.memory.fetch(copy.source, size)
        else:
            destination[at] = 0
            destination[at[whole]] = m.memory.fetch(copy.source[whole], size)
            for k in np.flatnonzero(~whole & (copy.filled > 0)):
                n = int(copy.filled[k])
                destination[at[k], :n] = m.memory.peek(int(copy.source[k]), n)
        m.shared.mark(at, size)
        copy.landed = True

    def commit(self, g: Threads) -> None:
        """Close the current group of every thread of `g`."""
        self.committed[g.flat] += 1

    def wait(self, g: Threads, keep: int | None) -> None:
        """Land every copy of `g` except the `keep` youngest committed groups and what is not committed.

        keep None waits for everything, committed or not.
        """
        if not self.pending:
            return
        m = self.machine
        member = g.mask.reshape(-1)
        remaining = []
        for copy in self.pending:
            done = member[copy.thread]
            if keep is not None:
                done = done & (copy.group < self.committed[copy.thread] - keep)
            count = np.count_nonzero(done)
            if count:
                finished = copy if count == len(done) else copy.part(done)
                if not finished.landed:
                    self.land(finished)
                if m.watch is not None and not finished.tracked:
                    m.watch.copy_done(m, finished)
            if count == 0:
                remaining.append(copy)
            elif count < len(done):
                remaining.append(copy.part(~done))
        self.pending = remaining

    def track(self, g: Threads, barriers: list[Barrier], where: Instruction) -> None:
        """Each thread of `g` arrives at its barrier when all copies that it has issued so far are over."""
        m = self.machine
        flat, held = g.flat, np.array(barriers, object)
        for k, (warp, cta) in enumerate(zip(g.warp_at.tolist(), g.cta_at.tolist(), strict=True)):
            mine = g.slot == k
            self.arrivals[warp, cta] += 1
            unit = Unit(cta, "copies", warp, int(self.arrivals[warp, cta]), warp)
            arrival = TrackedCopies(unit, flat[mine], held[mine].tolist(), where)
            for copy in self._split(arrival.lanes, range(1)):
                copy.tracked = unit.epoch
                if m.watch is not None:
                    m.watch.copy_tracked(m, unit, copy)
            m.part(Engine).issue(arrival)

    def complete(self, arrival: TrackedCopies) -> None:
        """Land what an arrival waits for; later copies of its threads are left alone."""
        done = self._split(arrival.lanes, range(1, arrival.unit.epoch + 1))
        for copy in done:
            if not copy.landed:
                self.land(copy)
        gone = {id(copy) for copy in done}
        self.pending = [copy for copy in self.pending if id(copy) not in gone]

    def _split(self, lanes: np.ndarray, tracked: range) -> list[Copy]:
        """The pending copies of some threads that arrivals of these numbers track, apart from all others."""
        member = np.zeros(self.committed.shape, bool)
        member[lanes] = True
        found, pending = [], []
        for copy in self.pending:
            mine = member[copy.thread] if copy.tracked in tracked else np.zeros(len(copy.thread), bool)
            parts = [copy] if mine.all() or not mine.any() else [copy.part(mine), copy.part(~mine)]
            found += parts[:1] if mine.any() else []
            pending += parts
        self.pending = pending
        return found

    def drift(self, chance: float) -> None:
        """Land each pending copy with the given probability (random asynchrony)."""
        m = self.machine
        for copy in self.pending:
            if not copy.landed and m.random.random() < chance:
                self.land(copy)
        if m.watch is None:
            self.pending = [copy for copy in self.pending if not copy.landed]
