"""The load role: one warp brings Q, then blocks of K and V, latest first, by TMA."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, pipeline
from cutlass.cute.nvgpu import cpasync

from ...common.operand import HeadRows, Operand
from ...common.rules import Rules
from ...problem import Problem
from ..mma import ROWS
from ..tuning import Config
from .job import Job, Tiles, phases_of


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
    def run(self, job: Job, tiles: Tiles, ends: LoadEnds, warpgroup: Int32):
        rules = Rules.of(self.problem, job.call, job.sequence, job.head)
        blocks = phases_of(self.problem, self.config, job, rules)
        first, last = blocks[-1].first, blocks[0].last
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
        if (warp == 0) & (first < last):
            q, k, v = self.sources(job)
            for rows in (k, q, v):
                cpasync.prefetch_descriptor(rows.atom)
            # K before Q and V: the first product needs K and Q, and the copies arrive in order.
            slot = ends.k.acquire_and_advance()
            self.copy(self.k, k, (last - 1) * self.config.tile_n, tiles.k, slot, slot.index)
            slot = ends.q.acquire_and_advance()
            for w in cutlass.range_constexpr(self.config.consumers):
                self.copy(self.q, q, job.first_row + w * ROWS, tiles.q, slot, w)
            for i in cutlass.range(last - 1 - first, unroll=1):
                n = last - 2 - i
                slot = ends.k.acquire_and_advance()
                self.copy(self.k, k, n * self.config.tile_n, tiles.k, slot, slot.index)
                slot = ends.v.acquire_and_advance()
                self.copy(self.v, v, (n + 1) * self.config.tile_n, tiles.v, slot, slot.index)
            slot = ends.v.acquire_and_advance()
            self.copy(self.v, v, first * self.config.tile_n, tiles.v, slot, slot.index)

    def sources(self, job: Job) -> tuple[HeadRows, HeadRows, HeadRows]:
        s, maps = job.sequence, job.maps
        q = self.q.head_rows(maps.q, s.batch, job.head, s.q_start, s.q_start + s.q_rows)
        k, v = (
            operand.head_rows(mapped, s.batch, job.kv_head, s.k_start, s.k_start + s.seqlen_k)
            for operand, mapped in ((self.k, maps.k), (self.v, maps.v))
        )
        return q, k, v

    def copy(self, operand: Operand, rows: HeadRows, first: Int32, tiles: cute.Tensor, slot, index) -> None:
        """Begin copying rows `first` and on into tile `index`."""
        source, target = operand.sides(rows, first, tiles[None, None, index])
        cute.copy(rows.atom, source, target, tma_bar_ptr=slot.barrier)
