"""Asynchronous operations between their issue and their completion, and threads that wait for an event.

A product or a copy is issued by a thread and done by a unit of its own. When that unit gets to it is the
choice of `Options.asynchrony`: at issue, as late as the program allows, or at random. As late as allowed
means: when a wait names the operation, or when no thread can run before something completes.

A control step that cannot go on parks its threads under a key; `wake(key)` lets them execute the same step
again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..base.errors import Deadlock, EmulatorError

if TYPE_CHECKING:
    from ..machine.machine import Machine
    from ..ptx.parse import Instruction
    from .state import Threads

ROUNDS = 3  # how often bounded waits may give up, with nothing else happening, before it is a deadlock


class Operation:
    """Something that happens later. kind: "copy" or "product".

    queue: operations with one queue happen in the order of their issue; None where there is no order.
    """

    kind: str = "copy"
    queue: Hashable = None
    where: Instruction  # for messages
    landed = False

    def land(self, m: Machine) -> None:
        """Do it: read the sources as they are now, write the results, signal the completion."""
        raise NotImplementedError

    def abandoned(self, m: Machine) -> None:
        """Raise if this cannot be done any more because the threads that need it have exited."""


class Engine:
    """The operations of a wave that have been issued and not done, oldest first."""

    def __init__(self, m: Machine):
        self.machine = m
        self.pending: list[Operation] = []

    def issue(self, operation: Operation) -> None:
        """Start an operation."""
        self.pending.append(operation)
        if self.machine.lands_at_issue(operation.kind):
            self.finish(operation)

    def finish(self, operation: Operation) -> None:
        """Do an operation, and before it what its queue holds before it. Done ones are left alone."""
        if operation.landed:
            return
        if operation.queue is None:
            self._land([operation])
            return
        ahead = [other for other in self.pending if other.queue == operation.queue]
        self._land(ahead[: ahead.index(operation) + 1])

    def _land(self, operations: list[Operation]) -> None:
        gone = {id(operation) for operation in operations}
        self.pending = [operation for operation in self.pending if id(operation) not in gone]
        for operation in operations:
            operation.landed = True
            try:
                operation.land(self.machine)
            except EmulatorError as error:
                raise error.at(operation.where.line, operation.where.text) from None
        self.machine.progress += 1

    def drift(self, chance: float) -> None:
        """Do each pending operation with the given probability (random asynchrony)."""
        for operation in list(self.pending):
            if self.machine.random.random() < chance:
                self.finish(operation)

    def advance(self) -> bool:
        """No thread can run: do one operation, the oldest or (random asynchrony) any; False without one."""
        if not self.pending:
            return False
        for operation in self.pending if self.machine.exits else ():
            try:
                operation.abandoned(self.machine)
            except EmulatorError as error:
                raise error.at(operation.where.line, operation.where.text) from None
        number = 0
        if self.machine.options.asynchrony == "random":
            number = int(self.machine.random.integers(len(self.pending)))
        self.finish(self.pending[number])
        return True


class Waiter(NamedTuple):
    """Threads that wait at control step `here`. give_up: how a bounded wait ends without its event."""

    here: int
    threads: Threads
    give_up: Callable[[Machine, Threads], None] | None


class Parked:
    """Threads that wait for an event, by key; the key's text names the event in messages."""

    def __init__(self, m: Machine):
        self.machine = m
        self.waiting: dict[Hashable, list[Waiter]] = {}
        self.woken: list[tuple[int, Threads]] = []

    def park(self, key: Hashable, waiter: Waiter) -> None:
        """Suspend threads until `wake(key)`; they then execute their step again."""
        self.waiting.setdefault(key, []).append(waiter)

    def wake(self, key: Hashable) -> None:
        """Let those go on who wait for `key`."""
        self.machine.progress += 1
        self.woken += [(waiter.here, waiter.threads) for waiter in self.waiting.pop(key, ())]

    def give_up(self) -> bool:
        """End every bounded wait without its event; False when there is none."""
        bounded = [(key, w) for key, waiters in self.waiting.items() for w in waiters if w.give_up]
        for key, waiter in bounded:
            self.waiting[key].remove(waiter)
            waiter.give_up(self.machine, waiter.threads)
            self.woken.append((waiter.here + 1, waiter.threads))
        self.waiting = {key: waiters for key, waiters in self.waiting.items() if waiters}
        return bool(bounded)

    def take(self) -> list[tuple[int, Threads]]:
        """The sets that go on, handed over once."""
        woken, self.woken = self.woken, []
        return woken

    def describe(self) -> list[str]:
        """One line per event and CTA that warps wait for, for the deadlock message."""
        m, lines = self.machine, []
        for key, waiters in self.waiting.items():
            for waiter in waiters:
                threads = waiter.threads
                for cta in sorted(set(threads.cta_at.tolist())):
                    warps = threads.warp_at[threads.cta_at == cta].tolist()
                    where = m.line(waiter.here)
                    lines.append(f"CTA {m.cta_name(cta)} warps {warps} wait for {key}, {where}")
        return lines


class Stalls:
    """What happens when no thread of a wave can run."""

    def __init__(self, m: Machine):
        self.machine = m
        self.rounds, self.progress = 0, -1

    def resolve(self, gathering: dict[int, Threads]) -> bool:
        """Let something happen that hardware would let happen sooner or later; False when all have exited.

        A pending operation completes, or bounded waits give up. Raises Deadlock, which names who waits for
        what. gathering: threads that wait for lanes of their warps, by step.
        """
        m = self.machine
        if m.engine.advance():
            return True
        self.rounds = self.rounds + 1 if m.progress == self.progress else 0
        self.progress = m.progress
        if self.rounds < ROUNDS and m.parked.give_up():
            return True
        if gathering or m.parked.waiting or m.barriers.waiting:
            raise deadlock(m, gathering)
        return False


def deadlock(m: Machine, gathering: dict[int, Threads]) -> Deadlock:
    """The error that names who waits for what."""
    lines = [*m.barriers.describe(), *m.parked.describe()]
    for pc, threads in sorted(gathering.items()):
        for warp, cta in zip(threads.warp_at.tolist(), threads.cta_at.tolist(), strict=True):
            lanes = np.flatnonzero(threads.mask[warp, cta]).tolist()
            who = f"CTA {m.cta_name(cta)} warp {warp}: lanes {lanes}"
            lines.append(f"{who} wait for the warp's other lanes, {m.line(pc)}")
    shown = lines[:20] + ([f"and {len(lines) - 20} more"] if len(lines) > 20 else [])
    gone = int(np.count_nonzero(~m.live))
    return Deadlock(
        "nothing can run:\n  " + "\n  ".join(shown) + f"\n  ({gone} threads of the wave have exited)"
    )
