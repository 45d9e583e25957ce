"""The compute role with keys and values that were widened: as for 16 bits, but for their scales."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...common.job import Job
from ...common.memory import Tiles
from ...common.widen import of_head
from ..forward.compute import Compute, ComputeEnds


class WidenedCompute(Compute):
    """The same products, masks, turns and stores."""

    @cute.jit
    def tile(self, job: Job, tiles: Tiles, ends: ComputeEnds, warpgroup: Int32):
        if job.first_row < job.sequence.q_rows:
            call, scale = of_head(job.call, job.sequence.batch, job.heads.kv)
            job = job._replace(call=call)
            state = self.state(job, tiles, warpgroup)
            if cutlass.const_expr(self.config.overlap):
                ends = self.overlapped(job, state, ends, warpgroup)
            else:
                ends = self.in_order(job, state, ends, warpgroup)
            for i in cutlass.range_constexpr(cute.size(state.o)):
                state.o[i] = state.o[i] * scale
            self.store.tile(job, tiles, state, warpgroup)
        return ends
