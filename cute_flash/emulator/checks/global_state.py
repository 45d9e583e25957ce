"""What the detector of races in global memory keeps: who touched each place, and what flags pass on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Knowledge(NamedTuple):
    """Epochs that are over, by agent: two arrays, agents in ascending order."""

    agents: np.ndarray
    epochs: np.ndarray

    def join(self, other: Knowledge) -> Knowledge:
        """The later epoch of each agent of both."""
        agents = np.union1d(self.agents, other.agents)
        epochs = np.zeros(len(agents), np.int32)
        for part in (self, other):
            at = np.searchsorted(agents, part.agents)
            epochs[at] = np.maximum(epochs[at], part.epochs)
        return Knowledge(agents, epochs)


class Told:
    """Pieces of knowledge by number, which flags in memory hold; 0: nothing."""

    def __init__(self) -> None:
        self.held = [Knowledge(np.zeros(0, np.int32), np.zeros(0, np.int32))]
        self.joins: dict[tuple[int, int], int] = {}

    def add(self, knowledge: Knowledge) -> int:
        """The number of a new piece."""
        self.held.append(knowledge)
        return len(self.held) - 1

    def join(self, one: int, other: int) -> int:
        """The number of two pieces together."""
        if one == other or not one or not other:
            return one or other
        if (one, other) not in self.joins:
            self.joins[one, other] = self.add(self.held[one].join(self.held[other]))
        return self.joins[one, other]


class Touched(NamedTuple):
    """An entry of a chain. strong: an access that atomic ones do not conflict with."""

    before: int
    agent: int
    epoch: int
    strong: bool
    step: int


class Chains:
    """Sets of accesses as chains of entries, each known by the number of its last one; 0: none.

    Places that the same agents touched in the same order share a chain.
    """

    def __init__(self) -> None:
        self.entries = [Touched(0, 0, 0, False, 0)]
        self.longer: dict[tuple[int, int, int, bool], int] = {}

    def walk(self, last: int) -> list[Touched]:
        """The entries of a chain, the last one first."""
        found = []
        while last:
            found.append(self.entries[last])
            last = found[-1].before
        return found

    def add(self, last: int, agent: int, epoch: int, strong: bool, step: int) -> int:
        """The chain with one more entry, or as it is where it has that one.

        Polling threads come again and again, so all entries are compared with theirs, else the last one.
        """
        key = last, agent, epoch, strong
        if key not in self.longer:
            compared = self.walk(last) if strong else [self.entries[last]]
            if any((agent, epoch, strong) == entry[1:4] for entry in compared):
                self.longer[key] = last
            else:
                self.longer[key] = len(self.entries)
                self.entries.append(Touched(last, agent, epoch, strong, step))
        return self.longer[key]


class Cells:
    """The places of one allocation: per granule its last write, and since then the chain of its reads and
    that of its updates; told: what its value passes on to who reads it.
    """

    def __init__(self, count: int) -> None:
        self.writer, self.written, self.step = (np.zeros(count, np.int32) for _ in range(3))
        self.reads, self.updates, self.told = (np.zeros(count, np.int32) for _ in range(3))


class Agents:
    """Who works in a launch: every warp of every cluster, then the units that copy for one as they appear.

    Numbers start at 1. cluster: of the launch; own: an agent's number in the clocks of its cluster.
    """

    def __init__(self, clusters: int, warps: int) -> None:
        self.warps = warps  # of a cluster
        self.cluster = np.concatenate([[-1], np.repeat(np.arange(clusters), warps)])
        self.own = np.concatenate([[0], np.tile(np.arange(warps), clusters)])
        self.units: dict[tuple[int, int], int] = {}

    def warp(self, cluster: np.ndarray, warp: np.ndarray) -> np.ndarray:
        """The numbers of warps."""
        return 1 + cluster * self.warps + warp

    def unit(self, cluster: int, own: int) -> int:
        """The number of a unit."""
        if (cluster, own) not in self.units:
            self.units[cluster, own] = len(self.cluster)
            self.cluster, self.own = np.append(self.cluster, cluster), np.append(self.own, own)
        return self.units[cluster, own]
