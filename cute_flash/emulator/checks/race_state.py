"""What the race detector keeps: epochs, accesses, the knowledge that barriers pass on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..base.errors import DataRace

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads

NOBODY = -1
PROXY, TENSOR = 0, 1  # kinds of fences
UNDER_WAY = np.iinfo(np.int32).max  # an epoch that nobody knows to be over


class Access(NamedTuple):
    """One access of a set of threads: what it does in words, addresses per thread, and cell, cluster, warp
    (of the cluster) per granule.
    """

    m: Machine
    g: Threads
    verb: str
    address: np.ndarray
    cell: np.ndarray
    cluster: np.ndarray
    warp: np.ndarray

    def race(self, k: int, other: str, step: int) -> DataRace:
        """The error for granule k."""
        thread = k * len(self.address) // len(self.cell)
        what = f"{self.verb} shared {int(self.address[thread]):#x}"
        text = f"{what} without an order to {other} ({self.m.line(step)})"
        return self.m.fault(DataRace, self.g, thread, text)


class UnitAccess(NamedTuple):
    """One access of a unit: cells in one cluster, and the warp that issued it."""

    m: Machine
    verb: str
    base: int
    cell: np.ndarray
    cluster: np.ndarray
    warp: np.ndarray
    granule: int

    def race(self, k: int, other: str, step: int) -> DataRace:
        """The error for granule k."""
        address = int(self.cell[k]) * self.granule - self.base
        warps = self.m.warps
        warp = int(self.warp[0])
        cta = self.m.cta_name(int(self.cluster[0]) * self.m.cluster + warp // warps)
        text = f"{self.verb} shared {address:#x} without an order to {other} ({self.m.line(step)})"
        return DataRace(f"{text} (issued by CTA {cta}, warp {warp % warps})")


@dataclass
class Released:
    """What leaving a barrier teaches: epochs by agent, and those fenced, by kind of fence and writer."""

    clock: np.ndarray
    fenced: np.ndarray

    def join(self, clock: np.ndarray, fenced: np.ndarray) -> None:
        """Add somebody's knowledge."""
        np.maximum(self.clock[: len(clock)], clock, out=self.clock[: len(clock)])
        np.maximum(self.fenced, fenced, out=self.fenced)


@dataclass
class Word:
    """What is known of an mbarrier: who made it and when, whether a fence followed, and its knowledge."""

    warp: int
    epoch: int
    step: int
    fenced: bool
    arriving: Released
    released: Released


class History:
    """The latest epoch and step in which one agent accessed each cell; 0 where it has not."""

    def __init__(self, cells: int):
        self.epoch = np.zeros(cells, np.int32)
        self.step = np.zeros(cells, np.int32)

    def record(self, cell: np.ndarray, epoch: np.ndarray | int, step: int) -> None:
        """Note an access of each cell."""
        self.epoch[cell] = epoch
        self.step[cell] = step


class Agents:
    """Names of agents, numbered as they appear; a cluster's warps come first, then the copies of each."""

    def __init__(self, warps: int):
        self.warps = warps
        self.names: list[tuple] = [(name, k) for name in ("warp", "copies") for k in range(warps)]
        self.numbers: dict[tuple, int] = {}

    def number(self, *name: object) -> int:
        """The number of a unit or barrier."""
        found = self.numbers.get(name)
        if found is None:
            found = self.numbers[name] = len(self.names)
            self.names.append(name)
        return found


def wider(clock: np.ndarray, agents: int) -> np.ndarray:
    """A clock with room for more agents."""
    missing = agents - clock.shape[-1]
    if missing <= 0:
        return clock
    return np.concatenate([clock, np.zeros((*clock.shape[:-1], missing), clock.dtype)], axis=-1)
