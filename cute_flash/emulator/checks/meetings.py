"""Lanes of a warp that know of each other's accesses.

An arrival at an mbarrier speaks for the thread that arrives. Where some lanes of a warp arrive for all, they
must have met the others since: at bar.warp.sync, or at a barrier of the CTA or cluster; if they have not,
nobody learns of anything that the warp has done since. elect.sync, vote and shfl order nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..core.state import LANES

if TYPE_CHECKING:
    from ..core.state import Threads

EVERY_LANE = (1 << LANES) - 1


def lanes_of(g: Threads) -> np.ndarray:
    """Which lanes of each of its warps a set holds, as bits, int64 (warps,)."""
    if g.whole:
        return np.full(g.warps, EVERY_LANE, np.int64)
    words = np.packbits(g.mask[g.warp_at, g.cta_at], axis=1, bitorder="little").view("<u4")
    return words[:, 0].astype(np.int64)


class Meetings:
    """Since when which lanes of a warp have not met.

    touched[cluster, warp]: bits of the lanes that have accessed memory since; met: the epoch that ended then.
    """

    def __init__(self, clusters: int, warps: int):
        self.touched = np.zeros((clusters, warps), np.int64)
        self.met = np.zeros((clusters, warps), np.int32)

    def meet(self, clock: np.ndarray, cluster: int, warp: int, lanes: int = EVERY_LANE) -> None:
        """Some lanes meet; the warp's next epoch begins if they are all that have touched anything."""
        if not self.touched[cluster, warp] & ~lanes:
            self.met[cluster, warp] = clock[cluster, warp, warp]
            clock[cluster, warp, warp] += 1
            self.touched[cluster, warp] = 0

    def speaks_for_all(self, cluster: int, warp: int, lanes: int) -> bool:
        """Whether lanes that arrive know of everything that their warp has done."""
        return not self.touched[cluster, warp] & ~lanes
