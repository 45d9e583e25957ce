"""Where the threads of a wave stand in their launch, and their names in messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import EmulatorError
from .state import LANES

if TYPE_CHECKING:
    from ..base.options import Launch
    from .code import Code
    from .state import Threads


@dataclass
class Unlaunched:
    """The CTAs of a grid that have not started: first … total - 1, whole clusters of `cluster`."""

    first: int
    total: int
    cluster: int

    def take(self, ctas: int) -> int:
        """Up to `ctas` of them start, or are taken over by running ones; the number of the first."""
        first = self.first
        self.first = min(first + ctas, self.total)
        return first

    def waiting(self, places: int) -> str:
        """What a deadlock's message says of them: nothing where all have started."""
        count = self.total - self.first
        text = f"\n  ({count} CTAs of the grid have no place: {places} hold theirs until they exit)"
        return text if count else ""


class Geometry:
    """The CTAs of one wave.

    warps: per CTA; ctas: in the wave; cluster: CTAs of a cluster; rank: of each CTA in its cluster. live:
    bool (warps, ctas, 32), the threads that have not exited. at: the running step, kept only while somebody
    watches.
    """

    def __init__(self, code: Code, launch: Launch, first: int, ctas: int):
        self.code, self.launch = code, launch
        self.first, self.ctas = first, ctas
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        self.warps = -(-threads // LANES)
        self.cluster = launch.cluster[0] * launch.cluster[1] * launch.cluster[2]
        self.rank = np.arange(ctas) % self.cluster
        inside = (np.arange(self.warps * LANES) < threads).reshape(self.warps, 1, LANES)
        self.live = np.broadcast_to(inside, (self.warps, ctas, LANES)).copy()
        self.at = 0

    def cta_index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, y, z of every CTA of the wave."""
        return self.coordinates(np.arange(self.first, self.first + self.ctas))

    def coordinates(self, linear: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, y, z of CTAs by their numbers in the order of launch: the CTAs of a cluster are neighbours."""
        size = self.launch.cluster
        clusters = [n // c for n, c in zip(self.launch.grid, size, strict=True)]
        which, rank = linear // self.cluster, linear % self.cluster
        x = which % clusters[0] * size[0] + rank % size[0]
        y = which // clusters[0] % clusters[1] * size[1] + rank // size[0] % size[1]
        z = which // (clusters[0] * clusters[1]) * size[2] + rank // (size[0] * size[1])
        return x, y, z

    def cta_name(self, cta: int) -> str:
        x, y, z = (int(v[cta]) for v in self.cta_index())
        return f"({x}, {y}, {z})"

    def fault(self, kind: type[EmulatorError], g: Threads, k: int, text: str) -> EmulatorError:
        """The error for thread number k of the set."""
        warp, cta, lane = int(g.warp[k]), int(g.cta[k]), int(g.lane[k])
        return kind(f"{text} (CTA {self.cta_name(cta)}, warp {warp}, lane {lane})")

    def warp_fault(self, kind: type[EmulatorError], g: Threads, k: int, text: str) -> EmulatorError:
        """The error for warp number k of the set."""
        return kind(f"{text} (CTA {self.cta_name(int(g.cta_at[k]))}, warp {int(g.warp_at[k])})")

    def line(self, step: int) -> str:
        """A step's PTX line for messages, and the line of the kernel's source that it comes from."""
        where = self.code.steps[step].where
        came = f" from {where.source}" if where.source else ""
        return f"PTX line {where.line}: {where.text}{came}"
