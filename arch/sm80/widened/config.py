"""How the kernel for caches of 8 bits works: what its tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass

from ...widened import WidenedProblem
from .. import config


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """As the forward kernel. stages: tiles of K and V of 8 bits; of 16 bits there is one of each."""

    def shared_memory(self, problem: WidenedProblem) -> int:
        """Bytes of dynamic shared memory."""
        precision = problem.precision
        dim, dim_v = map(precision.padded, (problem.head_dim, problem.head_dim_v))
        wide = self.tile_m * max(dim, dim_v) + self.tile_n * (dim + dim_v)
        narrow = self.stages * self.tile_n * (dim + dim_v)
        return precision.nbytes(wide) + problem.kv_precision.nbytes(narrow)
