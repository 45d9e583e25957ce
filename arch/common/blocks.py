"""Which KV blocks a row block visits, in which order, and which of them need the mask evaluated.

    Range     neighbouring blocks, from the last to the first: what a rule's bounds leave
    Listed    the blocks that a block mask lists

Both answer the same questions, so that loops know no difference. A backward pass asks them the other way
round: which blocks of rows the keys of a tile are seen by. A *place* is where a visit stands in the order;
only these classes know what it is. Blocks come in phases that share one loop body each:

    first ........ full_first ........ full_last ........ last
          partly              wholly             partly
          hidden (left)       visible            hidden (right), or beyond seqlen_k

Works on host integers and on device values alike. A phase that the rule's own constants rule out (no
lower bound, never wholly visible) is left out of the list, so it costs no code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..elementwise import maximum, minimum, where
from ..expression import LARGEST_POSITION
from ..problem import Operands, Problem
from ..reverse import EVERYWHERE
from .mask import Everything


class Phase(NamedTuple):
    """Places first <= p < last, empty where first >= last; `masked` where elements need the mask."""

    first: Any
    last: Any
    masked: bool

    @property
    def visits(self):
        return self.last - self.first


@dataclass(frozen=True)
class Range:
    """Neighbouring blocks, from the last to the first. A place is the block's index."""

    phases: list[Phase]

    @property
    def start(self):
        """The first place."""
        return self.phases[0].last - 1

    @property
    def end(self):
        """The last place."""
        return self.phases[-1].first

    lowest = end  # the smallest place

    @property
    def total(self):
        """How many visits there are, where there are any."""
        return self.phases[0].last - self.phases[-1].first

    def any(self):
        return self.phases[-1].first < self.phases[0].last

    def nth(self, phase: Phase, i):
        """Place of the visit number i of a phase."""
        return phase.last - 1 - i

    def after(self, place, steps):
        """The place `steps` visits later; past the end it is not `inside`."""
        return place - steps

    def inside(self, place):
        return place >= self.end

    def takes(self, block):
        """Whether it is visited."""
        return (block >= self.end) & (block <= self.start)

    def is_later(self, place):
        """Whether it is not the first visit."""
        return place < self.start

    def turn(self, place):
        """How many visits come before it."""
        return self.start - place

    def block(self, place):
        """The block visited there, in tiles."""
        return place

    def rest(self) -> Range:
        """The same without the first visit."""
        return Range([phase._replace(last=minimum(phase.last, self.start)) for phase in self.phases])


@dataclass(frozen=True)
class Listed:
    """The blocks of a list in its order, each as `steps` tiles from the last to the first.

    indices: the listed blocks. A place counts tiles from the beginning of the list.
    """

    phases: list[Phase]
    indices: Any
    steps: int

    @property
    def start(self):
        return self.phases[0].first

    lowest = start  # the smallest place

    @property
    def end(self):
        return self.phases[-1].last - 1

    @property
    def total(self):
        return self.phases[-1].last - self.phases[0].first

    def any(self):
        return self.phases[0].first < self.phases[-1].last

    def nth(self, phase: Phase, i):
        return phase.first + i

    def after(self, place, steps):
        return place + steps

    def inside(self, place):
        return place < self.phases[-1].last

    def is_later(self, place):
        return place > self.start

    def turn(self, place):
        return place - self.start

    def block(self, place):
        if self.steps == 1:
            return self.indices[place]
        listed = place // self.steps
        return (self.indices[listed] + listed + 1) * self.steps - 1 - place

    def rest(self) -> Listed:
        second = self.start + 1
        return replace(self, phases=[p._replace(first=maximum(p.first, second)) for p in self.phases])


def visits_of(
    problem: Problem, tile: tuple[int, int], call: Operands, rules, sequence, first_row
) -> Range | Listed:
    """What rows visit. tile: how many, from `first_row` on, and keys of a block. rules, sequence: theirs."""
    rows, tile_n = tile
    if problem.block_size:
        block_q, block_k = problem.block_size
        counts, indices = _lists(call, rules, first_row, block_q)
        tiles = _ceil_div(rules.seqlen_k, tile_n)
        return listed(indices, counts, block_k // tile_n, tiles, rules.mask is not None)
    seqlen_k = rules.seqlen_k
    end_row = minimum(first_row + rows, sequence.seqlen_q)
    if problem.seqused_q:
        seqlen_k = where(first_row < sequence.seqlen_q, seqlen_k, 0)  # rows out of use see nothing
    about = first_row + sequence.offset, end_row - 1 + sequence.offset, seqlen_k
    mask = rules.mask or Everything()
    return Range(phases(mask.keys(*about), mask.full(*about), seqlen_k, tile_n))


def visits_from_keys(
    problem: Problem, tile: tuple[int, int], call: Operands, rules, sequence, first_key
) -> Range | Listed:
    """The blocks of rows that see keys. tile: rows of a block, and how many keys, from `first_key` on.

    rules: with a mask as `reverse.seen_from_keys` gives it. call: its block mask's lists are those of keys.
    Where some of the keys are beyond seqlen_k every block is masked. Rows beyond seqlen_q never are: they
    have no probabilities. Keys that are all beyond seqlen_k are seen by none.
    """
    tile_m, keys = tile
    whole = first_key + keys <= rules.seqlen_k
    tiles = _ceil_div(where(first_key < rules.seqlen_k, sequence.seqlen_q, 0), tile_m)
    if problem.block_size:
        block_q, block_k = problem.block_size
        counts, indices = _lists(call, rules, first_key, block_k)
        visits = listed(indices, counts, block_q // tile_m, tiles, True)
        partial, full = visits.phases
        middle = where(whole, partial.first if rules.mask is None else partial.last, full.last)
        return replace(visits, phases=[partial._replace(last=middle), full._replace(first=middle)])
    seen, full = EVERYWHERE, EVERYWHERE
    if rules.mask is not None:
        about = first_key, minimum(first_key + keys, rules.seqlen_k) - 1
        seen, full = rules.mask.queries(*about), rules.mask.full_queries(*about)
    low, high = _rows(full, sequence)
    full = where(whole, low, LARGEST_POSITION), high
    return Range(phases(_rows(seen, sequence), full, tiles * tile_m, tile_m))


def _lists(call: Operands, rules, first, size: int):
    """Counts and indices of the block, of this size, that a row or a key is in."""
    return tuple(of_block(table, rules, first // size) for table in (call.block_counts, call.block_indices))


def of_block(table, rules, block):
    """What a table of a block mask has for a block of rows, or of keys."""
    batches, heads = table.shape[:2]  # each may be 1: the same for all
    return table[(minimum(rules.batch, batches - 1), minimum(rules.head, heads - 1), block, None)]


def _rows(positions, sequence):
    """A range of rows from one of positions; an end that is open stays so."""
    first, beyond = sequence.offset, sequence.seqlen_k
    return tuple(
        end if _is_open(end) else minimum(maximum(end, first), beyond) - first for end in positions
    )


def phases(seen, full, length, tile: int) -> list[Phase]:
    """Phases, in blocks of `tile`, in visiting order, of ranges (low, high) inside 0 <= x < length.

    seen: outside of it there is nothing to visit. full: inside of it no mask is needed; a high end that is
    open, a plain number, takes in a last block that is not whole.
    """
    (low, high), (full_low, full_high) = seen, full
    first = maximum(low, 0) // tile
    last = _ceil_div(maximum(minimum(high, length), 0), tile)
    if _never_positive(full_high):
        return [Phase(first, last, True)]
    if _is_open(full_high):
        full_last, right = last, []
    else:
        full_last = maximum(minimum(full_high, length), 0) // tile
        full_last = minimum(maximum(full_last, first), last)
        right = [Phase(full_last, last, True)]
    if _never_positive(full_low):
        return [*right, Phase(first, full_last, False)]
    full_first = minimum(maximum(_ceil_div(maximum(full_low, 0), tile), first), full_last)
    return [*right, Phase(full_first, full_last, False), Phase(first, full_first, True)]


def listed(indices, counts, steps: int, tiles, has_rule: bool) -> Listed:
    """Visits of a row of a block mask: counts = (partial, full) blocks of `indices`, `steps` tiles each.

    tiles: how many the keys fill. Only the first block of the list may reach beyond them: its tiles that
    hold no key are left out, and of the others only its last may hold a part of one. So without a rule
    just the first visit is masked.
    """
    partial, last = counts[0] * steps, (counts[0] + counts[1]) * steps
    first = maximum((indices[0] + 1) * steps - tiles, 0)
    middle = partial if has_rule else minimum(first + 1, last)
    return Listed([Phase(first, middle, True), Phase(middle, last, False)], indices, steps)


def part_of(visits: Range | Listed, part, parts) -> Range | Listed:
    """Of these visits, the `part`-th of `parts` parts, as equal as whole blocks allow."""
    first, count = visits.lowest, maximum(visits.total, 0)
    low, high = first + count * part // parts, first + count * (part + 1) // parts
    clipped = [Phase(maximum(p.first, low), minimum(p.last, high), p.masked) for p in visits.phases]
    return replace(visits, phases=clipped)


def _never_positive(bound) -> bool:
    """True where a bound is known to be 0 or less without running anything."""
    return isinstance(bound, int) and bound <= 0


def _is_open(bound) -> bool:
    """True where a bound is known to be beyond every position without running anything."""
    return isinstance(bound, int) and abs(bound) >= LARGEST_POSITION


def _ceil_div(x, n: int):
    return (x + (n - 1)) // n
