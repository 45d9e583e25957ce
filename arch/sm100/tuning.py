"""Tile sizes of the sm100 kernels: a table, read top to bottom; the first row that serves is taken."""

from __future__ import annotations

from dataclasses import dataclass

from ..problem import Device, Problem

TILE_M = 128


@dataclass(frozen=True)
class Config:
    """How the forward kernel works on a problem.

    tiles: Q tiles of 128 rows per CTA, a softmax warpgroup each. slots: S's of a tile in tensor memory: with
    two, the next block's S is computed before this block's P V. tile_n: rows of K and V at a time.
    k_stages, v_stages: their tiles in shared memory. polynomial: of 16 exponentials of a wholly visible
    block, how many are computed on the FMA units. softmax_registers, correction_registers,
    other_registers: per thread.
    """

    tiles: int
    slots: int
    tile_n: int
    k_stages: int
    v_stages: int
    polynomial: int
    softmax_registers: int
    correction_registers: int
    other_registers: int

    @property
    def tile_m(self) -> int:
        return TILE_M * self.tiles

    @property
    def threads(self) -> int:
        """Softmax warpgroups, one for the correction, one for load and mma."""
        return 128 * (self.tiles + 2)

    @property
    def launch_registers(self) -> int:
        """Registers per thread before `setmaxnreg`: what a multiprocessor's 65536 allow, in steps of 8."""
        return min(65536 // self.threads, 255) // 8 * 8

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of dynamic shared memory: Q (later O), K and V tiles, factors, barriers."""
        dim, dim_v = (-(-d // 16) * 16 for d in (problem.head_dim, problem.head_dim_v))
        q = self.tile_m * max(dim, dim_v)
        kv = self.tile_n * (self.k_stages * dim + self.v_stages * dim_v)
        return 2 * (q + kv) + 8 * self.tile_m + 1024


def forward_config(problem: Problem, device: Device) -> Config | None:
    """The first row that serves and fits, or None."""
    return next((row.config for row in ROWS if row.serves(problem, device)), None)


@dataclass(frozen=True)
class Row:
    """A config, and the largest head dims that it serves."""

    head_dim: int
    head_dim_v: int
    config: Config

    def serves(self, problem: Problem, device: Device) -> bool:
        """Whether it takes `problem`."""
        return (
            problem.head_dim <= self.head_dim
            and problem.head_dim_v <= self.head_dim_v
            and self.config.shared_memory(problem) <= device.shared_memory
        )


ROWS = (
    Row(128, 128, Config(2, 1, 128, 2, 2, 0, 192, 96, 32)),
)
