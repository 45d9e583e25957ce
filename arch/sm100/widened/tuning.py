"""Tiles of Blackwell's kernel for caches of 8 bits: one Q tile, as few queries fill; for many it is what
leaves registers and shared memory to those who widen.

To widen a number to bf16 takes two instructions, for 128 keys at (128, 128) some 500 issue slots of each
scheduler, of some 1200 clocks that a B200's memory takes. No row was timed.
"""

from __future__ import annotations

from dataclasses import replace

from ...problem import Device
from ...tuning import Row, Table
from ...widened import WidenedProblem
from .. import tuning
from ..tuning import HEAVY, LIGHT
from .config import Config

STAGES_FOR_FEW_ROWS = 4  # as for 16 bits


def for_few_rows(config: Config, problem: WidenedProblem, device: Device) -> Config:
    """More of K and V under way, as far as there is shared memory."""
    depths = range(STAGES_FOR_FEW_ROWS, config.k_stages, -1)
    deep = (replace(config, k_stages=stages, v_stages=stages) for stages in depths)
    return next((c for c in deep if c.shared_memory(problem) <= device.shared_memory), config)


SIZES = {
    "tiles": 1, "slots": 2, "softmax_registers": 240, "correction_registers": 80, "other_registers": 112,
    "widener_registers": 80,
}  # fmt: skip
TABLE = Table(
    rows=(
        Row(
            head_dim=128, head_dim_v=128, pressure=LIGHT,
            config=Config(**SIZES, tile_n=128, k_stages=2, v_stages=2, wide=2, polynomial=0),
            why="two tiles of each width are what shared memory holds; a polynomial spills",
        ),
        Row(
            head_dim=192, head_dim_v=128, pressure=HEAVY,
            config=Config(**SIZES, tile_n=64, k_stages=3, v_stages=3, wide=2, polynomial=0),
            why="tile_n as registers allow, and as shared memory does beyond 128",
        ),
        Row(
            head_dim=256, head_dim_v=256, pressure=HEAVY,
            config=Config(**SIZES, tile_n=64, k_stages=3, v_stages=3, wide=1, polynomial=0),
            why="more of 8 bits under way rather than a second tile of 16",
        ),
    ),
    register_pressure=tuning.register_pressure,
    fitted=tuning.fitted,
    at_once=lambda config, problem, device: device.multiprocessors,
    most_heads=16,  # as for 16 bits
    few_rows=tuning.TILE_M,
    for_few_rows=for_few_rows,
)  # fmt: skip
