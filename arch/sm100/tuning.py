"""Tile sizes of the sm100 kernels: a table, read top to bottom; the first row that serves is taken.

Nothing here is timed: there is no such GPU at hand. What chose the numbers:

registers: `setmaxnreg` moves 512 (or with one Q tile 504) per thread between three or four warpgroups. A row
    of S takes tile_n of the softmax's; as cubins show, no row of the table spills.
tile_n: 128, so that the operands of a product are read from shared memory as fast as it runs; less where
    registers or K and V in shared memory do not allow it.
ctas: a pair halves what K and V cost a CTA's shared memory. Clocks for 128 keys, by counts: at (128, 128) the
    products take 2048, shared memory 2065 alone and 1297 in a pair; at (192, 128) 2560, 2706 and 1746; at
    (256, 256) 2048, 3088 and 1544. The gain is what binds one CTA over what binds a pair's. That the two
    wait for each other is not in the counts.
slots: two Q tiles keep the tensor cores busy in turn; where O leaves room for one tile only, two S's do.
stages: as shared memory allows, where CTAs may persist beside a place for O.
polynomial: for 128 x 128 of S a quarter of an SM needs 1024 clocks of ex2; each of the 32 moved to the FMA
    units takes 32 from that and adds 16 issue slots to about 450, as cubins show. At 64, which ex2 binds, 12
    moved leave 640 to ex2 and take about 640. Beyond, products take longer, 1024 clocks at 128: 4 moved put
    ex2 (896) behind them, and are what the timing model says is fastest there or within 2 % of it.
"""

from __future__ import annotations

from dataclasses import replace

from ..problem import Device, Problem
from ..tuning import Row, Table
from .config import REDUCED_FROM, REDUCING_LOADS, SLOW_EX2, TILE_M, Config

LIGHT, HEAVY = range(2)
SOFTCAP_WORK = 3  # s / cap, tanh, * cap


def register_pressure(problem: Problem, device: Device) -> int:
    """HEAVY: with dropout, rules that read tables, a mask of more than two comparisons, a score that sees
    positions or has more operations than a softcap; on 11.0, which has no arithmetic on pairs, with any rule.
    """
    rules = [rule for rule in (problem.mask, problem.score) if rule]
    tables = any(rule.reads_tables() for rule in rules)
    long = problem.mask is not None and not problem.mask.is_light()
    score = problem.score
    heavy = score is not None and (score.work() > SOFTCAP_WORK or score.sees_positions())
    heavy = heavy or problem.dropout or tables or long or (rules and device.capability == (11, 0))
    return HEAVY if heavy else LIGHT


def fitted(config: Config, problem: Problem, device: Device) -> Config | None:
    """With what the device does better than others; None where there is no room for it."""
    if config.shared_memory(problem) > device.shared_memory:
        return None
    polynomial = config.polynomial if device.capability in SLOW_EX2 else 0
    reduce = device.capability in REDUCING_LOADS and problem.head_dim >= REDUCED_FROM
    return replace(config, polynomial=polynomial, reducing_loads=reduce)


STAGES_FOR_FEW_ROWS = 4  # K and V then stream through once: as many bytes under way as shared memory holds


def for_few_rows(config: Config, problem: Problem, device: Device) -> Config:
    """A CTA with one Q tile, for a second would hold no row; and more of K and V under way.

    What a row's numbers depend on stays as it is for many rows: how many keys make a block, and which
    exponentials are computed how.
    """
    few = next((c for _, c in FORWARD.serving(problem, device) if c.tiles == c.ctas == 1), None)
    if few is None:
        return config
    same = ("tile_n", "heads", "polynomial", "reducing_loads")
    few = replace(few, **{name: getattr(config, name) for name in same})
    depths = (*range(STAGES_FOR_FEW_ROWS, few.k_stages, -1), None, *range(few.k_stages - 1, 0, -1))
    staged = (replace(few, k_stages=n, v_stages=n) if n else few for n in depths)
    return next((c for c in staged if c.shared_memory(problem) <= device.shared_memory), config)


def suits(row: Row, q_rows: int) -> bool:
    """Whether a row's pairs gain more than the CTAs cost that have no rows, where there are `q_rows`."""
    tile_m, ctas = row.config.tile_m, row.config.ctas
    paired, alone = ctas * -(-q_rows // tile_m), -(-q_rows * ctas // tile_m)
    return paired <= row.gain * alone


def scheduled(config: Config, problem: Problem, device: Device) -> Config:
    """Whether CTAs persist.

    Where tiles are equal there is nothing to balance, so they may: O leaves while the next tile's Q, K and V
    arrive, if there is shared memory for Q and O at once. Tiles of different lengths go to whichever
    multiprocessor is free: the hardware gives a CTA for each its place. On 11.0 there is no register left to
    tell tiles by.
    """
    if device.capability == (11, 0):
        return config
    persistent = replace(config, persistent=True)
    fits = persistent.shared_memory(problem) <= device.shared_memory
    return persistent if fits and problem.equal_tiles and device.multiprocessors > 1 else config


def _registers(softmax: int, correction: int, other: int) -> dict[str, int]:
    """Per thread, as `setmaxnreg` shares them out."""
    return {"softmax_registers": softmax, "correction_registers": correction, "other_registers": other}


ONE_TILE = {"tiles": 1, "slots": 2, **_registers(240, 152, 112)}
TWO_TILES = {"tiles": 2, "slots": 1}
WIDE = _registers(200, 64, 48)
EVEN = _registers(192, 80, 48)
ROWS = (
    Row(
        head_dim=64, head_dim_v=64, pressure=LIGHT,
        config=Config(**TWO_TILES, **EVEN, tile_n=128, k_stages=4, v_stages=4, polynomial=12),
        why="ex2 binds, not the products",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=LIGHT, even=True, gain=2065 / 2048,
        config=Config(**TWO_TILES, **EVEN, tile_n=128, k_stages=3, v_stages=3, polynomial=4, ctas=2),
        why="a pair, only where rows see the same keys: it gains less than a causal mask costs, where both "
        "CTAs visit what the rows of either see",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=LIGHT,
        config=Config(**TWO_TILES, **WIDE, tile_n=128, k_stages=2, v_stages=2, polynomial=4),
        why="alone; two stages of K and V are what shared memory holds",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=HEAVY,
        config=Config(**TWO_TILES, **WIDE, tile_n=32, k_stages=4, v_stages=4, polynomial=0),
        why="with tables tile_n 64 spills",
    ),
    Row(
        head_dim=192, head_dim_v=128, pressure=LIGHT, even=True, gain=2706 / 2560,
        config=Config(**TWO_TILES, **WIDE, tile_n=128, k_stages=3, v_stages=3, polynomial=6, ctas=2),
        why="a pair, as at (128, 128)",
    ),
    Row(
        head_dim=192, head_dim_v=128, pressure=LIGHT,
        config=Config(
            **TWO_TILES, **_registers(192, 64, 64), tile_n=128, k_stages=2, v_stages=1, polynomial=6
        ),
        why="alone; shared memory has no room for a second V",
    ),
    Row(
        head_dim=256, head_dim_v=128, pressure=HEAVY,
        config=Config(**TWO_TILES, **EVEN, tile_n=64, k_stages=2, v_stages=2, polynomial=0),
        why="registers and shared memory allow 64; beyond 128 a causal mask with tables spills at 96",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=LIGHT,
        config=Config(**ONE_TILE, tile_n=128, k_stages=3, v_stages=2, polynomial=6),
        why="only block masks with blocks of 128 rows get here: one Q tile, and a tile_n that divides their "
        "keys",
    ),
    Row(
        head_dim=192, head_dim_v=128, pressure=LIGHT,
        config=Config(**ONE_TILE, tile_n=128, k_stages=2, v_stages=2, polynomial=6),
        why="as the row before; two stages are what shared memory holds",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=LIGHT, gain=3088 / 2048,
        config=Config(**ONE_TILE, tile_n=128, k_stages=3, v_stages=2, polynomial=6, ctas=2),
        why="a pair gains half as much again, more than a causal mask costs",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVY, gain=3088 / 2064,
        config=Config(**ONE_TILE, tile_n=64, k_stages=4, v_stages=4, polynomial=0, ctas=2),
        why="a pair, with tile_n as registers allow",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVY,
        config=Config(**ONE_TILE, tile_n=64, k_stages=2, v_stages=2, polynomial=0),
        why="for few rows and block masks, which leave a pair's second CTA without any",
    ),
)  # fmt: skip
FORWARD = Table(
    rows=ROWS,
    register_pressure=register_pressure,
    fitted=fitted,
    at_once=lambda config, problem, device: device.multiprocessors // config.ctas,
    most_heads=16,  # a group of more is taken in several
    few_rows=TILE_M,
    for_few_rows=for_few_rows,
    suits=suits,
    scheduled=scheduled,
)
