"""Steps that apply an array function to register rows, thread by thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..translate.translation import Operation

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads

# PTX type -> the view its values are held under. bf16 is held as its bit pattern.
INTEGER_VIEWS = {
    f"{letter}{bits}": f"{'s' if letter == 's' else 'u'}{bits}" for bits in (16, 32, 64) for letter in "bus"
}


def apply(function: Callable, dest: tuple[int, str], *sources: tuple[int, str]) -> Callable:
    """A plain step: dest = function(*sources), each given as (row, view)."""
    d, dv = dest
    if len(sources) == 1:
        ((a, av),) = sources

        def one(m: Machine, g: Threads) -> None:
            at, rows = g.index, m.rows
            rows[dv][d][at] = function(rows[av][a][at])

        return one
    if len(sources) == 2:
        (a, av), (b, bv) = sources

        def two(m: Machine, g: Threads) -> None:
            at, rows = g.index, m.rows
            rows[dv][d][at] = function(rows[av][a][at], rows[bv][b][at])

        return two
    (a, av), (b, bv), (c, cv) = sources

    def three(m: Machine, g: Threads) -> None:
        at, rows = g.index, m.rows
        rows[dv][d][at] = function(rows[av][a][at], rows[bv][b][at], rows[cv][c][at])

    return three


def elementwise(x: Operation, function: Callable, dest_view: str, *source_views: str) -> Callable:
    """The step for an instruction d, a, b, … whose operands are read and written under the given views."""
    dest = x.dest(0, dest_view), dest_view
    return apply(function, dest, *((x.source(k, view), view) for k, view in enumerate(source_views, 1)))
