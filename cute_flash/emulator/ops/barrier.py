"""Named barriers of a CTA: bar and barrier, with sync, arrive and red."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import BarrierError
from ..core.code import Step
from ..translate.translation import Operation, operation
from ..units.sync import Arrival, NamedBarriers
from .warp import by_warp, from_warps, present

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads


def _uniform(m: Machine, g: Threads, row: int) -> np.ndarray:
    """One value per warp of the set, int64 (g.warps,); its lanes must agree."""
    words, have = by_warp(g, m.rows["u32"][row][g.index]).astype(np.int64), present(g)
    first = words[np.arange(g.warps), have.argmax(axis=1)]
    if (have & (words != first[:, None])).any():
        raise BarrierError("lanes of one warp name different barriers or counts")
    return first


class _Form:
    """Number and count operands of a barrier instruction."""

    def __init__(self, x: Operation, first: int, count: bool):
        self.number = x.source(first, "u32")
        self.count = x.source(first + 1, "u32") if count else None

    def arrival(self, m: Machine, g: Threads, wait: bool) -> Arrival:
        count = None if self.count is None else _uniform(m, g, self.count)
        return Arrival(_uniform(m, g, self.number), count, wait)


def _names(verb: str) -> tuple[str, ...]:
    return (f"bar.{verb}", f"bar.cta.{verb}", f"barrier.{verb}", f"barrier.cta.{verb}")


def _step(x: Operation, arrival: Callable[[Machine, Threads], Arrival]) -> Step:
    """Arrive with every warp that has all its live lanes here; the others wait for their lanes first."""

    def step(m: Machine, g: Threads, here: int) -> list[tuple[int, Threads]]:
        ready, late = m.whole_warps(g, here)
        if ready is None:
            return late
        return late + m.part(NamedBarriers).arrive(ready, here, arrival(m, ready))

    return x.control(step)


@operation(*_names("sync"))
def sync(x: Operation) -> Step:
    """Arrive and wait until the barrier has its count."""
    x.flag("aligned")
    form = _Form(x, 0, count=x.count() > 1)
    return _step(x, lambda m, g: form.arrival(m, g, wait=True))


@operation(*_names("arrive"))
def arrive(x: Operation) -> Step:
    """Arrive and go on."""
    x.flag("aligned")
    form = _Form(x, 0, count=True)
    return _step(x, lambda m, g: form.arrival(m, g, wait=False))


@operation(*_names("red"))
def reduce(x: Operation) -> Step:
    """Arrive, wait, and learn for how many threads of the barrier (or whether for all, or any) a predicate
    holds.
    """
    x.flag("aligned")
    name = x.one_of("popc", "and", "or")
    view = {"u32": "u32", "pred": "pred"}[x.type("u32" if name == "popc" else "pred")]
    last = x.count() - 1
    d = x.dest(0, view)
    form = _Form(x, 1, count=last == 3)
    p, negated = x.predicate(last)

    def finish(m: Machine, g: Threads, totals: np.ndarray) -> None:
        true, total = totals[:, 0], totals[:, 1]
        value = {"popc": true, "and": true == total, "or": true > 0}[name]
        m.rows[view][d][g.index] = from_warps(g, np.repeat(value[:, None], 32, axis=1))

    def arrival(m: Machine, g: Threads) -> Arrival:
        holds = by_warp(g, m.rows["pred"][p][g.index] ^ negated)
        return replace(form.arrival(m, g, wait=True), holds=holds, on_release=finish)

    return _step(x, arrival)
