"""How the FP8 kernel works: what its tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass

from ...quantized import QuantizedProblem
from .. import config

TRANSPOSED = 2  # tiles of transposed V: one is multiplied while the next is made


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """As for 16 bits."""

    def shared_memory(self, problem: QuantizedProblem) -> int:
        """Bytes of dynamic shared memory: Q, O beside it, K and V tiles, V transposed, barriers."""
        dim, dim_v = map(problem.precision.padded, (problem.head_dim, problem.head_dim_v))
        tiles = self.stages * (dim + dim_v) + TRANSPOSED * dim_v
        out = problem.out_precision.nbytes(self.tile_m * dim_v)
        return self.tile_m * dim + out + self.tile_n * tiles + 1024
