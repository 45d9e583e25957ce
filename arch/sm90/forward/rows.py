"""Which row of the sequence, and which query head, each row of a tile is.

Row i of a tile is row i of its head or, with several heads in a tile (a power of two), row i // heads of head
i % heads: the heads of one KV head, side by side, fill a tile that a few rows of one of them would not.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32

from ...common.fragment import rows_by_columns
from ..mma import ROWS
from ..tuning import Config
from .job import Job

ROW_LANES = (1, 2)  # wgmma gives a row of the accumulator to 4 neighbouring lanes
ROW_STEP = 8  # between a thread's two rows


def coordinates(mma: cute.TiledMma, columns: int) -> cute.Tensor:
    """(row, column) among the warpgroup's of each of a thread's elements: rows x columns."""
    thread = cute.arch.thread_idx()[0] % 128
    return rows_by_columns(mma.get_slice(thread).partition_C(cute.make_identity_tensor((ROWS, columns))))


def row_of(config: Config, job: Job, warpgroup: Int32, row: Int32) -> Int32:
    """In the sequence: row `row` of a warpgroup's."""
    return job.first_row + ((warpgroup * ROWS + row) >> (config.heads.bit_length() - 1))


def heads_of_thread(config: Config, job: Job, warpgroup: Int32) -> list[Int32]:
    """The heads of a thread's rows: one of both, or one of each. None exist from `job.end_head` on."""
    if config.heads == 1:
        return [job.head]
    thread = cute.arch.thread_idx()[0] % 128
    first = warpgroup * ROWS + thread // 32 * 16 + thread % 32 // 4
    rows = [first] if config.heads <= ROW_STEP else [first, first + ROW_STEP]
    return [job.head + (row & (config.heads - 1)) for row in rows]
