"""What a launch has to do, and what one tile of it is, as both roles see it."""

from __future__ import annotations

from typing import NamedTuple

from cutlass import Int32

from ...common import blocks
from ...common.heads import TileHeads
from ...common.memory import Maps
from ...common.rules import Rules
from ...common.schedule import InSections
from ...common.sequence import Sequence, sequence_of
from ...problem import Operands, Problem
from ..tuning import Config


class Work(NamedTuple):
    """A launch. group: query heads that share a KV head."""

    call: Operands
    maps: Maps
    schedule: InSections
    group: Int32


class Job(NamedTuple):
    """One tile: rows `first_row` and on of some heads of one sequence.

    split: which part of the keys, of `splits`.
    """

    call: Operands
    maps: Maps
    sequence: Sequence
    heads: TileHeads
    first_row: Int32
    split: Int32
    splits: Int32 | int


def rows_of_tile(config: Config) -> int:
    """Rows of the sequence that a tile holds, of each of its heads."""
    return config.tile_m // config.heads


def job_of(problem: Problem, config: Config, work: Work, index: Int32) -> Job:
    """Tile `index` of a launch."""
    tile = work.schedule.tile(index)
    return Job(
        call=work.call,
        maps=work.maps,
        sequence=sequence_of(work.call, tile.batch),
        heads=TileHeads.of(problem, config.heads, tile.head, work.group),
        first_row=tile.m_block * rows_of_tile(config),
        split=tile.split,
        splits=work.schedule.splits,
    )


def visits_of(problem: Problem, config: Config, job: Job, rules: Rules) -> blocks.Range | blocks.Listed:
    """The KV blocks to visit, in their order."""
    tile = rows_of_tile(config), config.tile_n
    visits = blocks.visits_of(problem, tile, job.call, rules, job.sequence, job.first_row)
    return blocks.part_of(visits, job.split, job.splits) if problem.split_kv else visits
