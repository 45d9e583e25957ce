"""Tile sizes of Hopper's kernel for caches of 8 bits: a table, read top to bottom.

Registers and shared memory are shared with those who widen, so that no third warpgroup multiplies, and tiles
of wide heads are smaller than for 16 bits. To widen a number to bf16 takes two instructions, for 128 keys at
(128, 128) some 500 issue slots of each scheduler: a quarter of the clocks that the two products of 128 rows
take, and a third of those that an H200's memory does. Where rows are few two warpgroups widen, so that the
one has something to issue where the other waits. No row was timed.
"""

from __future__ import annotations

from dataclasses import replace

from ...problem import Device
from ...tuning import Row, Table
from ...widened import WidenedProblem
from .. import tuning
from ..tuning import FEW_ROWS, NUMBERS, STAGES_FOR_FEW_ROWS, TABLES
from .config import Config


def fitted(config: Config, problem: WidenedProblem, device: Device) -> Config | None:
    """The config where there is room for it."""
    return config if config.shared_memory(problem) <= device.shared_memory else None


def for_few_rows(config: Config, problem: WidenedProblem, device: Device) -> Config:
    """One warpgroup that multiplies, while the others widen, and more of K and V under way."""
    wideners = config.wideners + config.consumers - 1
    few = replace(config, **ONE | {"wideners": wideners, "stages": config.stages})
    deep = (replace(few, stages=stages) for stages in range(STAGES_FOR_FEW_ROWS, few.stages, -1))
    return next((c for c in deep if c.shared_memory(problem) <= device.shared_memory), few)


SIZES = {
    "consumers": 2, "stages": 2, "wide": 2, "wideners": 1, "producer_registers": 40, "widener_registers": 56,
    "consumer_registers": 208,
}  # fmt: skip
ONE = SIZES | {"consumers": 1, "ping_pong": False, "producer_registers": 64, "consumer_registers": 240}
TABLE = Table(
    rows=(
        Row(
            head_dim=128, head_dim_v=128, pressure=NUMBERS,
            config=Config(**SIZES, tile_n=128),
            why="two tiles of each width are what shared memory holds",
        ),
        Row(
            head_dim=192, head_dim_v=128, pressure=NUMBERS,
            config=Config(**SIZES, tile_n=80),
            why="two tiles of each width are what shared memory holds",
        ),
        Row(
            head_dim=192, head_dim_v=128, pressure=TABLES,
            config=Config(**SIZES, tile_n=64),
            why="for the registers that tables take",
        ),
        Row(
            head_dim=256, head_dim_v=256, pressure=NUMBERS,
            config=Config(**ONE, tile_n=64),
            why="a product of 256 columns is compiled for 158 registers a thread at least, which three "
            "warpgroups are launched with, not four",
        ),
        Row(
            head_dim=256, head_dim_v=256, pressure=TABLES,
            config=Config(**ONE, tile_n=64, overlap=False),
            why="in order, P needs no registers of its own",
        ),
    ),
    register_pressure=tuning.register_pressure,
    fitted=fitted,
    at_once=lambda config, problem, device: device.multiprocessors,
    most_heads=16,
    few_rows=FEW_ROWS,
    for_few_rows=for_few_rows,
    scheduled=tuning.scheduled,
)  # fmt: skip
