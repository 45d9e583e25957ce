"""What CTAs and warps of one launch share beside memory: the cluster's barrier, and the pool of registers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import BarrierError, EmulatorError
from ..core.machine import Machine, Part
from ..core.state import LANES

if TYPE_CHECKING:
    from ..core.state import Threads

REGISTERS = 65536  # of a multiprocessor
MOST_REGISTERS = 255  # of a thread, at launch


class ClusterBarriers(Part):
    """barrier.cluster of every cluster: complete when all threads that have not exited have arrived."""

    def __init__(self, m: Machine):
        super().__init__(m)
        clusters = m.ctas // m.cluster
        self.phase = np.zeros(clusters, np.int64)
        self.arrived = np.zeros((m.warps, m.ctas), bool)
        self.waited = np.ones((m.warps, m.ctas), bool)  # warps that may arrive
        self.due = np.zeros((m.warps, m.ctas), np.int64)  # the phase whose end a warp waits for

    def arrive(self, g: Threads) -> None:
        """Whole warps arrive; each must have waited for the phase before."""
        m = self.machine
        early = ~self.waited[g.warp_at, g.cta_at]
        if early.any():
            k = int(np.flatnonzero(early)[0])
            raise m.warp_fault(BarrierError, g, k, "arrives twice at the cluster's barrier without a wait")
        self.arrived[g.warp_at, g.cta_at] = True
        self.waited[g.warp_at, g.cta_at] = False
        self.due[g.warp_at, g.cta_at] = self.phase[g.cta_at // m.cluster]
        self.release()

    def release(self) -> None:
        """Begin the next phase of every cluster whose threads have all arrived."""
        m = self.machine
        missing = m.live.any(axis=2) & ~self.arrived
        missing = missing.reshape(m.warps, -1, m.cluster).any(axis=(0, 2))
        some = self.arrived.reshape(m.warps, -1, m.cluster).any(axis=(0, 2))
        for cluster in np.flatnonzero(some & ~missing):
            self.phase[cluster] += 1
            self.arrived[:, cluster * m.cluster : (cluster + 1) * m.cluster] = False
            m.wake(self.key(cluster))

    def exited(self) -> list[tuple[int, Threads]]:
        if self.arrived.any():
            self.release()
        return []

    def key(self, cluster: int) -> str:
        """What waits for a cluster's barrier is parked under."""
        return f"the barrier of cluster {cluster}"

    def passed(self, g: Threads) -> np.ndarray:
        """Whether each warp may leave: bool (warps,)."""
        if self.waited[g.warp_at, g.cta_at].any():
            k = int(np.flatnonzero(self.waited[g.warp_at, g.cta_at])[0])
            text = "waits at the cluster's barrier without having arrived"
            raise self.machine.warp_fault(BarrierError, g, k, text)
        return self.phase[g.cta_at // self.machine.cluster] > self.due[g.warp_at, g.cta_at]


def _most(directives: dict[str, tuple[int, ...]], warps: int) -> int:
    """Registers per thread that a kernel with these directives can be compiled for."""
    block = directives.get("maxntid") or directives.get("reqntid")
    ctas = directives.get("minnctapersm", (1,))[0]
    threads = -(-math.prod(block) // LANES) * LANES if block else warps * LANES
    most = min(REGISTERS // (threads * ctas) // 8 * 8, MOST_REGISTERS // 8 * 8)
    return min(most, *directives.get("maxnreg", (most,)))


class RegisterPool(Part):
    """setmaxnreg: warps give registers back to their CTA, and take what others gave.

    What a CTA is launched with is the assembler's choice (Launch.registers). Where nobody tells, it is
    .maxnreg, or what a multiprocessor can give to each thread of .minnctapersm CTAs of .maxntid or .reqntid.
    """

    def __init__(self, m: Machine):
        super().__init__(m)
        told = m.launch.registers
        self.launched = -(-told // 8) * 8 if told else _most(m.code.directives, m.warps)
        self.held = np.full((m.warps, m.ctas), self.launched)
        self.changes = np.zeros((m.warps, m.ctas), np.int64)

    def key(self, cta: int) -> str:
        """What waits for a CTA's registers is parked under."""
        return f"registers of CTA {self.machine.cta_name(cta)}"

    def change(self, warp: int, cta: int, count: int) -> bool:
        """Set a warp's registers per thread; False while its CTA has too few to give."""
        others = int(self.held[:, cta].sum() - self.held[warp, cta])
        if others + count > self.launched * self.machine.warps:
            return False
        self.held[warp, cta] = count
        self.changes[warp, cta] += 1
        self.machine.wake(self.key(cta))
        return True

    def ended(self) -> None:
        """All four warps of a warpgroup must have executed the same changes."""
        m = self.machine
        for first in range(0, m.warps, 4):
            group = self.changes[first : first + 4]
            uneven = np.flatnonzero((group != group[0]).any(axis=0))
            if len(uneven):
                name = m.cta_name(int(uneven[0]))
                raise EmulatorError(f"CTA {name}: warps of one warpgroup executed different setmaxnreg")
