"""Tile sizes of the backward kernels: a table, read top to bottom; the first row that fits serves.

What chose the rows: K and V stay in shared memory while query tiles pass, so tile_n, which divides the bytes
of dQ that are added to global memory, is as large as registers allow for dK and dV; then two stages, where
shared memory allows. No row was timed.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...backward import BackwardProblem, PostprocessProblem, scratch_columns
from ...problem import Device, Sizes
from ...tuning import GradientTable
from ..tuning import HEAVY, LIGHT, register_pressure


@dataclass(frozen=True)
class Config:
    """How the main kernel works on a problem.

    tile_m, tile_n: rows of Q and dO, and of K and V, at a time. warps: all take part in every product.
    stages: tiles of Q and of dO in shared memory. k_in_registers, v_in_registers: for S and dP each warp
    reads its part of K, of V, from shared memory once.
    """

    tile_m: int
    tile_n: int
    warps: int = 8
    stages: int = 2
    k_in_registers: bool = False
    v_in_registers: bool = False

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def shared_memory(self, problem: BackwardProblem) -> int:
        """Bytes of dynamic shared memory: K and V; Q, dO, LSE and D, staged; P and dS."""
        columns = scratch_columns(problem.forward.head_dim) + scratch_columns(problem.forward.head_dim_v)
        staged = self.stages * self.tile_m * (2 * columns + 2 * 4)
        return 2 * self.tile_n * columns + staged + 2 * 2 * self.tile_m * self.tile_n

    @property
    def grid_s(self) -> tuple[int, int]:
        """Rows and columns of warps on S and dP (tile_m, tile_n): 32 joined columns a warp if it can."""
        rows = max(1, self.warps * 32 // self.tile_n)
        rows = min(rows, self.tile_m // 16)
        return rows, self.warps // rows

    def grid_k(self, columns: int) -> tuple[int, int]:
        """Rows and columns of warps on dK or dV (tile_n, columns): more on the longer side."""
        across = 4 if columns > self.tile_n and self._by_four(columns) else 2
        return self.warps // across, across

    def grid_q(self, columns: int) -> tuple[int, int]:
        """Rows and columns of warps on dQ (tile_m, columns): as square as they can."""
        across = 4 if self._by_four(columns) else 2
        return self.warps // across, across

    def _by_four(self, columns: int) -> bool:
        """Whether four warps side by side have whole pieces of so many columns, and another four go below."""
        return columns % 64 == 0 and self.warps == 8

    def shares_out(self, columns: int) -> bool:
        """Whether every warp has a piece of dQ (tile_m, columns)."""
        return self.grid_q(columns)[0] * 16 <= self.tile_m


@dataclass(frozen=True)
class PostprocessConfig:
    """How sums are read: as the main kernel wrote them. rows: of a tile. grid: rows and columns of warps."""

    rows: int
    grid: tuple[int, int]

    @staticmethod
    def of(problem: PostprocessProblem, main: Config) -> PostprocessConfig:
        """What follows a main kernel of this config."""
        columns = scratch_columns(problem.head_dim)
        if problem.side == "q":
            return PostprocessConfig(main.tile_m, main.grid_q(columns))
        return PostprocessConfig(main.tile_n, main.grid_k(columns))

    @property
    def threads(self) -> int:
        return 32 * self.grid[0] * self.grid[1]

    def shared_memory(self, problem: PostprocessProblem) -> int:
        """Bytes of dynamic shared memory: a tile of the gradient."""
        return 2 * self.rows * scratch_columns(problem.head_dim)


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
