"""The load role: one warp brings Q, then the blocks of K and V in the order of their visits, by TMA.

K and V are asked to stay in L2, for the other row blocks and heads that read them; Q, which nobody reads
again, to leave it first.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, pipeline
from cutlass.cute.nvgpu import cpasync

from ...common.blocks import Listed, Range
from ...common.job import Job, Launch, sources, visits_of
from ...common.memory import Tiles
from ...common.operand import HeadRows, Operand
from ...common.rules import Rules
from ...problem import Problem
from ..config import Config
from .job import job_of

# Cache policies, as createpolicy.fractional would make them for all of the bytes.
EVICT_FIRST, EVICT_LAST = 0x12F0000000000000, 0x14F0000000000000


class LoadEnds(NamedTuple):
    q: pipeline.PipelineProducer
    k: pipeline.PipelineProducer
    v: pipeline.PipelineProducer


class Load:
    """q, k, v: the operands that it fills."""

    def __init__(self, problem: Problem, config: Config, q: Operand, k: Operand, v: Operand):
        self.problem, self.config = problem, config
        self.q, self.k, self.v = q, k, v

    @cute.jit
    def run(self, launch: Launch, tiles: Tiles, ends: LoadEnds, warpgroup: Int32):
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4 == 0:
            for mapped in (launch.maps.k, launch.maps.q, launch.maps.v):
                cpasync.prefetch_descriptor(mapped.atom)
            block = cute.arch.block_idx()[0]
            if cutlass.const_expr(self.config.persistent):
                for i in cutlass.range(block, launch.schedule.count, cute.arch.grid_dim()[0], unroll=1):
                    ends = self.tile(job_of(self.problem, self.config, launch, i), tiles, ends)
            else:
                ends = self.tile(job_of(self.problem, self.config, launch, block), tiles, ends)

    @cute.jit
    def tile(self, job: Job, tiles: Tiles, ends: LoadEnds):
        if job.first_row < job.sequence.q_rows:
            ends = self.blocks(job, tiles, ends)
        return ends

    @cute.jit
    def blocks(self, job: Job, tiles: Tiles, ends: LoadEnds):
        rules = Rules.of(self.problem, job.call, job.sequence, job.heads.first)
        visits = visits_of(self.problem, self.config, job, rules)
        if visits.any():
            q, k, v = sources(job, self.q, self.k, self.v)
            # K before Q and V: the first product needs K and Q, and the copies arrive in order.
            slot = ends.k.acquire_and_advance()
            self.copy(self.k, k, self.first_key(visits, visits.start), tiles.k, slot, slot.index)
            slot = ends.q.acquire_and_advance()
            for w in cutlass.range_constexpr(self.config.consumers):
                self.copy(self.q, q, job.first_row + w * self.q.sequence_rows, tiles.q, slot, w)
            for i in cutlass.range(visits.total - 1, unroll=1):
                place = visits.after(visits.start, i)
                slot = ends.k.acquire_and_advance()
                next_key = self.first_key(visits, visits.after(place, 1))
                self.copy(self.k, k, next_key, tiles.k, slot, slot.index)
                slot = ends.v.acquire_and_advance()
                self.copy(self.v, v, self.first_key(visits, place), tiles.v, slot, slot.index)
            slot = ends.v.acquire_and_advance()
            self.copy(self.v, v, self.first_key(visits, visits.end), tiles.v, slot, slot.index)
        return ends

    def first_key(self, visits: Range | Listed, place: Int32) -> Int32:
        return visits.block(place) * self.config.tile_n

    def copy(self, operand: Operand, rows: HeadRows, first: Int32, tiles: cute.Tensor, slot, index) -> None:
        """Begin copying rows `first` and on into tile `index`."""
        policy = Int64(EVICT_FIRST if operand is self.q else EVICT_LAST)
        for source, target in operand.copies(rows, first, tiles[None, None, index]):
            cute.copy(rows.atom, source, target, tma_bar_ptr=slot.barrier, cache_policy=policy)
