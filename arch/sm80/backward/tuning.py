"""Tile sizes of the backward kernels: a table, read top to bottom; the first row that fits serves.

What chose the rows: K and V stay in shared memory while query tiles pass, so tile_n, which divides the bytes
of dQ that are added to global memory, is as large as registers allow for dK and dV; then two stages, where
shared memory allows. No row was timed.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...backward import BackwardProblem, scratch_columns
from ...problem import Device, Sizes
from ...tuning import GradientTable
from ..tuning import HEAVY, LIGHT, register_pressure
from .config import Config, PostprocessConfig

NEVER = LIGHT - 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """A config for head dims up to `head_dim`, of Q and K or of V.

    pressure: the highest `register_pressure` of a problem that leaves it registers enough. turns: the same
    where CTAs take turns, NEVER if none.
    """

    head_dim: int
    pressure: int
    config: Config
    why: str
    turns: int = HEAVY


BACKWARD = (
    Row(
        head_dim=64, pressure=LIGHT, config=Config(64, 128, k_in_registers=True, v_in_registers=True),
        why="dK, dV, K and V take 128 registers a thread; fits 100 KB", turns=NEVER,
    ),
    Row(
        head_dim=64, pressure=HEAVY, config=Config(64, 128),
        why="dK and dV take 64 registers a thread; V besides spills on sm_86; fits 100 KB",
    ),
    Row(
        head_dim=128, pressure=LIGHT, config=Config(64, 128),
        why="FlashAttention-2's tile, with both Q and dO twice in shared memory",
    ),
    Row(head_dim=128, pressure=HEAVY, config=Config(64, 64), why="fits 100 KB up to 96 columns"),
    Row(head_dim=128, pressure=HEAVY, config=Config(64, 64, stages=1), why="fits 100 KB"),
    Row(
        head_dim=192, pressure=HEAVY, config=Config(64, 64), why="dK and dV take 96 registers a thread",
        turns=LIGHT,
    ),
    Row(
        head_dim=256, pressure=LIGHT, config=Config(64, 64, stages=1),
        why="dK and dV take 128 registers a thread; two stages take 192 KB", turns=NEVER,
    ),
    Row(
        head_dim=256, pressure=HEAVY, config=Config(32, 64),
        why="64 rows spill with softcap and dropout; two stages fit",
    ),
    Row(
        head_dim=256, pressure=HEAVY, config=Config(64, 64, stages=1),
        why="for the columns of Q and K of which 32 rows leave no piece for every warp: dK is small then",
        turns=LIGHT,
    ),
    Row(head_dim=192, pressure=HEAVY, config=Config(32, 64, stages=1), why="fits 100 KB"),
    Row(head_dim=256, pressure=HEAVY, config=Config(32, 32, warps=4, stages=1), why="fits 100 KB"),
)  # fmt: skip


def serves(row: Row, problem: BackwardProblem, device: Device) -> bool:
    """Whether a row is for these head dims, warps share out dQ, and registers are enough."""
    asked = problem.forward
    reaches = max(asked.head_dim, asked.head_dim_v) <= row.head_dim
    most = min(row.pressure, row.turns) if problem.deterministic else row.pressure
    shared_out = row.config.shares_out(scratch_columns(asked.head_dim))
    return reaches and shared_out and register_pressure(asked, device) <= most


TABLE = GradientTable(rows=BACKWARD, serves=serves)


def postprocess_blocks(config: PostprocessConfig, sizes: Sizes, _: int) -> int:
    """Of the grid, at most."""
    return -(-max(sizes.seqlen_q, sizes.seqlen_k) // config.rows) * sizes.heads_q * sizes.batch
