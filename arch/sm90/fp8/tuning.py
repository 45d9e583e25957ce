"""Tile sizes of Hopper's FP8 kernel: a table, read top to bottom; the first row that serves is taken.

A thread holds S (tile_n / 2 registers), P (tile_n / 8), O (head_dim_v / 2), a piece of the product that is
added to it (half of part_columns at most), and where it is kept Q (head_dim / 8). For 128 x 128 scores an SM
needs 1024 clocks for exponentials, 4 * (head_dim + head_dim_v) for products, and for shared memory
3 * head_dim of K, 5 * head_dim_v of V, and of Q, unless it is kept, as many as 128 * head_dim / tile_n. A
block of scales has whole tiles: one number scales all of a tile's scores.
"""

from __future__ import annotations

from dataclasses import replace

from ...problem import Device
from ...quantized import QuantizedProblem
from ...tuning import Row, Table
from .config import Config

SIZES = {"consumers": 2, "stages": 2, "producer_registers": 40, "consumer_registers": 232}
LIGHT, HEAVY = range(2)


def register_pressure(problem: QuantizedProblem, device: Device) -> int:
    """HEAVY: a score goes by positions, or reads tables. Otherwise LIGHT."""
    score = problem.score
    return HEAVY if score is not None and (score.sees_positions() or score.reads_tables()) else LIGHT


def fitted(config: Config, problem: QuantizedProblem, device: Device) -> Config | None:
    """The config, where blocks of scales have whole tiles."""
    return None if problem.block and problem.block % config.tile_n else config


TABLE = Table(
    rows=(
        Row(
            head_dim=64, head_dim_v=64, pressure=LIGHT,
            config=Config(**SIZES, tile_n=192),
            why="exponentials bind, of which four for each row and tile are of factors",
        ),
        Row(
            head_dim=192, head_dim_v=128, pressure=LIGHT,
            config=Config(**SIZES, tile_n=128, q_in_registers=True),
            why="at 128 products, exponentials and shared memory take as long, which Q would add to",
        ),
        Row(
            head_dim=256, head_dim_v=128, pressure=LIGHT,
            config=Config(**SIZES, tile_n=128),
            why="Q's 32 registers were too many in some kernels; shared memory takes as long as products",
        ),
        Row(
            head_dim=192, head_dim_v=192, pressure=LIGHT,
            config=Config(**SIZES, tile_n=128, part_columns=48),
            why="O's 96 registers leave room for 64 columns and 96 keys, or for this",
        ),
        Row(
            head_dim=256, head_dim_v=256, pressure=LIGHT,
            config=Config(**SIZES, tile_n=96, part_columns=32),
            why="what shared memory holds, and beside O's 128 registers a thread",
        ),
        Row(
            head_dim=192, head_dim_v=192, pressure=HEAVY,
            config=Config(**SIZES, tile_n=64),
            why="for what rules keep: beside a window, 128 keys spill; and for scales of blocks of 64 rows",
        ),
        Row(
            head_dim=256, head_dim_v=256, pressure=HEAVY,
            config=Config(**SIZES, tile_n=64, part_columns=32),
            why="likewise, and for blocks of 128 rows, which 96 does not divide; 64 columns spill",
        ),
    ),
    register_pressure=register_pressure,
    fitted=fitted,
    at_once=lambda config, problem, device: device.multiprocessors,
    # As for 16 bits: tiles of different lengths go longest first.
    scheduled=lambda config, problem, device: replace(config, longest_first=not problem.sees_evenly),
)  # fmt: skip
