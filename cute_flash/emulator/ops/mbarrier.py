"""mbarrier instructions, on shared memory of this CTA or (arrivals) of another one of the cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..core.code import Step
from ..core.events import Barrier
from ..translate.translation import Operation, operation
from ..units.mbarrier import MBarriers
from ..units.sync import AsyncCopies
from .memory import Access

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads

SPURIOUS = 0.05  # chance that a bounded wait gives up at once, when asynchrony is random


class Word:
    """The barrier operand of an instruction."""

    def __init__(self, x: Operation, position: int, space: str = ""):
        space = space or x.one_of("shared", "shared::cta", "shared::cluster", default="")
        if not space:
            raise x.unmodelled("a generic address")
        granule = x.translation.shared_granule
        self.remote = space == "shared::cluster"
        self.access = Access(x, position, "shared", 8)
        x.translation.shared_granule = granule  # these words are not data

    def places(self, m: Machine, g: Threads) -> list[tuple[int, int]]:
        """(CTA, address) for each thread."""
        cta, address = m.place(g, self.access.of(m, g), self.remote)
        return list(zip(cta.tolist(), address.tolist(), strict=True))

    def barriers(self, m: Machine, g: Threads) -> list[Barrier]:
        """The barrier of each thread."""
        return [m.part(MBarriers).find(cta, address) for cta, address in self.places(m, g)]


def _use(m: Machine, g: Threads, barriers: list[Barrier]) -> None:
    """Tell observers who is about to use which barrier."""
    if m.watch is not None:
        for cta, warp, barrier in zip(g.cta.tolist(), g.warp.tolist(), barriers, strict=True):
            m.watch.mbarrier_use(m, (cta, warp), barrier, False)


def _number(x: Operation, position: int) -> Callable[[Machine, Threads], list[int]]:
    """A u32 operand, one value per thread."""
    row = x.source(position, "u32")
    return lambda m, g: np.broadcast_to(m.rows["u32"][row][g.index], g.shape).reshape(-1).tolist()


def _ordering(x: Operation, weaker: str) -> bool:
    """Consume the memory semantics; True when they are relaxed."""
    relaxed = x.flag("relaxed")
    x.flag(weaker)
    x.one_of("cta", "cluster", default="cta")
    return relaxed


@operation("mbarrier.init")
def init(x: Operation) -> Callable:
    """Create a barrier that expects a number of arrivals per phase."""
    word = Word(x, 0)
    x.type("b64")
    count = _number(x, 1)

    def step(m: Machine, g: Threads) -> None:
        asked = zip(word.places(m, g), count(m, g), g.warp.tolist(), strict=True)
        # Lanes of a warp that all write the same word of a barrier leave that word.
        for (cta, address), n, warp in dict.fromkeys(asked) if m.options.permissive else asked:
            m.part(MBarriers).init(cta, address, n, (cta, warp))

    return step


@operation("mbarrier.inval")
def inval(x: Operation) -> Callable:
    """End a barrier's life: its words are memory again."""
    word = Word(x, 0)
    x.type("b64")

    def step(m: Machine, g: Threads) -> None:
        _use(m, g, word.barriers(m, g))
        for cta, address in word.places(m, g):
            m.part(MBarriers).invalidate(cta, address)

    return step


@operation("mbarrier.arrive", "mbarrier.arrive.expect_tx")
def arrive(x: Operation) -> Callable:
    """Arrive, perhaps several times; with expect_tx the phase first learns of bytes to come."""
    expecting = x.name.endswith("expect_tx")
    relaxed = _ordering(x, "release")
    word = Word(x, 1)
    x.type("b64")
    state = x.dest(0, "u64")
    operand = _number(x, 2) if expecting or x.count() > 2 else None

    def step(m: Machine, g: Threads) -> None:
        barriers = word.barriers(m, g)
        _use(m, g, barriers)
        numbers = [1] * g.size if operand is None else operand(m, g)
        warps = list(zip(g.cta.tolist(), g.warp.tolist(), strict=True))
        lanes: dict[tuple, int] = {}
        for barrier, warp, lane in zip(barriers, warps, g.lane.tolist(), strict=True):
            lanes[barrier, warp] = lanes.get((barrier, warp), 0) | 1 << lane
        phases = []
        for barrier, n, warp in zip(barriers, numbers, warps, strict=True):
            phases.append(barrier.phase)
            if expecting:
                m.part(MBarriers).expect(barrier, n)
            told = None if relaxed else warp
            if relaxed and m.watch is not None:
                m.watch.mbarrier_arrive_relaxed(m, warp, barrier)
            m.part(MBarriers).arrive(barrier, 1 if expecting else n, told, lanes[barrier, warp])
        m.rows["u64"][state][g.index] = np.array(phases, np.uint64).reshape(g.shape)

    return step


@operation("cp.async.mbarrier.arrive")
def arrive_with_copies(x: Operation) -> Callable:
    """Arrive when the thread's copies so far are over; with .noinc the barrier's count has this arrival."""
    counted = x.flag("noinc")
    word, where = Word(x, 0), x.instruction
    if word.remote:
        raise x.unmodelled(".shared::cluster")
    x.type("b64")

    def step(m: Machine, g: Threads) -> None:
        barriers = word.barriers(m, g)
        _use(m, g, barriers)
        for barrier in barriers if not counted else ():
            m.part(MBarriers).await_one_more(barrier)
        m.part(AsyncCopies).track(g, barriers, where)

    return step


@operation("mbarrier.expect_tx", "mbarrier.complete_tx")
def bytes_(x: Operation) -> Callable:
    """Tell the current phase of bytes to come, or that some have come."""
    x.flag("relaxed")
    x.one_of("cta", "cluster", default="cta")
    word = Word(x, 0)
    x.type("b64")
    operand = _number(x, 1)
    expecting = x.name.endswith("expect_tx")

    def step(m: Machine, g: Threads) -> None:
        barriers = word.barriers(m, g)
        _use(m, g, barriers)
        for barrier, n in zip(barriers, operand(m, g), strict=True):
            (m.part(MBarriers).expect if expecting else m.part(MBarriers).deliver)(barrier, n)

    return step


@operation("mbarrier.try_wait", "mbarrier.test_wait")
def wait(x: Operation) -> Step:
    """Whether a phase is complete: that of a parity, or the one that an arrival returned as its state.

    test_wait looks. try_wait also waits, but not for ever: it may give up and say no.
    """
    parity = x.flag("parity")
    relaxed = _ordering(x, "acquire")
    word = Word(x, 1)
    x.type("b64")
    p = x.dest(0, "pred")
    view = "u32" if parity else "u64"
    row = x.source(2, view)
    waits = x.name.endswith("try_wait")
    if waits and x.count() > 3:
        x.source(3, "u32")

    def say_no(m: Machine, g: Threads) -> None:
        m.rows["pred"][p][g.index] = False

    def step(m: Machine, g: Threads, here: int) -> list[tuple[int, Threads]]:
        asked = np.broadcast_to(m.rows[view][row][g.index], g.shape).reshape(-1)
        if parity and (asked > 1).any():
            raise m.fault(ValueError, g, int(np.argmax(asked)), f"a parity of {int(asked.max())}")
        cta, address = m.place(g, word.access.of(m, g), word.remote)
        places, of = np.unique(cta << 32 | address, return_inverse=True)
        barriers = [m.part(MBarriers).find(int(place) >> 32, int(place) & 0xFFFFFFFF) for place in places]
        _use_once(m, g, barriers, of)
        phase = np.array([barrier.phase for barrier in barriers])[of]
        done = (phase & 1) != asked if parity else phase > asked
        if not relaxed:
            _tell(m, g, barriers, of, done)
        m.rows["pred"][p][g.index] = done.reshape(g.shape)
        impatient = m.options.asynchrony == "random" and m.random.random() < SPURIOUS
        if done.all() or not waits or impatient:
            return [(here + 1, g)]
        for k in np.unique(of[~done]):
            late = m.sets.select(g, ((of == k) & ~done).reshape(g.shape))
            m.park(here, late, barriers[k].key, say_no)
        return [(here + 1, m.sets.select(g, done.reshape(g.shape)))] if done.any() else []

    return x.control(step)


def _warps(g: Threads, of: np.ndarray) -> set[tuple[int, int, int]]:
    """The different (cta, warp, number of the barrier) of a set."""
    return set(zip(g.cta.tolist(), g.warp.tolist(), of.reshape(-1).tolist(), strict=True))


def _use_once(m: Machine, g: Threads, barriers: list[Barrier], of: np.ndarray) -> None:
    if m.watch is not None:
        for cta, warp, k in _warps(g, of):
            m.watch.mbarrier_use(m, (cta, warp), barriers[k], False)


def _tell(m: Machine, g: Threads, barriers: list[Barrier], of: np.ndarray, done: np.ndarray) -> None:
    if m.watch is not None and done.any():
        ready = g if done.all() else m.sets.select(g, done.reshape(g.shape))
        for cta, warp, k in _warps(ready, of.reshape(-1)[done]):
            m.watch.mbarrier_wait(m, (cta, warp), barriers[k])
