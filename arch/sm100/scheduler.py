"""Tiles of CTAs that have not begun, for those that are done with their own (`clusterlaunchcontrol`).

A launch has a CTA, or a pair, for each tile. One that runs asks the hardware for the place of one that does
not run yet, which then never starts: tiles of different lengths go to whoever is free, as without asking, but
what a CTA has set up stays. The answer comes by the async proxy into shared memory, of both CTAs of a pair.

    load warp: fetch(n)  ...tile n...  all warps: next(n)
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Constexpr, Int32

from ..elementwise import where
from .config import ANSWERS
from .edge import Edge
from .group import Group

NBYTES = 16  # of an answer
NOTHING = -1


class ClcScheduler(NamedTuple):
    """edge: of ANSWERS slots, which every warp of the group reads. answers: as many times 16 bytes."""

    edge: Edge
    answers: cute.Pointer

    @cute.jit
    def fetch(self, n: Int32, group: Constexpr):
        """Ask for what comes after tile n; the load warp of each CTA, while tile n is there."""
        slot = self.edge.of(n % ANSWERS)
        if group.leads():
            slot.wait_empty(n // ANSWERS)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(slot.full, NBYTES)
            if group.leads():
                answer = self.answers + n % ANSWERS
                cute.arch.issue_clc_query(slot.full, answer, multicast=group.paired)

    def next(self, n: Int32, group: Group) -> Int32:
        """The index of the tile after tile n, or NOTHING; every warp."""
        slot = self.edge.of(n % ANSWERS)
        slot.wait_full(n // ANSWERS)
        block, _, _, given = cute.arch.clc_response(self.answers + n % ANSWERS)
        cute.arch.fence_proxy("async.shared", space="cta")
        slot.warp_emptied(group)
        return where(given != 0, block // group.ctas, NOTHING)
