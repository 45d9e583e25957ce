"""Tiles of Hopper's FP8 gradients: as for 16 bits (`..backward.tuning`), but for what 8 bits change.

P and dS take a quarter of the registers of S and dP, not half. dK and dV are summed outside the tensor core,
so that a product has an accumulator of its own, and two are under way at a time. No row was timed.
"""

from __future__ import annotations

from ...backward import BackwardProblem
from ...problem import Device, Problem
from ...tuning import GradientTable
from ..backward.tuning import HEAVIEST, LIGHT, Row
from ..backward.tuning import register_pressure as of_rules
from .config import Config

PLAIN = LIGHT - 1  # without mask and score


def register_pressure(problem: Problem) -> int:
    """As for 16 bits, or PLAIN."""
    return of_rules(problem) if problem.mask or problem.score else PLAIN


def serves(row: Row, problem: BackwardProblem, device: Device) -> bool:
    """Whether a row is for these head dims, and leaves registers enough."""
    asked = problem.forward
    reaches = asked.head_dim <= row.head_dim and asked.head_dim_v <= row.head_dim_v
    return reaches and register_pressure(asked) <= row.pressure


ROWS = (
    Row(
        head_dim=32, head_dim_v=32, pressure=LIGHT,
        config=Config(
            tile_m=128, columns=32, columns_v=32, piece_columns=32, producer_registers=40,
            consumer_registers=232,
        ),
        why="the next row's, of whose columns half would be padding. In turns, with 24 registers for the "
        "store role and 240, 24 bytes are spilled",
    ),
    Row(
        head_dim=64, head_dim_v=64, pressure=PLAIN,
        config=Config(tile_m=128, columns=64, columns_v=64, piece_columns=64),
        why="S and dP take 128 registers, dK and dV 64; K and V are read half as often",
    ),
    Row(
        head_dim=64, head_dim_v=64, pressure=HEAVIEST,
        config=Config(columns=64, columns_v=64, piece_columns=64),
        why="beside 128 rows a causal mask spills 16 bytes, a score 96",
    ),
    Row(
        head_dim=96, head_dim_v=96, pressure=HEAVIEST,
        config=Config(columns=96, columns_v=96, piece_columns=48),
        why="a piece has as many columns as a warpgroup of dQ",
    ),
    Row(
        head_dim=128, head_dim_v=64, pressure=HEAVIEST,
        config=Config(columns=128, columns_v=64, piece_columns=64),
        why="the same registers",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=HEAVIEST,
        config=Config(columns=128, columns_v=128, piece_columns=32),
        why="dK and dV take 128 registers, S and dP 64. Two pieces of 64 columns spill 64 bytes",
    ),
)  # fmt: skip
TABLE = GradientTable(rows=ROWS, serves=serves)
