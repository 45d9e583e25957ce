"""Threads that only look, again and again, for what somebody else will bring.

A set of threads polls if it comes back to a step with all its registers as they were: until something else
happens it will do the same for ever. So others go first, and where all poll, a pending operation happens, as
it would have on hardware long ago. Nobody is looked at before many scheduling decisions have passed without
an event, and again after as many once somebody was found at work.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import Deadlock
from ..core.engine import Engine

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads
    from .schedule import Schedule

QUIET = 100  # scheduling decisions without an event before threads are looked at
ROUNDS = 8  # decisions per set of threads, all of them for sets that poll, before they all are said to
UNKNOWN = 500  # decisions for sets that have not been seen before, before looking is given up for a while
SPINNING = 20000  # decisions without an event before a pending operation happens, whatever the threads do
ENDLESS = 20000  # decisions for sets that poll when nothing is pending, before it is a deadlock


class Polling:
    """Watches the scheduling decisions of one wave."""

    def __init__(self, m: Machine, schedule: Schedule):
        self.machine, self.schedule = m, schedule
        self.progress = m.progress
        self.quiet = 0  # decisions since the last event
        self._forget(QUIET)

    def _forget(self, patience: int) -> None:
        """Look no more until there have been `patience` decisions without an event."""
        self.patience = patience
        self.seen: dict[tuple[int, int], tuple[Threads, int]] = {}
        self.repeats = self.unknown = 0

    def decided(self, going: list[tuple[int, Threads]]) -> None:
        """A set has run; `going` is what became of it."""
        m = self.machine
        if m.progress != self.progress:
            self.progress, self.quiet = m.progress, 0
            if self.patience != QUIET or self.seen:
                self._forget(QUIET)
            return
        self.quiet += 1
        if self.quiet % SPINNING == 0:
            m.part(Engine).advance()
        elif self.quiet >= self.patience:
            self._look(going)

    def _look(self, going: list[tuple[int, Threads]]) -> None:
        """Compare the sets with what they were when they last came to their steps."""
        engine = self.machine.part(Engine)
        before = [self.seen.get((pc, id(g))) for pc, g in going]
        now = [(g, self._digest(g)) for _, g in going]
        self.seen |= {(pc, id(g)): state for (pc, g), state in zip(going, now, strict=True)}
        if not going or None in before:
            self.repeats, self.unknown = 0, self.unknown + 1
            if self.unknown > UNKNOWN:
                self._forget(2 * self.quiet)
        elif before != now:
            self._forget(2 * self.quiet)
        else:
            self.repeats += 1
            self.schedule.pass_on()
            if engine.pending and self.repeats >= ROUNDS * self.schedule.count():
                engine.advance()
            elif self.repeats > ENDLESS:
                raise self._endless(going)

    def _digest(self, g: Threads) -> int:
        """A number that tells whether the registers of a set have changed."""
        found = 0
        for bank in self.machine.banks.values():
            if len(bank):
                held = np.ascontiguousarray(bank[(slice(None), *g.index)])
                found = zlib.crc32(held.view(np.uint8), found)
        return found

    def _endless(self, going: list[tuple[int, Threads]]) -> Deadlock:
        m = self.machine
        pc, g = going[0]
        who = f"CTA {m.cta_name(int(g.cta_at[0]))} warp {int(g.warp_at[0])}"
        text = f"{who} polls, as all who can run, for what nobody will bring, {m.line(pc)}"
        return Deadlock(text + m.unlaunched.waiting(m.ctas))
