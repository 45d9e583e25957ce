"""Who runs next.

Lockstep: of all sets of threads the one at the lowest step runs, and sets at the same step are one: threads
that diverged meet again as early as they can. Random: a seeded choice of one warp, for a short or a long
slice; lanes of that warp that diverged follow the lowest-step rule among themselves. Others first: some CTAs
have a schedule of their own, whose turn comes when nobody else can run. A set that waits for other lanes of
its warps at a converged step is put with the step number -1 - step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads

NO_LIMIT = 1 << 60
SLICES = (1, 2, 5, 20, 100, NO_LIMIT)  # steps per turn of a warp; short ones interleave, long ones run ahead
PATIENCE = 2000


class Lockstep:
    """Lowest step first; everything that meets merges.

    A set may spin on memory that another one will write. So after PATIENCE turns in which there was a
    choice, or when the set is found to poll, the next set in order is preferred for as many turns.
    """

    def __init__(self, m: Machine, ready: dict[int, Threads]):
        self.machine = m
        self.ready = ready
        self.gathering: dict[int, Threads] = {}
        self.choices = 0
        self.exits = 0

    def put(self, going: list[tuple[int, Threads]]) -> None:
        """Take back what a turn left."""
        sets = self.machine.sets
        for pc, threads in going:
            if pc < 0:
                have = self.gathering.get(-1 - pc)
                self.gathering[-1 - pc] = threads if have is None else sets.union(have, threads)
                continue
            waiting = self.gathering.pop(pc, None)
            if waiting is not None:
                threads = sets.union(waiting, threads)
            have = self.ready.get(pc)
            self.ready[pc] = threads if have is None else sets.union(have, threads)

    def gathered(self) -> dict[int, Threads]:
        """The sets that wait for lanes, by step."""
        return self.gathering

    def count(self) -> int:
        """How many sets can run."""
        return len(self.ready)

    def pass_on(self) -> None:
        """The set that ran last polls: the next one goes first."""
        self.choices += PATIENCE - self.choices % PATIENCE

    def retry(self) -> bool:
        """Wake the sets that wait for lanes, if threads have exited since: they may have waited for those."""
        if not self.gathering or self.exits == self.machine.exits:
            return False
        self.exits = self.machine.exits
        self.ready.update(self.gathering)
        self.gathering = {}
        return True

    def pick(self) -> tuple[int, Threads, int] | None:
        """(step, threads, step to stop before), or None when no thread can run."""
        ready = self.ready
        if len(ready) == 1:
            pc, threads = ready.popitem()
            limit = NO_LIMIT
        elif ready:
            order = sorted(ready)
            pc = order[self.choices // PATIENCE % len(order)]
            self.choices += 1
            threads = ready.pop(pc)
            limit = next((other for other in order if other > pc), NO_LIMIT)
        elif self.retry():
            return self.pick()
        else:
            return None
        for other in self.gathering:
            if pc < other < limit:
                limit = other
        return pc, threads, limit


class OneWarpAtATime:
    """A random warp, for a random number of steps."""

    def __init__(self, m: Machine):
        self.machine = m
        self.queues: dict[int, Lockstep] = {}
        self.turn: tuple[int, int] | None = None

    def put(self, going: list[tuple[int, Threads]]) -> None:
        """Take back what a turn left, warp by warp."""
        m = self.machine
        for pc, threads in going:
            flats = threads.flat_warp.tolist()
            for flat in flats:
                queue = self.queues.get(flat)
                if queue is None:
                    queue = self.queues[flat] = Lockstep(m, {})
                one = threads
                if len(flats) > 1:
                    mask = np.zeros_like(threads.mask)
                    warp, cta = divmod(flat, m.ctas)
                    mask[warp, cta] = threads.mask[warp, cta]
                    one = m.sets.of(mask)
                queue.put([(pc, one)])

    def gathered(self) -> dict[int, Threads]:
        """As Lockstep.gathered, for all warps."""
        found: dict[int, Threads] = {}
        for queue in self.queues.values():
            for pc, threads in queue.gathering.items():
                have = found.get(pc)
                found[pc] = threads if have is None else self.machine.sets.union(have, threads)
        return found

    def count(self) -> int:
        """How many sets can run."""
        return sum(queue.count() for queue in self.queues.values())

    def pass_on(self) -> None:
        """The warp that ran last polls: its turn is over, and the next of its sets goes first."""
        if self.turn is not None:
            self.queues[self.turn[0]].pass_on()
        self.turn = None

    def pick(self) -> tuple[int, Threads, int] | None:
        """As Lockstep.pick, for one warp."""
        random = self.machine.random
        runnable = [flat for flat, queue in self.queues.items() if queue.ready]
        if not runnable:
            runnable = [flat for flat, queue in self.queues.items() if queue.retry()]
        if not runnable:
            return None
        flat, left = self.turn or (-1, 0)
        if left <= 0 or flat not in runnable:
            flat = runnable[int(random.integers(len(runnable)))]
            left = SLICES[int(random.integers(len(SLICES)))]
        pc, threads, limit = self.queues[flat].pick()
        stop = min(limit, pc + left)
        self.turn = (flat, left - max(1, min(stop, self.machine.code.next_control[pc] + 1) - pc))
        return pc, threads, stop


class OthersFirst:
    """CTAs of one rank run when no others can; for PATIENCE turns also when the others are found to poll."""

    def __init__(self, m: Machine, rank: int):
        self.machine, self.behind = m, (m.rank == rank)[None, :, None]
        self.others, self.held_back = _plain(m), _plain(m)
        self.ran: Schedule = self.others
        self.turns = 0  # that those behind still have

    def put(self, going: list[tuple[int, Threads]]) -> None:
        """Take back what a turn left."""
        for schedule, whose in ((self.others, ~self.behind), (self.held_back, self.behind)):
            parts = ((pc, threads, threads.mask & whose) for pc, threads in going)
            schedule.put(
                [
                    (pc, threads if mask.sum() == threads.mask.sum() else self.machine.sets.of(mask))
                    for pc, threads, mask in parts
                    if mask.any()
                ]
            )

    def gathered(self) -> dict[int, Threads]:
        """As Lockstep.gathered, for all CTAs."""
        found = dict(self.others.gathered())
        for pc, threads in self.held_back.gathered().items():
            have = found.get(pc)
            found[pc] = threads if have is None else self.machine.sets.union(have, threads)
        return found

    def count(self) -> int:
        """How many sets can run."""
        return self.others.count() + self.held_back.count()

    def pass_on(self) -> None:
        """The set that ran last polls: the next one of its CTAs goes first, or those that are behind."""
        self.ran.pass_on()
        self.turns = PATIENCE if self.ran is self.others else 0

    def pick(self) -> tuple[int, Threads, int] | None:
        """As Lockstep.pick."""
        order = (self.held_back, self.others) if self.turns else (self.others, self.held_back)
        self.turns = max(self.turns - 1, 0)
        for self.ran in order:
            if (choice := self.ran.pick()) is not None:
                return choice
        return None


Schedule = Lockstep | OneWarpAtATime | OthersFirst


def _plain(m: Machine) -> Lockstep | OneWarpAtATime:
    return OneWarpAtATime(m) if m.options.schedule == "random" else Lockstep(m, {})


def schedule_of(m: Machine) -> Schedule:
    """The schedule of a wave whose threads all stand at the first step."""
    behind = m.options.behind
    schedule = _plain(m) if behind is None else OthersFirst(m, behind)
    schedule.put([(0, m.sets.of(m.live.copy()))])
    return schedule
