"""What every warp of a wave knows to be over: vector clocks, per cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .meetings import Meetings
from .race_state import Agents, wider

if TYPE_CHECKING:
    from ..core.events import Barrier, Unit
    from ..core.machine import Machine


class Clocks:
    """Epochs that are over, by who knows of them.

    Warps are numbered through their cluster: rank * warps per CTA + warp. known[cluster, warp, agent]: the
    latest epoch of an agent (a warp, a unit, a barrier) that the warp knows to be over, its own epoch for
    itself. fenced[cluster, warp, kind, agent]: the same where a fence is needed besides, for agents of the
    generic proxy: the first `generic` ones, the warps and then what each of them copies for mbarriers.
    """

    def __init__(self, m: Machine):
        self.m = m
        self.warps = m.cluster * m.warps
        clusters = m.ctas // m.cluster
        self.generic = 2 * self.warps
        self.agents = Agents(self.warps)
        self.known = np.zeros((clusters, self.warps, 2 * self.generic), np.int32)
        self.known[:, range(self.warps), range(self.warps)] = 1
        self.fenced = np.zeros((clusters, self.warps, 2, self.generic), np.int32)
        self.by_the_book, self.permissive = m.options.by_the_book, m.options.permissive
        self.meetings = Meetings(clusters, self.warps)

    def copies(self, warp: tuple[int, int]) -> int:
        """The number of what (cta, warp) copies for mbarriers."""
        return self.warps + self.one(warp)[1]

    def agent(self, unit: Unit) -> int:
        """The number of a unit."""
        return self._grown(self.agents.number(unit.name, int(self.m.rank[unit.cta]), unit.number))

    def barrier_agent(self, barrier: Barrier) -> int:
        """The number of a barrier, whose phases are epochs of the copies that signal it."""
        rank = int(self.m.rank[barrier.cta])
        return self._grown(self.agents.number("barrier", rank, barrier.address))

    def number(self, *name: object) -> int:
        """The number of somebody else, by a name of its own."""
        return self._grown(self.agents.number(*name))

    def _grown(self, agent: int) -> int:
        """The agent, after making room for it in every clock."""
        if agent >= self.known.shape[2]:
            self.known = wider(self.known, 2 * agent)
        return agent

    def who(self, cta: np.ndarray, warp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(cluster, warp of the cluster) of each."""
        return cta // self.m.cluster, self.m.rank[cta] * self.m.warps + warp

    def one(self, warp: tuple[int, int]) -> tuple[int, int]:
        """(cluster, warp of the cluster) of (cta, warp)."""
        cta, number = warp
        return cta // self.m.cluster, int(self.m.rank[cta]) * self.m.warps + number
