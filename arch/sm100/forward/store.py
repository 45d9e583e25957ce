"""The store role: one warp copies each Q tile's O from shared memory by TMA, which leaves out rows past the
end of the sequence.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...common.job import begin_store
from ...common.operand import Operand
from ..config import Config
from .job import Work, first_row_of


class Store:
    """out: the operand that it copies to."""

    fetches_tiles = False

    def __init__(self, config: Config, out: Operand):
        self.config, self.out = config, out

    @cute.jit
    def run(self, work: Work, ends: tuple, warp: Int32):
        """One tile; no ends, and no blocks of keys, which it does not count."""
        for t in cutlass.range_constexpr(self.config.tiles):
            edge = work.edges.out.of(t)
            edge.wait_full(work.past.tiles)
            first_row = first_row_of(self.config, work.job, t)
            begin_store(work.job, self.out, work.memory.tiles.out[None, None, t], first_row)
            # The next O may come, or the CTA end, when this one has been read.
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            if cutlass.const_expr(self.config.is_persistent):
                edge.warp_emptied()
        return ends, Int32(0)

    def close(self, ends: tuple, warp: Int32) -> None:
        """All copies have read shared memory."""
