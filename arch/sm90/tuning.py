"""Tile sizes of the sm90 kernels: a table, read top to bottom; the first row that serves is taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..problem import Device, Problem


@dataclass(frozen=True)
class Config:
    """How the forward kernel works on a problem.

    consumers: warpgroups that multiply, 64 rows of Q each. tile_n: rows of K and V at a time.
    stages: K and V tiles in shared memory. producer_registers, consumer_registers: per thread.
    overlap: the next block's QK runs, and PV of the one before, while a warpgroup does its softmax.
    ping_pong: warpgroups issue their products in turn, so that one's softmax runs under the others' products.
    """

    consumers: int
    tile_n: int
    stages: int
    producer_registers: int
    consumer_registers: int
    overlap: bool = True
    ping_pong: bool = True

    @property
    def tile_m(self) -> int:
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def launch_registers(self) -> int:
        """Registers per thread before `setmaxnreg`: what a multiprocessor's 65536 allow, in steps of 8."""
        return 65536 // self.threads // 8 * 8

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of dynamic shared memory: Q (later O), K and V tiles, barriers."""
        dim, dim_v = (-(-d // 16) * 16 for d in (problem.head_dim, problem.head_dim_v))
        tiles = self.tile_m * max(dim, dim_v) + self.stages * self.tile_n * (dim + dim_v)
        return 2 * tiles + 1024


def forward_config(problem: Problem, device: Device) -> Config | None:
    """The first row that serves, fits and divides the blocks of a block mask, or None."""
    fitting = fitting_configs(problem, device)
    return next((c for c in fitting if problem.takes_tiles(c.tile_m, c.tile_n)), None)


def fitting_configs(problem: Problem, device: Device) -> Iterator[Config]:
    """Rows that serve and fit, block mask aside."""
    return (row.config for row in ROWS if row.serves(problem, device))


PLAIN, NUMBERS, TABLES = range(3)


def demand(problem: Problem) -> int:
    """How many registers a problem needs besides S, P and O: least for PLAIN, most for TABLES.

    NUMBERS: its rules hold values. TABLES: they read tables, or there is dropout.
    """
    leaves = [leaf for rule in (problem.mask, problem.score) if rule for leaf in rule.leaves()]
    if problem.dropout or any(leaf.startswith("tensor") for leaf in leaves):
        return TABLES
    return NUMBERS if leaves else PLAIN


@dataclass(frozen=True)
class Row:
    """A config, and the largest head dims and demand that it serves."""

    head_dim: int
    head_dim_v: int
    demand: int
    config: Config

    def serves(self, problem: Problem, device: Device) -> bool:
        """Whether it takes `problem`; dropout draws its numbers for 32 keys at a time."""
        return (
            problem.head_dim <= self.head_dim
            and problem.head_dim_v <= self.head_dim_v
            and demand(problem) <= self.demand
            and not (problem.dropout and self.config.tile_n % 32)
            and self.config.shared_memory(problem) <= device.shared_memory
        )


# Chosen by registers: S, P and O of a thread take tile_n / 2 + tile_n / 4 + head_dim_v / 2 of them and about
# 30 more are needed beside, as cubins show: none of these spills. Speeds are not measured.
#   `setmaxnreg` moves registers inside what a CTA is launched with: 504 for three warpgroups, 512 for four.
#   Three compute warpgroups read a K or V tile for 192 rows instead of 128, but leave 160 registers each.
#   Both ways to overlap where registers allow: without the one inside a warpgroup FlashAttention-3 falls from
#   661 to 582 TFLOP/s (Shah et al. 2024, table 2: H100, head dim 128). In order, P takes the place of S.
ROWS = (
    Row(64, 64, PLAIN, Config(3, 128, 2, 32, 160)),
    Row(64, 64, NUMBERS, Config(2, 128, 2, 24, 240)),
    Row(64, 64, TABLES, Config(2, 96, 2, 24, 240)),
    Row(192, 128, NUMBERS, Config(2, 128, 2, 24, 240)),
    Row(192, 128, TABLES, Config(2, 64, 2, 24, 240)),
    Row(192, 192, NUMBERS, Config(2, 112, 2, 24, 240)),
    Row(192, 192, TABLES, Config(2, 64, 2, 24, 240)),
    Row(256, 256, NUMBERS, Config(2, 80, 2, 40, 232)),
    Row(256, 256, TABLES, Config(2, 64, 2, 24, 240, overlap=False)),
)
