"""How the FP8 kernel works: what its tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass

from ...quantized import QuantizedProblem
from .. import config

TRANSPOSED = 2  # tiles of transposed V: one is multiplied while the next is made
MOST_SUMMED = 128  # keys, by the tensor core, where O takes over the sum of every tile


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """As for 16 bits, and how products with V are summed (accumulation.py).

    promotion: after so many tiles of keys O, in fp32, takes over the tensor core's sum, which is short. 0:
    never; O is that sum, in half of the registers. With scales of blocks of V it is 1: what is summed in one
    accumulator has one scale. A sum of one tile is of 128 keys at most, or of equal spans of it: DeepSeek-V3
    adds up as many at a time (DeepSeek-AI 2024, section 3.3.2), and with 16384 keys the error is 1.3 times an
    exact sum's.

    part_columns: of V, that are multiplied at a time at most, where O takes over the sum of every tile. Their
    sums are in half as many registers of a thread, beside O.
    q_in_registers: Q is read from shared memory once, not for every tile, if sums of several tiles leave it
    room. Otherwise O takes its place in shared memory.
    """

    promotion: int = 1
    part_columns: int = 64
    q_in_registers: bool = False

    def __post_init__(self) -> None:
        if self.promotion < 0:
            raise ValueError(f"promotion is {self.promotion}; allowed: 0, never, or a number of tiles")

    @property
    def keeps_q(self) -> bool:
        """Whether Q is in registers."""
        return self.q_in_registers and self.promotion < 2

    @property
    def spans(self) -> int:
        """Equal spans of a tile's keys, each of which O takes over by itself."""
        return -(-self.tile_n // MOST_SUMMED)

    def piece(self, dim_v: int) -> int:
        """Columns of a piece of P V, all equal. dim_v: of V, whole k steps."""
        return next(columns for columns in range(self.part_columns, 0, -8) if dim_v % columns == 0)

    def shared_memory(self, problem: QuantizedProblem) -> int:
        """Bytes of dynamic shared memory: Q, O beside or over it, K and V tiles, V transposed, barriers."""
        dim, dim_v = map(problem.precision.padded, (problem.head_dim, problem.head_dim_v))
        tiles = self.stages * (dim + dim_v) + TRANSPOSED * dim_v
        q, out = self.tile_m * dim, problem.out_precision.nbytes(self.tile_m * dim_v)
        return (q + out if self.keeps_q else max(q, out)) + self.tile_n * tiles + 1024
