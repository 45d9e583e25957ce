"""Branches, the end of a thread, and predicated execution."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import EmulatorError
from ..core.code import Step
from ..ptx.parse import Instruction
from ..translate.translation import Operation, Translation, operation
from ..units.cluster import RegisterPool

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads


def guarded(run: Callable, row: int, negated: bool) -> Callable:
    """A plain step under @p or @!p: it runs on the threads whose predicate holds."""

    def step(m: Machine, g: Threads) -> None:
        holds = m.rows["pred"][row][g.index]
        if negated:
            holds = ~holds
        count = np.count_nonzero(holds)
        if count == g.size:
            run(m, g)
        elif count:
            run(m, m.sets.select(g, holds))

    return step


def split(
    m: Machine, g: Threads, row: int, negated: bool, taken: int, other: int
) -> list[tuple[int, Threads]]:
    """Send the threads whose predicate holds to step `taken`, the rest to step `other`."""
    holds = m.rows["pred"][row][g.index]
    count = np.count_nonzero(holds)
    if negated:
        taken, other = other, taken
    if count == g.size:
        return [(taken, g)]
    if count == 0:
        return [(other, g)]
    yes = m.sets.select(g, holds)
    return [(taken, yes), (other, m.sets.without(g, yes))]


def skip(translation: Translation, instruction: Instruction, following: int) -> Callable:
    """A step before a guarded step that is not plain: threads whose guard fails jump over it."""
    row, negated, link = instruction.guard.row, instruction.guard_negated, translation.link

    def step(m: Machine, g: Threads, here: int) -> list[tuple[int, Threads]]:
        return split(m, g, row, negated, here + 1, link[following])

    return step


@operation("bra")
def bra(x: Operation) -> Step:
    """Branch, divergent or uniform. .uni promises what lockstep would find anyway."""
    x.flag("uni")
    x.operand(0)
    link, target = x.translation.link, x.instruction.targets[0]
    guard, negated = x.instruction.guard, x.instruction.guard_negated
    if guard is None:
        return x.control(lambda m, g, here: [(link[target], g)])
    row = guard.row
    return x.control(lambda m, g, here: split(m, g, row, negated, link[target], here + 1))


@operation("brx.idx")
def brx(x: Operation) -> Step:
    """Branch through a table of labels."""
    x.flag("uni")
    if x.instruction.guard is not None:
        raise x.unmodelled("a guard")
    row = x.source(0, "u32")
    x.operand(1)
    link, targets = x.translation.link, x.instruction.targets

    def step(m: Machine, g: Threads, here: int) -> list[tuple[int, Threads]]:
        number = m.rows["u32"][row][g.index]
        return [(link[targets[int(k)]], m.sets.select(g, number == k)) for k in np.unique(number)]

    return x.control(step)


@operation("ret", "exit")
def leave(x: Operation) -> Step:
    """The thread is done (entries have no caller to return to)."""
    x.flag("uni")

    def step(m: Machine, g: Threads, here: int) -> list[tuple[int, Threads]]:
        return m.exit(g)

    return x.control(step)


@operation("trap")
def trap(x: Operation) -> Step:
    """Abort: the kernel itself says that something is wrong."""

    def step(m: Machine, g: Threads, here: int) -> list[tuple[int, Threads]]:
        raise m.fault(EmulatorError, g, 0, "the kernel executed trap")

    return x.control(step)


@operation("nanosleep", "pmevent", "griddepcontrol.wait", "griddepcontrol.launch_dependents")
def pause(x: Operation) -> Callable:
    """Timing, profiling, and the overlap of launches: launches run one after the other here."""
    x.without_effect("u32", "mask")
    for position in range(x.count()):
        x.operand(position)
    return lambda m, g: None


@operation("setmaxnreg")
def setmaxnreg(x: Operation) -> Step:
    """Give registers back to the CTA, or take some: this waits until others have given enough."""
    grows = x.one_of("inc", "dec") == "inc"
    x.without_effect("sync", "aligned", "u32")
    count = x.integer(0)
    if count % 8 or not 24 <= count <= 256:
        raise x.unmodelled(f"a register count of {count}; allowed are multiples of 8 from 24 to 256:")

    def step(m: Machine, g: Threads, here: int) -> list[tuple[int, Threads]]:
        ready, late = m.whole_warps(g, here)
        if ready is None:
            return late
        pool, done = m.part(RegisterPool), np.zeros_like(ready.mask)
        waiting: dict[int, np.ndarray] = {}
        for warp, cta in zip(ready.warp_at.tolist(), ready.cta_at.tolist(), strict=True):
            have = int(pool.held[warp, cta])
            if have != count and grows != (count > have):
                verb = "inc" if grows else "dec"
                raise m.fault(EmulatorError, ready, 0, f"setmaxnreg.{verb} from {have} to {count} registers")
            into = done if pool.change(warp, cta, count) else waiting.setdefault(cta, np.zeros_like(done))
            into[warp, cta] = ready.mask[warp, cta]
        for cta, mask in waiting.items():
            m.park(here, m.sets.of(mask), pool.key(cta))
        return [*late, (here + 1, m.sets.of(done))] if done.any() else late

    return x.control(step)
