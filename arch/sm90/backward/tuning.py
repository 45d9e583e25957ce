"""Tile sizes of Hopper's backward kernel: a table, read top to bottom; the first row that serves is taken.

There are two ways to share out the work, the second for a CTA alone and for a pair. What a row rests on is
worked out and checked when it is made. For a thread of a warpgroup, which has `keys` of the CTA's keys and
64 x part_columns of dQ:

                        Config          WideConfig
    S, dP               tile_m / 2      keys / 2                registers each
    P, dS as operands   tile_m / 4      in shared memory        each
    dK                  columns / 2     columns * keys / 128    dV likewise, of columns_v
    dQ                  part_columns/2  slice_columns / 2       of part_columns / 2, in turn

and everything else, addresses and rules' values, lives in what is left of consumer_registers. Every query
tile that passes adds 4 * tile_m * columns bytes of dQ to global memory, for five products with tile_n keys:
tile_n is what lowers that, and a pair doubles it. Up to 128 columns two warpgroups of 64 keys leave room for
dK and dV; beyond, a warpgroup has as many keys, in steps of 8, as registers allow. No row was timed.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...backward import BackwardProblem
from ...problem import Device, Problem
from ...tuning import GradientTable
from .config import (
    DRAWN,
    Config,
    PairConfig,
    Tiling,
    WideConfig,
)

LIGHT, HEAVY, HEAVIEST = range(3)


def register_pressure(problem: Problem) -> int:
    """LIGHT: no arithmetic per score beyond the scale and a comparison or two. HEAVIEST: with dropout."""
    light_mask = problem.mask is None or problem.mask.is_light()
    if light_mask and not problem.score:
        return HEAVY if problem.dropout else LIGHT
    return HEAVIEST if problem.dropout else HEAVY


@dataclass(frozen=True, kw_only=True)
class Row:
    """A config for head dims up to `head_dim` of Q and K, `head_dim_v` of V.

    pressure: the highest `register_pressure` of a problem that leaves it registers enough.
    """

    head_dim: int
    head_dim_v: int
    pressure: int
    config: Tiling
    why: str


BACKWARD = (
    Row(
        head_dim=32, head_dim_v=32, pressure=LIGHT, config=Config(tile_m=128, columns=32, columns_v=32),
        why="the next row's, of whose columns half would be padding",
    ),
    Row(
        head_dim=64, head_dim_v=64, pressure=LIGHT, config=Config(tile_m=128, columns=64, columns_v=64),
        why="FlashAttention-3's tile: S and dP take 128 registers, dK and dV 64",
    ),
    Row(
        head_dim=64, head_dim_v=64, pressure=HEAVIEST, config=Config(tile_m=64, columns=64, columns_v=64),
        why="128 rows and a score's slopes spill",
    ),
    Row(
        head_dim=96, head_dim_v=96, pressure=HEAVIEST,
        config=Config(tile_m=64, columns=96, columns_v=96, producer_registers=40, consumer_registers=232),
        why="FlashAttention-3's tile: S and dP take 64 registers, dK and dV 96; 128 rows would take 224. In "
        "turns, with 24 registers for the store role and 240, 8 bytes are spilled",
    ),
    Row(
        head_dim=128, head_dim_v=64, pressure=HEAVIEST, config=Config(tile_m=64, columns=128, columns_v=64),
        why="the same registers",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=LIGHT, config=Config(tile_m=64, columns=128, columns_v=128),
        why="FlashAttention-3's tile for masks: S and dP take 64 registers, dK and dV 128. For a pair's dQ, "
        "32 columns of a warpgroup, more of dS would be read than fewer bytes of dQ save",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=HEAVIEST,
        config=Config(tile_m=64, columns=128, columns_v=128, overlap=False),
        why="beside dP a mask by documents spills 16 bytes, a score and dropout 24 registers",
    ),
    Row(
        head_dim=192, head_dim_v=128, pressure=LIGHT,
        config=PairConfig(
            columns=192, columns_v=128, keys=56, slice_columns=48, handed_columns=48, q_stages=2
        ),
        why="dK and dV take 140 registers, S and dP 56; for 128 keys all would take 224",
    ),
    Row(
        head_dim=192, head_dim_v=128, pressure=HEAVY,
        config=PairConfig(
            columns=192, columns_v=128, keys=56, slice_columns=48, handed_columns=48, q_stages=2,
            overlap=False,
        ),
        why="the same keys; beside dP a score spills 24 bytes",
    ),
    Row(
        head_dim=128, head_dim_v=256, pressure=HEAVY,
        config=WideConfig(columns=128, columns_v=256, keys=48, slice_columns=64, handed_columns=64),
        why="dK and dV take 144 registers, S and dP 48. For a pair's dQ, 32 columns of a warpgroup, more of "
        "dS would be read than fewer bytes of dQ save",
    ),
    Row(
        head_dim=192, head_dim_v=192, pressure=HEAVY,
        config=PairConfig(
            columns=192, columns_v=192, keys=48, slice_columns=48, handed_columns=48, q_stages=2
        ),
        why="dK and dV take 144 registers, S and dP 48",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=LIGHT,
        config=PairConfig(columns=256, columns_v=256, keys=40, slice_columns=64, handed_columns=32),
        why="dK and dV take 160 registers, S and dP 40; beside the other's K and dS there is room for one "
        "tile of Q",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVY,
        config=PairConfig(
            columns=256, columns_v=256, keys=40, slice_columns=64, handed_columns=32, overlap=False
        ),
        why="the same keys; beside dP a score spills 24 bytes",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=HEAVIEST,
        config=WideConfig(
            columns=128, columns_v=128, keys=32, slice_columns=64, handed_columns=64, grad_out_stages=2
        ),
        why="for blocks of 64 keys",
    ),
    Row(
        head_dim=192, head_dim_v=192, pressure=HEAVIEST,
        config=PairConfig(
            columns=192, columns_v=192, keys=32, slice_columns=48, handed_columns=48, q_stages=2,
            grad_out_stages=2,
        ),
        why="for dropout, which draws numbers for 32 keys together, and for blocks of 128 keys",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVIEST,
        config=PairConfig(
            columns=256, columns_v=256, keys=32, slice_columns=64, handed_columns=32, q_stages=2
        ),
        why="likewise",
    ),
    Row(
        head_dim=192, head_dim_v=192, pressure=HEAVIEST,
        config=WideConfig(columns=192, columns_v=192, keys=32, slice_columns=96, handed_columns=96),
        why="for blocks of 64 keys",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVIEST,
        config=WideConfig(columns=256, columns_v=256, keys=32, slice_columns=128, handed_columns=64),
        why="likewise",
    ),
)  # fmt: skip


def serves(row: Row, problem: BackwardProblem, device: Device) -> bool:
    """Whether a row is for these head dims, its warpgroups have keys as dropout draws them, and registers
    are enough.
    """
    asked, config = problem.forward, row.config
    reaches = asked.head_dim <= row.head_dim and asked.head_dim_v <= row.head_dim_v
    drawn = not asked.dropout or config.keys % DRAWN == 0
    return reaches and drawn and register_pressure(asked) <= row.pressure


TABLE = GradientTable(rows=BACKWARD, serves=serves, ctas=lambda config: config.ctas)
