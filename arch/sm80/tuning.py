"""Tile sizes of the sm80 kernels: a table, read top to bottom; the first row that fits serves.

What chose the rows: registers, as the compiler reports them (no row may spill, on any target, with any
rule that it is for), then shared-memory traffic per matrix instruction, then CTAs per SM. No row was
timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..problem import Device, Problem, Sizes
from ..split import fastest_splits, sees_few_blocks

SM_REGISTERS = 65536
RESERVED_SHARED_MEMORY = 1024  # bytes that a resident CTA costs besides its own
LARGEST_SHARED_MEMORY = 166912  # bytes that CTAs share on the largest multiprocessor of these, A100's


@dataclass(frozen=True)
class Config:
    """How the forward kernel works on a problem.

    tile_m, tile_n: rows of Q, and of K and V, at a time. warps: each takes tile_m / warps rows.
    stages: K and V tiles in shared memory. q_in_registers: Q is read from shared memory once.
    """

    tile_m: int
    tile_n: int
    warps: int
    stages: int = 1
    q_in_registers: bool = False

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of dynamic shared memory."""
        dim, dim_v = padded(problem.head_dim), padded(problem.head_dim_v)
        q_or_out = self.tile_m * max(dim, dim_v)
        return 2 * (q_or_out + self.stages * self.tile_n * (dim + dim_v))

    def resident(self, problem: Problem, device: Device) -> int:
        """CTAs that an SM holds at once, at 255 registers a thread; 0 where not even one fits."""
        by_registers = SM_REGISTERS // (256 * self.threads)
        per_sm = device.shared_memory + RESERVED_SHARED_MEMORY
        return min(by_registers, per_sm // (self.shared_memory(problem) + RESERVED_SHARED_MEMORY))


@dataclass(frozen=True)
class Row:
    """A config for head dims up to (head_dim, head_dim_v).

    light: for problems that are `is_light`, which leave it the registers.
    """

    head_dim: int
    head_dim_v: int
    config: Config
    why: str
    light: bool = False


# Of a warp's rows a thread holds rows * head_dim_v / 32 numbers of O and rows * tile_n / 32 of S.
FORWARD = (
    Row(64, 64, Config(128, 96, 4), "32 rows a warp: half the reads of K and V for each product that 16 rows "
        "need; tile_n 112 spills", light=True),
    Row(96, 96, Config(128, 64, 4), "32 rows a warp", light=True),
    Row(256, 128, Config(128, 48, 4), "32 rows a warp; tile_n 64 leaves no register to spare, and spills "
        "when compiled with CUDA 13", light=True),
    Row(256, 128, Config(64, 64, 4), "16 rows a warp, for 32 spill with some rules; small CTAs hide each "
        "other's barriers"),
    Row(256, 256, Config(128, 64, 8), "16 rows a warp; 8 warps share each tile of K and V; with a score rule "
        "and a prefix mask it spilled", light=True),
    Row(256, 256, Config(64, 64, 4), "16 rows a warp, the most that 256 columns of O allow; fits 100 KB"),
)


def padded(dim: int) -> int:
    """Columns that a head dim takes in shared memory: whole k steps of mma."""
    return -(-dim // 16) * 16


def is_light(problem: Problem) -> bool:
    """No arithmetic per score beyond the scale and a comparison or two."""
    light_mask = problem.mask is None or problem.mask.is_light()
    return light_mask and not (problem.score or problem.dropout)


def forward_config(problem: Problem, device: Device) -> Config | None:
    """The first row that fits and divides the blocks of a block mask, or None."""
    fitting = fitting_configs(problem, device)
    return next((c for c in fitting if problem.takes_tiles(c.tile_m, c.tile_n)), None)


def fitting_configs(problem: Problem, device: Device) -> Iterator[Config]:
    """Rows that fit, block mask aside; two stages where they cost no resident CTA."""
    for row in FORWARD:
        reaches = problem.head_dim <= row.head_dim and problem.head_dim_v <= row.head_dim_v
        resident = row.config.resident(problem, device)
        if reaches and resident and (is_light(problem) or not row.light):
            deeper = replace(row.config, stages=2)
            yield deeper if deeper.resident(problem, device) == resident else row.config


def splits(problem: Problem, device: Device, sizes: Sizes) -> int:
    """In how many parts to take the keys of a call."""
    problem = replace(problem, split_kv=True)
    config = forward_config(problem, device)
    if config is None or sees_few_blocks(problem):
        return 1
    tiles = sizes.batch * sizes.heads_q * -(-sizes.seqlen_q // config.tile_m)
    places = device.multiprocessors * config.resident(problem, device)
    return fastest_splits(tiles, -(-sizes.seqlen_k // config.tile_n), places)
