"""Threads that wait for an event.

A control step that cannot go on parks its threads under a key; `wake(key)` lets them execute the same step
again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .geometry import Geometry
    from .state import Threads


class Waiter(NamedTuple):
    """Threads that wait at control step `here`.

    give_up(machine, threads): how a bounded wait ends without its event.
    """

    here: int
    threads: Threads
    give_up: Callable | None


class Parked:
    """Threads that wait for an event, by key; the key's text names the event in messages."""

    def __init__(self, m: Geometry):
        self.machine = m
        self.waiting: dict[Hashable, list[Waiter]] = {}
        self.woken: list[tuple[int, Threads]] = []

    def park(self, key: Hashable, waiter: Waiter) -> None:
        """Suspend threads until `wake(key)`; they then execute their step again."""
        self.waiting.setdefault(key, []).append(waiter)

    def wake(self, key: Hashable) -> None:
        """Let those go on who wait for `key`."""
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
