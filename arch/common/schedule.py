"""Which part of the work a CTA takes."""

from __future__ import annotations

from typing import NamedTuple

from cutlass import Int32, Uint32


class WorkTile(NamedTuple):
    """One row block of one query head of one sequence."""

    m_block: Int32
    head: Int32
    batch: Int32


class OneTile(NamedTuple):
    """One tile per CTA, on a one-dimensional grid (batch and heads may exceed the 65535 of y and z).

    Row blocks are neighbours, so that CTAs running together share a head's K and V in L2. The last row
    block comes first: under a causal mask it has the most to do, and a short tail fills the machine.
    """

    m_blocks: Int32
    heads: Int32
    batches: Int32

    def grid(self) -> tuple[Int32, int, int]:
        return (self.m_blocks * self.heads * self.batches, 1, 1)

    def tile(self, block: Int32) -> WorkTile:
        """The tile of CTA `block`."""
        m_blocks, heads = Uint32(self.m_blocks), Uint32(self.heads)
        outer, inner = Uint32(block) // m_blocks, Uint32(block) % m_blocks
        return WorkTile(self.m_blocks - 1 - Int32(inner), Int32(outer % heads), Int32(outer // heads))
