"""Observers that count and record: a trace, and conflicts of shared memory's banks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..core.observe import Observer

if TYPE_CHECKING:
    from ..core.geometry import Geometry
    from ..core.state import Threads


class Trace(Observer):
    """Collects a line per executed step: who, and which PTX line. limit: lines kept."""

    def __init__(self, limit: int = 100000):
        self.limit = limit
        self.lines: list[str] = []

    def step(self, m: Geometry, g: Threads) -> None:
        if len(self.lines) < self.limit:
            warps = sorted({(m.cta_name(int(c)), int(w)) for w, c in zip(g.warp_at, g.cta_at, strict=True)})
            self.lines.append(f"{len(warps)} warps from {warps[0]}, {g.size} threads: {m.line(m.at)}")


class BankConflicts(Observer):
    """Counts shared-memory wavefronts per PTX line.

    A warp's access is served in phases of 128 bytes (32, 16 or 8 lanes for 4, 8 or 16 bytes each); a phase
    takes as many wavefronts as the busiest of the 32 banks has different words. wavefronts[line] = (needed,
    without any conflict).
    """

    def __init__(self) -> None:
        self.wavefronts: dict[int, tuple[int, int]] = {}

    def shared_read(self, m: Geometry, g: Threads, address: np.ndarray, size: int) -> None:
        self._count(m, g, address, size)

    def shared_write(
        self, m: Geometry, g: Threads, address: np.ndarray, values: np.ndarray, atomic: bool = False
    ) -> None:
        self._count(m, g, address, values.itemsize * values.shape[1])

    def _count(self, m: Geometry, g: Threads, address: np.ndarray, size: int) -> None:
        lanes = max(1, min(32, 128 // size))
        phase = g.slot * (32 // lanes) + g.lane // lanes
        words = (address[:, None] // 4 + np.arange(max(1, size // 4))).reshape(-1)
        phases = np.repeat(phase, max(1, size // 4))
        unique = np.unique(phases * (1 << 32) + words)
        bank = (unique >> 32) * 32 + (unique & 31)
        per_bank = np.bincount(bank, minlength=(int(phases.max()) + 1) * 32).reshape(-1, 32)
        needed, ideal = int(per_bank.max(axis=1).sum()), len(np.unique(phase))
        line = m.code.steps[m.at].where.line
        have = self.wavefronts.get(line, (0, 0))
        self.wavefronts[line] = (have[0] + needed, have[1] + ideal)
