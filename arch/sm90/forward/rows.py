"""Which rows and heads of a tile a thread has."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32

from ...common import heads
from ...common.job import Job
from ..config import Config
from ..mma import ROWS

ROW_LANES = (1, 2)  # wgmma gives a row of the accumulator to 4 neighbouring lanes
ROW_STEP = 8  # between a thread's two rows


def rows_of(config: Config, warpgroup: Int32) -> Int32:
    """Which 64 of a tile's rows a warpgroup has."""
    return warpgroup if config.abreast == 1 else warpgroup // config.abreast


def columns_of(config: Config, warpgroup: Int32) -> Int32 | int:
    """Which of the equal parts of O's columns a warpgroup has."""
    return 0 if config.abreast == 1 else warpgroup % config.abreast


def row_of(config: Config, job: Job, warpgroup: Int32, row: Int32) -> Int32:
    """In the sequence: row `row` of a warpgroup's."""
    return heads.row_of(config.heads, job.first_row, rows_of(config, warpgroup) * ROWS + row)


def heads_of_thread(config: Config, job: Job, warpgroup: Int32) -> list[Int32]:
    """The heads of a thread's rows: one of both, or one of each. None exist from `job.heads.end` on."""
    thread = cute.arch.thread_idx()[0] % 128
    first = rows_of(config, warpgroup) * ROWS + thread // 32 * 16 + thread % 32 // 4
    rows = [first] if config.heads <= ROW_STEP else [first, first + ROW_STEP]
    return [job.heads.of_row(config.heads, row) for row in rows]
