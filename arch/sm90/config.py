"""How the forward kernel works: what its tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..problem import Problem

# Half of an H100's 50 MB, which are two partitions: a section's K and V stay while its tiles last.
L2_FOR_SECTION = 25 << 20


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the forward kernel works on a problem.

    consumers: warpgroups that multiply, 64 rows of Q each. tile_n: rows of K and V at a time.
    stages: K and V tiles in shared memory. producer_registers, consumer_registers: per thread.
    overlap: the next block's QK runs, and PV of the one before, while a warpgroup does its softmax.
    ping_pong: warpgroups issue their products in turn, so that one's softmax runs under the others' products.
    heads: query heads of one KV head that share a tile's rows, a power of two.
    persistent: there is a CTA for each multiprocessor at most, which takes every so many-th tile.
    longest_first: heads whose K and V L2 holds together are taken together, their longest tiles first.
    abreast: warpgroups that have the same rows and share out the columns of O.
    """

    abreast: ClassVar[int] = 1
    consumers: int
    tile_n: int
    stages: int
    producer_registers: int
    consumer_registers: int
    overlap: bool = True
    ping_pong: bool = True
    heads: int = 1
    persistent: bool = False
    longest_first: bool = False

    @property
    def tile_m(self) -> int:
        return 64 * self.consumers // self.abreast

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def launch_registers(self) -> int:
        """Registers per thread before `setmaxnreg`: what a multiprocessor's 65536 allow, in steps of 8."""
        return min(65536 // self.threads // 8 * 8, 256)

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of dynamic shared memory: Q, O in its place or beside it, K and V tiles, barriers."""
        dim, dim_v = map(problem.precision.padded, (problem.head_dim, problem.head_dim_v))
        q_and_out = dim + dim_v if self.persistent else max(dim, dim_v)
        elements = self.tile_m * q_and_out + self.stages * self.tile_n * (dim + dim_v)
        return problem.precision.nbytes(elements) + 1024
