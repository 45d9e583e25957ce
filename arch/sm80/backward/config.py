"""How gradients' kernels work: what their tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass

from ...backward import BackwardProblem, PostprocessProblem, scratch_columns


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
