"""What one CTA, or a pair, has to do, and the memory and edges through which its roles do it together."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, pipeline

from ...common import blocks
from ...common.heads import row_of
from ...common.job import Job
from ...common.job import visits_of as visits_of
from ...common.memory import Tiles
from ...elementwise import maximum
from ..config import Config
from ..edge import Edge
from ..group import Group
from ..scheduler import ClcScheduler


class Memory(NamedTuple):
    """tiles: Q (later O), K and V. factors: (128, slots + 1, Q tiles) fp32, what O is to be multiplied by: of
    each S of a tile, and in the end.

    address: the word that says where tensor memory was given. tensor: tensor memory, see `tmem.Plan`.
    """

    tiles: Tiles
    factors: cute.Tensor
    address: cute.Pointer
    tensor: cute.Pointer | None = None

    def looked_up(self) -> Memory:
        """With tensor memory's place, from its word."""
        return self._replace(tensor=cute.arch.retrieve_tmem_ptr(Float32, 16, self.address))


class Edges(NamedTuple):
    """One of each for every Q tile. The mma warp fills those of both CTAs of a pair, and those who empty them
    tell the leader.

    s: S filled by the mma warp; emptied when P is stored, all but its tail, and O rescaled; one for every S
        of a tile.
    factors: a block's, filled by the softmax warps; one for every S of a tile, and free again when that S is
        full, which was begun after the correction had read the factor before.
    final_scale: what normalises O, filled by the softmax warps, emptied by the correction's.
    o: filled by the mma warp when a tile's last P V is complete, with two S's of a tile every P V: then an S
        does not tell that the P V before is complete. `s` tells the mma warp when to go on.
    out: filled by the correction warps with O in shared memory, emptied by the store warp.
    tail: P's last columns, stored by the softmax warps, where they are told of apart; one for every S, and
        free again when that S is full, which was begun after the product that reads them.
    scheduler: the CTA's next tiles, where it fetches them.
    """

    s: Edge
    factors: Edge
    final_scale: Edge
    o: Edge
    out: Edge
    tail: Edge | None = None
    scheduler: ClcScheduler | None = None


class Past(NamedTuple):
    """What a CTA that persists has done before: blocks of keys, counted once for all Q tiles, tiles, and how
    many of these had blocks.
    """

    turns: Int32 | int = 0
    tiles: Int32 | int = 0
    filled: Int32 | int = 0


class Work(NamedTuple):
    """What a role needs for one tile. visits: the blocks of keys, where a role has found them."""

    job: Job
    memory: Memory
    edges: Edges
    past: Past
    visits: blocks.Range | blocks.Listed | None = None


class LoadEnds(NamedTuple):
    """The load warp's ends."""

    q: pipeline.PipelineProducer
    k: pipeline.PipelineProducer
    v: pipeline.PipelineProducer


class MmaEnds(NamedTuple):
    """The mma warp's ends of the same channels."""

    q: pipeline.PipelineConsumer
    k: pipeline.PipelineConsumer
    v: pipeline.PipelineConsumer


def first_row_of(config: Config, job: Job, tile: int | Int32) -> Int32:
    """Where this CTA's rows of a Q tile begin, in the sequence."""
    return row_of(config.heads, job.first_row, _place(config, tile))


def row_of_thread(config: Config, job: Job, tile: int | Int32) -> tuple[Int32, Int32]:
    """(row in the sequence, head) of a thread of a warpgroup that works on a Q tile."""
    row = _place(config, tile) + cute.arch.thread_idx()[0] % config.cta_rows
    return row_of(config.heads, job.first_row, row), job.heads.of_row(config.heads, row)


def _place(config: Config, tile: int | Int32) -> Int32:
    """First row of a Q tile: a pair's has neighbouring rows, half for each CTA."""
    return (tile * config.ctas + Group(config.ctas).rank()) * config.cta_rows


def turns_of(visits: blocks.Range | blocks.Listed) -> Int32:
    """How many visits there are; only those that begin at a known block are never fewer than none."""
    return visits.total if isinstance(visits.lowest, int) else maximum(visits.total, 0)
