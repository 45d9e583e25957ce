"""What one CTA has to do, and the memory and edges through which its roles do it together."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32, pipeline

from ...common.blocks import Phase, phases
from ...common.mask import Everything
from ...common.operand import Mapped
from ...common.rules import Rules
from ...common.sequence import Sequence
from ...elementwise import minimum, where
from ...problem import Operands, Problem
from ..edge import Edge
from ..tuning import Config

FACTOR, ROW_SUM, ROW_MAX = 0, 0, 1  # places in `Memory.stats`; the factor's is free when the sum is due


class Maps(NamedTuple):
    """The tensors as TMA sees them."""

    q: Mapped
    k: Mapped
    v: Mapped
    out: Mapped


class Tiles(NamedTuple):
    """Shared memory: (rows, dim, tiles) of q and, in its place, out; (rows, dim, stages) of k and v."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    out: cute.Tensor


class Job(NamedTuple):
    """Rows `first_row` and on of one query head of one sequence."""

    call: Operands
    maps: Maps
    sequence: Sequence
    head: Int32
    kv_head: Int32
    first_row: Int32


class Memory(NamedTuple):
    """tiles: Q (later O), K and V. stats: (128, 2, Q tiles) fp32, from softmax to correction.

    tensor: tensor memory, see `tmem.Plan`.
    """

    tiles: Tiles
    stats: cute.Tensor
    tensor: cute.Pointer


class Edges(NamedTuple):
    """One of each for every Q tile.

    s: S filled by the mma warp; emptied when P is stored and O rescaled; one for every S of a tile.
    stats: filled by the softmax warps, emptied by the correction's.
    o: filled by the mma warp when a block's P V is complete; `s` tells it when to go on.
    """

    s: Edge
    stats: Edge
    o: Edge


class Work(NamedTuple):
    """All that a role is told."""

    job: Job
    memory: Memory
    edges: Edges


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


def phases_of(problem: Problem, config: Config, job: Job, rules: Rules) -> list[Phase]:
    """The KV blocks to visit, from last to first, the same for all Q tiles of the CTA."""
    sequence, first_row, seqlen_k = job.sequence, job.first_row, job.sequence.seqlen_k
    end_row = minimum(first_row + config.tile_m, sequence.seqlen_q)
    if problem.seqused_q:
        seqlen_k = where(first_row < sequence.seqlen_q, seqlen_k, 0)  # rows out of use see nothing
    q_first, q_last = first_row + sequence.offset, end_row - 1 + sequence.offset
    return phases(rules.mask or Everything(), q_first, q_last, seqlen_k, config.tile_n)


def blocks_of(blocks: list[Phase]) -> tuple[Int32, Int32]:
    """(first, last): KV blocks first <= n < last, visited from the last to the first."""
    return blocks[-1].first, blocks[0].last
