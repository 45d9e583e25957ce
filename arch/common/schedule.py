"""Which part of the work a CTA takes."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32, Uint32

from ..elementwise import maximum, minimum, where
from ..scheduled import Schedule


class WorkTile(NamedTuple):
    """One row block of one query head of one sequence; `split` counts the parts of its keys."""

    m_block: Int32
    head: Int32
    batch: Int32
    split: Int32 | int = 0


class OneTile(NamedTuple):
    """One tile per CTA, on a one-dimensional grid (batch and heads may exceed the 65535 of y and z).

    Row blocks are neighbours, so that CTAs running together share a head's K and V in L2. The last row
    block comes first: under a causal mask it has the most to do, and a short tail fills the machine.
    """

    m_blocks: Int32
    heads: Int32
    batches: Int32

    def grid(self) -> tuple[Int32, int, int]:
        return (self.count, 1, 1)

    @property
    def count(self) -> Int32:
        return self.m_blocks * self.heads * self.batches

    def tile(self, block: Int32) -> WorkTile:
        """The tile of CTA `block`."""
        m_blocks, heads = Uint32(self.m_blocks), Uint32(self.heads)
        outer, inner = Uint32(block) // m_blocks, Uint32(block) % m_blocks
        return WorkTile(self.m_blocks - 1 - Int32(inner), Int32(outer % heads), Int32(outer // heads))

    def splits_of(self, batch: Int32) -> int:
        """In how many parts the keys of a sequence are taken."""
        return 1


class InSections(NamedTuple):
    """Tiles in an order for L2 and for a short tail; `tile(i)` for i < count.

    The pairs (sequence, head) are taken in sections of `together` neighbours, few enough that L2 holds their
    keys and values. Inside a section all last row blocks come first, then all last but one: under a causal
    mask, and where sequences have different lengths, that is longest first. With `together` 1 the row blocks
    of one head are neighbours. The splits of a tile are.
    """

    m_blocks: Int32
    heads: Int32
    batches: Int32
    splits: Int32 | int
    together: Int32 | int

    def grid(self) -> tuple[Int32, int, int]:
        """A CTA for each tile."""
        return (self.count, 1, 1)

    @property
    def count(self) -> Int32:
        return self.m_blocks * self.heads * self.batches * self.splits

    def tile(self, i: Int32) -> WorkTile:
        """Tile `i`."""
        heads, splits, together = (Uint32(n) for n in (self.heads, self.splits, self.together))
        rest, split = Uint32(i) // splits, Uint32(i) % splits
        size = Uint32(self.m_blocks) * together
        first, rest = rest // size * together, rest % size
        left = heads * Uint32(self.batches) - first
        width = where(together < left, together, left)
        pair = first + rest % width
        m_block = self.m_blocks - 1 - Int32(rest // width)
        return WorkTile(m_block, Int32(pair % heads), Int32(pair // heads), Int32(split))

    def splits_of(self, batch: Int32) -> Int32 | int:
        """In how many parts the keys of a sequence are taken."""
        return self.splits


class WithoutDivisions(NamedTuple):
    """`InSections` by multiplications and shifts: what it divides by is known when a kernel is launched.

    The host computes their factors. by_splits: None where keys are not split. by_section: tiles of a section.
    by_together, by_last: pairs in a section and in the last one, None where each has one pair.
    """

    order: InSections
    by_splits: cute.FastDivmodDivisorV2 | None
    by_section: cute.FastDivmodDivisorV2
    by_together: cute.FastDivmodDivisorV2 | None
    by_last: cute.FastDivmodDivisorV2 | None
    by_heads: cute.FastDivmodDivisorV2

    @staticmethod
    def of(order: InSections) -> WithoutDivisions:
        """On the host. `splits` and `together` of the order are Python's 1 where they always are."""
        pairs = order.heads * order.batches
        splits, by_together, by_last = None, None, None
        if not isinstance(order.splits, int):
            splits = divisor(order.splits)
        if not isinstance(order.together, int):
            together = maximum(order.together, 1)
            last = pairs - maximum(pairs - 1, 0) // together * together
            by_together, by_last = divisor(together), divisor(last)
        by_section = divisor(order.m_blocks * order.together)
        return WithoutDivisions(order, splits, by_section, by_together, by_last, divisor(order.heads))

    def grid(self) -> tuple[Int32, int, int]:
        """A CTA for each tile."""
        return self.order.grid()

    @property
    def count(self) -> Int32:
        return self.order.count

    def splits_of(self, batch: Int32) -> Int32 | int:
        """In how many parts the keys of a sequence are taken."""
        return self.order.splits_of(batch)

    def tile(self, i: Int32) -> WorkTile:
        """Tile `i`."""
        order, split = self.order, 0
        if self.by_splits is not None:
            i, split = divmod(i, self.by_splits)
        section, place = divmod(i, self.by_section)
        pair, up = section, place
        if self.by_together is not None:
            first = section * order.together
            left = order.heads * order.batches - first
            up = where(order.together <= left, place // self.by_together, place // self.by_last)
            pair = first + place - up * minimum(order.together, left)
        batch, head = divmod(pair, self.by_heads)
        return WorkTile(order.m_blocks - 1 - up, head, batch, split)


class InOrder(NamedTuple):
    """The tiles of another schedule, in its places, with sequences in an order that tensors hold.

    order, parts: int32 (batch,), the sequences, and in how many parts the keys of each are taken, no more
    than there are places for; None: in as many. A place beyond them is a split without keys.
    """

    places: OneTile | InSections | WithoutDivisions
    order: cute.Tensor
    parts: cute.Tensor | None

    def grid(self) -> tuple[Int32, int, int]:
        """A CTA for each place."""
        return self.places.grid()

    @property
    def count(self) -> Int32:
        return self.places.count

    def tile(self, i: Int32) -> WorkTile:
        """The tile in place `i`."""
        tile = self.places.tile(i)
        return tile._replace(batch=self.order[tile.batch])

    def splits_of(self, batch: Int32) -> Int32 | int:
        """In how many parts the keys of a sequence are taken."""
        return self.places.splits_of(batch) if self.parts is None else self.parts[batch]


def in_order(
    places: OneTile | InSections | WithoutDivisions, given: Schedule | None
) -> OneTile | InSections | WithoutDivisions | InOrder:
    """The schedule of a launch that is given an order, or is not."""
    return places if given is None else InOrder(places, given.sequence_order, given.sequence_splits)


def divisor(n: Int32) -> cute.FastDivmodDivisorV2:
    """What numbers that are not negative are divided by, n or, where that is 0 and nothing is launched, 1."""
    return cute.FastDivmodDivisorV2(maximum(n, 1))


def tile_per_cta(
    m_blocks: Int32, heads: Int32, batches: Int32, splits: Int32 | None
) -> OneTile | InSections:
    """A CTA for each row block of each head, or where keys are split for each of its `splits`."""
    if splits is None:
        return OneTile(m_blocks, heads, batches)
    return InSections(*map(Int32, (m_blocks, heads, batches, splits, 1)))
