"""Tiles of Blackwell's FP8 gradients: as for 16 bits, but for what 8 bits change.

Tiles of Q, K, V and dO take half the bytes, so that two stages of each fit. dS takes a quarter of the bytes
that sums of dK and dV are staged in, `chunk` columns of each, in dS's place: so these are 16. No row was
timed.
"""

from __future__ import annotations

from ...tuning import GradientTable
from ..backward.tuning import AT_ONCE, PIECEWISE, Row, serves
from ..tuning import HEAVY, LIGHT
from .config import Config

ROWS = (
    Row(
        head_dim=64, head_dim_v=64, pressure=HEAVY, config=Config(p_apart=True, chunk=16, **PIECEWISE),
        why="as for 16 bits",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=LIGHT, config=Config(chunk=16, **AT_ONCE),
        why="as for 16 bits, with a second tile of dO",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=HEAVY, config=Config(chunk=16, **PIECEWISE),
        why="likewise",
    ),
)  # fmt: skip
TABLE = GradientTable(rows=ROWS, serves=serves)
