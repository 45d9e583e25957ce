"""Tiles of Blackwell's FP8 kernel: as for 16 bits, but for what 8 bits change.

O, of 16 bits, does not fit into Q's place: it has its own, so that CTAs may persist at every head dim. Q, K
and V take half the bytes, and products half the clocks, 512 for 128 x 128 of S at (128, 128): exponentials
bind, 1024 clocks of ex2, at every head dim up to there. Of 32, 6 are moved to the FMA units: as many
as flash-attn-4's kernel moves, by its counts. The timing model would move 12, but knows nothing of what P's
conversions to 8 bits cost hardware. No row was timed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...problem import Device
from ...quantized import QuantizedProblem
from ...tuning import Row, Table
from .. import tuning
from ..tuning import EVEN, HEAVY, LIGHT, ONE_TILE, TWO_TILES, WIDE
from .config import Config


def fitted(config: Config, problem: QuantizedProblem, device: Device) -> Any:
    """As for 16 bits; a maximum that loads bring with them is that of scores without scales of blocks."""
    found = tuning.fitted(config, problem, device)
    return found and replace(found, reducing_loads=found.reducing_loads and problem.block is None)


ROWS = (
    Row(
        head_dim=128, head_dim_v=128, pressure=LIGHT,
        config=Config(**TWO_TILES, **EVEN, tile_n=128, k_stages=3, v_stages=3, polynomial=6),
        why="three stages of K and V are what shared memory holds beside O",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=HEAVY,
        config=Config(**TWO_TILES, **WIDE, tile_n=32, k_stages=4, v_stages=4, polynomial=0),
        why="tile_n as for 16 bits, whose rules these are",
    ),
    Row(
        head_dim=192, head_dim_v=128, pressure=LIGHT,
        config=Config(**TWO_TILES, **EVEN, tile_n=128, k_stages=2, v_stages=2, polynomial=6),
        why="two stages are what shared memory holds",
    ),
    Row(
        head_dim=256, head_dim_v=128, pressure=LIGHT,
        config=Config(**TWO_TILES, **EVEN, tile_n=128, k_stages=2, v_stages=1, polynomial=6),
        why="shared memory has no room for a second V",
    ),
    Row(
        head_dim=256, head_dim_v=128, pressure=HEAVY,
        config=Config(**TWO_TILES, **EVEN, tile_n=64, k_stages=2, v_stages=2, polynomial=0),
        why="as for 16 bits",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=LIGHT,
        config=Config(**ONE_TILE, tile_n=128, k_stages=2, v_stages=2, polynomial=6),
        why="two S's keep the tensor cores busy where O leaves room for one tile",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVY,
        config=Config(**ONE_TILE, tile_n=64, k_stages=2, v_stages=2, polynomial=0),
        why="tile_n as registers allow",
    ),
)  # fmt: skip
TABLE = Table(
    rows=ROWS,
    register_pressure=tuning.register_pressure,
    fitted=fitted,
    at_once=lambda config, problem, device: device.multiprocessors // config.ctas,
    most_heads=16,  # as for 16 bits
    scheduled=tuning.scheduled,
)
