"""Which KV blocks a row block visits, and which of them need the mask evaluated.

Blocks are visited from the last to the first, in up to three phases that share one loop body each:

    first ........ full_first ........ full_last ........ last
          partly              wholly             partly
          hidden (left)       visible            hidden (right), or beyond seqlen_k

Works on host integers and on device values alike. A phase that the rule's own constants rule out (no
lower bound, never wholly visible) is left out of the list, so it costs no code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..elementwise import maximum, minimum
from .mask import Mask


class Phase(NamedTuple):
    """Blocks first <= n < last, empty where first >= last; `masked` where elements need the mask."""

    first: Any
    last: Any
    masked: bool


def phases(mask: Mask, q_first, q_last, seqlen_k, tile_n: int) -> list[Phase]:
    """Phases of the row block whose queries stand at q_first..q_last, in visiting order."""
    low, high = mask.keys(q_first, q_last, seqlen_k)
    full_low, full_high = mask.full(q_first, q_last, seqlen_k)
    first = maximum(low, 0) // tile_n
    last = _ceil_div(maximum(minimum(high, seqlen_k), 0), tile_n)
    if _never_positive(full_high):
        return [Phase(first, last, True)]
    full_last = maximum(minimum(full_high, seqlen_k), 0) // tile_n
    full_last = minimum(maximum(full_last, first), last)
    if _never_positive(full_low):
        return [Phase(full_last, last, True), Phase(first, full_last, False)]
    full_first = minimum(maximum(_ceil_div(maximum(full_low, 0), tile_n), first), full_last)
    return [Phase(full_last, last, True), Phase(full_first, full_last, False), Phase(first, full_first, True)]


def part_of(blocks: list[Phase], part, parts) -> list[Phase]:
    """Of the blocks of these phases, the `part`-th of `parts` parts, as equal as whole blocks allow."""
    first = blocks[-1].first
    count = maximum(blocks[0].last - first, 0)
    low, high = first + count * part // parts, first + count * (part + 1) // parts
    return [Phase(maximum(p.first, low), minimum(p.last, high), p.masked) for p in blocks]


def _never_positive(bound) -> bool:
    """True where a bound is known to be 0 or less without running anything."""
    return isinstance(bound, int) and bound <= 0


def _ceil_div(x, n: int):
    return (x + (n - 1)) // n
