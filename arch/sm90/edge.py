"""Edges: slots that warps fill with ordinary stores and others empty, in turns counted from 0."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from ..common.topology import Barriers


class Edge(NamedTuple):
    """`full` and `empty`: 8-byte barriers in shared memory, of the first of a link's slots."""

    full: cute.Pointer
    empty: cute.Pointer

    @staticmethod
    def at(base: cute.Pointer, barriers: Barriers) -> Edge:
        """A link's edges. base: the CTA's barriers."""
        full = base + barriers.first
        return Edge(full, full + barriers.slots)

    def make(self, barriers: Barriers) -> None:
        """Make them; one thread of the CTA calls this, before `channels_ready`."""
        for i in range(barriers.slots):
            cute.arch.mbarrier_init(self.full + i, barriers.full_arrivals)
            cute.arch.mbarrier_init(self.empty + i, barriers.empty_arrivals)

    def of(self, index: Int32) -> Edge:
        """One of the neighbouring edges."""
        return Edge(self.full + index, self.empty + index)

    def wait_full(self, turn: Int32) -> None:
        """Wait for filling `turn`."""
        cute.arch.mbarrier_wait(self.full, turn & 1)

    def wait_empty(self, turn: Int32) -> None:
        """Wait until filling `turn` may begin: the one before has been emptied."""
        cute.arch.mbarrier_wait(self.empty, (turn & 1) ^ 1)

    def warp_filled(self) -> None:
        """This warp has done its share of filling, for bulk copies to read."""
        cute.arch.fence_proxy("async.shared", space="cta")
        warp_arrives(self.full)

    def warp_emptied(self) -> None:
        """This warp has emptied the slot."""
        warp_arrives(self.empty)


def warp_arrives(barrier: cute.Pointer) -> None:
    """One arrival for the warp, when all its threads have come here."""
    cute.arch.sync_warp()
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive(barrier)
