"""Edges: one slot that one role fills and others empty, in turns, with tensor memory in it.

A turn is counted from 0. The slot's n-th filling is complete when `full` completes its n-th phase, and free
for the next when `empty` does; so a role that counts its blocks needs no other state. What tensor memory
operations a thread began before it arrives are ordered before those that follow another thread's wait: that
takes a fence on each side.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32
from cutlass._mlir.dialects import nvvm

from .group import ALONE, Group


class Edge(NamedTuple):
    """`full` and `empty`: 8-byte barriers in shared memory, of the first of several neighbouring edges."""

    full: cute.Pointer
    empty: cute.Pointer

    @staticmethod
    def make(barriers: cute.Pointer, edges: int, fills: int, empties: int) -> Edge:
        """`edges` neighbours in 2 * edges barriers; `fills` arrivals make a slot full, `empties` empty.

        One thread of the CTA calls this, before `Group.ready`.
        """
        for i in range(edges):
            cute.arch.mbarrier_init(barriers + i, fills)
            cute.arch.mbarrier_init(barriers + edges + i, empties)
        return Edge.at(barriers, edges)

    @staticmethod
    def at(barriers: cute.Pointer, edges: int) -> Edge:
        """Edges that `make` has made there."""
        return Edge(barriers, barriers + edges)

    def of(self, index: int | Int32) -> Edge:
        """One of the neighbouring edges."""
        return Edge(self.full + index, self.empty + index)

    def wait_full(self, turn: int | Int32) -> None:
        """Wait for filling `turn`."""
        cute.arch.mbarrier_wait(self.full, turn & 1)
        after_sync()

    def wait_empty(self, turn: int | Int32) -> None:
        """Wait until filling `turn` may begin: the one before has been emptied."""
        cute.arch.mbarrier_wait(self.empty, (turn & 1) ^ 1)
        after_sync()

    def warp_filled(self) -> None:
        """This warp has done its share of filling."""
        warp_arrives(self.full)

    def warp_emptied(self, group: Group = ALONE) -> None:
        """This warp has done its share of emptying, of which the group's leader keeps account."""
        warp_arrives(self.empty, group)

    def filled_by_mma(self, group: Group) -> None:
        """Full, in every CTA of the group, when every product that this warp has begun is complete."""
        with cute.arch.elect_one():
            group.commit(self.full)


def warp_arrives(barrier: cute.Pointer, group: Group = ALONE) -> None:
    """One arrival at the leader's barrier for the warp, when all its threads have come here."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC)
    cute.arch.sync_warp()
    with cute.arch.elect_one():
        group.arrive(barrier)


def after_sync() -> None:
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC)
