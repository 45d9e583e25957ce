"""How the latent kernel works: what its tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...problem import Problem
from .. import config

PART = 64  # columns of K that arrive and leave together, and that swizzling takes as one
V_STEP = 2 * PART  # columns of V: whole parts for each of two warpgroups


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """As for other heads, with two warpgroups for the same rows: O of 512 columns is too wide for one.

    overlap, ping_pong: both always, in the kernel's own way.
    """

    abreast: ClassVar[int] = 2

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of dynamic shared memory: Q and then O in its place, tiles of K, P, maxima and barriers."""
        rows = self.tile_m + self.stages * self.tile_n
        return problem.precision.nbytes(rows * problem.head_dim + self.tile_m * self.tile_n) + 1024
