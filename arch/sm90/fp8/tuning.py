"""Tile sizes of Hopper's FP8 kernel: a table, read top to bottom; the first row that serves is taken.

A thread holds S (tile_n / 2 registers), P (tile_n / 8), O and the product that is added to it (head_dim_v /
2 each). A block of scales has whole tiles: one number scales all of a tile's scores.
"""

from __future__ import annotations

from dataclasses import replace

from ...problem import Device
from ...quantized import QuantizedProblem
from ...tuning import Row, Table
from .config import Config

SIZES = {"consumers": 2, "stages": 2, "producer_registers": 40, "consumer_registers": 232}
LIGHT, HEAVY, HEAVIEST = range(3)


def register_pressure(problem: QuantizedProblem, device: Device) -> int:
    """HEAVY: rules read tables, or a score goes by positions, or there is one beside scales of blocks.
    HEAVIEST: a mask reads tables, and sequences have lengths of their own. Otherwise LIGHT.
    """
    mask, score = problem.mask, problem.score
    if mask is not None and mask.reads_tables():
        return HEAVIEST if problem.ragged_k else HEAVY
    heavy = score is not None and (problem.block or score.sees_positions() or score.reads_tables())
    return HEAVY if heavy else LIGHT


def fitted(config: Config, problem: QuantizedProblem, device: Device) -> Config | None:
    """The config, where blocks of scales have whole tiles."""
    return None if problem.block and problem.block % config.tile_n else config


TABLE = Table(
    rows=(
        Row(
            head_dim=128, head_dim_v=128, pressure=LIGHT,
            config=Config(**SIZES, tile_n=128, q_in_registers=True),
            why="208 registers of 232",
        ),
        Row(
            head_dim=128, head_dim_v=128, pressure=HEAVY,
            config=Config(**SIZES, tile_n=64),
            why="for what rules keep, and for scales of blocks of 64 rows",
        ),
        Row(
            head_dim=128, head_dim_v=128, pressure=HEAVIEST,
            config=Config(**SIZES, tile_n=32),
            why="64 spills with documents, a score of one's own and parts of keys",
        ),
    ),
    register_pressure=register_pressure,
    fitted=fitted,
    at_once=lambda config, problem, device: device.multiprocessors,
    # As for 16 bits: tiles of different lengths go longest first.
    scheduled=lambda config, problem, device: replace(config, longest_first=not problem.sees_evenly),
)  # fmt: skip
