"""What one CTA has to do, and the memory and edges through which its roles do it together."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32, pipeline

from ...common.blocks import Phase
from ...sm90.forward.job import Job, Maps, Tiles, phases_of
from ..edge import Edge

__all__ = ["Edges", "Job", "Maps", "Memory", "Tiles", "Work", "blocks_of", "phases_of"]

FACTOR, ROW_SUM, ROW_MAX = 0, 0, 1  # places in `Memory.stats`; the factor's is free when the sum is due


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


def blocks_of(blocks: list[Phase]) -> tuple[Int32, Int32]:
    """(first, last): KV blocks first <= n < last, visited from the last to the first."""
    return blocks[-1].first, blocks[0].last
