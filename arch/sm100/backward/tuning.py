"""Tile sizes of Blackwell's backward kernel: a table, read top to bottom; the first row that serves is taken.

A CTA has 128 keys, a lane of tensor memory for each, or 64, half a lane or two for each, and takes 128 or 64
rows of Q at a time. What a row rests on:

tile_m, tile_n: dK and dV take head_dim + head_dim_v columns of tensor memory for 128 keys, S and dP two of
    tile_m. Where that is too much tile_m is 64, or else tile_n, for which dK and dV take the more of both.
registers: `setmaxnreg` moves 512 per thread between four warpgroups, two of which compute. Each of their
    threads has one key and 64 rows: 64 registers of P, and 32 of dP at a time. With smaller tiles, 32 of P.
at_once: where dQ lies in dP's columns of tensor memory, the next dP waits until the store role has dQ in
    registers, one for each column. Where dQ has columns of its own nobody waits for them.
stages: two of Q, of which one is read until dK is begun; of dO two where shared memory has room.

Nothing here is timed: there is no such GPU at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...backward import BackwardProblem
from ...problem import Device
from ...tuning import GradientTable
from ..tuning import HEAVY, LIGHT, register_pressure
from .config import Config, SerialConfig, WideConfig


@dataclass(frozen=True, kw_only=True)
class Row:
    """A config for head dims up to these, of problems whose registers allow it: up to `pressure`.

    narrowest: neither head dim may be less. few: also where queries see a window of the keys.
    """

    head_dim: int
    head_dim_v: int
    pressure: int
    config: Config
    why: str
    narrowest: int = 8
    few: bool = True


PIECEWISE = {"store_registers": 80, "compute_registers": 184, "other_registers": 64}
AT_ONCE = {"at_once": True, "store_registers": 152, "compute_registers": 152, "other_registers": 56}
BACKWARD = (
    Row(
        head_dim=64, head_dim_v=64, pressure=HEAVY, config=Config(p_apart=True, **PIECEWISE),
        why="P and dQ have columns of their own: the next S is computed beside the exponentials of the one "
        "before, and the store role may take dQ piece by piece",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=HEAVY, narrowest=104, few=False,
        config=Config(
            tile_n=256, ctas=2, q_stages=1, out_stages=1, chunk=16, at_once=True, store_registers=88,
            compute_registers=184, other_registers=56,
        ),
        why="FlashAttention-4's pair: shared memory takes 2560 clocks for 128 keys, as the products do, 3328 "
        "alone; a window leaves it rows that only one of its CTAs visits",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=LIGHT,
        config=Config(out_stages=1, **AT_ONCE),
        why="FlashAttention-4's: dQ lies over dP, and leaves it at once",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=HEAVY, config=Config(out_stages=1, **PIECEWISE),
        why="rules and dropout take the registers that dQ would leave at once with",
    ),
    Row(
        head_dim=192, head_dim_v=128, pressure=HEAVY, narrowest=104, few=False,
        config=SerialConfig(
            tile_n=256, ctas=2, q_stages=1, out_stages=1, chunk=8, at_once=True, store_registers=88,
            compute_registers=184, other_registers=56,
        ),
        why="FlashAttention-4's pair: of shared memory it asks two thirds of what tiles of 64 rows do",
    ),
    Row(
        head_dim=192, head_dim_v=128, pressure=HEAVY, config=Config(tile_m=64, chunk=16, sums=4, **AT_ONCE),
        why="64 rows of Q leave tensor memory for sums of 128 keys: of 64, dQ would leave twice as often",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVY, narrowest=104, few=False,
        config=WideConfig(tile_n=128, ctas=2, q_stages=1, out_stages=1, chunk=16, **PIECEWISE),
        why="FlashAttention-4's pair of 64 keys each: half of what a CTA alone adds to dQ's sums and reads",
    ),
    Row(
        head_dim=192, head_dim_v=192, pressure=HEAVY,
        config=Config(tile_n=64, out_stages=1, chunk=16, **PIECEWISE),
        why="tensor memory has room for sums of 64 keys only",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVY,
        config=Config(tile_n=64, q_stages=1, out_stages=1, chunk=16, **AT_ONCE),
        why="likewise; and shared memory for one tile of Q",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVY,
        config=Config(tile_m=64, tile_n=64, chunk=16, **PIECEWISE),
        why="only block masks with blocks of 64 rows and keys get here",
    ),
)  # fmt: skip


def serves(row: Row, problem: BackwardProblem, device: Device) -> bool:
    """Whether a row is for these head dims, and registers are enough."""
    asked = problem.forward
    reaches = asked.head_dim <= row.head_dim and asked.head_dim_v <= row.head_dim_v
    wide = min(asked.head_dim, asked.head_dim_v) >= row.narrowest
    sees = row.few or asked.mask is None or not asked.mask.sees_few()
    return reaches and wide and sees and register_pressure(asked, device) <= row.pressure


TABLE = GradientTable(rows=BACKWARD, serves=serves, ctas=lambda config: config.ctas)
