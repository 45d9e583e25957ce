"""How the kernel for caches of 8 bits works: what its tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass

from ...widened import WidenedProblem
from .. import config


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """As the forward kernel. stages: tiles of K and V of 8 bits; wide: of 16 bits.

    wideners: warpgroups that widen, of widener_registers per thread.
    """

    wide: int
    wideners: int
    widener_registers: int

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + self.wideners + 1)

    def shared_memory(self, problem: WidenedProblem) -> int:
        """Bytes of dynamic shared memory: Q with O in its place, K and V of 16 and of 8 bits, barriers."""
        precision, narrow, dims = (
            problem.precision,
            problem.kv_precision,
            (problem.head_dim, problem.head_dim_v),
        )
        columns = sum(map(precision.padded, dims))
        q_or_out = self.tile_m * max(map(precision.padded, dims))
        wide = precision.nbytes(q_or_out + self.wide * self.tile_n * columns)
        return wide + narrow.nbytes(self.stages * self.tile_n * sum(map(narrow.padded, dims))) + 1024
