"""Clusters: addresses in other CTAs' shared memory, and the cluster's barrier."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..core.code import Step
from ..core.memory import RANK_SHIFT
from ..translate.translation import Operation, operation
from ..units.cluster import ClusterBarriers

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads


@operation("mapa.shared::cluster")
def mapa(x: Operation) -> Callable:
    """The address of the same place in the shared memory of another CTA of the cluster.

    A rank beyond the cluster gives an address that nobody may use: kernels let every lane compute one.
    """
    x.type("u32")
    d, a, rank = x.dest(0, "u32"), x.source(1, "u32"), x.source(2, "u32")

    def step(m: Machine, g: Threads) -> None:
        rows, at = m.rows["u32"], g.index
        to = np.minimum(rows[rank][at], np.uint32(255))
        rows[d][at] = rows[a][at] & np.uint32((1 << RANK_SHIFT) - 1) | to << np.uint32(RANK_SHIFT)

    return step


@operation("barrier.cluster.arrive")
def arrive(x: Operation) -> Step:
    """Arrive at the cluster's barrier and go on."""
    release = not x.flag("relaxed")
    x.flag("release")
    x.flag("aligned")

    def step(m: Machine, g: Threads, here: int) -> list[tuple[int, Threads]]:
        ready, late = m.whole_warps(g, here)
        if ready is None:
            return late
        if m.watch is not None:
            m.watch.cluster_arrive(m, ready, release)
        m.part(ClusterBarriers).arrive(ready)
        return [*late, (here + 1, ready)]

    return x.control(step)


@operation("barrier.cluster.wait")
def wait(x: Operation) -> Step:
    """Wait until every thread of the cluster that has not exited has arrived."""
    x.flag("acquire")
    x.flag("aligned")

    def step(m: Machine, g: Threads, here: int) -> list[tuple[int, Threads]]:
        ready, late = m.whole_warps(g, here)
        if ready is None:
            return late
        barriers = m.part(ClusterBarriers)
        passed = barriers.passed(ready)
        for cluster in np.unique(ready.cta_at[~passed] // m.cluster):
            waits = ~passed & (ready.cta_at // m.cluster == cluster)
            m.park(here, _warps(m, ready, waits), barriers.key(int(cluster)))
        if not passed.any():
            return late
        gone = _warps(m, ready, passed)
        barriers.waited[gone.warp_at, gone.cta_at] = True
        if m.watch is not None:
            m.watch.cluster_wait(m, gone)
        return [*late, (here + 1, gone)]

    return x.control(step)


def _warps(m: Machine, g: Threads, chosen: np.ndarray) -> Threads:
    """Some of a set's warps."""
    mask = np.zeros_like(g.mask)
    mask[g.warp_at[chosen], g.cta_at[chosen]] = g.mask[g.warp_at[chosen], g.cta_at[chosen]]
    return m.sets.of(mask)
