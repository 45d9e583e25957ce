"""Atomic updates of threads that meet at one place: one after the other, all places at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..base.formats import flush

MANY = 32  # threads at one place from which on their updates are accumulated apart from those of other places


class Update(NamedTuple):
    """What an atomic operation does. one: (old value, operands) -> new value, on arrays.

    accumulate: (first value, operands in order) -> all new values, None where nothing does that at once.
    """

    one: Callable
    accumulate: Callable | None = None


def _accumulated(function: np.ufunc) -> Update:
    def accumulate(first: np.generic, b: np.ndarray) -> np.ndarray:
        # numpy rounds every sum on the way to the type, in order.
        return function.accumulate(np.concatenate([[first], b]), dtype=b.dtype)[1:]

    return Update(function, accumulate)


def _flushed_add(old: np.ndarray, b: np.ndarray) -> np.ndarray:
    return flush(flush(old) + flush(b))


def _flushed_sums(first: np.generic, b: np.ndarray) -> np.ndarray | None:
    """The sums, None where one on the way is subnormal: it is flushed before the next addition."""
    sums = np.add.accumulate(flush(np.concatenate([[first], b])), dtype=b.dtype)[1:]
    return sums if flush(sums) is sums else None


UPDATES: dict[str, Update] = {
    "add": _accumulated(np.add),
    "flushed add": Update(_flushed_add, _flushed_sums),
    "min": _accumulated(np.minimum),
    "max": _accumulated(np.maximum),
    "and": _accumulated(np.bitwise_and),
    "or": _accumulated(np.bitwise_or),
    "xor": _accumulated(np.bitwise_xor),
    "exch": Update(lambda old, b: b, lambda first, b: b),
    "inc": Update(lambda old, b: np.where(old >= b, 0, old + 1).astype(old.dtype)),
    "dec": Update(lambda old, b: np.where((old == 0) | (old > b), b, old - 1).astype(old.dtype)),
    "cas": Update(lambda old, b, c: np.where(old == b, c, old)),
}


def in_turn(
    places: np.ndarray, found: np.ndarray, operands: list[np.ndarray], update: Update
) -> tuple[np.ndarray, np.ndarray]:
    """(old, new) value of each thread, which finds what the threads before it have left at its place.

    places: numbers, alike where threads meet; found: what memory holds there before; all (n,).
    """
    order = np.argsort(places, kind="stable")
    first = np.flatnonzero(np.diff(places[order], prepend=~places[order[:1]]))
    counts = np.diff(first, append=len(order))
    old, new = found.copy(), np.empty_like(found)
    left = np.ones(len(first), bool)
    for k in np.flatnonzero(counts > MANY) if update.accumulate is not None else ():
        mine = order[first[k] : first[k] + counts[k]]
        values = update.accumulate(found[mine[0]], operands[0][mine])
        if values is not None:
            old[mine[1:]], new[mine] = values[:-1], values
            left[k] = False
    first, counts = first[left], counts[left]
    held = found[order[first]]
    for turn in range(int(counts.max(initial=0))):
        there = counts > turn
        mine = order[first[there] + turn]
        old[mine] = held[there]
        held[there] = new[mine] = update.one(held[there], *(b[mine] for b in operands))
    return old, new
