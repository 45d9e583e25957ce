"""Tiles of Hopper's FP8 gradients: as for 16 bits (`..backward.tuning`), but for what 8 bits change.

P and dS take a quarter of the registers of S and dP, not half. dK and dV are summed outside the tensor core,
so that a product has an accumulator of its own, and two are under way at a time. No row was timed.
"""

from __future__ import annotations

from ...tuning import GradientTable
from ..backward.tuning import HEAVIEST, Row, serves
from .config import Config

ROWS = (
    Row(
        head_dim=32, head_dim_v=32, pressure=HEAVIEST,
        config=Config(columns=32, columns_v=32, piece_columns=32),
        why="the next row's, of whose columns half would be padding",
    ),
    Row(
        head_dim=64, head_dim_v=64, pressure=HEAVIEST,
        config=Config(columns=64, columns_v=64, piece_columns=64),
        why="a piece has all columns",
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
        why="dK and dV take 128 registers, S and dP 64",
    ),
)  # fmt: skip
TABLE = GradientTable(rows=ROWS, serves=serves)
