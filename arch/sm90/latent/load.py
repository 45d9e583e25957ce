"""The load role: one warp brings Q, then the blocks of K, part by part in the order of visits, by TMA."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from ...common.job import Job, sources, visits_of
from ...common.memory import Tiles
from ...common.operand import HeadRows, Operand
from ...common.rules import Rules
from ...common.topology import Topology
from ...problem import Problem
from ..config import Config
from ..forward.load import EVICT_FIRST, EVICT_LAST, Load
from .parts import RANGES, Parts


class Edges(NamedTuple):
    """Barriers that tell: Q is there; parts of K are, those of a tile side by side; ranges of it are free."""

    q: cute.Pointer
    k: cute.Pointer
    freed: cute.Pointer

    @staticmethod
    def at(base: cute.Pointer, topology: Topology) -> Edges:
        """The links' edges. base: the CTA's barriers."""
        return Edges(*(base + topology[name].first for name in Edges._fields))

    def make(self, topology: Topology) -> None:
        """Make the barriers; one warp of the CTA calls this, before `channels_ready`."""
        with cute.arch.elect_one():
            for name, first in self._asdict().items():
                for i in range(topology[name].slots):
                    cute.arch.mbarrier_init(first + i, topology[name].full_arrivals)


class LatentLoad(Load):
    """As `Load`, of K in parts, and without V."""

    def __init__(self, problem: Problem, config: Config, q: Operand, k: Operand):
        super().__init__(problem, config, q, k, k)
        self.parts = Parts.of(problem)

    @cute.jit
    def blocks(self, job: Job, tiles: Tiles, edges: Edges):
        rules = Rules.of(self.problem, job.call, job.sequence, job.heads.first)
        visits = visits_of(self.problem, self.config, job, rules)
        if visits.any():
            q, k, _ = sources(job, self.q, self.k, self.k)
            self.fill(edges.q, self.q, q, job.first_row, tiles.q[None, None, 0], EVICT_FIRST)
            for i in cutlass.range(visits.total, unroll=1):
                key = self.first_key(visits, visits.after(visits.start, i))
                stage, turn = i % self.config.stages, i // self.config.stages
                for number, first, count in self.parts.ranges(i % 2):
                    if cutlass.const_expr(count > 0):
                        free = edges.freed + stage * RANGES + number
                        cute.arch.mbarrier_wait(free, (turn & 1) ^ 1)
                    for part in (first + n for n in range(count)):
                        place = stage * self.parts.count + part
                        rows, tile = self.k.part(k, part), tiles.k[None, None, place]
                        self.fill(edges.k + place, self.k, rows, key, tile, EVICT_LAST)
        return edges

    def fill(
        self,
        full: cute.Pointer,
        operand: Operand,
        rows: HeadRows,
        first: Int32,
        tile: cute.Tensor,
        policy: int,
    ) -> None:
        """Begin copying rows `first` and on into a tile. full: told when they are there."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full, operand.bytes)
        for source, target in operand.copies(rows, first, tile):
            cute.copy(rows.atom, source, target, tma_bar_ptr=full, cache_policy=Int64(policy))
