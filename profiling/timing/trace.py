"""What each warp of some CTAs does, in order, as the emulator executes the PTX.

    report = record(run)        run(observer) -> runs a kernel on the emulator
    for event in report.warps[cta, warp]: ...

An event is an ordered instruction with whom it meets. Whom: joins, each a phase of a barrier. A phase of an
mbarrier or a named barrier is over when everyone who joined it in the emulator's run has joined it; so counts
need not be known.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cute_flash.emulator.core.observe import Observer

from . import words

# ("mbarrier", cta, address, phase), ("named", cta, number, phase), ("cluster", cluster, 0, phase)
Join = tuple[str, int, int, int]


@dataclass(slots=True)
class Event:
    """One ordered instruction of a warp. shape: SHAPE words between the one before and this one, as counts.

    joins: phases that it joins, now or when what it starts is over. until: the phase it waits for. nbytes:
    that it moves; sums: by adding to global memory. columns: of tensor memory, rows: and its lanes. step: of
    the emulator's run.
    """

    word: str
    shape: list[int]
    joins: list[Join] = field(default_factory=list)
    until: Join | None = None
    nbytes: int = 0
    columns: int = 0
    rows: int = 0
    sums: bool = False
    step: int = -1


class Recorder(Observer):
    """Collects the events of every warp of a wave. tail: SHAPE counts after a warp's last event."""

    def __init__(self) -> None:
        self.warps: dict[tuple[int, int], list[Event]] = defaultdict(list)
        self.joined: Counter[Join] = Counter()
        self._open: dict[tuple[int, int], list[int]] = defaultdict(_zeros)
        self._phases: Counter[tuple[int, int]] = Counter()
        self._arrived: dict[int, int] = {}
        self._words: dict[int, list[tuple[str, bool]]] = {}
        self._storing: dict[tuple[int, int, int], Any] = {}
        self._now = 0

    @property
    def tail(self) -> dict[tuple[int, int], list[int]]:
        return {warp: self._open[warp] for warp in self.warps}

    def begin(self, m: Any) -> None:
        if self.warps:
            raise ValueError("CTAs are recorded that run at once")

    def step(self, m: Any, g: Any) -> None:
        self._now += 1
        found = self._words.get(m.at)
        if found is None:
            spoken = [words.of_ptx(it.opcode) for it in m.code.steps[m.at].instructions]
            found = self._words[m.at] = [(word, word in words.ORDERED) for word in spoken if word]
        for word, ordered in found:
            for warp in zip(g.cta_at.tolist(), g.warp_at.tolist(), strict=True):
                if ordered:
                    self._event(warp, word)
                else:
                    self._open[warp][words.place(word)] += 1

    def _event(self, warp: tuple[int, int], word: str) -> Event:
        event = Event(word, self._open.pop(warp, None) or _zeros(), step=self._now)
        self.warps[warp].append(event)
        return event

    def _join(self, event: Event, join: Join) -> None:
        event.joins.append(join)
        self.joined[join] += 1

    def mbarrier_wait(self, m: Any, warp: tuple[int, int], barrier: Any) -> None:
        until = ("mbarrier", barrier.cta, barrier.address, barrier.phase - 1)
        seen = self.warps[warp]
        if not (seen and seen[-1].step == self._now and seen[-1].until == until):
            self._event(warp, "wait").until = until

    def mbarrier_arrive(self, m: Any, warp: tuple[int, int], barrier: Any, lanes: int) -> None:
        event = self.warps[warp][-1]
        join = _phase_of(barrier)
        if event.word == "arrive" and join not in event.joins:
            self._join(event, join)

    def async_write(self, m: Any, warp: tuple[int, int], barrier: Any, span: Any) -> None:
        event = self._last(warp, "load")
        event.nbytes += span.size
        if (join := _phase_of(barrier)) not in event.joins:
            self._join(event, join)

    def async_read(self, m: Any, unit: Any, cta: int, address: np.ndarray, size: int) -> None:
        """A bulk store reads; where every lane of a warp issues it, the machine does it once."""
        if unit.name == "bulk" and self._storing.setdefault((unit.cta, unit.warp, self._now), unit) == unit:
            self._last((unit.cta, unit.warp), "store").nbytes += size * address.size

    def bulk_write(self, m: Any, unit: Any, rows: Any, order: Any) -> None:
        self._last((unit.cta, unit.warp), "store").sums = order.sums

    def unit_arrive(self, m: Any, unit: Any, barrier: Any) -> None:
        if unit.name == "tensor":
            self._join(self._last((unit.cta, unit.warp), "tensor commit"), _phase_of(barrier))

    def tensor_work(self, m: Any, unit: Any, columns: Any, write: bool) -> None:
        event = self._last((unit.cta, unit.warp), "tensor product")
        if write and event is not None:
            event.columns = max(event.columns, columns.count)
            event.rows = columns.lanes.stop - columns.lanes.start

    def tensor_access(self, m: Any, warp: tuple[int, int], columns: Any, write: bool) -> None:
        event = self.warps[warp][-1]
        event.columns = columns.count

    def barrier_arrive(self, m: Any, g: Any, number: np.ndarray) -> None:
        for cta, warp, at in zip(g.cta_at.tolist(), g.warp_at.tolist(), number.tolist(), strict=True):
            event = self.warps[cta, warp][-1]
            join = ("named", cta, at, self._phases[cta, at])
            self._join(event, join)
            if event.word == "sync":
                event.until = join

    def barrier_complete(self, m: Any, complete: np.ndarray) -> None:
        self._phases.update(map(tuple, np.argwhere(complete).tolist()))

    def cluster_arrive(self, m: Any, g: Any, release: bool) -> None:
        for cta, warp in zip(g.cta_at.tolist(), g.warp_at.tolist(), strict=True):
            number = self._arrived[cta, warp] = self._arrived.get((cta, warp), -1) + 1
            self._join(self._event((cta, warp), "cluster arrive"), ("cluster", 0, 0, number))

    def cluster_wait(self, m: Any, g: Any) -> None:
        for cta, warp in zip(g.cta_at.tolist(), g.warp_at.tolist(), strict=True):
            self._event((cta, warp), "cluster wait").until = ("cluster", 0, 0, self._arrived[cta, warp])

    def _last(self, warp: tuple[int, int], word: str) -> Event | None:
        return next((event for event in reversed(self.warps[warp]) if event.word == word), None)


def _phase_of(barrier: Any) -> Join:
    return ("mbarrier", barrier.cta, barrier.address, barrier.phase)


def _zeros() -> list[int]:
    return [0] * len(words.SHAPES)
