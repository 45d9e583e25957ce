"""Tiles of CTAs that have not begun, for those that are done with their own (`clusterlaunchcontrol`).

A launch has a CTA, or a pair, for each tile. One that runs asks the hardware for the place of one that does
not run yet, which then never starts: tiles of different lengths go to whoever is free, as without asking, but
what a CTA has set up stays. The answer comes by the async proxy into shared memory, of both CTAs of a pair.

    load warp: ask(n)  ...tile n...  all warps: next(n)
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Constexpr, Int32

from ..elementwise import where
from .edge import Edge, Slots
from .group import Group

SLOTS = 2  # answers on their way or not yet read by all: so loads need not wait for the tile before
NBYTES = 16  # of an answer
NOTHING = -1


class Queue(NamedTuple):
    """edge: the first of `Queue.slots`. answers: as many times 16 bytes."""

    edge: Edge
    answers: cute.Pointer

    @staticmethod
    def slots(warps: int) -> Slots:
        """warps: how many read every answer, in all CTAs of the group."""
        return Slots(SLOTS, 1, warps)

    @cute.jit
    def ask(self, n: Int32, group: Constexpr):
        """Ask for what comes after tile n; the load warp of each CTA, while tile n is there."""
        slot = self.edge.of(n % SLOTS)
        if group.leads():
            slot.wait_empty(n // SLOTS)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(slot.full, NBYTES)
            if group.leads():
                answer = self.answers + n % SLOTS
                cute.arch.issue_clc_query(slot.full, answer, multicast=group.paired)

    def next(self, n: Int32, group: Group) -> Int32:
        """The index of the tile after tile n, or NOTHING; every warp."""
        slot = self.edge.of(n % SLOTS)
        slot.wait_full(n // SLOTS)
        block, _, _, given = cute.arch.clc_response(self.answers + n % SLOTS)
        cute.arch.fence_proxy("async.shared", space="cta")
        slot.warp_emptied(group)
        return where(given != 0, block // group.ctas, NOTHING)
