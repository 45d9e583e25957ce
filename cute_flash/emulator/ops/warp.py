"""Instructions of a whole warp: shfl, vote, match, redux, activemask, elect, bar.warp.sync."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import BarrierError
from ..base.formats import CANONICAL_NAN
from ..core.code import Step
from ..core.state import LANES
from ..ptx.operands import Immediate
from ..translate.translation import Operation, operation

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads

_LANE = np.arange(LANES, dtype=np.int64)
_NAN = np.array(CANONICAL_NAN[32], np.uint32).view(np.float32)


def by_warp(g: Threads, values: np.ndarray) -> np.ndarray:
    """Values of the set's threads laid out per warp, (g.warps, 32); absent lanes hold zeros."""
    if g.whole:
        return values.reshape(-1, LANES)
    full = np.zeros((g.warps, LANES), values.dtype)
    full[g.slot, g.lane] = values.reshape(-1)
    return full


def present(g: Threads) -> np.ndarray:
    """bool (g.warps, 32): the lanes of the set."""
    return g.mask[g.warp_at, g.cta_at]


def from_warps(g: Threads, values: np.ndarray) -> np.ndarray:
    """The inverse of by_warp: (g.warps, 32) -> g.shape."""
    if g.whole:
        return np.ascontiguousarray(values).reshape(g.shape)
    return values[g.slot, g.lane]


def members(x: Operation, position: int) -> tuple[int, Callable]:
    """A membermask operand: its row, and a function that checks it and gives bool (g.warps, 32)."""
    operand = x.operand(position)
    row = x.source(position, "u32")
    everyone = isinstance(operand, Immediate) and operand.value in (-1, 0xFFFFFFFF)

    def named(m: Machine, g: Threads) -> np.ndarray:
        have = present(g)
        if everyone:
            return have
        words = by_warp(g, m.rows["u32"][row][g.index])
        first = words[np.arange(g.warps), have.argmax(axis=1)]
        if (have & (words != first[:, None])).any():
            raise BarrierError("lanes of one warp name different member masks")
        mask = (first[:, None].astype(np.int64) >> _LANE & 1).astype(bool)
        if (have & ~mask).any():
            k = int(np.flatnonzero((have & ~mask).any(axis=1))[0])
            raise m.warp_fault(
                BarrierError, g, k, f"a lane executes this that member mask {int(first[k]):#x} leaves out"
            )
        return mask & have

    return row, named


@operation("shfl.sync")
def shfl(x: Operation) -> Step:
    """Exchange registers inside segments of a warp; the predicate tells whether the source lane was in
    range.
    """
    mode = x.one_of("up", "down", "bfly", "idx")
    x.type("b32")
    first, second = x.pair(0)
    d = x.dest_of(first, "u32")
    p = x.dest_of(second, "pred") if second is not None else None
    a, b, c = x.source(1, "u32"), x.source(2, "u32"), x.source(3, "u32")
    row, named = members(x, 4)

    def step(m: Machine, g: Threads) -> None:
        rows, at = m.rows["u32"], g.index
        value = by_warp(g, rows[a][at])
        amount = by_warp(g, rows[b][at]).astype(np.int64) & 31
        control = by_warp(g, rows[c][at]).astype(np.int64)
        segment, clamp = control >> 8 & 31, control & 31
        high = _LANE & segment | clamp & ~segment
        low = _LANE & segment
        if mode == "up":
            source = _LANE - amount
            inside = source >= high
        elif mode == "down":
            source = _LANE + amount
            inside = source <= high
        elif mode == "bfly":
            source = _LANE ^ amount
            inside = source <= high
        else:
            source = low | amount & ~segment
            inside = source <= high
        source = np.where(inside, source, _LANE)
        if not g.whole:
            have = present(g) & named(m, g)
            wrong = present(g) & ~np.take_along_axis(have, source, axis=1)
            if wrong.any():
                k = int(np.flatnonzero(wrong.any(axis=1))[0])
                raise m.warp_fault(BarrierError, g, k, "reads a lane that does not execute this")
        else:
            named(m, g)
        rows[d][at] = from_warps(g, np.take_along_axis(value, source, axis=1))
        if p is not None:
            m.rows["pred"][p][at] = from_warps(g, inside)

    return x.converged(step, row)


@operation("vote.sync")
def vote(x: Operation) -> Step:
    """all, any, uni and ballot over the member lanes."""
    mode = x.one_of("all", "any", "uni", "ballot")
    kind = x.type("pred", "b32")
    if (mode == "ballot") != (kind == "b32"):
        raise x.unmodelled(f".{mode}.{kind}")
    d = x.dest(0, "u32" if mode == "ballot" else "pred")
    p, negated = x.predicate(1)
    row, named = members(x, 2)

    def step(m: Machine, g: Threads) -> None:
        lanes = named(m, g)
        holds = by_warp(g, m.rows["pred"][p][g.index] ^ negated) & lanes
        if mode == "ballot":
            word = (holds.astype(np.int64) << _LANE).sum(axis=1).astype(np.uint32)
            m.rows["u32"][d][g.index] = from_warps(g, np.repeat(word[:, None], LANES, axis=1))
            return
        everyone, someone = (holds | ~lanes).all(axis=1), holds.any(axis=1)
        result = {"all": everyone, "any": someone, "uni": everyone | ~someone}[mode]
        m.rows["pred"][d][g.index] = from_warps(g, np.repeat(result[:, None], LANES, axis=1))

    return x.converged(step, row)


@operation("match.any.sync", "match.all.sync")
def match(x: Operation) -> Step:
    """Which member lanes hold the same value."""
    mode = x.name.split(".")[1]
    view = {"b32": "u32", "b64": "u64"}[x.type("b32", "b64")]
    first, second = x.pair(0)
    d = x.dest_of(first, "u32")
    p = x.dest_of(second, "pred") if second is not None else None
    a = x.source(1, view)
    row, named = members(x, 2)

    def step(m: Machine, g: Threads) -> None:
        lanes = named(m, g)
        value = by_warp(g, m.rows[view][a][g.index])
        same = (value[:, :, None] == value[:, None, :]) & lanes[:, None, :]
        words = (same.astype(np.int64) << _LANE).sum(axis=2)
        if mode == "all":
            whole = (lanes.astype(np.int64) << _LANE).sum(axis=1)[:, None]
            equal = np.where(lanes, words == whole, True).all(axis=1)[:, None]
            words = np.where(equal, whole, 0)
            if p is not None:
                m.rows["pred"][p][g.index] = from_warps(g, np.repeat(equal, LANES, axis=1))
        m.rows["u32"][d][g.index] = from_warps(g, np.broadcast_to(words, (g.warps, LANES)).astype(np.uint32))

    return x.converged(step, row)


@operation("redux.sync")
def redux(x: Operation) -> Step:
    """Reduce a word over the member lanes."""
    name = x.one_of("add", "min", "max", "and", "or", "xor")
    if "f32" in x.modifiers:
        return _redux_float(x, name)
    kind = x.type("u32", "s32", "b32")
    if (kind == "b32") != (name in ("and", "or", "xor")):
        raise x.unmodelled(f".{name}.{kind}")
    view = "u32" if kind == "b32" else kind
    d, a = x.dest(0, view), x.source(1, view)
    row, named = members(x, 2)
    info = np.iinfo(np.int32 if kind == "s32" else np.uint32)
    reduce, neutral = {
        "add": (np.add.reduce, 0),
        "min": (np.minimum.reduce, info.max),
        "max": (np.maximum.reduce, info.min),
        "and": (np.bitwise_and.reduce, 0xFFFFFFFF),
        "or": (np.bitwise_or.reduce, 0),
        "xor": (np.bitwise_xor.reduce, 0),
    }[name]

    def step(m: Machine, g: Threads) -> None:
        value = by_warp(g, m.rows[view][a][g.index]).astype(np.int64)
        total = reduce(np.where(named(m, g), value, neutral), axis=1)
        total = total.astype(np.uint32).view(info.dtype)
        m.rows[view][d][g.index] = from_warps(g, np.repeat(total[:, None], LANES, axis=1))

    return x.converged(step, row)


def _redux_float(x: Operation, name: str) -> Step:
    """The smallest or largest float of the member lanes, -0 < +0; NaN if all are, with .NaN if one is."""
    magnitude, any_nan = x.flag("abs"), x.flag("NaN")
    x.type("f32")
    if name not in ("min", "max"):
        raise x.unmodelled(f".{name}.f32")
    d, a = x.dest(0, "f32"), x.source(1, "f32")
    row, named = members(x, 2)

    def step(m: Machine, g: Threads) -> None:
        value = by_warp(g, m.rows["f32"][a][g.index])
        if magnitude:
            value = np.abs(value)
        lanes = named(m, g)
        nan = np.isnan(value)
        # As integers, floats lie in order once the negative ones are turned round.
        bits = np.ascontiguousarray(value).view(np.int32).astype(np.int64)
        order = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        usable = lanes & ~nan
        worst = (1 << 40) * (1 if name == "min" else -1)
        best = getattr(np, name)(np.where(usable, order, worst), axis=1)
        total = np.where(best < 0, best ^ 0x7FFFFFFF, best).astype(np.int32).view(np.float32)
        undone = (lanes & nan).any(axis=1) if any_nan else ~usable.any(axis=1)
        total = np.where(undone, _NAN, total)
        m.rows["f32"][d][g.index] = from_warps(g, np.repeat(total[:, None], LANES, axis=1))

    return x.converged(step, row)


@operation("activemask")
def activemask(x: Operation) -> Callable:
    """The lanes that execute together now."""
    x.type("b32")
    d = x.dest(0, "u32")

    def step(m: Machine, g: Threads) -> None:
        words = (present(g).astype(np.int64) << _LANE).sum(axis=1).astype(np.uint32)
        m.rows["u32"][d][g.index] = from_warps(g, np.repeat(words[:, None], LANES, axis=1))

    return step


@operation("elect.sync")
def elect(x: Operation) -> Step:
    """Pick one member lane: the lowest."""
    first, second = x.pair(0)
    d, p = x.dest_of(first, "u32"), x.dest_of(second, "pred")
    row, named = members(x, 1)

    def step(m: Machine, g: Threads) -> None:
        leader = named(m, g).argmax(axis=1)[:, None]
        m.rows["u32"][d][g.index] = from_warps(g, np.broadcast_to(leader, (g.warps, LANES)).astype(np.uint32))
        m.rows["pred"][p][g.index] = from_warps(g, leader == _LANE)

    return x.converged(step, row)


@operation("bar.warp.sync")
def warp_barrier(x: Operation) -> Step:
    """Wait for the member lanes of the warp."""
    row, named = members(x, 0)

    def step(m: Machine, g: Threads) -> None:
        named(m, g)
        if m.watch is not None:
            m.watch.warp_meet(m, g)

    return x.converged(step, row)
