"""Tensor memory of the backward kernel: which columns hold what, and who may write over what, and when.

Of 128 keys an accumulator takes all lanes, a key to a lane:

       rows columns        rows columns         columns_v    columns    [columns    64]
    S [over it P]    dP, over it dS [and dQ]       dV           dK      [   dQ      P]

In brackets is what has columns of its own where there are enough left. Of 64 keys an accumulator takes half
of the lanes (see `tmem`), so that two lie side by side in the same columns:

       rows columns     the more of columns_v and columns     all of columns, or half
    S, over it P                      dV                               dQ
    dP, over it dS                    dK

What is multiplied by P or dS out of tensor memory must come to the same lanes, as it does. dQ of 64 rows
takes half of the lanes too: its first columns lie beside its last ones.

Each of the two compute warpgroups has half of the rows of Q: half of the columns of S and dP, and in the same
half its part of P and dS, which take as many columns as they have pairs of rows. So a warp writes only over
what it has read itself. That what lies over something else is not filled too early follows from the order in
which the mma warp begins products, which run in that order:

    dV(t), S(t+1), dK(t), dQ(t), dP(t+1)      P over S
    dV(t), dK(t), dQ(t), S(t+1), dP(t+1)      likewise, with one tile of Q: S(t+1) before dQ's second half
    S(t+1), dV(t), dK(t), dQ(t), dP(t+1)      P apart: who reads S, and who reads P, tell when they have

    P(t) over S(t)        a warp has read its part of S(t)
    S(t+1) over P(t)      dV(t), which reads P(t), runs before it
    dS(t) over dP(t)      a warp has read its part of dP(t)
    dQ(t) over dS(t)      dK(t), which reads dS(t), runs before it
    dP(t+1) over dS(t)    likewise; over dQ(t): the store role has read it
    dQ's second half over its first      the store role has read it
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from cutlass import Int32

from ...common.regions import Region, Regions
from ...problem import Problem
from ..tmem import COLUMNS, HALF_LANES, LANE
from .config import ROWS, WARPGROUPS, Config, SerialConfig, WideConfig, columns_of

STEPS = ("s", "dp", "p", "dv", "ds", "dk", "dq", "store", "end")


@dataclass(frozen=True)
class Plan:
    """Of a CTA alone.

    columns, columns_v: of dK and dQ, and of dV. p_apart: P has columns of its own. rows, keys: of a tile, 64
    or 128. per_column: rows of P and dS that a column holds. shared_weights: P and dS are multiplied out of
    shared memory, not from here.

    ValueError where they do not fit.
    """

    columns: int
    columns_v: int
    p_apart: bool = False
    rows: int = ROWS
    keys: int = ROWS
    per_column: int = 2
    shared_weights = False

    def __post_init__(self) -> None:
        self.stacks  # noqa: B018

    @property
    def half_rows(self) -> int:
        """Rows of a warpgroup."""
        return self.rows // WARPGROUPS

    @property
    def sharers(self) -> int:
        """Threads of a warpgroup that share a key's rows."""
        return ROWS // self.keys

    @property
    def sides(self) -> int:
        """Parts of dQ's columns that lie side by side, in half of the lanes each."""
        return ROWS // self.rows

    @property
    def fillings(self) -> int:
        """Parts of dQ's columns that lie in the same place, one after the other."""
        width, room = self.columns // self.sides, COLUMNS - self.rows - max(self.columns, self.columns_v)
        return 2 if self.keys < ROWS and width > room else 1

    @property
    def columns_at_once(self) -> int:
        """Columns of dQ in one lane."""
        return self.columns // self.sides // self.fillings

    @property
    def apart(self) -> bool:
        """Whether dQ has columns of its own."""
        wide = 2 * self.rows + self.columns + self.columns_v + self.columns_at_once
        return self.keys < ROWS or wide <= COLUMNS

    @functools.cached_property
    def stacks(self) -> tuple[Regions, ...]:
        """What lies in all lanes; or in either half of them.

        Columns. Of P and dS several rows take one; over S and dP the second warpgroup's begin at its half.
        """
        halves = self.half_rows * (WARPGROUPS - 1) + self.half_rows // self.per_column
        p_size, p_over = (self.rows // self.per_column, None) if self.p_apart else (halves, "s")
        widest = max(self.columns, self.columns_v)
        wide, wide_v = (self.columns, self.columns_v) if self.keys == ROWS else (widest, widest)
        values = (
            Region(name="s", size=self.rows, filled="s", read="p"),
            Region(name="p", size=p_size, filled="p", read="dv", over=p_over),
        )
        slopes = (
            Region(name="dp", size=self.rows, filled="dp", read="ds"),
            Region(name="ds", size=halves, filled="ds", read="dk", over="dp"),
        )
        grad_v = Region(name="grad_v", size=wide_v, filled="dv", read="end")
        grad_k = Region(name="grad_k", size=wide, filled="dk", read="end")
        grad_q = Region(
            name="grad_q", size=self.columns_at_once, filled="dq", read="store",
            over=None if self.apart else "dp",
        )  # fmt: skip
        in_all_lanes = ((*values, *slopes, grad_v, grad_k, grad_q),)
        in_halves = (*values, grad_v, grad_q), (*slopes, grad_k, grad_q)
        return tuple(
            Regions(regions=stack, steps=STEPS, unit="columns of tensor memory", room=COLUMNS)
            for stack in (in_all_lanes if self.keys == ROWS else in_halves)
        )

    @property
    def regions(self) -> Regions:
        """What lies in the first lanes."""
        return self.stacks[0]

    def width(self, filling: int) -> int:
        """Columns of dQ in one lane, of a filling."""
        return self.columns_at_once

    def column(self, filling: int, side: int) -> int:
        """The first of dQ's columns that a filling has on a side."""
        return (filling * self.sides + side) * self.columns_at_once

    def grad_q_shape(self, filling: int) -> tuple[int, int]:
        """Rows of a CTA, and columns, of a product that dQ comes by."""
        return self.rows, self.width(filling)

    @property
    def allocated(self) -> int:
        """Columns to ask for: a power of two."""
        return 1 << (self.regions.used - 1).bit_length()

    def at(self, name: str) -> int:
        """First column of a region, and its first lane."""
        names = [[region.name for region in stack.regions] for stack in self.stacks]
        lower = next(i for i, found in enumerate(names) if name in found)
        return self.stacks[lower].at(name, 0) + lower * HALF_LANES * LANE

    def side(self, side: int) -> int:
        """Where dQ's columns of a side lie."""
        return self.at("grad_q") + side * HALF_LANES * LANE

    def half(self, name: str, warpgroup: int | Int32) -> int | Int32:
        """First column of a warpgroup's part of S, P, dP or dS, and its first lane."""
        return self.at(name) + warpgroup * self.step(name)

    def step(self, name: str) -> int:
        """Columns from one warpgroup's part to the next."""
        apart = name == "p" and self.p_apart
        return self.half_rows // self.per_column if apart else self.half_rows


PAIR_STEPS = ("s", "dp", "p", "dq", "store", "dv", "ds", "dk", "end")


@dataclass(frozen=True)
class PairPlan(Plan):
    """Of each CTA of a pair, with 128 keys and 128 rows; fields as in `Plan`.

         32        64            32          128         columns_v   columns
        [          S            ]  dP, over it dS           dV          dK
         P    dQ of the last tile   P

    dQ is of a CTA's 64 rows, the second half of its columns in the lanes below the first's. What lies over
    what follows as in `Plan` from the order of products:

        dV(t), S(t+1), dK(t), dP(t+1), dQ(t)

        P(t) over S(t), dS(t) over dP(t)     a warp has read its part
        dQ(t) over S(t+1)                    all warps of both CTAs have read it
        S(t+1) over P(t)                     dV(t) runs before it; over dQ(t-1): the store roles have read it
        dP(t+1) over dS(t)                   dK(t) runs before it
    """

    @property
    def sides(self) -> int:
        return 2

    @property
    def fillings(self) -> int:
        return 1

    @property
    def apart(self) -> bool:
        """It lies over S, not over dP."""
        return True

    def grad_q_shape(self, filling: int) -> tuple[int, int]:
        return self.rows // 2, self.sides * self.width(filling)

    @functools.cached_property
    def stacks(self) -> tuple[Regions, ...]:
        quarter, half = self.rows // 4, self.rows // 2
        regions = (
            Region(name="s", size=quarter, filled="s", read="p"),
            Region(name="s_middle", size=half, filled="s", read="p"),
            Region(name="s_last", size=quarter, filled="s", read="p"),
            Region(name="p", size=quarter, filled="p", read="dv", over="s"),
            Region(name="p_last", size=quarter, filled="p", read="dv", over="s_last"),
            Region(name="grad_q", size=self.columns_at_once, filled="dq", read="store", over="s_middle"),
            Region(name="dp", size=self.rows, filled="dp", read="ds"),
            Region(name="ds", size=half + quarter, filled="ds", read="dk", over="dp"),
            Region(name="grad_v", size=self.columns_v, filled="dv", read="end"),
            Region(name="grad_k", size=self.columns, filled="dk", read="end"),
        )
        unit = "columns of tensor memory"
        return (Regions(regions=regions, steps=PAIR_STEPS, unit=unit, room=COLUMNS),)

    def step(self, name: str) -> int:
        return self.at("p_last") if name == "p" else self.half_rows


SERIAL_STEPS = ("s", "load", "dp", "p", "ds", "dk", "dv", "dq", "store", "end")


@dataclass(frozen=True)
class SerialPlan(PairPlan):
    """Of each CTA of a pair whose sums leave 192 columns, as at 192/128; fields as in `Plan`.

        columns_v   columns     64           64           64
           dV         dK     [           S            ]
                             [  P   ]  [   dP, over it dS and dQ   ]

    dQ comes in two fillings of the last 64 columns: two thirds, and the rest. What lies over what follows
    from the order of products:

        dP(t), dK(t), dV(t), dQ(t) its first part, S(t+1), dQ(t) the rest

        dP(t) over S(t)       all warps of both CTAs have read S
        P(t) over S(t)        all warps of the CTA have: the second warpgroup's part lies over the first's
        dS(t) over dP(t)      a warp has read its part
        dQ(t) over dS(t)      dK(t) runs before it
        S(t+1) over P(t)      dV(t) runs before it; over dS(t): dK(t) does
        dQ(t) over dQ(t), dP(t+1) over dQ(t)      the store roles have read it
    """

    @property
    def fillings(self) -> int:
        return 2

    def width(self, filling: int) -> int:
        first = self.rows // 2
        return self.columns // self.sides - first if filling else first

    def column(self, filling: int, side: int) -> int:
        return side * (self.columns // self.sides) + filling * self.width(0)

    @functools.cached_property
    def stacks(self) -> tuple[Regions, ...]:
        quarter, half = self.rows // 4, self.rows // 2
        regions = (
            Region(name="grad_v", size=self.columns_v, filled="dv", read="end"),
            Region(name="grad_k", size=self.columns, filled="dk", read="end"),
            Region(name="s", size=half, filled="s", read="load"),
            Region(name="s_last", size=half, filled="s", read="load"),
            Region(name="dp_last", size=half, filled="dp", read="ds"),
            Region(name="p", size=half, filled="p", read="dv", over="s"),
            Region(name="dp", size=half, filled="dp", read="ds", over="s_last"),
            Region(name="ds", size=quarter, filled="ds", read="dk", over="s_last"),
            Region(name="ds_last", size=quarter, filled="ds", read="dk", over="dp_last"),
            Region(name="grad_q", size=self.width(0), filled="dq", read="store", over="dp_last"),
        )
        unit = "columns of tensor memory"
        return (Regions(regions=regions, steps=SERIAL_STEPS, unit=unit, room=COLUMNS),)

    def step(self, name: str) -> int:
        return self.half_rows // 2 if name == "p" else self.half_rows


@dataclass(frozen=True)
class WidePlan(PairPlan):
    """Of each CTA of a pair with 64 keys each; fields as in `Plan`. Nothing lies over anything:

        64    64    columns_v / 2    columns / 2    columns / 2
        S     dP         dV              dK             dQ

    Each has 64 rows of a CTA, the second half of the columns in the lanes below the first's. A warpgroup has
    half of the columns of S and dP: of the rows of Q that either CTA sums dQ of, 32.
    """

    keys: int = ROWS // 2
    shared_weights = True

    @functools.cached_property
    def stacks(self) -> tuple[Regions, ...]:
        half = self.rows // 2
        regions = (
            Region(name="s", size=half, filled="s", read="p"),
            Region(name="dp", size=half, filled="dp", read="ds"),
            Region(name="grad_v", size=self.columns_v // 2, filled="dv", read="end"),
            Region(name="grad_k", size=self.columns // 2, filled="dk", read="end"),
            Region(name="grad_q", size=self.columns_at_once, filled="dq", read="store"),
        )
        unit = "columns of tensor memory"
        return (Regions(regions=regions, steps=STEPS, unit=unit, room=COLUMNS),)

    def step(self, name: str) -> int:
        return self.half_rows // self.sides


def plan_of(problem: Problem, config: Config) -> Plan:
    """That of a problem's kernel with this config."""
    if isinstance(config, WideConfig):
        return WidePlan(*columns_of(problem))
    if isinstance(config, SerialConfig):
        return SerialPlan(*columns_of(problem))
    if config.paired:
        return PairPlan(*columns_of(problem))
    per_column = 32 // problem.precision.bits
    return Plan(*columns_of(problem), config.p_apart, config.tile_m, config.tile_n, per_column)
