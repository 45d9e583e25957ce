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

from ..common.topology import Barriers
from .group import ALONE, Group


class Edge(NamedTuple):
    """`full` and `empty`: 8-byte barriers in shared memory, of the first of a link's slots."""

    full: cute.Pointer
    empty: cute.Pointer | None

    @staticmethod
    def at(base: cute.Pointer, barriers: Barriers) -> Edge:
        """A link's edges. base: the CTA's barriers."""
        full = base + barriers.first
        return Edge(full, full + barriers.slots if barriers.empty_arrivals else None)

    def make(self, barriers: Barriers) -> None:
        """Make them; one thread of the CTA calls this, before `Group.ready`."""
        for i in range(barriers.count):
            arrivals = barriers.full_arrivals if i < barriers.slots else barriers.empty_arrivals
            cute.arch.mbarrier_init(self.full + i, arrivals)

    def of(self, index: int | Int32) -> Edge:
        """One of the neighbouring edges."""
        return Edge(self.full + index, None if self.empty is None else self.empty + index)

    def wait_full(self, turn: int | Int32) -> None:
        """Wait for filling `turn`."""
        cute.arch.mbarrier_wait(self.full, turn & 1)
        after_sync()

    def wait_empty(self, turn: int | Int32) -> None:
        """Wait until filling `turn` may begin: the one before has been emptied."""
        cute.arch.mbarrier_wait(self.empty, (turn & 1) ^ 1)
        after_sync()

    def warp_filled(self, group: Group = ALONE, tensor: bool = False) -> None:
        """This warp has done its share of filling, of which the group's leader keeps account.

        tensor: of tensor memory alone; see `Group.arrive`.
        """
        warp_arrives(self.full, group, tensor)

    def warp_emptied(self, group: Group = ALONE, tensor: bool = False) -> None:
        """This warp has done its share of emptying, likewise."""
        warp_arrives(self.empty, group, tensor)

    def filled_by_mma(self, group: Group) -> None:
        """Full, in every CTA of the group, when every product that this warp has begun is complete."""
        with cute.arch.elect_one():
            group.commit(self.full)

    def emptied_by_mma(self, group: Group) -> None:
        """Empty, in every CTA of the group, when every product that this warp has begun is complete."""
        with cute.arch.elect_one():
            group.commit(self.empty)


def warp_arrives(barrier: cute.Pointer, group: Group = ALONE, tensor: bool = False) -> None:
    """One arrival at the leader's barrier for the warp, when all its threads have come here."""
    before_sync()
    cute.arch.sync_warp()
    with cute.arch.elect_one():
        group.arrive(barrier, tensor)


def before_sync() -> None:
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC)


def after_sync() -> None:
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC)
