"""Tile sizes of the sm100 kernels: a table, read top to bottom; the first row that serves is taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..packing import count_tiles, heads_of_tile, telling_sizes
from ..problem import Device, Problem, Sizes
from ..split import fastest_splits, sees_few_blocks

TILE_M = 128
# Where FMA must help out with exponentials. GB300 computes twice as many a clock (NVIDIA, "Inside NVIDIA
# Blackwell Ultra", 2025); of 11.0 nothing is published.
SLOW_EX2 = ((10, 0),)
# Where loads from tensor memory find the maximum on the way (PTX ISA, tcgen05.ld.red, target notes). Up to
# head dim 32 flash-attn-4 lost by them on 10.3 (its pull request 2696); beyond, it gained 1 to 6 % (2449).
REDUCING_LOADS = ((10, 3), (11, 0))
REDUCED_FROM = 40


@dataclass(frozen=True)
class Config:
    """How the forward kernel works on a problem.

    tiles: Q tiles of 128 rows per CTA, a softmax warpgroup each. slots: S's of a tile in tensor memory: with
    two, the next block's S is computed before this block's P V. tile_n: rows of K and V at a time.
    k_stages, v_stages: their tiles in shared memory. polynomial: of 32 exponentials of a wholly visible
    block, how many are computed on the FMA units. softmax_registers, correction_registers,
    other_registers: per thread. ctas: 1, or 2 for a pair that multiplies together: its tiles have 256 rows,
    half of them each CTA's, and each CTA brings half of K and V. heads: query heads of one KV head that
    share a tile's rows, a power of two. persistent: CTAs, or pairs, that stay for the whole launch and take
    every so many-th tile; 0: one for each tile. dynamic: those that are done take the tiles of others that
    have not begun. reducing_loads: the device's loads of S bring the maximum with them.
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
    persistent: int = 0
    dynamic: bool = False
    reducing_loads: bool = False

    @property
    def stays(self) -> bool:
        """Whether a CTA takes several tiles: then O has a place of its own."""
        return self.dynamic or self.persistent > 0

    @property
    def tile_m(self) -> int:
        """Rows of Q that visit the same blocks: a CTA's, or a pair's."""
        return TILE_M * self.tiles * self.ctas

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
        dim, dim_v = (-(-d // 16) * 16 for d in (problem.head_dim, problem.head_dim_v))
        rows, v_part = TILE_M * self.tiles, -(-dim_v // (16 * self.ctas)) * 16
        q_and_out = dim + dim_v if self.stays else max(dim, dim_v)
        q, k = rows * q_and_out, self.tile_n // self.ctas * self.k_stages * dim
        small = 4 * (self.slots + 1) * rows + 512
        return 2 * (q + k + self.tile_n * self.v_stages * v_part) + -(-small // 1024) * 1024


def forward_config(problem: Problem, device: Device, sizes: Sizes | None = None) -> Config | None:
    """The first row that serves, fits, suits the sizes and divides the blocks of a block mask, or None."""
    rows = (row for row in ROWS if row.serves(problem, device))
    for row in rows:
        config = row.config
        if not problem.takes_tiles(config.tile_m, config.tile_n):
            continue
        if device.capability not in SLOW_EX2:
            config = replace(config, polynomial=0)
        reduce = device.capability in REDUCING_LOADS and problem.head_dim >= REDUCED_FROM
        config = replace(config, reducing_loads=reduce)
        if sizes is None:
            return scheduled(config, problem, device)
        config = replace(config, heads=heads_of_tile(problem, config.tile_m, MOST_HEADS, sizes))
        q_rows = sizes.seqlen_q * config.heads
        if q_rows <= TILE_M:
            return scheduled(for_few_rows(config, problem, device), problem, device)
        if row.suits(q_rows):
            return scheduled(config, problem, device)
    return None


def scheduled(config: Config, problem: Problem, device: Device) -> Config:
    """Whether CTAs persist.

    Where tiles are equal there is nothing to balance, so they may: O leaves while the next tile's Q, K and V
    arrive, if there is shared memory for Q and O at once. Tiles of different lengths go to whichever
    multiprocessor is free: the hardware gives a CTA for each its place. On 11.0 there is no register left to
    tell tiles by.
    """
    if device.capability == (11, 0):
        return config
    staying = replace(config, persistent=device.multiprocessors // config.ctas)
    fits = staying.shared_memory(problem) <= device.shared_memory
    return staying if fits and equal_tiles(problem) and device.multiprocessors > 1 else config


def fitting_configs(problem: Problem, device: Device) -> Iterator[Config]:
    """Rows that serve and fit, block mask aside."""
    return (row.config for row in ROWS if row.serves(problem, device))


def forward_configs(problem: Problem, device: Device) -> tuple[Config, ...]:
    """Every config that `forward_config` gives for some sizes."""
    tiles = {row.config.tile_m for row in ROWS}
    found = (None, *telling_sizes(problem, (1, TILE_M + 1, *tiles), MOST_HEADS))
    return tuple(dict.fromkeys(forward_config(problem, device, sizes) for sizes in found))


MOST_HEADS = 16  # of a tile; a group of more is taken in several
STAGES_FOR_FEW_ROWS = 4  # K and V then stream through once: as many bytes under way as shared memory holds


def for_few_rows(config: Config, problem: Problem, device: Device) -> Config:
    """A CTA with one Q tile, for a second would hold no row; and more of K and V under way.

    What a row's numbers depend on stays as it is for many rows: how many keys make a block, and which
    exponentials are computed how.
    """
    alone = (row for row in ROWS if row.config.tiles == row.config.ctas == 1)
    few = next((row.config for row in alone if row.serves(problem, device)), None)
    if few is None:
        return config
    same = ("tile_n", "heads", "polynomial", "reducing_loads")
    few = replace(few, **{name: getattr(config, name) for name in same})
    depths = (*range(STAGES_FOR_FEW_ROWS, few.k_stages, -1), None, *range(few.k_stages - 1, 0, -1))
    staged = (replace(few, k_stages=n, v_stages=n) if n else few for n in depths)
    return next((c for c in staged if c.shared_memory(problem) <= device.shared_memory), config)


def splits(problem: Problem, device: Device, sizes: Sizes) -> int:
    """In how many parts to take the keys of a call."""
    config = forward_config(replace(problem, split_kv=True), device, sizes)
    if config is None or sees_few_blocks(problem):
        return 1
    tiles = count_tiles(config.tile_m, config.heads, sizes)
    return fastest_splits(tiles, -(-sizes.seqlen_k // config.tile_n), device.multiprocessors // config.ctas)


SOFTCAP_WORK = 3  # s / cap, tanh, * cap


def crowded(problem: Problem, device: Device) -> bool:
    """Whether a problem needs many registers besides scores.

    With dropout, rules that read tables, a mask of more than two comparisons, a score that sees positions or
    has more operations than a softcap; on 11.0, which has no arithmetic on pairs, with any rule.
    """
    rules = [rule for rule in (problem.mask, problem.score) if rule]
    tables = any(rule.reads_tables() for rule in rules)
    long = problem.mask is not None and not problem.mask.is_light()
    score = problem.score
    heavy = score is not None and (score.work() > SOFTCAP_WORK or score.sees_positions())
    return problem.dropout or tables or long or heavy or bool(rules and device.capability == (11, 0))


def sees_evenly(problem: Problem) -> bool:
    """Whether all rows see the same keys: then it costs nothing that more of them visit the same blocks."""
    return not (problem.mask or problem.block_size or problem.varlen or problem.seqused_k)


def equal_tiles(problem: Problem) -> bool:
    """Whether all tiles of a call have as many blocks of keys, which CTAs that persist rely on."""
    return sees_evenly(problem) and not (problem.seqused_q or problem.split_kv)


@dataclass(frozen=True)
class Row:
    """A config, the largest head dims that it serves, and whether it serves what is `crowded`.

    even: it serves problems only whose rows all see the same keys. gain: what a CTA of a pair does in the
    time in which one by itself does 1; as many more CTAs may pairs take for the rows of a call.
    """

    head_dim: int
    head_dim_v: int
    crowded: bool
    config: Config
    even: bool = False
    gain: float = 1.0

    def serves(self, problem: Problem, device: Device) -> bool:
        """Whether it takes `problem`."""
        return (
            problem.head_dim <= self.head_dim
            and problem.head_dim_v <= self.head_dim_v
            and (self.crowded or not crowded(problem, device))
            and (not self.even or sees_evenly(problem))
            and self.config.shared_memory(problem) <= device.shared_memory
        )

    def suits(self, q_rows: int) -> bool:
        """Whether its pairs gain more than the CTAs cost that have no rows, where there are `q_rows`."""
        tile_m, ctas = self.config.tile_m, self.config.ctas
        paired, alone = ctas * -(-q_rows // tile_m), -(-q_rows * ctas // tile_m)
        return paired <= self.gain * alone


# Nothing here is timed: there is no such GPU at hand. What chose the numbers:
#   registers: `setmaxnreg` moves 512 (or with one Q tile 504) per thread between three or four warpgroups. A
#     row of S takes tile_n of the softmax's; as cubins show, none of these spills.
#   tile_n: 128, so that the operands of a product are read from shared memory as fast as it runs; less where
#     registers or K and V in shared memory do not allow it: with tables 64 spills up to 128,
#     and beyond 128 a causal mask does so at 96.
#   ctas: a pair halves what K and V cost a CTA's shared memory. Clocks for 128 keys, by counts: at (128, 128)
#     the products take 2048, shared memory 2065 alone and 1297 in a pair; at (192, 128) 2560, 2706 and 1746;
#     at (256, 256) 2048, 3088 and 1544. The gain is what binds one CTA over what binds a pair's. Only the
#     last is more than a causal mask costs, where both CTAs visit what the rows of either see. That the two
#     wait for each other is not in the counts.
#   slots: two Q tiles keep the tensor cores busy in turn; where O leaves room for one tile only, two S's do.
#   Blocks of 128 rows of a block mask take one Q tile, and a tile_n that divides their keys; only they get to
#     the rows of one Q tile for (128, 128) and (192, 128). Stages: as shared memory allows, where CTAs may
#     persist beside a place for O.
#   polynomial: for 128 x 128 of S a quarter of an SM needs 1024 clocks of ex2; each of the 32 moved to the
#     FMA units takes 32 from that and adds 16 issue slots to about 450, as cubins show. At 64, which ex2
#     binds, 12 moved leave 640 to ex2 and take about 640. Beyond, products take longer, 1024 clocks at 128;
#     6 moved put ex2 (832) well behind them, as many as flash-attn-4's authors found best there.
ROWS = (
    Row(64, 64, False, Config(2, 1, 128, 4, 4, 12, 192, 80, 48)),
    Row(128, 128, False, Config(2, 1, 128, 3, 3, 6, 200, 64, 48, ctas=2), even=True, gain=2065 / 2048),
    Row(128, 128, False, Config(2, 1, 128, 2, 2, 6, 192, 80, 48)),
    Row(128, 128, True, Config(2, 1, 32, 4, 4, 0, 200, 64, 48)),
    Row(192, 128, False, Config(2, 1, 128, 3, 3, 6, 200, 64, 48, ctas=2), even=True, gain=2706 / 2560),
    Row(192, 128, False, Config(2, 1, 128, 2, 1, 6, 192, 64, 64)),
    Row(256, 128, True, Config(2, 1, 64, 2, 2, 0, 192, 80, 48)),
    Row(128, 128, False, Config(1, 2, 128, 3, 2, 6, 240, 152, 112)),
    Row(192, 128, False, Config(1, 2, 128, 2, 2, 6, 240, 152, 112)),
    Row(256, 256, False, Config(1, 2, 128, 3, 2, 6, 240, 152, 112, ctas=2), gain=3088 / 2048),
    Row(256, 256, True, Config(1, 2, 64, 4, 4, 0, 240, 152, 112, ctas=2), gain=3088 / 2064),
    Row(256, 256, True, Config(1, 2, 64, 2, 2, 0, 240, 152, 112)),
)
