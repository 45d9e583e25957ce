"""How a tree's tuning tables answer a call: by the first row that serves, fitted to the call's sizes.

A row says for which problems its config is and what chose its numbers. A table says what its tree makes of a
row: on a device, for a problem, for few rows of Q, and in which order tiles are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .backward import BackwardProblem
from .kernel import Tuning
from .packing import config_probe_sizes, count_tiles, heads_of_tile
from .problem import Device, Problem, Sizes
from .split import fastest_splits, sees_few_blocks


@dataclass(frozen=True, kw_only=True)
class Row:
    """A config for head dims up to (head_dim, head_dim_v), and what chose its numbers.

    pressure: the highest `register_pressure` of a problem that leaves it registers enough. even: only for
    problems whose rows all see the same keys. gain: what a CTA of a pair does in the time in which one by
    itself does 1; as many more CTAs may pairs take for the rows of a call.
    """

    head_dim: int
    head_dim_v: int
    pressure: int
    config: Any
    why: str
    even: bool = False
    gain: float = 1.0


def unchanged(config: Any, problem: Problem, device: Device) -> Any:
    """The config as it is."""
    return config


@dataclass(eq=False, kw_only=True)
class Table:
    """Rows, read top to bottom.

    register_pressure(problem, device): how many registers a problem needs besides S, P and O, in levels.
    fitted(config, problem, device): a row's config as it is used there, None where there is no room for it.
    at_once(config, problem, device): how many tiles the device works on together.
    most_heads: of one KV head, that may share a tile. few_rows: up to so many rows of a call's sequences, of
    all heads of a tile, for_few_rows(config, problem, device) replaces the config; 0: never.
    shares_many(problem): whether heads share tiles of more rows than that, too.
    suits(row, q_rows): whether more rows than that, `q_rows`, are enough for a row of the table.
    scheduled(config, problem, device): with the order of the tiles.
    """

    rows: tuple[Row, ...]
    register_pressure: Callable[[Problem, Device], int]
    fitted: Callable[[Any, Problem, Device], Any]
    at_once: Callable[[Any, Problem, Device], int]
    most_heads: int = 1
    few_rows: int = 0
    shares_many: Callable[[Problem], bool] = lambda problem: True
    for_few_rows: Callable[[Any, Problem, Device], Any] = unchanged
    suits: Callable[[Row, int], bool] = lambda row, q_rows: True
    scheduled: Callable[[Any, Problem, Device], Any] = unchanged

    def serving(self, problem: Problem, device: Device) -> Iterator[tuple[Row, Any]]:
        """Rows that serve a problem, and their configs as they are used there; block mask and sizes aside."""
        pressure = self.register_pressure(problem, device)
        for row in self.rows:
            reaches = problem.head_dim <= row.head_dim and problem.head_dim_v <= row.head_dim_v
            if reaches and pressure <= row.pressure and (not row.even or problem.sees_evenly):
                config = self.fitted(row.config, problem, device)
                if config is not None:
                    yield row, config

    @property
    def tuning(self) -> Tuning:
        """What a kernel declares."""
        return Tuning(
            config=lambda *asked: choose(self, *asked),
            configs=lambda *asked: choices(self, *asked),
            fitting=lambda *asked: [config for _, config in self.serving(*asked)],
            splits=lambda *asked: splits(self, *asked),
            at_once=self.at_once,
        )


@dataclass(eq=False, kw_only=True)
class GradientTable:
    """Rows for gradients, read top to bottom, whatever the sizes: each has a `config` for tiles of keys.

    serves(row, problem, device): whether a row is for a problem, and leaves it registers enough.
    ctas(config): that share a tile of keys.
    """

    rows: tuple[Any, ...]
    serves: Callable[[Any, BackwardProblem, Device], bool]
    ctas: Callable[[Any], int] = lambda config: 1

    def configs(self, problem: BackwardProblem, device: Device) -> list[Any]:
        """Of rows that serve, room in shared memory and block mask aside."""
        return [row.config for row in self.rows if self.serves(row, problem, device)]

    def fitting(self, problem: BackwardProblem, device: Device) -> list[Any]:
        """Of rows that the device has room for, block mask aside."""
        configs = self.configs(problem, device)
        return [config for config in configs if config.shared_memory(problem) <= device.shared_memory]

    def choose(self, problem: BackwardProblem, device: Device, sizes: Sizes | None = None) -> Any:
        """The first that fits and divides the blocks of a block mask, or None."""
        fitting = self.fitting(problem, device)
        return next((c for c in fitting if problem.forward.takes_tiles(c.tile_m, c.tile_n)), None)

    @property
    def tuning(self) -> Tuning:
        """What a kernel declares: CTAs for every key tile of every query head."""

        def blocks(config: Any, sizes: Sizes, _: int) -> int:
            tiles = -(-sizes.seqlen_k // config.tile_n)
            return tiles * self.ctas(config) * sizes.heads_q * sizes.batch

        return Tuning(
            config=self.choose,
            fitting=self.fitting,
            in_registers=self.configs,
            blocks=blocks,
        )


def choose(table: Table, problem: Problem, device: Device, sizes: Sizes | None = None) -> Any:
    """The first row's config that serves, fits, divides the blocks of a block mask and suits the sizes.

    None where there is none; sizes None: as good as it gets for all.
    """
    for row, config in table.serving(problem, device):
        if not problem.takes_tiles(config.tile_m, config.tile_n):
            continue
        if sizes is not None:
            config = _sized(table, row, config, problem, device, sizes)
        if config is not None:
            return table.scheduled(config, problem, device)
    return None


def _sized(table: Table, row: Row, config: Any, problem: Problem, device: Device, sizes: Sizes) -> Any:
    """A row's config for a call of these sizes, or None where it does not suit them."""
    rows = sizes.seqlen_q
    if table.most_heads > 1:
        most = table.most_heads
        if not table.shares_many(problem):
            most = max(1, min(most, table.few_rows // max(rows, 1)))
        config = replace(config, heads=heads_of_tile(problem, config.tile_m, most, sizes))
        rows *= config.heads
    if rows <= table.few_rows:
        return table.for_few_rows(config, problem, device)
    return config if table.suits(row, rows) else None


def choices(table: Table, problem: Problem, device: Device) -> tuple[Any, ...]:
    """Every config that `choose` gives for some sizes."""
    changes = (1, table.few_rows + 1, *sorted({row.config.tile_m for row in table.rows}))
    found = (None, *config_probe_sizes(problem, changes, table.most_heads))
    return tuple(dict.fromkeys(choose(table, problem, device, sizes) for sizes in found))


def splits(table: Table, problem: Problem, device: Device, sizes: Sizes) -> int:
    """In how many parts to take the keys of a call."""
    problem = replace(problem, split_kv=True)
    config = choose(table, problem, device, sizes)
    if config is None or sees_few_blocks(problem):
        return 1
    tiles = count_tiles(config.tile_m, config.heads, sizes)
    return fastest_splits(tiles, -(-sizes.seqlen_k // config.tile_n), table.at_once(config, problem, device))
