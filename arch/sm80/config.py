"""How the forward kernel works: what its tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass

from ..problem import Device, Problem

SM_REGISTERS = 65536
RESERVED_SHARED_MEMORY = 1024  # bytes that a resident CTA costs besides its own
LARGEST_SHARED_MEMORY = 166912  # bytes that CTAs share on the largest multiprocessor of these, A100's


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the forward kernel works on a problem.

    tile_m, tile_n: rows of Q, and of K and V, at a time. warps: each takes tile_m / warps rows.
    abreast: so many times as many warps, of which those with the same rows share out the columns of O; the
    scores of its rows each of them computes for itself.
    stages: K and V tiles in shared memory. q_in_registers: Q is read from shared memory once.
    heads: query heads of one KV head that share a tile's rows, a power of two; at most 8, as many as a warp's
    threads have rows side by side, so that those of a thread are of one head.
    """

    tile_m: int
    tile_n: int
    warps: int
    stages: int = 1
    q_in_registers: bool = False
    heads: int = 1
    abreast: int = 1

    @property
    def row_threads(self) -> int:
        """Threads whose rows are different ones."""
        return 32 * self.warps

    @property
    def threads(self) -> int:
        return self.row_threads * self.abreast

    @property
    def rows_of_a_warp(self) -> int:
        return self.tile_m // self.warps

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of dynamic shared memory."""
        dim, dim_v = problem.precision.padded(problem.head_dim), self.columns(problem)
        q_or_out = self.tile_m * max(dim, dim_v)
        latent = problem.cache is not None and problem.cache.latent
        kv = self.tile_n * (dim if latent else dim + dim_v)
        return problem.precision.nbytes(q_or_out + self.stages * kv)

    def columns(self, problem: Problem) -> int:
        """Of V and of O: whole pieces of 16 for every warp."""
        padded, pieces = problem.precision.padded(problem.head_dim_v), 16 * self.abreast
        return -(-padded // pieces) * pieces

    def resident(self, problem: Problem, device: Device) -> int:
        """CTAs that an SM holds at once, at 255 registers a thread; 0 where not even one fits."""
        by_registers = SM_REGISTERS // (256 * self.threads)
        per_sm = device.shared_memory + RESERVED_SHARED_MEMORY
        return min(by_registers, per_sm // (self.shared_memory(problem) + RESERVED_SHARED_MEMORY))

    def kept_resident(self, problem: Problem) -> int:
        """CTAs of an SM that the compiler is to leave registers for, and no more; 0: it decides.

        Left to itself it may spill to make room for more of them than shared memory holds on any GPU.
        """
        held = LARGEST_SHARED_MEMORY // self.shared_memory(problem)
        if self.rows_of_a_warp > 16:
            tempted = problem.block_size or problem.head_dim_v < self.tile_n
            return 1 if tempted and held < 3 else 0
        columns = self.columns(problem) // self.abreast + self.tile_n
        registers = 168 if columns <= 192 else 256  # a thread has half as many numbers of O and S
        return min(held, SM_REGISTERS // (registers * self.threads))
