"""Edges: one slot that one role fills and others empty, in turns, with tensor memory in it.

A turn is counted from 0. The slot's n-th filling is complete when `full` completes its n-th phase, and free
for the next when `empty` does; so a role that counts its blocks needs no other state. What tensor memory
operations a thread began before it arrives are ordered before those that follow another thread's wait: that
takes a fence on each side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32
from cutlass._mlir.dialects import nvvm

from .group import ALONE, Group


@dataclass(frozen=True)
class Slots:
    """`count` neighbouring edges of one slot each: `fills` arrivals make it full, `empties` empty.

    empties: 0 where other edges tell who fills that it may.
    """

    count: int
    fills: int
    empties: int

    @property
    def barriers(self) -> int:
        """How many they take."""
        return self.count * (2 if self.empties else 1)

    def make(self, barriers: cute.Pointer) -> None:
        """Make them in so many `barriers`; one thread of the CTA calls this, before `Group.ready`."""
        for i in range(self.barriers):
            cute.arch.mbarrier_init(barriers + i, self.fills if i < self.count else self.empties)

    def at(self, barriers: cute.Pointer) -> Edge:
        """The first of them."""
        return Edge(barriers, barriers + self.count if self.empties else None)


class Edge(NamedTuple):
    """`full` and `empty`: 8-byte barriers in shared memory; see `Slots`."""

    full: cute.Pointer
    empty: cute.Pointer | None

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
