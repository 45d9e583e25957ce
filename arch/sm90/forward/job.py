"""Tiles of a launch, as both roles see them."""

from __future__ import annotations

from cutlass import Int32

from ...common.heads import TileHeads
from ...common.job import Job, Launch, rows_of_tile
from ...common.sequence import cached_sequence_of
from ...problem import Problem
from ..config import Config


def job_of(problem: Problem, config: Config, launch: Launch, index: Int32) -> Job:
    """Tile `index` of a launch."""
    tile = launch.schedule.tile(index)
    return Job(
        call=launch.call,
        maps=launch.maps,
        sequence=cached_sequence_of(launch.call, tile.batch),
        heads=TileHeads.of(problem, config.heads, tile.head, launch.group, launch.by_parts),
        first_row=tile.m_block * rows_of_tile(config),
        split=tile.split,
        splits=launch.schedule.splits_of(tile.batch),
    )
