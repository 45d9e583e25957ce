"""Asynchronous operations between their issue and their completion, and what happens when no thread can run.

A product or a copy is issued by a thread and done by a unit of its own. When that unit gets to it is the
choice of `Options.asynchrony`: at issue, as late as the program allows, or at random. As late as allowed
means: when a wait names the operation, or when no thread can run before something completes.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import Deadlock, EmulatorError
from .machine import Machine, Part

if TYPE_CHECKING:
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


class Engine(Part):
    """The operations of a wave that have been issued and not done, oldest first."""

    def __init__(self, m: Machine):
        super().__init__(m)
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
                where = operation.where
                raise error.at(where.line, where.text, where.source) from None
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
                where = operation.where
                raise error.at(where.line, where.text, where.source) from None
        number = 0
        if self.machine.options.asynchrony == "random":
            number = int(self.machine.random.integers(len(self.pending)))
        self.finish(self.pending[number])
        return True


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
        if m.part(Engine).advance():
            return True
        self.rounds = self.rounds + 1 if m.progress == self.progress else 0
        self.progress = m.progress
        if self.rounds < ROUNDS and m.parked.give_up():
            return True
        waiting = [line for part in m.parts.values() for line in part.describe()]
        if gathering or waiting or m.parked.waiting:
            raise deadlock(m, waiting, gathering)
        return False


def deadlock(m: Machine, waiting: list[str], gathering: dict[int, Threads]) -> Deadlock:
    """The error that names who waits for what. waiting: lines of the wave's parts."""
    lines = [*waiting, *m.parked.describe()]
    for pc, threads in sorted(gathering.items()):
        for warp, cta in zip(threads.warp_at.tolist(), threads.cta_at.tolist(), strict=True):
            lanes = np.flatnonzero(threads.mask[warp, cta]).tolist()
            who = f"CTA {m.cta_name(cta)} warp {warp}: lanes {lanes}"
            lines.append(f"{who} wait for the warp's other lanes, {m.line(pc)}")
    shown = lines[:20] + ([f"and {len(lines) - 20} more"] if len(lines) > 20 else [])
    gone = int(np.count_nonzero(~m.live))
    exited = f"\n  ({gone} threads of the wave have exited)"
    return Deadlock("nothing can run:\n  " + "\n  ".join(shown) + exited + m.unlaunched.waiting(m.ctas))
