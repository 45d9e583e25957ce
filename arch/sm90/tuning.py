"""Tile sizes of the sm90 kernels: a table, read top to bottom; the first row that serves is taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..packing import count_tiles, heads_of_tile, telling_sizes
from ..problem import Device, Problem, Sizes
from ..split import fastest_splits, sees_few_blocks


@dataclass(frozen=True)
class Config:
    """How the forward kernel works on a problem.

    consumers: warpgroups that multiply, 64 rows of Q each. tile_n: rows of K and V at a time.
    stages: K and V tiles in shared memory. producer_registers, consumer_registers: per thread.
    overlap: the next block's QK runs, and PV of the one before, while a warpgroup does its softmax.
    ping_pong: warpgroups issue their products in turn, so that one's softmax runs under the others' products.
    heads: query heads of one KV head that share a tile's rows, a power of two.
    persistent: CTAs that stay for the whole launch and take every so many-th tile; 0: a CTA for each tile.
    longest_first: heads whose K and V L2 holds together are taken together, their longest tiles first.
    """

    consumers: int
    tile_n: int
    stages: int
    producer_registers: int
    consumer_registers: int
    overlap: bool = True
    ping_pong: bool = True
    heads: int = 1
    persistent: int = 0
    longest_first: bool = False

    @property
    def tile_m(self) -> int:
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def launch_registers(self) -> int:
        """Registers per thread before `setmaxnreg`: what a multiprocessor's 65536 allow, in steps of 8."""
        return min(65536 // self.threads // 8 * 8, 256)

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of dynamic shared memory: Q, O in its place or beside it, K and V tiles, barriers."""
        dim, dim_v = (-(-d // 16) * 16 for d in (problem.head_dim, problem.head_dim_v))
        q_and_out = dim + dim_v if self.persistent else max(dim, dim_v)
        return 2 * (self.tile_m * q_and_out + self.stages * self.tile_n * (dim + dim_v)) + 1024


def forward_config(problem: Problem, device: Device, sizes: Sizes | None = None) -> Config | None:
    """The first row that serves, fits and divides the blocks of a block mask, as the call's sizes have it.

    None where there is none.
    """
    fitting = fitting_configs(problem, device)
    config = next((c for c in fitting if problem.takes_tiles(c.tile_m, c.tile_n)), None)
    if config is None or sizes is None:
        return config and scheduled(config, problem, device)
    heads = heads_of_tile(problem, config.tile_m, MOST_HEADS, sizes)
    packed = replace(config, heads=heads)
    if sizes.seqlen_q * heads <= FEW_ROWS:
        packed = for_few_rows(packed, problem, device)
    return scheduled(packed, problem, device)


def fitting_configs(problem: Problem, device: Device) -> Iterator[Config]:
    """Rows that serve and fit, block mask aside."""
    return (row.config for row in ROWS if row.serves(problem, device))


def forward_configs(problem: Problem, device: Device) -> tuple[Config, ...]:
    """Every config that `forward_config` gives for some sizes."""
    found = (None, *telling_sizes(problem, (1, FEW_ROWS + 1), MOST_HEADS))
    return tuple(dict.fromkeys(forward_config(problem, device, sizes) for sizes in found))


# Rows of Q that one warpgroup takes: with no more, a second one would have nothing to do.
FEW_ROWS = 64
MOST_HEADS = 16  # of a tile; a group of more is taken in several
STAGES_FOR_FEW_ROWS = 4  # K and V then stream through once: as many bytes under way as shared memory holds


def for_few_rows(config: Config, problem: Problem, device: Device) -> Config:
    """One warpgroup, nobody to take turns with, and more of K and V under way."""
    few = replace(config, consumers=1, producer_registers=24, consumer_registers=240, ping_pong=False)
    deep = (replace(few, stages=stages) for stages in range(STAGES_FOR_FEW_ROWS, few.stages, -1))
    return next((c for c in deep if c.shared_memory(problem) <= device.shared_memory), few)


# Half of an H100's 50 MB, which are two partitions: a section's K and V stay while its tiles last.
L2_FOR_SECTION = 25 << 20


def scheduled(config: Config, problem: Problem, device: Device) -> Config:
    """The order of the tiles.

    Tiles of different lengths (masks, packed sequences) go longest first to whichever multiprocessor is free:
    the hardware gives a CTA for each its place. Equal tiles leave nothing to balance, so CTAs may persist: O
    leaves while the next tile's Q, K and V arrive, if there is shared memory for Q and O at once.
    """
    if problem.mask is not None or problem.block_size or problem.varlen:
        return replace(config, longest_first=True)
    persistent = replace(config, persistent=device.multiprocessors)
    fits = persistent.shared_memory(problem) <= device.shared_memory
    return persistent if fits and device.multiprocessors > 1 and not problem.split_kv else config


def splits(problem: Problem, device: Device, sizes: Sizes) -> int:
    """In how many parts to take the keys of a call."""
    config = forward_config(replace(problem, split_kv=True), device, sizes)
    if config is None or sees_few_blocks(problem):
        return 1
    tiles = count_tiles(config.tile_m, config.heads, sizes)
    return fastest_splits(tiles, -(-sizes.seqlen_k // config.tile_n), device.multiprocessors)


PLAIN, NUMBERS, TABLES = range(3)


def demand(problem: Problem) -> int:
    """How many registers a problem needs besides S, P and O: least for PLAIN, most for TABLES.

    NUMBERS: its rules hold values. TABLES: they read tables, or there is dropout.
    """
    rules = [rule for rule in (problem.mask, problem.score) if rule]
    if problem.dropout or any(rule.reads_tables() for rule in rules):
        return TABLES
    return NUMBERS if any(rule.leaves() for rule in rules) else PLAIN


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
