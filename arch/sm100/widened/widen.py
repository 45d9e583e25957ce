"""The widening role: tiles of K and V of 8 bits become tiles of 16, in the order that products need."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, pipeline

from ...common.memory import Tiles
from ...common.rules import Rules
from ...common.wide_tile import Side, TileWidening
from ...widened import WidenedProblem
from ..forward.job import LoadEnds, Work, turns_of, visits_of
from ..forward.load import Load
from .config import Config


class Memory(NamedTuple):
    """As for 16 bits; k, v: both widths of K's and V's tiles."""

    tiles: Tiles
    factors: cute.Tensor
    address: cute.Pointer
    k: Side
    v: Side
    tensor: cute.Pointer | None = None

    def looked_up(self) -> Memory:
        """With tensor memory's place, from its word."""
        return self._replace(tensor=cute.arch.retrieve_tmem_ptr(Float32, 16, self.address))


class NarrowLoad(Load):
    """K and V go to tiles of 8 bits."""

    def run(self, work: Work, ends: LoadEnds, warp: Int32):
        """One tile; the ends as they are then, and how many blocks it was."""
        memory = work.memory
        tiles = memory.tiles._replace(k=memory.k.narrow, v=memory.v.narrow)
        return super().run(work._replace(memory=memory._replace(tiles=tiles)), ends, warp)


class WidenEnds(NamedTuple):
    """Of what the load role fills."""

    k: pipeline.PipelineConsumer
    v: pipeline.PipelineConsumer


class Widen:
    """A warpgroup, whose warps share out each tile."""

    fetches_tiles = False

    def __init__(self, problem: WidenedProblem, config: Config, k: TileWidening, v: TileWidening):
        self.problem, self.config, self.k, self.v = problem, config, k, v

    @cute.jit
    def run(self, work: Work, ends: WidenEnds, warp: Int32):
        """One tile; the ends as they are then, and how many blocks it was."""
        job, k, v = work.job, work.memory.k, work.memory.v
        rules = Rules.of(self.problem, job.call, job.sequence, job.heads.first)
        visits = visits_of(self.problem, self.config, job, rules)
        if visits.any():
            self.k.tile(k, ends.k.wait_and_advance(), Int32(0), warp)
            for turn in cutlass.range(visits.total - 1, unroll=1):
                self.k.tile(k, ends.k.wait_and_advance(), turn + 1, warp)
                self.v.tile(v, ends.v.wait_and_advance(), turn, warp)
            self.v.tile(v, ends.v.wait_and_advance(), visits.total - 1, warp)
        return ends, turns_of(visits)

    def close(self, ends: WidenEnds, warp: Int32) -> None:
        """The mma role sees the rest through."""
