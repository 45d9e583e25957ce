"""The tile of Hopper's FP8 kernel: one for all that it serves.

A thread holds S (tile_n / 2 registers), P (tile_n / 8), O and the product that is added to it (head_dim_v /
2 each): 208 of 232 at most. Blocks of scales are as long as a tile: one number scales all of its scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...kernel import Tuning
from ...quantized import QuantizedProblem
from .. import tuning

TRANSPOSED = 2  # tiles of transposed V: one is multiplied while the next is made


@dataclass(frozen=True, kw_only=True)
class Config(tuning.Config):
    """As for 16 bits."""

    def shared_memory(self, problem: QuantizedProblem) -> int:
        """Bytes of dynamic shared memory: Q, O beside it, K and V tiles, V transposed, barriers."""
        dim, dim_v = map(problem.precision.padded, (problem.head_dim, problem.head_dim_v))
        tiles = self.stages * (dim + dim_v) + TRANSPOSED * dim_v
        out = problem.out_precision.nbytes(self.tile_m * dim_v)
        return self.tile_m * dim + out + self.tile_n * tiles + 1024


CONFIG = Config(consumers=2, tile_n=128, stages=2, producer_registers=40, consumer_registers=232)
TUNING = Tuning(config=lambda problem, device, sizes: CONFIG)
