"""Tile sizes of the sm80 kernels: a table, read top to bottom; the first row that fits serves.

What chose the rows: registers, as the compiler reports them (no row may spill, on any target, with any
rule that it is for), then shared-memory traffic per matrix instruction, then CTAs per SM. No row was
timed.
"""

from __future__ import annotations

from dataclasses import replace

from ..problem import Device, Problem
from ..tuning import Row, Table
from .config import Config

LIGHT, HEAVY = range(2)
WIDE = 256  # columns of O, of which a warp has registers for so many


def register_pressure(problem: Problem, device: Device) -> int:
    """LIGHT: no arithmetic per score beyond the scale and a comparison or two."""
    light_mask = problem.mask is None or problem.mask.is_light()
    return LIGHT if light_mask and not (problem.score or problem.dropout) else HEAVY


def fitted(config: Config, problem: Problem, device: Device) -> Config | None:
    """With two stages where they cost no resident CTA, or where they are needed; None where not even one CTA
    fits.

    None, too, for 32 rows a warp of so wide a V that code for sm_120 spills where that for sm_80 just fits,
    and for as wide an S, or 256 columns of O a warp, on 10.x, for the same reason. Warps abreast serve what
    is too wide for one.
    """
    if config.abreast > 1 and max(problem.head_dim, problem.head_dim_v) <= WIDE:
        return None
    deeper = replace(config, stages=2)
    if problem.cache and problem.cache.latent:  # the next tile cannot come where V is still being read
        config = deeper
    resident = config.resident(problem, device)
    wide_v = problem.head_dim_v > 96 and device.capability >= (12, 0)
    wide_s = config.tile_n > 96 and device.capability >= (10, 0)
    too_wide = config.rows_of_a_warp > 16 and (wide_v or wide_s)
    too_wide |= config.abreast == 2 and device.capability[0] == 10
    if not resident or too_wide:
        return None
    return deeper if deeper.resident(problem, device) == resident else config


def at_once(config: Config, problem: Problem, device: Device) -> int:
    """CTAs that the device holds."""
    return device.multiprocessors * config.resident(problem, device)


FEW_ROWS = 64  # of 16 for each of four warps
STAGES_FOR_FEW_ROWS = 4  # K and V then stream through once: as many under way as leave room for two CTAs


def for_few_rows(config: Config, problem: Problem, device: Device) -> Config:
    """Small tiles of Q, and more of K and V under way, where keys are all that there is to move.

    How many keys make a block stays as it is for many rows, for a row's numbers depend on that. A single head
    whose keys are no cache is taken as many rows are.
    """
    if config.heads == 1 and problem.cache is None:
        return config
    few = replace(config, stages=1 if config.abreast == 1 else config.stages)
    if config.tile_m > FEW_ROWS:
        few = replace(few, tile_m=FEW_ROWS, warps=4)
    deep = (replace(few, stages=stages) for stages in range(STAGES_FOR_FEW_ROWS, 1, -1))
    resident = min(few.resident(problem, device), 2)
    return next((c for c in deep if c.resident(problem, device) >= resident), few)


# Of a warp's rows a thread holds rows * head_dim_v / 32 numbers of O and rows * tile_n / 32 of S.
ROWS = (
    Row(
        head_dim=64, head_dim_v=64, pressure=LIGHT, even=True,
        config=Config(tile_m=128, tile_n=128, warps=4),
        why="by the timing model 6 to 13 % more on an A100 than with 96; with a mask it spills",
    ),
    Row(
        head_dim=64, head_dim_v=64, pressure=LIGHT,
        config=Config(tile_m=128, tile_n=80, warps=4),
        why="32 rows a warp: half the reads of K and V for a product that 16 rows need; tile_n 112 spills, "
        "and 96 has causal warps of two CTAs in step by the timing model: 134 TFLOP/s on an A100, not 192",
    ),
    Row(
        head_dim=96, head_dim_v=96, pressure=LIGHT,
        config=Config(tile_m=128, tile_n=64, warps=4),
        why="32 rows a warp",
    ),
    Row(
        head_dim=256, head_dim_v=128, pressure=LIGHT,
        config=Config(tile_m=128, tile_n=48, warps=4),
        why="32 rows a warp; tile_n 64 leaves no register to spare, and spills when compiled with CUDA 13",
    ),
    Row(
        head_dim=256, head_dim_v=128, pressure=HEAVY,
        config=Config(tile_m=64, tile_n=64, warps=4),
        why="16 rows a warp, for 32 spill with some rules; small CTAs hide each other's barriers",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=LIGHT,
        config=Config(tile_m=128, tile_n=64, warps=8),
        why="16 rows a warp; 8 warps share each tile of K and V; with a score rule and a prefix mask it "
        "spilled",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVY,
        config=Config(tile_m=64, tile_n=64, warps=4),
        why="16 rows a warp, the most that 256 columns of O allow; fits 100 KB",
    ),
    Row(
        head_dim=576, head_dim_v=576, pressure=HEAVY,
        config=Config(tile_m=64, tile_n=32, warps=4, abreast=2),
        why="two warps to 16 rows, for 256 columns of O each are what registers hold",
    ),
    Row(
        head_dim=576, head_dim_v=576, pressure=HEAVY,
        config=Config(tile_m=32, tile_n=16, warps=2, abreast=4),
        why="fits 100 KB",
    ),
)  # fmt: skip
FORWARD = Table(
    rows=ROWS,
    register_pressure=register_pressure,
    fitted=fitted,
    at_once=at_once,
    most_heads=8,  # a group of more is taken in several
    few_rows=FEW_ROWS,
    for_few_rows=for_few_rows,
    # 32 rows a warp of several heads spill at (128, 128) with parts of keys; a cache is to be read once.
    shares_many=lambda problem: problem.cache is not None,
)
