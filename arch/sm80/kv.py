"""K and V blocks on their way to shared memory: cp.async, in the order of visits, `stages` tiles of each.

Groups are committed in the order K V K V ..., one per call and empty past the last visit, so that
whenever a tile is waited for exactly 2 (stages - 1) groups are younger.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Int32

from ..common.blocks import Listed, Range
from ..common.order import hidden_zero
from .copy import TileCopy
from .rows import Rows, beyond


class Source(NamedTuple):
    """K or V: global rows of the sequence, and this thread's chunks of its shared tiles."""

    rows: Rows
    chunks: cute.Tensor


class KvStream(NamedTuple):
    """The blocks to visit; nothing from row seqlen_k on is touched. v: None where V is part of K."""

    k: Source
    v: Source | None
    visits: Range | Listed
    seqlen_k: Int32
    thread: Int32


class KvLoader:
    """How a KvStream's tiles are filled: settled at compile time."""

    def __init__(self, copy_k: TileCopy, copy_v: TileCopy, tile_n: int, stages: int):
        self.copy_k, self.copy_v = copy_k, copy_v
        self.tile_n, self.stages = tile_n, stages

    @property
    def groups_begun(self) -> int:
        """Groups that `begin` commits."""
        return max(2, 2 * self.stages - 1)

    def slot(self, place: Int32) -> Int32:
        """Which tile has a visit's block when it has been waited for."""
        return self.stage(place)

    def stage(self, place: Int32) -> Int32:
        """Which of the `stages` tiles a visit's block is copied to."""
        return hidden_zero(place) if self.stages == 1 else place % self.stages

    def begin(self, stream: KvStream) -> None:
        """Begin the tiles that `begin_k` and `begin_v` leave out: K of the first `stages` blocks visited,
        V of one less, but at least of the very first, the only one that may reach beyond seqlen_k.
        """
        self.clear_padding(stream)
        visits = stream.visits
        for stage in range(self.stages):
            place = visits.after(visits.start, stage)
            self._begin(stream, stream.k, self.copy_k, place, visits.inside(place), stage == 0)
            if stage + 1 < self.stages or stage == 0:
                self._begin(stream, stream.v, self.copy_v, place, visits.inside(place), stage == 0)

    def clear_padding(self, stream: KvStream) -> None:
        """Zero the columns that no copy writes."""
        self.copy_k.clear_padding(stream.k.chunks, stream.thread)
        self.copy_v.clear_padding(stream.v.chunks, stream.thread)

    def begin_k(self, stream: KvStream, place: Int32) -> None:
        """Begin copying K of the visit `stages` after a place, if there is one; its slot must be free."""
        place = stream.visits.after(place, self.stages)
        self._begin(stream, stream.k, self.copy_k, place, stream.visits.inside(place), False)

    def begin_v(self, stream: KvStream, place: Int32) -> None:
        """Begin copying V of the visit `stages` - 1 after a place, if there is one; its slot must be free."""
        place = stream.visits.after(place, self.stages - 1)
        due = stream.visits.inside(place)
        if self.stages == 1:
            due = due & stream.visits.is_later(place)
        self._begin(stream, stream.v, self.copy_v, place, due, False)

    def wait_k(self, stream: KvStream, place: Int32) -> None:
        """K of the visit at a place is complete and visible to all warps; they are done with the V before."""
        cute.arch.cp_async_wait_group(2 * (self.stages - 1))
        cute.arch.barrier()

    def wait_v(self, stream: KvStream, place: Int32) -> None:
        """V of the visit at a place is complete and visible to all warps; they are done with the K before."""
        self.wait_k(stream, place)

    @cute.jit
    def _begin(self, stream: Constexpr, source, copy, place: Int32, due: Boolean, bounded: Constexpr):
        if due:
            first_row = self._first_row(stream, place)
            rows = beyond(source.rows, first_row)
            last_row = stream.seqlen_k - 1 - first_row if bounded else None
            copy.load(rows, self.chunks(stream, source, copy, place), stream.thread, last_row)
        cute.arch.cp_async_commit_group()

    def chunks(self, stream: KvStream, source: Source, copy: TileCopy, place: Int32) -> cute.Tensor:
        """This thread's chunks of the tile that a visit's block is copied to."""
        return source.chunks[None, None, None, self.stage(place)]

    def _first_row(self, stream: KvStream, place: Int32) -> Int32:
        return stream.visits.block(place) * self.tile_n


class LatentLoader(KvLoader):
    """As `KvLoader`, where V is K's first columns: a block is one tile, `stages` of them, at least two.

    A group for each visit. A tile is read until its P V is done, so its slot is filled again from the next
    visit's wait on.
    """

    @property
    def groups_begun(self) -> int:
        """Groups that `begin` commits."""
        return self.stages - 1

    def begin(self, stream: KvStream) -> None:
        """Begin the tiles of the first `stages` - 1 visits."""
        self.copy_k.clear_padding(stream.k.chunks, stream.thread)
        visits = stream.visits
        for stage in range(self.stages - 1):
            place = visits.after(visits.start, stage)
            self._begin(stream, stream.k, self.copy_k, place, visits.inside(place), stage == 0)

    def begin_v(self, stream: KvStream, place: Int32) -> None:
        """Begin copying the tile of the visit `stages` - 1 after a place, if there is one, to the slot that
        the visit before was done with.
        """
        place = stream.visits.after(place, self.stages - 1)
        self._begin(stream, stream.k, self.copy_k, place, stream.visits.inside(place), False)

    def begin_k(self, stream: KvStream, place: Int32) -> None:
        """It came with the V before it."""

    def wait_k(self, stream: KvStream, place: Int32) -> None:
        """The next tile is complete and visible to all warps; they are done with the one before it."""
        cute.arch.cp_async_wait_group(self.stages - 2)
        cute.arch.barrier()

    def wait_v(self, stream: KvStream, place: Int32) -> None:
        """It is there, as K."""
