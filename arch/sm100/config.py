"""How the forward kernel works: what its tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass

from ..problem import Problem

TILE_M = 128
CHUNK = 32  # columns whose exponentials are computed before they are stored
ANSWERS = 2  # on their way or not yet read by all, of which tile comes next: loads then need not wait for it
# Where FMA must help out with exponentials. GB300 computes twice as many a clock (NVIDIA, "Inside NVIDIA
# Blackwell Ultra", 2025); of 11.0 nothing is published.
SLOW_EX2 = ((10, 0),)
# Where loads from tensor memory find the maximum on the way (PTX ISA, tcgen05.ld.red, target notes). Up to
# head dim 32 flash-attn-4 lost by them on 10.3 (its pull request 2696); beyond, it gained 1 to 6 % (2449).
REDUCING_LOADS = ((10, 3), (11, 0))
REDUCED_FROM = 40


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the forward kernel works on a problem.

    tiles: Q tiles of 128 rows per CTA, a softmax warpgroup each. slots: S's of a tile in tensor memory: with
    two, the next block's S is computed before this block's P V. tile_n: rows of K and V at a time.
    k_stages, v_stages: their tiles in shared memory. polynomial: of 32 exponentials of a wholly visible
    block, how many are computed on the FMA units. softmax_registers, correction_registers,
    other_registers: per thread. ctas: 1, or 2 for a pair that multiplies together: its tiles have 256 rows,
    half of them each CTA's, and each CTA brings half of K and V. heads: query heads of one KV head that
    share a tile's rows, a power of two. persistent: there is a CTA for each multiprocessor at most, which
    takes every so many-th tile. dynamic: CTAs that are done take the tiles of others that have not begun; no
    row of the table does. reducing_loads: the device's loads of S bring the maximum with them.
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
    ctas: int = 1
    heads: int = 1
    persistent: bool = False
    dynamic: bool = False
    reducing_loads: bool = False

    @property
    def is_persistent(self) -> bool:
        """Whether a CTA takes several tiles."""
        return self.dynamic or self.persistent

    @property
    def apart(self) -> bool:
        """Whether O has a place of its own in shared memory, not Q's."""
        return self.is_persistent

    @property
    def tail(self) -> int:
        """Keys of a block, the last ones, whose P is told of apart: P V has begun when it comes. 0: no such.

        A quarter of 128, of what P takes longest, computed and stored as one: FlashAttention-4 does as much.
        """
        return CHUNK if self.tile_n > CHUNK else 0

    @property
    def cta_rows(self) -> int:
        """Rows of a Q tile that one CTA has."""
        return TILE_M

    @property
    def tile_m(self) -> int:
        """Rows of Q that visit the same blocks: a CTA's, or a pair's."""
        return self.cta_rows * self.tiles * self.ctas

    @property
    def threads(self) -> int:
        """Softmax warpgroups, one for the correction, one for load and mma."""
        return 128 * (self.tiles + 2)

    @property
    def launch_registers(self) -> int:
        """Registers per thread before `setmaxnreg`: what a multiprocessor's 65536 allow, in steps of 8."""
        return min(65536 // self.threads, 255) // 8 * 8

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of a CTA's dynamic shared memory: Q, O in its place or beside it, K, V, factors, barriers."""
        precision, out_precision = problem.precision, problem.out_precision
        dim, dim_v = map(precision.padded, (problem.head_dim, problem.head_dim_v))
        rows, v_part = TILE_M * self.tiles, precision.padded(dim_v, self.ctas) // self.ctas
        q, out = precision.nbytes(rows * dim), out_precision.nbytes(rows * dim_v)
        k, v = self.tile_n // self.ctas * self.k_stages * dim, self.tile_n * self.v_stages * v_part
        small = 4 * (self.slots + 1) * rows + 512
        q_and_out = q + out if self.apart else max(q, out)
        return q_and_out + precision.nbytes(k + v) + -(-small // 1024) * 1024
