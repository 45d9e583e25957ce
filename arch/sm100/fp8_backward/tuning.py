"""Tiles of Blackwell's FP8 gradients: as for 16 bits, but for what 8 bits change.

Tiles of Q, K, V and dO take half the bytes, so that two stages of each fit up to 256 columns. Products take
half the clocks: at (128, 128) 2560 for five of 128 x 128, which exponentials (1024 of ex2) run beside. CTAs
have no pairs: those halve what shared memory gives to products of 16 bits. No row was timed.
"""

from __future__ import annotations

from ...tuning import GradientTable
from ..backward.tuning import AT_ONCE, PIECEWISE, Row, serves
from ..tuning import HEAVY, LIGHT
from .config import Config

ROWS = (
    Row(
        head_dim=64, head_dim_v=64, pressure=HEAVY, config=Config(p_apart=True, **PIECEWISE),
        why="as for 16 bits",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=LIGHT, config=Config(**AT_ONCE),
        why="as for 16 bits, with a second tile of dO",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=HEAVY, config=Config(**PIECEWISE),
        why="likewise",
    ),
    Row(
        head_dim=192, head_dim_v=128, pressure=HEAVY, config=Config(tile_m=64, chunk=16, sums=4, **AT_ONCE),
        why="as for 16 bits",
    ),
    Row(
        head_dim=192, head_dim_v=192, pressure=HEAVY, config=Config(tile_n=64, chunk=16, **PIECEWISE),
        why="as for 16 bits",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVY, config=Config(tile_n=64, chunk=16, **AT_ONCE),
        why="as for 16 bits",
    ),
)  # fmt: skip
TABLE = GradientTable(rows=ROWS, serves=serves)
