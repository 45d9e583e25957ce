"""The widening role: tiles of K and V of 8 bits become tiles of 16, in the order that products need."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, pipeline

from ...common.job import Job, Launch, visits_of
from ...common.rules import Rules
from ...common.wide_tile import Side, TileWidening
from ...widened import WidenedProblem
from ..forward.job import job_of
from .config import Config


class WidenEnds(NamedTuple):
    """Of what the load role fills."""

    k: pipeline.PipelineConsumer
    v: pipeline.PipelineConsumer


class Widen:
    """Whole warpgroups, whose warps share out each tile."""

    def __init__(self, problem: WidenedProblem, config: Config, k: TileWidening, v: TileWidening):
        self.problem, self.config, self.k, self.v = problem, config, k, v

    @cute.jit
    def run(self, launch: Launch, k: Side, v: Side, ends: WidenEnds, warpgroup: Int32):
        job = job_of(self.problem, self.config, launch, cute.arch.block_idx()[0])
        if job.first_row < job.sequence.q_rows:
            self.tiles(job, k, v, ends, warpgroup)

    @cute.jit
    def tiles(self, job: Job, k: Side, v: Side, ends: WidenEnds, warpgroup: Int32):
        rules = Rules.of(self.problem, job.call, job.sequence, job.heads.first)
        visits = visits_of(self.problem, self.config, job, rules)
        if visits.any():
            mine = warpgroup * 4 + cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
            self.k.tile(k, ends.k.wait_and_advance(), Int32(0), mine)
            for turn in cutlass.range(visits.total - 1, unroll=1):
                self.k.tile(k, ends.k.wait_and_advance(), turn + 1, mine)
                self.v.tile(v, ends.v.wait_and_advance(), turn, mine)
            self.v.tile(v, ends.v.wait_and_advance(), visits.total - 1, mine)
