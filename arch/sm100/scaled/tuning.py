"""Tiles of Blackwell's block-scaled kernel: as for FP8, but for what factors take.

S of 128 keys and O of 128 columns, of two Q tiles, leave no column of tensor memory for factors, so that
beyond head dim 64 of v a block has 96 keys: then the products of 128 keys at (128, 128) take some 1109 clocks
of shared memory's reads, by counts, and with NVFP4 for Q K 811, where exponentials take 1024. Of 32, 12 are
moved to the FMA units, as at head dim 64 in 16 bits: the counts then balance, and the timing model says 15 to
55 % more than with 6. No row was timed.
"""

from __future__ import annotations

from typing import Any

from ...block_scaled import BlockScaledProblem
from ...problem import Device
from ...tuning import Row, Table
from .. import tuning
from ..tuning import HEAVY, LIGHT, ONE_TILE, TWO_TILES, WIDE
from .config import Config

TENSOR_COLUMNS = 512
# The mma warp finds factors besides operands, and takes more registers than for FP8.
FACTORS = {"softmax_registers": 192, "correction_registers": 64, "other_registers": 64}


def fitted(config: Config, problem: BlockScaledProblem, device: Device) -> Any:
    """As for 16 bits, where there is room in tensor memory."""
    found = tuning.fitted(config, problem, device)
    return found if found and found.tensor_columns(problem) <= TENSOR_COLUMNS else None


ROWS = (
    Row(
        head_dim=128, head_dim_v=64, pressure=LIGHT,
        config=Config(**TWO_TILES, **WIDE, tile_n=128, k_stages=2, v_stages=2, polynomial=8),
        why="an O of 64 columns leaves 128 of tensor memory for factors; with 12 polynomials it spills, and "
        "with wider heads the mma warp does",
    ),
    Row(
        head_dim=256, head_dim_v=128, pressure=LIGHT,
        config=Config(**TWO_TILES, **FACTORS, tile_n=96, k_stages=2, v_stages=2, polynomial=12),
        why="64 columns of tensor memory remain for factors",
    ),
    Row(
        head_dim=256, head_dim_v=128, pressure=LIGHT,
        config=Config(**TWO_TILES, **FACTORS, tile_n=64, k_stages=2, v_stages=2, polynomial=12),
        why="where those of more columns, of 4-bit q and k beside v with factors, take more",
    ),
    Row(
        head_dim=256, head_dim_v=128, pressure=HEAVY,
        config=Config(**TWO_TILES, **WIDE, tile_n=32, k_stages=4, v_stages=4, polynomial=0),
        why="tile_n as for 16 bits, whose rules these are",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=LIGHT,
        config=Config(**ONE_TILE, tile_n=96, k_stages=2, v_stages=2, polynomial=6),
        why="two S's keep the tensor cores busy where O leaves room for one tile",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVY,
        config=Config(**ONE_TILE, tile_n=64, k_stages=2, v_stages=2, polynomial=0),
        why="tile_n as registers and tensor memory allow",
    ),
)  # fmt: skip
TABLE = Table(
    rows=ROWS,
    register_pressure=tuning.register_pressure,
    fitted=fitted,
    at_once=lambda config, problem, device: device.multiprocessors // config.ctas,
    scheduled=tuning.scheduled,
)
