"""How the kernel for caches of 8 bits works: what its tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass

from ...widened import WidenedProblem
from .. import config
from ..config import TILE_M

WIDENERS = 4  # warps


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """As the forward kernel, of one CTA. k_stages, v_stages: tiles of 8 bits; wide: of 16 bits, of each.

    widener_registers: per thread of the warps that widen.
    """

    wide: int
    widener_registers: int

    @property
    def threads(self) -> int:
        return super().threads + 32 * WIDENERS

    def shared_memory(self, problem: WidenedProblem) -> int:
        """Bytes of dynamic shared memory: Q with O in its place, K and V of both widths, barriers."""
        precision, narrow = problem.precision, problem.kv_precision
        dims = problem.head_dim, problem.head_dim_v
        dim, dim_v = map(precision.padded, dims)
        rows = TILE_M * self.tiles
        wide = precision.nbytes(rows * max(dim, dim_v) + self.wide * self.tile_n * (dim + dim_v))
        staged = self.k_stages * narrow.padded(dims[0]) + self.v_stages * narrow.padded(dims[1])
        small = 4 * (self.slots + 1) * rows + 512
        return wide + narrow.nbytes(self.tile_n * staged) + -(-small // 1024) * 1024
