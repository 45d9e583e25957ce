"""Orders that PTX asks for and hardware is known to do without: `Options(by_the_book=True)`.

    bar.warp.sync        before some lanes of a warp arrive at an mbarrier for all: an arrival speaks for its
                         own thread, and for those that it has met since
    tcgen05.fence        before_thread_sync between a thread's loads, stores and products in tensor memory
                         and the arrival that tells of them (a commit implies it), after_thread_sync between a
                         wait and the accesses that it orders
    tcgen05.wait::ld     before a loaded register is used, and before anybody hears that the load is over

flash-attn-4's forward kernels for sm_100, right on hardware, have none of the last two: a kernel without them
is not known to be wrong. Ours are held to the book.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .state import LANES

if TYPE_CHECKING:
    from .state import Threads

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
