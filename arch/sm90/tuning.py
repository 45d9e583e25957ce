"""Tile sizes of the sm90 kernels: a table, read top to bottom; the first row that serves is taken.

What chose the rows: registers, then shared memory. S, P and O of a thread take tile_n / 2 + tile_n / 4 +
head_dim_v / 2 registers and about 30 more are needed beside, as cubins show: no row spills. `setmaxnreg`
moves registers inside what a CTA is launched with: 504 for three warpgroups, 512 for four. Both ways to
overlap where registers allow: without the one inside a warpgroup FlashAttention-3 falls from 661 to 582
TFLOP/s (Shah et al. 2024, table 2: H100, head dim 128). In order, P takes the place of S. No row was timed.
"""

from __future__ import annotations

from dataclasses import replace

from ..problem import Device, Problem
from ..tuning import Row, Table
from .config import Config

PLAIN, NUMBERS, TABLES = range(3)


def register_pressure(problem: Problem, device: Device) -> int:
    """NUMBERS: its rules hold values, or a score goes by positions. TABLES: they read tables, or there is
    dropout. Otherwise PLAIN.
    """
    rules = [rule for rule in (problem.mask, problem.score) if rule]
    if problem.dropout or any(rule.reads_tables() for rule in rules):
        return TABLES
    positions = problem.score is not None and problem.score.sees_positions()
    return NUMBERS if positions or any(rule.leaves() for rule in rules) else PLAIN


def fitted(config: Config, problem: Problem, device: Device) -> Config | None:
    """The config where there is room for it; dropout draws its numbers for 32 keys at a time.

    Who looks up pages needs more registers than who does not: of two warpgroups' that multiply.
    """
    if problem.page_size and config.producer_registers < 40:
        config = replace(config, **LOOKING_UP[config.consumers])
    fits = config.shared_memory(problem) <= device.shared_memory
    return config if fits and not (problem.dropout and config.tile_n % 32) else None


# Registers where keys lie in pages, by how many warpgroups multiply.
LOOKING_UP: dict[int, dict[str, int]] = {
    2: {"producer_registers": 40, "consumer_registers": 232},
    3: {"producer_registers": 32, "consumer_registers": 160},
}
# Rows of Q that one warpgroup takes: with no more, a second one would have nothing to do.
FEW_ROWS = 64
STAGES_FOR_FEW_ROWS = 4  # K and V then stream through once: as many bytes under way as shared memory holds


def for_few_rows(config: Config, problem: Problem, device: Device) -> Config:
    """One warpgroup, nobody to take turns with, and more of K and V under way."""
    few = replace(config, consumers=1, producer_registers=24, consumer_registers=240, ping_pong=False)
    if problem.page_size:
        few = replace(few, producer_registers=64)
    deep = (replace(few, stages=stages) for stages in range(STAGES_FOR_FEW_ROWS, few.stages, -1))
    return next((c for c in deep if c.shared_memory(problem) <= device.shared_memory), few)


def scheduled(config: Config, problem: Problem, device: Device) -> Config:
    """The order of the tiles.

    Tiles of different lengths (masks, packed sequences) go longest first to whichever multiprocessor is free:
    the hardware gives a CTA for each its place. Equal tiles leave nothing to balance, so CTAs may persist: O
    leaves while the next tile's Q, K and V arrive, if there is shared memory for Q and O at once.
    """
    if problem.mask is not None or problem.block_size or problem.varlen or problem.cache:
        return replace(config, longest_first=True)
    persistent = replace(config, persistent=True)
    fits = persistent.shared_memory(problem) <= device.shared_memory
    return persistent if fits and device.multiprocessors > 1 and not problem.split_kv else config


TWO = {"consumers": 2, "stages": 2, "producer_registers": 24, "consumer_registers": 240}
ROWS = (
    Row(
        head_dim=64, head_dim_v=64, pressure=PLAIN,
        config=Config(consumers=3, tile_n=128, stages=2, producer_registers=32, consumer_registers=160),
        why="a third warpgroup reads each tile of K and V for 192 rows instead of 128, but leaves 160 "
        "registers to each: with a window's two numbers, or a score that goes by positions, it spills",
    ),
    Row(
        head_dim=64, head_dim_v=64, pressure=NUMBERS,
        config=Config(**TWO, tile_n=128),
        why="two warpgroups, for the registers that values of rules take",
    ),
    Row(
        head_dim=64, head_dim_v=64, pressure=TABLES,
        config=Config(**TWO, tile_n=96),
        why="tables and dropout take registers from S; with documents, a score of one's own and dropout 128 "
        "does not spill either",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=NUMBERS,
        config=Config(**TWO, tile_n=128),
        why="two stages and a place for O, so that CTAs persist; rows beyond need another for that",
    ),
    Row(
        head_dim=192, head_dim_v=128, pressure=NUMBERS, even=True,
        config=Config(**(TWO | {"stages": 3}), tile_n=64),
        why="leaves shared memory for O beside Q, so that CTAs persist: 2 to 10 % by the timing model on an "
        "H200",
    ),
    Row(
        head_dim=192, head_dim_v=128, pressure=NUMBERS,
        config=Config(**TWO, tile_n=128),
        why="two stages of (192, 128) in shared memory",
    ),
    Row(
        head_dim=192, head_dim_v=128, pressure=TABLES,
        config=Config(**TWO, tile_n=64),
        why="as for (64, 64), with 32 registers more for O; 96 does not spill there either",
    ),
    Row(
        head_dim=192, head_dim_v=192, pressure=NUMBERS,
        config=Config(**TWO, tile_n=112),
        why="two stages of (192, 192) in shared memory",
    ),
    Row(
        head_dim=192, head_dim_v=192, pressure=TABLES,
        config=Config(**TWO, tile_n=64),
        why="as for (192, 128), with 32 registers more for O; 96 does not spill there either",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=NUMBERS,
        config=Config(consumers=2, tile_n=80, stages=2, producer_registers=40, consumer_registers=232),
        why="two stages of (256, 256) in shared memory",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=TABLES,
        config=Config(**TWO, tile_n=64, overlap=False),
        why="O takes 128 registers: in order, P needs none of its own",
    ),
)  # fmt: skip
FORWARD = Table(
    rows=ROWS,
    register_pressure=register_pressure,
    fitted=fitted,
    at_once=lambda config, problem, device: device.multiprocessors,
    most_heads=16,  # a group of more is taken in several
    few_rows=FEW_ROWS,
    for_few_rows=for_few_rows,
    scheduled=scheduled,
)
