"""Tiles of the kernel for caches of 8 bits: the forward kernel's, where registers and 100 KB allow.

Of K and V there is one tile of 16 bits each beside those of 8 under way, so that two stages take as much
shared memory as two of 16 bits, and further ones half as much. No row was timed.
"""

from __future__ import annotations

from dataclasses import replace

from ...problem import Device
from ...tuning import Row, Table
from ...widened import WidenedProblem
from .. import tuning
from ..tuning import FEW_ROWS, HEAVY, LIGHT
from .config import Config

LEAST_STAGES = 2  # one to be widened while another is under way


def fitted(config: Config, problem: WidenedProblem, device: Device) -> Config | None:
    """As for 16 bits, with two stages at least."""
    found = tuning.fitted(replace(config, stages=LEAST_STAGES), problem, device)
    return found and replace(found, stages=LEAST_STAGES)


def for_few_rows(config: Config, problem: WidenedProblem, device: Device) -> Config:
    """As for 16 bits, with two stages at least."""
    few = tuning.for_few_rows(config, problem, device)
    return replace(few, stages=max(few.stages, LEAST_STAGES))


ROWS = (
    Row(
        head_dim=96, head_dim_v=96, pressure=LIGHT,
        config=Config(tile_m=128, tile_n=64, warps=4),
        why="as for 16 bits; at (64, 64) rows of several heads and parts of keys spill with 80 keys",
    ),
    Row(
        head_dim=256, head_dim_v=128, pressure=LIGHT,
        config=Config(tile_m=128, tile_n=32, warps=4),
        why="32 rows a warp, of which 16 bits leave registers for 48 keys; with pages these spill here",
    ),
    Row(
        head_dim=256, head_dim_v=128, pressure=HEAVY,
        config=Config(tile_m=64, tile_n=64, warps=4),
        why="as for 16 bits",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVY,
        config=Config(tile_m=64, tile_n=64, warps=4),
        why="as for 16 bits",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVY,
        config=Config(tile_m=64, tile_n=32, warps=4),
        why="fits 100 KB",
    ),
)  # fmt: skip
TABLE = Table(
    rows=ROWS,
    register_pressure=tuning.register_pressure,
    fitted=fitted,
    at_once=tuning.at_once,
    most_heads=8,
    few_rows=FEW_ROWS,
    for_few_rows=for_few_rows,
)
